"""Time limits of tests that run on machines with other things to do."""

from __future__ import annotations

import os


def patience(seconds: float) -> float:
    """`seconds`, longer in proportion where more wants to run than there are processors."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
