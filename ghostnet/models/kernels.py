"""What PyTorch computes slowly on CPUs, computed another way: the same mathematics, gradients written out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 1 << 18
"""Elements that a pass over memory takes at once, so that the next pass finds them in the cache."""


class RowNorm(torch.autograd.Function):
    """BatchNorm in train mode of a channels_last (N, C, H, W), whose kernels are slow for few channels.

    They run along the channels of one pixel, so they get rows of W × C channels, whose statistics are then merged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        """-> (the normalised, the means, the biased variances)."""
        rows, width = _rows(x), x.shape[3]
        unused = weight.new_zeros(2, rows.shape[1])  # running statistics, whose type is that of the results
        means, variances = torch.batch_norm_update_stats(rows, unused[0], unused[1], 0.0)
        means, variances = means.view(width, -1), variances.view(width, -1)
        mean = means.mean(0)
        variance = variances.mean(0) + means.var(0, correction=0)
        out = torch.empty_like(x)
        constants = [value.repeat(width) for value in (weight, bias, mean, variance)]
        none = mean.new_empty(0)
        torch.ops.aten.native_batch_norm.out(
            rows, *constants, False, 0.0, eps, out=_rows(out), save_mean=none, save_invstd=none
        )
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        """Two passes, as BatchNorm's own: sums, then the gradient of x, a sum of x and grad with a factor a channel."""
        x, weight, mean, inverse = ctx.saved_tensors
        width, count = x.shape[3], x.numel() / x.shape[1]
        rows, grads = _rows(x), _rows(grad.contiguous(memory_format=torch.channels_last))
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            grads, rows, None, None, None, mean.repeat(width), inverse.repeat(width), True, 0.0, [False, True, True]
        )
        d_weight, d_bias = d_weight.view(width, -1).sum(0), d_bias.view(width, -1).sum(0)
        of_grad = weight * inverse
        of_x = -of_grad * inverse * d_weight / count
        rest = -of_grad * d_bias / count - of_x * mean
        of_grad, of_x, rest = (value.repeat(width) for value in (of_grad, of_x, rest))
        d_x = torch.empty_like(x)
        step = max(1, CHUNK // rows.shape[1])
        for out, part, part_grad in zip(
            *(torch.split(whole, step) for whole in (_rows(d_x), rows, grads)), strict=True
        ):
            out.copy_(torch.addcmul(rest, part, of_x).addcmul_(part_grad, of_grad))
        return d_x, d_weight, d_bias, None


def _rows(x: Tensor) -> Tensor:
    """A channels_last (N, C, H, W) as (N × H, W × C), in the same memory."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n * h, w * c)


class StridedDepthwise(torch.autograd.Function):
    """A strided depthwise convolution in half precision with its gradients in fp32: oneDNN has only those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:  # noqa: ANN401
        """(N, C, H, W), (C, 1, k, k) -> (N, C, H', W')."""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        """In fp32, then rounded."""
        x, weight = ctx.saved_tensors
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            grad.float(), x.float(), weight.float(), None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), len(weight),
            (True, True, False),
        )  # fmt: skip
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None, None
