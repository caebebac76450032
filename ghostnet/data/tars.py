"""WebDataset shards of anyone, read by their headers alone: nothing is extracted, no name in them leads anywhere."""

import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ghostnet.errors import UserError

BLOCK = 512
LONGEST_HEADER = 1 << 20
"""Bytes of an extended header: names have at most some KB, so more is no honest file's."""
LONGEST_LABEL = 1 << 20
LARGEST_IMAGE = 1 << 30
MOST_CLASSES = 1_000_000
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")
LABELS = ("cls", "index", "json", "txt")
"""The first of them that a sample has is its label."""
TAR_RULES = 3
"""Changes with what these rules make of a shard."""
ROW = np.dtype([("shard", np.uint32), ("offset", np.int64), ("length", np.uint32), ("crc", np.uint32)])
"""Where an image lies: shard, first byte and bytes of its data, CRC-32 of its header or of its header and data."""
Rows = np.ndarray[tuple[int, ...], np.dtype[np.void]]
NO_SAMPLE = re.compile(r"(^|/)(\.(?!\.?/)|__MACOSX/|@eaDir/)|^__[^/]*__($|/)")
"""Names of what systems and WebDataset's own tools put among the samples."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class Member:
    """A regular file within a tar."""

    name: str
    offset: int
    """Of its data; the block before is its header."""
    size: int
    header: bytes


@dataclass
class _Sample:
    """The members of one key."""

    image: Member | None = None
    label: Member | None = None


class Scan(NamedTuple):
    """What a shard holds: where its images lie and their labels, in the file's order."""

    rows: Rows
    labels: list[int]
    passed_over: int
    """Members that belong to no sample."""
    example: str
    """The name of one of them, or ''."""


def scan(path: Path, classes: list[str] | None = None) -> Scan:
    """Find the samples of a shard by its headers; UserError for what is no whole shard.

    classes: what labels that are text are looked up in.
    """
    known = {name: label for label, name in enumerate(classes or ())}
    rows: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    left: list[str] = []
    try:
        with path.open("rb", buffering=0) as file:
            # Members of a key follow one another, as in every WebDataset.
            for _, group in itertools.groupby(members(path, file.fileno()), _group):
                samples, rest = _samples(path, group)
                left += rest
                for image, label in samples:
                    rows.append((0, image.offset, image.size, zlib.crc32(image.header)))
                    labels.append(_label(path, file.fileno(), label, known))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    return Scan(np.array(rows, ROW), labels, len(left), left[0] if left else "")


def _group(member: Member) -> str:
    """WebDataset's key: the name up to the first dot of its last part."""
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _samples(path: Path, group: Iterable[Member]) -> tuple[list[tuple[Member, Member]], list[str]]:
    """Return image and label of each sample among the members of a WebDataset key, and the names that are in none.

    Such a key is one sample, or several, of keys with dots: a name's suffix is what follows its first dot, or, if no
    such suffix is read, as in v1.12.jpg, its last. UserError for an image or a .cls that is alone, unless its key goes
    on from that of a sample: 12.mask.png beside 12.jpg is one more part of that.
    """
    parts: dict[str, _Sample] = {}
    left: list[str] = []
    for member in group:
        name = member.name.rpartition("/")[2]
        stem, _, suffix = name.partition(".")
        if suffix.lower() not in (*IMAGES, *LABELS):
            stem, _, suffix = name.rpartition(".")
        suffix = suffix.lower()
        if not stem or suffix not in (*IMAGES, *LABELS) or NO_SAMPLE.search(member.name):
            left.append(member.name)
            continue
        part = parts.setdefault(stem, _Sample())
        if suffix in IMAGES and part.image:
            raise UserError(f"{path}: {member.name} is a second image of its key. One image a key can be read.")
        if suffix in IMAGES and member.size > LARGEST_IMAGE:
            raise UserError(f"{path}: {member.name} claims {member.size:,} bytes, which no image has.")
        if suffix in IMAGES:
            part.image = member
        elif part.label is None or _rank(suffix) < _rank(part.label.name):
            part.label = member
    whole = {stem: (part.image, part.label) for stem, part in parts.items() if part.image and part.label}
    for stem, part in parts.items():
        if stem in whole:
            continue
        if not any(stem[:at] in whole for at, letter in enumerate(stem) if letter == "."):
            _check_alone(path, part)
        left += [member.name for member in (part.image, part.label) if member]
    return list(whole.values()), left


def _check_alone(path: Path, part: _Sample) -> None:
    if part.image:
        raise UserError(
            f"{path}: {part.image.name} has no label beside it: give a .cls, .index or .txt, or a .json with a label."
        )
    if part.label and part.label.name.lower().endswith(".cls"):
        raise UserError(f"{path}: {part.label.name} has no image beside it ({', '.join(IMAGES)}).")


def _rank(name: str) -> int:
    return LABELS.index(name.lower().rpartition(".")[2])


def _label(path: Path, file: int, member: Member, known: dict[str, int]) -> int:
    """Return the class index in a label's member, or that of the class that it names. A whole number is an index."""
    text = os.pread(file, member.size, member.offset) if member.size <= LONGEST_LABEL else b""
    try:
        label = json.loads(text)["label"] if member.name.lower().endswith("json") else text.decode().strip()
    except (ValueError, KeyError, TypeError, RecursionError):
        label = None
    if isinstance(label, str):
        try:
            label = int(label)
        except ValueError:
            label = known.get(str(label))
    if type(label) is not int or not 0 <= label < MOST_CLASSES:
        shown = text[:20].decode("utf-8", "replace").strip()
        names = f", nor one of the {len(known)} class names" if known else ""
        raise UserError(
            f"{path}: {member.name} holds no class index, a whole number ≥ 0{names}, but {shown!r}. Names of classes "
            "are read from a file that lists them, a line each: data.classes=FILE, or classes.txt beside the shards."
        )
    return label


def members(path: Path, file: int) -> Iterator[Member]:
    """The regular files of a tar; UserError where it is cut short, garbage, compressed, or claims absurd sizes."""
    offset, end = 0, os.fstat(file).st_size
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = os.pread(file, BLOCK, offset)
        if len(header) == BLOCK and not any(header):
            return
        info = _parse(path, header, offset)
        start, size = offset + BLOCK, info.size if long_size is None else long_size
        # A negative size would send a reader in circles.
        if size < 0 or start + size > end:
            raise _broken(path, f"its member at byte {offset:,} claims {size:,} bytes")
        offset = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if size > LONGEST_HEADER:
                raise _broken(path, f"a name in it claims {size:,} bytes")
            content = os.pread(file, size, start)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _text(content.split(b"\0", 1)[0])
            else:
                long_name, long_size = _pax(path, content, long_name)
            continue
        if info.isreg():
            if info.type == tarfile.GNUTYPE_SPARSE:
                raise UserError(f"{path}: {info.name} is stored as a sparse file. Pack it again without --sparse.")
            yield Member(long_name or info.name, start, size, header)
        elif info.islnk() or info.issym():
            raise UserError(f"{path}: {info.name} is a link. Pack it again with what it points to (tar -h).")
        if info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            long_name = long_size = None


def _parse(path: Path, header: bytes, offset: int) -> tarfile.TarInfo:
    """The fields of one header block."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        pass
    if offset == 0 and header.startswith(COMPRESSED):
        raise UserError(f"{path} is compressed, and so can't be read at random. Unpack it to a plain .tar.")
    if len(header) < BLOCK:
        raise _broken(path, f"it ends at byte {offset + len(header):,} without a tar's end mark")
    raise _broken(path, f"no tar header at byte {offset:,}")


def _pax(path: Path, content: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Name and size that the records 'LENGTH KEY=VALUE' of a pax header give."""
    size = None
    while content.strip(b"\0"):
        length, space, _ = content.partition(b" ")
        if not (space and length.isdigit() and len(length) < 8 and len(length) + 1 < int(length) <= len(content)):
            raise _broken(path, "a pax header in it can't be read")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        content = content[int(length) :]
        if key.startswith(b"GNU.sparse"):
            raise UserError(f"{path} holds a sparse file. Pack it again without --sparse.")
        if key == b"path":
            name = _text(value)
        if key == b"size":
            size = int(value) if value.isdigit() and len(value) < 20 else -1
    return name, size


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path} is cut short or no tar file: {what}. Copy or download it again.")
