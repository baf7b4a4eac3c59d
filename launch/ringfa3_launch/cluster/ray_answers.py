"""What became of calls to Ray actors: their answers, or why there is none."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any


def gather(calls: Sequence[Any], who: str, deadline: float) -> list[Any]:
    """What the calls returned.

    Raises:
        ChildProcessError: one failed.
        TimeoutError: one has not returned by then.
    """
    import ray

    waiting = list(calls)
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(str(calls.index(call)) for call in waiting)
            raise TimeoutError(f"{who} {late}: wanted it to start in time, got nothing")
        failed = failure(ready[0])
        if failed is not None:
            raise ChildProcessError(f"{who} {calls.index(ready[0])} ended as it started: {failed}")
    return ray.get(list(calls))  # type: ignore[no-any-return]


def failure(call: Any) -> str | None:
    """Why a call that is over came to nothing; None: it did not."""
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

    try:
        ray.get(call)
        return None
    except RayTaskError as error:
        return f"{type(error.cause).__name__}: {error.cause}"
    except RayActorError as error:
        return gist(str(error))
    except RayError as error:
        return f"{type(error).__name__}: {error}"


def gist(text: str) -> str:
    """The gist of what Ray says of a dead actor, without ids and advice."""
    words = " ".join(line for line in text.splitlines()[1:] or [text] if not line.startswith("\t"))
    found = re.search(r"Worker exit type: (\w+) Worker exit detail: ([^.]*)", words)
    if found is None:
        return words[:300]
    hint = ": killed, out of memory, or crashed" if found[1] == "SYSTEM_ERROR" else ""
    return f"{found[1]} ({found[2].strip()}){hint}"
