"""The shortest list of overrides that turns one run's config into another's, when added to its command."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ghostnet.config import Config, flat, unresolved
from ghostnet.door.composing import Composer
from ghostnet.door.groups import CONF, groups, options
from ghostnet.door.overrides import check_command
from ghostnet.door.words import is_choice, parsed
from ghostnet.errors import ConfigError
from ghostnet.experiments import rerun
from ghostnet.experiments.sweeps import register

ALONE = "hydra.mode=RUN"
"""Has an experiment that sweeps run one job."""


@dataclass(frozen=True)
class Way:
    """How one config is turned into another."""

    words: list[str]
    """What to add to the command."""
    left: list[str]
    """Keys that no override changes as it should."""
    fault: str | None = None
    """Why the command can't be composed by the conf/ of today; None where it can."""
    drifted: tuple[str, ...] = ()
    """Keys that the first run's own command gives other values by the conf/ of today."""


def differ(one: Config, other: Config) -> list[str]:
    """The keys in which two configs differ; one that a config lacks, since an older version had it not, doesn't count.

    Keys of constructors count: a group whose constructor is another one has other keys.
    """
    then, now = dict(flat(one)), dict(flat(other))
    return [
        key
        for key in dict.fromkeys([*now, *then])
        if key not in rerun.OWN and then.get(key, _ABSENT) != now.get(key, _ABSENT) and _counts(key, then, now)
    ]


_ABSENT = object()


def _counts(key: str, *sides: dict[str, Any]) -> bool:
    """Whether a key that one side lacks is more than what an older version had not."""
    lacking = [side for side in sides if key not in side]
    if not lacking:
        return True
    if any(other.startswith(f"{key}.") for side in lacking for other in side):
        return True  # null here, a node there
    parent = key.rpartition(".")[0]
    targets = {side.get(f"{parent}._target_") for side in sides}
    # A node without a constructor, or with the same one on both sides, grew: logger.wandb null or {…} did not.
    return len(targets) > 1 or any(side.get(parent, _ABSENT) is None for side in lacking)


def way(words: list[str], config: Config, target: Config, hints: list[str]) -> Way:
    """From a command and the config it had to another config. hints: words that may help, such as the other command's.

    Each word that is given is needed: without any of them the config is another one.
    """
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        search = _Search(words, target)
        try:
            start = search.left([])
        except ConfigError as fault:
            return Way([], differ(config, target), str(fault))
        drifted = tuple(differ(search.config([]), config))
        found = search.needed(search.greedy(hints, start))
        left = search.left(found)
    try:
        sweeps = check_command("train", [*words, *found], multirun=False).multirun
        if sweeps:  # by an experiment, of which this is one job
            check_command("train", [*words, *found, ALONE], multirun=False)
    except ConfigError as fault:
        return Way(found, left, str(fault), drifted)
    return Way([*found, *([ALONE] if sweeps else [])], left, None, drifted)


def _has(config: Config, word: str) -> bool:
    """Whether a config has the key that a word sets, or the word chooses an option."""
    override = parsed(word)
    node: Any = config
    elsewhere = is_choice(override) or override.key_or_group.startswith("hydra.")
    for part in [] if elsewhere else override.key_or_group.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return bool(config)


def _parents(word: str) -> list[str]:
    """The nodes that hold the key of a word: a, a.b of a.b.c=1."""
    parts = parsed(word).key_or_group.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


class _Search:
    """Composes commands, each only once."""

    def __init__(self, words: list[str], target: Config) -> None:
        self.words, self.target = words, target
        self.values = dict(flat(target))
        self.composer = Composer("train")
        self.known: dict[tuple[str, ...], Config | str] = {}

    def config(self, more: list[str]) -> Config:
        """The config of the command with more words; ConfigError where one of them has no place in it."""
        key = tuple(more)
        if key not in self.known:
            words = [*self.words, *more]
            job = self.composer.job(words)
            nulls = {parsed(word).key_or_group for word in more if word.endswith("=null")}
            lost = [word for word in words if not _has(job.config, word) and not nulls & set(_parents(word))]
            self.known[key] = job.config if not lost else f"{lost[0]}: no such key."
        found = self.known[key]
        if isinstance(found, str):
            raise ConfigError(found)
        return found

    def left(self, more: list[str]) -> list[str]:
        """The keys that still differ from the target."""
        return differ(self.config(more), self.target)

    def greedy(self, hints: list[str], start: list[str]) -> list[str]:
        """Words that set several keys at once, the best first, then one for each key that is left."""
        found: list[str] = []
        left = start
        candidates = [*self._choices(start), *(word for word in hints if word not in self.words)]
        while left and candidates:
            tried = {word: now for word in candidates if (now := self._try([*found, word])) is not None}
            # What saves nothing now won't when less is left.
            candidates = [word for word, now in tried.items() if self._saves(word, left, now)]
            if not candidates:
                break
            best = min(candidates, key=lambda word: (len(tried[word]), len(word)))
            found, left = [*found, best], tried[best]
            candidates.remove(best)
        single = [word for key in left if (word := self._own(key)) is not None]
        if self._try([*found, *single]) is not None:
            return [*found, *single]
        # Some key can't be set by itself, such as one within null.
        return [*found, *(word for word in single if self._try([*found, word]) is not None)]

    def needed(self, found: list[str]) -> list[str]:
        """The words without those that change nothing, tried one by one until none is."""
        goal = len(self.left(found))
        for word in list(found):
            without = [other for other in found if other != word]
            now = self._try(without)
            if now is not None and len(now) <= goal:
                found = without
        return found

    def _try(self, more: list[str]) -> list[str] | None:
        try:
            return self.left(more)
        except ConfigError:
            return None

    def _own(self, key: str) -> str | None:
        """The word that sets one key alone; None where the target lacks it."""
        return f"{key}={rerun.as_word(self.values[key])}" if key in self.values else None

    def _saves(self, word: str, left: list[str], now: list[str]) -> bool:
        """Whether a word is shorter than those that would set its keys one by one."""
        solved = [self._own(key) for key in left if key not in now]
        return None in solved or len(left) - len(now) > 1 or len(word) < len(" ".join(map(str, solved)))

    def _choices(self, left: list[str]) -> Iterator[str]:
        """Options of groups that may be the target's: of its keys and constructors, the nearest two of each."""
        for group in groups():
            touched = [key for key in left if key.startswith(f"{group}.")]
            # A single value has a word of its own that is as short.
            if len(touched) > 1 or any(key.endswith("_target_") for key in touched):
                near = {option: self._nearness(group, option) for option in options(group)}
                yield from (f"{group}={o}" for o in sorted(near, key=lambda o: -near[o])[:2] if near[o] >= 0)

    def _nearness(self, group: str, option: str) -> int:
        """How many values of an option are the target's; -1 where it is of other keys or another constructor."""
        node = OmegaConf.load(CONF / group / f"{option}.yaml")
        values = {f"{group}.{key}": value for key, value in flat(unresolved(DictConfig(node)))}
        values = {key: value for key, value in values.items() if not key.startswith(f"{group}.defaults")}
        own = {key for key in self.values if key.startswith(f"{group}.")}
        targets = [key for key in own | values.keys() if key.endswith("_target_")]
        if not values.keys() <= own or any(values.get(key) != self.values.get(key) for key in targets):
            return -1
        return sum(self.values[key] == value for key, value in values.items())
