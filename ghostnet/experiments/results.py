"""Runs side by side: what differs between them, their numbers over seeds, the table of them, best first."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from ghostnet.experiments.confidence import Mean, over_seeds
from ghostnet.experiments.runs import METRICS, Run, find, read

HEADINGS = {"top1": "Acc@1", "top5": "Acc@5", "loss": "loss", "fps": "FPS", "time": "time"}
LESS_IS_BETTER = ("loss", "time")
NO_SETTINGS = ("resume", "baseline", "rerun", "sweep", "device.ids", "logger")
"""Keys that change no result: how a run was gone on with, where it was recorded."""


@dataclass(frozen=True)
class Row:
    """A run, or those that differ in nothing but their seed."""

    name: str
    runs: list[Run]
    metrics: dict[str, Mean | None]
    status: str

    def value(self, key: str) -> Any:  # noqa: ANN401 (any setting)
        """The setting that its runs share; None also where they have none."""
        return self.runs[0].config.get(key)

    def text(self, key: str) -> str | None:
        """The setting as it would be typed, None where its runs have none."""
        return shown(self.value(key)) if key in self.runs[0].config else None

    @property
    def seeds(self) -> int:
        """How many seeds its accuracy is of; without one, how many were run."""
        top1 = self.metrics["top1"]
        return top1.seeds if top1 else len({run.seed for run in self.runs})


def collect(roots: Iterable[Path]) -> list[Run]:
    """The runs at and below folders, each once."""
    found = {root.resolve() / folder.relative_to(root): folder for root in roots for folder in find(root)}
    runs = [read(folder) for folder in found.values()]
    for run, name in zip(runs, _names([run.folder for run in runs]), strict=True):
        run.name = name
    return runs


def _names(folders: list[Path]) -> list[str]:
    """The folders as they are told apart: below what they have in common."""
    paths = [os.path.abspath(folder) for folder in folders]  # noqa: PTH100 (resolve() looks up every part of each)
    if not paths:
        return []
    common = os.path.commonpath(paths) if len(paths) > 1 else os.path.dirname(paths[0])  # noqa: PTH120
    return [path[len(common) :].lstrip("/") or Path(path).name for path in paths]


def varying(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ, in the order of their configs."""
    known = [run.config for run in runs if run.config]
    first: dict[str, Any] = {}
    found: dict[str, None] = {}
    for config in known:
        for key, value in config.items():
            if first.setdefault(key, value) != value:
                found[key] = None
    settings = [key for key in first if key in found]
    return [key for key in settings if not any(key == no or key.startswith(f"{no}.") for no in NO_SETTINGS)]


def columns(runs: Sequence[Run], grouped: bool) -> list[str]:
    """The settings that tell the runs apart, typed ones first.

    Left out is what follows from a chosen option or experiment, and what says the same as another key.
    """
    names = [key for key in varying(runs) if key != "seed" or not grouped]
    typed = list(dict.fromkeys(word.lstrip("+~").partition("=")[0] for run in runs for word in run.overrides))
    kept = [key for key in typed if key in names]
    configs = [run.config for run in runs if run.config]
    vectors = {key: [config.get(key) for config in configs] for key in names}
    seen = [vectors[key] for key in kept]
    groups = {key.partition(".")[0] for key in names if "." in key} | {"experiment"}
    choices = {key: vectors[key] for key in names if key in groups}
    for key in names:
        sources = (choices[name] for name in (key.partition(".")[0], "experiment") if name in choices and name != key)
        if key in kept or vectors[key] in seen or any(_follows(vectors[key], source) for source in sources):
            continue
        kept.append(key)
        seen.append(vectors[key])
    return kept


def _follows(values: list[Any], source: list[Any]) -> bool:
    """Whether values are a function of those of another key."""
    return len(set(zip(source, values, strict=True))) == len(set(source))


def rows(runs: Sequence[Run], grouped: bool) -> list[Row]:
    """A row for each run; grouped: one for those that differ in nothing but their seed."""
    keys = [key for key in varying(runs) if key != "seed"]
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        alone = not grouped or not run.config
        key = (run.folder,) if alone else tuple(run.config.get(key) for key in keys)
        groups.setdefault(key, []).append(run)
    return [_row(group) for group in groups.values()]


def _row(runs: list[Run]) -> Row:
    counted = [run for run in runs if run.status == "completed"] or runs  # not what others reached before they ended
    metrics = {name: over_seeds([(run.seed, run.metrics[name]) for run in counted]) for name in METRICS}
    states = sorted(dict.fromkeys(run.status for run in runs), key=lambda status: status != "completed")
    counts = {status: sum(run.status == status for run in runs) for status in states}
    status = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {name}" for name, n in counts.items())
    return Row(_name(runs), runs, metrics, status)


def _name(runs: list[Run]) -> str:
    """What is left of the names of runs without their seed, else the first one's and how many more."""
    bare = {",".join(part for part in run.name.split(",") if part != f"seed={run.seed}") for run in runs}
    if len(runs) > 1 and len(bare) == 1 and "" not in bare:
        return bare.pop()
    return runs[0].name + (f" +{len(runs) - 1}" if len(runs) > 1 else "")


def best_first(ranked: Iterable[Row], key: str = "top1", backwards: bool = False) -> list[Row]:
    """Rows by a number, best first, or by a setting, ascending; those without one come last."""
    turn = backwards != (key in METRICS and key not in LESS_IS_BETTER)
    there: list[Row] = []
    lacking: list[Row] = []
    for row in ranked:
        (lacking if _rank(row, key) is None else there).append(row)
    return sorted(there, key=lambda row: _rank(row, key) or (0, 0.0, ""), reverse=turn) + lacking


def _rank(row: Row, key: str) -> tuple[int, float, str] | None:
    """What rows are sorted by: numbers before texts."""
    mean = row.metrics.get(key)
    value = mean.value if mean else None
    if key not in METRICS:
        value = {"name": row.name, "status": row.status}.get(key, row.value(key))
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if is_number else (1, 0.0, shown(value))


def shown(value: Any) -> str:  # noqa: ANN401 (any setting)
    """A setting as it would be typed."""
    if isinstance(value, tuple):
        return f"[{','.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """A time as people read it: 58.2 s, 0:16:02."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def number(name: str, mean: Mean | None) -> str:
    """A metric as the table has it, with ± its confidence where that is of accuracy or loss."""
    if mean is None:
        return "–"
    if name == "time":
        return duration(mean.value)
    spec = {"fps": ".1f", "loss": ".4f"}.get(name, ".3f")
    interval = "" if mean.confidence is None or name == "fps" else f" ± {mean.confidence:{spec}}"
    return f"{mean.value:{spec}}{interval}"


ENDLESS = 1 << 16
"""Characters of a line in a file: a table is as wide as it needs."""
COLOURS = {"failed": "red", "damaged": "red", "running": "cyan", "completed": ""}


def show(ranked: Sequence[Row], keys: Sequence[str], metrics: Sequence[str], title: str | None = None) -> None:
    """Print rows as a table that fits the terminal, and what can't be read of their runs."""
    console = Console()
    table = _table(ranked, keys, metrics, title, fold=False)
    if not console.is_terminal:
        console = Console(width=ENDLESS)
    elif Measurement.get(console, console.options.update(max_width=ENDLESS), table).maximum > console.width:
        table = _table(ranked, keys, metrics, title, fold=True)
    console.print(table)
    for row in ranked:
        for run in row.runs:
            if run.fault:
                console.print(Text(f"damaged: {run.folder}: {run.fault}"), soft_wrap=True)


def _table(ranked: Sequence[Row], keys: Sequence[str], metrics: Sequence[str], title: str | None, fold: bool) -> Table:
    """A column for each setting; fold: one for all, as they would be typed."""
    told = all(_words(row, keys) == [] for row in ranked)
    names = ([] if told else ["settings"]) if fold else keys
    table = Table(Column("run", overflow="fold"), *(Column(name, overflow="fold") for name in names), title=title)
    grouped = any(len(row.runs) > 1 for row in ranked)
    for heading in [*(["seeds"] if grouped else []), *(HEADINGS[name] for name in metrics)]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    for row in ranked:
        cells = [row.text(key) or "–" for key in keys]
        if fold:
            cells = [" ".join(_words(row, keys)) for _ in names]
        counts = [str(row.seeds)] if grouped else []
        numbers = [number(name, row.metrics[name]) for name in metrics]
        status = Text(row.status, style=COLOURS.get(row.status, "yellow"))
        name = row.name.replace(",", ", ") if fold else row.name  # lines break at spaces
        table.add_row(*map(Text, [name, *cells, *counts, *numbers]), status)
    return table


def _words(row: Row, keys: Sequence[str]) -> list[str]:
    """A row's settings as they would be typed, as far as its name does not tell them."""
    told = row.name.replace("/", ",").split(",")
    words = [f"{key}={row.text(key)}" for key in keys if row.text(key) is not None]
    return [word for word in words if word not in told]
