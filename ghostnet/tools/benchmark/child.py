"""The process of one subject: python -m ghostnet.tools.benchmark.child MODULE.FUNCTION FILE, told by stdin in JSON."""

import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ghostnet.errors import explain
from ghostnet.tools.benchmark.processes import cpu_seconds
from ghostnet.tools.benchmark.subject import Metrics

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def device_of(cfg: dict[str, Any], tuned: bool = True) -> "torch.device":
    """The device of a config, set up as our programs do; not tuned: as it is, for the programs of others."""
    import torch

    from ghostnet.device import choose, resolve

    kind, _ = choose(cfg["device"]["kind"])
    if not tuned and kind == "cpu":
        return torch.device(kind)
    return resolve(kind, (cfg["device"]["ids"] or [0])[0], cfg["device"].get("allow_hf32"))


def again(epoch: Iterable[T]) -> Iterator[T]:
    """An iterable from its start whenever it has ended."""
    return (item for _ in itertools.count() for item in epoch)


def window(
    items: Iterator[Any],
    images: int,
    seconds: float,
    device: "torch.device",
    warm_up: int,
    at_a_time: int = 1,
) -> Metrics:
    """Speed and CPU seconds over so many seconds of whole items, each of so many images, after warm_up of them.

    at_a_time: items that come together, since as many processes make them; their number is a multiple of it. CPU
    seconds are those of this process and of all it started.
    """
    from ghostnet.device import peak_memory, synchronize

    for _ in range(warm_up):
        next(items)
    synchronize(device)
    cpu, start, count = cpu_seconds(os.getpid()), time.perf_counter(), 0
    while not count or count % at_a_time or time.perf_counter() - start < seconds:
        next(items)
        count += 1
    synchronize(device)
    passed, used = time.perf_counter() - start, cpu_seconds(os.getpid()) - cpu
    metrics = {"speed": count * images / passed, "cpu_seconds": 1000 * used / (count * images)}
    return metrics | ({"card_memory": peak_memory(device)} if device.type != "cpu" else {})


def main(function: str, file: str) -> int:
    """Call the function with what stdin says, and write down what it gives; a fault ends in its message."""
    module, _, name = function.rpartition(".")
    spec = json.load(sys.stdin) | {"folder": str(Path(file).parent)}
    try:
        metrics = getattr(importlib.import_module(f"ghostnet.tools.benchmark.{module}"), name)(spec)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    Path(file).write_text(json.dumps(metrics), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
