"""What is killed and how, drawn from a seed: the settings of a run, the moments, the signals, and who gets them."""

import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import TINY
from tests.test_train import HARD


@dataclass(frozen=True)
class Setting:
    """One cell of the matrix."""

    device: str
    ranks: int
    amp: str
    accumulate: int
    save_every: int
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.ranks} {self.device}, amp {self.amp}"

    def words(self, data: Path) -> list[str]:
        """Of train.py; the global batch is 32 images whatever the setting."""
        size = 32 // self.ranks // self.accumulate
        words = [word for word in TINY if not word.startswith("device=")] + HARD
        words += [f"data.root={data}", "log_every=1", f"save_every={self.save_every}", f"amp={self.amp}"]
        words += [f"accumulate={self.accumulate}", f"data.batch_size={size}"]
        return [
            *words,
            "device=cpu" if self.device == "cpu" else "device=npu_8p",
            f"device.count={self.ranks}",
            *self.more,
        ]


SETTINGS = [
    Setting("cpu", 1, "none", 2, 2, ("optim=adamw", "optim.lr=1e-3")),
    Setting("cpu", 1, "bf16", 4, 1, ("keep=3",)),
    Setting("cpu", 1, "fp16", 2, 3, ("data.workers=3",)),
    Setting("cpu", 1, "o2", 2, 2, ("amp.loss_scale=dynamic", "log_every=3")),
    Setting("cpu", 1, "apex", 2, 2, ("amp.loss_scale=128", "optim=sgd", "keep=1")),
    Setting("cpu", 2, "none", 2, 2),
    Setting("cpu", 2, "bf16", 1, 3, ("dist_bn=broadcast", "log_every=3")),
    Setting("cpu", 2, "fp16", 2, 2, ("optim=sgd",)),
    Setting("cpu", 2, "o2", 2, 1, ("optim=rmsprop", "optim.lr=0.01")),
    Setting("npu", 1, "none", 2, 2),
    Setting("npu", 1, "bf16", 2, 2, ("keep=3",)),
    Setting("npu", 1, "fp16", 4, 2),
    Setting("npu", 1, "o2", 1, 3, ("amp.loss_scale=dynamic",)),
    Setting("npu", 1, "apex", 2, 2, ("amp.loss_scale=128", "optim=sgd")),
    Setting("npu", 2, "none", 2, 2, ("sync_bn=true",)),
    Setting("npu", 2, "fp16", 2, 2),
    Setting("npu", 2, "o2", 2, 2, ("amp.loss_scale=dynamic",)),
]
"""Device, ranks, amp: every one that can run here. On NPUs the stand-in for torch_npu, for apex that of test_amp."""


@dataclass(frozen=True)
class Aim:
    """A moment: see tests/aim. Without an event it is by the clock alone, `delay` seconds after the start."""

    phase: str
    event: str = ""
    name: str = ""
    count: int = 1
    hold: bool = True
    """The process waits to be killed; else it goes on for `delay` seconds."""
    delay: float = 0.0


Draw = Callable[[random.Random, Setting], Aim]


def _at(phase: str, event: str, name: str, most: int = 1) -> Draw:
    """Exactly there: at the first to the `most`th time that it comes."""
    return lambda rng, setting: Aim(phase, event, name, rng.randint(1, most))


def _after(phase: str, event: str, name: str, most: int, seconds: float) -> Draw:
    """Up to so many seconds after it has come."""
    return lambda rng, setting: Aim(phase, event, name, rng.randint(1, most), False, rng.uniform(0, seconds))


def _pass(rng: random.Random, setting: Setting) -> Aim:
    return Aim("forward pass", "call", "seeding.py:seed_step", 1 + setting.accumulate * rng.randint(0, 5))


def _accumulating(rng: random.Random, setting: Setting) -> Aim:
    """Gradients of the first batches of a step are there already, which needs two batches a step."""
    if setting.accumulate == 1:
        return _pass(rng, setting)
    part = rng.randint(2, setting.accumulate)
    return Aim("accumulation", "call", "seeding.py:seed_step", part + setting.accumulate * rng.randint(0, 5))


TORN = ".last.pt.*.tmp"
PHASES: dict[str, list[Draw]] = {
    "start-up": [
        lambda rng, setting: Aim("start-up", delay=rng.uniform(0, 4)),
        _at("start-up", "import", "hydra"),
        _at("start-up", "import", "torch"),
        _at("start-up", "open", "config.yaml"),
        _at("start-up", "os.rename", ".run.json.tmp"),
        _at("start-up", "open", "t10k-images-idx3-ubyte.gz"),
        _at("start-up", "open", "last.pt"),
        _at("start-up", "os.rename", "metrics.tmp"),
        _at("start-up", "os.remove", "result.json"),
    ],
    "clock": [lambda rng, setting: Aim("clock", delay=rng.uniform(3, 12))],
    "forward pass": [_pass],
    "accumulation": [_accumulating],
    "optimizer step": [
        _at("optimizer step", "call", "optim.py:__call__", 6),
        _at("optimizer step", "call", "metrics.py:add", 6),
    ],
    "row": [_at("row", "open", "metrics.jsonl", 6), _after("row", "open", "metrics.jsonl", 6, 0.3)],
    "evaluation": [_at("evaluation", "call", "metrics.py:hits", 4)],
    "save": [
        _after("save", "open", TORN, 3, 0.1),
        _after("save", "open", TORN, 3, 0.1),
        _at("save", "open", TORN, 3),
        _at("save", "os.link", "previous-1.pt", 3),
        _at("save", "os.rename", "last.pt", 3),
        _at("save", "os.remove", TORN, 3),
        _at("save", "os.remove", "previous-*.pt", 2),
        _at("save", "call", "checkpoint.py:copied", 1),
        _at("save", "call", "engine.py:state_dict", 2),
    ],
    "best": [_at("best", "os.rename", "best.pt"), _after("best", "open", ".best.pt.*.tmp", 1, 0.2)],
    "evaluated": [_at("evaluated", "call", "train.py:_is_hopeless"), _at("evaluated", "call", "saving.py:flush")],
    "result": [_at("result", "os.rename", "result.json"), _at("result", "call", "loggers.py:finish")],
}
"""Where a run is killed, and how each is drawn."""


@dataclass(frozen=True)
class Kill:
    """A signal, its moment, and who gets it."""

    aim: Aim
    signum: signal.Signals
    target: str
    """group, command, or the number of a rank."""
    rank: str
    """The rank that tells the moment."""

    def __str__(self) -> str:
        moment = f"{self.aim.event} {self.aim.name} #{self.aim.count}" if self.aim.event else "start"
        late = f" + {self.aim.delay:.3f} s" if self.aim.delay else ""
        return f"{self.signum.name} to {self.target} in {self.aim.phase} ({moment} of rank {self.rank}{late})"


def draw(rng: random.Random, setting: Setting, phases: list[str]) -> Kill:
    """A kill in one of the phases."""
    aim = rng.choice(PHASES[rng.choice(phases)])(rng, setting)
    signum = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    own = [str(rank) for rank in range(setting.ranks)] if setting.ranks > 1 and signum == signal.SIGKILL else []
    rank = rng.choice(["0", str(setting.ranks - 1)]) if aim.event == "call" and "train.py" not in aim.name else "0"
    return Kill(aim, signum, rng.choice(["group", "command", *own]), rank)


@dataclass
class Tally:
    """What was killed in this session, and what went on to the same bits."""

    seed: int
    killed: list[tuple[Setting, Kill]] = field(default_factory=list)
    survived: list[tuple[Setting, Kill]] = field(default_factory=list)
    missed: int = 0
    """Runs that had ended before their moment came."""

    def lines(self) -> list[str]:
        """For the end of the session."""
        said = [
            f"{len(self.killed)} kills, {len(self.survived)} survived; {self.missed} came too late; seed {self.seed}"
        ]
        by: dict[str, Callable[[Setting, Kill], str]] = {
            "signal": lambda setting, kill: kill.signum.name,
            "phase": lambda setting, kill: kill.aim.phase,
            "ranks": lambda setting, kill: f"{setting.ranks} {setting.device}",
            "amp": lambda setting, kill: setting.amp,
            "to": lambda setting, kill: "one rank" if kill.target.isdecimal() else f"the {kill.target}",
        }
        for name, key in by.items():
            there, good = (Counter(key(*each) for each in which) for which in (self.killed, self.survived))
            said.append(f"  {name}: " + ", ".join(f"{what} {good[what]}/{there[what]}" for what in sorted(there)))
        return said
