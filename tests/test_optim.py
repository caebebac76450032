"""Parameter groups and optimizers against torch's own called by hand, schedules against the reference's formula."""

import copy
import math
from collections.abc import Callable

import pytest
import timm.scheduler
import torch
from torch import nn
from torch.nn import functional as F

from ghostnet import optim
from ghostnet.models.ghostnet import GhostNet, freeze_backbone
from ghostnet.optim import Timeline

DECAY = 0.05
CHANNELS_LAST = torch.channels_last
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=CHANNELS_LAST)
LABELS = torch.tensor([0, 1, 2, 0])

OURS = {
    "sgd": lambda named: optim.sgd(named, lr=0.1, momentum=0.9, weight_decay=DECAY, nesterov=False),
    "sgd nesterov": lambda named: optim.sgd(named, lr=0.1, momentum=0.9, weight_decay=DECAY, nesterov=True),
    "sgd without momentum": lambda named: optim.sgd(named, lr=0.1, momentum=0.0, weight_decay=DECAY, nesterov=False),
    "fused_sgd": lambda named: optim.fused_sgd(named, lr=0.1, momentum=0.9, weight_decay=DECAY, nesterov=False),
    "fused_sgd nesterov": lambda named: optim.fused_sgd(named, lr=0.1, momentum=0.9, weight_decay=DECAY, nesterov=True),
    "fused_sgd without momentum": lambda named: optim.fused_sgd(
        named, lr=0.1, momentum=0.0, weight_decay=DECAY, nesterov=False
    ),
    "rmsprop": lambda named: optim.rmsprop(named, lr=0.01, momentum=0.9, weight_decay=DECAY, alpha=0.9, eps=1e-3),
    "adamw": lambda named: optim.adamw(named, lr=0.01, betas=[0.8, 0.99], weight_decay=DECAY, eps=1e-6),
}
TORCHS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9),
    "sgd nesterov": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True),
    "sgd without momentum": lambda groups: torch.optim.SGD(groups, 0.1),
    "fused_sgd": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, fused=True),
    "fused_sgd nesterov": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True, fused=True),
    "fused_sgd without momentum": lambda groups: torch.optim.SGD(groups, 0.1, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, 0.01, momentum=0.9, alpha=0.9, eps=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, betas=(0.8, 0.99), eps=1e-6, fused=True),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GhostNet(3, width=0.1, dropout=0.0).to(memory_format=CHANNELS_LAST)


def update(model, optimizer, steps):
    for _ in range(steps):
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OURS)
def test_an_optimizer_is_torchs_own_made_by_hand_with_two_groups(name, model):
    twin = copy.deepcopy(model)
    is_norm_or_bias = {
        id(p) for module in twin.modules() if isinstance(module, nn.BatchNorm2d) for p in [*module.parameters()]
    }
    is_norm_or_bias |= {id(p) for key, p in twin.named_parameters() if key.endswith("bias")}
    groups = [
        {"params": [p for p in twin.parameters() if id(p) not in is_norm_or_bias], "weight_decay": DECAY},
        {"params": [p for p in twin.parameters() if id(p) in is_norm_or_bias], "weight_decay": 0.0},
    ]
    update(twin, TORCHS[name](groups), steps=3)
    start = copy.deepcopy(model.state_dict())
    update(model, OURS[name](model.named_parameters()), steps=3)
    assert_same_bits(model.state_dict(), twin.state_dict())
    assert not torch.equal(model.classifier.weight, start["classifier.weight"])


@pytest.mark.parametrize("name", OURS)
def test_weight_decay_moves_kernels_and_matrices_and_nothing_of_one_dimension(name, model):
    before = copy.deepcopy(model.state_dict())
    optimizer = OURS[name](model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) == (parameter.ndim == 1), key


@pytest.mark.parametrize("name", OURS)
def test_frozen_parameters_are_left_out_and_a_group_may_be_empty(name):
    torch.manual_seed(0)
    ghostnet = GhostNet(3, width=0.1)
    freeze_backbone(ghostnet)
    optimizer = OURS[name](ghostnet.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in ghostnet.classifier.parameters()}

    matrix = nn.Linear(4, 3, bias=False)
    before = matrix.weight.detach().clone()
    optimizer = OURS[name](matrix.named_parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    matrix(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert not torch.equal(matrix.weight, before)


@pytest.mark.parametrize("name", OURS)
def test_an_optimizer_goes_on_bit_for_bit_from_its_saved_state(name, model, tmp_path):
    optimizer = OURS[name](model.named_parameters())
    update(model, optimizer, steps=2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    update(model, optimizer, steps=2)

    torch.manual_seed(9)
    twin = GhostNet(3, width=0.1, dropout=0.0).to(memory_format=CHANNELS_LAST)
    resumed = OURS[name](twin.named_parameters())
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    update(twin, resumed, steps=2)
    assert_same_bits(twin.state_dict(), model.state_dict())
    assert_same_bits(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", OURS)
def test_a_state_is_taken_over_from_a_device_with_another_memory_layout(name, model, tmp_path):
    twin = copy.deepcopy(model)
    optimizer, other = OURS[name](model.named_parameters()), OURS[name](twin.named_parameters())
    update(model, optimizer, steps=2)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    weights, saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    for state in saved["state"].values():
        for key, value in state.items():
            if value is not None:
                state[key] = value.contiguous()
    twin.load_state_dict(weights)
    optim.load_state(other, saved)
    before = copy.deepcopy(saved)
    update(model, optimizer, steps=2)
    update(twin, other, steps=2)
    assert_same_bits(twin.state_dict(), model.state_dict())
    assert_same_bits(other.state_dict(), optimizer.state_dict())
    assert_same_bits(saved, before)  # nothing of it is shared


def test_a_state_is_taken_over_without_the_settings_that_it_was_made_with(model):
    def adamw(weight_decay, lr):
        return optim.adamw(model.named_parameters(), lr=lr, betas=[0.9, 0.99], weight_decay=weight_decay, eps=1e-8)

    first, second = adamw(0.1, lr=0.5), adamw(0.3, lr=0.7)
    update(model, first, steps=1)
    optim.load_state(second, first.state_dict())
    assert [group["weight_decay"] for group in second.param_groups] == [0.3, 0.0]
    assert [group["lr"] for group in second.param_groups] == [0.5, 0.5]
    assert len(second.state) == len(list(model.parameters()))


def test_a_first_step_skipped_for_an_overflow_leaves_no_trace_in_the_momentum(request):
    # With these, torch fills memory that nobody has written with NaN.
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = optim.fused_sgd([("weight", weight)], lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False)
    optimizer.found_inf = torch.ones(())  # what GradScaler tells a fused optimizer
    weight.grad = torch.full_like(weight, math.inf)
    optimizer.step()
    optimizer.found_inf = torch.zeros(())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((8, 8), 0.9))


@pytest.mark.parametrize(("global_batch_size", "expected"), [(1024, 0.4), (8 * 1024, 3.2), (256, 0.1), (128, 0.05)])
def test_the_learning_rate_is_given_for_1024_images_and_scaled_with_the_global_batch(global_batch_size, expected):
    assert optim.scaled_lr(0.4, global_batch_size) == pytest.approx(expected, rel=1e-15)


def reference_lr(epoch, lr, epochs, warmup_epochs=4, warmup_lr=1e-6, min_lr=1e-5):
    """Of an epoch, by the formula that the reference's scripts follow."""
    if epoch < warmup_epochs:
        return warmup_lr + epoch * (lr - warmup_lr) / warmup_epochs
    if epoch < epochs:
        return min_lr + 1 / 2 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))
    return min_lr


def cosine(peak, epochs, steps_per_epoch, interval, warmup_epochs=4.0, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=0):
    return optim.cosine(
        Timeline(peak, epochs, steps_per_epoch),
        warmup_epochs=warmup_epochs,
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        cooldown_epochs=cooldown_epochs,
        interval=interval,
    )


@pytest.mark.parametrize(
    ("lr", "epochs", "cooldown"), [(0.4, 10, 10), (0.4, 40, 10), (0.4, 5, 0), (3.2, 400, 10), (3.2, 4, 0)]
)
def test_cosine_once_an_epoch_is_the_formula_of_the_reference(lr, epochs, cooldown):
    schedule = cosine(lr, epochs, 5, "epoch", cooldown_epochs=cooldown)
    for epoch in range(epochs + cooldown):
        of_epoch = {schedule(step) for step in range(5 * epoch, 5 * (epoch + 1))}
        assert of_epoch == {reference_lr(epoch, lr, epochs)}, epoch


def test_cosine_every_step_is_the_formula_of_the_reference_at_a_fractional_epoch():
    schedule = cosine(0.4, 10, 7, "step", cooldown_epochs=2)
    assert [schedule(step) for step in range(7 * 12)] == [reference_lr(step / 7, 0.4, 10) for step in range(7 * 12)]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_cosine_is_timms(interval):
    epochs, steps, cooldown = 12, 6, 3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    unit = steps if interval == "step" else 1
    timms = timm.scheduler.CosineLRScheduler(
        optimizer,
        t_initial=epochs * unit,
        lr_min=1e-5,
        warmup_t=4 * unit,
        warmup_lr_init=1e-6,
        t_in_epochs=interval == "epoch",
    )
    ours = cosine(0.4, epochs, steps, interval, cooldown_epochs=cooldown)
    for step in range(steps * (epochs + cooldown)):
        expected = timms._get_lr(step if interval == "step" else step // steps)[0]
        assert ours(step) == pytest.approx(expected, rel=1e-12), step


SCHEDULES = {
    "cosine": (optim.cosine, {}),
    "linear": (optim.linear, {}),
    "step": (optim.step, {"decay_epochs": 3, "decay_rate": 0.1}),
}


def make(name, interval, epochs=10, steps_per_epoch=100, **settings):
    constructor, own = SCHEDULES[name]
    common = {"warmup_epochs": 4, "warmup_lr": 1e-6, "min_lr": 1e-5, "cooldown_epochs": 2, "interval": interval}
    return constructor(Timeline(0.4, epochs, steps_per_epoch), **(common | own | settings))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_by_steps_equals_the_one_by_epochs_at_the_borders_of_epochs(name):
    by_step, by_epoch = make(name, "step"), make(name, "epoch")
    for epoch in range(14):
        assert by_step(100 * epoch) == by_epoch(100 * epoch), epoch


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_schedule_starts_at_warmup_lr_and_ends_at_min_lr_for_good(name, interval):
    schedule = make(name, interval)
    assert schedule(0) == 1e-6
    assert {schedule(step) for step in range(1000, 1200)} == {1e-5}


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 4])
def test_a_schedule_by_steps_has_no_jump_but_where_the_warm_up_ends(name, warmup_epochs):
    steps = 100
    schedule = make(name, "step", warmup_epochs=warmup_epochs, steps_per_epoch=steps)
    end = int(warmup_epochs * steps)
    largest = 0.4 * max(1 / end if end else 0, math.pi / 2 / (10 * steps), 1 / (10 - warmup_epochs) / steps) * 1.001
    changes = {step: schedule(step + 1) - schedule(step) for step in range(12 * steps)}
    jumps = [step for step, change in changes.items() if abs(change) > largest]
    # There the reference goes over to its cosine, which has run since epoch 0.
    assert jumps == ([end - 1] if name == "cosine" and warmup_epochs == 4 else [])
    assert all(change >= 0 for step, change in changes.items() if step < end - 1)
    assert all(change <= 0 for step, change in changes.items() if step >= end)


def test_linear_is_a_straight_line_from_the_peak_at_the_end_of_the_warm_up():
    schedule = make("linear", "step")
    assert schedule(400) == pytest.approx(0.4, rel=1e-12)
    assert schedule(700) == pytest.approx((0.4 + 1e-5) / 2, rel=1e-12)
    assert schedule(999) == pytest.approx(1e-5 + (0.4 - 1e-5) / 600, rel=1e-9)


def test_step_is_the_peak_times_the_rate_for_each_period_that_has_passed_never_below_min_lr():
    schedule = make("step", "step", epochs=20, warmup_epochs=0, min_lr=1e-3)
    lrs = {epoch: schedule(100 * epoch) for epoch in range(20)}
    expected = {epoch: max(1e-3, 0.4 * 0.1 ** (epoch // 3)) for epoch in range(20)}
    assert lrs == pytest.approx(expected, rel=1e-12)
    assert schedule(299) == 0.4
    assert schedule(2000) == 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_epochs", [2, 3, 4.5])
@pytest.mark.parametrize("cooldown_epochs", [0, 3])
def test_a_warm_up_longer_than_the_training_is_shortened_to_it(name, warmup_epochs, cooldown_epochs):
    schedule = make(name, "step", 2, 10, warmup_epochs=warmup_epochs, cooldown_epochs=cooldown_epochs)
    line = [1e-6 + (0.4 - 1e-6) * step / 20 for step in range(20)]
    assert [schedule(step) for step in range(20)] == pytest.approx(line, rel=1e-12)
    assert [schedule(step) for step in (20, 49)] == [1e-5, 1e-5]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("epochs", "rates"), [(1, [1.0]), (2, [0.0, 0.5]), (3, [0.0, 0.5, 0.25])])
def test_a_shortened_warm_up_leaves_the_last_epoch_where_the_rate_changes_once_an_epoch(name, epochs, rates):
    schedule = make(name, "epoch", epochs, 10, warmup_epochs=4, cooldown_epochs=0)
    found = [schedule(step) for step in range(10 * epochs)]
    assert found == [rate for rate in found[::10] for _ in range(10)]
    # Of an epoch of warm-up, the share of the peak; of the last one what each schedule has there.
    last = {"cosine": rates[-1], "linear": 1.0, "step": 1.0}[name]
    assert found[::10] == pytest.approx([0.4 * rate for rate in [*rates[:-1], last]], abs=1e-4)


def test_the_warm_up_is_told_if_it_is_shortened_or_all_there_is():
    def note(warmup_epochs, epochs, cooldown_epochs=0, interval="step"):
        settings = {"warmup_epochs": warmup_epochs, "cooldown_epochs": cooldown_epochs, "interval": interval}
        return optim.warmup_note(settings, epochs, 0.4)

    assert note(4, 10) is None
    assert note(4, 4, cooldown_epochs=1) is None
    assert note(2, 2) == "the warm-up fills all of the training, and comes to the peak of 0.4 at its end"
    assert note(2, 2, interval="epoch") == "the warm-up fills all of the training"
    shortened = "schedule.warmup_epochs=4 is longer than epochs=1: it is shortened to "
    assert note(4, 1) == f"{shortened}1, and comes to the peak of 0.4 at its end"
    assert note(4, 1, interval="epoch") == f"{shortened}0"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_without_warm_up_starts_at_the_peak(name):
    assert make(name, "step", warmup_epochs=0)(0) == pytest.approx(0.4, rel=1e-12)


@pytest.mark.parametrize("make", [optim.sgd, optim.fused_sgd])
def test_nesterov_without_momentum_is_refused(make: Callable[..., torch.optim.Optimizer]) -> None:
    weight = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="Nesterov"):
        make([("weight", weight)], lr=0.1, momentum=0.0, weight_decay=0.0, nesterov=True)


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.99, 0.999]])
def test_adamw_wants_two_betas(betas: list[float]) -> None:
    weight = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="two numbers"):
        optim.adamw([("weight", weight)], lr=0.1, betas=betas, weight_decay=0.0, eps=1e-8)
