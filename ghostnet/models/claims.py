"""What a file of weights claims of itself, held against its size before anything of it is allocated or built."""

import contextlib
import json
import os
import pickletools
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ghostnet.errors import UserError

LONGEST_HEADER = 16 << 20
"""Bytes of safetensors' JSON, and of a pickle without its tensors: of GhostNet's thousand tensors it is 0.2 MB."""
MOST_PARTS = 1_000_000
"""Parts that a tuple may have, with those of its parts: hashing one that holds another twice takes twice as long."""
SPARE = 1 << 30
"""Bytes of memory that reading may take beside its content: libraries that are loaded, arenas of the allocator."""
GETS = ("GET", "BINGET", "LONG_BINGET")
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
NESTING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "NEWOBJ")


def check_safetensors(file: IO[bytes], size: int) -> None:
    """ValueError where the header is absurdly long, or the tensors that it tells of are not the rest of the file."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(LONGEST_HEADER, size - 8):
        raise ValueError(f"its header claims {length:,} bytes")
    entries = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    if max(ends, default=0) != size - 8 - length:
        raise ValueError(f"its header tells of {max(ends, default=0):,} bytes of tensors, not {size - 8 - length:,}")


def check_stored(file: IO[bytes], size: int) -> None:
    """ValueError where a zip's parts are compressed, or come to more bytes than the file has."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size for part in parts):
        raise ValueError("its parts are compressed, as whoever writes such a file never does")
    if (claimed := sum(part.file_size for part in parts)) > size:
        raise ValueError(f"its parts claim {claimed:,} bytes of {size:,}")


def check_is_torchs(file: IO[bytes]) -> None:
    """UserError for a zip that torch.save did not write."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.partition("/")[2].startswith("code/") for name in names):
        raise UserError(
            f"{file.name} is no checkpoint but a TorchScript program: save its state_dict() with torch.save"
        )
    if not any(name.endswith("data.pkl") for name in names):
        held = ", ".join(names[:3]) + (", …" if names[3:] else "")
        raise UserError(f"{file.name} is no checkpoint but a zip archive: unpack it (it holds {held or 'nothing'})")


def check_zip(file: IO[bytes], size: int) -> None:
    """ValueError where the parts are compressed, or come to more bytes than the file has, and for a hostile pickle."""
    check_stored(file, size)
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.filename.endswith("data.pkl"):
                if part.file_size > LONGEST_HEADER:
                    raise ValueError(f"its pickle claims {part.file_size:,} bytes")
                with archive.open(part) as content:
                    check_pickle(content)


def check_legacy(file: IO[bytes]) -> None:
    """The same for what torch wrote before 1.6: the pickles of a number, a version, the system, the content, keys."""
    for _ in range(5):
        check_pickle(file)


def check_pickle(file: IO[bytes]) -> None:
    """ValueError where hashing a tuple of this pickle would not end: a few bytes nest one within itself 2⁶⁰ times.

    The pickle's stack is followed with the number of parts of each object in its place; nothing is built or run.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in PUTS or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        else:
            start = len(stack) - len(operation.stack_before)
            if pickletools.markobject in operation.stack_before:
                # What stands before the mark is counted in stack_before too: a list that is appended to.
                start = marks.pop() - operation.stack_before.index(pickletools.markobject)
            if start < 0:
                raise ValueError("its pickle takes more than it has")
            taken = sum(stack[start:]) + 1 if name in NESTING else 1
            if taken > MOST_PARTS:
                raise ValueError("its pickle nests tuples within themselves")
            del stack[start:]
            stack += [memo[argument] if name in GETS else taken] * len(operation.stack_after)


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """Reading a file of so many bytes takes no more than four times as many of memory, and a GiB; else MemoryError.

    The kernel holds it (Linux): calls that a pickle may make, such as bytearray(2 ** 40), ask nobody else.
    """
    try:
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        before = resource.getrlimit(resource.RLIMIT_AS)
    except OSError:
        yield
        return
    most = min([used + 4 * size + SPARE, *(limit for limit in before if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
