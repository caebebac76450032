"""Small real data, and whole commands in subprocesses."""

import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ghostnet.data.datasets import Samples
from tests.wandb_server import Server

REPOSITORY = Path(__file__).parent.parent
TINY = ["data=fashion_mnist", "model.width=0.1", "epochs=2", "data.batch_size=32", "data.eval_batch_size=64"]
TINY += ["data.workers=1", "log_every=2", "optim.lr=4", "schedule.warmup_epochs=0.5", "device=cpu"]
"""Overrides of a run of seconds: 2 epochs of 10 steps."""

# Commands inherit what is ignored: by nohup, or of a shell that runs the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # the tests are small: a second thread only waits

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the torture out unless it is asked for by its marker."""
    if "torture" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("torture")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many runs were killed, and what became of them."""
    torture = sys.modules.get("tests.torture")
    if torture and torture.tally.killed:
        terminalreporter.write_sep("=", "torture")
        for line in torture.tally.lines():
            terminalreporter.write_line(line)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONWARNINGS": "default", "WANDB_MODE": "offline"}


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's own cache is not for tests: neither read nor filled by them, nor by the commands that they run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run one of the project's programs in an empty folder; stdout and stderr apart."""

    def run_command(program: str, *words: str, cwd: Path = tmp_path, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(REPOSITORY / program), *words],
            cwd=cwd,
            env=environment() | env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_command


@pytest.fixture
def wandb_server() -> Iterator[Server]:
    """What answers as a W&B server does, and can be told to fail."""
    with Server() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 + 100 images of the samples, class-balanced, as IDX files."""
    folder = tmp_path_factory.mktemp("tiny")
    for split, prefix, count in (("train", "train", 320), ("val", "t10k", 100)):
        samples = Samples(split, None)
        chosen = np.concatenate([np.flatnonzero(samples.labels == label)[: count // 10] for label in range(10)])
        arrays = {"images-idx3": samples.pictures[chosen], "labels-idx1": samples.labels[chosen].astype(np.uint8)}
        for kind, array in arrays.items():
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), 1))
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 + 24 images of the samples in 4 classes, ImageNet's layout, as JPEG, PNG and WebP, RGB and grey."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 16), ("val", 6)):
        samples = Samples(split, None)
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(samples.labels == label)[:count]):
                suffix = ("jpg", "JPEG", "png", "webp")[number % 4]
                image = Image.fromarray(samples.pictures[index]).resize((48, 40), Image.Resampling.BICUBIC)
                (image.convert("RGB") if number % 3 else image).save(folder / f"{number:03}.{suffix}")
    return root


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Real photographs, 512×512, 451×300 and 600×400."""
    from skimage import data

    return [Image.fromarray(picture()) for picture in (data.astronaut, data.chelsea, data.coffee)]


@pytest.fixture(scope="session")
def photo(photos: list[Image.Image]) -> Image.Image:
    """One of them, 451×300."""
    return photos[1]
