"""The pictures of a config as a folder that every library reads: the config's own, a part of it, or PNG files."""

from pathlib import Path
from typing import Any

from ghostnet.errors import ConfigError

SPLITS = ("train", "val")


def kind_of(cfg: dict[str, Any]) -> str:
    """The class of the config's data set: ImageFolder, Shards, …."""
    return str(cfg["data"]["dataset"]["_target_"]).rpartition(".")[2]


def folder(cfg: dict[str, Any], images: int | None, place: Path) -> Path:
    """A folder train/<class>/*, val/<class>/* of the config's pictures; what has to be made is made in place.

    images: about so many of each split, the same number of each class; null: all.
    """
    from ghostnet.config import build

    sets = {split: build(cfg["data"]["dataset"], split) for split in SPLITS}
    if kind_of(cfg) != "ImageFolder":
        if images:
            raise ConfigError("images=…: a part can be taken of an image folder only, data=imagefolder.")
        for split, dataset in sets.items():
            _write(dataset, place / split)
        return place
    if not images:
        return Path(cfg["data"]["root"]).expanduser().resolve()
    for split, dataset in sets.items():
        each, taken = max(1, images // len(dataset.classes)), dict.fromkeys(dataset.classes, 0)
        for name in dataset.files:
            parent = name.partition("/")[0]
            taken[parent] += 1
            if taken[parent] <= each:
                (place / split / parent).mkdir(parents=True, exist_ok=True)
                (place / split / name).symlink_to((dataset.folder / name).resolve())
    return place


def _write(dataset: Any, place: Path) -> None:  # noqa: ANN401 (any data set)
    """Its pictures as PNG files, the classes in their order."""
    from PIL import Image

    from ghostnet.data.loader import image_of

    for label in range(len(dataset.classes)):
        (place / f"{label:04}").mkdir(parents=True)
    for index, label in enumerate(dataset.labels.tolist()):
        image = Image.fromarray(image_of(dataset, index).cut())
        image.save(place / f"{label:04}" / f"{index:07}.png", compress_level=1)
