"""benchmark checkpoint: what saving costs the loop, as the same training with saves and without, in turn."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from ghostnet.tools.benchmark.programs import PART
from ghostnet.tools.benchmark.subject import Finished, Metrics, Subject, program

WORDS = ("model.num_classes=1000", "data.image_size=64", "data.batch_size=32", "ema_decay=0.9998")
"""Unless told otherwise: checkpoints of full size, and steps so short that they weigh more than in a real run."""
EVERY = 100
"""Steps between two saves, unless told."""
SAVES = 3
"""Of a round. What is measured begins and ends half-way between saves: each has a whole interval to be written in."""
SAID = re.compile(
    r"saved last\.pt, step (\d+): ([\d.]+) MB in ([\d.]+) s beside the loop; "
    r"([\d.]+) s of the loop's time to copy it, ([\d.]+) s to wait"
)


def subjects(cfg: dict[str, Any], words: list[str]) -> list[Subject]:
    """One epoch of (SAVES + 1) intervals, its middle SAVES measured; without saving first."""
    every = cfg["save_every"] or EVERY
    steps, row = (SAVES + 1) * every, max(1, every // 2)
    images = steps * cfg["data"]["batch_size"] * cfg["device"]["count"] * cfg["accumulate"]
    own = [*words, *PART, f"log_every={row}", "eval_every=1", "resume=null"]
    own += [f"data.dataset.num_train={images}", "data.dataset.num_val=8"]

    def subject(name: str, save_every: str) -> Subject:
        def read(finished: Finished) -> Metrics:
            return _read(finished, row, row + SAVES * every)

        def command(folder: Path) -> list[str]:
            return program("train.py", *own, f"save_every={save_every}", f"hydra.run.dir={folder / 'run'}")

        return Subject(name, command, read)

    return [subject("without saving", "null"), subject(f"save_every={every}", str(every))]


def _read(finished: Finished, first: int, last: int) -> Metrics:
    """Seconds of the loop from one row to another, and what the saves between them say of themselves."""
    lines = map(json.loads, finished.text("run/metrics.jsonl").splitlines())
    at = {row["step"]: row["time"] for row in lines if "train/loss" in row}
    metrics: Metrics = {"seconds": at[last] - at[first], "steps": last - first, "memory": finished.memory}
    said = [found.groups() for found in SAID.finditer(finished.text("run/train.log"))]
    saves = [list(map(float, numbers)) for step, *numbers in said if first < int(step) <= last]
    if saves:
        megabytes, written, copied, waited = (statistics.median(column) for column in zip(*saves, strict=True))
        metrics |= {"saves": len(saves), "save_bytes": megabytes * 1e6, "save_seconds": written}
        metrics |= {"save_held": copied + waited}
    return metrics
