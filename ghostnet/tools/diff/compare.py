"""Two runs side by side: code, environment, metrics, and the step at which their losses part."""

import re
from dataclasses import dataclass
from typing import Any

from ghostnet.tools.diff.folder import Run

METRICS = {
    "top1": "Acc@1",
    "top5": "Acc@5",
    "loss": "loss",
    "last_top1": "last Acc@1",
    "train_loss": "train loss",
    "best_epoch": "best epoch",
    "fps": "FPS",
    "eval_fps": "evaluation FPS",
    "data_wait": "data wait",
    "seconds": "seconds",
    "memory": "peak memory, MiB",
    "steps": "steps",
    "params": "parameters",
}
ENVIRONMENT = ("device", "device_name", "world_size", "torch")
"""Of result.json, which earlier versions have too."""
BEFORE = "?"
"""In the place of what a run has not kept."""

Pairs = list[tuple[str, Any, Any]]
"""(name, of the first run, of the other)."""


@dataclass(frozen=True)
class Loss:
    """How far the train rows of two runs are the same."""

    compared: int
    """Rows of the same step."""
    step: int | None
    """The first whose losses differ; None: there is none."""
    values: tuple[float | None, float | None] = (None, None)


def code(one: Run, other: Run) -> Pairs:
    """What differs in the code: commit, version, what was not committed."""
    pairs: Pairs = [("commit", one.record.get("commit", BEFORE), other.record.get("commit", BEFORE))]
    versions = [run.record.get("versions", {}).get("ghostnet", BEFORE) for run in (one, other)]
    pairs.append(("version", *versions))
    if one.patch != other.patch:
        pairs.append(("not committed", _patched(one), _patched(other)))
    return [pair for pair in pairs if pair[1] != pair[2]]


def _patched(run: Run) -> str:
    """The files that a run's code.diff changes, with the count of their lines."""
    files: dict[str, list[int]] = {}
    name = ""
    for line in run.patch.splitlines():
        if found := re.match(r"diff --git a/.* b/(.*)", line):
            name = found[1]
            files[name] = [0, 0]
        elif name and line[:1] in "+-" and not line.startswith(("+++", "---")):
            files[name][line[0] == "-"] += 1
    return ", ".join(f"{file} +{added} -{gone}" for file, (added, gone) in files.items()) or "nothing"


def environment(one: Run, other: Run) -> Pairs:
    """What differs in versions and hardware."""
    sides = []
    for run in (one, other):
        side = {key: run.result[key] for key in ENVIRONMENT if key in run.result}
        side |= {key: value for key, value in run.record.get("versions", {}).items() if key != "ghostnet"}
        side |= run.record.get("hardware", {})
        side |= {key: run.record[key] for key in ("host",) if key in run.record}
        sides.append(side)
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    pairs = [(name, sides[0].get(name, BEFORE), sides[1].get(name, BEFORE)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def metrics(one: Run, other: Run) -> Pairs:
    """All metrics that either has."""
    pairs: Pairs = [("status", one.status, other.status)]
    for key, name in METRICS.items():
        values = [_metric(run, key) for run in (one, other)]
        if values != [None, None]:
            pairs.append((name, *values))
    return pairs


def _metric(run: Run, key: str) -> Any:  # noqa: ANN401 (a number or nothing)
    value = run.result.get(key)
    if key == "memory":
        return max(value) / 2**20 if isinstance(value, list) and value else None
    return value if isinstance(value, int | float) else None


def losses(one: Run, other: Run) -> Loss:
    """Where the losses of training part, over the steps that both have written."""
    sides = [{row["step"]: row["train/loss"] for row in run.rows if "train/loss" in row} for run in (one, other)]
    common = sorted(sides[0].keys() & sides[1].keys())
    for step in common:
        if sides[0][step] != sides[1][step]:
            return Loss(len(common), step, (sides[0][step], sides[1][step]))
    return Loss(len(common), None)
