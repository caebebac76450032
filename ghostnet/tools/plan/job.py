"""One job of a plan: its config, its facts, and what follows from both."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ghostnet.config import Config
from ghostnet.tools.plan.curve import Curve
from ghostnet.tools.plan.facts import Facts
from ghostnet.tools.translate.inverse import reference

ROW = 230
"""Bytes of a row of metrics.jsonl."""


@dataclass(frozen=True)
class Speed:
    """How fast a job is taken to be."""

    fps: float
    eval_fps: float | None
    told: str
    """Where that comes from."""


@dataclass(frozen=True)
class Job:
    """One run that the command would start."""

    name: str
    """What it has of its own within a sweep."""
    cfg: Config
    folder: Path
    there: bool
    """Whether the folder is there already."""
    done: bool
    """Whether the sweep that it is a job of would leave it out, since it has come to its end."""
    free: int
    """Bytes on its disk."""
    facts: Facts
    speed: Speed | None

    @property
    def curve(self) -> Curve:
        """Its learning rate."""
        return Curve(self.name or str(self.folder), self.facts.lr, self.facts.total_steps, self.facts.epochs)

    @property
    def images(self) -> int:
        """To train on until the end, repeated ones counted again."""
        return self.facts.steps * self.facts.global_batch_size

    @property
    def training(self) -> float:
        """Seconds."""
        return self.images / self.speed.fps if self.speed else 0.0

    @property
    def evaluating(self) -> float:
        """Seconds; at most these where the speed of evaluation is not known."""
        if self.speed is None:
            return 0.0
        return self.facts.evaluations * self.facts.val / (self.speed.eval_fps or self.speed.fps)

    @property
    def seconds(self) -> float:
        """Training and evaluating."""
        return self.training + self.evaluating

    @property
    def disk(self) -> int:
        """Bytes that it leaves behind."""
        return (1 + self.kept) * self.facts.checkpoint + self.metrics

    @property
    def kept(self) -> int:
        """How many files of its last saves are kept, beside best.pt."""
        every = self.cfg["save_every"]
        saves: int = self.facts.epochs + (self.facts.total_steps // every if every else 0)
        return min(int(self.cfg["keep"]), saves)

    @property
    def metrics(self) -> int:
        """Bytes of metrics.jsonl, about."""
        rows: int = self.facts.total_steps // self.cfg["log_every"] + self.facts.epochs + self.facts.evaluations
        return ROW * rows

    @cached_property
    def reference(self) -> tuple[str | None, list[str]]:
        """The reference's command, and what it lacks."""
        return reference(self.cfg, self.cfg["model"]["num_classes"] or self.facts.classes)
