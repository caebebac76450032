"""Checks of the data: both splits, their images, the loader's speed."""

from __future__ import annotations  # so that an old Python comes as far as being told so

import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ghostnet.tools.doctor.finding import FAIL, OK, WARN, Case, Finding, Findings, first_line

REFERENCE = {1: 1379.0, 8: 9559.0}
"""img/s that so many cards take: Ascend ModelZoo, GhostNet for PyTorch 1.8."""
MEASURED = 3.0
"""Seconds for which the loader is measured."""


def data(case: Case) -> Findings:
    """The two splits: there, of the same classes, large enough for a batch."""
    from ghostnet.config import build
    from ghostnet.data.datasets import check_same_classes
    from ghostnet.data.loader import TrainLoader
    from ghostnet.distributed import Ranks
    from ghostnet.errors import ConfigError, UserError

    node, outputs, unused = case.cfg["data"], case.cfg["model"]["num_classes"], None
    try:
        train, val = build(node["dataset"], "train"), build(node["dataset"], "val")
    except UserError as error:
        if not str(error).startswith("data.root is not set"):
            raise
        what = "data.root is not given: data and loader were not checked"
        yield Finding(WARN, what, "data.root=/data/imagenet, or what training is to read; without any: data=samples")
        return
    check_same_classes(train, val)
    case.train, case.val = train, val
    images, classes = f"{len(train):,} train + {len(val):,} val images", len(train.classes)
    if outputs and outputs < classes:
        raise ConfigError(f"model.num_classes={outputs}, but the data have {classes} classes.")
    TrainLoader(train, unused, unused, node["batch_size"], 0, unused, Ranks(0, case.ranks))  # type: ignore[arg-type]
    yield Finding(OK, f"{images} of {classes:,} classes, the same in both")
    for note in filter(None, (getattr(split, "note", "") for split in (train, val))):
        yield Finding(WARN, note, "nothing, unless it is to be trained on")


def images(case: Case) -> Findings:
    """Whether images can be decoded: some, spread evenly over both splits, or all."""
    if case.train is None:
        return
    from rich.progress import track

    from ghostnet import watchdog
    from ghostnet.data import decode
    from ghostnet.device import cpu_count

    decode.allow(case.cfg["data"].get("max_pixels", decode.MAX_PIXELS))
    chosen: list[tuple[Any, int]] = []
    for split in (case.train, case.val):
        count = len(split) if case.images is None else min(len(split), max(1, case.images // 2))
        chosen += [(split, position * len(split) // count) for position in range(count)]
    parts = [chosen[start : start + 32] for start in range(0, len(chosen), 32)]
    pool, quiet = ThreadPoolExecutor(cpu_count()), case.images is not None or not sys.stdout.isatty()
    try:
        faults = pool.map(lambda part: [fault for sample in part if (fault := unreadable(*sample))], parts)
        bad: list[str] = []
        with watchdog.Watch(case.cfg["stall_timeout"], watchdog.tell):
            for _ in track(parts, "decoding", transient=True, disable=quiet):
                with watchdog.waiting("images to be read"):
                    bad += next(faults)
    finally:
        pool.shutdown(cancel_futures=True)
    of = f"{len(chosen):,} of {len(case.train) + len(case.val):,}" if case.images else f"all {len(chosen):,}"
    case.readable = not bad
    if bad:
        more = [f"… and {len(bad) - 5:,} more"] if len(bad) > 5 else []
        what = "\n".join([f"{of} looked at, {len(bad):,} can't be read:", *bad[:5], *more])
        yield Finding(FAIL, what, "replace or remove them; images=all looks at every one")
    else:
        yield Finding(OK, f"{of} decoded")


def unreadable(split: Any, index: int) -> str | None:  # noqa: ANN401 (any data set)
    """Why an image of a data set can't be read, None where it can."""
    from ghostnet.data.loader import image_of
    from ghostnet.errors import UserError

    try:
        image_of(split, index).cut()
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"image {index}: {type(error).__name__}: {first_line(error)}"
    return None


def loader(case: Case) -> Findings:
    """The real loader's speed on the CPUs that one rank would have, against what the cards take."""
    if case.train is None or not case.readable:
        return
    from ghostnet.device import cpus

    mine = sorted(cpus())
    share = mine[: max(1, len(mine) // case.ranks)]
    threads = case.cfg["data"]["workers"] or len(share)
    os.sched_setaffinity(0, share)  # threads that are started from here on inherit it
    try:
        speed = measured(case, threads)
    finally:
        os.sched_setaffinity(0, mine)
    total = speed * min(case.ranks, len(mine))
    what = f"{speed:,.0f} img/s with {threads} thread(s) on {len(share)} CPU(s)"
    what += f", a rank's share; {total:,.0f} by {case.ranks} ranks" if case.ranks > 1 else ""
    need = REFERENCE[1] if case.ranks == 1 else REFERENCE[8] / 8 * case.ranks
    compared = case.on_npu and case.cfg["data"]["image_size"] == 224
    if compared:
        what += f"; {case.ranks} card(s) of the reference take {need:,.0f}"
    if compared and total < need:
        way_out = "more CPUs for this process, or images shrunk beforehand (shorter side 256 to 320)"
        yield Finding(WARN, f"{what}: cards would wait", way_out)
    else:
        yield Finding(OK, what)


def measured(case: Case, threads: int) -> float:
    """Images per second of TrainLoader."""
    from torch import device

    from ghostnet.config import build
    from ghostnet.data.loader import CHUNK, Feeder, TrainLoader

    node = case.cfg["data"]
    feeder = Feeder(device("cpu"), threads, node["image_size"])
    # A batch of the run may take longer than the measurement: as much as keeps all threads busy.
    size = min(node["batch_size"], CHUNK * max(2, threads), len(case.train))
    train = TrainLoader(
        case.train, build(node["preprocessing"]), build(node["augment"]), size, case.cfg["seed"], feeder
    )
    batches = (batch for epoch in itertools.count() for batch in train.batches(epoch))
    try:
        next(batches)
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < MEASURED:
            next(batches)
            count += size
        return count / passed
    finally:
        batches.close()
        feeder.close()
