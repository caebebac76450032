"""Shards written one after another, each whole or not at all, so that a repeated command goes on behind the last."""

import collections
import contextlib
import io
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghostnet.data.datasets import ImageFolder
from ghostnet.data.shards import INDEX, Index, write_whole
from ghostnet.data.tars import BLOCK, ROW, Rows
from ghostnet.errors import SampleError, UserError
from ghostnet.tools.pack import plan
from ghostnet.tools.pack.pictures import packed
from ghostnet.watchdog import LONG, waiting

AHEAD = 8
"""Images for each thread that are read before their turn."""
HOPELESS = 100
"""Unreadable images in a row at which it is the disk, not the images."""
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Part:
    """A finished shard."""

    rows: Rows
    numbers: Numbers
    """Which images of the folder the rows are."""
    skipped: Numbers
    """Which ones, within its stretch of the order, could not be read."""
    stop: int
    """Where in the order the next shard begins."""
    size: int
    before: int
    """Bytes of the image files."""


def pack_split(
    source: ImageFolder,
    order: list[int],
    folder: Path,
    settings: plan.Settings,
    skip: bool,
    threads: int,
    advance: Callable[[int, bool], None],
) -> list[Part]:
    """Pack what is missing of a split, then write its index. advance: told of images, and whether they are new."""
    parts = finished(folder)
    start = parts[-1].stop if parts else 0
    advance(start, False)
    keys = plan.keys(list(source.files))
    position, shard, failures = start, Shard(folder, len(parts)), 0
    with contextlib.closing(encoded(source, order[start:], settings, threads)) as pictures:
        try:
            for number, (data, before, error) in zip(order[start:], pictures, strict=True):
                failures = failures + 1 if error else 0
                if error and not skip:
                    raise SampleError(f"{error} on_error=skip leaves such images out. The finished shards are kept.")
                if failures == HOPELESS:
                    raise UserError(f"{failures} images in a row can't be read, so this ends here. The last: {error}")
                if not error and shard.is_full(len(data), settings.shard_mb << 20):
                    parts.append(shard.finish(position))
                    shard = Shard(folder, len(parts))
                if error:
                    shard.skipped.append(number)
                else:
                    shard.add(keys[number], data, int(source.labels[number]), number, before)
                position += 1
                advance(1, True)
            parts += [shard.finish(position)] if shard.rows else []
        finally:
            shard.file.close()
    if not parts:
        raise UserError(f"None of the {len(order):,} images in {source.folder} can be read.")
    index(parts, source).save(folder / INDEX)
    return parts


def index(parts: list[Part], source: ImageFolder) -> Index:
    """Where each image lies, in the order of the folder, so that a seed gives the same batches from either."""
    rows = np.concatenate([part.rows for part in parts])
    rows["shard"] = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    numbers = np.concatenate([part.numbers for part in parts])
    in_order = np.argsort(numbers)
    shards = [name(number) for number in range(len(parts))]
    return Index(shards, [part.size for part in parts], rows[in_order], source.labels[numbers[in_order]])


def encoded(
    source: ImageFolder, numbers: list[int], settings: plan.Settings, threads: int
) -> Generator[tuple[bytes, int, SampleError | None]]:
    """What is packed for each image and the bytes it had before, or why it can't be read; in order, threads ahead."""

    def work(number: int) -> tuple[bytes, int, SampleError | None]:
        try:
            return *packed(source.path(number), settings.size, settings.quality), None
        except SampleError as error:
            return b"", 0, error

    pool = ThreadPoolExecutor(threads)
    under_way: collections.deque[Future[tuple[bytes, int, SampleError | None]]] = collections.deque()
    left = iter(numbers)
    try:
        under_way.extend(pool.submit(work, number) for number in itertools.islice(left, AHEAD * threads))
        while under_way:
            with waiting("images to be read"):
                done = under_way.popleft().result()
            under_way.extend(pool.submit(work, number) for number in itertools.islice(left, 1))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


class Shard:
    """A tar file under way: under another name until it is whole; who has the folder's lock removes one that isn't."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / name(number)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.file = self.temporary.open("wb")
        self.rows: list[tuple[int, int, int, int]] = []
        self.numbers: list[int] = []
        self.skipped: list[int] = []
        self.size = self.before = 0

    def is_full(self, length: int, limit: int) -> bool:
        """Whether an image of so many bytes would lead beyond the limit; a shard takes one in any case."""
        return bool(self.rows) and self.size + _padded(length) + 6 * BLOCK > limit

    def add(self, key: str, data: bytes, label: int, number: int, before: int) -> None:
        """Write an image and its label. number: which image it is; before: the bytes that its file had."""
        header, text = _header(f"{key}.jpg", len(data)), str(label).encode()
        self.rows.append((0, self.size + BLOCK, len(data), zlib.crc32(data, zlib.crc32(header))))
        self.numbers.append(number)
        self.before += before
        for block in (header, data, _header(f"{key}.cls", len(text)), text):
            self.size += self.file.write(block.ljust(_padded(len(block)), b"\0"))

    def finish(self, stop: int) -> Part:
        """Flush it to disk and give it its name, after what is needed to go on behind it."""
        self.size += self.file.write(bytes(2 * BLOCK))
        with waiting("a shard to be written", LONG):
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        numbers, skipped = np.array(self.numbers, np.int64), np.array(self.skipped, np.int64)
        part = Part(np.array(self.rows, ROW), numbers, skipped, stop, self.size, self.before)
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **vars(part))
        write_whole(notes(self.path), content.getvalue())
        self.temporary.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return part


def finished(folder: Path) -> list[Part]:
    """The shards of a folder that are whole and noted, from the first on; the folder is made, and rid of all others."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    while (part := _noted(folder / name(len(parts)))) is not None:
        parts.append(part)
    kept = {name(number) for number in range(len(parts))}
    for path in folder.iterdir():
        ours = re.fullmatch(r"\.?(\d{6}\.tar)(\.npz)?|\..*\.tmp", path.name)
        if ours and ours[1] not in kept:
            path.unlink()
    return parts


def _noted(path: Path) -> Part | None:
    try:
        with notes(path).open("rb") as content, np.load(content, allow_pickle=False) as file:
            rows, numbers, skipped, *rest = (
                file[key] for key in ("rows", "numbers", "skipped", "stop", "size", "before")
            )
        part = Part(rows, numbers, skipped, *map(int, rest))
        return part if path.stat().st_size == part.size else None
    except Exception:  # zipfile and numpy raise whatever a broken file leads them to
        return None


def name(number: int) -> str:
    """The file name of a split's shard."""
    return f"{number:06}.tar"


def notes(path: Path) -> Path:
    """Where it is noted what a finished shard holds, until all are."""
    return path.with_name(f".{path.name}.npz")


def _header(member: str, size: int) -> bytes:
    info = tarfile.TarInfo(member)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padded(length: int) -> int:
    return (length + BLOCK - 1) // BLOCK * BLOCK
