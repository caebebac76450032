"""The operators under torch.nn.SyncBatchNorm, which only GPUs have kernels for: their formulas, in host tensors.

Statistics are computed in fp32 whatever the input's dtype is, as on a GPU.
"""

import torch

from torch_npu import counters
from torch_npu._runtime import card, host

_library = torch.library.Library("aten", "IMPL")


def _channels(values, like):
    """Values by channel, shaped to broadcast over like."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _other_dims(tensor):
    return [0, *range(2, tensor.dim())]


def stats(tensor, eps):
    """Mean and 1 / standard deviation of each channel."""
    variance, mean = torch.var_mean(tensor.float(), _other_dims(tensor), correction=0)
    return mean, (variance + eps).rsqrt()


def gather_stats(_, means, invstds, running_mean, running_var, momentum, eps, counts):
    """The statistics of all ranks in one; the running ones are brought up to date."""
    counts = counts.to(means.dtype).view(-1, 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    squares = ((invstds**-2 - eps + (means - mean) ** 2) * counts).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((squares / (total - 1)).to(running_var.dtype), momentum)
    return mean, (squares / total + eps).rsqrt()


def elemt(tensor, weight, bias, mean, invstd, _eps):
    """The normalized tensor."""
    result = (tensor.float() - _channels(mean, tensor)) * _channels(invstd, tensor)
    if weight is not None:
        result = result * _channels(weight.float(), tensor)
    if bias is not None:
        result = result + _channels(bias.float(), tensor)
    return result.to(tensor.dtype)


def backward_reduce(grad, tensor, mean, invstd, weight, input_g, weight_g, bias_g):
    """This rank's sums for the gradients."""
    dims, grad = _other_dims(tensor), grad.float()
    sum_dy = grad.sum(dims)
    sum_dy_xmu = (grad * (tensor.float() - _channels(mean, tensor))).sum(dims)
    dtype = mean.dtype if weight is None else weight.dtype
    return (
        sum_dy if input_g else None,
        sum_dy_xmu if input_g else None,
        (sum_dy_xmu * invstd).to(dtype) if weight_g else None,
        sum_dy.to(dtype, copy=True) if bias_g else None,
    )


def backward_elemt(grad, tensor, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    """The input's gradient, from the sums of all ranks."""
    total = count.sum()
    scale = invstd if weight is None else invstd * weight.float()
    projected = (tensor.float() - _channels(mean, tensor)) * _channels(invstd**2 * sum_dy_xmu / total, tensor)
    result = (grad.float() - _channels(sum_dy / total, tensor) - projected) * _channels(scale, tensor)
    return result.to(tensor.dtype)


def _kernel(name, function):
    def kernel(*args):
        counters.python_ops["aten::" + name] += 1
        index = args[0].device.index
        results = function(*[host(value) if isinstance(value, torch.Tensor) else value for value in args])
        if isinstance(results, torch.Tensor):
            return card(results, index)
        return tuple(None if result is None else card(result, index) for result in results)

    return kernel


def register():
    """Give npu tensors these kernels."""
    kernels = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }
    for name, function in kernels.items():
        _library.impl(name, _kernel(name, function), "PrivateUse1")
