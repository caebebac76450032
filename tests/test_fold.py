"""BatchNorm folded away against the model that has it."""

import copy

import pytest
import torch
from torch import nn

from ghostnet.amp import Bf16
from ghostnet.models.fold import folded
from ghostnet.models.ghostnet import GhostNet, freeze_backbone

CPU = torch.device("cpu")
IMAGES = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(7))
IMAGES = IMAGES.contiguous(memory_format=torch.channels_last)


def trained(width):
    """A model with BatchNorm's weights and statistics as after some training, logits of deviation 1 around 0."""
    torch.manual_seed(0)
    model = GhostNet(7, width).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        for _ in range(30):
            model(IMAGES)
        model.eval()
        logits = model(IMAGES)
        model.classifier.weight /= logits.std(0).view(-1, 1)
        model.classifier.bias -= model(IMAGES).mean(0)
    return model


@pytest.fixture(scope="module", params=[0.5, 1.0, 1.3])
def model(request):
    return trained(request.param)


def test_logits_are_those_of_the_model_with_batchnorm(model):
    expected, actual = model(IMAGES), folded(model)(IMAGES)
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.argsort(1), expected.argsort(1))


def test_bf16_is_no_further_from_fp32_than_autocast_of_the_model_with_batchnorm(model):
    amp = Bf16()
    with torch.inference_mode():
        exact = model(IMAGES)
        by_autocast = (amp.forward(model, IMAGES) - exact).square().mean().sqrt()
        by_folding = (amp.forward(amp.for_evaluation(model, CPU), IMAGES) - exact).square().mean().sqrt()
    assert 0 < by_folding < 1.2 * by_autocast


def test_no_batchnorm_is_left_and_the_model_itself_is_untouched(model):
    before = copy.deepcopy(model.state_dict())
    copied = folded(model.train())
    assert model.training
    assert not copied.training
    assert not [module for module in copied.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(module.bias is not None for module in copied.modules() if isinstance(module, nn.Conv2d))
    model.eval()
    assert len([module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]) == 80
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not set(copied.state_dict()) >= set(before)


def test_a_frozen_model_and_a_synchronized_one_fold_too():
    model = trained(0.5)
    expected = model(IMAGES)
    freeze_backbone(model)
    torch.testing.assert_close(folded(model)(IMAGES), expected, rtol=1e-4, atol=1e-4)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(folded(synchronized)(IMAGES), expected, rtol=1e-4, atol=1e-4)
