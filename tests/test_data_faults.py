"""Memory that runs out, and faults of the data in mid-run, each really caused, by whole commands."""

import gzip
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ghostnet import checkpoint
from ghostnet.data.loader import EvalLoader, TrainLoader
from ghostnet.errors import DataError, is_out_of_memory
from ghostnet.rescue import memory_told
from tests.conftest import REPOSITORY, TINY, environment
from tests.test_hostile import DAMAGED, FOLDER
from tests.test_loader import OFF, SPEC, Numbered, feeders
from tests.test_nonfinite import FAULTY, refused
from tests.test_train import result, rows

__all__ = ["feeders"]
BIG = [
    "data=fashion_mnist",
    "data.image_size=96",
    "model.width=0.3",
    "data.batch_size=64",
    "schedule.warmup_epochs=0.5",
]
BIG += ["device=cpu", "data.workers=1", "log_every=1", "hydra.run.dir=here"]


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 29.50 GiB total capacity; ...)"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("u1")),
        MemoryError(),
    ],
)
def test_each_way_of_having_no_memory_gives_the_batch_size_to_try(error):
    assert is_out_of_memory(error)
    for batch_size, accumulate, part in (
        (64, 1, "data.batch_size=64. Try data.batch_size=32 accumulate=2, which keep the global batch"),
        (96, 3, "data.batch_size=96 accumulate=3. Try data.batch_size=48 accumulate=6"),
        (33, 1, "Try data.batch_size=11 accumulate=3"),
        (31, 1, "Try data.batch_size=15, which makes the global batch and the learning rate smaller"),
        (1, 1, "Try a smaller data.image_size or model.width"),
        (256, 0, "in evaluation with data.eval_batch_size=256. Try data.eval_batch_size=128, which changes no result"),
    ):
        with pytest.raises(Exception, match=r"^out of memory in ") as told, memory_told(batch_size, accumulate):
            raise error
        assert part in str(told.value)
    with pytest.raises(ValueError, match="another"), memory_told(1):
        raise ValueError("another")


def test_a_run_without_memory_tells_the_batch_size_to_try(run, tiny_data):
    words = [*BIG, f"data.root={tiny_data}"]
    told = refused(run("train.py", *words, "epochs=1", MEMORY_LEFT="30", PYTHONPATH=FAULTY))
    assert told.startswith(
        "error: out of memory in training with data.batch_size=64. Try data.batch_size=32 accumulate=2"
    )
    assert told.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("left", [5, 100, 150])
def test_what_a_run_without_memory_is_told_to_try_goes_on_with_it(run, tmp_path, tiny_data, left):
    big = [*BIG, f"data.root={tiny_data}"]
    first = run("train.py", *big, "epochs=1")
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "here" / "last.pt").read_bytes()
    told = refused(run("train.py", *big, "epochs=2", "resume=auto", MEMORY_LEFT=str(left), PYTHONPATH=FAULTY))
    assert "out of memory in training" in told
    assert (tmp_path / "here" / "last.pt").read_bytes() == before
    words = told.partition(" Try ")[2].split(",")[0].split()
    again = run("train.py", *big, *words, "epochs=2", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "here")["global_batch_size"] == 64


@pytest.mark.slow
def test_a_card_without_memory_tells_the_batch_size_to_try(run, tiny_data):
    """The stand-in refuses what goes beyond its memory in the words of torch_npu, a plain RuntimeError."""
    words = [word for word in BIG if not word.startswith("device=")] + [
        "device=npu_1p",
        "epochs=1",
        f"data.root={tiny_data}",
    ]
    npu = {"PYTHONPATH": str(REPOSITORY / "tests" / "emulated_npu")}
    told = refused(run("train.py", *words, EMULATED_NPU_MEMORY="40", **npu))
    assert told.startswith("error: out of memory in training with data.batch_size=64. Try data.batch_size=32")
    words += ["data.batch_size=8", "accumulate=8", "hydra.run.dir=less"]
    told = refused(run("train.py", *words, EMULATED_NPU_MEMORY="40", **npu))
    assert told.startswith(
        "error: out of memory in evaluation with data.eval_batch_size=500. Try data.eval_batch_size=250"
    )
    assert "What was trained so far is saved." in told
    done = run("train.py", *words, "data.eval_batch_size=25", "resume=auto", EMULATED_NPU_MEMORY="40", **npu)
    assert done.returncode == 0, done.stderr
    assert "last.pt, step 5 of 5" in done.stdout


# The data


def test_an_error_that_nobody_foresaw_names_its_picture(feeders):
    dataset = Numbered(20, wait=lambda index: 1 / (index - 7))
    for skip in (False, True):
        with pytest.raises(
            DataError, match=r"(?s)^image 7 of Numbered led to an error in code.*in <lambda>.*ZeroDivis"
        ):
            list(TrainLoader(dataset, SPEC, OFF, 5, 1, feeders(), skip=skip).batches(0))
        with pytest.raises(DataError, match=r"^image 7 of Numbered led to an error in code"):
            list(EvalLoader(dataset, SPEC, 5, feeders(), skip=skip).batches())


def test_an_os_error_of_a_data_set_is_an_image_that_is_skipped(feeders):
    def wait(index):
        if index == 7:
            raise FileNotFoundError("gone")

    loader = EvalLoader(Numbered(20, wait=wait), SPEC, 5, feeders(), skip=True)
    assert sum(len(labels) for _, labels in loader.batches()) == 19
    assert loader.skipped.news() == [
        "image 7 of Numbered can't be used: gone. Replace or remove it, or give data.on_error=skip."
    ]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_thread_that_raises_ends_the_run_with_its_picture(run, tmp_path, image_folder, ranks):
    words = [*FOLDER, f"data.root={image_folder}", "epochs=1"]
    words += ["device=cpu_2p", "data.batch_size=8"] if ranks == 2 else []
    done = run("train.py", *words, "data.on_error=skip", BAD_PICTURE="005.JPEG", PYTHONPATH=FAULTY)
    told = done.stderr
    assert done.returncode == 1
    assert "/005.JPEG led to an error in code, which is no fault of the file:\nTraceback" in told
    assert "ZeroDivisionError: of no kind that is foreseen" in told
    assert "resume=auto" in told
    saved = checkpoint.load(tmp_path / "here" / "last.pt")
    assert all(value.isfinite().all() for value in saved["model"].values())
    again = run("train.py", *words, "resume=auto")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DAMAGED, "deleted.jpg"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_picture_that_is_damaged_in_mid_run_ends_it_and_it_goes_on_once_mended(
    run, tmp_path, image_folder, name, split
):
    """The run is in its second epoch or later when it happens: there is a checkpoint before it."""
    root = tmp_path / "data"
    shutil.copytree(image_folder, root)
    target = root / split / "class1" / "001.JPEG"
    good = target.read_bytes()
    words = [*FOLDER, f"data.root={root}", "log_every=1"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *words, "epochs=2000"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as training:
        until = time.monotonic() + 100
        while not (tmp_path / "here" / "last.pt").exists() and time.monotonic() < until:
            time.sleep(0.05)
        if name == "deleted.jpg":
            target.unlink()
        else:
            target.write_bytes(DAMAGED[name])
        _, told = training.communicate(timeout=100)
    assert training.returncode == 1
    assert "Traceback" not in told
    assert f"error: {target} " in told
    assert "resume=auto" in told
    reached = checkpoint.load(tmp_path / "here" / "last.pt")["step"]
    assert reached
    target.write_bytes(good)
    epochs = reached // 4 + 1
    again = run("train.py", *words, f"epochs={epochs}", "resume=auto")
    assert again.returncode == 0, again.stderr
    steps = [row["step"] for row in rows(tmp_path / "here") if "train/loss" in row]
    assert steps == list(range(1, 4 * epochs + 1))


@pytest.mark.slow
def test_labels_that_do_not_belong_to_the_pictures_end_the_run_in_one_message(run, tmp_path, tiny_data):
    for path in tiny_data.iterdir():
        shutil.copy(path, tmp_path / path.name)
    labels = gzip.decompress((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    for content, part in (
        (labels[:7] + b"\x3c" + labels[8:], "train-labels"),  # a header of 60 labels, where there are 320
        (labels[:-1] + b"\xc8", "200"),  # a label beyond the classes
    ):
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
        told = refused(run("train.py", *TINY, f"data.root={tmp_path}"))
        assert told.startswith("error: ")
        assert part in told
