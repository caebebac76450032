"""The rows for other programs: CSV, JSON, Markdown. Numbers in full there, but for Markdown."""

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from ghostnet.experiments.results import HEADINGS, Row, number
from ghostnet.experiments.runs import METRICS

COLUMNS = ("top1", "fps", "time")
"""The numbers that a table for people has."""


def as_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Comma-separated values with one line of headings; empty where there is no value."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    numbers = [heading for name in METRICS for heading in (name, f"{name}_confidence")]
    writer.writerow(["name", *keys, "seeds", *numbers, "status", "error", "folders", "rerun"])
    for row in rows:
        line = as_object(row, keys)
        settings = [row.text(key) or "" for key in keys]
        values = ["" if line[name] is None else line[name] for name in numbers]
        texts = [[run["error"] or run["damaged"] or "" for run in line["runs"]]]
        texts += [[run[key] or "" for run in line["runs"]] for key in ("folder", "rerun")]
        joined = ["\n".join(dict.fromkeys(filter(None, parts))) for parts in texts]
        writer.writerow([row.name, *settings, row.seeds, *values, line["status"], *joined])
    return file.getvalue()


def as_json(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """A list of objects, one for each row, with the runs that it is made of."""
    return json.dumps([as_object(row, keys) for row in rows], indent=1, default=str) + "\n"


def as_object(row: Row, keys: Sequence[str]) -> dict[str, Any]:
    """A row for JSON: settings, means with their confidence, and its runs."""
    values: dict[str, Any] = {"name": row.name, "settings": {key: row.value(key) for key in keys}}
    values["seeds"] = list(dict.fromkeys(run.seed for run in row.runs))
    for name, mean in row.metrics.items():
        values[name] = mean.value if mean else None
        values[f"{name}_confidence"] = mean.confidence if mean else None
    values["status"] = row.status
    values["runs"] = [
        {"folder": str(run.folder), "seed": run.seed, "status": run.status, **run.metrics}
        | {"error": run.error, "damaged": run.fault, "rerun": run.rerun}
        for run in row.runs
    ]
    return values


def as_markdown(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """A table as GitHub reads it."""
    grouped = any(len(row.runs) > 1 for row in rows)
    head = ["run", *keys, *(["seeds"] if grouped else []), *(HEADINGS[name] for name in COLUMNS), "status"]
    lines = [head, ["---"] * (1 + len(keys)) + ["---:"] * (len(head) - len(keys) - 2) + ["---"]]
    for row in rows:
        settings = [row.text(key) or "–" for key in keys]
        seeds = [str(row.seeds)] if grouped else []
        lines.append([row.name, *settings, *seeds, *(number(n, row.metrics[n]) for n in COLUMNS), row.status])
    return "".join(f"| {' | '.join(line if line is lines[1] else map(_escaped, line))} |\n" for line in lines)


def _escaped(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", text.replace("\n", " "))
