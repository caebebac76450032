"""Randomness is a function: of what is given to it, on every machine, and of nothing else."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ghostnet.seeding import fold_in, sample_rng, seed_init, seed_step
from tests.conftest import REPOSITORY


def test_seeds_are_what_they_were_so_that_every_run_can_be_repeated():
    # 63 bits of BLAKE2b of the tuple as Python writes it; changing it changes every run there ever was.
    digest = hashlib.blake2b(b"(42, 'augment', 3, 17)", digest_size=8).digest()
    assert fold_in(42, "augment", 3, 17) == int.from_bytes(digest, "little") // 2 == 822557914734944892
    assert sample_rng(1, 2, 3).random() == 0.19232982447547686


def test_fold_in_is_the_same_in_another_process():
    program = "from ghostnet.seeding import fold_in; print(fold_in(-5, 'order', 12))"
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == fold_in(-5, "order", 12)


def test_different_values_fold_into_different_seeds_of_63_bits():
    values = [(seed, name, *rest) for seed in (0, 1, -1) for name in ("a", "b") for rest in ((), (1, 23), (12, 3))]
    values += [(0, "augment", epoch, index) for epoch in range(20) for index in range(500)]
    values += [(1, 2), (12,), (1, "2"), (1, "23"), (1, "2", 3), (1, "2, 3"), (1, 2, 3)]
    seeds = {fold_in(*value) for value in values}
    assert len(seeds) == len(values)
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds]).mean(axis=0)
    # Five standard deviations of a fair coin thrown 10,000 times.
    assert np.abs(bits - 0.5).max() < 0.025


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpys_integers_fold_like_pythons(kind):
    assert fold_in(kind(7), "augment", kind(3)) == fold_in(7, "augment", 3)


def test_what_is_no_whole_number_is_no_seed():
    with pytest.raises(TypeError):
        fold_in(1, 0.5)


def test_a_samples_draws_are_a_function_of_seed_epoch_and_index():
    def draws(*key):
        rng = sample_rng(*key)
        return tuple(rng.random() for _ in range(3))

    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in range(5) for index in range(50)]
    assert len({draws(*key) for key in keys}) == len(keys)
    assert [draws(*key) for key in keys] == [draws(*key) for key in keys]


def dropped(*key):
    seed_step(*key)
    return tuple(nn.functional.dropout(torch.ones(64)).tolist())


def test_dropout_is_a_function_of_seed_step_and_rank():
    keys = [(seed, step, rank) for seed in (0, 1) for step in range(5) for rank in range(4)]
    first = {key: dropped(*key) for key in keys}
    torch.rand(1000)
    assert first == {key: dropped(*key) for key in reversed(keys)}
    assert len(set(first.values())) == len(keys)


def test_initial_weights_are_a_function_of_the_seed():
    def weights(seed):
        seed_init(seed)
        return nn.Linear(8, 8).weight.detach()

    first = weights(1)
    assert not torch.equal(first, weights(2))
    assert torch.equal(first, weights(1))
