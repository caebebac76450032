"""rerun=RUN: the words of an earlier run in the place of the word, so that the command repeats it."""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import ListConfig

from ghostnet.config import HARMLESS, Config, flat
from ghostnet.door.overrides import check_command, given_keys
from ghostnet.door.words import quoted
from ghostnet.errors import ConfigError
from ghostnet.experiments import record
from ghostnet.experiments.folders import read_yaml, saved_config

OWN = ("resume", "sweep", "rerun")
"""Of the command that ran, not of the run."""


def own_words(words: list[str]) -> list[str]:
    """The words that make a run what it is."""
    return [word for word in words if word.lstrip("+").partition("=")[0] not in OWN]


def expanded(words: list[str], multirun: bool) -> list[str]:
    """A command's words with rerun=RUN preceded by those of the run, but for the keys that the command gives itself.

    ConfigError where there is no such run, or where this version has no room for one of its settings.
    """
    given = [word for word in words if word.startswith("rerun=") and word != "rerun=null"]
    if not given:
        return words
    text = given[-1].removeprefix("rerun=").strip("'\"")
    folder = Path(text).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    overrides = folder / ".hydra" / "overrides.yaml"
    saved = saved_config(folder)
    if not saved or not overrides.exists():
        raise ConfigError(
            f"rerun={text}: {folder} is no run folder: it has no config.yaml or no .hydra/overrides.yaml."
        )
    words_then = _words(overrides)
    mine = set(given_keys([word for word in words if word not in given]))
    theirs = [w for w in own_words(words_then) if not mine & set(given_keys([w]))]
    theirs += _changed(saved, theirs, mine, text)
    words = [word for word in words if word not in given] + [f"rerun={quoted(text)}"]
    mode = [] if multirun else ["hydra.mode=RUN"]  # the run may be one job of an experiment that sweeps
    return [*theirs, *mode, *words]


def _words(file: Path) -> list[str]:
    """The words of a run; ConfigError for what is none, and for settings of Hydra's own, which name code to run."""
    words = read_yaml(file)
    if not isinstance(words, ListConfig) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{file} is no list of words.")
    for word in words:
        try:
            key = OverridesParser.create().parse_override(word).key_or_group
        except HydraException:
            raise ConfigError(f"{file}: {word!r} is not of the form key=value.") from None
        if key.partition(".")[0].partition("/")[0] == "hydra":
            raise ConfigError(f"{file}: {word!r} is a setting of Hydra's own, which no run repeats. Give it yourself.")
    return list(words)


def note(run: str | None) -> str:
    """In what the code that runs is not that of the run that is repeated; '' where it is, or none is."""
    if run is None:
        return ""
    folder = Path(run).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    then, (commit, diff, _) = record.read(folder), record.code()
    if not then or (then.get("commit") == commit and not then.get("dirty") and not diff):
        return ""
    old = (
        (folder / record.DIFF).read_text(encoding="utf-8", errors="replace") if (folder / record.DIFF).exists() else ""
    )
    if then.get("commit") == commit and old == diff:
        return ""
    return f"the code was {_version(then.get('commit'), bool(old))}, is {_version(commit, bool(diff))}"


def _version(commit: str | None, dirty: bool) -> str:
    return f"{(commit or 'outside of git')[:12]}{' with changes (code.diff)' if dirty else ''}"


def _changed(saved: Config, words: list[str], mine: set[str], text: str) -> list[str]:
    """Words for the values that these words no longer give, such as defaults that have changed since."""
    try:
        now = check_command("train", [*words, "hydra.mode=RUN"], multirun=False).jobs[0]
    except ConfigError as error:
        raise ConfigError(f"rerun={text}: {error}") from None
    theirs, ours = dict(flat(saved)), dict(flat(now))
    # What follows from other keys by interpolation is given by them.
    differ = [key for key, value in theirs.items() if key in ours and ours[key] != value and not _is_own(key)]
    gone = [key for key, value in theirs.items() if key not in ours and value is not None and not _is_own(key)]
    if gone:
        raise ConfigError(f"rerun={text}: this version has no {', '.join(gone)}; the run's commit is in its run.json.")
    return [f"{key}={as_word(theirs[key])}" for key in differ if key not in mine and key.partition(".")[0] not in mine]


def _is_own(key: str) -> bool:
    return key in OWN or any(
        key == harmless or (harmless[-1] == "." and key.startswith(harmless)) for harmless in HARMLESS
    )


def as_word(value: Any) -> str:  # noqa: ANN401 (values of any config)
    """A value as Hydra's grammar reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(as_word, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_word(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str):
        # What would be read as a number, true or null is quoted too.
        return quoted(value) if _is_text(value) else f"'{value}'"
    return repr(value)


def _is_text(value: str) -> bool:
    """Whether a word without quotes is read as this text."""
    return bool(value) and OverridesParser.create().parse_override(f"k={quoted(value)}").value() == value
