"""Randomness as a function: every random draw comes from a seed folded with what it is for, so no state is carried."""

import hashlib
import operator
import random


def fold_in(seed: int, *values: int | str) -> int:
    """A new 63-bit seed from a seed and what it is for (stream name, epoch, index …), the same on every machine."""
    # index(): numpy's integers are written in other ways than Python's.
    text = repr(tuple(v if isinstance(v, str) else operator.index(v) for v in (seed, *values)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def rewound(seed: int, times: int) -> int:
    """The seed of what is random after a run was taken back so many times; unchanged for none."""
    return fold_in(seed, "rewind", times) if times else seed


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """The generator of one sample's augmentation: a function of (seed, epoch, sample index) alone."""
    return random.Random(fold_in(seed, "augment", epoch, index))


def seed_init(seed: int) -> None:
    """Seed torch's generators before the model is built."""
    import torch

    torch.manual_seed(fold_in(seed, "init"))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators on all devices before a forward pass: dropout is a function of (seed, step, rank)."""
    import torch

    torch.manual_seed(fold_in(seed, "dropout", step, rank))
