"""The filter: key, sign and value, with commas between; all must hold. page.js reads the same language."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ghostnet.errors import ConfigError
from ghostnet.experiments.results import Row, shown
from ghostnet.experiments.runs import METRICS, Run
from ghostnet.schema import did_you_mean

ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
OTHERS = ("name", "status", *METRICS)
"""What can be asked for beside the settings."""
FORM = "Write key=value, with =, !=, <, <=, >, >= or ~ (contains), and commas between: optim.lr>0.2,status=completed"


@dataclass(frozen=True)
class Condition:
    """One of the conditions of a filter."""

    key: str
    sign: str
    text: str

    def holds(self, value: Any) -> bool:  # noqa: ANN401 (any setting)
        """Whether a value meets it; None: there is none."""
        number, own = as_number(value), as_number(self.text)
        if self.sign in ORDERS:
            return number is not None and own is not None and ORDERS[self.sign](number, own)
        text = None if value is None else shown(value)
        if self.sign == "~":
            return text is not None and self.text.lower() in text.lower()
        same = (
            number == own if number is not None and own is not None else ("null" if text is None else text) == self.text
        )
        return same == (self.sign == "=")


def as_number(value: Any) -> float | None:  # noqa: ANN401 (any setting)
    """A value as a number, None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return float(value) if not isinstance(value, str) or NUMBER.fullmatch(value) else None


def parse(text: str) -> list[Condition]:
    """ConfigError where a condition is none."""
    return [_condition(part.strip()) for part in _parts(text) if part.strip()]


def _parts(text: str) -> list[str]:
    """The text at its commas, but not at those within brackets or quotes."""
    return re.findall(r"(?:\[[^\]]*\]|'[^']*'|[^,])+", text)


def _condition(part: str) -> Condition:
    found = re.fullmatch(r"([^=!<>~]+?)\s*(!=|<=|>=|=|<|>|~)\s*(.*)", part)
    if not found:
        raise ConfigError(f"filter: {part!r} is no condition. {FORM}")
    key, sign, value = found.groups()
    if len(value) > 1 and value[0] == value[-1] == "'":
        value = value[1:-1]
    if sign in ORDERS and as_number(value) is None:
        raise ConfigError(f"filter: {part!r}: {sign} needs a number behind it.")
    return Condition(key, sign, value)


def check_key(word: str, key: str, runs: Sequence[Run]) -> None:
    """ConfigError with the nearest where no run has such a key."""
    known = dict.fromkeys([*OTHERS, *(name for run in runs for name in run.config)])
    if key not in known:
        hint = did_you_mean(key, known)
        same = [name for name in known if name.rpartition(".")[2] == key]
        hint = hint if not same else f" Did you mean {same[0]}?"
        raise ConfigError(f"{word}: {key}: the runs have no such key.{hint}")


def chosen_runs(runs: Iterable[Run], conditions: Sequence[Condition]) -> list[Run]:
    """The runs whose settings and status meet the conditions."""
    own = [condition for condition in conditions if not _is_of_rows(condition)]
    return [run for run in runs if all(c.holds(_of_run(run, c.key)) for c in own)]


def chosen_rows(rows: Iterable[Row], conditions: Sequence[Condition]) -> list[Row]:
    """The rows whose name and numbers, which are means over seeds, meet the conditions."""
    own = [condition for condition in conditions if _is_of_rows(condition)]
    return [row for row in rows if all(c.holds(_of_row(row, c.key)) for c in own)]


def _is_of_rows(condition: Condition) -> bool:
    return condition.key == "name" or condition.key in METRICS


def _of_run(run: Run, key: str) -> Any:  # noqa: ANN401 (any setting)
    return run.status if key == "status" else run.config.get(key)


def _of_row(row: Row, key: str) -> str | float | None:
    mean = None if key == "name" else row.metrics[key]
    return row.name if key == "name" else mean.value if mean else None
