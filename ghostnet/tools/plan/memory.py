"""The memory of a training run, estimated: tensors counted over real steps of a few images, then scaled to the batch.

Counted are all tensors alive at once in forward and backward passes, by watching every operation of PyTorch on this CPU
(with the layers as the run's kind of device has them). It is affine in the batch, so two small batches tell the rest.
Not counted: scratch memory of kernels, the allocator's waste, what drivers take.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghostnet.amp import Amp
from ghostnet.models import layers

PIXELS = 16 * 224 * 224
"""Of the larger of the two batches that are watched, where the run's own is not smaller."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device (of one process on the CPU) at the peak, by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation, and look at what it gives."""
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before | self.seen:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, name = storage.nbytes(), id(storage)
        self.seen.add(name)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, size, name)

    def _gone(self, size: int, name: int) -> None:
        self.alive -= size
        self.seen.discard(name)


def of_passes(model: nn.Module, amp: Amp, image_size: int, batch_size: int, kind: str) -> int:
    """The peak of bytes that a forward and a backward pass of a batch add to the model, its gradients among them."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def passes(images: Tensor, labels: Tensor) -> None:
        amp.backward(F.cross_entropy(amp.forward(model, images), labels))

    model.train()
    peak = _scaled(passes, image_size, batch_size, kind)
    model.zero_grad()
    for buffer, value in kept:
        buffer.copy_(value)
    return peak


def of_evaluation(model: nn.Module, amp: Amp, image_size: int, batch_size: int) -> int:
    """The same of an evaluated batch, with the model that is made for it."""

    @torch.inference_mode()
    def passes(images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(amp.forward(model, images), labels)

    return _scaled(passes, image_size, batch_size, "cpu") + nbytes(model.state_dict())


def _scaled(passes: Callable[[Tensor, Tensor], None], image_size: int, batch_size: int, kind: str) -> int:
    most = max(2, min(batch_size, round(PIXELS / image_size**2)))
    counts = most // 2, most
    peaks: list[int] = []
    for count in counts:
        pixels = torch.zeros(count, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
        with _layers_of(kind), Watch() as watch:
            passes(pixels + torch.rand_like(pixels), torch.zeros(count, dtype=torch.int64))
        peaks.append(watch.peak)
    each: float = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    return round(peaks[1] + each * (batch_size - counts[1]))


@contextlib.contextmanager
def _layers_of(kind: str) -> Iterator[None]:
    """The layers here take the CPU's ways by the device of their input; inside, those of another kind."""
    names = "computes_again", "lacks_kernels"
    own = {name: getattr(layers, name) for name in names}
    if kind == "cpu":
        yield
        return
    try:
        for name in names:
            setattr(layers, name, lambda device: False)
        yield
    finally:
        for name, function in own.items():
            setattr(layers, name, function)


def nbytes(tensors: Any) -> int:  # noqa: ANN401 (anything that holds tensors)
    """Bytes of all tensors in nested dicts and lists, each storage once."""
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(tensors)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())
