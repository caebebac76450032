"""What a process and all that it started use, as Linux tells it in /proc."""

import contextlib
import os
from pathlib import Path

PROC = Path("/proc")
TICK = os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """A process and its living descendants."""
    children: dict[int, list[int]] = {}
    for name in (entry.name for entry in PROC.iterdir()):
        if name.isdecimal() and (fields := _stat(int(name))):
            children.setdefault(int(fields[1]), []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """Seconds of all CPUs that the tree has used so far, by those that ended and were waited for too."""
    return sum(sum(map(int, fields[11:15])) for pid in tree(root) if (fields := _stat(pid))) / TICK


def memory(root: int) -> int:
    """Bytes: the most that the process has held, and what its descendants hold now that is theirs alone.

    Pages that they share with it are among its own.
    """
    held = [_sum(root, "status", ("VmHWM:",))]
    held += [_sum(pid, "smaps_rollup", ("Private_Clean:", "Private_Dirty:")) for pid in tree(root)[1:]]
    return sum(held)


def _sum(pid: int, file: str, names: tuple[str, ...]) -> int:
    """Bytes of some lines of a file of a process; none where it has ended meanwhile."""
    with contextlib.suppress(OSError):
        lines = (PROC / str(pid) / file).read_text(encoding="utf-8").splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(names))
    return 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent, …; none where the process has ended."""
    try:
        return (PROC / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
