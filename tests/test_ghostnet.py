"""GhostNet against timm's, written by others from the same paper and the same published code."""

import copy
import gc

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ghostnet.models.ghostnet import GhostNet, freeze_backbone, macs
from ghostnet.models.layers import Kept, round_channels

PUBLISHED = {0.5: "ghostnet_050", 1.0: "ghostnet_100", 1.3: "ghostnet_130"}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
LABELS = torch.tensor([3, 0])


@pytest.fixture(scope="module", params=PUBLISHED, ids=PUBLISHED.get)
def reference(request):
    """Width, and timm's model of it with BatchNorm statistics and weights as after some training."""
    torch.manual_seed(0)
    model = timm.create_model(PUBLISHED[request.param], num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return request.param, model


def parameters(width):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GhostNet(width=width).parameters())


def logits_and_gradients(model, training, dropout):
    """Logits, gradients by name and the state left behind, from a copy of the model."""
    model = copy.deepcopy(model).train(training)
    setattr(model, "dropout" if isinstance(model, GhostNet) else "drop_rate", dropout)
    torch.manual_seed(1)
    logits = model(IMAGES)
    F.cross_entropy(logits, LABELS).backward()
    return {
        "logits": logits.detach(),
        **{name: parameter.grad for name, parameter in model.named_parameters()},
        **{f"{name} (state)": value for name, value in model.state_dict().items()},
    }


def test_width_half_has_2587292_parameters():
    assert parameters(0.5) == 2_587_292


def test_width_1_has_5182508_parameters():
    assert parameters(1.0) == 5_182_508


def test_width_1_3_has_7358820_parameters():
    assert parameters(1.3) == 7_358_820


@pytest.mark.parametrize(
    ("training", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.5)], ids=["eval", "train", "train with dropout"]
)
def test_logits_gradients_and_statistics_are_those_of_timm(reference, training, dropout):
    width, theirs = reference
    ours = GhostNet(7, width)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = logits_and_gradients(theirs, training, dropout)
    actual = logits_and_gradients(ours, training, dropout)
    assert all(value is not None for value in actual.values())
    assert actual["logits"].std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_state_dict_loads_in_timm(reference):
    width, theirs = reference
    theirs = copy.deepcopy(theirs)
    torch.manual_seed(5)
    ours = GhostNet(7, width).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(IMAGES), theirs.eval()(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_seed_gives_the_initial_weights_of_timm():
    torch.manual_seed(3)
    ours = GhostNet(width=0.5).state_dict()
    torch.manual_seed(3)
    theirs = timm.create_model("ghostnet_050").state_dict()
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("width", [0.1, 0.35, 2.0])
def test_odd_widths_have_the_shapes_of_timm_and_run(width):
    with torch.device("meta"):
        theirs = timm.models.ghostnet._create_ghostnet("ghostnet_100", width=width).state_dict()
        ours = GhostNet(width=width).eval()
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.items()
    }
    assert ours(torch.empty(2, 3, 97, 33, device="meta")).shape == (2, 1000)


def test_channels_are_multiples_of_4_never_below_4_as_timm_rounds_them():
    wanted = [channels / 7 for channels in range(1, 9000)]
    assert [round_channels(channels) for channels in wanted] == [timm.layers.make_divisible(c, 4) for c in wanted]
    assert round_channels(0.001) == 4


def test_a_tiny_width_has_4_channels_and_trains():
    model = GhostNet(2, width=0.001)
    assert model.conv_stem.out_channels == 4
    model(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("width", [0, -1.0, float("nan"), float("inf")])
def test_a_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ValueError, match="width must be a positive number"):
        GhostNet(width=width)


def test_a_model_without_classes_is_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 1, not 0"):
        GhostNet(num_classes=0)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_outside_0_to_1_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        GhostNet(dropout=dropout)


def test_attributes_keep_what_the_model_was_made_with():
    model = GhostNet(num_classes=5, width=0.5, dropout=0.3)
    assert (model.num_classes, model.width, model.dropout) == (5, 0.5, 0.3)


@pytest.mark.parametrize(("width", "millions"), [(0.5, 42), (1.0, 141), (1.3, 227)])
def test_macs_at_224_px_are_the_published_ones(width, millions):
    assert round(macs(GhostNet(width=width), 224) / 1e6) == millions


def test_macs_of_the_stem_and_the_classifier_are_those_counted_by_hand():
    small, large = GhostNet(10, width=0.5), GhostNet(11, width=0.5)
    assert macs(large, 64) - macs(small, 64) == 1280
    with_features = [macs(small, size) for size in (32, 64, 128)]
    # All layers but those behind a global mean grow with the area; what is left is the same at every size.
    assert with_features[2] - with_features[1] == 4 * (with_features[1] - with_features[0])


def test_macs_disturbs_neither_the_model_nor_the_random_numbers():
    model = GhostNet(10, width=0.5).train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    macs(model, 64)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_frozen_backbone_trains_its_classifier_alone_and_keeps_its_batchnorm_statistics():
    model = GhostNet(4, width=0.5, dropout=0.0)
    freeze_backbone(model)
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "classifier.weight",
        "classifier.bias",
    ]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["classifier.weight", "classifier.bias"]


def test_freezing_holds_from_the_moment_it_is_asked_for_and_in_copies():
    model = GhostNet(4, width=0.5).train()
    freeze_backbone(model)
    for frozen in (model, copy.deepcopy(model).eval().train()):
        assert frozen.training
        assert frozen.classifier.training
        assert not any(module.training for module in frozen.modules() if isinstance(module, nn.BatchNorm2d))


def test_dropout_stays_on_above_a_frozen_backbone_and_off_in_eval_mode():
    model = GhostNet(4, width=0.5, dropout=0.5)
    freeze_backbone(model)
    assert not torch.equal(model.train()(IMAGES), model(IMAGES))
    assert torch.equal(model.eval()(IMAGES), model(IMAGES))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_what_the_backward_pass_makes_again_has_the_bits_of_what_it_would_keep(autocast, layout, monkeypatch):
    """And autograd holds on to a third less where it makes it again."""
    images = torch.randn(4, 3, 128, 128).contiguous(memory_format=layout)

    def run():
        gc.collect()
        others = [item for item in gc.get_objects() if type(item) is Kept]
        torch.manual_seed(0)
        model = GhostNet(5).to(memory_format=layout).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(images).float().square().mean()
        kept, known = {}, {id(item) for item in others}
        found = [item for item in gc.get_objects() if type(item) is Kept and id(item) not in known]
        for item in (item for item in found if item.tensor is not None):
            kept[item.tensor.data_ptr()] = item.tensor.untyped_storage().nbytes()
        for parameter in model.parameters():
            kept.pop(parameter.data_ptr(), None)
        loss.backward()
        return sum(kept.values()), [parameter.grad for parameter in model.parameters()]

    less, gradients = run()
    monkeypatch.setattr(Kept, "get", lambda item: item.tensor)
    monkeypatch.setattr("ghostnet.models.layers.is_same", lambda one, other: False)
    more, expected = run()
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert less < 0.67 * more
