"""Counts against a plain sort, means against plain sums, the speed against a clock that the test turns."""

import math

import pytest
import torch

from ghostnet.distributed import Ranks
from ghostnet.metrics import EvalResult, LossMeter, Speedometer, hits

CPU = torch.device("cpu")


def hits_by_sorting(logits, labels):
    """Python's sort, stable: of equal logits the lower class goes first."""
    ranks = [
        sorted(range(len(row)), key=lambda c, row=row: -row[c]).index(label)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    return [sum(rank < 1 for rank in ranks), sum(rank < 5 for rank in ranks)]


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 6, 10, 1000])
@pytest.mark.parametrize("distinct", [None, 3, 1], ids=["distinct", "ties", "all the same"])
def test_hits_are_those_of_a_stable_sort(classes, distinct):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(300, classes, generator=generator)
    if distinct:
        logits = torch.randint(distinct, (300, classes), generator=generator).float()
    labels = torch.randint(classes, (300,), generator=generator)
    assert hits(logits, labels).tolist() == hits_by_sorting(logits, labels)


def test_hits_are_integers_and_add_up_over_any_split_of_the_samples():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(101, 10, generator=generator).bfloat16().float(), torch.arange(101) % 10
    whole = hits(logits, labels)
    assert whole.dtype == torch.int64
    for size in (1, 7, 100):
        parts = [hits(*part) for part in zip(logits.split(size), labels.split(size), strict=True)]
        assert torch.equal(torch.stack(parts).sum(0), whole)


def test_a_model_that_gives_nan_hits_nothing():
    assert hits(torch.full((6, 10), math.nan), torch.arange(6)).tolist() == [0, 0]
    one_bad = torch.tensor([[math.nan, 3, 2, 1, 0, -1], [0, math.nan, 1, 2, 3, 4]])
    assert hits(one_bad, torch.tensor([1, 1])).tolist() == [0, 1]


def test_the_most_certain_logits_of_all_count():
    logits = torch.tensor([[math.inf, 0, 0, 0, 0, 0], [-math.inf, 0, 0, 0, 0, 0]])
    assert hits(logits, torch.tensor([0, 0])).tolist() == [1, 1]


def test_accuracy_is_in_per_cent():
    result = EvalResult(top1_hits=30, top5_hits=36, count=48, loss=1.0, fps=10.0)
    assert (result.top1, result.top5) == (62.5, 75.0)


def test_a_reading_of_the_loss_is_the_mean_since_the_last_reading():
    meter = LossMeter(CPU)
    for _step, loss in enumerate((1.0, 2.0, 6.0), 1):
        meter.add(torch.tensor(loss))
    assert meter.read() == 3.0
    meter.add(torch.tensor(0.5))
    assert meter.read() == 0.5


def test_steps_that_are_left_out_are_not_in_the_mean():
    meter = LossMeter(CPU)
    for loss, left_out in ((1.0, False), (math.nan, True), (math.inf, True), (2.0, False)):
        meter.add(torch.tensor(loss), torch.tensor(left_out))
    state = meter.state_dict()
    assert meter.read() == 1.5
    meter.load_state_dict(state)
    assert meter.read() == 1.5
    meter.add(torch.tensor(math.nan), torch.tensor(True))
    assert math.isnan(meter.read())


def test_a_mean_under_way_goes_on_from_its_saved_state():
    losses = torch.rand(9, generator=torch.Generator().manual_seed(0))
    whole, first, second = LossMeter(CPU), LossMeter(CPU), LossMeter(CPU)
    for step, loss in enumerate(losses, 1):
        whole.add(loss)
        if step <= 5:
            first.add(loss)
    second.load_state_dict(first.state_dict())
    for step in range(6, 10):
        second.add(losses[step - 1])
    assert second.read() == whole.read()


def test_adding_a_loss_keeps_no_reference_to_it():
    meter, loss = LossMeter(CPU), torch.tensor(1.0)
    meter.add(loss)
    loss.fill_(7.0)
    assert meter.read() == 1.0


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("ghostnet.device.time.perf_counter", clock)
    return clock


def steps(speed, clock, count, seconds, waited=0.0, reduced=0.0):
    for _ in range(count):
        speed.begin()
        start = clock.now
        clock.now += seconds
        speed.step(64, [(start, start + waited)], [(start, start + reduced)])


def warm(clock):
    """A speedometer past its warm-up."""
    speed = Speedometer(CPU)
    steps(speed, clock, Speedometer.WARMUP, seconds=10.0, waited=10.0, reduced=10.0)
    return speed


def test_speed_is_images_per_second_of_the_steps_since_the_last_reading_and_where_the_time_went(clock):
    speed = warm(clock)
    steps(speed, clock, 4, seconds=0.5, waited=0.1, reduced=0.05)
    first = speed.read()
    assert (first.fps, first.data_wait, first.reduction) == pytest.approx((128.0, 0.2, 0.1))
    assert first.compute == pytest.approx(0.7)
    steps(speed, clock, 2, seconds=0.25)
    second = speed.read()
    assert (second.fps, second.data_wait, second.reduction) == pytest.approx((256.0, 0.0, 0.0))
    assert speed.total.fps == pytest.approx(6 * 64 / 2.5)
    assert speed.total.data_wait == pytest.approx(0.4 / 2.5)
    assert speed.total.reduction == pytest.approx(0.2 / 2.5)


@pytest.mark.parametrize("log_every", [1, 2, 3, 5, 7])
def test_readings_within_the_warm_up_change_nothing_of_the_result(clock, log_every):
    speed = Speedometer(CPU)
    for step in range(1, 22):
        steps(speed, clock, 1, seconds=10.0 if step <= 5 else 0.5)
        if step % log_every == 0:
            assert speed.read().fps > 0
    assert speed.total.fps == pytest.approx(128.0)


def test_time_between_a_reading_and_the_next_start_is_left_out(clock):
    speed = warm(clock)
    for _ in range(3):
        speed.resume()
        steps(speed, clock, 4, seconds=0.5)
        assert speed.read().fps == pytest.approx(128.0)
        clock.now += 1000  # an evaluation
    assert speed.total.fps == pytest.approx(128.0)


def test_a_start_without_a_reading_before_drops_steps_and_their_time_together(clock):
    speed = warm(clock)
    speed.resume()
    steps(speed, clock, 3, seconds=9.0)
    clock.now += 1000  # a checkpoint
    speed.resume()
    steps(speed, clock, 2, seconds=0.5)
    assert speed.read().fps == pytest.approx(128.0)
    assert speed.total.fps == pytest.approx(128.0)


def test_a_run_that_ends_within_the_warm_up_gives_its_last_reading(clock):
    speed = Speedometer(CPU)
    steps(speed, clock, 2, seconds=2.0, waited=1.0)
    speed.read()
    steps(speed, clock, 2, seconds=1.0, waited=0.25)
    speed.read()
    assert speed.total.fps == pytest.approx(64.0)
    assert speed.total.data_wait == pytest.approx(0.25)


def test_a_run_without_a_step_has_no_speed():
    assert Speedometer(CPU).total.fps == Speedometer(CPU).read().fps == 0.0


def test_a_resumed_run_goes_on_from_the_speed_measured_before(clock):
    first = warm(clock)
    steps(first, clock, 4, seconds=0.5)
    first.read()
    second = Speedometer(CPU)
    second.load_state_dict(first.state_dict())
    steps(second, clock, Speedometer.WARMUP, seconds=10.0)
    steps(second, clock, 4, seconds=1.0)
    second.read()
    assert second.total.fps == pytest.approx(8 * 64 / 6)


class Twin(Ranks):
    """Two ranks, of which the other has twice this one's numbers."""

    def __init__(self):
        super().__init__(world_size=2)

    def gather(self, value):
        return [value, [2 * v for v in value] if isinstance(value, list) else 2 * value]


def test_ranks_tell_the_mean_of_their_losses_and_seconds(clock):
    meter = LossMeter(CPU)
    meter.add(torch.tensor(2.0))
    assert meter.read(Twin()) == 3.0
    speed = warm(clock)
    steps(speed, clock, 2, seconds=0.5)
    assert speed.read(Twin()).fps == pytest.approx(128.0)  # twice the images in twice the seconds
