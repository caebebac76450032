"""The files of conf/: groups, their options, and what their comments and lines say of each key."""

import contextlib
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from ghostnet.errors import ConfigError

CONF = Path(__file__).parent.parent.parent / "conf"
OPTIONAL = ("experiment", "local")
"""Groups that a config does without; their files set keys of the whole config."""
GLOBAL = "# @package _global_"
"""The first line of those files."""


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
    """Return the choices of a group, hidden files (._x.yaml of a Mac) left out; experiments may lie in folders."""
    home = CONF / group
    found = home.rglob("*.yaml") if group == "experiment" else home.glob("*.yaml")
    names = (path.relative_to(home).with_suffix("") for path in found if path.is_file())  # no link into nowhere
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


@functools.cache
def targets(key: str) -> list[str]:
    """The constructors that the files of conf/ name for a key such as data.dataset._target_: no other is ever called.

    An option's file names it below its group; one of an experiment, of this machine or of a program, in full.
    """
    group, _, inner = key.partition(".")
    own = [(CONF / group / f"{option}.yaml", inner) for option in options(group)]
    whole = [CONF / kind / f"{option}.yaml" for kind in OPTIONAL for option in options(kind)]
    places = [*own, *((path, key) for path in [*CONF.glob("*.yaml"), *whole])]
    found = [readable(path).get(name) for path, name in places if _names_any(path)]
    return sorted({line.value.strip("'\"") for line in found if line and line.value})


@functools.cache
def _names_any(path: Path) -> bool:
    with contextlib.suppress(ConfigError):
        return "_target_" in content(path)
    return False


def heading(group: str, option: str) -> str:
    """Return what an option says of itself, its first comment; '' if it has none, or why it can't be read."""
    try:
        text = content(CONF / group / f"{option}.yaml")
    except ConfigError as error:
        return str(error)
    comments = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


@functools.cache
def content(path: Path) -> str:
    """Return the text of a file of conf/; ConfigError with its name, and the line, if it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{shown(path)}, line {number}: is not UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{shown(path)}: {error.strerror}.") from None


@functools.cache
def lines(path: Path) -> dict[str, Line]:
    """Return the dotted keys of a YAML file, nodes and leaves, in their order, without the defaults list.

    ConfigError with its name and the line if it can't be read, is no YAML or holds no keys.
    """
    text = content(path)
    found: dict[str, Line] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        number = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{shown(path)}, line {number}: {error.problem}.") from None
    except yaml.reader.ReaderError as error:
        number = text[: error.position].count("\n") + 1
        raise ConfigError(f"{shown(path)}, line {number}: {error.reason}.") from None
    if isinstance(root, yaml.MappingNode):
        _read(root, "", text.splitlines(), found)
    elif root is not None:
        raise ConfigError(f"{shown(path)}, line {root.start_mark.line + 1}: key: value is expected.")
    return {key: line for key, line in found.items() if key != "defaults"}


def readable(path: Path) -> dict[str, Line]:
    """Return lines() of a file that a command need not have chosen: nothing if it can't be read."""
    with contextlib.suppress(ConfigError):
        return lines(path)
    return {}


def shown(path: Path) -> str:
    """Return a path as messages have it: conf/experiment/mine.yaml."""
    return str(path.relative_to(CONF.parent)) if path.is_relative_to(CONF.parent) else str(path)


def lacks_header(path: Path) -> str:
    """Return what to mend in a file of an OPTIONAL group that Hydra does not take for keys of the whole config."""
    if content(path).startswith(f"\ufeff{GLOBAL}"):
        return f"{shown(path)}, line 1: a byte order mark (BOM) hides {GLOBAL!r}. Save the file as UTF-8 without BOM."
    return f"{shown(path)}, line 1: must be {GLOBAL!r}, else its keys are not those of the whole config."


def unreadable(error: Exception, chosen: Path) -> str | None:
    """Return what is wrong with the file of conf/ that Hydra could not read, None if that was not the cause.

    chosen: the file that it most likely is, for errors that name none.
    """
    paths = [chosen] if chosen.is_file() else []
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        paths = [Path(error.problem_mark.name)]
    elif isinstance(error, yaml.reader.ReaderError):
        paths = [Path(error.name)]
    elif isinstance(error, UnicodeDecodeError):  # it has the bytes, but no name
        paths = [path for path in CONF.rglob("*.yaml") if error.object in path.read_bytes()]
    for path in paths:
        try:
            lines(path)
        except ConfigError as fault:
            return str(fault)
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):  # such as a key that is there twice
        return f"{shown(Path(mark.name))}, line {mark.line + 1}: {error.problem}."
    return None


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
