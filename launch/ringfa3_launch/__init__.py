"""The only package that knows machines: rank environment, launchers, the command `ringfa3`."""

from ringfa3_launch.local import local
from ringfa3_launch.rank import RankInfo, init, launched

__all__ = ["RankInfo", "init", "launched", "local"]
