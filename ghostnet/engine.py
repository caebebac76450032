"""The loop: train() and evaluate() over a TrainState."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ghostnet.amp import Amp
from ghostnet.data.loader import EvalLoader, TrainLoader
from ghostnet.data.transforms import Mix, Mixed, Preprocessing
from ghostnet.device import compiler_of, images_at_once, mark, memory_format, synchronize
from ghostnet.distributed import ALONE, Ranks, local_gradients
from ghostnet.ema import Ema
from ghostnet.errors import SampleError, UserError
from ghostnet.metrics import EvalResult, LossMeter, Span, Speedometer, hits, mean_meter
from ghostnet.nonfinite import OnNan, Watch
from ghostnet.optim import Kept, Schedule, load_state
from ghostnet.seeding import rewound, seed_step
from ghostnet.signals import StopSignal
from ghostnet.watchdog import LONG, waiting


@dataclass
class TrainState:
    """All that changes while training. `step` is the one clock: the count of optimizer updates."""

    model: nn.Module
    optimizer: Optimizer
    amp: Amp
    ema: Ema | None
    device: torch.device
    ranks: Ranks = ALONE
    dist_bn: Literal["reduce", "broadcast"] = "reduce"
    """How ranks agree on BatchNorm's statistics: their mean, or the main rank's."""
    on_nan: OnNan = "stop"
    """What becomes of a step whose loss or gradients are not finite."""
    step: int = 0
    evaluated: int = 0
    """The step of the last evaluation that finished."""
    best: dict[str, Any] = field(default_factory=dict)
    """The eval row with the best accuracy so far."""
    train_loss: float = float("nan")
    """Of the last train row."""
    last: dict[str, Any] = field(default_factory=dict)
    """The eval row of the last evaluation."""
    rewinds: list[int] = field(default_factory=list)
    """The steps that the run was taken back to; what is left of an epoch then has another order."""
    parallel: nn.Module = field(init=False)
    """The model, its gradients averaged over the ranks."""
    meter: LossMeter = field(init=False)
    speed: Speedometer = field(init=False)
    watch: Watch = field(init=False)
    passes: list[int] = field(default_factory=lambda: [0, 0], init=False)
    """Forward passes of a step, and those of steps that were given up since the state was last read."""
    forgotten: int = field(default=0, init=False)
    """Skipped steps whose forward passes are no longer counted in BatchNorm's num_batches_tracked."""

    def __post_init__(self) -> None:
        self.parallel = self.ranks.parallel(self.model, self.device)
        self.meter = LossMeter(self.device)
        self.speed = Speedometer(self.device)
        self.watch = Watch(self.device, self.on_nan == "skip")

    def _statistics(self) -> list[Tensor]:
        """BatchNorm's running means and variances, of the model and of its average: all that differs between ranks."""
        modules = [self.model, *([self.ema.module] if self.ema else [])]
        return [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Inside, all ranks have the same BatchNorm statistics; after it each has its own again. All ranks call it."""
        own = self._statistics()
        if self.ranks.world_size == 1 or not own:
            yield
            return
        kept = torch.cat([buffer.flatten() for buffer in own])
        common = kept.clone()
        if self.dist_bn == "broadcast":
            self.ranks.from_main_(common)
        else:
            self.ranks.mean_(common)
        _write(common, own)
        try:
            yield
        finally:
            _write(kept, own)

    @torch.no_grad()
    def _forget_passes(self) -> None:
        """Take the forward passes of steps that were given up or skipped out of BatchNorm's num_batches_tracked."""
        skipped = self.watch.skipped()
        wrong = self.passes[1] + (skipped - self.forgotten) * self.passes[0]
        self.passes[1], self.forgotten = 0, skipped
        for norm in self.model.modules() if wrong else ():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.weight.requires_grad:
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked -= wrong

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it; no random state, since randomness is a function of seed, epoch and step."""
        self._forget_passes()
        return {
            "model": self.amp.weights(self.model),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "amp": self.amp.state_dict(),
            "meter": self.meter.state_dict(),
            "ranks": [],
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "last": self.last,
            "train_loss": self.train_loss,
            "speed": self.speed.state_dict(),
            "watch": self.watch.state_dict(),
            "rewinds": list(self.rewinds),
        }

    @contextlib.contextmanager
    def for_all_ranks(self) -> Iterator[dict[str, Any]]:
        """The state_dict of what the ranks agree on, and under `ranks` what each has of its own. All ranks call it."""
        own: dict[str, Any] = {"meter": self.meter.state_dict()}
        if self.ranks.world_size > 1:
            own["statistics"] = torch.cat([buffer.flatten() for buffer in self._statistics()]).cpu()
        by_rank = self.ranks.gather(own)
        with self.agreed():
            state = self.state_dict()
            if len(by_rank) > 1:
                state |= {"ranks": by_rank, "meter": mean_meter([rank["meter"] for rank in by_rank])}
            yield state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken; with another number of ranks, from what they had agreed on."""
        self.amp.load_weights(self.model, state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        load_state(self.optimizer, state["optimizer"])
        self.amp.load_state_dict(state["amp"])
        meter = state["meter"]
        if len(state["ranks"]) == self.ranks.world_size:
            own = state["ranks"][self.ranks.rank]
            meter = own["meter"]
            _write(own["statistics"].to(self.device), self._statistics())
        self.meter.load_state_dict(meter)
        self.step, self.evaluated = state["step"], state["evaluated"]
        self.best, self.last, self.train_loss = state["best"], state["last"], state["train_loss"]
        self.speed.load_state_dict(state["speed"])
        if "watch" in state:  # which runs of version 0.3 had not
            self.watch.load_state_dict(state["watch"])
            self.passes[1], self.forgotten = 0, self.watch.skipped()
            self.rewinds = list(state["rewinds"])

    def is_finite(self) -> bool:
        """Whether all weights and BatchNorm statistics of all ranks are finite numbers; waits for the device."""
        tensors = [value for value in self.amp.weights(self.model).values() if value.is_floating_point()]
        finite = bool(nn.utils.get_total_norm(tensors, norm_type=float("inf")).isfinite())
        return not self.ranks.largest(not finite)


def _write(flat: Tensor, tensors: list[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


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


def steps_per_epoch(loader: TrainLoader, accumulate: int) -> int:
    """Optimizer steps of an epoch; UserError where the data don't fill one."""
    steps = loader.batches_per_epoch // accumulate
    if not steps:
        raise UserError(
            f"accumulate={accumulate} batches of {loader.batch_size} are more than the {len(loader.dataset)} training "
            "images. Give a smaller accumulate or data.batch_size."
        )
    return steps


def train(state: TrainState, loader: TrainLoader, recipe: Recipe, stop: StopSignal) -> Iterator[int]:
    """Train from state.step to the end of its epoch; yields the step after each update.

    The device is never waited for here. Where a rank is asked to stop or has no data, all end before the same step.
    """
    per_epoch = steps_per_epoch(loader, recipe.accumulate)
    epoch, start = divmod(state.step, per_epoch)
    images_per_step = loader.batch_size * state.ranks.world_size * recipe.accumulate
    here = [
        taken_back % per_epoch * recipe.accumulate for taken_back in state.rewinds if taken_back // per_epoch == epoch
    ]
    batches = loader.batches(epoch, start * recipe.accumulate, here, len(state.rewinds))
    state.parallel.train()
    state.speed.resume()
    weights = state.amp.weights(state.model) if state.ema else {}
    try:
        for _ in range(start, per_epoch):
            state.speed.begin()
            waits, reductions, left_out = _update(state, batches, recipe, stop)
            state.step += 1
            state.speed.step(images_per_step, waits, reductions)
            if state.ema:
                state.ema.update(weights, state.step, left_out)
            yield state.step
    finally:
        batches.close()  # type: ignore[attr-defined]


def _update(
    state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], recipe: Recipe, stop: StopSignal
) -> tuple[list[Span], list[Span], Tensor | None]:
    """One optimizer step over `accumulate` batches. -> Its spans without data, and of reduction; whether it was none.

    The last is a flag on the device, None where all steps are taken as they come.
    """
    waits: list[Span] = []
    reductions: list[Span] = []
    losses: list[Tensor] = []
    skips, seed = state.watch.skips, rewound(recipe.seed, len(state.rewinds))
    statistics = None
    if recipe.accumulate > 1 or skips:
        statistics = Kept(buffer for buffer in state.model.buffers() if buffer.is_floating_point())
    state.passes[0] = recipe.accumulate
    for part in range(recipe.accumulate):
        before, error = mark(state.device), None
        try:
            images, labels = next(batches)
        except SampleError as fault:
            error = fault
        try:
            stop.check(error)
        except Exception:
            # This step never was: BatchNorm and the loss scale have seen its first batches already.
            if statistics:
                statistics.put_back()
            state.passes[1] += part
            state.amp.put_back()
            raise
        waits.append((before, mark(state.device)))
        forward_pass = state.step * recipe.accumulate + part
        seed_step(seed, forward_pass, state.ranks.rank)
        images = recipe.preprocessing.normalize(images).contiguous(memory_format=memory_format(state.device))
        images, mixed = recipe.mix(images, labels, seed, forward_pass)
        is_last = part == recipe.accumulate - 1
        with nullcontext() if is_last else local_gradients(state.parallel):
            loss = cross_entropy(state.amp.forward(state.parallel, images), labels, mixed, recipe.label_smoothing)
            loss = loss / recipe.accumulate if recipe.accumulate > 1 else loss
            # It ends once the other ranks have sent their gradients.
            with waiting("the other ranks' gradients", others=True) if state.ranks.reduction else nullcontext():
                state.amp.backward(state.watch.spread(loss))
        if is_last and state.ranks.reduction:
            reductions.append((state.ranks.reduction.ready, mark(state.device)))
        losses.append(loss.detach())
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.schedule(state.step)
    total = functools.reduce(torch.add, losses)
    norm = state.amp.gradients(state.optimizer, recipe.clip_grad_norm)
    bad = state.watch.look(state.step + 1, total, norm, state.amp.dynamic, state.ranks)
    state.amp.update(state.optimizer, bad)
    if statistics and bad is not None:
        statistics.put_back(bad)
    state.meter.add(total, bad)
    return waits, reductions, bad


def compile_step(state: TrainState, recipe: Recipe, batch_size: int, image_size: int, backend: str) -> float:
    """Compile the passes of a step by a backend of torch.compile, and run them once; the state stays as it was.

    Returns the seconds that took. Raises UserError if they can't be compiled.
    """
    before = time.monotonic()
    torch.compiler.reset()  # of earlier jobs: past a number of models it would silently compile no more
    state.parallel.train()
    kept = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    pixels = torch.zeros(batch_size, image_size, image_size, 3, dtype=torch.uint8, device=state.device)
    images = recipe.preprocessing.normalize(pixels).contiguous(memory_format=memory_format(state.device))
    labels = torch.zeros(batch_size, dtype=torch.int64, device=state.device)
    try:
        state.parallel.compile(backend=backend)
        for part in range(min(2, recipe.accumulate)):
            with waiting("torch.compile", LONG), local_gradients(state.parallel) if part else nullcontext():
                cross_entropy(state.amp.forward(state.parallel, images), labels, None, 0.0).backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        word = "compile=true" if backend == "inductor" else f"compile.backend={backend}"
        needs = f" It needs {compiler_of(state.device)}." if backend == "inductor" else ""
        raise UserError(
            f"{word}: torch.compile can't make the step on {state.device.type}: {_reason(error)}.{needs} Without it: "
            "compile=false"
        ) from None
    state.model.zero_grad()
    for buffer, value in kept:
        buffer.copy_(value)
    synchronize(state.device)
    return time.monotonic() - before


def _reason(error: BaseException) -> str:
    """The first line of an error of torch.compile that says something; of a backend's own error, what that says."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.rstrip(".:") for line in lines if line), type(error).__name__)


def cross_entropy(logits: Tensor, labels: Tensor, mixed: Mixed | None, smoothing: float) -> Tensor:
    """Mean cross-entropy with label smoothing; of a mixed batch the weighted mean over both labels.

    It is F.cross_entropy in 8 operations on the device instead of 23, those of its gradient included: a card launches
    each. logits: fp32 (N, C), labels: (N,).
    """
    count, classes = logits.shape
    rest = smoothing / classes

    def factors(wanted: Tensor) -> Tensor:
        """Return -1/N times the probability of each class (N, C) that labels ask for: what its logarithm counts."""
        spread = torch.full((count, classes), -rest / count, device=logits.device)
        return spread.scatter_(1, wanted[:, None], -(1 - smoothing + rest) / count)

    counted = factors(labels)
    if mixed is not None:
        counted = torch.lerp(factors(mixed.partners), counted, mixed.share)
    return (F.log_softmax(logits, 1) * counted).sum()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    amp: Amp,
    loader: EvalLoader,
    stop: StopSignal,
    on_batch: Callable[[int], None] = lambda images: None,
) -> EvalResult:
    """Hits and loss over every sample once, the same for any batch size and number of ranks.

    on_batch is told how many images came, on this rank.
    """
    model.eval()
    device = next(model.parameters()).device
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    losses: list[Tensor] = []
    before = time.perf_counter()
    batches = loader.batches()
    for _ in range(loader.batches_of_any_rank):
        batch, error = None, None
        try:
            batch = next(batches, None)
        except SampleError as fault:
            error = fault
        stop.check(error)
        if batch is None or not len(batch[1]):
            continue  # another rank has one more, or none of its pictures could be read
        images, labels = batch
        parts: list[Tensor] = []
        for part in torch.split(images, images_at_once(device, images[0, ..., 0].numel())):
            part = loader.preprocessing.normalize(part).contiguous(memory_format=memory_format(device))
            parts.append(amp.forward(model, part))
        logits = torch.cat(parts)
        counts += hits(logits, labels)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        on_batch(len(labels))
    ranked = stop.ranks.gather((counts.tolist(), torch.cat(losses).tolist() if losses else []))
    top1, top5 = (sum(hit[k] for hit, _ in ranked) for k in range(2))
    count = sum(len(values) for _, values in ranked)
    if not count:
        first = next(iter(loader.skipped.faults.values()), "")
        raise UserError(f"none of the {len(loader.dataset):,} evaluation images can be read. {first}".rstrip())
    # fsum is exact: the order of the samples, and so the number of ranks, doesn't show.
    loss = math.fsum(value for _, values in ranked for value in values)
    seconds = time.perf_counter() - before
    return EvalResult(top1, top5, count, loss / count, count / seconds)
