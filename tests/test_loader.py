"""The loader against plain loops: order, ranks, threads, errors, and the ring of reused batches."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ghostnet.data import loader as room
from ghostnet.data.decode import Pixels
from ghostnet.data.loader import AHEAD, CHUNK, EvalLoader, Feeder, TrainLoader
from ghostnet.data.transforms import Augment, Preprocessing
from ghostnet.distributed import Ranks
from ghostnet.errors import SampleError, UserError
from ghostnet.seeding import sample_rng

CPU = torch.device("cpu")
SIZE = 12
SPEC = Preprocessing(SIZE, 1.0, [0.5] * 3, [0.2] * 3, "bilinear")
OFF = Augment([1.0, 1.0], [1.0, 1.0], 0.0, 0.0, 0.0, 0, 9, 0.0, "bilinear")
ALL = Augment([0.3, 1.0], [0.75, 4 / 3], 0.5, 0.5, 0.4, 2, 9, 0.5, "bilinear")


class Numbered:
    """Pictures that show their own number in red and green, noise in blue; labels three times the number."""

    def __init__(self, count, mode="RGB", side=SIZE, broken=(), wait=lambda index: None):
        self.labels = np.arange(count, dtype=np.int64) * 3
        self.classes = [str(index) for index in range(count)]
        self.mode, self.side, self.broken, self.wait = mode, side, broken, wait
        self.lock, self.calls, self.active = threading.Lock(), 0, 0

    def __len__(self):
        return len(self.labels)

    def image(self, index):
        with self.lock:
            self.calls += 1
            self.active += 1
        try:
            self.wait(index)
            if index in self.broken:
                raise SampleError(f"picture {index} is broken")
            if self.mode == "L":
                return Pixels(np.full((self.side, self.side), index, np.uint8))
            pixels = np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), np.uint8)
            pixels[:, :, :2] = index % 256, index // 256
            return Pixels(pixels)
        finally:
            with self.lock:
                self.active -= 1


def numbers(images):
    """The numbers that a batch of pictures shows."""
    return (images[:, 0, 0, 0].int() + 256 * images[:, 0, 0, 1].int()).tolist()


@pytest.fixture
def feeders():
    """Feeder of a number of threads, closed at the end."""
    made = []

    def make(threads=2, image_size=SIZE):
        made.append(Feeder(CPU, threads, image_size))
        return made[-1]

    yield make
    for feeder in made:
        feeder.close()


def copies(batches):
    return [(images.clone(), labels.clone()) for images, labels in batches]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def wait_for(condition):
    """Wait until the threads have come somewhere; a test whose condition never holds fails."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "never"
        time.sleep(0.001)


# Order


@pytest.mark.parametrize(("count", "batch_size"), [(300, 32), (256, 32), (33, 32), (32, 32), (7, 2), (5, 1)])
def test_an_epoch_holds_every_sample_once_but_the_rest_that_fills_no_batch(count, batch_size, feeders):
    dataset = Numbered(count)
    loader = TrainLoader(dataset, SPEC, OFF, batch_size, 1, feeders())
    seen = [number for images, _ in loader.batches(3) for number in numbers(images)]
    assert len(seen) == len(set(seen)) == count // batch_size * batch_size
    assert set(seen) <= set(range(count))


def test_the_order_is_a_function_of_seed_and_epoch(feeders):
    def order(seed, epoch):
        return TrainLoader(Numbered(64), SPEC, OFF, 16, seed, feeders()).indices(epoch).flatten().tolist()

    assert order(1, 0) == order(1, 0)
    orders = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    # No order favours a place: the mean place of a sample over many epochs is the middle.
    places = np.argsort([order(1, epoch) for epoch in range(300)], axis=1).mean(axis=0)
    assert np.abs(places - 31.5).max() < 5


def test_labels_belong_to_their_images(feeders):
    loader = TrainLoader(Numbered(200), SPEC, OFF, 40, 1, feeders(4))
    for images, labels in loader.batches(0):
        assert labels.tolist() == [3 * number for number in numbers(images)]


def test_a_batch_is_what_a_plain_loop_makes(feeders):
    dataset = Numbered(100, side=20)
    loader = TrainLoader(dataset, SPEC, ALL, 24, 7, feeders(3))
    batches = copies(loader.batches(2))
    for indices, (images, labels) in zip(loader.indices(2), batches, strict=True):
        assert labels.tolist() == dataset.labels[indices].tolist()
        for index, image in zip(indices.tolist(), images, strict=True):
            expected = ALL(dataset.image(index), sample_rng(7, 2, index), SPEC)
            np.testing.assert_array_equal(image.numpy(), expected)


def test_data_that_fill_no_batch_are_refused(feeders):
    with pytest.raises(UserError, match=r"data\.batch_size=8 on 2 device\(s\) is more than the 15 training images"):
        TrainLoader(Numbered(15), SPEC, OFF, 8, 1, feeders(), Ranks(0, 2))


# Threads, ranks, resuming


def test_the_number_of_threads_changes_no_bit(feeders):
    dataset = Numbered(150, side=20)
    one, two, five = (
        copies(TrainLoader(dataset, SPEC, ALL, 37, 1, feeders(threads)).batches(1)) for threads in (1, 2, 5)
    )
    assert_same(one, two)
    assert_same(one, five)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_starting_in_the_middle_of_an_epoch_goes_on_with_the_same_batches(start, feeders):
    loader = TrainLoader(Numbered(80, side=20), SPEC, ALL, 20, 1, feeders())
    assert_same(copies(loader.batches(1, start)), copies(loader.batches(1))[start:])


@pytest.mark.parametrize("rewinds", [(), (2,), (3, 1)])
def test_a_step_has_the_same_samples_in_one_batch_or_in_several(rewinds, feeders):
    """rewinds: of steps."""
    whole, parts = (TrainLoader(Numbered(103), SPEC, OFF, size, 3, feeders()) for size in (16, 4))
    of_one = whole.indices(1, rewinds)
    of_four = parts.indices(1, [4 * step for step in rewinds])[: 4 * len(of_one)]
    assert (of_four.reshape(-1, 16) == of_one).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(world_size, feeders):
    dataset = Numbered(150, side=20)
    whole = copies(TrainLoader(dataset, SPEC, ALL, 32, 1, feeders()).batches(1))
    ranks = [
        copies(TrainLoader(dataset, SPEC, ALL, 32 // world_size, 1, feeders(), Ranks(rank, world_size)).batches(1))
        for rank in range(world_size)
    ]
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert_same(whole, joined)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 100])
@pytest.mark.parametrize("count", [50, 48, 2])
def test_evaluation_covers_every_sample_once_for_any_ranks_and_batch_size(world_size, batch_size, count, feeders):
    dataset = Numbered(count)
    seen = []
    for rank in range(world_size):
        for images, labels in EvalLoader(dataset, SPEC, batch_size, feeders(), Ranks(rank, world_size)).batches():
            assert 0 < len(images) == len(labels) <= batch_size
            assert labels.tolist() == [3 * number for number in numbers(images)]
            seen += numbers(images)
    assert sorted(seen) == list(range(count))


def test_evaluation_gives_the_preprocessed_pictures(feeders):
    dataset = Numbered(20, side=31)
    images = torch.cat([images.clone() for images, _ in EvalLoader(dataset, SPEC, 6, feeders()).batches()])
    for index in range(20):
        np.testing.assert_array_equal(images[index].numpy(), SPEC(dataset.image(index)))


def test_a_grey_picture_fills_all_three_channels(feeders):
    for augment in (OFF, ALL):
        loader = TrainLoader(Numbered(64, mode="L", side=20), SPEC, augment, 32, 1, feeders())
        for images, labels in loader.batches(0):
            assert images.shape == (32, SIZE, SIZE, 3)
            assert torch.equal(images, images[..., :1].expand(-1, -1, -1, 3))
            if augment is OFF:
                assert labels.tolist() == (3 * images[:, 0, 0, 0].int()).tolist()


# The ring


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(feeders):
    batch_size, count = 2 * CHUNK + 1, 10
    dataset = Numbered(count * batch_size)
    batches = TrainLoader(dataset, SPEC, OFF, batch_size, 1, feeders(3)).batches(0)
    for position, (images, labels) in enumerate(batches):
        before = images.clone(), labels.clone()
        # The threads do all that they may do before the next is asked for.
        allowed = min(position + 1 + AHEAD, count) * batch_size
        wait_for(lambda allowed=allowed: dataset.calls >= allowed and not dataset.active)
        assert dataset.calls == allowed
        assert torch.equal(images, before[0])
        assert torch.equal(labels, before[1])


def test_buffers_are_not_refilled_before_their_copies_to_the_device_are_done(monkeypatch, feeders):
    pending = []

    class Copy:
        """A copy that a device takes its time for: done only when it is waited for."""

        def __init__(self, *sources):
            self.lock, self.results = threading.Lock(), [torch.empty_like(source) for source in sources]
            self.left = list(zip(self.results, sources, strict=True))
            pending.append(self)

        def wait(self):
            with self.lock:
                while self.left:
                    result, source = self.left.pop()
                    result.copy_(source)

    def copy_to(device, *tensors):
        copy = Copy(*tensors)
        return copy.results, copy.wait

    dataset = Numbered(300)
    feeder = feeders(3)
    expected = [copies(TrainLoader(dataset, SPEC, ALL, 20, 1, feeders()).batches(epoch)) for epoch in (0, 1)]
    monkeypatch.setattr(room, "copy_to", copy_to)
    # Two epochs: the second starts with buffers whose last copies of the first are still under way.
    ours = [list(TrainLoader(dataset, SPEC, ALL, 20, 1, feeder).batches(epoch)) for epoch in (0, 1)]
    for copy in pending:
        copy.wait()
    for epoch in (0, 1):
        assert_same(ours[epoch], expected[epoch])


def test_two_iterators_over_one_feeder_do_not_disturb_each_other(feeders):
    dataset = Numbered(120, side=20)
    loader = TrainLoader(dataset, SPEC, ALL, 20, 1, feeders())
    expected = copies(loader.batches(0)), copies(loader.batches(1))
    pairs = [
        (images.clone(), labels.clone(), other.clone(), other_labels.clone())
        for (images, labels), (other, other_labels) in zip(loader.batches(0), loader.batches(1), strict=True)
    ]
    assert_same([pair[:2] for pair in pairs], expected[0])
    assert_same([pair[2:] for pair in pairs], expected[1])


def test_a_feeder_serves_batches_of_different_sizes(feeders):
    dataset, feeder = Numbered(90), feeders()
    for batch_size in (20, 7, 40, 1, 90):
        loader = EvalLoader(dataset, SPEC, batch_size, feeder)
        assert [n for images, _ in loader.batches() for n in numbers(images)] == list(range(90))


def test_every_epoch_uses_the_same_few_buffers(feeders):
    loader = TrainLoader(Numbered(200), SPEC, OFF, 10, 1, feeders())
    first, second = ({images.data_ptr() for images, _ in loader.batches(epoch)} for epoch in (0, 1))
    assert first == second
    assert AHEAD < len(first) <= AHEAD + 2


def test_a_feeder_first_used_in_an_evaluation_serves_training_too(feeders):
    loader = TrainLoader(Numbered(8), SPEC, OFF, 8, 1, feeders())
    with torch.inference_mode():
        assert len(list(loader.batches(0))) == 1
    weight = torch.ones(8, 30, requires_grad=True)
    for _, labels in loader.batches(0):
        F.cross_entropy(weight * 2, labels).backward()
    assert weight.grad is not None


# Errors and endings


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_error_of_a_sample_comes_as_it_is_when_its_batch_is_asked_for(mode, feeders):
    dataset = Numbered(100, broken={57})
    if mode == "train":
        loader = TrainLoader(dataset, SPEC, ALL, 10, 1, feeders())
        place = int(np.flatnonzero(loader.indices(0).flatten() == 57)[0]) // 10
        batches = loader.batches(0)
    else:
        place, batches = 5, EvalLoader(dataset, SPEC, 10, feeders()).batches()
    for _ in range(place):
        next(batches)
    with pytest.raises(UserError, match=r"^picture 57 is broken$"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_skipped_in_training_others_take_their_places_whatever_the_threads_and_ranks(feeders):
    broken = {3, 57, 58, 99}
    dataset = Numbered(100, broken=broken)
    whole = TrainLoader(dataset, SPEC, ALL, 10, 1, feeders(3), skip=True)
    seen = copies(whole.batches(0))
    order = whole.indices(0).flatten()
    labels = torch.cat([labels for _, labels in seen]) // 3
    changed = {int(index): int(label) for index, label in zip(order, labels, strict=True) if index != label}
    assert changed.keys() == broken
    assert not broken & set(changed.values())
    for images, labels in copies(TrainLoader(dataset, SPEC, OFF, 10, 1, feeders(), skip=True).batches(0)):
        assert labels.tolist() == [3 * number for number in numbers(images)]
    assert_same(seen, copies(TrainLoader(dataset, SPEC, ALL, 10, 1, feeders(1), skip=True).batches(0)))
    halves = [
        copies(TrainLoader(dataset, SPEC, ALL, 5, 1, feeders(), Ranks(r, 2), skip=True).batches(0)) for r in (0, 1)
    ]
    for batch, first, second in zip(seen, *halves, strict=True):
        assert torch.equal(batch[0], torch.cat([first[0], second[0]]))
    assert whole.skipped.faults.keys() == broken
    assert sorted(whole.skipped.news()) == sorted(f"picture {index} is broken" for index in broken)
    assert whole.skipped.news() == []


def test_skipped_in_evaluation_they_are_left_out(feeders):
    broken = {0, 20, *range(40, 60)}
    dataset = Numbered(100, broken=broken)
    loader = EvalLoader(dataset, SPEC, 10, feeders(3), skip=True)
    batches = copies(loader.batches())
    assert [len(labels) for _, labels in batches] == [9, 10, 9, 10, 0, 0, 10, 10, 10, 10]
    assert [number for images, _ in batches for number in numbers(images)] == sorted({*range(100)} - broken)
    assert all(labels.tolist() == [3 * number for number in numbers(images)] for images, labels in batches)
    assert loader.skipped.faults.keys() == broken


def test_data_of_which_nothing_can_be_read_are_not_skipped_for_ever(feeders):
    loader = TrainLoader(Numbered(20, broken=range(20)), SPEC, OFF, 5, 1, feeders(), skip=True)
    with pytest.raises(SampleError, match="is broken"):
        next(loader.batches(0))


def test_after_an_error_no_thread_works_on_and_the_feeder_is_usable_again(feeders):
    # The first chunk of the only batch fails at once, while the others are still at work.
    dataset = Numbered(4 * CHUNK, broken={0}, wait=lambda index: time.sleep(0.002 if index else 0))
    feeder = feeders(4)
    with pytest.raises(UserError):
        next(EvalLoader(dataset, SPEC, 4 * CHUNK, feeder).batches())
    assert dataset.active == 0
    calls = dataset.calls
    whole = Numbered(100)
    assert [n for images, _ in EvalLoader(whole, SPEC, 9, feeder).batches() for n in numbers(images)] == [*range(100)]
    assert dataset.calls == calls


def test_closing_in_the_middle_leaves_no_thread_at_work_and_the_feeder_usable(feeders):
    dataset, feeder = Numbered(100 * CHUNK, wait=lambda index: time.sleep(0.0005)), feeders(3)
    loader = TrainLoader(dataset, SPEC, OFF, 4 * CHUNK, 1, feeder)
    expected = copies(TrainLoader(Numbered(100 * CHUNK), SPEC, OFF, 4 * CHUNK, 1, feeders()).batches(0))
    for _ in range(3):
        batches = loader.batches(0)
        assert_same([next(batches), next(batches)][1:], expected[1:2])
        batches.close()
        calls = dataset.calls
        assert dataset.active == 0
        # The pool has nothing left: what it is given now, it does at once.
        feeder.pool.submit(int).result()
        assert dataset.calls == calls
    assert_same(copies(loader.batches(0, 20)), expected[20:])


def test_closing_drops_the_work_that_no_thread_has_begun(feeders, monkeypatch):
    batch_size, feeder, gate, futures = 4 * CHUNK, feeders(2), threading.Event(), []
    submit = feeder.pool.submit
    monkeypatch.setattr(feeder.pool, "submit", lambda *work: futures.append(submit(*work)) or futures[-1])
    dataset = Numbered(10 * batch_size, wait=lambda index: index < batch_size or gate.wait(20))
    batches = EvalLoader(dataset, SPEC, batch_size, feeder).batches()
    next(batches)

    def open_gate():
        end = time.monotonic() + 10
        while not any(future.cancelled() for future in futures) and time.monotonic() < end:
            time.sleep(0.001)
        gate.set()

    opener = threading.Thread(target=open_gate)
    opener.start()
    batches.close()
    opener.join()
    # Of four batches, the first is done, and each of the two threads was held up in one chunk.
    assert sum(future.cancelled() for future in futures) >= 3 * 4 - 2
    assert dataset.calls <= batch_size + 2 * CHUNK


def test_an_iterator_that_was_never_asked_does_nothing(feeders):
    dataset = Numbered(10)
    batches = EvalLoader(dataset, SPEC, 5, feeders()).batches()
    batches.close()
    assert dataset.calls == 0


def test_closing_a_feeder_ends_its_threads():
    before = set(threading.enumerate())
    feeder = Feeder(CPU, 3, SIZE)
    next(EvalLoader(Numbered(200), SPEC, 50, feeder).batches())
    assert len(set(threading.enumerate()) - before) == 3
    feeder.close()
    assert set(threading.enumerate()) == before


def test_batches_are_right_under_every_interleaving_that_chance_brings(feeders):
    rng = random.Random(0)
    delays = [rng.choice([0, 0, 0, 0.001, 0.003]) for _ in range(400)]
    dataset = Numbered(400, wait=lambda index: time.sleep(delays[index]))
    loader = TrainLoader(dataset, SPEC, OFF, 40, 1, feeders(8))
    for indices, (images, labels) in zip(loader.indices(0), loader.batches(0), strict=True):
        if rng.random() < 0.5:
            time.sleep(0.005)
        assert numbers(images) == indices.tolist()
        assert labels.tolist() == (3 * indices).tolist()
