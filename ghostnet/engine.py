"""The loop: train() and evaluate() over a TrainState."""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ghostnet.amp import Amp
from ghostnet.data.loader import EvalLoader, TrainLoader
from ghostnet.data.transforms import Mix, Mixed, Preprocessing
from ghostnet.device import memory_format, synchronize
from ghostnet.ema import Ema
from ghostnet.errors import UserError
from ghostnet.metrics import EvalResult, LossMeter, Speedometer, hits
from ghostnet.optim import Schedule, load_state
from ghostnet.seeding import seed_step


@dataclass
class TrainState:
    """All that changes while training. `step` is the one clock: the count of optimizer updates."""

    model: nn.Module
    optimizer: Optimizer
    amp: Amp
    ema: Ema | None
    device: torch.device
    step: int = 0
    evaluated: int = 0
    """The step of the last evaluation that finished."""
    best: dict[str, Any] = field(default_factory=dict)
    """The eval row with the best accuracy so far."""
    train_loss: float = float("nan")
    """Of the last train row."""
    last: dict[str, Any] = field(default_factory=dict)
    """The eval row of the last evaluation."""
    meter: LossMeter = field(init=False)
    speed: Speedometer = field(default_factory=Speedometer)

    def __post_init__(self) -> None:
        self.meter = LossMeter(self.device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it; no random state, since randomness is a function of seed, epoch and step."""
        return {
            "model": self.amp.weights(self.model),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "amp": self.amp.state_dict(),
            "meter": self.meter.state_dict(),
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "last": self.last,
            "train_loss": self.train_loss,
            "speed": self.speed.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken."""
        self.amp.load_weights(self.model, state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        load_state(self.optimizer, state["optimizer"])
        self.amp.load_state_dict(state["amp"])
        self.meter.load_state_dict(state["meter"])
        self.step, self.evaluated = state["step"], state["evaluated"]
        self.best, self.last, self.train_loss = state["best"], state["last"], state["train_loss"]
        self.speed.load_state_dict(state["speed"])

    def is_finite(self) -> bool:
        """Whether all weights and BatchNorm statistics are finite numbers; waits for the device."""
        tensors = [value for value in self.amp.weights(self.model).values() if value.is_floating_point()]
        return bool(nn.utils.get_total_norm(tensors, norm_type=float("inf")).isfinite())


@dataclass(frozen=True)
class Recipe:
    """All of a training step that stays the same."""

    preprocessing: Preprocessing
    mix: Mix
    schedule: Schedule
    seed: int
    label_smoothing: float
    clip_grad_norm: float | None
    accumulate: int
    """Forward passes that one optimizer step takes."""
    rank: int = 0
    world_size: int = 1


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The user or the system asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__("Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """Ctrl-C and SIGTERM only ask: check() then raises Interrupted. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.previous: dict[int, Any] = {}

    def check(self) -> None:
        """Raise Interrupted if the run was asked to end."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum

    def __enter__(self) -> "StopSignal":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.previous[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


def steps_per_epoch(loader: TrainLoader, accumulate: int) -> int:
    """Optimizer steps of an epoch; UserError where the data don't fill one."""
    steps = loader.batches_per_epoch // accumulate
    if not steps:
        raise UserError(
            f"accumulate={accumulate} batches of {loader.batch_size} are more than the {len(loader.dataset)} training "
            "images. Give a smaller accumulate or data.batch_size."
        )
    return steps


def train(state: TrainState, loader: TrainLoader, recipe: Recipe) -> Iterator[int]:
    """Train from state.step to the end of its epoch; yields the step after each update.

    The device is never waited for here, but once, when the speed measurement's warm-up ends.
    """
    per_epoch = steps_per_epoch(loader, recipe.accumulate)
    epoch, start = divmod(state.step, per_epoch)
    images_per_step = loader.batch_size * recipe.world_size * recipe.accumulate
    batches = loader.batches(epoch, start * recipe.accumulate)
    state.model.train()
    state.speed.resume()
    try:
        for _ in range(start, per_epoch):
            if state.speed.warm_now:
                synchronize(state.device)
                state.speed.resume()
            waited = _update(state, batches, recipe)
            state.step += 1
            state.speed.step(images_per_step, waited)
            if state.ema:
                state.ema.update(state.amp.weights(state.model), state.step)
            yield state.step
    finally:
        batches.close()  # type: ignore[attr-defined]


def _update(state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], recipe: Recipe) -> float:
    """One optimizer step over `accumulate` batches. -> Seconds without data."""
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.schedule(state.step)
    waited = 0.0
    total = torch.zeros((), device=state.device)
    for part in range(recipe.accumulate):
        before = time.perf_counter()
        images, labels = next(batches)
        waited += time.perf_counter() - before
        forward_pass = state.step * recipe.accumulate + part
        seed_step(recipe.seed, forward_pass, recipe.rank)
        images = recipe.preprocessing.normalize(images).contiguous(memory_format=memory_format(state.device))
        images, mixed = recipe.mix(images, labels, recipe.seed, forward_pass)
        loss = cross_entropy(state.amp.forward(state.model, images), labels, mixed, recipe.label_smoothing)
        loss = loss / recipe.accumulate
        state.amp.backward(loss)
        total += loss.detach()
    state.amp.step(state.optimizer, recipe.clip_grad_norm)
    state.meter.add(total, state.step + 1)
    return waited


def cross_entropy(logits: Tensor, labels: Tensor, mixed: Mixed | None, smoothing: float) -> Tensor:
    """Mean cross-entropy with label smoothing; of a mixed batch the weighted mean over both labels."""
    if mixed is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    own = F.cross_entropy(logits, mixed.labels, label_smoothing=smoothing)
    partner = F.cross_entropy(logits, mixed.partners, label_smoothing=smoothing)
    return mixed.share * own + (1 - mixed.share) * partner


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    amp: Amp,
    loader: EvalLoader,
    on_batch: Callable[[int], None] = lambda images: None,
) -> EvalResult:
    """Hits and loss over every sample once; on_batch is told how many images came, and may raise to stop."""
    model.eval()
    device = next(model.parameters()).device
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    losses: list[Tensor] = []
    before = time.perf_counter()
    for images, labels in loader.batches():
        images = loader.preprocessing.normalize(images).contiguous(memory_format=memory_format(device))
        logits = amp.forward(model, images)
        counts += hits(logits, labels)
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        on_batch(len(labels))
    top1, top5 = counts.tolist()
    # Added up in double precision on the host: not every card has it.
    loss = sum(torch.stack(losses).tolist())
    seconds, count = time.perf_counter() - before, len(loader.dataset)
    return EvalResult(top1, top5, count, loss / count, count / seconds)
