"""BatchNorm folded into the convolution before it: the model that evaluation runs."""

import copy

import torch
from torch import nn

from ghostnet.models.ghostnet import GhostNet


@torch.no_grad()
def folded(model: GhostNet) -> GhostNet:
    """A copy in eval mode without BatchNorm: the same logits but for rounding, for convolutions that now have a bias.

    In GhostNet a BatchNorm stands behind the convolution that it normalises, in every module's list of children.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        conv: nn.Module | None = None
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                assert isinstance(conv, nn.Conv2d)
                _fold(conv, child)
                setattr(module, name, nn.Identity())
            conv = child
    return model


def _fold(conv: nn.Conv2d, norm: nn.modules.batchnorm._BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert conv.bias is None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    conv.weight.copy_(conv.weight.float() * scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter((norm.bias - norm.running_mean * scale).to(conv.weight.dtype), requires_grad=False)
