"""Evaluation pictures kept as the model takes them, in a file that ranks and runs share: none is decoded twice."""

import contextlib
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from ghostnet.data.datasets import Dataset
from ghostnet.data.decode import Array
from ghostnet.data.index import cache_folder
from ghostnet.data.transforms import Preprocessing
from ghostnet.distributed import Ranks
from ghostnet.errors import ConfigError

FORMAT = 1
"""Of the file, and of what preprocessing makes of a picture; another one is never read."""
MARK = 1 << 32
"""Set in the checksum of a picture that is there, whatever its 32 bits are."""


class PictureCache:
    """Pictures uint8 (S, S, 3) by index: a sparse file of all of them, then a checksum for each.

    What is torn or damaged fails its checksum and reads as missing. Whoever writes a picture writes the same bytes.
    Where the file can't be made, or the disk is full, nothing is kept, and `fault` says why.
    """

    def __init__(self, folder: Path, identity: str, count: int, image_size: int) -> None:
        """identity: all that the pictures depend on."""
        self.count, self.bytes = count, image_size * image_size * 3
        name = hashlib.sha256(repr((FORMAT, identity, count, image_size)).encode()).hexdigest()[:32]
        self.path = folder / f"{name}.pictures"
        self.fault: str | None = None
        self.opened = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.opened = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self.opened, count * (self.bytes + 8))
        except OSError as error:
            self._give_up(error)

    def read(self, index: int, out: Array) -> bool:
        """Whether the picture is there; then it is in out (S, S, 3)."""
        if self.opened < 0:
            return False
        stored = int.from_bytes(os.pread(self.opened, 8, self._checksum_at(index)), "little")
        if not stored:
            return False
        with contextlib.suppress(OSError):
            return os.preadv(self.opened, [out.data], index * self.bytes) == self.bytes and stored == _checksum(out)
        return False

    def write(self, index: int, picture: Array) -> None:
        """Keep a picture (S, S, 3), contiguous."""
        if self.opened < 0 or self.fault:
            return
        try:
            # A full disk may take a part; a checksum without its picture fails.
            os.pwrite(self.opened, picture.data, index * self.bytes)
            os.pwrite(self.opened, _checksum(picture).to_bytes(8, "little"), self._checksum_at(index))
        except OSError as error:
            self.fault = f"{self.path} can't be written: {error.strerror}"

    def kept(self) -> int:
        """How many pictures are there."""
        if self.opened < 0:
            return 0
        return int(np.count_nonzero(np.frombuffer(os.pread(self.opened, 8 * self.count, self._checksum_at(0)), "<u8")))

    def __str__(self) -> str:
        """Where it is, and how much it holds."""
        if self.fault:
            return f"{self.fault}; evaluation images are not kept."
        have = self.kept()
        return f"{have:,} of {self.count:,} evaluation images in {self.path} ({have * self.bytes / 1e9:.1f} GB)"

    def close(self) -> None:
        """Give the file back."""
        if self.opened >= 0:
            os.close(self.opened)
            self.opened = -1

    def _checksum_at(self, index: int) -> int:
        return self.count * self.bytes + 8 * index

    def _give_up(self, error: OSError) -> None:
        self.close()
        self.fault = f"{self.path} can't be made: {error.strerror}"


def open_cache(dataset: Dataset, preprocessing: Preprocessing, ranks: Ranks) -> PictureCache:
    """The cache of a split, told apart by its files' names, sizes and times; ConfigError for one without files."""
    fingerprint = getattr(dataset, "fingerprint", None)
    if fingerprint is None:
        raise ConfigError(f"data.cache_val=true is for image files, and {type(dataset).__name__} has none.")
    # Other versions may round a pixel otherwise.
    parts = ranks.from_main(fingerprint), preprocessing.crop, preprocessing.interpolation
    versions = torch.__version__, simplejpeg.__version__
    return PictureCache(cache_folder() / "val", repr((*parts, *versions)), len(dataset), preprocessing.image_size)


def _checksum(picture: Array) -> int:
    return zlib.crc32(picture.data) | MARK
