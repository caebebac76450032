"""A disk that hangs or is slow, for a process that has this folder in PYTHONPATH.

While $SLOW_DISK/hang is there no picture is opened; while $SLOW_DISK/slow is there a file takes so many seconds to
reach the disk.
"""

import os
import time
from pathlib import Path

fault, opened, synced = Path(os.environ.get("SLOW_DISK", "/nowhere")), os.open, os.fsync


def open_slowly(path, flags, *rest, **more):
    while str(path).endswith((".jpg", ".JPEG", ".png", ".webp")) and (fault / "hang").exists():
        time.sleep(0.05)
    return opened(path, flags, *rest, **more)


def sync_slowly(file):
    if (fault / "slow").exists():
        time.sleep(float((fault / "slow").read_text()))
    synced(file)


os.open, os.fsync = open_slowly, sync_slowly
