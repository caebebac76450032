"""Sums that stay on the device until they are read, integer hit counts, and a clock that measures images per second."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostnet.device import Mark, mark, seconds_between, wait_for
from ghostnet.distributed import ALONE, Ranks


class LossMeter:
    """The mean loss since the last reading, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)
        """Of the losses, and of the steps that were left out."""
        self.total = self.sums[0]
        self.count = 0

    def add(self, loss: Tensor, left_out: Tensor | None = None) -> None:
        """Add the detached scalar loss of one step; left_out: a flag on the device, where it is true the step isn't."""
        if left_out is None:
            self.total += loss
        else:
            self.sums += torch.stack([torch.where(left_out, 0.0, loss), left_out.to(loss.dtype)])
        self.count += 1

    def read(self, ranks: Ranks = ALONE) -> float:
        """The mean loss since the last reading over all ranks; starts the next mean. Waits for the device.

        NaN where all steps were left out.
        """
        total, left_out = self.sums.tolist()
        totals, count = ranks.gather(total), self.count - round(left_out)
        mean = sum(totals) / len(totals) / max(1, count) if count or not self.count else float("nan")
        self.sums.zero_()
        self.count = 0
        return mean

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs for the mean under way to go on."""
        total, left_out = self.sums.tolist()
        return {"total": total, "count": self.count, "left_out": left_out}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with a mean under way; runs of version 0.3 left nothing out."""
        self.sums.copy_(torch.tensor([state["total"], state.get("left_out", 0.0)]))
        self.count = int(state["count"])


def mean_meter(states: list[dict[str, float]]) -> dict[str, float]:
    """The state of one meter in the place of those of several ranks."""
    return states[0] | {"total": sum(state["total"] for state in states) / len(states)}


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


@dataclass(frozen=True)
class Speed:
    """Images of the global batch per second, and where the time went, as shares of it."""

    fps: float
    data_wait: float
    """Without data: the device had nothing to do, or copied them."""
    reduction: float
    """Between ranks, as far as the backward pass doesn't hide it."""

    @property
    def compute(self) -> float:
        """The rest."""
        return max(0.0, 1 - self.data_wait - self.reduction)


Span = tuple[Mark, Mark]


class Speedometer:
    """Training speed over whole steps, by the device's own clock, which is not waited for between two readings.

    The first steps after a start are left out, and so is all time between a reading and the next resume().
    """

    WARMUP = 5
    """Steps after a start that don't count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps = 0
        self.totals = [0.0, 0.0, 0.0, 0.0]
        """Images, seconds, seconds without data, seconds of reduction, of all readings after the warm-up."""
        self.cold = [0.0, 0.0, 0.0, 0.0]
        """Those of the last reading within the warm-up."""
        self.resume()

    def resume(self) -> None:
        """Start the clock anew; what was counted since the last reading is dropped."""
        self.images, self.started = 0, mark(self.device)
        self.waits: list[Span] = []
        self.reductions: list[Span] = []

    def begin(self) -> None:
        """Before each step: the warm-up ends here."""
        if self.steps == self.WARMUP:
            self.resume()

    def step(self, images: int, waits: list[Span], reductions: list[Span]) -> None:
        """Count a step of so many images (all ranks), with its spans without data and of reduction."""
        self.steps += 1
        self.images += images
        self.waits += waits
        self.reductions += reductions

    def read(self, ranks: Ranks = ALONE) -> Speed:
        """The speed since the last reading, a mean over the ranks; the clock starts anew. Waits for the device."""
        if not self.images:
            return self._speed(self.cold)
        now = mark(self.device)
        wait_for(now)
        own = [float(self.images), seconds_between(self.started, now)]
        own += [sum(seconds_between(*span) for span in spans) for spans in (self.waits, self.reductions)]
        reading = [sum(values) / ranks.world_size for values in zip(*ranks.gather(own), strict=True)]
        if self.steps > self.WARMUP:
            self.totals = [total + value for total, value in zip(self.totals, reading, strict=True)]
        else:
            self.cold = reading
        self.resume()
        return self._speed(reading)

    @property
    def total(self) -> Speed:
        """The speed over all readings after the warm-up; of the warm-up where nothing came after it."""
        return self._speed(self.totals if self.totals[0] else self.cold)

    @staticmethod
    def _speed(reading: list[float]) -> Speed:
        images, seconds, waited, reduced = reading
        return Speed(images / seconds, waited / seconds, reduced / seconds) if seconds else Speed(0.0, 0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, for a resumed run to go on from."""
        return {"totals": self.totals, "cold": self.cold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was measured before."""
        self.totals, self.cold = list(state["totals"]), list(state["cold"])
