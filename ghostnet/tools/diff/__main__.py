"""What differs between two runs: python -m ghostnet.tools.diff RUN_A RUN_B [json=true].

Values of the config, code, environment and metrics that differ, the step at which the losses part, and the shortest
list of overrides that, added to A's own command, gives B's config: each of them is needed. json=true prints JSON.
"""

import json
import shlex
from typing import Any

from ghostnet.config import flat
from ghostnet.door.typed import without_dashes
from ghostnet.errors import UserError
from ghostnet.experiments import rerun
from ghostnet.loggers import jsonable
from ghostnet.schema import did_you_mean
from ghostnet.tools import entry
from ghostnet.tools.diff import compare
from ghostnet.tools.diff.folder import Run, read
from ghostnet.tools.diff.words import Way, differ, way

FORM = "python -m ghostnet.tools.diff RUN_A RUN_B [json=true]"
JSON = {"json=true": True, "format=json": True, "json=false": False, "format=text": False}


def split(typed: list[str]) -> tuple[str, str, bool]:
    """(A, B, whether JSON is wanted); UserError where it is something else."""
    own = [word for word in typed if word.partition("=")[0] in ("json", "format")]
    paths = [word for word in typed if word not in own]
    for word in own:
        if word not in JSON:
            raise UserError(f"{word}: there are {', '.join(JSON)}.")
    for word in paths:
        if word.startswith("-"):
            raise UserError(f"{word}: no such flag.{without_dashes(word, ('json', 'format'))} {FORM}")
        key, equals, _ = word.partition("=")
        if equals and "/" not in key and (near := did_you_mean(key, ("json", "format"))):
            raise UserError(f"{word}: no such word.{near}=…")
    if len(paths) != 2:
        raise UserError(f"two runs are compared, {len(paths)} {'was' if len(paths) == 1 else 'were'} given. {FORM}")
    return paths[0], paths[1], any(JSON[word] for word in own)


def report(one: Run, other: Run) -> dict[str, Any]:
    """All of it."""
    values = dict(flat(one.config)), dict(flat(other.config))
    found = way(one.words or [], one.config, other.config, other.words or [])
    loss, changed = compare.losses(one, other), differ(one.config, other.config)
    return {
        "runs": [str(one.path), str(other.path)],
        "config": [(key, *(side.get(key, compare.BEFORE) for side in values)) for key in changed],
        "code": compare.code(one, other),
        "environment": compare.environment(one, other),
        "metrics": compare.metrics(one, other),
        "loss": {"rows_compared": loss.compared, "first_step_that_differs": loss.step, "values": loss.values},
        "overrides": found.words,
        "command": None if found.fault else _command(one, found),
        "not_reached": found.left,
        "fault": found.fault,
        "drifted": list(found.drifted),
    }


def _command(one: Run, found: Way) -> str:
    return shlex.join(["python", "train.py", *(one.words or []), *found.words])


def page(found: dict[str, Any], has_words: bool) -> str:
    """All of it for people."""
    lines = [f"A  {found['runs'][0]}", f"B  {found['runs'][1]}"]
    for name in ("config", "code", "environment"):
        pairs = found[name]
        lines += ["", f"{name}{'' if pairs else ': the same'}"]
        lines += _table([(key, _text(a), _text(b)) for key, a, b in pairs])
    lines += ["", "metrics"]
    lines += _table([(name, _number(a), _number(b), _difference(a, b)) for name, a, b in found["metrics"]])
    lines += [f"  {_of_losses(found['loss'])}", "", "from A to B"]
    if not has_words:
        lines.append("  A has not kept its overrides: these are added to the plain command")
    lines += [f"  note: conf/ has changed since A: its own command gives another {key} now" for key in found["drifted"]]
    if found["fault"]:
        fault = found["fault"].replace("\n       ", "\n    ")
        lines += ["  the command can't be run with the conf/ of today:", f"    {fault}"]
    elif not found["overrides"] and not found["not_reached"]:
        lines.append("  nothing to add: A's own command gives B's config")
    lines += [f"  {shlex.quote(word)}" for word in found["overrides"]]
    if found["not_reached"]:
        lines.append(f"  no override changes {', '.join(found['not_reached'])}")
    if found["command"] and found["overrides"]:
        lines += ["", found["command"]]
    return "\n".join(lines)


def _of_losses(loss: dict[str, Any]) -> str:
    if not loss["rows_compared"]:
        return "no two train/loss rows are of the same step"
    if loss["first_step_that_differs"] is None:
        return f"train/loss is the same in all {loss['rows_compared']} rows of the same step"
    a, b = loss["values"]
    return f"train/loss differs from step {loss['first_step_that_differs']} on: {_number(a)} and {_number(b)}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(max(map(len, rows), default=0))]
    return [
        f"  {'  '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True))}".rstrip() for row in rows
    ]


def _text(value: Any) -> str:  # noqa: ANN401 (a config's)
    return value if isinstance(value, str) else rerun.as_word(value)


def _number(value: Any) -> str:  # noqa: ANN401 (a metric)
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _difference(a: Any, b: Any) -> str:  # noqa: ANN401 (metrics)
    numbers = (int, float)
    if not isinstance(a, numbers) or not isinstance(b, numbers):
        return ""
    share = f" ({100 * (b - a) / a:+.1f} %)" if a and b != a else ""
    return f"{b - a:+,.4f}{share}" if isinstance(b - a, float) else f"{b - a:+,}{share}"


def run(typed: list[str]) -> None:
    """Print the page, or its numbers."""
    a, b, as_json = split(typed)
    one = read(a)
    found = report(one, read(b))
    print(json.dumps(jsonable(found), indent=1, default=str) if as_json else page(found, one.words is not None))


def main(typed: list[str]) -> int:
    """The exit code."""
    return entry.ended(run, __doc__, typed)


if __name__ == "__main__":
    entry.start(main)
