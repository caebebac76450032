"""Steps whose loss or gradients are NaN or infinite: noted on the device, left out there, read where a log reads."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ghostnet.distributed import ALONE, Ranks

OnNan = Literal["stop", "skip", "rewind"]
NONE = 0
"""The step of no fault: steps are counted from 1."""


@dataclass(frozen=True)
class Faults:
    """What became of the steps so far, the same on all ranks."""

    step: int
    """The first bad one, of skipped ones the first in the row; 0 for none."""
    loss: float
    gradients: float
    """Its loss and the norm of its gradients; NaN where it was met before the run was resumed."""
    in_a_row: int
    """Skipped up to now without a good one between them."""
    skipped: int
    """Of all steps."""

    def __str__(self) -> str:
        """Which of the two it was, in words."""
        if math.isfinite(self.loss):
            return f"the gradients are not finite (their norm is {self.gradients}, the loss {self.loss:.4g})"
        return f"the loss is not finite ({self.loss}; the gradients' norm is {self.gradients:.4g})"


class Watch:
    """Looks at each step's loss and gradients on the device, which is not waited for before read().

    skips: bad steps are left out, by all ranks alike; else the first of them is kept in mind.
    """

    def __init__(self, device: torch.device, skips: bool) -> None:
        self.skips, self.device = skips, device
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """The first bad step; bad ones, of skipped ones those in a row; all that were skipped."""
        self.seen = torch.zeros(2, device=device)
        """Loss and gradients' norm of that first one."""
        self.first: Faults | None = None
        """The first bad step, if none is skipped."""
        self.unread: list[tuple[int, Tensor, Tensor, bool]] = []
        """If none is skipped: step, loss, gradients' norm and whether that doesn't count, of the steps since read()."""

    def spread(self, loss: Tensor) -> Tensor:
        """The loss to take gradients of: of a bad one that is to be skipped they are NaN, so that all ranks see it.

        Else a loss can be infinite with finite gradients, and the loss scale would not skip with us.
        """
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan) if self.skips else loss

    def look(self, step: int, loss: Tensor, gradients: Tensor, dynamic: bool, ranks: Ranks = ALONE) -> Tensor | None:
        """Note a step, counted from 1, before its update.

        Returns a flag on the device, true if the step is to be skipped; None if no step is ever skipped. dynamic:
        gradients that overflow are the loss scale's affair. All ranks call it.
        """
        if not self.skips:
            # Nothing is computed: the host looks at the numbers when it reads.
            self.unread.append((step, loss, gradients, dynamic))
            return None
        values = torch.stack([loss, gradients.to(loss)])
        bad = ranks.any(~(values[:1] if dynamic else values).isfinite().all())
        first, in_a_row, skipped = self.counts
        new = bad & (in_a_row == 0)
        self.seen = torch.where(new, values, self.seen)
        counts = [torch.where(new, step, first), torch.where(bad, in_a_row + 1, 0), skipped + bad]
        self.counts = torch.stack(counts)
        return bad

    def skipped(self) -> int:
        """Count the steps that were skipped so far; waits for the device if any can be."""
        return int(self.counts[2]) if self.skips else 0

    def read(self, ranks: Ranks = ALONE) -> Faults:
        """What became of the steps so far. Waits for the device; all ranks call it."""
        if self.skips:
            first, in_a_row, skipped = self.counts.tolist()
            loss, gradients = self.seen.tolist() if in_a_row else (0.0, 0.0)
            found = Faults(first if in_a_row else NONE, loss, gradients, in_a_row, skipped)
        else:
            self.first = self.first or self._first_bad()
            found = self.first or Faults(NONE, 0.0, 0.0, 0, 0)
        # The worst of the first: a loss that is bad is one rank's at first, its gradients are everyone's.
        met = [faults for faults in ranks.gather(found) if faults.step]
        return min(met, key=lambda faults: (faults.step, math.isfinite(faults.loss))) if met else found

    def _first_bad(self) -> Faults | None:
        steps, self.unread = self.unread, []
        if not steps:
            return None
        values = torch.stack([value.float() for _, loss, norm, _ in steps for value in (loss, norm)]).view(-1, 2)
        for (step, _, _, dynamic), (loss, norm) in zip(steps, values.tolist(), strict=True):
            if not math.isfinite(loss) or not (dynamic or math.isfinite(norm)):
                return Faults(step, loss, norm, 0, 0)
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: one is saved of good weights only, but they may have been kept by skipping."""
        return {"counts": self.counts.tolist() if self.skips else [0, 0, 0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.first, self.unread = None, []
        self.counts = torch.tensor(state["counts"], dtype=torch.int64, device=self.device)
        self.seen = torch.full_like(self.seen, math.nan)
