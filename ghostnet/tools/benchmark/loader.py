"""benchmark loader: images a second that reach the step, as normalised fp32 on the device, of ours and of others.

An epoch is made long by repeating the data, as a large data set's is, so that its end is not measured.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ghostnet.tools.benchmark.child import device_of, window
from ghostnet.tools.benchmark.subject import Metrics, Subject, child

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ghostnet.data.datasets import Dataset
    from ghostnet.data.transforms import Augment

LONG = 200_000
"""Images of an epoch at least."""
PICTURES = 200
"""How many are compared with Pillow's."""
EXACT = 100.0
"""Decibels that stand for no difference at all."""
SHARE = 0.5
"""Of the loader's speed, which it is asked for while the main thread dispatches."""
CLASSES = 1000
BLOCK = 5
"""Steps in a row with one loader, of which the first does not count."""


def subjects(cfg: dict[str, Any], seconds: float, shards: str | None, peers: list[Subject]) -> list[Subject]:
    """Ours, the peers, the quality of our decoding, and what our loader costs a main thread that dispatches.

    shards: a folder of them that ours reads, too.
    """
    from ghostnet.device import cpu_count

    threads = cfg["data"]["workers"] or cpu_count()
    spec = {"cfg": cfg, "seconds": seconds, "threads": threads}
    name = f"ours, {threads} thread{'s' if threads > 1 else ''}"
    node = {"_target_": "ghostnet.data.shards.Shards", "root": shards}
    packed = spec | {"cfg": cfg | {"data": cfg["data"] | {"dataset": node}}}
    return [
        child(name, "loader.ours", spec),
        *([child(f"{name}, shards", "loader.ours", packed)] if shards else []),
        *peers,
        child("decoding", "loader.quality", spec, sentence=_quality, once=True),
        child("dispatch", "loader.dispatch", spec, sentence=_dispatch),
    ]


def _quality(found: Metrics) -> str:
    return (
        f"Our decoding against Pillow's whole picture, cut and resized: PSNR {found['psnr_median']:.1f} dB median, "
        f"{found['psnr_min']:.1f} dB least, of {found['pictures']:,} pictures."
    )


def _dispatch(found: Metrics) -> str:
    return (
        f"Our loader at {found['images']:,.0f} images/s beside a main thread that dispatches train steps of two small "
        f"pictures: {found['ratio']:.3f} × the step time with data=synthetic ({found['without_ms']:.0f} ms)."
    )


class Endless:
    """A data set several times over."""

    def __init__(self, dataset: "Dataset", at_least: int = LONG) -> None:
        import numpy as np

        self.dataset, self.classes = dataset, dataset.classes
        self.labels = np.tile(dataset.labels, math.ceil(at_least / len(dataset)))

    def image(self, index: int) -> Any:  # noqa: ANN401 (a Picture)
        """The picture."""
        return self.dataset.image(index % len(self.dataset))

    def __len__(self) -> int:
        return len(self.labels)


def delivered(
    cfg: dict[str, Any], dataset: "Dataset", augment: "Augment", batch_size: int, threads: int
) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Batches of our loader as the model takes them, without end."""
    from ghostnet.config import build
    from ghostnet.data.loader import Feeder, TrainLoader
    from ghostnet.device import memory_format

    device, preprocessing = device_of(cfg), build(cfg["data"]["preprocessing"])
    feeder = Feeder(device, threads, cfg["data"]["image_size"])
    loader = TrainLoader(Endless(dataset), preprocessing, augment, batch_size, cfg["seed"], feeder)
    for epoch in itertools.count():
        for images, labels in loader.batches(epoch):
            yield preprocessing.normalize(images).contiguous(memory_format=memory_format(device)), labels


def ours(spec: dict[str, Any]) -> Metrics:
    """Our loader's speed."""
    import torch

    from ghostnet.config import build
    from ghostnet.data.loader import AHEAD

    cfg = spec["cfg"]
    dataset, size = build(cfg["data"]["dataset"], "train"), cfg["data"]["batch_size"]
    torch.set_num_threads(1)  # there is no step here, whose threads, waiting for work, would take CPUs from decoding
    batches = delivered(cfg, dataset, build(cfg["data"]["augment"]), size, spec["threads"])
    return window(batches, size, spec["seconds"], device_of(cfg), AHEAD + 3)


def quality(spec: dict[str, Any]) -> Metrics:
    """Random crops of ours against the same box of the whole picture as Pillow decodes and resizes it.

    Of one that is decoded coarser, the box as it is moved to the coarser pixels (by less than one of them).
    """
    import numpy as np
    from PIL import Image

    from ghostnet.config import build
    from ghostnet.data.decode import by_pillow, coarser, shrinkage
    from ghostnet.data.loader import image_of
    from ghostnet.data.transforms import resample
    from ghostnet.seeding import sample_rng

    data, seed = spec["cfg"]["data"], spec["cfg"]["seed"]
    dataset, augment, side = build(data["dataset"], "train"), build(data["augment"]), data["image_size"]
    kind = Image.Resampling[augment.interpolation.upper()]
    count, ratios = min(PICTURES, len(dataset)), []
    for index in (position * len(dataset) // count for position in range(count)):
        picture: Any = image_of(dataset, index)
        box = augment.crop_box(picture.size, sample_rng(seed, 0, index))
        got = resample(picture.cut(box, (side, side)), (side, side), augment.interpolation)
        whole = by_pillow(picture.data, picture.name) if hasattr(picture, "data") else picture
        factor = shrinkage(box, (side, side)) if hasattr(picture, "data") else 1
        left, top, right, bottom = coarser(box, factor)
        exact = Image.fromarray(whole.cut((factor * left, factor * top, factor * right, factor * bottom))).resize(
            (side, side), kind
        )
        error = float(np.mean((got.astype(np.float64) - np.asarray(exact)) ** 2))
        ratios.append(min(EXACT, 10 * math.log10(255**2 / error)) if error else EXACT)
    return {"psnr_median": statistics.median(ratios), "psnr_min": min(ratios), "pictures": count}


def dispatch(spec: dict[str, Any]) -> Metrics:
    """Time of a train step that is nearly all dispatch beside our loader, over that beside synthetic data.

    One CPU is left to the main thread, where there are several.
    """
    from ghostnet.config import build
    from ghostnet.data.datasets import Synthetic
    from ghostnet.data.transforms import Augment

    cfg, threads = spec["cfg"], max(1, spec["threads"] - 1)
    side, device = cfg["data"]["image_size"], device_of(cfg)
    step = _small_step(cfg, device)
    dataset, augment = build(cfg["data"]["dataset"], "train"), build(cfg["data"]["augment"])
    least = 8 * threads
    speed = window(delivered(cfg, dataset, augment, least, threads), least, spec["seconds"] / 4, device, 6)
    alone = statistics.median(step() for _ in range(BLOCK))
    size = max(1, int(SHARE * speed["speed"] * alone))
    none = Augment([1.0, 1.0], [1.0, 1.0], 0.0, 0.0, 0.0, 0, 0, 0.0, "bilinear")
    feeds = (
        delivered(cfg, dataset, augment, size, threads),
        delivered(cfg, Synthetic("train", None, side, CLASSES, LONG, 1), none, size, threads),
    )
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + spec["seconds"]
    while not times[1] or time.perf_counter() < end:
        for feed, taken in zip(feeds, times, strict=True):
            for number in range(BLOCK):
                next(feed)
                passed = step()
                taken.extend([passed] if number else [])
    beside, without = map(statistics.median, times)
    return {"ratio": beside / without, "without_ms": 1000 * without, "images": size / beside}


def _small_step(cfg: dict[str, Any], device: "torch.device") -> Callable[[], float]:
    """A train step of the model on two small pictures, which is nearly all dispatch -> its seconds."""
    import torch
    from torch.nn import functional as F

    from ghostnet.config import build_model
    from ghostnet.device import memory_format
    from ghostnet.optim import sgd

    torch.set_num_threads(1)
    model = build_model(cfg["model"], CLASSES).to(device, memory_format=memory_format(device))
    optimizer = sgd(list(model.named_parameters()), lr=0.0, momentum=0.9, weight_decay=4e-5, nesterov=False)
    images = torch.randn(2, 3, 64, 64, device=device).contiguous(memory_format=memory_format(device))
    labels = torch.zeros(2, dtype=torch.int64, device=device)

    def step() -> float:
        start = time.perf_counter()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    for _ in range(BLOCK):
        step()
    return step
