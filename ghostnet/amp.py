"""Precision: one protocol for fp32, autocast, O2 with master weights, and Ascend's apex.

The loop calls forward, backward and step, and never asks which one it has.
"""

import copy
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ghostnet.device import apex_options, check_bf16, half_dtype
from ghostnet.errors import UserError
from ghostnet.loss_scale import Scale, update
from ghostnet.models.fold import folded
from ghostnet.models.ghostnet import GhostNet
from ghostnet.schema import LossScale

MakeOptimizer = Callable[[Iterable[tuple[str, Tensor]]], Optimizer]


class Amp:
    """fp32, and the protocol of the others."""

    name = "none"
    dynamic = False
    """Whether gradients that overflow are usual, and skipped by a loss scale that then gets smaller."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        """What the optimizer updates, and what the gradient's norm is taken of."""

    def check(self, device: torch.device) -> None:
        """UserError where the device can't compute so; asked before data are read."""

    def initialize(self, model: nn.Module, make_optimizer: MakeOptimizer, device: torch.device) -> Optimizer:
        """Ready a model that is on its device, in place, and make the optimizer of what it trains."""
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        return make_optimizer(named)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Fp32 logits (N, C) of normalised fp32 images (N, 3, H, W)."""
        logits: Tensor = model(images)
        return logits.float()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of an fp32 scalar loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: Optimizer, clip_grad_norm: float | None) -> None:
        """gradients() and update() in one."""
        self.gradients(optimizer, clip_grad_norm)
        self.update(optimizer)

    def gradients(self, optimizer: Optimizer, clip_grad_norm: float | None) -> Tensor:
        """Ready the gradients: whole, clipped to a norm (null: not) -> their norm before that.

        It is finite where all gradients are, but for those beyond 1e19, whose squares are not.
        """
        return self._clip(self.parameters, clip_grad_norm)

    def update(self, optimizer: Optimizer, bad: Tensor | None = None) -> None:
        """Update the weights and drop the gradients; bad: a flag on the device, where it is true nothing is updated."""
        update(optimizer, bad)
        optimizer.zero_grad()

    def put_back(self) -> None:
        """Be as before the backward passes of a step that is given up; its gradients don't count."""

    def scale(self) -> float | None:
        """The dynamic loss scale as it is; waits for the device. None where there is none."""
        return None

    def suspicion(self) -> str:
        """Whether the precision may be why a loss is not finite, in a sentence."""
        return "computes in float32: precision is not the cause"

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with its full-precision weights; the tensors are the live ones."""
        return model.state_dict()

    def load_weights(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Take over what weights() gave."""
        model.load_state_dict(state)

    def for_evaluation(self, module: nn.Module, device: torch.device) -> nn.Module:
        """A copy of the model, or of its fp32 average, that forward() takes in evaluation, BatchNorm folded away.

        A model that isn't GhostNet is left as it is.
        """
        return folded(module) if isinstance(module, GhostNet) else module

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss scale."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of the loss scale."""

    @staticmethod
    def _clip(parameters: list[Tensor], norm: float | None) -> Tensor:
        if norm is not None:
            return nn.utils.clip_grad_norm_(parameters, norm)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Bf16(Amp):
    """Autocast to bfloat16: fp32 weights, no loss scale."""

    name = "bf16"
    dtype = torch.bfloat16

    def check(self, device: torch.device) -> None:
        """UserError on a card without bfloat16."""
        check_bf16(device)

    def for_evaluation(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Folded, in half precision once and for all."""
        return folded(module).to(self.dtype) if isinstance(module, GhostNet) else module

    def suspicion(self) -> str:
        """Bfloat16 reaches as far as float32."""
        return "reaches as far as float32, and is hardly the cause"

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Fp32 logits (N, C), computed under autocast."""
        with torch.autocast(images.device.type, self.dtype):
            logits: Tensor = model(images)
        return logits.float()


class Fp16(Bf16):
    """Autocast to float16 with a loss scale: dynamic, or a number that is never checked."""

    name = "fp16"
    dtype = torch.float16

    def __init__(self, loss_scale: LossScale) -> None:
        super().__init__()
        self.loss_scale = Scale(loss_scale)
        self.dynamic = self.loss_scale.number is None

    def check(self, device: torch.device) -> None:
        """Every device computes in float16."""

    def initialize(self, model: nn.Module, make_optimizer: MakeOptimizer, device: torch.device) -> Optimizer:
        """Ready the loss scale for the device."""
        self.loss_scale.start(device)
        return super().initialize(model, make_optimizer, device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of loss × scale."""
        super().backward(self.loss_scale.scaled(loss))

    def gradients(self, optimizer: Optimizer, clip_grad_norm: float | None) -> Tensor:
        """Unscale, clip."""
        self.loss_scale.unscale(optimizer, self.parameters)
        return self._clip(self.parameters, clip_grad_norm)

    def update(self, optimizer: Optimizer, bad: Tensor | None = None) -> None:
        """Update; a dynamic scale skips it on overflow."""
        self.loss_scale.step(optimizer, bad)
        optimizer.zero_grad()

    def scale(self) -> float | None:
        """The dynamic loss scale as it is."""
        return self.loss_scale.now()

    def suspicion(self) -> str:
        """Float16 may well be."""
        return self.loss_scale.suspicion(self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The state of a dynamic loss scale."""
        return self.loss_scale.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a dynamic loss scale; a number stays, and a run that had one starts a new scale."""
        self.loss_scale.load_state_dict(state)


class O2(Amp):
    """Half-precision weights and activations, fp32 BatchNorm, fp32 master weights: what apex calls O2.

    float16 on cards, bfloat16 on the CPU. A number as loss scale is never checked, as in the reference.
    """

    name = "o2"

    def __init__(self, loss_scale: LossScale) -> None:
        super().__init__()
        self.loss_scale = Scale(loss_scale)
        self.dynamic = self.loss_scale.number is None
        self.dtype = torch.float16
        self.masters: dict[str, Tensor] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []
        """(half-precision weight, its master) of all that is trained, but BatchNorm's."""

    def initialize(self, model: nn.Module, make_optimizer: MakeOptimizer, device: torch.device) -> Optimizer:
        """Keep fp32 masters of all parameters but BatchNorm's, which stay fp32 and are their own masters."""
        self.dtype = half_dtype(device)
        self.loss_scale.start(device)
        full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._to_half(model)
        self.masters, trained, self.pairs = {}, [], []
        for name, parameter in model.named_parameters():
            is_half = parameter.dtype == self.dtype
            master = full[name].requires_grad_(parameter.requires_grad) if is_half else parameter
            self.masters[name] = master
            if parameter.requires_grad:
                trained.append((name, master))
                if is_half:
                    self.pairs.append((parameter, master))
        self.parameters = [master for _, master in trained]
        return make_optimizer(trained)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Fp32 logits (N, C) from half-precision images and weights."""
        logits: Tensor = model(images.to(self.dtype))
        return logits.float()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of loss × scale to the half-precision weights."""
        super().backward(self.loss_scale.scaled(loss))

    @torch.no_grad()
    def gradients(self, optimizer: Optimizer, clip_grad_norm: float | None) -> Tensor:
        """Gradients to the masters, unscale, clip."""
        full, half = [], []
        for parameter, master in self.pairs:
            if parameter.grad is None:
                master.grad = None
                continue
            master.grad = torch.empty_like(master) if master.grad is None else master.grad
            full.append(master.grad)
            half.append(parameter.grad)
            parameter.grad = None
        if full:
            torch._foreach_copy_(full, half)
        self.loss_scale.unscale(optimizer, self.parameters)
        return self._clip(self.parameters, clip_grad_norm)

    @torch.no_grad()
    def update(self, optimizer: Optimizer, bad: Tensor | None = None) -> None:
        """Update the masters, copy them back; the memory of the masters' gradients is kept for the next step."""
        self.loss_scale.step(optimizer, bad)
        self._copy_back()
        gradients = [master.grad for _, master in self.pairs]
        optimizer.zero_grad()
        for (_, master), gradient in zip(self.pairs, gradients, strict=True):
            master.grad = gradient

    def scale(self) -> float | None:
        """The dynamic loss scale as it is."""
        return self.loss_scale.now()

    def suspicion(self) -> str:
        """Float16 may well be."""
        return self.loss_scale.suspicion(self.dtype)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict with the fp32 masters in place of the half-precision weights."""
        return model.state_dict() | {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def load_weights(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Fp32 weights into the masters and, rounded, into the model."""
        model.load_state_dict(state)
        for name, master in self.masters.items():
            master.copy_(state[name])

    def for_evaluation(self, module: nn.Module, device: torch.device) -> nn.Module:
        """A half-precision copy, folded where it is GhostNet."""
        self.dtype = half_dtype(device)
        return self._to_half(folded(module) if isinstance(module, GhostNet) else copy.deepcopy(module))

    def state_dict(self) -> dict[str, Any]:
        """The state of a dynamic loss scale."""
        return self.loss_scale.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a dynamic loss scale; a number stays, and a run that had one starts a new scale."""
        self.loss_scale.load_state_dict(state)

    def _to_half(self, model: nn.Module) -> nn.Module:
        # BatchNorm stays fp32: half-precision running variances drift.
        for module in model.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.dtype)
        return model

    def _copy_back(self) -> None:
        if self.pairs:
            torch._foreach_copy_([half for half, _ in self.pairs], [master for _, master in self.pairs])


class Apex(Amp):
    """O2 by Ascend's apex, where it is installed; amp=o2 does the same without it."""

    name = "apex"

    def __init__(self, loss_scale: LossScale) -> None:
        super().__init__()
        try:
            self.apex = importlib.import_module("apex.amp")
        except Exception as error:  # another package of that name may fail in any way
            raise UserError(
                "amp=apex needs Ascend's apex, which is built from source: github.com/Ascend/apex, "
                "bash scripts/build.sh --python=3.x, then install the wheel it makes (the package named apex in the "
                f"Python package index is something else). amp=o2 does the same without it. ({error})"
            ) from None
        self.loss_scale = loss_scale
        self.dynamic = loss_scale == "dynamic"
        self.optimizer: Optimizer | None = None
        self.names: list[str] = []
        """Of the master parameters, in the optimizer's order."""
        self.before: dict[str, Any] | None = None
        """Its loss scalers before the first backward pass of the step that is under way: apex counts each pass."""

    def initialize(self, model: nn.Module, make_optimizer: MakeOptimizer, device: torch.device) -> Optimizer:
        """Hand model and optimizer to apex.amp.initialize."""
        optimizer = super().initialize(model, make_optimizer, device)
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
        _, self.optimizer = self.apex.initialize(
            model, optimizer, opt_level="O2", loss_scale=self.loss_scale, verbosity=0, **apex_options(device)
        )
        # apex makes the masters when the optimizer is first used; a checkpoint must find them there.
        self.optimizer.zero_grad()
        return self.optimizer

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of loss × scale."""
        self.before = self.before or copy.deepcopy(self.state_dict())
        with self.apex.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward()

    def gradients(self, optimizer: Optimizer, clip_grad_norm: float | None) -> Tensor:
        """Clip on the masters."""
        return self._clip(list(self.apex.master_params(optimizer)), clip_grad_norm)

    def update(self, optimizer: Optimizer, bad: Tensor | None = None) -> None:
        """Update; apex itself says what it skips."""
        assert bad is None, "the door refuses on_nan=skip with apex"
        self.before = None
        optimizer.step()
        # Without set_to_none, which apex's own zero_grad doesn't take: it knows which gradients must stay.
        optimizer.zero_grad()

    def put_back(self) -> None:
        """Take back what apex has counted."""
        if self.before is not None:
            self.load_state_dict(self.before)
            self.before = None

    def scale(self) -> float | None:
        """The dynamic loss scale as it is; apex keeps it on the host."""
        if not self.dynamic:
            return None
        return min(float(scaler["loss_scale"]) for scaler in self.apex.state_dict().values())

    def suspicion(self) -> str:
        """Float16 may well be."""
        return Scale(self.loss_scale).suspicion(torch.float16)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict with apex's fp32 masters in place of the half-precision weights."""
        return {
            name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()
        } | {name: master.detach() for name, master in self._masters()}

    @torch.no_grad()
    def load_weights(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Fp32 weights into the masters and, rounded, into the model."""
        model.load_state_dict(state)
        for name, master in self._masters():
            master.copy_(state[name])

    def for_evaluation(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module itself: apex has changed how its forward is called."""
        return module

    def state_dict(self) -> dict[str, Any]:
        """The loss scalers of apex."""
        state: dict[str, Any] = self.apex.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the loss scalers of apex."""
        self.apex.load_state_dict(state)

    def _masters(self) -> Iterable[tuple[str, Tensor]]:
        return zip(self.names, self.apex.master_params(self.optimizer), strict=True)
