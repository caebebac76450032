"""wandb://entity/project/artifact:alias in the place of a path. A stand-in for wandb.Api gives what a server would."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostnet.errors import ConfigError
from ghostnet.wandb.artifact import is_artifact
from tests.conftest import REPOSITORY, TINY, Run, environment

# A module named wandb that stands before the real one: artifacts are folders below $ARTIFACTS.
STAND_IN = """
import os, pathlib, shutil, types

class Error(Exception): ...
class CommError(Error): ...
class UsageError(Error): ...
errors = types.SimpleNamespace(Error=Error, CommError=CommError, UsageError=UsageError)

class Artifact:
    version = "v3"
    def __init__(self, folder):
        self.folder = folder
        entries = {p.name: types.SimpleNamespace(size=p.stat().st_size) for p in folder.iterdir()}
        self.manifest = types.SimpleNamespace(entries=entries)
    def download(self, root, path_prefix, skip_cache):
        print("downloading", path_prefix)
        pathlib.Path(root).mkdir(parents=True)
        shutil.copy(self.folder / path_prefix, pathlib.Path(root) / path_prefix)
        if "TORN" in os.environ:
            (pathlib.Path(root) / path_prefix).write_bytes(b"")

class Api:
    def __init__(self, timeout): ...
    def artifact(self, name):
        folder = pathlib.Path(os.environ["ARTIFACTS"]) / name
        if not folder.is_dir():
            raise CommError(f"artifact '{name}' not found in 'me/p'")
        return Artifact(folder)

def teardown(): ...
"""
Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def stand_in(tmp_path: Path, run: Run) -> Program:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STAND_IN)
    own = {"PYTHONPATH": str(tmp_path / "modules"), "ARTIFACTS": str(tmp_path / "artifacts")}
    own |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    return lambda program, *words, **env: run(program, *words, **(own | env))


@pytest.mark.slow
def test_an_artifact_is_downloaded_once_and_evaluates_and_trains_as_its_file_does(
    run: Run, stand_in: Program, tmp_path: Path, tiny_data: Path
) -> None:
    words = [*TINY, f"data.root={tiny_data}", "epochs=1"]
    assert run("train.py", *words, "hydra.run.dir=here").returncode == 0
    folder = tmp_path / "artifacts" / "me" / "p" / "ghostnet-1:best"
    folder.mkdir(parents=True)
    (tmp_path / "here" / "best.pt").rename(folder / "best.pt")
    (folder / "notes.txt").write_text("beside it")
    direct = run("evaluate.py", f"ckpt='{folder / 'best.pt'}'")
    for downloads in (1, 0):
        done = stand_in("evaluate.py", "ckpt=wandb://me/p/ghostnet-1:best")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("downloading best.pt") == downloads
        ours, theirs = (json.loads(output.splitlines()[-1]) for output in (done.stdout, direct.stdout))
        assert {**ours, "ckpt": "", "fps": 0} == {**theirs, "ckpt": "", "fps": 0}
    cached = tmp_path / "cache" / "ghostnet" / "wandb" / "me" / "p" / "ghostnet-1" / "v3"
    assert [path.name for path in cached.iterdir()] == ["best.pt"]
    assert [path.name for path in cached.parent.iterdir()] == ["v3"]
    done = stand_in("train.py", *words, "model.weights=wandb://me/p/ghostnet-1:best", "hydra.run.dir=there")
    assert done.returncode == 0, done.stderr
    assert "weights: wandb://me/p/ghostnet-1:best" in (tmp_path / "there" / "config.yaml").read_text()


@pytest.mark.slow
def test_two_ranks_take_the_same_file(run: Run, stand_in: Program, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "epochs=1"]
    assert run("train.py", *words, "hydra.run.dir=here").returncode == 0
    folder = tmp_path / "artifacts" / "me" / "p" / "ghostnet-1:latest"
    folder.mkdir(parents=True)
    (tmp_path / "here" / "best.pt").rename(folder / "best.pt")
    two = ["device=cpu_2p", "data.batch_size=16", "hydra.run.dir=two"]
    done = stand_in("train.py", *words, *two, "model.weights=wandb://me/p/ghostnet-1")
    assert done.returncode == 0, done.stderr
    assert stand_in("evaluate.py", "ckpt=wandb://me/p/ghostnet-1", "device=cpu_2p").returncode == 0


@pytest.mark.parametrize("program", ["evaluate.py", "train.py"])
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("me/p/none:best", "artifact 'me/p/none:best' not found"),
        ("me/p/empty:best", "holds notes.txt: one checkpoint is looked for"),
        ("me/p/torn:best", "best.pt came incomplete"),
        ("me/p", "an artifact is given as wandb://entity/project/artifact:alias"),
    ],
)
def test_what_can_t_be_had_is_told_in_one_message_before_torch_is_loaded(
    stand_in: Program, tmp_path: Path, program: str, address: str, told: str
) -> None:
    for name, file in (("empty:best", "notes.txt"), ("torn:best", "best.pt")):
        folder = tmp_path / "artifacts" / "me" / "p" / name
        folder.mkdir(parents=True)
        (folder / file).write_text("something")
    (tmp_path / "modules" / "torch.py").write_text("raise SystemExit('torch was loaded')")
    key = "ckpt" if program == "evaluate.py" else "model.weights"
    done = stand_in(program, f"{key}=wandb://{address}", "data=samples", TORN="1")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"error: {key}=wandb://{address}")
    assert told in done.stderr
    assert not (tmp_path / "outputs").exists()
    assert not list(tmp_path.glob("cache/ghostnet/wandb/**/*.pt"))


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"WANDB_API_KEY": ""}, "no Weights & Biases login: wandb login"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "can't be reached within 20 s"),
    ],
)
@pytest.mark.slow
def test_without_a_login_or_a_network_real_wandb_says_so_in_one_message(
    tmp_path: Path, env: dict[str, str], told: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "evaluate.py"), "ckpt=wandb://me/p/a:best", "data=samples"],
        cwd=tmp_path,
        env=environment() | {"HOME": str(tmp_path), "WANDB_MODE": "online"} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert told in done.stderr
    assert "x" * 40 not in done.stderr + done.stdout


def test_only_a_whole_address_is_an_artifact() -> None:
    assert not is_artifact(None)
    assert not is_artifact("outputs/a/best.pt")
    assert is_artifact("wandb://me/my-project/ghostnet-1:v3")
    for wrong in (
        "wandb://",
        "wandb://a/b",
        "wandb://../../b/c:d",
        "wandb://a/b/c:d:e",
        "wandb://a/b/c:",
        "wandb://a//c",
    ):
        with pytest.raises(ConfigError, match="an artifact is given as"):
            is_artifact(wrong)
