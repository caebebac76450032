"""The words of the command, checked before anything is read."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from ghostnet.door.typed import without_dashes
from ghostnet.errors import ConfigError
from ghostnet.schema import did_you_mean
from ghostnet.tools.leaderboard.query import Condition, parse

Format = Literal["text", "csv", "json", "markdown"]


@dataclass
class Words:
    """The key=value words, and their defaults; roots are all other words."""

    roots: list[Path] = field(default_factory=list)
    sort: str = "top1"
    """Backwards where a - stands before the key."""
    filter: list[Condition] = field(default_factory=list)
    format: Format = "text"
    html: Path | None = None
    seeds: Literal["group", "each"] = "group"
    top: int | None = None


KEYS = [one.name for one in fields(Words) if one.name != "roots"]


def check(typed: list[str]) -> Words:
    """ConfigError that lists all that is wrong with a command."""
    words, faults = Words(), []
    for word in typed:
        try:
            _take(words, word)
        except ConfigError as fault:
            faults.append(str(fault))
    if not words.roots and not faults:
        faults.append("which runs? Give folders that hold some: python -m ghostnet.tools.leaderboard outputs multirun")
    if faults:
        raise ConfigError("\n       ".join(faults))
    return words


def _take(words: Words, word: str) -> None:
    """Set what a word says."""
    key, equals, value = word.partition("=")
    path = Path(word).expanduser()
    if equals and key in KEYS:
        setattr(words, key, _value(key, value))
    elif word and path.is_dir():  # a folder's name may have a = in it
        words.roots.append(path)
    elif word.startswith("-"):
        hint = without_dashes(word, KEYS) or f" There are folders, and {'=…, '.join(KEYS)}=…."
        raise ConfigError(f"{word}: no such flag.{hint}")
    elif equals and "/" not in key:
        raise ConfigError(f"{key}: no such word.{did_you_mean(key, KEYS)} There are {', '.join(KEYS)}.")
    else:
        fault = "no folder" if word and path.exists() else "no such folder"
        raise ConfigError(f"{word or repr(word)}: {fault}. Give folders that hold runs.")


def _value(key: str, value: str) -> object:
    if key == "filter":
        return parse(value)
    if key in ("format", "seeds"):
        options = get_args(Words.__annotations__[key])
        if value not in options:
            raise ConfigError(f"{key}={value}: no such option.{did_you_mean(value, options)} {', '.join(options)}.")
        return value
    if key == "top":
        if not (value.isascii() and value.isdecimal() and int(value) > 0):
            raise ConfigError(f"top={value}: must be a whole number > 0.")
        return int(value)
    if key == "html":
        path = Path(value).expanduser()
        if not value or path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"html={value}: must be a file in a folder that is there.")
        return path
    if not value.removeprefix("-"):
        raise ConfigError("sort=: by what? top1, fps, time, or a setting such as optim.lr.")
    return value
