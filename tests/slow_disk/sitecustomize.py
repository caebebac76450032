"""A disk that hangs or is slow, for a process that has this folder in PYTHONPATH.

While $SLOW_DISK/hang is there no picture is opened; while $SLOW_DISK/slow is there a file takes so many seconds to
reach the disk.
"""

import io
import os
import time
from pathlib import Path

fault, synced = Path(os.environ.get("SLOW_DISK", "/nowhere")), os.fsync


def slow(opened):
    def open_slowly(path, *rest, **more):
        while str(path).endswith((".jpg", ".JPEG", ".png", ".webp")) and (fault / "hang").exists():
            time.sleep(0.05)
        return opened(path, *rest, **more)

    return open_slowly


def sync_slowly(file):
    if (fault / "slow").exists():
        time.sleep(float((fault / "slow").read_text()))
    synced(file)


os.open, io.open, os.fsync = slow(os.open), slow(io.open), sync_slowly
