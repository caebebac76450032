"""Sums that stay on the device until they are read, integer hit counts, and a clock that measures images per second."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class LossMeter:
    """The mean loss since the last reading, and the first step whose loss was not finite, both on the device."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), device=device)
        self.count = 0
        self.first_bad = torch.full((), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        """Add the detached scalar loss of one step, counted from 1."""
        self.total += loss
        self.count += 1
        self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=step))

    def bad_step(self) -> int | None:
        """The first step with a NaN or infinite loss, None if there was none. Waits for the device."""
        step = int(self.first_bad.item())
        return None if step == torch.iinfo(torch.int64).max else step

    def read(self) -> float:
        """The mean loss since the last reading; starts the next mean. Waits for the device."""
        mean = float(self.total.item()) / max(1, self.count)
        self.total.zero_()
        self.count = 0
        return mean

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs for the mean under way to go on."""
        return {"total": float(self.total.item()), "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with a mean under way."""
        self.total.fill_(state["total"])
        self.count = int(state["count"])


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Count top-1 and top-5 hits. logits (N, C), labels (N,) -> int64 (2,) on the device. C below 5: top-5 is all.

    Of equal logits, common in half precision, the lower class goes first; NaN goes before all.
    """
    label, own = labels[:, None], logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < label
    ahead = (~(logits <= own) | (logits == own) & lower).sum(1)
    return torch.stack([(ahead < 1).sum(), (ahead < 5).sum()])


@dataclass
class EvalResult:
    """The result of an evaluation: counts of hits, the mean loss, and its speed."""

    top1_hits: int
    top5_hits: int
    count: int
    loss: float
    """Mean cross-entropy, without label smoothing."""
    fps: float
    """Images per second, loading included."""

    @property
    def top1(self) -> float:
        """Per cent."""
        return 100 * self.top1_hits / self.count

    @property
    def top5(self) -> float:
        """Per cent."""
        return 100 * self.top5_hits / self.count


@dataclass
class Speedometer:
    """Training speed over whole steps: images of the global batch per second, and the share of time spent waiting.

    The first steps after a start are left out, and so is all time between a reading and the next resume(). A reading
    is honest when the device has just been waited for.
    """

    warmup: int = 5
    """Steps after a start that don't count."""
    steps: int = 0
    images: int = 0
    """Since the last reading, as are the next three."""
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    cold: tuple[float, float] = (0.0, 0.0)
    """The last reading within the warm-up."""
    total_images: int = 0
    """Since the warm-up, as are the next two."""
    total_seconds: float = 0.0
    total_waited: float = 0.0

    @property
    def warm_now(self) -> bool:
        """Whether the last step of the warm-up has just passed: wait for the device, then resume()."""
        return self.steps == self.warmup

    def resume(self) -> None:
        """Start the clock anew; what was counted since the last reading is dropped."""
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    def step(self, images: int, waited: float) -> None:
        """Count a step of so many images (all ranks); waited: seconds without data."""
        self.steps += 1
        self.images += images
        self.waited += waited

    def read(self) -> tuple[float, float]:
        """(images per second, share of time waiting for data) since the last reading; the clock starts anew."""
        seconds = time.perf_counter() - self.started
        reading = self.images / seconds, self.waited / seconds
        if self.steps > self.warmup:
            self.total_images += self.images
            self.total_seconds += seconds
            self.total_waited += self.waited
        else:
            self.cold = reading
        self.resume()
        return reading

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, for a resumed run to go on from."""
        totals = {"images": self.total_images, "seconds": self.total_seconds, "waited": self.total_waited}
        return totals | {"cold": list(self.cold)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was measured before."""
        self.total_images, self.total_seconds = state["images"], state["seconds"]
        self.total_waited, self.cold = state["waited"], (state["cold"][0], state["cold"][1])

    @property
    def fps(self) -> float:
        """Images per second over all readings after the warm-up; of the warm-up where nothing came after it."""
        return self.total_images / self.total_seconds if self.total_images else self.cold[0]

    @property
    def data_wait(self) -> float:
        """Share of time waiting for data over the same."""
        return self.total_waited / self.total_seconds if self.total_images else self.cold[1]
