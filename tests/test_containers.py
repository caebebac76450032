"""Whole commands in containers as people run them: a user nobody knows, no home, read-only caches, few open files."""

import io
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from tests.conftest import REPOSITORY
from tests.test_train import result

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become another user"),
]
# It may read what root may: the interpreter of a virtual environment can lie in a home.
AS_NOBODY = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
AS_NOBODY += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
SHORT = ["device=cpu", "model.width=0.1", "data.image_size=32", "data.batch_size=32", "data.eval_batch_size=32"]
SHORT += ["data.workers=2", "hydra.run.dir=run"]


@pytest.fixture
def container(tmp_path):
    """Run commands of the project as that user in a folder of theirs, 64 files open at most -> what they print."""
    place = tmp_path / "theirs"
    place.mkdir()
    os.chown(place, 12345, 12345)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"XDG_CACHE_HOME": "/proc", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

    def run(*words):
        words = [str(REPOSITORY / words[0]) if words[0].endswith(".py") else words[0], *words[1:]]
        command = ["prlimit", "--nofile=64", *AS_NOBODY, sys.executable, *words]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        return done.stdout

    return place, run


def test_a_user_without_name_and_home_packs_trains_resumes_and_evaluates(container, image_folder):
    place, run = container
    run("-m", "ghostnet.tools.pack", f"data.root={image_folder}", "out=packed")
    run("train.py", *SHORT, "data=shards", "data.root=packed", "epochs=1", "logger=wandb")
    run("train.py", *SHORT, "data=shards", "data.root=packed", "epochs=2", "resume=auto", "data.cache_val=true")
    assert result(place / "run")["epochs"] == 2
    assert f'"top1": {result(place / "run")["top1"]}' in run("evaluate.py", "ckpt=run", "device=cpu")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert commit.stdout.strip() in (place / "run" / "run.json").read_text()


def test_more_shards_than_files_may_be_open_are_trained_on_and_evaluated(container, image_folder):
    place, run = container
    for split, count in (("train", 128), ("val", 96)):
        files = sorted((image_folder / split).rglob("*.*"))
        (place / "many" / split).mkdir(parents=True)
        for number in range(count):
            file = files[number % len(files)]
            with tarfile.open(place / "many" / split / f"{number:03}.tar", "w") as tar:
                for suffix, data in ((file.suffix, file.read_bytes()), (".cls", file.parent.name[-1:].encode())):
                    member = tarfile.TarInfo(f"{number:03}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    run("train.py", *SHORT, "data=shards", "data.root=many", "epochs=1")
    assert '"images": 96' in run("evaluate.py", "ckpt=run", "device=cpu")
