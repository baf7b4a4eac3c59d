"""Transports: how the shards of keys and values come by, and how their gradients find home."""

from ringfa3.transport.gather import Gather
from ringfa3.transport.hierarchical import Hierarchical
from ringfa3.transport.pull import Pull
from ringfa3.transport.ring import Ring
from ringfa3.transport.transport import KV, Homing, Transport
from ringfa3.transport.wire import Wire

__all__ = ["KV", "Gather", "Hierarchical", "Homing", "Pull", "Ring", "Transport", "Wire"]
