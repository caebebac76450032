"""The words of a benchmark, checked: its own, and those of train.py or evaluate.py."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from ghostnet.config import Config, TrainConfig
from ghostnet.door.groups import groups
from ghostnet.door.manual import settings
from ghostnet.door.overrides import check_command
from ghostnet.door.typed import without_dashes
from ghostnet.errors import ConfigError
from ghostnet.schema import did_you_mean
from ghostnet.tools.benchmark import checkpoints
from ghostnet.tools.benchmark.peers import PEERS

OWN = {
    "loader": ("seconds", "shards"),
    "step": ("seconds",),
    "evaluate": ("ckpt", "images"),
    "start": ("timm",),
    "sweep": (),
    "results": (),
    "checkpoint": (),
    "scale": ("counts",),
    "train": ("timm", "images"),
}
"""The benchmarks, and the words that each has beside those of all."""
COMMON = ("rounds", "json", "report", "peers")
KINDS = "{loader,step,evaluate,start,sweep,results,checkpoint,scale,train}"
FORM = f"python -m ghostnet.tools.benchmark {KINDS} [its words] [the words of train.py]"


@dataclass
class Own:
    """The words that are no config's, and their defaults."""

    rounds: int = 3
    json: Path | None = None
    report: Path | None = None
    peers: tuple[str, ...] = PEERS
    seconds: float = 10.0
    """How long loader and step are measured in each round."""
    shards: str | None = None
    images: int | None = None
    timm: Path | None = None
    """The user's copy of timm's train.py."""
    ckpt: str | None = None
    counts: tuple[int, ...] = ()
    """Of devices; empty: 1, 2, 4, … as far as they are there."""


@dataclass(frozen=True)
class Case:
    """A command that passed the door."""

    benchmark: str
    own: Own
    words: list[str]
    """Those of train.py or evaluate.py, with what the benchmark adds."""
    cfg: Config


def check(typed: list[str]) -> Case:
    """ConfigError that lists all that is wrong with a command."""
    if not typed or typed[0] not in OWN:
        near = did_you_mean(typed[0], OWN) if typed else ""
        raise ConfigError(f"{f'{typed[0]}: no such benchmark.{near}' if typed else 'which benchmark?'} {FORM}")
    benchmark, words, own, faults = typed[0], [], Own(), []
    config = "evaluate" if benchmark == "evaluate" else "train"
    for word in typed[1:]:
        key, _, value = word.partition("=")
        try:
            if word.startswith("-"):
                hint = without_dashes(word, [*COMMON, *OWN[benchmark], *settings(config)])
                raise ConfigError(f"{word}: a benchmark takes the words of one job, and no flags.{hint}")
            if _is_own(benchmark, key):
                setattr(own, key, _value(key, value))
            else:
                words.append(word)
        except ConfigError as fault:
            faults.append(str(fault))
    words = _completed(benchmark, words)
    try:
        given = ["ckpt=weights.pt"] if config == "evaluate" else []
        cfg = check_command(config, [*given, *words], multirun=False).jobs[0]
    except ConfigError as fault:
        faults.append(str(fault))
    if faults:
        raise ConfigError("\n       ".join(faults))
    return Case(benchmark, own, words, cfg)


def _is_own(benchmark: str, key: str) -> bool:
    """Whether a word is the benchmark's own; ConfigError where it is another's, or nearly one."""
    here = (*COMMON, *OWN[benchmark])
    if key in here:
        return True
    if homes := [name for name, words in OWN.items() if key in words]:
        raise ConfigError(f"{key}=…: not a word of benchmark {benchmark}, but of {', '.join(homes)}.")
    known = [*(field.name for field in fields(TrainConfig)), *groups()]
    if (
        not {key.partition(".")[0], key} & set(known)
        and not did_you_mean(key, known)
        and (near := did_you_mean(key, here))
    ):
        raise ConfigError(f"{key}: no such word.{near}")
    return False


def _value(key: str, value: str) -> object:
    """The value of a word of our own; ConfigError where it is none."""
    if key == "peers":
        return _peers(value)
    if key in ("json", "report"):
        return _writable(key, value)
    if key == "timm":
        if not Path(value).expanduser().is_file():
            raise ConfigError(f"timm={value}: no such file. Give the train.py of a clone of timm's repository.")
        return Path(value).expanduser().resolve()
    if key == "shards":
        if not any((Path(value).expanduser() / "train").glob("*.tar")):
            raise ConfigError(f"shards={value}: no train/*.tar there. ghostnet.tools.pack makes them.")
        return value
    if key == "seconds":
        return _seconds(value)
    if key == "ckpt":
        return value
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or (len(numbers) > 1 and key != "counts"):
        raise ConfigError(
            f"{key}={value}: must be {'numbers of devices, 1,2' if key == 'counts' else 'a whole number > 0'}."
        )
    return numbers if key == "counts" else numbers[0]


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds={value}: must be a number > 0.")
    return seconds


def _peers(value: str) -> tuple[str, ...]:
    if value in ("all", "none"):
        return PEERS if value == "all" else ()
    names = tuple(value.split(","))
    for name in names:
        if name not in PEERS:
            raise ConfigError(
                f"peers={value}: {name!r} is none.{did_you_mean(name, PEERS)} There are all, none, {', '.join(PEERS)}."
            )
    return names


def _writable(key: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not value or path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{key}={value}: must be a file in a folder that is there.")
    return path


def _completed(benchmark: str, words: list[str]) -> list[str]:
    """The words with what the benchmark wants: synthetic data, the quickstart."""
    if benchmark in ("step", "scale", "sweep", "checkpoint"):
        words = [*(word for word in words if not word.startswith(("data=", "data.root="))), "data=synthetic"]
        return [*checkpoints.WORDS, *words] if benchmark == "checkpoint" else words
    if benchmark == "start" and not any(word.startswith(("experiment=", "data=", "data.root=")) for word in words):
        return ["experiment=quickstart", *words]
    return words
