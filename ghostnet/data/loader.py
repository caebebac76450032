"""Feeding the step: threads decode and augment into reused uint8 batches while the device computes."""

import contextlib
import math
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ghostnet.data.cache import PictureCache
from ghostnet.data.datasets import Dataset, Labels
from ghostnet.data.decode import Array, Picture, as_picture
from ghostnet.data.transforms import Augment, Preprocessing
from ghostnet.device import copy_to, pinned
from ghostnet.distributed import ALONE, Ranks
from ghostnet.errors import DataError, SampleError, UserError, is_out_of_memory
from ghostnet.seeding import fold_in, rewound, sample_rng
from ghostnet.watchdog import waiting

Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

CHUNK = 16
"""Samples that one thread does at a time: small enough to share a batch evenly, large enough to cost no time itself."""
AHEAD = 3
"""Batches under way before they are asked for."""
TRIES = 20
"""Pictures that may be drawn for one place of a batch, where they can't be read and are skipped."""
START = 120.0
"""Seconds that threads may take to start."""
NOTHING = -1
"""The label of a place that no picture fills."""


class Skipped:
    """Samples that can't be read and were skipped, on this rank."""

    def __init__(self) -> None:
        self.faults: dict[int, str] = {}
        """What is wrong with each, by its index, in the order in which they were met."""
        self.told = 0

    def news(self) -> list[str]:
        """What is wrong with those that were met since the last call."""
        faults = list(self.faults.values())
        self.told, told = len(faults), self.told
        return faults[told:]


class TrainLoader:
    """Augmented training batches; order is a function of (seed, epoch), augmentation of (seed, epoch, sample index)."""

    def __init__(
        self,
        dataset: Dataset,
        preprocessing: Preprocessing,
        augment: Augment,
        batch_size: int,
        seed: int,
        feeder: "Feeder",
        ranks: Ranks = ALONE,
        skip: bool = False,
    ) -> None:
        """batch_size: images of one forward pass on this device. UserError where the data don't fill one batch.

        skip: another picture, a function of (seed, epoch, sample index), takes the place of one that can't be read.
        """
        self.dataset, self.preprocessing, self.augment = dataset, preprocessing, augment
        self.batch_size, self.seed, self.feeder, self.ranks, self.skip = batch_size, seed, feeder, ranks, skip
        self.skipped = Skipped()
        self.batches_per_epoch = len(dataset) // (batch_size * ranks.world_size)
        if not self.batches_per_epoch:
            raise UserError(
                f"data.batch_size={batch_size} on {ranks.world_size} device(s) is more than the {len(dataset)} "
                "training images. Give a smaller data.batch_size."
            )

    def indices(self, epoch: int, rewinds: Sequence[int] = ()) -> Indices:
        """This rank's sample indices of an epoch (batches, batch_size): a slice of every global batch, rest dropped.

        rewinds: the batches of this epoch that the run was taken back to; from there on the rest is in another order.
        """
        order = np.random.default_rng(fold_in(self.seed, "order", epoch)).permutation(len(self.dataset))
        for time, batch in enumerate(rewinds, 1):
            rest = order[batch * self.ranks.world_size * self.batch_size :]
            rest[:] = np.random.default_rng(fold_in(self.seed, "rest", epoch, time)).permutation(rest)
        whole = order[: self.batches_per_epoch * self.ranks.world_size * self.batch_size]
        return whole.reshape(self.batches_per_epoch, self.ranks.world_size, self.batch_size)[:, self.ranks.rank]

    def batches(
        self, epoch: int, start: int = 0, rewinds: Sequence[int] = (), times: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8 (N, S, S, 3), labels (N,)) on the device, of one epoch from its start-th batch on.

        rewinds: as of indices(). times: how often the run was taken back in all; augmentation is another after each.
        """
        seed = rewound(self.seed, times)

        def sample(index: int, out: Array) -> tuple[Array, int]:
            rng = sample_rng(seed, epoch, index)
            for left in reversed(range(TRIES)):
                try:
                    with named(self.dataset, index):
                        image = image_of(self.dataset, index)
                        return self.augment(image, rng, self.preprocessing, out), index
                except SampleError as error:
                    if not self.skip or not left or isinstance(error, DataError):
                        raise
                    self.skipped.faults[index] = str(error)
                    index = fold_in(seed, "instead", epoch, index) % len(self.dataset)
            raise AssertionError

        return self.feeder.feed(list(self.indices(epoch, rewinds)[start:]), self.dataset.labels, sample)


class EvalLoader:
    """Preprocessed evaluation batches: every sample once, on one rank, the last batch short, nothing padded."""

    def __init__(
        self,
        dataset: Dataset,
        preprocessing: Preprocessing,
        batch_size: int,
        feeder: "Feeder",
        ranks: Ranks = ALONE,
        skip: bool = False,
        cache: PictureCache | None = None,
    ) -> None:
        """skip: pictures that can't be read are left out. cache: where they are kept and found."""
        self.dataset, self.preprocessing, self.batch_size = dataset, preprocessing, batch_size
        self.feeder, self.skip, self.cache = feeder, skip, cache
        self.skipped = Skipped()
        own = np.arange(ranks.rank, len(dataset), ranks.world_size)
        self.indices = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        self.batches_of_any_rank = math.ceil(math.ceil(len(dataset) / ranks.world_size) / batch_size)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8 (N, S, S, 3), labels (N,)) on the device; N is smaller by those skipped, and may be 0."""

        def sample(index: int, out: Array) -> tuple[Array, int] | None:
            if self.cache and self.cache.read(index, out):
                return out, index
            try:
                with named(self.dataset, index):
                    place(self.preprocessing(image_of(self.dataset, index)), out)
            except SampleError as error:
                if not self.skip or isinstance(error, DataError):
                    raise
                self.skipped.faults[index] = str(error)
                return None
            if self.cache:
                self.cache.write(index, out)
            return out, index

        return self.feeder.feed(self.indices, self.dataset.labels, sample)


Sample = Callable[[int, Array], tuple[Array, int] | None]
"""(index, a place (S, S, 3)) -> the picture (S, S, 3) or (S, S), in that place or another, and its index; or None."""


class Feeder:
    """Threads that fill a ring of host buffers, and the copies to the device."""

    def __init__(self, device: torch.device, threads: int, image_size: int) -> None:
        self.device, self.image_size = device, image_size
        self.pool = worker_threads(threads)
        self.ring: list[_Slot] = []

    def feed(self, batches: Sequence[Indices], labels: Labels, sample: Sample) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches in order, each on the device until the next is asked for.

        An error of a sample is raised when its batch is asked for. Closing the iterator ends the work under way.
        """
        if not batches:
            return
        slots = self._take_ring(max(len(b) for b in batches))
        under_way: list[tuple[_Slot, list[Future[None]]]] = []
        try:
            for position in range(-AHEAD, len(batches)):
                if position + AHEAD < len(batches):
                    indices, slot = batches[position + AHEAD], slots[(position + AHEAD) % len(slots)]
                    under_way.append((slot, self._fill(slot, indices, labels, sample)))
                if position < 0:
                    continue
                slot, futures = under_way[0]
                with waiting("the loader's threads, which read the pictures"):
                    for future in futures:
                        future.result()
                under_way.pop(0)
                copies, slot.reusable = copy_to(self.device, *slot.filled(len(batches[position])))
                yield copies[0], copies[1]
        finally:
            for _, futures in under_way:
                for future in futures:
                    future.cancel()
            with waiting("the loader's threads, to end"):
                for future in (future for _, futures in under_way for future in futures):
                    if not future.cancelled():
                        future.exception()
            self.ring = slots

    def close(self) -> None:
        """End the threads."""
        with waiting("the loader's threads, to end"):
            self.pool.shutdown(cancel_futures=True)

    def _take_ring(self, batch_size: int) -> "list[_Slot]":
        """The ring of the last feed, while no other has it and its batches are large enough, else a new one."""
        ring, self.ring = self.ring, []
        if ring and len(ring[0].labels) >= batch_size:
            return ring
        # AHEAD, the one that is waited for, and the one that the step is using.
        return [_Slot(batch_size, self.image_size, pinned(self.device)) for _ in range(AHEAD + 2)]

    def _fill(self, slot: "_Slot", indices: Indices, labels: Labels, sample: Sample) -> list[Future[None]]:
        reusable = slot.reusable

        def fill(start: int) -> None:
            reusable()
            part = indices[start : start + CHUNK]
            for position, wanted in enumerate(part.tolist(), start):
                out = slot.pixels[position]
                found = sample(wanted, out)
                if found is None:
                    slot.label_values[position] = NOTHING
                    continue
                picture, index = found
                slot.label_values[position] = labels[index]
                if picture is not out:
                    place(picture, out)

        return [self.pool.submit(fill, start) for start in range(0, len(indices), CHUNK)]


@contextlib.contextmanager
def named(dataset: Dataset, index: int) -> Iterator[None]:
    """Turn an OSError into a SampleError that names the image, any other error into a DataError that shows it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        name = name_of(dataset, index)
        if isinstance(error, OSError):  # Pillow's errors of what it can't decode are of this kind too
            raise SampleError(
                f"{name} can't be used: {error}. Replace or remove it, or give data.on_error=skip."
            ) from error
        raise DataError(
            f"{name} led to an error in code, which is no fault of the file:\n{traceback.format_exc().rstrip()}\n"
        ) from error


def image_of(dataset: Dataset, index: int) -> Picture:
    """The image of a data set, whichever of its forms image() gives it in."""
    return as_picture(dataset.image(index), name_of(dataset, index))


def name_of(dataset: Dataset, index: int) -> str:
    """The image's file, or its place in a data set that has none."""
    path = getattr(dataset, "path", None)
    return str(path(index)) if path else f"image {index} of {type(dataset).__name__}"


def place(picture: Array, out: Array) -> None:
    """Write a picture (S, S, 3), or a grey one (S, S) to all three channels."""
    np.copyto(out, picture if picture.ndim == 3 else picture[:, :, None])


def worker_threads(count: int) -> ThreadPoolExecutor:
    """So many threads, started, in each of which torch computes with one."""
    started = threading.Barrier(count + 1, timeout=START)

    def start() -> None:
        # Else each would bring a team of OpenMP threads of its own, which take the CPUs from the step. A thread that
        # was never asked for its number takes over the process's later.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    computing = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="loader", initializer=start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(computing)  # MKL's number is the process's, not the thread's
    return pool


class _Slot:
    """One reused host batch."""

    def __init__(self, batch_size: int, image_size: int, pin: bool) -> None:
        # Tensors made in inference mode, where an evaluation comes first, could not be trained with later.
        with torch.inference_mode(False):
            self.images = torch.empty(batch_size, image_size, image_size, 3, dtype=torch.uint8, pin_memory=pin)
            self.labels = torch.empty(batch_size, dtype=torch.int64, pin_memory=pin)
        self.pixels, self.label_values = self.images.numpy(), self.labels.numpy()
        self.reusable: Callable[[], None] = lambda: None

    def filled(self, count: int) -> tuple[Tensor, Tensor]:
        """Images and labels of its first places, without those that no picture fills."""
        images, labels = self.images[:count], self.labels[:count]
        there = self.label_values[:count] != NOTHING
        if there.all():
            return images, labels
        keep = torch.from_numpy(there)
        return images[keep], labels[keep]
