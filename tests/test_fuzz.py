"""Hostile inputs: thousands that chance makes, and those that once took all memory or time."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ghostnet import checkpoint
from ghostnet.errors import UserError
from ghostnet.models.weights import read_file, read_weights
from tests.conftest import REPOSITORY, Run

pytestmark = pytest.mark.slow

SEED = os.environ.get("FUZZ_SEED", "0")
"""Another one tries others; what they find is kept below, as it is."""
COUNTS = {"checkpoints": 10_000, "shards": 10_000, "pictures": 10_000, "words": 10_000, "commands": 40}


def fuzzed(kind: str, seed: str, first: int, count: int, folder: Path) -> dict[str, int]:
    """Have inputs read in a process of their own -> how many ended in values, and in refusals."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", kind, seed, str(first), str(count), str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder), "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    at = (folder / "at").read_text().strip() if (folder / "at").exists() else "none"
    assert done.returncode == 0, f"ended by {done.returncode} at {kind} {seed} {at}: {done.stderr[-2000:]}"
    ends = json.loads(done.stdout.splitlines()[-1])
    assert not ends["failures"], f"{kind} {seed}: {ends['failures']}"
    assert ends["values"] + ends["refused"] == count
    assert ends["peak_mib"] < 3 << 10
    return dict(ends)


@pytest.mark.timeout(310)
@pytest.mark.parametrize("kind", COUNTS)
def test_thousands_of_hostile_inputs_end_in_a_value_or_one_message(kind: str, tmp_path: Path) -> None:
    ends = fuzzed(kind, SEED, 0, COUNTS[kind], tmp_path)
    print(kind, ends)
    assert min(ends["values"], ends["refused"]) >= (0 if kind == "commands" else COUNTS[kind] // 100), ends


@pytest.mark.parametrize("words", [["experiment=1"], ["experiment=[1,2]"], ["optim=1.5", "local=2"]], ids=str)
def test_a_number_in_the_place_of_an_option_is_told_in_one_message(words: list[str], run: Run) -> None:
    done = run("train.py", *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


# Checkpoints that are small, and would take all memory or time


def with_pickle(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with another pickle in it."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, content if name.endswith("data.pkl") else data)
    return path


NESTED = b"\x80\x02}K\x01q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s."
CODED = b"\x80\x02c_codecs\nencode\nq\x00X\x04\0\0\0abcdX\x05\0\0\0ascii\x86Rq\x01"
CODED += b"h\x00h\x01X\x03\0\0\0hex\x86Rq\x01" * 40 + b"."
HUGE = {
    "a tuple of itself, 2 to the 60th, hashed": NESTED,
    "a text that is doubled forty times": CODED,
    "a call for a terabyte": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R.",
    "a call for 8 GiB": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (1 << 33).to_bytes(5, "little") + b"\x85R.",
    "a tensor of a terabyte": b"\x80\x02ctorch\nTensor\n\x8a\x06" + (1 << 38).to_bytes(6, "little") + b"\x85R.",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HUGE)
def test_a_small_checkpoint_takes_little_memory_and_time_whatever_it_asks_for(name: str, tmp_path: Path) -> None:
    before = int(Path("/proc/self/statm").read_text().split()[1])
    with pytest.raises(UserError, match=r"x\.pt (is truncated, damaged|was refused)"):
        read_file(with_pickle(tmp_path / "x.pt", HUGE[name]))
    grown = (int(Path("/proc/self/statm").read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE")
    assert grown < 1 << 30


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its parts are compressed"):
        read_file(with_pickle(tmp_path / "x.pt", bytes(1 << 26), zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("length", [1 << 20, (1 << 40) - 1])
def test_absurd_headers_of_safetensors_are_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4))
    with pytest.raises(UserError, match=r"its header claims [\d,]+ bytes"):
        read_file(path)


def test_a_tensor_that_makes_many_numbers_of_one_is_no_weight(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1, dtype=torch.half).expand(1 << 40)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(tmp_path / "x.pt")


def own(**changed: object) -> dict[str, object]:
    facts: dict[str, object] = {"config": {"seed": 1}, "classes": ["a"], "images": 4, "num_classes": 1, "step": 2}
    facts |= {"global_batch_size": 4, "seconds": 1.5, "model": {"a": torch.ones(1)}, "ema": None}
    return {"format": checkpoint.FORMAT} | facts | changed


def doubled() -> dict[str, object]:
    node: dict[str, object] = {}
    for _ in range(60):
        node = {"a": node, "b": node}
    return node


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "changed",
    [
        *({"config": doubled()}, {"config": {"a": {1: 2}}}, {"config": {"a": torch.ones(1)}}, {"config": 5}),
        *({"classes": [1]}, {"step": "2"}, {"model": {"a": 1}}, {"model": [1]}, {"ema": {"a": None}}),
    ],
)
def test_a_checkpoint_of_ours_with_other_content_is_damaged(changed: dict[str, object]) -> None:
    checkpoint.check(own(), Path("x"))
    with pytest.raises(UserError, match="x is a damaged checkpoint"):
        checkpoint.check(own(**changed), Path("x"))
    with pytest.raises(UserError, match=f"it has no {next(iter(changed))}"):
        checkpoint.check({key: value for key, value in own().items() if key not in changed}, Path("x"))
