"""The blocks that GhostNet is made of, under the names of the published weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghostnet.device import lacks_kernels
from ghostnet.models.kernels import RowNorm, StridedDepthwise

NARROW = 64
"""Channels from which on PyTorch's own BatchNorm is as fast as by rows."""


def round_channels(channels: float) -> int:
    """Nearest multiple of 4, at least 4 and at least 0.9 of what was asked for: the published rule."""
    rounded = max(4, 4 * int(channels / 4 + 0.5))
    return rounded if rounded >= 0.9 * channels else rounded + 4


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, trained by rows where that is faster. (N, C, H, W) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and follow the statistics in train mode."""
        narrow = x.shape[1] < NARROW and x.shape[3] > 1 and x.is_contiguous(memory_format=torch.channels_last)
        by_rows = self.training and narrow and self.momentum is not None and lacks_kernels(x.device)
        if not by_rows or torch.compiler.is_compiling():
            return super().forward(x)
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        out: Tensor
        out, mean, variance = RowNorm.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() / x.shape[1]
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return out


class Depthwise(nn.Conv2d):
    """Convolve each channel by itself. (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)) for an odd kernel."""

    def __init__(self, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half and self.stride != (1, 1) and torch.is_grad_enabled() and lacks_kernels(x.device):
            out: Tensor = StridedDepthwise.apply(x, self.weight, self.stride, self.padding)
            return out
        return super().forward(x)


def normed(conv: nn.Conv2d, relu: bool) -> nn.Sequential:
    """Put BatchNorm, and ReLU if asked for, behind a convolution."""
    return nn.Sequential(conv, BatchNorm(conv.out_channels), nn.ReLU(inplace=True) if relu else nn.Identity())


class Ghost(nn.Module):
    """Half of the channels by a 1×1 convolution, the other half cheaply from those: Ghost module of arXiv 1911.11907.

    (N, in_channels, H, W) -> (N, out_channels, H, W); out_channels must be even.
    """

    def __init__(self, in_channels: int, out_channels: int, relu: bool) -> None:
        super().__init__()
        half = out_channels // 2
        self.primary_conv = normed(nn.Conv2d(in_channels, half, 1, bias=False), relu)
        self.cheap_operation = normed(Depthwise(half, 3), relu=False)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        primary = self.primary_conv(x)
        both = torch.cat((primary, self.cheap_operation(primary)), dim=1)
        # Of both halves, though the first has had it: autograd then keeps this tensor alone, not the second half too.
        return F.relu(both, inplace=True) if self.relu else both


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in [0, 1] computed from the means of all channels. (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = round_channels(channels / 4)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        gate = self.conv_expand(F.relu(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(gate)


class Bottleneck(nn.Module):
    """Ghost expansion, strided depthwise convolution, squeeze-excite, ghost projection, beside a shortcut.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, expanded: int, out_channels: int, kernel: int, squeeze_excite: bool, stride: int
    ) -> None:
        super().__init__()
        self.ghost1 = Ghost(in_channels, expanded, relu=True)
        self.conv_dw = Depthwise(expanded, kernel, stride) if stride > 1 else nn.Identity()
        self.bn_dw = BatchNorm(expanded) if stride > 1 else nn.Identity()
        self.se = SqueezeExcite(expanded) if squeeze_excite else nn.Identity()
        self.ghost2 = Ghost(expanded, out_channels, relu=False)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                Depthwise(in_channels, kernel, stride),
                BatchNorm(in_channels),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                BatchNorm(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        branch: Tensor = self.ghost2(self.se(self.bn_dw(self.conv_dw(self.ghost1(x)))))
        branch += self.shortcut(x)
        return branch
