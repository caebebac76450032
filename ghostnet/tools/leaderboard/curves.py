"""A run's curves out of its metrics.jsonl, thinned to so many points, in short."""

import contextlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def curves(folder: Path, points: int, started: float | None) -> dict[str, list[float]]:
    """Steps and seconds since the start, as differences, and values of training (s, t, loss, lr) and evaluation
    (es, et, top1, eloss: of the moving average where there is one).

    Of more than so many points each, every stretch keeps its lowest and its highest.
    """  # noqa: D205
    train, evaluated = _lines(folder / "metrics.jsonl")
    source = b"ema" if any(b'"ema/top1"' in line for line in evaluated) else b"eval"
    trained, tested = _rows(train, b"train/loss", points), _rows(evaluated, source + b"/top1", points)
    start = min(
        [row["time"] for row in (*trained[:1], *tested[:1])] + ([] if started is None else [started]), default=0
    )
    return {
        "s": _differences([row["step"] for row in trained]),
        "t": _differences([row["time"] - start for row in trained]),
        "loss": [_short(row.get("train/loss")) for row in trained],
        "lr": [_short(row.get("train/lr")) for row in trained],
        "es": _differences([row["step"] for row in tested]),
        "et": _differences([row["time"] - start for row in tested]),
        "top1": [_short(row.get(f"{source.decode()}/top1"), 5) for row in tested],
        "eloss": [_short(row.get(f"{source.decode()}/loss")) for row in tested],
    }


def _lines(path: Path) -> tuple[list[bytes], list[bytes]]:
    """The lines of training and of evaluation; none where there is no file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return [], []
    return [x for x in lines if b'"train/loss"' in x], [x for x in lines if b'"eval/top1"' in x]


def _rows(lines: list[bytes], key: bytes, points: int) -> Rows:
    """At most so many of the rows, the first and the last among them; of each stretch the lowest and the highest by a
    key. Only those are parsed, in half the time. What is no whole row is left out.
    """  # noqa: D205
    kept: Iterable[int] = range(len(lines))
    if len(lines) > points:
        values = [_value(line, b'"%s":' % key) for line in lines]
        stretches, inner = max(1, (points - 2) // 2), len(lines) - 2
        chosen = {0, len(lines) - 1}
        for number in range(stretches):
            stretch = range(1 + number * inner // stretches, 1 + (number + 1) * inner // stretches)
            chosen |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
        kept = sorted(chosen)
    rows: Rows = []
    for index in kept:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(lines[index])
            if isinstance(row, dict) and _is_number(row.get("step")) and _is_number(row.get("time")):
                rows.append(row)
    return rows


def _value(line: bytes, key: bytes) -> float:
    """A number of a line of JSON; infinite where it has none."""
    try:
        return float(line.partition(key)[2].partition(b",")[0].rstrip(b"} \r"))
    except ValueError:
        return math.inf


def _differences(values: list[float]) -> list[float]:
    """The first value, then what is added each time: shorter to write."""
    rounded = [round(value, 2 if value < 1000 else 0) for value in values]
    gaps = [b - a for a, b in zip([0.0, *rounded], rounded, strict=False)]
    return [_whole(round(gap, 2)) for gap in gaps]


def _short(value: Any, digits: int = 4) -> Any:  # noqa: ANN401 (what a row holds)
    """A number with so many digits; None for what is none."""
    return _whole(float(f"{value:.{digits}g}")) if _is_number(value) else None


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _is_number(value: Any) -> bool:  # noqa: ANN401 (what a row holds)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
