"""A line of the reference as it is typed in a shell -> its program, its flags with their values, how often it runs."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostnet.errors import ConfigError
from ghostnet.schema import did_you_mean
from ghostnet.tools.translate.flags import ASSUMED, EVALUATE, SCRIPTS, VERSIONS, Flag, Version, flags

FORM = "python -m ghostnet.tools.translate 'bash ./test/train_full_8p.sh --data_path=/data/imagenet'"
UNKNOWN = "\0"
"""Marks what only the shell knows: a variable, or what a command prints."""
LOOPS = (
    re.compile(r"for\s*\(\(\s*\w+\s*=\s*(?P<first>\d+)\s*;\s*\w+\s*<\s*(?P<end>\d+)"),
    re.compile(r"for\s+\w+\s+in\s+(?:\$\(|`)\s*seq\s+(?P<first>\d+)\s+(?P<last>\d+)"),
    re.compile(r"for\s+\w+\s+in\s+\{(?P<first>\d+)\.\.(?P<last>\d+)\}"),
    re.compile(r"for\s+\w+\s+in\s+(?P<list>\d+(?:\s+\d+)*)"),
)


@dataclass
class Line:
    """One command of the reference."""

    program: str
    """train or evaluate."""
    script: str | None
    """The name of a script of test/; None: a Python program."""
    data: str | None = None
    given: dict[str, Any] = field(default_factory=dict)
    """The flags of the program, by their long names, with their values; UNKNOWN where only the shell knows it."""
    typed: dict[str, str] = field(default_factory=dict)
    """The same as they were typed."""
    strangers: dict[str, str] = field(default_factory=dict)
    """What is no flag of the program -> the flag that may be meant, in words."""
    looped: int | None = None
    """How often a loop of the shell runs it."""
    version: str = ASSUMED
    """A key of VERSIONS."""
    told_by: str = "assumed"
    """How its version is known."""

    @property
    def of(self) -> Version:
        """What its version has of its own."""
        return VERSIONS[self.version]

    @property
    def flags(self) -> dict[str, Flag]:
        """Those of its program, by all their spellings."""
        return flags(self.program)


def parse(text: str) -> Line:
    """The first command of the reference in a text; ConfigError if there is none, or a value is of no use.

    --version=1.5|1.8, anywhere in the text, is ours: the version of the reference.
    """
    text, chosen = _chosen(text)
    line, before = _command(text)
    if chosen:
        line.version, line.told_by = chosen, f"as --version={chosen} says"
    else:
        marks = {of.environment: name for name, of in VERSIONS.items()}
        found = {word: marks[word] for word in map(_name, before) if word in marks}
        if len(set(found.values())) == 1:
            line.version, line.told_by = next(iter(found.values())), f"told by {' and '.join(found)}"
        else:
            why = f"{' and '.join(found)} are of different ones" if found else "nothing in the line tells it"
            other = next(name for name in VERSIONS if name != ASSUMED)
            line.told_by = f"assumed: {why}; --version={other} takes the other"
    return line


def _name(token: str) -> str:
    return Path(token).name


def _chosen(text: str) -> tuple[str, str | None]:
    """(the text without --version=…, its value)."""
    form = re.compile(r"(?<!\S)--version(?:=(\S*))?(?!\S)")
    found = {match[0]: match[1] for match in form.finditer(text)}
    if len(found) > 1:
        raise ConfigError(f"{' '.join(found)}: of which version is the line? Give one.")
    for word, version in found.items():
        if version not in VERSIONS:
            raise ConfigError(f"{word}: the reference has --version={' and --version='.join(VERSIONS)}.")
    return form.sub("", text), next(iter(found.values()), None)


def _command(text: str) -> tuple[Line, list[str]]:
    """The first command of the reference in a text, its version yet unknown, and the words before it."""
    count = _looped(text)
    try:
        tokens = _tokens(text)
    except ValueError as error:
        raise ConfigError(f"a quote is not closed: {str(error).lower()}. {FORM}") from None
    for position, token in enumerate(tokens):
        name = _name(token)
        rest = tokens[position + 1 :]
        end = next((i for i, word in enumerate(rest) if word and set(word) <= set(";&|()")), len(rest))
        if name in SCRIPTS or name == EVALUATE:
            return _script(name, rest[:end]), tokens[:position]
        if name.endswith(".py"):
            is_evaluation = name.startswith("valid") or "--checkpoint" in {word.partition("=")[0] for word in rest}
            line = Line("evaluate" if is_evaluation else "train", None, looped=count)
            _read(line, rest[:end])
            return line, tokens[:position]
    known = [*SCRIPTS, EVALUATE, "train_ghostnet_1p.py", "train_ghostnet_8p.py", "validate_ghostnet.py"]
    programs = [_name(token) for token in tokens if token.endswith((".sh", ".py"))]
    near = did_you_mean(programs[0], known) if programs else ""
    what = f"{programs[0]}: no such program of the reference." if programs else "no program of the reference is in it."
    raise ConfigError(f"{what}{near} It has {', '.join(known)}. {FORM}")


def _looped(text: str) -> int | None:
    for loop in LOOPS:
        if found := loop.search(text):
            parts = found.groupdict()
            if parts.get("list"):
                return len(parts["list"].split())
            last = int(parts["end"]) if parts.get("end") else int(parts["last"]) + 1
            return last - int(parts["first"])
    return None


def _tokens(text: str) -> list[str]:
    """The words of a text, ; & | ( ) by themselves; what the shell would put in their places is UNKNOWN."""
    text = text.replace("\\\n", " ").replace("\n", " ; ")
    for pattern in (r"`[^`]*`", r"\$\([^()]*\)", r"\$\(\([^()]*\)\)"):
        text = re.sub(pattern, f"{UNKNOWN}…", text)
    text = re.sub(r"\$\{(\w+)[^}]*\}|\$(\w+|[@*])", lambda found: f"{UNKNOWN}${found[1] or found[2]}", text)
    text = re.sub(r"\s\d*(>>?|<)&?\s*\S+", " ", text)  # where it reads and writes
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|()")
    lexer.whitespace_split, lexer.commenters = True, ""
    return [word for word in lexer if word not in (f"{UNKNOWN}$@", f"{UNKNOWN}$*")]


def _script(name: str, words: list[str]) -> Line:
    """A script of test/: it reads four flags and passes nothing on."""
    line, own = Line("evaluate" if name == EVALUATE else "train", name), ["--data_path", "--device_id", "--world_size"]
    own += ["--checkpoint"] if name == EVALUATE else []
    pairs = list(_pairs(words))
    for flag, value in pairs:
        text = flag if value is None else f"{flag}={value}"
        if flag == "--data_path":
            line.data = value
        elif flag in own:
            line.given[flag], line.typed[flag] = value, text
        elif flag is not None and (known := line.flags.get(flag)) and flag not in own:
            line.typed[known.name] = text
            line.given[known.name] = _value(known, [value] if value is not None else [])
        elif flag is not None:
            line.strangers[text] = did_you_mean(flag, [*own, *line.flags]).strip()
    return line


def _pairs(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """--flag=value and --flag value -> (flag, value)."""
    position = 0
    while position < len(words):
        flag, equals, value = words[position].partition("=")
        follows = position + 1 < len(words) and not words[position + 1].startswith("-")
        if not equals and flag.startswith("-") and follows:
            position += 1
            value, equals = words[position], "="
        yield flag, value if equals else None
        position += 1


def _read(line: Line, words: list[str]) -> None:
    """The flags of a Python program, as argparse reads them: long ones may be cut short."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-"):
            if line.data is None:
                line.data = word
            else:
                line.strangers[word] = ""
            continue
        name, equals, value = word.partition("=")
        if name == "--data_path" and equals:
            line.data = value
            continue
        flag = _find(line, name)
        if flag is None:
            line.strangers[word] = did_you_mean(name, line.flags).strip()
            if not equals and position < len(words) and not words[position].startswith("-") and line.data:
                position += 1
            continue
        values = [value] if equals else []
        many = {"switch": 0, "floats": 99, "ints": 3}.get(flag.kind, 1)
        while not equals and len(values) < many and position < len(words) and _is_value(words[position], flag):
            values.append(words[position])
            position += 1
        line.given[flag.name] = _value(flag, values)
        text = word if equals else " ".join([name, *values])
        line.typed[flag.name] = text.replace(UNKNOWN, "")


def _find(line: Line, name: str) -> Flag | None:
    if name in line.flags:
        return line.flags[name]
    longer = {flag.name: flag for spelling, flag in line.flags.items() if spelling.startswith(name) and name > "--"}
    return next(iter(longer.values())) if len(longer) == 1 and name.startswith("--") else None


def _is_value(word: str, flag: Flag) -> bool:
    """Whether a word goes on with a flag's values: not another flag, and of several, numbers alone."""
    if word.startswith("-") and not re.fullmatch(r"-\.?\d\S*", word):
        return False
    return flag.kind != "floats" or UNKNOWN in word or bool(re.fullmatch(r"[-+\d.eE]+", word))


def _value(flag: Flag, values: list[str]) -> Any:  # noqa: ANN401 (of any kind)
    """The values of a flag by its kind; ConfigError where they are of another."""
    if flag.kind == "switch":
        return True
    if any(UNKNOWN in value for value in values):
        return UNKNOWN
    words = {"int": "a whole number", "ints": "whole numbers", "float": "a number", "floats": "numbers"}
    try:
        if not values:
            raise ValueError
        if flag.kind == "str":
            return values[0]
        numbers = [int(value) if flag.kind in ("int", "ints") else float(value) for value in values]
    except ValueError:
        shown = " ".join([flag.name, *values])
        raise ConfigError(f"{shown}: {flag.name} takes {words.get(flag.kind, 'a value')}.") from None
    return numbers if flag.kind.endswith("s") else numbers[0]
