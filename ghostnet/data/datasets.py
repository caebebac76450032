"""Data sets: for each split an indexed list of pictures with labels.

To add one: a class with these attributes and methods, and a file in conf/data/ whose dataset._target_ names it.
"""

import gzip
import hashlib
import math
import os
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from ghostnet.data.decode import Array, Picture, Pixels, picture
from ghostnet.data.index import FileIndex, cache_folder
from ghostnet.data.tars import LARGEST_IMAGE
from ghostnet.errors import SampleError, UserError
from ghostnet.schema import PositiveInt, did_you_mean
from ghostnet.seeding import fold_in

Split = Literal["train", "val"]
Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

LARGEST_IDX = 1 << 30
"""Bytes of an IDX array; Fashion-MNIST's is 47 MB."""
REPOSITORY = Path(__file__).parent.parent.parent
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Dataset(Protocol):
    """One split of labelled pictures. image() is called from many threads at once."""

    classes: list[str]
    """Names of the classes; a label is an index into them."""
    labels: Labels

    def image(self, index: int) -> Picture | Image.Image | Array:
        """The image, decoded or not: a Picture, a PIL image, or uint8 pixels (H, W, 3) or grey (H, W).

        SampleError names a file that can't be read.
        """
        ...

    def __len__(self) -> int: ...


class ImageFolder:
    """root/train/<class>/** and root/val/<class>/**: image files in any depth, ImageNet's layout.

    Classes are the folders, as numbers if all names are numbers, else as text; or those of a file (see read_names), in
    its order, of which some may have no folder.
    """

    def __init__(self, split: Split, /, root: str | None, classes: str | None = None) -> None:
        folder = self.find(split, root)
        looked_for = self._looked_for(folder)
        self.folder, self.files = folder, FileIndex(folder)
        self.classes, counts = self.files.classes, self.files.counts
        self.note = ""
        if self.files.passed_over:
            number = f"{self.files.passed_over:,} file{'s' if self.files.passed_over > 1 else ''} or folder"
            self.note = f"{number} passed over in {folder}, hidden or no image by its name: {self.files.example}"
        if not len(self.files):
            shards = " It has tar shards: data=shards reads those." if any(folder.glob("*.tar")) else ""
            raise UserError(f"data.root={root} has no images in {split}. {looked_for}.{shards}")
        empty = [self.classes[label] for label in np.flatnonzero(counts == 0)]
        if empty and classes is None:
            raise UserError(
                f"data.root={root}: {len(empty)} of {len(counts)} class folders in {split} hold no image, "
                f"{empty[0]} first. {looked_for}. Fill or remove them, or name all classes in data.classes=FILE."
            )
        self.labels: Labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        if classes is not None:
            names = read_names(classes)
            self.labels = among(self.labels, self.classes, names, f"data.classes={classes}")
            self.classes = names

    @staticmethod
    def find(split: Split, root: str | None) -> Path:
        """The split's folder; UserError where it is not there."""
        if not root:
            raise UserError(
                "data.root is not set: give the folder that holds train/<class>/* and val/<class>/*, "
                "as data.root=/data/imagenet, or try it without a data set of your own: experiment=quickstart"
            )
        folder = Path(root).expanduser() / split
        if not folder.is_dir():
            missing = ImageFolder._missing(Path(root).expanduser(), split)
            raise UserError(f"data.root={root} {missing}. {ImageFolder._looked_for(folder)}.")
        return folder

    @staticmethod
    def _looked_for(folder: Path) -> str:
        return f"Looked for {folder}/<class>/*.jpg|jpeg|png|webp|bmp|tif|gif|ppm"

    @staticmethod
    def _missing(root: Path, split: str) -> str:
        if not root.exists():
            return "does not exist"
        if not root.is_dir():
            return "is not a folder"
        found = sorted(entry.name for entry in root.iterdir())
        if not found:
            return "is empty"
        return f"has no folder {split} (it holds {', '.join(found[:5])}{', …' if len(found) > 5 else ''})"

    def image(self, index: int) -> Picture:
        """The picture, of a JPEG its header; SampleError names a file that can't be read."""
        path = self.path(index)
        try:
            # Without blocking, or opening a pipe would wait for its writer.
            with open(path, "rb", 0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_IMAGE:
                    claims = f"has {status.st_size:,} bytes" if status.st_size else "is no file"
                    raise SampleError(f"{path} {claims}, as no image does. Replace or remove it.")
                data = file.read()
        except OSError as error:
            raise SampleError(f"{path} can't be read: {error.strerror}.") from None
        return picture(data, path)

    def fingerprint(self) -> str:
        """What changes with the name, size or time of any of the files."""
        digest = hashlib.sha256()
        with ThreadPoolExecutor(8) as pool:  # a network file system takes its time for each
            for index, status in enumerate(pool.map(lambda index: self.path(index).stat(), range(len(self)))):
                digest.update(
                    f"{self.files[index]} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape")
                )
        return digest.hexdigest()

    def path(self, index: int) -> Path:
        """The picture's file."""
        return self.folder / self.files[index]

    def __len__(self) -> int:
        return len(self.files)


class FashionMnist:
    """Fashion-MNIST, 28×28 grey, 10 classes (arXiv 1708.07747): 60,000 train, 10,000 val, held in memory (47 MB).

    Read from root, else from Debian's dataset-fashion-mnist, else downloaded by torchvision to ~/.cache/ghostnet.
    """

    CLASSES = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )

    def __init__(self, split: Split, /, root: str | None) -> None:
        prefix = "train" if split == "train" else "t10k"
        names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
        folder = self._find(root, names)
        self.classes = list(self.CLASSES)
        self.pictures, labels = read_idx(folder, names[0], 3), read_idx(folder, names[1], 1)
        if len(labels) != len(self.pictures) or not self.pictures.size or labels.max() >= len(self.classes):
            raise UserError(
                f"{folder}: {prefix} has {len(self.pictures)} pictures and {len(labels)} labels up to "
                f"{labels.max(initial=0)}, which is no Fashion-MNIST. Get its files again."
            )
        self.labels: Labels = labels.astype(np.int64)

    @staticmethod
    def _find(root: str | None, names: tuple[str, ...]) -> Path:
        if root is not None:
            base = Path(root).expanduser()
            places = [base, base / "FashionMNIST" / "raw"]
        else:
            cache = cache_folder()
            places = [DEBIAN_FASHION_MNIST, cache / "FashionMNIST" / "raw"]
        for place in places:
            if all(idx_path(place, name) for name in names):
                return place
        if root is not None:
            looked = " or ".join(map(str, places))
            raise UserError(
                f"data.root={root} holds no Fashion-MNIST: looked for {' and '.join(names)}, plain or .gz, in {looked}."
            )
        return FashionMnist._download(cache)

    @staticmethod
    def _download(cache: Path) -> Path:
        from torchvision.datasets import FashionMNIST

        try:
            cache.mkdir(parents=True, exist_ok=True)
            FashionMNIST(str(cache), download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            fault = " ".join(str(error).split())
            raise UserError(
                f"Fashion-MNIST is not on this machine and can't be downloaded ({fault}). Install Debian's package "
                "dataset-fashion-mnist, or give the folder of its four files as data.root=…"
            ) from None
        return cache / "FashionMNIST" / "raw"

    def image(self, index: int) -> Picture:
        """The greyscale picture, 28×28."""
        return Pixels(self.pictures[index])

    def __len__(self) -> int:
        return len(self.labels)


class Samples(FashionMnist):
    """6,000 + 1,000 images of Fashion-MNIST, class-balanced, that ship with the project. root null: its own folder."""

    def __init__(self, split: Split, /, root: str | None) -> None:
        super().__init__(split, str(REPOSITORY / "samples") if root is None else root)


class Synthetic:
    """Noise of the right size without decoding or disk, for speed runs; a class shows as brightness."""

    def __init__(
        self,
        split: Split,
        /,
        root: str | None,
        image_size: PositiveInt,
        num_classes: PositiveInt,
        num_train: PositiveInt,
        num_val: PositiveInt,
    ) -> None:
        self.classes = [f"class{index}" for index in range(num_classes)]
        self.labels: Labels = np.arange(num_train if split == "train" else num_val, dtype=np.int64) % num_classes
        noise = np.random.default_rng(fold_in(0, "synthetic")).integers(0, 128, (image_size, image_size, 3), np.uint8)
        distinct = min(num_classes, 16)
        self.pictures = [noise + np.uint8(127 * shade / max(1, distinct - 1)) for shade in range(distinct)]

    def image(self, index: int) -> Picture:
        """The RGB picture of the label's shade."""
        return Pixels(self.pictures[self.labels[index] % len(self.pictures)])

    def __len__(self) -> int:
        return len(self.labels)


def idx_path(folder: Path, name: str) -> Path | None:
    """The IDX file of that name in a folder, plain or gzipped; None where there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The uint8 array of an IDX file, plain or gzipped; UserError where it is missing, truncated or something else."""
    path = idx_path(folder, name)
    if path is None:
        raise UserError(f"{folder} has no {name} or {name}.gz.")
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(start)
            shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, start, 4)]
            # A small .gz may hold, and its header claim, any number of bytes.
            claimed = math.prod(shape) if head[:4] == bytes([0, 0, 8, dimensions]) else LARGEST_IDX + 1
            data = file.read(claimed + 1) if claimed <= LARGEST_IDX else b""
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}. Get it again.") from None
    if len(head) < start or len(data) != claimed:
        raise UserError(f"{path} is no whole IDX file of {dimensions} dimensions. Get it again.")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_names(path: str) -> list[str]:
    """Read the names of classes, one a line, in the order of the model's outputs; UserError names what is wrong."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"data.classes={path} can't be read: {' '.join(str(error).split())}.") from None
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    for number, name in enumerate(names, 1):
        if not name or names.index(name) < number - 1:
            what = f"names {name} a second time" if name else "is empty"
            raise UserError(f"data.classes={path}: line {number} {what}. It must name each class once, a line each.")
    if not names:
        raise UserError(f"data.classes={path} names no class: one a line, in the order of the model's outputs.")
    return names


def among(labels: Labels, classes: list[str], known: list[str], whose: str, way_out: str = "") -> Labels:
    """Turn labels into `classes` into labels into `known`, by name; UserError if a class is not known.

    whose, way_out: what the message says of the known ones, and what else to do.
    """
    position = {name: index for index, name in enumerate(known)}
    if unknown := [name for name in classes if name not in position]:
        raise UserError(
            f"{len(unknown)} of the {len(classes)} classes of the data are not among the {len(known)} of {whose}: "
            f"{', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}.{did_you_mean(unknown[0], known)}"
            f"{way_out and f' {way_out}'}"
        )
    return np.array([position[name] for name in classes], np.int64)[labels]


def check_same_data(classes: list[str], count: int, train: Dataset, force: bool = False) -> str:
    """UserError where the training data of the run to go on with had other classes or another number of images.

    force: only where it had another number of classes -> what differs, '' where nothing does.
    """
    if classes == train.classes and count == len(train):
        return ""
    if classes != train.classes and set(classes) == set(train.classes):
        # Not even with force: each output would go on as another class.
        raise UserError(
            f"resume: the checkpoint's {len(classes)} classes are in another order, {', '.join(classes[:3])}"
            f"{', …' if len(classes) > 3 else ''}. Name them in that order, one a line, in a file: data.classes=FILE"
        )
    as_many = len(classes) == len(train.classes)
    difference = (
        f"the checkpoint was trained on {count:,} images of {len(classes)} classes, and these are "
        f"{len(train):,} of {len(train.classes)}{', not all the same' if as_many and classes != train.classes else ''}"
    )
    if force and as_many:
        return difference
    way_out = "or force=true to go on all the same, " if as_many else ""
    raise UserError(
        f"resume: {difference}. Give the run's own data.root, {way_out}"
        "or start a new run from its weights with model.weights=PATH."
    )


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """UserError that names the differences where the two splits don't have the same classes in the same order."""
    if train.classes == val.classes:
        return
    only_train = [name for name in train.classes if name not in set(val.classes)]
    only_val = [name for name in val.classes if name not in set(train.classes)]
    parts = [
        f"{len(names)} only in {where} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for where, names in (("train", only_train), ("val", only_val))
        if names
    ]
    parts = parts or ["the same names in another order"]
    hint = did_you_mean(only_val[0], only_train) if only_val and only_train else ""
    raise UserError(
        f"The classes of train ({len(train.classes)}) and val ({len(val.classes)}) differ: {'; '.join(parts)}.{hint} "
        "Both splits need the same class folders, or a file that names all of them, a line each: data.classes=FILE. "
        "Shards of others may name theirs in classes.txt."
    )
