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

    @torch.no_grad()
    def update(self, state: dict[str, Tensor], step: int) -> None:
        """Follow a state dict (fp32, any device of the module) after `step` updates."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        own = self.module.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floats], [state[name] for name in floats], weight)
        for name, value in own.items():
            if not value.is_floating_point():
                value.copy_(state[name])
