"""Tar shards with random access: those that ghostnet.tools.pack makes, by their index, and those of others, by a scan.

Images are read with pread, not through mmap: a mapping of a file that somebody truncates ends the process with SIGBUS,
and while the disk is waited for it stops all Python threads, not only its own. Random reads of 20 KB by 8 threads took
31 µs with pread and 296 µs with mmap off the disk, 3.6 µs with either from the page cache (SSD, 2 cores).
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import resource
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ghostnet.data.datasets import Labels, Split, among, read_names
from ghostnet.data.decode import Picture, picture
from ghostnet.data.index import cache_folder
from ghostnet.data.tars import BLOCK, MOST_CLASSES, ROW, TAR_RULES, Rows, scan
from ghostnet.errors import SampleError, UserError
from ghostnet.models.claims import check_stored

INDEX, CLASSES, STATE = "index.npz", "classes.json", "pack.json"
NAMES = {"train": ("train",), "val": ("val", "validation", "valid")}
LONGEST_LIST = 1 << 27
"""Bytes of a list of class names."""
AGAIN = "Copy it again, or remove the folder and pack it anew (python -m ghostnet.tools.pack)."


@dataclass(frozen=True)
class Index:
    """Where each image of a split lies: 28 bytes of memory an image."""

    shards: list[str]
    """Names within one folder."""
    sizes: list[int]
    """Bytes of each shard."""
    rows: Rows
    labels: Labels
    mtimes: list[int] = field(default_factory=list)
    """Nanoseconds; of shards that were scanned. Ours may be copied, and carry a checksum of each image instead."""
    note: str = ""
    """What a scan passed over."""

    def save(self, path: Path) -> None:
        """Write it, whole or not at all; OSError where that fails."""
        content = io.BytesIO()
        columns = {"sizes": np.array(self.sizes, np.int64), "mtimes": np.array(self.mtimes, np.int64)}
        arrays = {"shards": np.array(self.shards), "rows": self.rows, "labels": self.labels.astype(np.int32), **columns}
        arrays["note"] = np.array(self.note)
        np.savez(content, allow_pickle=False, **arrays)
        write_whole(path, content.getvalue())

    @staticmethod
    def load(path: Path) -> "Index":
        """Read one, and check that no row leads outside its shard; ValueError for what is none."""
        try:
            with path.open("rb") as content:
                check_stored(content, os.fstat(content.fileno()).st_size)
                content.seek(0)
                with np.load(content, allow_pickle=False) as file:
                    columns = [file[name] for name in ("shards", "sizes", "mtimes", "rows", "labels")]
                    note = str(file["note"]) if "note" in file else ""  # indices of version 0.4 have none
        except Exception as error:  # zipfile and numpy raise whatever a broken file leads them to
            raise ValueError(str(error) or type(error).__name__) from None
        shards, sizes, mtimes, rows, labels = columns
        good = [column.dtype for column in columns[1:]] == [np.int64, np.int64, ROW, np.int32]
        good = good and shards.dtype.kind == "U" and all(column.ndim == 1 for column in columns)
        good = good and len(shards) == len(sizes) and len(mtimes) in (0, len(shards))
        good = good and len(rows) == len(labels) > 0 and bool((labels >= 0).all() and (labels < MOST_CLASSES).all())
        good = good and all(Path(name).name == name and name.endswith(".tar") for name in shards.tolist())
        good = good and bool((rows["shard"] < len(shards)).all() and (rows["offset"] >= BLOCK).all())
        if not good or (rows["offset"] > sizes[rows["shard"]] - rows["length"]).any():
            raise ValueError("it is no index")
        return Index(shards.tolist(), sizes.tolist(), rows, labels.astype(np.int64), mtimes.tolist(), note)


class Shards:
    """root/train/*.tar and root/val/*.tar, or root/*train*.tar and root/*val*.tar: `<key>.jpg` beside `<key>.cls`."""

    def __init__(self, split: Split, /, root: str | None, classes: str | None = None) -> None:
        base = self.find(split, root)
        own, names = read_classes(base), read_names(classes) if classes else None
        self.folder, self.index = indexed(base, split, own or names)
        self.labels: Labels = self.index.labels
        self.note = self.index.note
        most = int(self.labels.max())
        self.numbered = not own and not names
        """Whether nothing but their numbers is known of the classes; in WebDatasets these are the model's outputs."""
        self.classes = own or names or [str(label) for label in range(most + 1)]
        if most >= len(self.classes):
            raise UserError(
                f"data.root={root}: {split} has the label {most}, but there are {len(self.classes)} class names. "
                "Complete or remove them."
            )
        if own and names:
            self.labels, self.classes = among(self.labels, own, names, f"data.classes={classes}"), names
        # A quarter of the files that a process may have open, for training and for validation each;
        # a file is closed when the last thread is done with it.
        most_open = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self.open = functools.lru_cache(maxsize=most_open)(_File)

    @staticmethod
    def find(split: Split, root: str | None) -> Path:
        """The root; UserError where it holds no shards of the split."""
        if not root:
            raise UserError(
                "data.root is not set: give the folder that holds train/*.tar and val/*.tar, data.root=/data/shards. "
                "An image folder becomes one by python -m ghostnet.tools.pack data.root=SRC out=DST"
            )
        base = Path(root).expanduser()
        if not (base / STATE).exists() and not (base / split / INDEX).exists():
            _others(base, split)
        return base

    def fingerprint(self) -> str:
        """What changes with any of the images: of our shards by their checksums, of others' by the shards' times."""
        digest = hashlib.sha256(repr((self.index.shards, self.index.sizes, self.index.mtimes)).encode())
        digest.update(self.index.rows.tobytes())
        return digest.hexdigest()

    def image(self, index: int) -> Picture:
        """The picture, of a JPEG its header; SampleError names a shard or an image that can't be read."""
        data, name = self.read(index)
        return picture(data, name)

    def read(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image file, and its name: shard and member."""
        shard, offset, length, crc = self.index.rows[index].item()
        path = self.folder / self.index.shards[shard]
        try:
            file = self.open(path)  # held by its name, or it might be closed before it is read
            block = os.pread(file.number, BLOCK + length, offset - BLOCK)
        except OSError as error:
            raise SampleError(f"{path} can't be read: {error.strerror}.") from None
        if len(block) < BLOCK + length:
            raise SampleError(f"{path} was cut short. {AGAIN}")
        # Of shards that were scanned only the header is known; it tells of other samples at this place.
        if zlib.crc32(block[:BLOCK] if self.index.mtimes else block) != crc:
            raise SampleError(f"{path} has changed since it was indexed (at byte {offset:,}). {AGAIN}")
        return block[BLOCK:], f"{path}: {block[:100].split(bytes(1), 1)[0].decode('utf-8', 'replace')}"

    def __len__(self) -> int:
        return len(self.labels)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and flush it to disk; OSError where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _File:
    """A file open for reading until nobody holds it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            os.close(self.number)


def indexed(base: Path, split: Split, classes: list[str] | None = None) -> tuple[Path, Index]:
    """The folder of a split's shards and their index; UserError if there are none or they have changed.

    classes: what labels that are text are looked up in.
    """
    if (base / STATE).exists() and not _is_complete(base):
        raise UserError(
            f"{base} is not packed to the end. Repeat the command that packs it, python -m ghostnet.tools.pack …"
        )
    path = base / split / INDEX
    if not path.exists():
        return _scanned(base, split, classes)
    try:
        index = Index.load(path)
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}. {AGAIN}") from None
    for name, size in zip(index.shards, index.sizes, strict=True):
        found = _size(path.parent / name)
        if found is None:
            raise UserError(f"{path.parent / name} is missing, but the index names it. {AGAIN}")
        if found[0] != size:
            raise UserError(f"{path.parent / name} has {found[0]:,} bytes, but had {size:,} when packed. {AGAIN}")
    return path.parent, index


def _scanned(base: Path, split: Split, classes: list[str] | None) -> tuple[Path, Index]:
    """The index of others' shards: that of an earlier scan while sizes and times are the same, else of a new one."""
    folder, names = _others(base, split)
    stats = [_size(folder / name) or (0, 0) for name in names]
    sizes, mtimes = [size for size, _ in stats], [mtime for _, mtime in stats]
    identity = f"{split} {TAR_RULES} {classes}".encode(errors="surrogateescape")
    key = hashlib.blake2b(os.fsencode(folder.resolve()) + identity, digest_size=16).hexdigest()
    cache = cache_folder() / "shards"
    with contextlib.suppress(ValueError):
        index = Index.load(cache / f"{key}.npz")
        if (index.shards, index.sizes, index.mtimes) == (names, sizes, mtimes):
            return folder, index
    from rich.progress import track

    with ThreadPoolExecutor(8) as pool:
        scans = pool.map(lambda name: scan(folder / name, classes), names)
        shown = sys.stdout.isatty()
        found = list(track(scans, f"indexing {split}", len(names), transient=True, disable=not shown))
    for number, part in enumerate(found):
        part.rows["shard"] = number
    labels: Labels = np.fromiter(itertools.chain.from_iterable(part.labels for part in found), np.int64)
    if not len(labels):
        raise UserError(f"{folder}: no images in {len(names)} shards for {split}. Looked for <key>.jpg and <key>.cls.")
    note = ""
    if passed_over := sum(part.passed_over for part in found):
        example = next(part.example for part in found if part.example)
        note = f"{passed_over:,} members of shards in {folder} are in no sample and passed over: {example}"
    index = Index(names, sizes, np.concatenate([part.rows for part in found]), labels, mtimes, note)
    # Without a place for the cache it is scanned again the next time.
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        index.save(cache / f"{key}.npz")
    return folder, index


def _others(base: Path, split: Split) -> tuple[Path, list[str]]:
    """Folder and sorted names of the shards of a split, by the folder's name or by their own."""
    if not base.is_dir():
        raise UserError(f"data.root={base} {'is not a folder' if base.exists() else 'does not exist'}.")
    in_name = re.compile(rf"(?:^|[^a-z])(?:{'|'.join(NAMES[split])})(?:[^a-z]|$)", re.IGNORECASE)
    compressed = []
    for folder in (*(base / name for name in NAMES[split]), base):
        files = [entry.name for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []
        files = sorted(name for name in files if folder != base or in_name.search(name))
        if shards := [name for name in files if name.endswith(".tar") and not name.startswith(".")]:
            return folder, shards
        compressed += [folder / name for name in files if re.search(r"\.(tgz|tar\.\w+)$", name)]
    if compressed:
        raise UserError(f"{compressed[0]} is compressed, and so can't be read at random. Unpack it to a plain .tar.")
    raise UserError(
        f"data.root={base} holds no shards for {split}: looked for {split}/*.tar and *{split}*.tar. An image folder is "
        "read by data=imagefolder, and becomes shards by python -m ghostnet.tools.pack data.root=SRC out=DST"
    )


def _size(path: Path) -> tuple[int, int] | None:
    """Bytes and time of change (ns) of a file, None where there is none."""
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.stat().st_size, path.stat().st_mtime_ns
    return None


def _is_complete(base: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads((base / STATE).read_text(encoding="utf-8"))["done"])
    return False


def read_classes(base: Path) -> list[str] | None:
    """The names in classes.json, or in classes.txt, a line each; None where there is neither."""
    for path in (base / CLASSES, base / "classes.txt"):
        if not path.exists():
            continue
        try:
            if path.stat().st_size > LONGEST_LIST:
                raise ValueError("no list of class names is so long")
            text = path.read_text(encoding="utf-8")
            names = json.loads(text) if path.suffix == ".json" else text.splitlines()
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} can't be read: {' '.join(str(error).split())}.") from None
        good = isinstance(names, list) and 0 < len(names) <= MOST_CLASSES and all(isinstance(n, str) for n in names)
        if not good or len(set(names)) < len(names):
            raise UserError(f"{path} must be a list of different class names, in the order of their labels.")
        return list(names)
    return None
