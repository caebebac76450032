"""torch_npu.optim.NpuFusedSGD: one piece of memory each for parameters, gradients and momentum of a group.

As the real one does, the first step() or zero_grad() with gradients moves the storages of parameters and gradients into
common pieces, for good: a gradient that is replaced by another tensor later is not seen any more.
"""

import torch


def _joined(tensors):
    """One new tensor, in whose memory those of a list lie from now on; None for none."""
    if not tensors:
        return None
    if any(tensor is None for tensor in tensors):
        raise RuntimeError("Tensors to combine must not have `None`.")
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise RuntimeError("Tensors to combine must have the same dtype.")
    for tensor in tensors:
        if tensor.device.type != "npu":
            raise RuntimeError(f"Tensors to combine must be on NPU, got {tensor.device.type}.")
        if not tensor.is_contiguous():
            raise RuntimeError("Tensors to combine must be contiguous.")
    whole = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    index = 0
    for tensor in tensors:
        torch.ops.emulated_npu.change_data_ptr(tensor.detach(), whole, index)
        index += tensor.numel()
    return whole


class NpuFusedSGD(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        if nesterov and (momentum <= 0 or dampening):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        settings = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {"lr": lr} | settings)
        self.is_fused_optimizer = True
        self.is_params_grads_combined = self.is_states_combined = False

    def _join_parameters(self):
        if self.is_params_grads_combined:
            return
        self._lists = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameter in (parameter for members in self._lists for parameter in members):
            if parameter.dtype not in (torch.float32, torch.float16):
                kinds = "must be either float32 or float16"
                raise TypeError(f"Fused optimizer's parameters {kinds}, but received {parameter.dtype}")
        self._weights = [_joined(members) for members in self._lists]
        self._gradients = [_joined([parameter.grad for parameter in members]) for members in self._lists]
        self.is_params_grads_combined = any(weights is not None for weights in self._weights)

    def _join_moments(self):
        if self.is_states_combined:
            return
        self._moments, self._is_first = [], []
        for group, members in zip(self.param_groups, self._lists, strict=True):
            is_first = False
            for parameter in members if group["momentum"] else ():
                state, moment = self.state[parameter], parameter.grad.detach().clone()
                is_first = "momentum_buffer" not in state
                if is_first:
                    moment.add_(parameter.detach(), alpha=group["weight_decay"])
                else:
                    moment.copy_(state["momentum_buffer"])
                state["momentum_buffer"] = moment
            moments = [self.state[parameter]["momentum_buffer"] for parameter in members] if group["momentum"] else []
            self._moments.append(_joined(moments))
            self._is_first.append(is_first)
        self.is_states_combined = True

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        self._join_parameters()
        self._join_moments()
        pieces = zip(self.param_groups, self._weights, self._gradients, self._moments, self._is_first, strict=True)
        for group, weights, gradients, moments, is_first in pieces:
            if weights is None:
                continue
            if group["weight_decay"]:
                gradients = gradients.add(weights, alpha=group["weight_decay"])
            if group["momentum"]:
                if not is_first:
                    moments.mul_(group["momentum"]).add_(gradients, alpha=1 - group["dampening"])
                gradients = gradients.add(moments, alpha=group["momentum"]) if group["nesterov"] else moments
            weights.add_(gradients, alpha=-group["lr"])
        self._is_first = [False] * len(self._is_first)
        return loss

    @torch.no_grad()
    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        self._join_parameters()
        for gradients in self._gradients:
            if gradients is not None:
                gradients.zero_()
