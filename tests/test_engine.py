"""The loop against plain PyTorch loops, bit for bit: training, accumulation, going on from a checkpoint, evaluation."""

import copy
import gc
import math
import signal
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ghostnet import checkpoint, engine, optim
from ghostnet.amp import O2, Amp, Bf16, Fp16
from ghostnet.data.decode import Pixels
from ghostnet.data.loader import EvalLoader, Feeder, TrainLoader
from ghostnet.data.transforms import Augment, Mix, Mixed, Preprocessing
from ghostnet.ema import Ema
from ghostnet.engine import Recipe, TrainState
from ghostnet.errors import UserError
from ghostnet.models.ghostnet import STAGES, GhostNet, freeze_backbone
from ghostnet.seeding import fold_in, sample_rng
from ghostnet.signals import Interrupted, StopSignal

CPU = torch.device("cpu")
NEVER = StopSignal()
SEED = 5
SPEC = Preprocessing(32, 1.0, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], "bilinear")
AUGMENT = Augment([0.5, 1.0], [0.75, 4 / 3], 0.5, 0.0, 0.4, 1, 9, 0.5, "bilinear")
AMPS = {
    "none": Amp,
    "bf16": Bf16,
    "fp16 static": lambda: Fp16(128.0),
    "fp16 dynamic": lambda: Fp16("dynamic"),
    "o2 static": lambda: O2(128.0),
    "o2 dynamic": lambda: O2("dynamic"),
}
OPTIMIZERS = {
    "sgd": lambda named: optim.sgd(named, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=False),
    "fused_sgd": lambda named: optim.fused_sgd(named, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=False),
    "rmsprop": lambda named: optim.rmsprop(named, lr=0.1, momentum=0.9, weight_decay=0.01, alpha=0.9, eps=1e-3),
    "adamw": lambda named: optim.adamw(named, lr=0.1, betas=[0.9, 0.99], weight_decay=0.01, eps=1e-8),
}


class Patterns:
    """Noisy pictures of five patterns."""

    def __init__(self, count):
        random = np.random.default_rng(0)
        self.classes = list("abcde")
        self.labels = np.arange(count, dtype=np.int64) % 5
        patterns = random.integers(0, 128, (5, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
        self.pictures = (patterns[self.labels] + random.integers(0, 128, (count, 32, 32, 3))).astype(np.uint8)

    def image(self, index):
        return Pixels(self.pictures[index])

    def __len__(self):
        return len(self.labels)


def schedule(step):
    return 0.02 + 0.001 * step


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    """Two of GhostNet's nine stages, with all its kinds of layers, for speed."""
    monkeypatch.setattr("ghostnet.models.ghostnet.STAGES", (STAGES[0], STAGES[3]))


@pytest.fixture
def feeder():
    feeder = Feeder(CPU, 2, 32)
    yield feeder
    feeder.close()


def ghostnet(seed=0, dropout=0.2):
    torch.manual_seed(seed)
    return GhostNet(5, width=0.1, dropout=dropout).to(memory_format=torch.channels_last)


def begin(model, amp=None, optimizer="sgd", ema_decay=0.9):
    amp = amp or Amp()
    ema = Ema(model, ema_decay) if ema_decay else None
    return TrainState(model, amp.initialize(model, OPTIMIZERS[optimizer], CPU), amp, ema, CPU)


def loaders(feeder, batch_size=8, images=40):
    data = Patterns(images)
    return TrainLoader(data, SPEC, AUGMENT, batch_size, SEED, feeder), EvalLoader(data, SPEC, batch_size, feeder)


def recipe(**settings):
    plain = Recipe(SPEC, Mix(0.0, 0.0), schedule, SEED, label_smoothing=0.1, clip_grad_norm=0.5, accumulate=1)
    return replace(plain, **settings)


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# Training


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "mix"),
    [(name, 1, Mix(0.0, 0.0)) for name in OPTIMIZERS] + [("sgd", 2, Mix(0.0, 0.0)), ("sgd", 2, Mix(0.2, 1.0))],
)
def test_two_epochs_are_a_plain_loop_bit_for_bit(feeder, optimizer, accumulate, mix):
    batch_size = 8 // accumulate
    train_loader, _ = loaders(feeder, batch_size, images=44)
    state = begin(ghostnet(), optimizer=optimizer)
    settings = recipe(accumulate=accumulate, mix=mix)
    steps = [step for _ in range(2) for step in engine.train(state, train_loader, settings, NEVER)]
    assert steps == list(range(1, 11))

    model, data = ghostnet(), train_loader.dataset
    average, total, step = Ema(model, 0.9), torch.zeros(()), 0
    updates = OPTIMIZERS[optimizer](list(model.named_parameters()))
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    model.train()
    for epoch in range(2):
        order = np.random.default_rng(fold_in(SEED, "order", epoch)).permutation(44)[:40]
        for groups in order.reshape(5, accumulate, batch_size):
            updates.zero_grad()
            mean_loss = torch.zeros(())
            for part, indices in enumerate(groups):
                number = accumulate * step + part
                pictures = [AUGMENT(data.image(index), sample_rng(SEED, epoch, int(index)), SPEC) for index in indices]
                images = (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() - mean) / std
                labels = torch.from_numpy(data.labels[indices])
                images, mixed = mix(images, labels, SEED, number)
                torch.manual_seed(fold_in(SEED, "dropout", number, 0))
                logits = model(images.contiguous(memory_format=torch.channels_last))
                loss = engine.cross_entropy(logits, labels, mixed, 0.1)
                (loss / accumulate).backward()
                mean_loss += loss.detach() / accumulate
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for group in updates.param_groups:
                group["lr"] = 0.02 + 0.001 * step
            updates.step()
            step += 1
            average.update(model.state_dict(), step)
            total += mean_loss
    assert_same_bits(state.model.state_dict(), model.state_dict())
    assert_same_bits(state.optimizer.state_dict(), updates.state_dict())
    assert_same_bits(state.ema.module.state_dict(), average.module.state_dict())
    assert state.meter.read() == total.item() / 10
    assert not torch.equal(model.bn1.weight, ghostnet().bn1.weight)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_compiled_step_trains_like_an_eager_one_and_compiling_it_changes_nothing(feeder, backend):
    train_loader, eval_loader = loaders(feeder)
    eager, compiled = begin(ghostnet(dropout=0.0)), begin(ghostnet(dropout=0.0))
    fresh = copy.deepcopy(compiled.state_dict())
    calls = torch._dynamo.utils.counters["stats"]
    assert engine.compile_step(compiled, recipe(), train_loader.batch_size, 32, backend) > 0
    assert calls["unique_graphs"] > 0
    assert_same_bits(compiled.state_dict(), fresh)
    assert all(parameter.grad is None for parameter in compiled.model.parameters())
    made = calls["unique_graphs"]
    for state in (eager, compiled):
        assert list(engine.train(state, train_loader, recipe(), NEVER)) == [1, 2, 3, 4, 5]
    assert calls["unique_graphs"] == made  # the steps are what was compiled before them
    torch.testing.assert_close(compiled.model.state_dict(), eager.model.state_dict(), rtol=1e-3, atol=1e-4)
    found = [
        engine.evaluate(state.amp.for_evaluation(state.model, CPU), state.amp, eval_loader, NEVER).loss
        for state in (eager, compiled)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_accumulated_batches_are_one_of_twice_the_size_where_there_is_no_batchnorm(feeder, optimizer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 5, 2), nn.Linear(8, 5)

        def forward(self, images):
            return self.head(F.relu(self.conv(images)).mean((2, 3)))

    def result(batch_size, accumulate):
        torch.manual_seed(0)
        state = begin(Net().to(memory_format=torch.channels_last), optimizer=optimizer)
        start = copy.deepcopy(state.model.state_dict())
        list(engine.train(state, loaders(feeder, batch_size)[0], recipe(accumulate=accumulate), NEVER))
        return state, start

    (whole, start), (halves, _), (single, _) = result(8, 1), result(4, 2), result(4, 1)
    assert (whole.step, halves.step, single.step) == (5, 5, 10)
    torch.testing.assert_close(halves.model.state_dict(), whole.model.state_dict(), rtol=1e-5, atol=1e-6)
    assert halves.meter.read() == pytest.approx(whole.meter.read(), rel=1e-6)
    moved = (whole.model.head.weight - start["head.weight"]).abs().max()
    assert moved > 1e-3
    assert (whole.model.head.weight - single.model.head.weight).abs().max() > 0.1 * moved


def test_a_last_group_of_batches_too_few_to_accumulate_is_left_out_of_the_epoch(feeder):
    train_loader, _ = loaders(feeder, batch_size=8)
    state = begin(ghostnet())
    assert [list(engine.train(state, train_loader, recipe(accumulate=2), NEVER)) for _ in range(2)] == [[1, 2], [3, 4]]
    with pytest.raises(UserError, match="accumulate=6 batches of 8 are more than the 40 training images"):
        engine.steps_per_epoch(train_loader, 6)


@pytest.mark.parametrize("optimizer", ["sgd", "fused_sgd", "adamw"])
@pytest.mark.parametrize("name", AMPS)
def test_a_run_cut_in_the_middle_of_an_epoch_ends_in_the_same_bits(name, optimizer, tmp_path):
    hard = recipe(mix=Mix(0.2, 1.0), accumulate=2)  # with dropout, erasing, RandAugment and an average too

    def go_on(state, threads, until):
        feeder = Feeder(CPU, threads, 32)
        train_loader, _ = loaders(feeder, batch_size=4, images=24)
        while state.step < until:
            for step in engine.train(state, train_loader, hard, NEVER):
                if step == until:
                    break
        feeder.close()
        return state

    whole = go_on(begin(ghostnet(), AMPS[name](), optimizer), threads=1, until=8)
    first = go_on(begin(ghostnet(), AMPS[name](), optimizer), threads=3, until=4)
    first.best, first.last, first.train_loss, first.evaluated = {"eval/top1": 50.0}, {"step": 3}, 1.5, 3
    checkpoint.save(first.state_dict(), tmp_path / "last.pt")
    second = begin(ghostnet(seed=9), AMPS[name](), optimizer)
    second.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
    assert (second.step, second.evaluated, second.best, second.train_loss) == (4, 3, first.best, 1.5)
    go_on(second, threads=2, until=8)

    own = ("best", "last", "train_loss", "evaluated", "speed")
    expected = whole.state_dict() | {key: second.state_dict()[key] for key in own}
    assert_same_bits(second.state_dict(), expected)
    assert_same_bits(second.model.state_dict(), whole.model.state_dict())
    assert second.meter.read() == whole.meter.read() > 0


def test_the_state_is_read_from_a_checkpoint_and_not_shared_with_the_run_that_wrote_it(feeder, tmp_path):
    train_loader, _ = loaders(feeder)
    state = begin(ghostnet())
    list(engine.train(state, train_loader, recipe(), NEVER))
    checkpoint.save(state.state_dict(), tmp_path / "last.pt")
    before = copy.deepcopy(state.state_dict())
    twin = begin(ghostnet(seed=1))
    twin.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
    list(engine.train(twin, train_loader, recipe(), NEVER))
    assert_same_bits(state.state_dict(), before)


def test_every_step_runs_at_the_learning_rate_of_the_schedule(feeder):
    train_loader, _ = loaders(feeder)
    state, seen = begin(ghostnet()), []
    for _ in range(2):
        for _ in engine.train(state, train_loader, recipe(), NEVER):
            seen.append([group["lr"] for group in state.optimizer.param_groups])
    assert seen == [[schedule(step)] * 2 for step in range(10)]


def test_a_frozen_backbone_keeps_its_weights_and_batchnorm_statistics(feeder):
    train_loader, eval_loader = loaders(feeder)
    model = ghostnet()
    freeze_backbone(model)
    state = begin(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        engine.evaluate(model, state.amp, eval_loader, NEVER)
        list(engine.train(state, train_loader, recipe(), NEVER))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("classifier."), name


def test_training_after_an_evaluation_is_in_train_mode_and_goes_on_as_if_there_had_been_none(feeder):
    train_loader, eval_loader = loaders(feeder)
    with_evaluation, without = begin(ghostnet()), begin(ghostnet())
    for _ in range(2):
        engine.evaluate(with_evaluation.model, with_evaluation.amp, eval_loader, NEVER)
        assert not any(module.training for module in with_evaluation.model.modules())
        engine.evaluate(with_evaluation.ema.module, with_evaluation.amp, eval_loader, NEVER)
        for _ in engine.train(with_evaluation, train_loader, recipe(), NEVER):
            assert all(module.training for module in with_evaluation.model.modules())
        list(engine.train(without, train_loader, recipe(), NEVER))
    assert not any(module.training for module in with_evaluation.ema.module.modules())
    assert_same_bits(with_evaluation.state_dict(), without.state_dict())


def test_a_loss_that_is_not_finite_is_noted_with_its_step(feeder):
    train_loader, _ = loaders(feeder)
    state = begin(ghostnet())
    for step in engine.train(state, train_loader, recipe(), NEVER):
        if step == 3:
            nn.init.constant_(state.model.classifier.bias, math.nan)
    assert state.watch.read().step == 4


class CountReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device's result."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
        self.reads += func.overloadpacket.__name__ in waits
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.tolist = torch.Tensor.tolist  # the one that is not dispatched

        def counted(tensor):
            self.reads += 1
            return self.tolist(tensor)

        torch.Tensor.tolist = counted
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", AMPS)
def test_a_step_never_waits_for_the_device(feeder, name, optimizer):
    train_loader, _ = loaders(feeder)
    state = begin(ghostnet(), AMPS[name](), optimizer)
    with CountReads() as count:
        list(engine.train(state, train_loader, recipe(mix=Mix(0.2, 1.0)), NEVER))
    assert state.step == 5
    assert count.reads == 0
    with CountReads() as count:
        state.meter.read()
    assert count.reads == 1


def test_the_speed_is_that_of_the_steps_after_the_warm_up(feeder, monkeypatch):
    train_loader, _ = loaders(feeder)
    state = begin(ghostnet())
    monkeypatch.setattr(state.speed, "WARMUP", 7)
    for _ in range(3):
        list(engine.train(state, train_loader, recipe(), NEVER))
        state.speed.read()
    assert state.speed.totals[0] == 8 * (15 - 7)
    assert 0 < state.speed.totals[2] < state.speed.totals[1]
    assert state.speed.totals[3] == 0


def test_nothing_of_a_run_stays_alive_when_it_is_over(feeder, tmp_path):
    def run(name):
        train_loader, eval_loader = loaders(feeder)
        state = begin(ghostnet(), AMPS[name](), "adamw")
        list(engine.train(state, train_loader, recipe(mix=Mix(0.2, 1.0)), NEVER))
        engine.evaluate(state.model, state.amp, eval_loader, NEVER)
        engine.evaluate(state.amp.for_evaluation(state.ema.module, CPU), state.amp, eval_loader, NEVER)
        checkpoint.save(state.state_dict(), tmp_path / "last.pt")
        state.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
        held = [state, state.model, state.ema.module, state.optimizer, train_loader, state.model.classifier.weight]
        return [weakref.ref(thing) for thing in held]

    for name in AMPS:
        references = run(name)
        gc.collect()
        assert [reference() for reference in references] == [None] * 6, name


def test_leaving_the_loop_early_ends_the_loaders_work(feeder, monkeypatch):
    train_loader, _ = loaders(feeder)
    ended = []
    batches = train_loader.batches

    def watched(epoch, start, *order):
        try:
            yield from batches(epoch, start, *order)
        finally:
            ended.append(start)

    monkeypatch.setattr(train_loader, "batches", watched)
    state = begin(ghostnet())
    for step in engine.train(state, train_loader, recipe(), NEVER):
        if step == 2:
            break
    assert ended == [0]
    assert state.step == 2
    list(engine.train(state, train_loader, recipe(), NEVER))
    assert ended == [0, 2]
    assert state.step == 5


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_smoothed_labels_by_its_formula(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 5, generator=generator).requires_grad_(), torch.tensor([0, 1, 2, 3, 4, 0])
    partners = labels.flip(0)

    def by_formula(wanted):
        targets = (1 - smoothing) * F.one_hot(wanted, 5) + smoothing / 5
        return -(targets * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()

    def by_torch(wanted):
        return F.cross_entropy(logits, wanted, label_smoothing=smoothing)

    for expected in (by_formula, by_torch):
        assert_same_loss(logits, engine.cross_entropy(logits, labels, None, smoothing), expected(labels))
        mixed = engine.cross_entropy(logits, labels, Mixed(partners, 0.3), smoothing)
        assert_same_loss(logits, mixed, 0.3 * expected(labels) + 0.7 * expected(partners))


def assert_same_loss(logits, ours, expected):
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(loss, logits, retain_graph=True) for loss in (ours, expected))
    torch.testing.assert_close(*gradients)


# Evaluation


def test_evaluation_counts_every_sample_once_whatever_the_batch_size(feeder):
    data, model = Patterns(203), ghostnet(dropout=0.0)
    images = SPEC.normalize(torch.from_numpy(np.stack([SPEC(data.image(index)) for index in range(203)])))
    nn.init.normal_(model.classifier.weight)
    with torch.no_grad():
        for _ in range(20):  # BatchNorm's statistics
            model(images)
        model.eval().classifier.bias -= model(images).mean(0)  # all classes are given
        logits = model(images).double()
    labels = torch.from_numpy(data.labels)
    hits = int((logits.argmax(1) == labels).sum())
    assert len(logits.argmax(1).unique()) == 5
    watch = []
    model.register_forward_hook(lambda module, inputs, output: watch.append(output.is_inference()))
    for batch_size in (1, 7, 500):
        seen = []
        eval_loader = EvalLoader(data, SPEC, batch_size, feeder)
        result = engine.evaluate(model, Amp(), eval_loader, NEVER, seen.append)
        assert (result.top1_hits, result.top5_hits, result.count) == (hits, 203, 203)
        assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert (sum(seen), max(seen)) == (203, min(batch_size, 203))
        assert result.fps > 0
    assert set(watch) == {True}  # no graph


@pytest.mark.parametrize("name", AMPS)
def test_evaluation_changes_nothing_of_the_model(feeder, name):
    train_loader, eval_loader = loaders(feeder)
    state = begin(ghostnet(), AMPS[name]())
    list(engine.train(state, train_loader, recipe(), NEVER))
    before = copy.deepcopy(state.state_dict())
    first = engine.evaluate(state.model, state.amp, eval_loader, NEVER)
    second = engine.evaluate(state.model, state.amp, eval_loader, NEVER)
    assert (first.top1_hits, first.top5_hits, first.loss) == (second.top1_hits, second.top5_hits, second.loss)
    assert_same_bits(state.state_dict(), before)


def test_an_evaluation_can_be_stopped_between_batches(feeder):
    seen = []

    def count(images):
        seen.append(images)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)

    with StopSignal() as stop, pytest.raises(Interrupted, match="SIGTERM"):
        engine.evaluate(ghostnet(), Amp(), loaders(feeder)[1], stop, count)
    assert seen == [8, 8]


# Signals


@pytest.mark.parametrize(("signum", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_lets_the_step_finish_and_then_ends_the_run(feeder, signum, name):
    train_loader, _ = loaders(feeder)
    state, undisturbed = begin(ghostnet()), begin(ghostnet())
    for step in engine.train(undisturbed, train_loader, recipe(), NEVER):
        if step == 3:
            break

    def raise_in_the_third_forward(module, inputs):
        if state.step == 2:
            signal.raise_signal(signum)

    state.model.register_forward_pre_hook(raise_in_the_third_forward)
    with StopSignal() as stop, pytest.raises(Interrupted, match=name) as caught:
        list(engine.train(state, train_loader, recipe(), stop))
    assert caught.value.signum == signum
    assert state.step == 3
    assert_same_bits(state.state_dict(), undisturbed.state_dict())


def test_a_stop_in_the_middle_of_an_accumulated_step_leaves_no_trace_of_it(feeder):
    train_loader, _ = loaders(feeder, batch_size=4)
    halves = recipe(accumulate=2)
    state, undisturbed = begin(ghostnet()), begin(ghostnet())
    for step in engine.train(undisturbed, train_loader, halves, NEVER):
        if step == 2:
            break

    def raise_in_the_fifth_forward(module, inputs):
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)

    state.model.register_forward_pre_hook(raise_in_the_fifth_forward)
    with StopSignal() as stop, pytest.raises(Interrupted):
        list(engine.train(state, train_loader, halves, stop))
    assert state.step == 2
    assert_same_bits(state.state_dict(), undisturbed.state_dict())


def test_the_echo_of_a_ctrl_c_is_no_second_one():
    """The second one ends the process, whole commands of which are in test_faults.py."""
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="Ctrl-C"):
            stop.check()


def test_a_second_sigterm_still_only_asks():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.check()


def test_without_a_signal_nothing_is_stopped_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        stop.check()
        assert signal.getsignal(signal.SIGINT) != before[0]
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(ValueError, match="cut"), StopSignal():
        raise ValueError("cut")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
