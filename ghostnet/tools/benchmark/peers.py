"""Other libraries' loaders: the same crop, flip and colour jitter, the same threads or processes, normalised fp32."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ghostnet.tools.benchmark.child import again, device_of, window
from ghostnet.tools.benchmark.loader import LONG
from ghostnet.tools.benchmark.subject import Metrics, Subject, child
from ghostnet.tools.benchmark.timm_programs import read_all_formats

PEERS = ("timm", "torchvision", "webdataset", "spdl")
"""All that anything here is compared with."""


def absent(name: str) -> str | None:
    """Why a peer can't be asked, None where it can."""
    return None if importlib.util.find_spec(name) else "not installed"


def loaders(
    cfg: dict[str, Any], folder: Path | None, seconds: float, chosen: list[str]
) -> tuple[list[Subject], dict[str, str]]:
    """The loaders of the chosen peers, and why others are left out. folder: of pictures; null: the data are shards."""
    from ghostnet.device import cpu_count

    threads = cfg["data"]["workers"] or cpu_count()
    found, left_out = [], {}
    for name in chosen:
        if reason := _unfit(name, cfg, folder):
            left_out[name] = reason
            continue
        counts = [threads, threads + 1] if name == "timm" else [threads]
        for count in counts:
            spec = {"cfg": cfg, "root": str(folder or cfg["data"]["root"]), "seconds": seconds, "workers": count}
            kind = "thread" if name == "spdl" else "worker"
            title = f"{name}, {count} {kind}{'s' if count > 1 else ''}"
            found.append(child(title, f"peers.{name}", spec, peer=name))
    return found, left_out


def _unfit(name: str, cfg: dict[str, Any], folder: Path | None) -> str | None:
    """Why a peer can't read these data, None where it can."""
    if name == "webdataset":
        return None if folder is None else "reads tar shards, and these data are none"
    return "reads image folders, and these data are shards" if folder is None else None


def timm(spec: dict[str, Any]) -> Metrics:
    """The create_loader of timm, its prefetcher on cards."""
    from timm.data import create_dataset, create_loader

    cfg, data = spec["cfg"], spec["cfg"]["data"]
    device, augment, preprocessing = device_of(cfg, tuned=False), data["augment"], data["preprocessing"]
    read_all_formats()
    dataset = create_dataset("", root=spec["root"], split="train", is_training=True)
    dataset.reader.samples *= math.ceil(LONG / len(dataset.reader.samples))
    loader = create_loader(
        dataset,
        input_size=(3, data["image_size"], data["image_size"]),
        batch_size=data["batch_size"],
        is_training=True,
        use_prefetcher=device.type != "cpu",
        scale=augment["scale"],
        ratio=augment["ratio"],
        hflip=augment["hflip"],
        vflip=augment["vflip"],
        color_jitter=augment["color_jitter"] or None,
        interpolation=augment["interpolation"],
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        num_workers=spec["workers"],
        pin_memory=device.type != "cpu",
        device=device,
    )
    return _measured(again(loader), spec, device)


def torchvision(spec: dict[str, Any]) -> Metrics:
    """The decoder of torchvision, its v2 transforms on tensors, torch's DataLoader."""
    from torch.utils.data import DataLoader

    data, device = spec["cfg"]["data"], device_of(spec["cfg"], tuned=False)
    loader = DataLoader(
        _torchvision_folder(spec),
        data["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=spec["workers"],
        persistent_workers=True,
        pin_memory=device.type != "cpu",
    )
    return _measured((_to(device, batch) for batch in again(loader)), spec, device)


def _torchvision_folder(spec: dict[str, Any]) -> Any:  # noqa: ANN401 (a torchvision data set)
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image

    from ghostnet.data.index import EXTENSIONS

    dataset = ImageFolder(
        Path(spec["root"]) / "train",
        _v2(spec["cfg"]["data"]),
        loader=lambda path: decode_image(path, mode=ImageReadMode.RGB),
        is_valid_file=lambda path: path.lower().endswith(EXTENSIONS),
    )
    dataset.samples *= math.ceil(LONG / len(dataset.samples))
    return dataset


def _v2(data: dict[str, Any]) -> Callable[[Any], Any]:
    """The config's augmentation by torchvision: crop, flips, jitter, normalised."""
    import torch
    from torchvision.transforms import v2

    augment, preprocessing, side = data["augment"], data["preprocessing"], data["image_size"]
    kind, strength = v2.InterpolationMode(augment["interpolation"]), augment["color_jitter"]
    jitter = [v2.ColorJitter(strength, strength, strength)] if strength else []
    parts = [
        v2.RandomResizedCrop(side, tuple(augment["scale"]), tuple(augment["ratio"]), kind, antialias=True),
        v2.RandomHorizontalFlip(augment["hflip"]),
        v2.RandomVerticalFlip(augment["vflip"]),
        *jitter,
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocessing["mean"], preprocessing["std"]),
    ]
    composed: Callable[[Any], Any] = v2.Compose(parts)
    return composed


def webdataset(spec: dict[str, Any]) -> Metrics:
    """Shards root/train/*.tar by webdataset, decoded by Pillow, torchvision's v2 transforms."""
    import webdataset as wds
    from torchvision.transforms import v2

    data, device = spec["cfg"]["data"], device_of(spec["cfg"], tuned=False)
    shards = sorted(map(str, (Path(spec["root"]).expanduser() / "train").glob("*.tar")))
    shards *= math.ceil(spec["workers"] / len(shards))  # each process wants one at least
    transform = v2.Compose([v2.ToImage(), _v2(data)])
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000).decode("pilrgb")
    dataset = dataset.to_tuple("jpg;jpeg;png;webp", "cls").map_tuple(transform, int)
    loader = wds.WebLoader(dataset.batched(data["batch_size"], partial=False), None, num_workers=spec["workers"])
    return _measured((_to(device, batch) for batch in again(loader)), spec, device)


def spdl(spec: dict[str, Any]) -> Metrics:
    """SPDL's threads, each picture by torchvision's decoder and v2 transforms, which leave Python's lock meanwhile."""
    import torch
    from spdl.pipeline import PipelineBuilder

    torch.set_num_threads(1)  # each of its threads would bring a team of its own
    data, device, threads = spec["cfg"]["data"], device_of(spec["cfg"], tuned=False), spec["workers"]
    dataset = _torchvision_folder(spec)

    def stacked(items: list[Any]) -> list[Any]:
        return [torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])]

    builder: Any = PipelineBuilder().add_source(i for _ in again([0]) for i in torch.randperm(len(dataset)).tolist())
    builder = builder.pipe(dataset.__getitem__, concurrency=threads)
    builder = builder.aggregate(data["batch_size"], drop_last=True).pipe(stacked).add_sink(3)
    pipeline = builder.build(num_threads=threads + 1)
    with pipeline.auto_stop():
        return _measured((_to(device, batch) for batch in pipeline.get_iterator()), spec, device)


def _to(device: Any, batch: Any) -> list[Any]:  # noqa: ANN401 (a device and tensors)
    return [tensor.to(device, non_blocking=True) for tensor in batch]


def _measured(batches: Iterator[Any], spec: dict[str, Any], device: Any) -> Metrics:  # noqa: ANN401 (a device)
    """The window in which ours is measured too, after the batches that the processes have made ahead."""
    size, workers = spec["cfg"]["data"]["batch_size"], spec["workers"]
    return window(batches, size, spec["seconds"], device, 2 * workers + 2, workers)
