"""Parameter groups, optimizers, and learning-rate schedules as functions of the step.

To add an optimizer: a function that takes named parameters first and its settings after, and a file in conf/optim/
whose _target_ names it. A schedule likewise, with a Timeline first.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ghostnet.device import fused_adamw, fused_step_skips, no_fused_sgd, npu_fused_sgd_class
from ghostnet.schema import Fraction, FractionPair, NonNegative, NonNegativeInt, Positive, PositiveInt

NamedParameters = Iterable[tuple[str, Tensor]]
Schedule = Callable[[int], float]
"""The learning rate of the update that follows `step` updates."""
Interval = Literal["step", "epoch"]

IMAGES_PER_LR = 1024
"""optim.lr is given for this many images a step and scaled with the global batch."""


def scaled_lr(lr: float, global_batch_size: int) -> float:
    """The peak learning rate of a global batch, linear in it (arXiv 1706.02677)."""
    return lr * global_batch_size / IMAGES_PER_LR


def parameter_groups(named: NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight decay on matrices and kernels, none on one-dimensional parameters (biases, BatchNorm)."""
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def sgd(
    named: NamedParameters, /, lr: Positive, momentum: Fraction, weight_decay: NonNegative, nesterov: bool
) -> Optimizer:
    """Stochastic gradient descent with momentum, torch's default implementation for the device."""
    groups = parameter_groups(named, weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def fused_sgd(
    named: NamedParameters, /, lr: Positive, momentum: Fraction, weight_decay: NonNegative, nesterov: bool
) -> Optimizer:
    """The same, one kernel for the whole update; a device that has none computes as sgd does (see fused_sgd_note)."""
    named = list(named)
    device = device_of(named)
    if no_fused_sgd(device, momentum):
        return sgd(named, lr, momentum, weight_decay, nesterov)
    groups = parameter_groups(named, weight_decay)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    optimizer._step_supports_amp_scaling = fused_step_skips(device)
    if momentum:
        # torch makes the buffers in the first step, and leaves them unwritten where an overflow skips that step.
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def fused_sgd_note(optim: dict[str, Any], device: torch.device) -> str | None:
    """Return what is to be said of the optimizer of a config if it is not the one that was asked for."""
    if not optim["_target_"].endswith(".fused_sgd"):
        return None
    reason = no_fused_sgd(device, optim["momentum"])
    return f"optim=fused_sgd: {reason}; computed as optim=sgd, which is the same but for rounding" if reason else None


def npu_fused_sgd(
    named: NamedParameters, /, lr: Positive, momentum: Fraction, weight_decay: NonNegative, nesterov: bool
) -> Optimizer:
    """torch_npu's NpuFusedSGD, which the reference uses: parameters, gradients and momentum in one piece each.

    UserError on other devices than NPUs.
    """
    named = list(named)
    make = npu_fused_sgd_class(device_of(named))
    optimizer: Optimizer = make(parameter_groups(named, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov)
    return optimizer


def device_of(named: NamedParameters) -> torch.device:
    """The device of the parameters."""
    return next((parameter.device for _, parameter in named), torch.device("cpu"))


def rmsprop(
    named: NamedParameters,
    /,
    lr: Positive,
    momentum: Fraction,
    weight_decay: NonNegative,
    alpha: Fraction,
    eps: Positive,
) -> Optimizer:
    """RMSprop with momentum."""
    groups = parameter_groups(named, weight_decay)
    return torch.optim.RMSprop(groups, lr=lr, momentum=momentum, alpha=alpha, eps=eps)


def adamw(
    named: NamedParameters, /, lr: Positive, betas: FractionPair, weight_decay: NonNegative, eps: Positive
) -> Optimizer:
    """AdamW (arXiv 1711.05101), fused if the device has a kernel for that; betas: two numbers in [0, 1)."""
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, not {betas}")
    named = list(named)
    fused = True if fused_adamw(device_of(named)) else None
    groups = parameter_groups(named, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


class Kept:
    """A copy of tensors as they are, and the way back; no device is waited for."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        # One piece for all of a kind: a model has hundreds of small ones.
        self.groups = [(group, _joined(group)) for group in groups.values()]

    @torch.no_grad()
    def put_back(self, wanted: Tensor | None = None) -> None:
        """Make the tensors what they were; wanted: a flag on the device, where it is false they stay as they are."""
        for group, kept in self.groups:
            value = kept if wanted is None else torch.where(wanted, kept, _joined(group))
            parts = torch.split(value, [tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)])


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def step_unless(bad: Tensor, optimizer: Optimizer) -> None:
    """Update, but leave weights and moments as they are where a flag on the device is true; it is not waited for."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # a fused kernel: it looks at the flag itself
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        return
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = _moments(optimizer)
    kept = Kept([*weights, *before])
    optimizer.step()
    kept.put_back(bad)
    there = set(map(id, before))
    for made in _moments(optimizer):  # in the first step, from zeros
        if id(made) not in there:
            made.copy_(torch.where(bad, torch.zeros_like(made), made))


def _moments(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's state of its parameters, where they are; its count of steps, on the host, is not needed."""
    found = [(parameter, value) for parameter, state in optimizer.state.items() for value in state.values()]
    return [value for parameter, value in found if isinstance(value, Tensor) and value.shape == parameter.shape]


def load_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Go on from the state_dict of an optimizer of the same parameters; but for the rate, settings stay as they are."""
    own = optimizer.state_dict()["param_groups"]
    groups = [mine | {"lr": group["lr"]} for mine, group in zip(own, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    if hasattr(optimizer, "is_states_combined"):
        optimizer.is_states_combined = False  # NpuFusedSGD joins the new moments anew
    # Fused kernels walk through memory and don't see strides: a card's moments may lie in another order than ours.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                layout = parameter if value.shape == parameter.shape else value
                state[name] = torch.empty_like(layout, dtype=value.dtype).copy_(value)


@dataclass(frozen=True)
class Timeline:
    """What a schedule is drawn over: the peak learning rate, epochs before the cool-down, optimizer steps an epoch."""

    peak: float
    epochs: int
    steps_per_epoch: int


def warmup_in_force(warmup_epochs: float, epochs: int, interval: Interval) -> float:
    """Return the epochs of a warm-up within a training of so many before its cool-down.

    A longer one is shortened, so that epochs=1 alone trains: it comes to the peak at the end of the training, or in the
    last epoch if the rate changes but once an epoch.
    """
    if warmup_epochs <= epochs:
        return warmup_epochs
    return epochs if interval == "step" else epochs - 1


def warmup_note(schedule: dict[str, Any], epochs: int, peak: float) -> str | None:
    """Return what is to be said of the warm-up of a schedule's config: that it is shortened, or is all there is."""
    asked = schedule["warmup_epochs"]
    used = warmup_in_force(asked, epochs, schedule["interval"])
    at_peak = used == epochs and schedule["interval"] == "step"
    to_peak = f", and comes to the peak of {peak:.4g} at its end" if at_peak else ""
    if used < asked:
        return f"schedule.warmup_epochs={asked:g} is longer than epochs={epochs}: it is shortened to {used:g}{to_peak}"
    all_of_it = used == epochs + schedule["cooldown_epochs"]
    return f"the warm-up fills all of the training{to_peak}" if all_of_it else None


def _schedule(
    timeline: Timeline,
    decayed: Callable[[float], float],
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float,
    interval: Interval,
) -> Schedule:
    """Linear warm-up, then `decayed` of the epoch (fractional unless interval is "epoch"), then min_lr for good.

    The warm-up takes the place of the first epochs of `decayed` and delays nothing, as in the reference: where that
    has fallen meanwhile, as a cosine has, the rate steps down from the peak when the warm-up ends.
    """
    warmup_epochs = warmup_in_force(warmup_epochs, timeline.epochs, interval)

    def lr(step: int) -> float:
        epoch = step / timeline.steps_per_epoch if interval == "step" else float(step // timeline.steps_per_epoch)
        if epoch < warmup_epochs:
            return warmup_lr + epoch * (timeline.peak - warmup_lr) / warmup_epochs
        return decayed(epoch) if epoch < timeline.epochs else min_lr

    return lr


def cosine(
    timeline: Timeline,
    /,
    warmup_epochs: NonNegative,
    warmup_lr: NonNegative,
    min_lr: NonNegative,
    cooldown_epochs: NonNegativeInt,
    interval: Interval,
) -> Schedule:
    """Half a cosine from the peak to min_lr over all epochs; with interval="epoch" exactly the reference's formula."""

    def decayed(epoch: float) -> float:
        return min_lr + 0.5 * (timeline.peak - min_lr) * (1 + math.cos(math.pi * epoch / timeline.epochs))

    return _schedule(timeline, decayed, warmup_epochs, warmup_lr, min_lr, interval)


def linear(
    timeline: Timeline,
    /,
    warmup_epochs: NonNegative,
    warmup_lr: NonNegative,
    min_lr: NonNegative,
    cooldown_epochs: NonNegativeInt,
    interval: Interval,
) -> Schedule:
    """A straight line from the peak at the end of the warm-up to min_lr at the last epoch."""
    warmup_epochs = warmup_in_force(warmup_epochs, timeline.epochs, interval)

    def decayed(epoch: float) -> float:
        left = (timeline.epochs - epoch) / (timeline.epochs - warmup_epochs)
        return min_lr + (timeline.peak - min_lr) * left

    return _schedule(timeline, decayed, warmup_epochs, warmup_lr, min_lr, interval)


def step(
    timeline: Timeline,
    /,
    warmup_epochs: NonNegative,
    warmup_lr: NonNegative,
    min_lr: NonNegative,
    cooldown_epochs: NonNegativeInt,
    interval: Interval,
    decay_epochs: PositiveInt,
    decay_rate: Positive,
) -> Schedule:
    """The peak times decay_rate for every decay_epochs that have passed, never below min_lr."""

    def decayed(epoch: float) -> float:
        return max(min_lr, timeline.peak * float(decay_rate ** (epoch // decay_epochs)))

    return _schedule(timeline, decayed, warmup_epochs, warmup_lr, min_lr, interval)
