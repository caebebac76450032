"""Kernels of the CPU against PyTorch's own, in double precision."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostnet.models import layers
from ghostnet.models.ghostnet import GhostNet
from ghostnet.models.kernels import RowNorm, StridedDepthwise
from ghostnet.models.layers import BatchNorm, Depthwise


def pictures(*shape, dtype=torch.float64, shift=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + shift
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 4, 3, 2), (5, 2, 1, 7)])
def test_the_gradients_of_batchnorm_by_rows_are_those_of_finite_differences(shape):
    weight, bias = (torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: RowNorm.apply(*x, 1e-5)[0], (pictures(*shape), weight, bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("shift", [0.0, 30.0])
@pytest.mark.parametrize("channels", [8, 36])
def test_batchnorm_by_rows_is_that_of_pytorch_with_its_gradients_and_statistics(dtype, tolerance, shift, channels):
    x = pictures(6, channels, 28, 28, dtype=dtype, shift=shift)
    own, plain = BatchNorm(channels), nn.BatchNorm2d(channels)
    for _ in range(2):  # batches
        nn.init.uniform_(own.weight, -1, 2)
        plain.load_state_dict(own.state_dict())
        grad = pictures(*x.shape, dtype=dtype).detach().roll(1, 0)
        exact = copy.deepcopy(plain).double()
        x64 = x.detach().double().requires_grad_()
        expected, actual = exact(x64), own(x)
        wanted = torch.autograd.grad(expected, (x64, exact.weight, exact.bias), grad.double())
        given = torch.autograd.grad(actual, (x, own.weight, own.bias), grad)
        assert "RowNorm" in type(actual.grad_fn).__name__
        assert actual.dtype == given[0].dtype == dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        # Where the mean is 30 deviations away, the last bit of x itself is worth more.
        scale = 1 + shift
        assert error(actual, expected) < tolerance * scale
        assert all(error(a, b) < tolerance * scale for a, b in zip(given, wanted, strict=True))
        state = {name: value.to(exact.state_dict()[name].dtype) for name, value in own.state_dict().items()}
        torch.testing.assert_close(state, dict(exact.state_dict()), rtol=1e-5, atol=1e-5)


def test_batchnorm_by_rows_is_for_training_on_a_cpu_with_few_channels_alone(monkeypatch):
    x, wide, contiguous = pictures(2, 8, 4, 4), pictures(2, 64, 4, 4), pictures(2, 8, 4, 4).detach().contiguous()
    norms = [BatchNorm(8).double(), BatchNorm(64).double(), BatchNorm(8).double(), BatchNorm(8).double().eval()]
    for norm, image in zip(norms, (x, wide, contiguous, x), strict=True):
        by_rows = type(norm(image).grad_fn).__name__ == "RowNormBackward"
        assert by_rows is (norm is norms[0])
    monkeypatch.setattr(layers, "lacks_kernels", lambda device: False)
    assert type(norms[0](x).grad_fn).__name__ != "RowNormBackward"


def test_one_value_a_channel_is_refused_as_by_pytorch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm(8)(torch.randn(1, 8, 1, 1))


def test_the_gradients_of_a_strided_depthwise_convolution_are_those_of_finite_differences():
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    apply = lambda x, weight: StridedDepthwise.apply(x, weight, (2, 2), (1, 1))  # noqa: E731
    assert torch.autograd.gradcheck(apply, (pictures(2, 3, 5, 6), weight))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_gradients_of_a_strided_depthwise_convolution_are_the_exact_ones_rounded(autocast):
    x, conv = pictures(4, 8, 10, 10, dtype=torch.bfloat16), Depthwise(8, 5, stride=2)
    conv = conv if autocast else conv.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = conv(x)
    grad = pictures(*out.shape, dtype=torch.bfloat16).detach()
    out.backward(grad)
    assert type(out.grad_fn).__name__ == "StridedDepthwiseBackward"
    x64, w64 = x.detach().double().requires_grad_(), conv.weight.detach().double().requires_grad_()
    wanted = F.conv2d(x64, w64, None, 2, 2, 1, 8)
    wanted.backward(grad.double())
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert conv.weight.grad.dtype == conv.weight.dtype
    for actual, expected in ((out, wanted), (x.grad, x64.grad), (conv.weight.grad, w64.grad)):
        assert error(actual, expected) < 4e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_of_ghostnet_is_that_of_pytorchs_own_kernels(precision, monkeypatch):
    images = pictures(8, 3, 64, 64, dtype=torch.float32).detach()
    torch.manual_seed(0)
    model = GhostNet(5, 0.5, dropout=0.0).to(memory_format=torch.channels_last)

    def step(cpu, double=False):
        monkeypatch.setattr(layers, "lacks_kernels", lambda device: cpu)
        twin = copy.deepcopy(model).double() if double else copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and not double):
            logits = twin(images.double() if double else images)
        F.cross_entropy(logits.double(), torch.arange(8) % 5).backward()
        return torch.cat([p.grad.double().flatten() for p in twin.parameters()]), twin.state_dict()

    exact, state = step(cpu=False, double=True)
    (plain, _), (own, own_state) = step(cpu=False), step(cpu=True)
    assert 0 < error(own, exact) < 1.1 * error(plain, exact) + 1e-7
    state = {name: value.to(own_state[name].dtype) for name, value in state.items()}
    tolerance = 1e-5 if precision == "fp32" else 0.05
    torch.testing.assert_close(dict(own_state), state, rtol=tolerance, atol=tolerance)
