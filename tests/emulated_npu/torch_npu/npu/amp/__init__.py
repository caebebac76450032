"""torch.npu.amp."""

import functools

import torch

from torch_npu.npu.amp.grad_scaler import GradScaler

__all__ = ["GradScaler", "autocast"]

autocast = functools.partial(torch.autocast, "npu")
