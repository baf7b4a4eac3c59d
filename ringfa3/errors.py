"""What a rank raises when another one has failed."""

from __future__ import annotations

from typing import Any


class RankFailed(RuntimeError):
    """Another rank died, stays away or stopped in the middle of a hop; the gang has to be restarted.

    Args:
        rank: the rank, in the group's numbering; where several are missing, the first of them.
        host: where it runs, "" where that is not known.
        hop: during which hop it was missed (0 is the first message after a call began), None before the first.
        message: what happened.
    """

    def __init__(self, rank: int, host: str = "", hop: int | None = None, message: str = "failed") -> None:
        self.rank, self.host, self.hop, self.message = rank, host, hop, message
        where = f" on {host}" if host else ""
        when = "" if hop is None else f" in hop {hop}"
        super().__init__(f"rank {rank}{where}{when}: {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        return RankFailed, (self.rank, self.host, self.hop, self.message)
