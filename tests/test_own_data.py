"""The README's recipe for a data set of one's own, copied word by word into a project, by whole commands."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

from ghostnet.data.datasets import Samples
from ghostnet.models.ghostnet import GhostNet
from tests.conftest import REPOSITORY, TINY, environment

WORDS = [*(word for word in TINY if not word.startswith("data=")), "data=mine", "data.image_size=32"]
WORDS += ["data.batch_size=8", "epochs=1", "hydra.run.dir=here"]


def snippets() -> list[str]:
    """The indented blocks of the recipe: the module, then the lines of the config."""
    recipe = (REPOSITORY / "README.md").read_text().partition("**A data set**")[2].partition("**An optimizer**")[0]
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", recipe, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in blocks if block.strip()]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with the recipe's two files, and images in data/."""
    for name in ("ghostnet", "conf"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "evaluate.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    module, dataset = snippets()
    (tmp_path / "ghostnet" / "data" / "mine.py").write_text(module)
    config = (tmp_path / "conf" / "data" / "imagefolder.yaml").read_text()
    config, count = re.subn(r"^dataset:\n(  .*\n)+", lambda _: dataset, config, flags=re.MULTILINE)
    assert count == 1
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(config)
    for split, each in (("train", 16), ("val", 4)):
        samples = Samples(split, None)
        for number in range(2 * each):
            folder = tmp_path / "data" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(samples.pictures[number]).save(folder / f"{number:03}.png")
    return tmp_path


def command(project: Path, program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, program, *words, "data.root=data"],
        cwd=project,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(project)])},
        capture_output=True,
        text=True,
        timeout=120,
    )


def change(project: Path, old: str, new: str) -> None:
    path = project / "ghostnet" / "data" / "mine.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("gives", ["image", "array"])
def test_the_data_set_of_the_readme_trains_and_evaluates(project: Path, gives: str) -> None:
    if gives == "array":
        change(project, "-> Image.Image", "-> np.ndarray")
        change(project, "return Image.open(self.files[index])", "return np.asarray(Image.open(self.files[index]))")
    trained = command(project, "train.py", *WORDS)
    assert trained.returncode == 0, trained.stderr
    assert "32 + 8 images of 2 classes" in trained.stdout
    evaluated = command(project, "evaluate.py", "ckpt=here", "device=cpu")
    assert evaluated.returncode == 0, evaluated.stderr
    assert '"images": 8' in evaluated.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_data_set_raises_ends_the_run_with_its_own_traceback(project: Path, ranks: int) -> None:
    change(project, "return Image.open(self.files[index])", "return self.flies[index]")
    done = command(project, "train.py", *WORDS, "data.on_error=skip", f"device=cpu{'_2p' if ranks == 2 else ''}")
    assert done.returncode == 1
    assert "image" in done.stderr
    assert "return self.flies[index]" in done.stderr
    assert "AttributeError: 'Mine' object has no attribute 'flies'" in done.stderr
    assert "Replace or remove" not in done.stderr
    told = command(project, "evaluate.py", "ckpt=here/last.pt", "device=cpu", "data.on_error=skip")
    assert told.returncode == 1
    assert "return self.flies[index]" in told.stderr


def test_an_image_of_a_data_set_that_is_no_image_is_skipped(project: Path) -> None:
    (project / "data" / "val" / "class0" / "000.png").write_bytes(b"no image")
    done = command(project, "train.py", *WORDS, "data.on_error=skip")
    assert done.returncode == 0, done.stderr
    told = command(project, "evaluate.py", "ckpt=here", "device=cpu", "data.on_error=raise")
    assert told.returncode == 1
    assert "can't be used: cannot identify image file" in told.stderr
    assert "Traceback" not in told.stderr


def test_weights_that_are_nan_are_neither_scored_nor_trained_from(project: Path) -> None:
    state = GhostNet(2, 0.1).state_dict()
    state["bn1.running_var"][0] = float("nan")
    torch.save({"model_ema": state, "model": state}, project / "w.pth")
    words = ["model.width=0.1", "device=cpu", "data=mine", "data.image_size=32"]
    for done in (
        command(project, "evaluate.py", "ckpt=w.pth", *words),
        command(project, "train.py", *WORDS, "model.weights=w.pth"),
    ):
        assert done.returncode == 1
        assert "error: w.pth: bn1.running_var holds NaN or infinite numbers" in done.stderr
        assert "Traceback" not in done.stderr
    state["bn1.running_var"][0] = 1
    torch.save({"model_ema": state, "model": state}, project / "w.pth")
    for done in (
        command(project, "evaluate.py", "ckpt=w.pth", *words),
        command(project, "train.py", *WORDS, "model.weights=w.pth"),
    ):
        assert done.returncode == 0, done.stderr
        assert "weights of model_ema, which are averaged; not taken: model" in done.stdout
