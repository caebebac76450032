"""A number over seeds: its mean, and how far that can be trusted."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mean:
    """A number over seeds."""

    value: float
    confidence: float | None
    """Half of the 95 % confidence interval by Student's t; None: of one seed."""
    seeds: int


def over_seeds(values: Iterable[tuple[Any, float | None]]) -> Mean | None:
    """(seed, number) pairs -> their mean. A seed that was run several times counts once, by its own mean."""
    by_seed: dict[Any, list[float]] = {}
    for seed, value in values:
        if value is not None and math.isfinite(value):
            by_seed.setdefault(seed, []).append(value)
    means = [statistics.fmean(numbers) for numbers in by_seed.values()]
    if not means:
        return None
    count, confidence = len(means), None
    if count > 1:
        confidence = student_t(count - 1) * statistics.stdev(means) / math.sqrt(count)
    return Mean(statistics.fmean(means), confidence, count)


FEW = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom, to 1e-5 (Cornish and Fisher's expansion)."""
    if freedom <= len(FEW):
        return FEW[freedom - 1]
    z = 1.959963985
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / math.pow(freedom, power) for power, term in enumerate(terms, 1))
