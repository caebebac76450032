"""The files of conf/: groups, their options, and what their comments and lines say of each key."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

CONF = Path(__file__).parent.parent.parent / "conf"


@dataclass(frozen=True)
class Line:
    """Where a file of conf/ sets a key."""

    number: int
    """From 1 on."""
    value: str | None
    """As it is written; None of a node that holds others."""
    comment: str
    """Behind it on its line; empty where there is none."""


def groups() -> list[str]:
    """The config groups: the folders of conf/, without Hydra's own."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def hydra_groups() -> list[str]:
    """Hydra's groups that conf/ has options for: hydra/launcher, hydra/sweeper."""
    return sorted(f"hydra/{path.name}" for path in CONF.glob("hydra/*") if path.is_dir())


def options(group: str) -> list[str]:
    """The choices of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@functools.cache
def targets(key: str) -> list[str]:
    """The constructors that the files of conf/ name for a key such as data.dataset._target_: no other is ever called.

    An option's file names it below its group; one of an experiment, of this machine or of a program, in full.
    """
    group, _, inner = key.partition(".")
    own = [(path, inner) for path in sorted((CONF / group).glob("*.yaml"))]
    whole = [*CONF.glob("*.yaml"), *CONF.glob("experiment/*.yaml"), *CONF.glob("local/*.yaml")]
    found = [lines(path).get(name) for path, name in [*own, *((path, key) for path in whole)] if _names_any(path)]
    return sorted({line.value.strip("'\"") for line in found if line and line.value})


@functools.cache
def _names_any(path: Path) -> bool:
    return "_target_" in path.read_text(encoding="utf-8")


def heading(group: str, option: str) -> str:
    """What an option says of itself: its first comment, '' where it has none."""
    text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
    comments = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


@functools.cache
def lines(path: Path) -> dict[str, Line]:
    """The dotted keys of a YAML file, nodes and leaves, in their order; but for the defaults list."""
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found: dict[str, Line] = {}
    if isinstance(root, yaml.MappingNode):
        _read(root, "", text.splitlines(), found)
    return {key: line for key, line in found.items() if key != "defaults"}


def _read(node: yaml.MappingNode, prefix: str, text: list[str], found: dict[str, Line]) -> None:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        deeper = isinstance(value, yaml.MappingNode) and bool(value.value)
        mark = key.end_mark if deeper else value.end_mark
        # A comment of YAML has a space before its '#'; a value that has one is quoted, and ends before.
        comment = re.search(r"\s#\s?(.*)", text[mark.line][mark.column :] if mark.line < len(text) else "")
        written = None if deeper else _written(value, text)
        found[name] = Line(key.start_mark.line + 1, written, comment[1].strip() if comment else "")
        if isinstance(value, yaml.MappingNode):
            _read(value, f"{name}.", text, found)


def _written(node: yaml.Node, text: list[str]) -> str:
    start, end = node.start_mark, node.end_mark
    if start.line == end.line:
        return text[start.line][start.column : end.column] if start.line < len(text) else ""
    return "…"
