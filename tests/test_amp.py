"""Each precision against the same training written out by hand, O2 straight from the eight points of its definition."""

import contextlib
import copy
import io
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostnet import optim
from ghostnet.amp import O2, Amp, Apex, Bf16, Fp16
from ghostnet.errors import UserError
from ghostnet.loss_scale import grad_scaler
from ghostnet.models.ghostnet import STAGES, GhostNet, freeze_backbone

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(8, 8, 3, 32, 32, generator=GENERATOR)
LABELS = torch.randint(4, (8, 8), generator=GENERATOR)
"""Eight batches of eight."""

OPTIMIZERS = {
    "sgd": lambda named: optim.sgd(named, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=False),
    "fused_sgd": lambda named: optim.fused_sgd(named, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=False),
    "adamw": lambda named: optim.adamw(named, lr=0.01, betas=[0.9, 0.99], weight_decay=0.01, eps=1e-8),
}
AMPS = {
    "none": Amp,
    "bf16": Bf16,
    "fp16 static": lambda: Fp16(128.0),
    "fp16 dynamic": lambda: Fp16("dynamic"),
    "o2 static": lambda: O2(128.0),
    "o2 dynamic": lambda: O2("dynamic"),
}
VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"clip": 0.1}, id="clipped"),
    pytest.param({"clip": 0.1, "accumulate": 2, "optimizer": "adamw"}, id="clipped, accumulated, adamw"),
    pytest.param({"clip": 0.1, "optimizer": "fused_sgd"}, id="clipped, fused_sgd"),
    pytest.param({"clip": 0.1, "frozen": True}, id="frozen, clipped"),
]


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    """Two of GhostNet's nine stages, with all its kinds of layers, for speed."""
    monkeypatch.setattr("ghostnet.models.ghostnet.STAGES", (STAGES[0], STAGES[3]))


def ghostnet(frozen=False, seed=0):
    torch.manual_seed(seed)
    model = GhostNet(4, width=0.1, dropout=0.2).to(memory_format=torch.channels_last)
    if frozen:
        freeze_backbone(model)
    return model.train()


def batch(number, accumulate):
    """The batch of a forward pass with its seed set; an accumulated one counts for its share."""
    torch.manual_seed(number)
    return IMAGES[number % 8].contiguous(memory_format=torch.channels_last), LABELS[number % 8], 1 / accumulate


def train(amp, steps, *, clip=None, accumulate=1, frozen=False, optimizer="sgd", overflow=()):
    """The room's own: -> losses, the state that a checkpoint would hold."""
    model = ghostnet(frozen)
    optimizer = amp.initialize(model, OPTIMIZERS[optimizer], CPU)
    losses = go_on(amp, model, optimizer, range(steps), clip, accumulate, overflow)
    return losses, amp.weights(model), optimizer.state_dict(), model.state_dict()


def go_on(amp, model, optimizer, steps, clip=None, accumulate=1, overflow=()):
    losses = []
    for step in steps:
        for part in range(accumulate):
            images, labels, share = batch(step * accumulate + part, accumulate)
            loss = F.cross_entropy(amp.forward(model, images), labels)
            losses.append(loss.item())
            amp.backward(loss * share * (math.inf if step in overflow else 1))
        amp.step(optimizer, clip)
    return losses


def by_hand(steps, autocast=None, scale=1.0, *, clip=None, accumulate=1, frozen=False, optimizer="sgd", overflow=()):
    """fp32, or torch.autocast with its GradScaler ("dynamic") or a fixed scale."""
    model, losses = ghostnet(frozen), []
    scaler = torch.amp.GradScaler("cpu", enabled=scale == "dynamic")
    fixed = 1.0 if scale == "dynamic" else scale
    optimizer = OPTIMIZERS[optimizer](list(model.named_parameters()))
    for step in range(steps):
        for part in range(accumulate):
            images, labels, share = batch(step * accumulate + part, accumulate)
            with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            losses.append(loss.item())
            scaler.scale(loss * share * (math.inf if step in overflow else 1) * fixed).backward()
        scaler.unscale_(optimizer)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= fixed
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses, model.state_dict(), optimizer.state_dict(), model.state_dict()


def o2_by_hand(steps, scale, *, clip=None, accumulate=1, frozen=False, optimizer="sgd", overflow=(), interval=2000):
    """The eight points of O2, one by one, with bfloat16 for half: that is what it is on the CPU. -> also the scale."""
    model, losses = ghostnet(frozen), []
    dynamic, clean = scale == "dynamic", 0
    scale = 2.0**16 if dynamic else scale
    norms = {id(p) for module in model.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()}
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():  # 1
        if id(parameter) not in norms:
            parameter.data = parameter.data.bfloat16()
    masters = {  # 3
        name: p if id(p) in norms else full[name].requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
    }
    optimizer = OPTIMIZERS[optimizer]((name, master) for name, master in masters.items() if master.requires_grad)
    trained = [(p, masters[name]) for name, p in model.named_parameters() if p.requires_grad]
    for step in range(steps):
        for part in range(accumulate):
            images, labels, share = batch(step * accumulate + part, accumulate)
            loss = F.cross_entropy(model(images.bfloat16()).float(), labels)  # 2
            losses.append(loss.item())
            (loss * share * (math.inf if step in overflow else 1) * scale).backward()  # 4
        for parameter, master in trained:  # 5
            master.grad = parameter.grad.float() / scale
        if dynamic and not all(master.grad.isfinite().all() for _, master in trained):  # 6
            scale, clean = scale / 2, 0
        else:
            clean += 1
            if dynamic and clean == interval:
                scale, clean = min(2 * scale, 2.0**24), 0
            if clip:
                nn.utils.clip_grad_norm_([master for _, master in trained], clip)
            optimizer.step()  # 7
            with torch.no_grad():
                for parameter, master in trained:
                    parameter.copy_(master)
        for parameter, master in trained:
            parameter.grad = master.grad = None
    weights = model.state_dict() | {name: master.detach() for name, master in masters.items()}  # 8
    return (losses, weights, optimizer.state_dict(), model.state_dict()), scale


def scaler(**settings):
    return torch.amp.GradScaler("cpu", **settings)


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_none_is_a_plain_fp32_loop_bit_for_bit(variant):
    assert_same_bits(train(Amp(), 3, **variant), by_hand(3, **variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_is_a_loop_under_autocast_bit_for_bit(variant):
    assert_same_bits(train(Bf16(), 3, **variant), by_hand(3, torch.bfloat16, **variant))


@pytest.mark.parametrize("scale", [128.0, "dynamic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp16_is_a_loop_under_autocast_with_a_loss_scale_bit_for_bit(scale, variant):
    assert_same_bits(train(Fp16(scale), 3, **variant), by_hand(3, torch.float16, scale, **variant))


def test_fp16_with_a_dynamic_scale_skips_the_steps_that_torchs_scaler_skips():
    amp = Fp16("dynamic")
    assert_same_bits(
        train(amp, 5, clip=0.1, overflow={1, 3}), by_hand(5, torch.float16, "dynamic", clip=0.1, overflow={1, 3})
    )
    assert amp.state_dict()["scale"] <= 2.0**14


@pytest.mark.parametrize("scale", [128.0, "dynamic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_o2_is_its_eight_points_written_out_bit_for_bit(scale, variant):
    assert_same_bits(train(O2(scale), 3, **variant), o2_by_hand(3, scale, **variant)[0])


def test_o2_with_a_dynamic_scale_skips_a_step_that_overflows_and_halves_the_scale():
    amp = O2("dynamic")
    actual = train(amp, 5, clip=0.1, overflow={0, 3})
    expected, scale = o2_by_hand(5, "dynamic", clip=0.1, overflow={0, 3})
    assert_same_bits(actual, expected)
    assert amp.state_dict()["scale"] == scale == 2.0**14
    # BatchNorm's running statistics are of the forward passes, so they moved; nothing that is trained did.
    skipped = train(O2("dynamic"), 1, overflow={0})
    for name, parameter in ghostnet().named_parameters():
        assert torch.equal(skipped[1][name], parameter), name
    assert skipped[1]["bn1.num_batches_tracked"] == 1


def test_o2_doubles_a_dynamic_scale_after_so_many_clean_steps_in_a_row(monkeypatch):
    assert grad_scaler(CPU).get_growth_interval() == 2000
    monkeypatch.setattr("ghostnet.loss_scale.grad_scaler", lambda device: scaler(growth_interval=2))
    amp = O2("dynamic")
    actual = train(amp, 7, overflow={1})
    expected, scale = o2_by_hand(7, "dynamic", overflow={1}, interval=2)
    assert_same_bits(actual, expected)
    # 1 clean, overflow, 2 clean, 2 clean, 1 clean
    assert amp.state_dict()["scale"] == scale == 2.0**16 / 2 * 2 * 2
    assert amp.state_dict()["_growth_tracker"] == 1


def test_o2_never_takes_a_dynamic_scale_beyond_2_to_the_24(monkeypatch):
    monkeypatch.setattr("ghostnet.loss_scale.grad_scaler", lambda device: scaler(growth_interval=1))
    amp = O2("dynamic")
    train(amp, 12, frozen=True)
    assert amp.state_dict()["scale"] == 2.0**24


@pytest.mark.parametrize("make", [lambda: O2(128.0), lambda: Fp16(128.0)], ids=["o2", "fp16"])
def test_a_static_scale_is_never_checked_and_never_skips(make):
    weights = train(make(), 2, overflow={1})[1]
    assert not weights["classifier.weight"].isfinite().any()


def test_o2_stays_close_to_fp32_over_sixty_steps():
    """Of a plain net, since GhostNet's own BatchNorm at 32 px is over single pixels, where any rounding grows."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 3, 32, 32, generator=generator)
    labels = torch.randint(4, (60, 32), generator=generator)
    images = 0.3 * patterns[labels] + torch.randn(60, 32, 3, 32, 32, generator=generator)

    def curve_and_weights(amp):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4)),
        )
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = amp.initialize(
            model, lambda named: optim.sgd(named, lr=0.02, momentum=0.9, weight_decay=1e-4, nesterov=False), CPU
        )
        losses = torch.zeros(60)
        for step in range(60):
            loss = F.cross_entropy(amp.forward(model, images[step]), labels[step])
            losses[step] = loss.detach()
            amp.backward(loss)
            amp.step(optimizer, 2.0)
        weights = amp.weights(model)
        return losses, torch.cat([weights[name].flatten() for name, _ in model.named_parameters()]) - start

    (plain, moved), (o2, moved_in_o2) = curve_and_weights(Amp()), curve_and_weights(O2(128.0))
    assert plain[-10:].mean() < 0.6 * plain[:10].mean()
    # Measured with torch 2.14: 2e-4, and 1.6 % of the way that the weights went.
    torch.testing.assert_close(o2.view(6, 10).mean(1), plain.view(6, 10).mean(1), rtol=0, atol=5e-3)
    assert (moved_in_o2 - moved).norm() < 0.05 * moved.norm()


def test_o2_keeps_batchnorm_in_fp32_and_its_parameters_are_their_own_masters():
    model, amp = ghostnet(), O2(128.0)
    optimizer = amp.initialize(model, OPTIMIZERS["sgd"], CPU)
    go_on(amp, model, optimizer, range(2))
    norms = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key in ("weight", "bias", "running_mean", "running_var")
    }
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == (torch.float32 if name in norms else torch.bfloat16), name
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in updated) == (name in norms), name
    assert len(updated) == len(list(model.parameters()))
    assert all(p.dtype == torch.float32 for group in optimizer.param_groups for p in group["params"])
    weights = amp.weights(model)
    assert all(
        weights[name].data_ptr() == value.data_ptr() for name, value in model.state_dict().items() if name in norms
    )


def test_o2_holds_the_rounded_masters_after_every_step_and_keeps_frozen_weights_whole():
    before = ghostnet().state_dict()
    model, amp = ghostnet(frozen=True), O2(128.0)
    optimizer = amp.initialize(model, OPTIMIZERS["adamw"], CPU)
    go_on(amp, model, optimizer, range(2))
    weights = amp.weights(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value, weights[name].to(value.dtype))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) > 20
    assert_same_bits({name: weights[name] for name in frozen}, {name: before[name] for name in frozen})


def assert_goes_on_bit_for_bit(name, make, optimizer):
    """Saved and loaded in the middle, a training ends in the bits of one that went through."""
    clip, overflow = 0.1, {1} if "dynamic" in name else ()
    amp, model = make(), ghostnet()
    made = amp.initialize(model, OPTIMIZERS[optimizer], CPU)
    go_on(amp, model, made, range(3), clip, overflow=overflow)
    file = io.BytesIO()
    torch.save((amp.weights(model), made.state_dict(), amp.state_dict()), file)
    go_on(amp, model, made, range(3, 6), clip)

    file.seek(0)
    weights, optimizer_state, amp_state = torch.load(file, weights_only=True)
    resumed, twin = make(), ghostnet(seed=1)
    remade = resumed.initialize(twin, OPTIMIZERS[optimizer], CPU)
    resumed.load_weights(twin, weights)
    remade.load_state_dict(optimizer_state)
    resumed.load_state_dict(amp_state)
    assert_same_bits(resumed.weights(twin), weights)
    go_on(resumed, twin, remade, range(3, 6), clip)
    assert_same_bits(resumed.weights(twin), amp.weights(model))
    assert_same_bits(twin.state_dict(), model.state_dict())
    assert_same_bits(remade.state_dict(), made.state_dict())
    assert resumed.state_dict() == amp.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", AMPS)
def test_saved_and_loaded_in_the_middle_a_training_goes_on_bit_for_bit(name, optimizer):
    assert_goes_on_bit_for_bit(name, AMPS[name], optimizer)


@pytest.mark.parametrize("kind", [Fp16, O2])
def test_a_fixed_scale_is_what_the_command_says_whatever_scale_a_checkpoint_had(kind):
    fixed, moving, new, started = kind(64.0), kind("dynamic"), kind("dynamic"), kind("dynamic")
    train(moving, 2, overflow={0, 1})
    fixed.load_state_dict(moving.state_dict())
    assert fixed.loss_scale.number == 64.0
    assert_same_bits(train(fixed, 2), train(kind(64.0), 2))
    started.load_state_dict(fixed.state_dict())
    assert_same_bits(train(started, 2), train(new, 2))
    assert started.state_dict() == new.state_dict() != moving.state_dict()


@pytest.mark.parametrize("name", AMPS)
def test_logits_are_fp32_in_training_and_evaluation(name):
    amp, model = AMPS[name](), ghostnet()
    amp.initialize(model, OPTIMIZERS["sgd"], CPU)
    assert amp.forward(model, IMAGES[0]).dtype == torch.float32
    average = ghostnet().eval()
    for evaluated in (model.eval(), amp.for_evaluation(average, CPU), AMPS[name]().for_evaluation(average, CPU)):
        with torch.inference_mode():
            logits = amp.forward(evaluated, IMAGES[0])
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, average(IMAGES[0]), rtol=0.1, atol=0.05)


def test_o2_evaluates_the_average_in_half_precision_and_leaves_it_in_fp32():
    average, amp = ghostnet().eval(), O2(128.0)
    before = copy.deepcopy(average.state_dict())
    module = amp.for_evaluation(average, CPU)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert_same_bits(average.state_dict(), before)
    assert_same_bits(module.classifier.weight, average.classifier.weight.bfloat16())


@pytest.mark.parametrize("name", AMPS)
def test_a_model_that_is_not_ghostnet_is_evaluated_with_its_batchnorm(name):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    amp = AMPS[name]()
    logits = amp.forward(amp.for_evaluation(model, CPU), IMAGES[0])
    torch.testing.assert_close(logits, model(IMAGES[0]), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("make", [Bf16, lambda: Fp16("dynamic")], ids=["bf16", "fp16"])
def test_autocast_computes_in_half_precision_with_fp32_weights(make):
    amp, model, seen = make(), ghostnet(), []
    amp.initialize(model, OPTIMIZERS["sgd"], CPU)
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    amp.forward(model, IMAGES[0])
    assert seen == [amp.dtype]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Apex

STAND_IN = '''
"""What O2 needs of apex.amp, as its documentation and its source have it, with bfloat16 for half."""
import contextlib
import torch
from torch import nn

calls = []
state = {}


def initialize(model, optimizer, opt_level, loss_scale, verbosity, **options):
    calls.append(("initialize", opt_level, loss_scale, options))
    state.update(loss_scale=loss_scale, unskipped=0)
    for module in model.modules():
        if not isinstance(module, nn.BatchNorm2d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    forward, step = model.forward, optimizer.step
    model.forward = lambda images: forward(images.bfloat16()).float()
    optimizer.pairs = []

    def make_masters():
        if optimizer.pairs:
            return
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.dtype == torch.bfloat16:
                    master = parameter.detach().clone().float().requires_grad_()
                    group["params"][index] = master
                    if parameter in optimizer.state:
                        optimizer.state[master] = optimizer.state.pop(parameter)
                    optimizer.pairs.append((parameter, master))
        optimizer.load_state_dict(optimizer.state_dict())

    def zero_grad():
        calls.append("zero_grad")
        make_masters()
        for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
            parameter.grad = None
        for half, _ in optimizer.pairs:
            half.grad = None

    def step_and_copy():
        calls.append("step")
        step()
        with torch.no_grad():
            for half, master in optimizer.pairs:
                half.copy_(master)

    optimizer.make_masters, optimizer.zero_grad, optimizer.step = make_masters, zero_grad, step_and_copy
    return model, optimizer


@contextlib.contextmanager
def scale_loss(loss, optimizer):
    calls.append("scale_loss")
    optimizer.make_masters()
    yield loss.float() * state["loss_scale"]
    for half, master in optimizer.pairs:
        master.grad = half.grad.float()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad /= state["loss_scale"]
    state["unskipped"] += 1
    calls.append("unscaled")


def master_params(optimizer):
    calls.append("master_params")
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def state_dict():
    return dict(state)


def load_state_dict(saved):
    state.update(saved)
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a package (files by name) the one that `import apex` finds."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]

    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        forget()

    forget()
    yield write
    forget()


@pytest.fixture
def apex(install):
    install({"apex/__init__.py": "", "apex/amp.py": STAND_IN})
    import apex.amp

    return apex.amp


def test_apex_is_called_in_the_order_of_its_documentation(apex):
    amp, model = Apex(128.0), ghostnet()
    optimizer = amp.initialize(model, OPTIMIZERS["sgd"], CPU)
    assert apex.calls == [("initialize", "O2", 128.0, {}), "zero_grad"]
    apex.calls.clear()
    go_on(amp, model, optimizer, range(1), clip=0.1)
    assert apex.calls == ["scale_loss", "unscaled", "master_params", "step", "zero_grad"]
    apex.calls.clear()
    go_on(amp, model, optimizer, range(1))
    assert apex.calls == ["scale_loss", "unscaled", "master_params", "step", "zero_grad"]


def test_apex_counts_no_pass_of_a_step_that_is_given_up(apex):
    amp, model = Apex(128.0), ghostnet()
    optimizer = amp.initialize(model, OPTIMIZERS["sgd"], CPU)
    go_on(amp, model, optimizer, range(1))
    before = amp.state_dict()
    for _ in range(2):
        amp.backward(model(torch.randn(2, 3, 32, 32)).sum())
    assert amp.state_dict() != before
    amp.put_back()
    assert amp.state_dict() == before
    amp.put_back()
    assert amp.state_dict() == before


def test_apex_combines_gradients_on_npus(apex):
    Apex("dynamic").initialize(ghostnet(), OPTIMIZERS["sgd"], SimpleNamespace(type="npu"))
    assert apex.calls[0] == ("initialize", "O2", "dynamic", {"combine_grad": True})


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_apex_and_o2_train_the_same_bits_from_weights_that_half_precision_holds(apex, optimizer, clip, monkeypatch):
    rounded = ghostnet()
    for name, parameter in rounded.named_parameters():
        if parameter.ndim > 1 or "conv" in name or "classifier" in name:
            parameter.data = parameter.data.bfloat16().float()
    monkeypatch.setitem(globals(), "ghostnet", lambda frozen: copy.deepcopy(rounded))
    settings = {"clip": clip, "optimizer": optimizer}
    (losses, weights, _, _), expected = train(Apex(128.0), 2, **settings), train(O2(128.0), 2, **settings)
    # apex adds up the norm in the optimizer's order, O2 in the model's.
    rounding = 1e-5 if clip else 0
    torch.testing.assert_close((losses, weights), (expected[0], dict(expected[1])), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_apex_goes_on_bit_for_bit_from_saved_masters(apex, optimizer):
    assert_goes_on_bit_for_bit("apex", lambda: Apex(128.0), optimizer)


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"apex/__init__.py": ""}, id="a package without amp"),
        pytest.param({"apex.py": "amp = None"}, id="a module"),
        pytest.param({"apex/__init__.py": "print 'Python 2'"}, id="a package of Python 2"),
        pytest.param({"apex/__init__.py": "import pyramid_of_2013"}, id="a package that lacks another"),
        pytest.param({"apex/__init__.py": "", "apex/amp.py": "raise RuntimeError('no card')"}, id="a broken apex"),
    ],
)
def test_what_is_named_apex_and_is_not_ascends_is_refused_with_the_way_out(install, files):
    install(files)
    with pytest.raises(UserError, match=r"amp=apex needs Ascend's apex.*amp=o2 does the same without it"):
        Apex(128.0)


def test_without_apex_the_message_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"amp=apex needs Ascend's apex.*amp=o2 does the same without it"):
        Apex(128.0)
