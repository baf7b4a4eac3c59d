"""A gang of ranks that serves one process: `RingCluster`, over ranks started here, by torchrun or by Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfa3_launch.cluster.ring_cluster import RingCluster

__all__ = ["RingCluster"]


def __getattr__(name: str) -> Any:
    """RingCluster at its first use: it imports torch, which takes seconds, and a rank's process needs none of it."""
    if name == "RingCluster":
        from ringfa3_launch.cluster.ring_cluster import RingCluster

        return RingCluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
