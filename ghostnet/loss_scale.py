"""The loss scale of half-precision gradients: a number, or dynamic; no step waits for the device."""

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from ghostnet.device import clear_overflow, overflowed, saturates
from ghostnet.optim import step_unless
from ghostnet.schema import LossScale


class GradScaler(torch.amp.GradScaler):
    """torch's GradScaler, but the host never reads whether to skip the step of an optimizer that is not fused."""

    def _maybe_opt_step(self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (as torch has it)
        (found,) = optimizer_state["found_inf_per_device"].values()
        step_unless(found.bool(), optimizer)


class SaturatedGradScaler(GradScaler):
    """The same for cards on which an overflow leaves no infinity behind, but only raises a flag of the card.

    torch_npu's own GradScaler reads that flag on the host, three times a step.
    """

    def scale(self, outputs: Tensor) -> Tensor:  # type: ignore[override]
        """Multiply a loss by the scale; the first one of a step lowers the card's flag."""
        if not self._per_optimizer_states:
            clear_overflow(outputs.device)
        scaled: Tensor = super().scale(outputs)
        return scaled

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale and note, on the device, whether any rank's card has raised its flag."""
        assert self._scale is not None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found = overflowed(self._scale.device)
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self._scale)
        state = self._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {found.device: found}
        state["stage"] = OptState.UNSCALED


def grad_scaler(device: torch.device) -> GradScaler:
    """Make a dynamic loss scale that starts at 2^16."""
    return (SaturatedGradScaler if saturates(device) else GradScaler)(device.type)


class Scale:
    """The loss scale: a number that is never checked, or dynamic, by the GradScaler that suits the device.

    Dynamic: from 2^16, halved on overflow, whose update is skipped; doubled after 2000 clean steps, up to 2^24.
    """

    LARGEST = 2.0**24

    def __init__(self, loss_scale: LossScale) -> None:
        self.number = None if loss_scale == "dynamic" else float(loss_scale)
        self.scaler: Any = None

    def start(self, device: torch.device) -> None:
        """Once, before the first step."""
        if self.number is None:
            self.scaler = grad_scaler(device)

    def scaled(self, loss: Tensor) -> Tensor:
        """Loss × scale."""
        scaled: Tensor = loss * self.number if self.number is not None else self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """Divide the gradients of the optimizer's parameters by the scale."""
        if self.number is None:
            self.scaler.unscale_(optimizer)
        elif gradients := [p.grad for p in parameters if p.grad is not None]:
            torch._foreach_div_(gradients, self.number)

    def step(self, optimizer: Optimizer, bad: Tensor | None) -> None:
        """Update, or skip the update where a dynamic scale was too large, and move that scale.

        bad: as of Amp.update(); a dynamic scale sees by itself what a bad loss makes of the gradients.
        """
        if self.number is None:
            self.scaler.step(optimizer)
            self.scaler.update()
            self.scaler._scale.clamp_(max=self.LARGEST)
        else:
            update(optimizer, bad)

    def now(self) -> float | None:
        """A dynamic scale as it is; waits for the device."""
        return None if self.number is not None else float(self.scaler.get_scale())

    def suspicion(self, dtype: torch.dtype) -> str:
        """Whether this may be why a loss is not finite, in a sentence."""
        if dtype == torch.bfloat16:
            return "computes in bfloat16 here, which reaches as far as float32, and is hardly the cause"
        if self.number is None:
            return "may be the cause: no loss scale helps activations beyond 65,504, where float16 ends"
        return f"may be the cause: float16 ends at 65,504, and a loss scale of {self.number:g} is never checked"

    def state_dict(self) -> dict[str, Any]:
        """Of a dynamic scale."""
        return self.scaler.state_dict() if self.number is None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a dynamic scale; a number stays, and a run that had one starts a new scale."""
        if self.number is None and state:
            # The GradScalers of torch and torch_npu keep the same under the same names, but for torch_npu's `dynamic`.
            self.scaler.load_state_dict(self.scaler.state_dict() | state)


def update(optimizer: Optimizer, bad: Tensor | None) -> None:
    """Update the weights; bad: a flag on the device, if it is true nothing is updated."""
    if bad is None:
        optimizer.step()
    else:
        step_unless(bad, optimizer)
