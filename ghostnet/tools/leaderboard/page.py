"""html=FILE: the runs in one page that needs no network and no other file."""

import base64
import hashlib
import html
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ghostnet.experiments import results
from ghostnet.experiments.confidence import student_t
from ghostnet.experiments.results import Row, shown
from ghostnet.experiments.runs import METRICS, Run
from ghostnet.loggers import jsonable
from ghostnet.tools.leaderboard.curves import curves

HERE = Path(__file__).parent
SCRIPTS = ("rows.js", "charts.js", "plots.js", "page.js", "controls.js")
POINTS, LEAST, MOST = 60_000, 24, 500
"""Of a curve over all runs together, and at least and at most of each: 1,000 runs stay below 5 MB."""


def page(rows: Sequence[Row], sort: str, grouped: bool, command: Sequence[str]) -> str:
    """The whole page. Texts of runs are data in it, never markup."""
    data = json.dumps(payload(rows, sort, grouped, command), separators=(",", ":"), allow_nan=False, default=str)
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "hash": f"sha256-{digest}",  # a browser runs this script alone, whatever else may come to be in the page
        "title": html.escape(f"Leaderboard · {data_title(rows)}"),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "data": data.replace("<", "\\u003c"),  # no text can end the script element
        "script": script,
    }
    head, *pieces = (HERE / "page.html").read_text(encoding="utf-8").split("{{")
    return head + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces))


def data_title(rows: Sequence[Row]) -> str:
    """How many runs."""
    count = sum(len(row.runs) for row in rows)
    return f"{count:,} run{'s' if count > 1 else ''}"


def payload(rows: Sequence[Row], sort: str, grouped: bool, command: Sequence[str]) -> dict[str, Any]:
    """What the page shows: runs, in lists over their numbers; it groups, sorts and filters them itself."""
    runs = [run for row in rows for run in row.runs]
    groups = results.rows(runs, grouped=True)
    group_of = {id(run): index for index, group in enumerate(groups) for run in group.runs}
    points = max(LEAST, min(MOST, POINTS // len(runs)))
    return {
        "command": shlex.join(["python", "-m", "ghostnet.tools.leaderboard", *command]),
        "made": time.time(),
        "sort": sort,
        "grouped": grouped,
        "student": [student_t(freedom) for freedom in range(1, max(2, *(len(group.runs) for group in groups)))],
        "names": [run.name for run in runs],
        "folders": [str(run.folder.resolve()) for run in runs],
        "status": [run.status for run in runs],
        "notes": [run.fault or run.error for run in runs],
        "seeds": [run.seed for run in runs],
        "rerun": [run.rerun for run in runs],
        "metrics": {name: _numbers(runs, name) for name in METRICS},
        "groups": [group_of[id(run)] for run in runs],
        "settings": _settings(runs),
        "constants": _constants(runs),
        "curves": [curves(run.folder, points, run.started) for run in runs],
    }


def _numbers(runs: Sequence[Run], name: str) -> list[float | None]:
    """A metric of all runs; JSON has no infinities."""
    return list(jsonable({str(index): run.metrics[name] for index, run in enumerate(runs)}).values())


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that vary: each value once, with its text, and which one every run has, -1 for none."""
    told = results.columns(runs, grouped=False)
    rest = [key for key in results.varying(runs) if key not in told]
    found = []
    for key in [*told, *rest]:
        values = list(dict.fromkeys(run.config[key] for run in runs if key in run.config))
        place = {value: index for index, value in enumerate(values)}
        index = [place[run.config[key]] if key in run.config else -1 for run in runs]
        numbers = [value if _is_number(value) else None for value in values]
        shape = {"key": key, "column": key in told, "texts": [shown(value) for value in values]}
        found.append(shape | {"numbers": numbers, "index": index})
    return found


def _is_number(value: Any) -> bool:  # noqa: ANN401 (any setting)
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _constants(runs: Sequence[Run]) -> dict[str, str]:
    """The settings that all runs share."""
    vary = set(results.varying(runs))
    config: dict[str, Any] = {}
    for run in runs:
        config = run.config | config
    return {key: shown(value) for key, value in config.items() if key not in vary}
