"""torch.npu.amp.GradScaler, which behaves like the real one, its traps included.

On a card that saturates it lowers the card's overflow flag in a step's first `scale`, asks it in `unscale_`, a wait
more for each dtype, and ranks agree by an all-reduce in the *default* process group.  On every card:

- each dtype of gradients costs an `item` in `unscale_`, and `update` one more;
- an optimizer that scales by itself (torch's with fused=True) is called as `step(grad_scaler=self)`, which torch's
  refuse with a TypeError;
- `step` prints when it skips, `update` when the scale changes;
- a scale that is not dynamic never checks and never skips.
"""

import warnings
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from torch_npu import npu
from torch_npu._float_status import npu_clear_float_status, npu_get_float_status


class GradScaler(torch.amp.GradScaler):
    def __init__(
        self,
        init_scale=2.0**16,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=2000,
        dynamic=True,
        enabled=True,
    ):
        if enabled and not npu.is_available():
            warnings.warn("torch_npu.amp.GradScaler is enabled, but NPU is not available. Disabling.", stacklevel=2)
            enabled = False
        super().__init__("npu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._dynamic = dynamic
        self._has_overflow = self._clear_overflow_flag = False
        self._dist_initialized = False
        self._dist_overflow_count = None

    def _lazy_init_scale_growth_tracker(self, dev):
        self._scale = torch.full((), self._init_scale).pin_memory().to(dev, non_blocking=True)
        tracker = torch.full((), self._init_growth_tracker, dtype=torch.int32)
        self._growth_tracker = tracker.pin_memory().to(dev, non_blocking=True)

    def scale(self, outputs):
        if self._enabled and self._dist_overflow_count is None:
            self._dist_initialized = dist.is_initialized()
            self._dist_overflow_count = torch.tensor([0.0]).to("npu")
        if self._enabled and self._dynamic and not self._clear_overflow_flag:
            if not npu.utils.is_support_inf_nan():
                self.clear_npu_overflow_flag()
            self._clear_overflow_flag = True
        return super().scale(outputs)

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        by_dtype = defaultdict(list)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter.grad.dtype == torch.float16 and not allow_fp16:
                        raise TypeError("Attempting to unscale FP16 gradients.")
                    by_dtype[parameter.grad.dtype].append(parameter.grad)
        with torch.no_grad():
            for grads in by_dtype.values():
                if self._dynamic:
                    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
                    # Where a card has no infinity the real kernel itself looks at the flag.
                    if not npu.utils.is_support_inf_nan() and self.get_npu_overflow_flag():
                        found_inf.fill_(1.0)
                    self._has_overflow = self._has_overflow or found_inf.item() > 0
                else:
                    for grad in grads:
                        grad.mul_(inv_scale)
            self._sync_dist_overflow_count()
            if self._has_overflow:
                found_inf.add_(1)
        return {found_inf.device: found_inf}

    @staticmethod
    def get_npu_overflow_flag():
        status = torch.zeros(8).pin_memory().to("npu", non_blocking=True)
        return bool(npu_get_float_status(status).cpu()[0] != 0)

    @staticmethod
    def clear_npu_overflow_flag():
        npu_clear_float_status(torch.zeros(8).pin_memory().to("npu", non_blocking=True))

    def _sync_dist_overflow_count(self):
        if npu.utils.is_support_inf_nan() or not (self._dynamic and self._dist_initialized):
            return
        if self._has_overflow:
            self._dist_overflow_count.add_(1)
            dist.all_reduce(self._dist_overflow_count)
        else:
            dist.all_reduce(self._dist_overflow_count)
            self._has_overflow = self._dist_overflow_count.item() != 0
        self._dist_overflow_count.zero_()

    def step(self, optimizer, *args, **kwargs):
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            result = optimizer.step(*args, **kwargs, grad_scaler=self)
            state["stage"] = OptState.STEPPED
            return result
        if state["stage"] is OptState.READY:
            self.unscale_(optimizer)
        if self._dynamic:
            result = self._maybe_opt_step(optimizer, state, *args, **kwargs)
            if sum(found.item() for found in state["found_inf_per_device"].values()):
                print("Gradient overflow. Skipping step")
        else:
            result = optimizer.step(*args, **kwargs)
        state["stage"] = OptState.STEPPED
        return result

    def update(self, new_scale=None):
        if not self._enabled:
            return
        scale, _ = self._check_scale_growth_tracker("update")
        if isinstance(new_scale, float):
            self._scale = torch.full((), new_scale).pin_memory().to(scale.device, non_blocking=True)
        elif new_scale is not None:
            if new_scale.device.type != "npu" or new_scale.numel() != 1 or new_scale.requires_grad:
                raise TypeError("new_scale should be a float or a 1-element npu tensor with requires_grad=False.")
            self._scale = new_scale
        elif self._dynamic:
            self._update_scale()
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        self._has_overflow = self._clear_overflow_flag = False

    def _update_scale(self):
        if self._has_overflow:
            self._scale.mul_(self._backoff_factor)
            self._growth_tracker.zero_()
            print(f"Loss scaler reducing loss scale to {self._scale.item()}")
            return
        self._growth_tracker.add_(1)
        if self._growth_tracker.item() == self._growth_interval:
            grown = self._scale * self._growth_factor
            if not torch.isinf(grown):
                self._scale = grown
            self._growth_tracker.zero_()
            print(f"Loss scaler increasing loss scale to {self._scale.item()}")

    def state_dict(self):
        state = super().state_dict()
        if self._enabled:
            state["dynamic"] = self._dynamic
        return state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if self._enabled:
            self._dynamic = state_dict["dynamic"]
