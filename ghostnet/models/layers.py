"""The blocks that GhostNet is made of, under the names of the published weights."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghostnet.device import computes_again, lacks_kernels
from ghostnet.models.kernels import RowNorm, StridedDepthwise

NARROW = 64
"""Channels from which on PyTorch's own BatchNorm is as fast as by rows, and 1×1 convolutions are dear to do again."""


def round_channels(channels: float) -> int:
    """Nearest multiple of 4, at least 4 and at least 0.9 of what was asked for: the published rule."""
    rounded = max(4, 4 * int(channels / 4 + 0.5))
    return rounded if rounded >= 0.9 * channels else rounded + 4


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, trained by rows where that is faster. (N, C, H, W) -> (N, C, H, W).

    It counts its batches on the host and brings num_batches_tracked up to date when its state is read: on a card that
    tensor would cost every layer a launch in every step.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.uncounted = 0
        """Batches since num_batches_tracked was brought up to date."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and follow the statistics in train mode."""
        if not self.training or torch.compiler.is_compiling():
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.uncounted += 1
        if not (lacks_kernels(x.device) and x.shape[1] < NARROW and x.shape[3] > 1 and is_channels_last(x)):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
            )
        out: Tensor
        out, mean, variance = RowNorm.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() / x.shape[1]
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return out

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        assert self.num_batches_tracked is not None
        if self.uncounted:
            self.num_batches_tracked += self.uncounted
            self.uncounted = 0
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401 (as torch has them)
        self.uncounted = 0
        super()._load_from_state_dict(*args)


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


@contextlib.contextmanager
def kept_once() -> Iterator[Callable[[Tensor, Callable[[], Tensor]], None]]:
    """Inside, what autograd keeps can be told to be made again instead, by the function that this gives.

    It takes a tensor, and how to make its values from tensors that are kept anyway; those must have no history.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield lambda tensor, make: None
        return
    kept: list[Kept] = []

    def keep(tensor: Tensor) -> Kept:
        kept.append(Kept(tensor))
        return kept[-1]

    def remake(tensor: Tensor, make: Callable[[], Tensor]) -> None:
        for item in kept:
            if item.tensor is not None and is_same(item.tensor, tensor):
                item.tensor, item.make = None, make

    with torch.autograd.graph.saved_tensors_hooks(keep, Kept.get):
        yield remake


@dataclass
class Kept:
    """What autograd keeps of one tensor until its backward pass."""

    tensor: Tensor | None
    make: Callable[[], Tensor] | None = None

    def get(self) -> Tensor:
        """Its values."""
        if self.tensor is not None:
            return self.tensor
        assert self.make is not None
        return self.make()


def again(conv: nn.Conv2d, make_x: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    """How to convolve again what make_x makes, in the type that the result had."""
    weight, stride, padding, groups = conv.weight.detach(), conv.stride, conv.padding, conv.groups
    return lambda: F.conv2d(make_x().to(dtype), weight.to(dtype), None, stride, padding, 1, groups)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same memory in the same order."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side."""
    return x.is_contiguous(memory_format=torch.channels_last)


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

    def forward(self, x: Tensor, make_x: Callable[[], Tensor] | None = None) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W). make_x: makes x again, so that it need not be kept."""
        if computes_again(x.device):
            return self._sparing_memory(x, make_x)
        primary = self.primary_conv(x)
        cheap = self.cheap_operation(primary)
        return torch.cat((primary, F.relu(cheap, inplace=True) if self.relu else cheap), dim=1)

    def _sparing_memory(self, x: Tensor, make_x: Callable[[], Tensor] | None) -> Tensor:
        """Compute the same, but keep for the backward pass only what is slower to compute again than to keep."""
        (conv, norm, act), (cheap, cheap_norm, _) = self.primary_conv, self.cheap_operation
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(cheap, nn.Conv2d)
        with kept_once() as remake:
            rough = conv(x)
            primary = act(norm(rough))
            cheap_rough = cheap(primary)
            both = torch.cat((primary, cheap_norm(cheap_rough)), dim=1)
        # Of both halves, though the first has had it: autograd then keeps this tensor alone, not the second half too.
        both = F.relu(both, inplace=True) if self.relu else both

        kept, kept_x, half = (both if self.relu else primary).detach(), x.detach(), primary.shape[1]
        layout = torch.channels_last if is_channels_last(primary) else torch.contiguous_format

        def make_primary() -> Tensor:
            return kept[:, :half].contiguous(memory_format=layout)

        if make_x:
            remake(x, make_x)
        if self.relu:
            remake(primary, make_primary)
        remake(cheap_rough, again(cheap, make_primary, cheap_rough.dtype))
        if conv.in_channels <= NARROW:
            remake(rough, again(conv, make_x or (lambda: kept_x), rough.dtype))
        return both


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class SqueezeExcite(nn.Module):
    """A gate in [0, 1] for each channel, computed from the means of all channels. (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = round_channels(channels / 4)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the gates (N, C, 1, 1)."""
        # Autocast would cost 8 casts in a step: its weights and biases there and their gradients back.
        with torch.autocast(x.device.type, enabled=False) if _autocasts(x.device.type) else contextlib.nullcontext():
            means = x.mean((2, 3), keepdim=True, dtype=self.conv_reduce.weight.dtype)
            gate = self.conv_expand(F.relu(self.conv_reduce(means)))
            return F.hardsigmoid(gate).to(x.dtype)


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
        self.se = SqueezeExcite(expanded) if squeeze_excite else None
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
        expanded = self.bn_dw(self.conv_dw(self.ghost1(x)))
        if self.se:
            gate = self.se(expanded)
            made_of = expanded.detach(), gate.detach()
            branch: Tensor = self.ghost2(expanded * gate, lambda: made_of[0] * made_of[1])
        else:
            branch = self.ghost2(expanded)
        branch += self.shortcut(x)
        return branch
