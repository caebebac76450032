"""The jobs of a sweep, from its words: each combination, named by what differs; a search's corners.

A search's own jobs are known only one after the other.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from ghostnet.errors import ConfigError

OPTUNA = "hydra_plugins.ghostnet.Optuna"
"""What conf/hydra/sweeper/optuna.yaml calls the search: Hydra takes sweepers of such names alone."""
NAME_LENGTH = 120
"""Characters of a job's folder name; file systems allow 255 bytes."""


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep."""

    name: str
    """Its folder in the sweep's: what differs between the jobs."""
    words: list[str]
    """Its overrides."""


def grid(parsed: Iterable[Override]) -> list[SweepJob]:
    """Every combination of the values that are swept, in order; a key that is given twice has its last values."""
    values: dict[str, list[str]] = {}
    swept: set[str] = set()
    for override in parsed:
        key = override.get_key_element()
        if override.is_interval_sweep():
            raise ConfigError(
                f"{override.input_line}: an interval is searched, not swept. Give hydra/sweeper=optuna too."
            )
        several = override.is_sweep_override()
        values[key] = (
            [str(value) for value in override.sweep_string_iterator()]
            if several
            else [override.get_value_element_as_str()]
        )
        (swept.add if several else swept.discard)(key)
    combinations = dict.fromkeys(itertools.product(*values.values()))  # a value that is given twice is one job
    jobs = [dict(zip(values, combination, strict=True)) for combination in combinations]
    return [
        SweepJob(job_name({k: v for k, v in job.items() if k in swept}), [f"{k}={v}" for k, v in job.items()])
        for job in jobs
    ]


def job_name(differs: dict[str, str]) -> str:
    """A folder name that tells what differs; where it can't be told in full, a hash keeps it apart from others."""
    text = ",".join(f"{key.lstrip('+')}={value}" for key, value in differs.items())
    name = re.sub(r"[^\w.,=+\[\]-]", "_", text, flags=re.ASCII)[:NAME_LENGTH]
    return (name if name == text else f"{name}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:6]}") or "job"


def plain(word: str) -> str:
    """Return key=null,2.0 for key=choice(null,2.0), which is the same to Hydra, whose choice() takes no null."""
    found = re.fullmatch(r"([^=]+=)\s*choice\((.*\bnull\b.*)\)\s*", word, re.IGNORECASE)
    return found[1] + found[2].strip() if found else word


def words_of(params: DictConfig | dict[str, Any] | None) -> list[str]:
    """The words of hydra.sweeper.params."""
    return [plain(f"{key!s}={value}") for key, value in (params or {}).items()]


def jobs_at_the_door(parsed: Sequence[Override], hydra: DictConfig | None) -> list[SweepJob]:
    """The jobs of a sweep as far as they are known before it; of a search, those at the corners of its space."""
    if hydra is None or hydra.sweeper._target_ != OPTUNA:
        return grid(parsed)
    fixed, spaces = space_of(parsed)
    if not spaces:
        raise ConfigError(
            "hydra/sweeper=optuna: nothing to search. Give a space, such as "
            "'optim.lr=tag(log, interval(0.1, 1.6))', or an experiment with one: experiment=search_optuna."
        )
    ends = {key: list(_ends(override)) for key, override in spaces.items()}
    first = {key: f"{key}={values[0]}" for key, values in ends.items()}
    same = [f"{key}={value}" for key, value in fixed.items()]
    others = [first | {key: f"{key}={value}"} for key, values in ends.items() for value in values]
    corners = dict.fromkeys((*same, *corner.values()) for corner in others)
    return [SweepJob("", list(words)) for words in corners]


def space_of(parsed: Sequence[Override]) -> tuple[dict[str, str], dict[str, Override]]:
    """The keys of a search with one value, and those that are searched; the last counts of a key given twice."""
    last = {override.get_key_element(): override for override in parsed}
    fixed = {key: o.get_value_element_as_str() for key, o in last.items() if not o.is_sweep_override()}
    return fixed, {key: override for key, override in last.items() if key not in fixed}


def _ends(override: Override) -> Iterator[Any]:
    value: Any = override.value()
    if override.is_interval_sweep():
        yield from (value.start, value.end)
    else:
        yield from map(str, override.sweep_string_iterator())
