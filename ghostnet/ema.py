"""The exponential moving average of the weights."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """An fp32 copy of a model's parameters and buffers that follows them: average += (1 - decay) (model - average).

    The decay grows as (1 + step) / (10 + step) up to its value, so that short runs don't average their random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Decay in (0, 1)."""
        self.decay = decay
        self.module = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.counts: dict[str, Tensor] = {}
        """The integers of the state that was followed last."""

    @torch.no_grad()
    def update(self, state: dict[str, Tensor], step: int, left_out: Tensor | None = None) -> None:
        """Follow a state dict (fp32, any device of the module) after `step` updates.

        Integers, such as BatchNorm's count of batches, are taken over when state_dict() is called. left_out: a flag on
        the device; if it is true, the step was none, and the average stays as it is.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        own = self.module.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        averages, values = [own[name] for name in floats], [state[name] for name in floats]
        if left_out is None:
            torch._foreach_lerp_(averages, values, weight)
        else:
            torch._foreach_lerp_(averages, values, [torch.where(left_out, 0.0, weight)] * len(floats))
        self.counts = {name: state[name] for name, value in own.items() if not value.is_floating_point()}

    def state_dict(self) -> dict[str, Tensor]:
        """The average's state dict; the tensors are the live ones."""
        own: dict[str, Tensor] = self.module.state_dict()
        for name, value in self.counts.items():
            own[name].copy_(value)
        return own
