"""Supervisor: keeps a gang of ranks running: starts it, watches it, and when a rank fails kills and rebuilds all."""

from __future__ import annotations

import copy
import logging
import threading
import time

from ringfa3_launch.cluster.faults import Closed, NotReady
from ringfa3_launch.cluster.gang import Gang
from ringfa3_launch.cluster.launcher import Launcher
from ringfa3_launch.cluster.settings import Settings

LOOK = 0.1  # seconds between looks at the gang
PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before a start, by how many in a row have failed
PATIENCE = 10.0  # seconds that ranks may take to end in order

log = logging.getLogger(__name__)


class Supervisor:
    """Keeps one gang after another running, from a thread of its own, until it is closed.

    Args:
        launcher: starts and ends ranks; used by that thread alone.
        settings: the cluster's.
    """

    def __init__(self, launcher: Launcher, settings: Settings) -> None:
        self._launcher, self._settings = launcher, settings
        self._changed = threading.Condition()
        self._gang: Gang | None = None
        self._why: Exception = NotReady("the ranks are being started")
        self._first: BaseException | None = None  # why the first start failed
        self._end = Closed("the cluster has been closed")
        self._closing = threading.Event()
        self._wake = threading.Event()
        self.restarts = 0
        self._thread = threading.Thread(target=self._run, name="ringfa3 supervisor", daemon=True)
        self._thread.start()

    def gang(self) -> Gang:
        """The gang that serves.

        Raises:
            NotReady: there is none at the moment; says why.
            Closed: nor will there be.
        """
        gang = self._gang
        if gang is None or gang.failure is not None:
            raise self._refusal()
        return gang

    def wait(self, timeout: float | None) -> Gang:
        """The gang that serves, as soon as there is one.

        Raises:
            NotReady: not within the timeout.
            Closed: nor will there be.
            Exception: why the first gang could not be started.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._gang is None:
                if self._first is not None:
                    raise self._first
                left = None if deadline is None else deadline - time.monotonic()
                if self._closing.is_set() or (left is not None and left <= 0):
                    raise self._refusal()
                self._changed.wait(left)
            return self._gang

    def close(self) -> None:
        """End all ranks, in order where they can, and the thread."""
        self._closing.set()
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _refusal(self) -> Exception:
        if self._closing.is_set():
            return copy.copy(self._end)
        return NotReady(str(self._why))

    def _run(self) -> None:
        attempt = failures = 0
        try:
            while not self._closing.wait(PAUSES[min(failures, len(PAUSES) - 1)]):
                try:
                    gang = self._start(attempt)
                except Exception as error:
                    failures += 1
                    self._launcher.kill()
                    if attempt == 0:  # who waits for it raises it
                        with self._changed:
                            self._first = error
                        return
                    log.warning("gang %d could not be started: %s", attempt, error)
                    self._why = NotReady(f"the ranks could not be restarted: {error}")
                else:
                    failures = 0
                    self._serve(gang)
                attempt += 1
                self.restarts += not self._closing.is_set()
        except BaseException as error:
            log.exception("the supervisor of the ranks failed")
            self._end = Closed(f"the cluster has ended: its supervisor failed: {type(error).__name__}: {error}")
        finally:
            self._closing.set()
            self._launcher.close()
            with self._changed:
                self._changed.notify_all()

    def _start(self, attempt: int) -> Gang:
        deadline = time.monotonic() + self._settings.start_timeout
        gang = Gang(self._launcher.start(self._settings, attempt), self._settings, self._wake, attempt=attempt)
        try:
            gang.join(deadline, self._closing)
        except BaseException as error:
            gang.close(NotReady(str(error)))
            raise
        return gang

    def _serve(self, gang: Gang) -> None:
        """Watch a gang until a rank fails, or the cluster is closed; leaves no rank."""
        with self._changed:
            self._gang = gang
            self._changed.notify_all()
        failure: Exception | None = None
        try:
            while failure is None and not self._closing.is_set():
                self._wake.wait(LOOK)
                self._wake.clear()
                failure = gang.look()
            if failure is None:
                self._gang = None
                gang.end(PATIENCE)
            else:
                self._why = NotReady(f"the ranks are being restarted, because {failure}")
                log.warning("gang failed, %s", failure)
        finally:  # whatever happens, nobody waits for ever
            self._gang = None
            gang.close(failure or self._end)
            self._launcher.kill()
