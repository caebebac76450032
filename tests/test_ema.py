"""The moving average against its formula in a plain loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostnet import optim
from ghostnet.amp import O2, Amp
from ghostnet.ema import Ema

CPU = torch.device("cpu")
IMAGES = torch.randn(6, 8, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).train()


def training(amp, model):
    """The step after each update."""
    optimizer = amp.initialize(
        model, lambda named: optim.sgd(named, lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False), CPU
    )
    for step in range(6):
        amp.backward(F.cross_entropy(amp.forward(model, IMAGES[step]), torch.arange(8) % 5))
        amp.step(optimizer, None)
        yield step + 1


@pytest.mark.parametrize("decay", [0.3, 0.999])
@pytest.mark.parametrize("make", [Amp, lambda: O2(128.0)], ids=["none", "o2"])
def test_the_average_follows_parameters_and_buffers_by_the_formula(make, decay):
    amp, model = make(), net()
    ema = Ema(model, decay)
    expected = {name: value.double() for name, value in copy.deepcopy(model.state_dict()).items()}
    for step in training(amp, model):
        ema.update(amp.weights(model), step)
        weight = 1 - min(decay, (1 + step) / (10 + step))
        for name, value in amp.weights(model).items():
            expected[name] += weight * (value.double() - expected[name])
    expected["1.num_batches_tracked"] = torch.tensor(6)
    torch.testing.assert_close(dict(ema.state_dict()), expected, rtol=1e-5, atol=1e-7, check_dtype=False)
    for name in ("0.weight", "4.bias", "1.running_var"):
        assert not torch.equal(ema.module.state_dict()[name], amp.weights(model)[name]), name


def test_the_decay_grows_with_the_steps_up_to_its_value():
    ema, ones = Ema(nn.Linear(1, 1), decay=0.8), {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    kept = {}
    for step in (0, 1, 5, 26, 35, 36, 100_000):
        for parameter in ema.module.parameters():
            parameter.zero_()
        ema.update(ones, step)
        kept[step] = 1 - ema.module.weight.item()
    expected = {0: 1 / 10, 1: 2 / 11, 5: 6 / 15, 26: 27 / 36, 35: 0.8, 36: 0.8, 100_000: 0.8}
    assert kept == pytest.approx(expected, rel=1e-6)


def test_the_average_is_fp32_in_eval_mode_without_gradients_and_apart_from_the_model():
    model = net().bfloat16()
    ema = Ema(model, 0.9)
    assert not any(module.training for module in ema.module.modules())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert {v.dtype for v in ema.module.state_dict().values()} == {torch.float32, torch.int64}
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = copy.deepcopy(ema.module.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    torch.testing.assert_close(ema.module.state_dict(), before, rtol=0, atol=0)


def test_the_average_of_o2_is_of_the_fp32_masters_not_of_their_rounded_copies():
    amp, model = O2(128.0), net()
    ema = Ema(model, 1e-6)  # so small a decay that the average is the weights themselves
    for step in training(amp, model):
        ema.update(amp.weights(model), step)
    average, half = ema.module.state_dict(), model.state_dict()["4.weight"]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(average["4.weight"], amp.masters["4.weight"].detach(), rtol=1e-4, atol=1e-7)
    assert (average["4.weight"] - half).abs().max() > 10 * (average["4.weight"] - amp.masters["4.weight"]).abs().max()


def test_an_update_builds_no_graph_and_leaves_the_model_as_it_was():
    amp, model = Amp(), net()
    ema = Ema(model, 0.9)
    for step in training(amp, model):
        before = copy.deepcopy(model.state_dict())
        ema.update(amp.weights(model), step)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(value.grad_fn is None and not value.requires_grad for value in ema.module.state_dict().values())
