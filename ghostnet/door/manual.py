"""The page of --help: usage, groups with their options, values with units and sources, all read from conf/."""

import functools
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ghostnet.door.groups import CONF, OPTIONAL, Line, content, groups, heading, hydra_groups, lines, options, readable

WIDTH = 118
NAME = 34
"""Columns of what stands before an explanation."""


def page(name: str, usage: str, words: Sequence[str] = ()) -> str:
    """The page of a primary config; words: of the command, whose chosen options are the ones that are explained."""
    chosen = _chosen(name, words)
    parts = [usage.strip()]
    if chosen:
        parts.append(_groups(chosen))
    parts += [_values(name, chosen)]
    return "\n\n".join(part for part in parts if part)


@functools.cache
def settings(name: str) -> list[str]:
    """Return every key of a program, dotted, those of its primary config first, and the names of its groups."""
    primary = CONF / f"{name}.yaml"
    found, own = list(lines(primary)), [group for group in _defaults(primary) if group in groups()]
    for group in own:
        for option in options(group) if group not in OPTIONAL else ():
            found += [f"{group}.{key}" for key in readable(CONF / group / f"{option}.yaml")]
    return list(dict.fromkeys([*found, *own]))


def _defaults(path: Path) -> dict[str, str]:
    """The groups of a config's defaults list and the options that it takes, '' for none."""
    if not path.is_file():
        return {}
    head = re.split(r"^\S", content(path).partition("defaults:\n")[2], maxsplit=1, flags=re.M)[0]
    found = re.findall(r"^\s*-\s+(?:optional\s+|override\s+)?/?([\w/]+)(?:@\S+)?:\s*(\S+)", head, flags=re.M)
    return {group: "" if option == "null" else option for group, option in found}


def _chosen(name: str, words: Sequence[str]) -> dict[str, str]:
    """Group -> the option that the command, or else the primary config takes."""
    chosen = {group: option for group, option in _defaults(CONF / f"{name}.yaml").items() if group in groups()}
    if name == "train":
        chosen |= dict.fromkeys(hydra_groups(), "basic")
    pairs = [word.partition("=")[::2] for word in words]
    given = {group: option for group, option in pairs if group in chosen and option in options(group)}
    for group, option in (chosen | given).items():
        more = _defaults(CONF / group / f"{option}.yaml") if option else {}
        chosen |= {other: taken for other, taken in more.items() if other in chosen}
    return chosen | given


BASIC = {
    "hydra/launcher": "Hydra's own: one job of a sweep after another, in this process.",
    "hydra/sweeper": "Every combination of the values.",
}
"""What is chosen where nothing is, and has no file in conf/."""


def _groups(chosen: dict[str, str]) -> str:
    out = ["Groups. group=option replaces all values of a group; * is what this command takes:"]
    for group, taken in chosen.items():
        out.append("")
        said = {"basic": BASIC[group]} if group in BASIC else {}
        said |= {option: heading(group, option) for option in options(group)}
        for number, (option, text) in enumerate(said.items()):
            mark = "*" if option == taken else " "
            out += _row(f"  {'' if number else group:<15} {mark} {option}", re.sub(r":$", ".", text))
    return "\n".join(out)


def _values(name: str, chosen: dict[str, str]) -> str:
    out = ["Values. key=value sets one; null is none, [a,b] a list:", ""]
    for key, line in lines(CONF / f"{name}.yaml").items():
        if key.partition(".")[0] != "hydra":
            out += _value(key, line)
    for group, option in chosen.items():
        path, whole = CONF / group / f"{option}.yaml", group == "experiment"
        prefix = "" if whole else f"{group.replace('/', '.')}."
        of = lines(path) if path.is_file() else {}
        rows = [row for key, line in of.items() for row in _value(f"{prefix}{key}", line, whole)]
        out += ["", f"of {group}={option}{', in place of those above' if whole else ''}:", *rows] if rows else []
    return "\n".join(out)


def _value(key: str, line: Line, whole: bool = False) -> Iterator[str]:
    """A key with its value and comment; without a comment it is not for a command to set, unless whole is asked for."""
    if line.value is not None and (line.comment or whole):
        yield from _row(f"  {key}={line.value.strip(chr(34))}", line.comment)


def _row(left: str, right: str) -> Iterator[str]:
    """Two columns; the right one is wrapped, and begins on a line of its own where the left one is long."""
    rows = textwrap.wrap(right, WIDTH - NAME, break_long_words=False, break_on_hyphens=False) or [""]
    first = rows.pop(0) if len(left) < NAME else ""
    yield f"{left:<{NAME}}{first}".rstrip()
    yield from (f"{'':<{NAME}}{row}".rstrip() for row in rows)
