"""What a caller of a cluster hears when the ranks cannot serve it; a rank's own failure is `ringfa3.RankFailed`."""

from __future__ import annotations

from typing import Any


class NotReady(RuntimeError):
    """There is no gang of ranks at the moment: it starts, or is being rebuilt after a failure. Try again later."""


class SessionLost(RuntimeError):
    """The session's keys and values went with the gang of ranks that held them; open another session."""


class Overloaded(RuntimeError):
    """The ranks hold as much for callers as they may (memory of waiting calls, of sessions). Try again later."""


class Closed(RuntimeError):
    """The cluster, or the session, has been closed."""


def blame(error: BaseException, rank: int) -> dict[str, Any]:
    """What a rank says of an error that left the others in the middle of something: who is to blame, and why.

    Args:
        rank: the one that met it. Where that is not the cause (a peer broke off), `sure` is False: somebody may know
            better.
    """
    said = f"{type(error).__name__}: {error}"
    try:
        from torch.distributed import DistError

        from ringfa3 import RankFailed
    except ImportError:  # which may be the error itself
        return {"rank": rank, "message": said, "sure": True}
    if isinstance(error, RankFailed) and error.rank == rank and error.__cause__ is not None:
        return blame(error.__cause__, rank)  # it says that this rank left a call; the cause says why
    if isinstance(error, RankFailed):
        return {"rank": error.rank, "message": error.message, "sure": False}
    peers = isinstance(error, DistError) or any(word in said for word in ("gloo", "NCCL", "Connection closed"))
    return {"rank": rank, "message": said, "sure": not peers}
