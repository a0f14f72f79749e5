"""`pread`: buffered reads, dropped from the page cache behind themselves.

For file systems without O_DIRECT.  Read-ahead is off (the readers ask for whole extents already),
and what was copied is dropped, so that a memory limit does not fill with pages nobody wants again.
"""

from __future__ import annotations

from .. import _core
from .native import NativeStorage


class PreadStorage(NativeStorage):
    """Any alignment, any regular file."""

    name = "pread"
    mode = _core.READ_PREAD
