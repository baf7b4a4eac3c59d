"""How long tests wait, on a machine that others may be using."""

from __future__ import annotations

import os


def patience(seconds: float) -> float:
    """So many seconds of a machine of one's own; this one may have others' work to do."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
