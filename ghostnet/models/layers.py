"""The blocks that GhostNet is made of, under the names of the published weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def round_channels(channels: float) -> int:
    """Nearest multiple of 4, at least 4 and at least 0.9 of what was asked for: the published rule."""
    rounded = max(4, 4 * int(channels / 4 + 0.5))
    return rounded if rounded >= 0.9 * channels else rounded + 4


def depthwise(channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolve each channel by itself. (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)) for an odd kernel."""
    return nn.Conv2d(channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False)


def normed(conv: nn.Conv2d, relu: bool) -> nn.Sequential:
    """Put BatchNorm, and ReLU if asked for, behind a convolution."""
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True) if relu else nn.Identity())


class Ghost(nn.Module):
    """Half of the channels by a 1×1 convolution, the other half cheaply from those: Ghost module of arXiv 1911.11907.

    (N, in_channels, H, W) -> (N, out_channels, H, W); out_channels must be even.
    """

    def __init__(self, in_channels: int, out_channels: int, relu: bool) -> None:
        super().__init__()
        half = out_channels // 2
        self.primary_conv = normed(nn.Conv2d(in_channels, half, 1, bias=False), relu)
        self.cheap_operation = normed(depthwise(half, 3), relu)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        primary = self.primary_conv(x)
        return torch.cat((primary, self.cheap_operation(primary)), dim=1)


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
        self.conv_dw = depthwise(expanded, kernel, stride) if stride > 1 else nn.Identity()
        self.bn_dw = nn.BatchNorm2d(expanded) if stride > 1 else nn.Identity()
        self.se = SqueezeExcite(expanded) if squeeze_excite else nn.Identity()
        self.ghost2 = Ghost(expanded, out_channels, relu=False)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                depthwise(in_channels, kernel, stride),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        branch: Tensor = self.ghost2(self.se(self.bn_dw(self.conv_dw(self.ghost1(x)))))
        shortcut: Tensor = self.shortcut(x)
        return branch + shortcut
