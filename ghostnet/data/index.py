"""The file names of an image folder: one block of bytes, kept between runs and checked against the folders' times."""

import contextlib
import ctypes
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FORMAT = 2
"""Of the cache; another one is passed over and written anew."""
NO_DATA = ("@eaDir", "__MACOSX", "lost+found")
"""Folders that systems make among a user's own, which hold no data of theirs."""
THREADS = 8
"""Folders listed at once: a network file system takes its time for each. With more they wait for each other."""
SETTLED = 3.0
"""Seconds since its last change after which a folder's time tells the next one: ext3 counts in seconds, and the clock
of a file server may be off by some."""
KEPT = 16
"""Files that the cache may hold; ImageNet's take 27 MB."""
KEEPS_TIMES = {
    *{0xEF53, 0x58465342, 0x9123683E, 0x2FC12FC1, 0xF2F52010},  # ext2 to ext4, XFS, Btrfs, ZFS, F2FS
    *{0x01021994, 0x794C7630, 0x6969, 0x00C36400, 0x0BD00BD0},  # tmpfs, overlayfs, NFS, Ceph, Lustre
}
"""File systems (statfs(2)) whose folders change their ctime with every name. Buckets mounted by FUSE don't, FAT and
exFAT only under Linux, and the times in SquashFS are whatever its maker gave them: those are listed every time."""

DIGEST = hashlib.sha256().digest_size
_libc = ctypes.CDLL(None)


class _Listing(NamedTuple):
    """The images of one class folder: sorted names, a NUL after each, and the folder's stamp when they were read.

    Names have slashes where an image lies in a folder of the class folder; such a listing has no stamp.
    """

    stamp: list[int] | None
    names: bytes | memoryview
    passed_over: int = 0
    example: str = ""
    """Of the names that were passed over."""


class FileIndex:
    """The images of folder/<class>/ in any depth, by class and within it by name.

    Classes are sorted as numbers if all of their names are numbers, else as text. Hidden files and folders are passed
    over, and so are links to a folder that they lie in, and what is no image by its name: their number and an example
    are kept.

    ImageNet's 1.28 million take 37 MB so, a third of a list of str. OSError where a folder can't be read; a cache that
    can't be read or written is done without.
    """

    def __init__(self, folder: Path) -> None:
        # Listed every time: that takes milliseconds, and notices classes that come and go.
        entries = list(os.scandir(folder))
        folders = [entry.name for entry in entries if entry.is_dir()]
        self.classes = in_order(name for name in folders if _is_data(name))
        listings = _listings(folder, self.classes)
        hidden = sorted(name for name in folders if not _is_data(name))
        hidden += sorted(e.name for e in entries if _is_image(e.name) and not e.is_dir())  # of no class
        examples = [f"{name}/{each.example}" for name, each in zip(self.classes, listings, strict=True) if each.example]
        self.passed_over = len(hidden) + sum(listing.passed_over for listing in listings)
        self.example = next(iter([*examples, *hidden]), "")
        self.names = b"".join(listing.names for listing in listings)
        bounds = np.cumsum([0, *(len(listing.names) for listing in listings)])
        del listings  # the same names once more
        ends = np.flatnonzero(np.frombuffer(self.names, np.uint8) == 0)
        self.starts = np.concatenate([[0], ends + 1])
        self.first = np.searchsorted(ends, bounds)
        """Index of the first file of each class, and their number."""

    @property
    def counts(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Files of each class."""
        return np.diff(self.first)

    def __getitem__(self, index: int) -> str:
        """The name of a file, class/name."""
        name = os.fsdecode(self.names[self.starts[index] : self.starts[index + 1] - 1])
        return f"{self.classes[int(np.searchsorted(self.first, index, 'right')) - 1]}/{name}"

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def _listings(folder: Path, classes: list[str]) -> list[_Listing]:
    """Those of all classes; what was read anew is known the next time."""
    cache = _Cache(folder)
    known = cache.read()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="index") as pool:
        listings = list(pool.map(lambda name: _listing(folder / name, known.get(name)), classes))
    settled = {name: listing for name, listing in zip(classes, listings, strict=True) if listing.stamp is not None}
    if settled != known:
        cache.write(settled)
    return listings


class _Cache:
    """The listings of all classes in a file: a digest, a line of JSON with classes, stamps and sizes, the names."""

    def __init__(self, folder: Path) -> None:
        own = os.path.realpath(folder)
        # The digest covers it, so that a file of another format, rule or folder reads like a damaged one.
        self.identity = repr((FORMAT, EXTENSIONS, sys.getfilesystemencoding(), own)).encode()
        name = hashlib.sha256(os.fsencode(own)).hexdigest()[:32]
        self.path = cache_folder() / "index" / name

    def read(self) -> dict[str, _Listing]:
        """What was written last, by class; {} for anything but that."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return {}
        view = memoryview(content)
        if view[:DIGEST] != self._digest([view[DIGEST:]]):
            return {}
        at = content.index(b"\n", DIGEST) + 1
        known = {}
        for name, stamp, size, passed_over, example in json.loads(content[DIGEST:at]):
            known[name] = _Listing(stamp, view[at : at + size], passed_over, example)
            at += size
        return known

    def write(self, listings: Mapping[str, _Listing]) -> None:
        """Whole or not at all; not where the disk is full or the folder can't be written."""
        table = [[name, each.stamp, len(each.names), each.passed_over, each.example] for name, each in listings.items()]
        parts = [json.dumps(table).encode() + b"\n", *(listing.names for listing in listings.values())]
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A name that no process on another machine has either: home folders are shared.
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".")
            temporary = Path(name)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.writelines([self._digest(parts), *parts])
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
            # Data in a folder of each job would fill the home folder in time; so would what killed writers left.
            by_age = sorted(self.path.parent.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in by_age[:-KEPT]:
                path.unlink(missing_ok=True)

    def _digest(self, parts: Iterable[bytes | memoryview]) -> bytes:
        digest = hashlib.sha256(self.identity)
        for part in parts:
            digest.update(part)
        return digest.digest()


def cache_folder() -> Path:
    """Where this project keeps what it can get again; for a user without a home, where nothing can be kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ghostnet"
    except RuntimeError:  # neither HOME nor an entry in passwd
        return Path(os.devnull) / "no home, set XDG_CACHE_HOME"


def _listing(path: Path, known: _Listing | None) -> _Listing:
    """The images of a class folder: what is known of it while its stamp is the same, else read."""
    # Of the open folder, since NFS asks its server on opening and may else answer from memory.
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Before the names are read: what changes meanwhile gives it another stamp.
        stamp = _stamp(opened)
        if known is not None and known.stamp == stamp:
            return known
        found = os.listdir(opened)  # noqa: PTH208 (of a descriptor)
        names = [name for name in found if _is_image(name)]
        others = [name for name in found if not _is_image(name)] if len(names) < len(found) else []
        # Names alone are faster to list: what is a folder is only asked if some name is no image's.
        entries = os.scandir(opened) if others else ()
        folders = [e.name for e in entries if _is_data(e.name) and not _is_image(e.name) and e.is_dir()]
        folders = [name for name in folders if not _leads_up(path / name)]
        for name in folders:
            for place, inner, files in os.walk(path / name, onerror=_raise, followlinks=True):
                at, every = os.path.relpath(place, path), list(inner)
                inner[:] = [each for each in every if _is_data(each) and not _leads_up(Path(place, each))]
                others += [f"{at}/{each}" for each in every if each not in inner]
                names += [f"{at}/{file}" for file in files if _is_image(file)]
                others += [f"{at}/{file}" for file in files if not _is_image(file)]
        passed_over = sorted(set(others) - set(folders))
        names.sort()
    except OSError as error:
        if not isinstance(error.filename, str):
            error.filename = str(path)  # else the number that it was opened as
        raise
    finally:
        os.close(opened)
    kept = None if folders else stamp  # a folder's stamp tells nothing of the folders in it
    content = os.fsencode("".join(f"{name}\0" for name in names))
    return _Listing(kept, content, len(passed_over), next(iter(passed_over), ""))


def _stamp(opened: int) -> list[int] | None:
    """What changes with each name that comes, goes or changes in an open folder; None where nothing does for sure.

    Not only mtime: tar and rsync set it back. Not st_dev: it differs between machines that share data and home.
    """
    status = os.fstat(opened)
    if time.time() - status.st_ctime < SETTLED or not _keeps_times(opened):
        return None
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _keeps_times(opened: int) -> bool:
    status = ctypes.create_string_buffer(4096)  # much more than any system's struct statfs; f_type comes first
    return _libc.fstatfs(opened, status) == 0 and ctypes.c_long.from_buffer(status).value & 0xFFFFFFFF in KEEPS_TIMES


def _raise(error: OSError) -> NoReturn:
    raise error


def _leads_up(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in, whose images would be found again and again."""
    return folder.is_symlink() and any(folder.samefile(above) for above in folder.parents)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _is_data(folder: str) -> bool:
    return not folder.startswith(".") and folder not in NO_DATA


def in_order(classes: Iterable[str]) -> list[str]:
    """Sort names of classes: as numbers if all are, as ImageNetV2's folders 0 … 999, else as text."""
    names = sorted(classes)
    return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else names
