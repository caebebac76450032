"""The door: a command's overrides become checked configs, or one message that lists every fault with its way out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ghostnet.config import Config
from ghostnet.door.composing import ERRORS, Composer, Look
from ghostnet.door.groups import CONF, OPTIONAL
from ghostnet.door.words import first_line, parsed
from ghostnet.errors import ConfigError
from ghostnet.experiments.grid import SweepJob, jobs_at_the_door, words_of
from ghostnet.experiments.sweeps import plugin_faults, register


@dataclass(frozen=True)
class Checked:
    """What is known of a command."""

    jobs: list[Config]
    """The resolved config of each job, one unless it is a sweep; of a search, those at the corners of its space."""
    hydra: DictConfig
    """Hydra's own config."""
    names: list[str] = field(default_factory=lambda: [""])
    """The folder of each job in the sweep's; empty where that is not known yet."""
    multirun: bool = False
    """By -m, or by an experiment that is a sweep."""
    faults: list[str] = field(default_factory=list)
    """What is wrong, each with its way out; empty of a command that passed the door."""


def check_command(name: str, overrides: Sequence[str], multirun: bool) -> Checked:
    """Compose every job of a command and check it; one ConfigError lists all that is wrong, each with its way out."""
    checked = examine(name, overrides, multirun)
    refuse(checked.faults)
    return checked


def refuse(faults: Sequence[str]) -> None:
    """One ConfigError that lists faults, if there are any."""
    if faults:
        raise ConfigError("\n       ".join(dict.fromkeys(faults)))


def examine(name: str, overrides: Sequence[str], multirun: bool, look: Look = lambda *_: []) -> Checked:
    """Compose every job of a command, and find all that is wrong with them.

    look: finds what is wrong beside the config; it is asked of each job whose config could be composed.
    """
    with _hydra():
        composer = Composer(name, look)
        words, faults = _well_formed(name, overrides)
        sweep = _sweep_config(composer, [parsed(word) for word in words])
        multirun = multirun or (sweep is not None and sweep.mode == RunMode.MULTIRUN)
        jobs = [SweepJob("", words)]
        if multirun:
            try:
                own = words_of(sweep.sweeper.get("params")) if sweep is not None else []
                jobs = jobs_at_the_door([parsed(word) for word in [*own, *words]], sweep)
            except (HydraException, ConfigError) as error:
                return Checked([], OmegaConf.create(), [], multirun, [*faults, first_line(error)])
            if not jobs:
                none = "this sweep has no job: one of its keys has no value."
                return Checked([], OmegaConf.create(), [], multirun, [*faults, none])
        else:
            words, swept = _without_sweeps(name, words)
            faults += swept
            jobs = [SweepJob("", words)]
        checked = [composer.job(job.words) for job in jobs]
        faults += by_jobs([job.words for job in jobs], [[fault.text for fault in job.faults] for job in checked])
        hydra = composer.hydra(jobs[0].words) if faults else composer.composed(tuple(jobs[0].words)).hydra
        faults += plugin_faults(hydra)
        return Checked([job.config for job in checked], hydra, [job.name for job in jobs], multirun, faults)


def _sweep_config(composer: Composer, words: Sequence[Override]) -> DictConfig | None:
    """Hydra's config, on which it depends whether and how a command sweeps; None where it has faults."""
    choices = [o.input_line or "" for o in words if o.key_or_group in OPTIONAL or o.key_or_group.startswith("hydra/")]
    values = [o.input_line or "" for o in words if o.key_or_group.startswith("hydra.")]
    for chosen in ([*choices, *values], choices):  # faulty values are told later
        try:
            return DictConfig(composer.composed(tuple(chosen)).hydra)
        except ERRORS:
            continue
    return None


def by_jobs(jobs: Sequence[Sequence[str]], faults: Sequence[Sequence[str]]) -> list[str]:
    """The faults of all jobs, each once, with the jobs it belongs to where that are some and the fault names none."""
    found: dict[str, list[int]] = {}
    for number, texts in enumerate(faults):
        for text in dict.fromkeys(texts):
            found.setdefault(text, []).append(number)
    return [text + _which(text, jobs, numbers) for text, numbers in found.items()]


def _which(text: str, jobs: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """' In 2 of 4 jobs: …'; '' where it is plain."""
    if len(numbers) == len(jobs):
        return ""
    everywhere = set.intersection(*(set(job) for job in jobs))
    shared = [word for word in jobs[numbers[0]] if all(word in jobs[n] for n in numbers) and word not in everywhere]
    exact = [n for n, job in enumerate(jobs) if set(shared) <= set(job)] == list(numbers)
    if exact and len(shared) == 1 and text.lower().startswith(f"{shared[0]}:".lower()):
        return ""
    told = f"those with {' '.join(shared)}" if exact else ", ".join(map(str, numbers[:5]))
    more = ", …" if not exact and len(numbers) > 5 else ""
    return f" In {len(numbers)} of {len(jobs)} jobs: {told}{more}."


def _well_formed(name: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are overrides, and what is wrong with the others."""
    words, faults = [], []
    for word in overrides:
        try:
            parsed(word)
            words.append(word)
        except HydraException:
            key, equals, value = word.partition("=")
            if equals and key.strip():
                escaped = value.strip("'\"").replace("'", "\\'")
                way_out = f"quote a value with special characters, \"{key.strip()}='{escaped}'\""
            else:
                meant = {"evaluate": "ckpt", "pack": "data.root"}.get(name)
                way_out = f"did you mean {meant}={word}?" if meant else f"give it a value, {word}=…"
            faults.append(f"{word!r} is not of the form key=value: {way_out}")
    return words, faults


def _without_sweeps(name: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of one value, and what is to be told of those of several."""
    swept = [word for word in words if parsed(word).is_sweep_override()]
    way_out = "."
    if name == "train":
        typed = " ".join(word.replace("hydra.run.dir=", "hydra.sweep.dir=") for word in words)
        way_out = f"; to try each value in a job of its own:\n  python train.py -m {typed}"
    text = "several values. A list is written [a,b], a value with a comma is quoted"
    return [word for word in words if word not in swept], [f"{' '.join(swept)}: {text}{way_out}"] if swept else []


def _hydra() -> Any:  # noqa: ANN401 (a context manager that hydra does not type)
    GlobalHydra.instance().clear()
    register()
    return initialize_config_dir(str(CONF), version_base="1.3")


def given_keys(overrides: Sequence[str]) -> list[str]:
    """The groups and keys that overrides name, in their order."""
    found: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    return [o.key_or_group for o in found if not o.key_or_group.startswith("hydra")]
