"""Whole commands on hostile configs, secrets in the environment, damaged data: one message, nothing given away."""

import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
import yaml

from ghostnet import secrets
from ghostnet.data.datasets import ImageFolder, read_idx
from ghostnet.data.decode import picture
from ghostnet.errors import SampleError, UserError
from ghostnet.experiments import record
from tests.conftest import REPOSITORY, TINY, Run, environment
from tests.test_decode import encoded, png_of_size

pytestmark = pytest.mark.slow

KEYS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_notARealTokenOfAnybody",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYnotreal",
    "GITHUB_TOKEN": "ghp_notARealTokenOfAnybody",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The folder of a run with keys in its environment, recorded by W&B too."""
    place = tmp_path_factory.mktemp("trained")
    words = [*TINY, f"data.root={tiny_data}", "epochs=1", "logger=wandb", "hydra.run.dir=here"]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *words],
        cwd=place,
        env=environment() | KEYS,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (place / "here" / "printed").write_text(done.stdout + done.stderr)
    return place / "here"


def copied(trained: Path, place: Path) -> Path:
    shutil.copytree(trained, place / "theirs")
    return place / "theirs"


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def keys_in(folder: Path) -> list[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [(str(path), name) for path in files for name, key in KEYS.items() if key.encode() in path.read_bytes()]


# Constructors that no config group names


TARGETS = {
    "data.dataset._target_": "ghostnet.tools.doctor.__main__.main",
    "data.augment._target_": "ghostnet.data.transforms.Mix",
    "optim._target_": "ghostnet.optim.cosine",
    "schedule._target_": "os.system",
    "amp._target_": "planted.run",
}


@pytest.mark.parametrize("key", TARGETS)
def test_a_constructor_that_no_group_names_is_refused_and_not_even_imported(key: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("open('ran', 'w')\n")
    told = refused(run("train.py", f"{key}={TARGETS[key]}", PYTHONPATH=str(tmp_path)))
    assert f"{key}: {TARGETS[key]} is " in told
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "outputs").exists()


def test_a_data_set_that_no_group_names_is_not_imported_to_look_for_its_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("open('ran', 'w')\n")
    refused(run("train.py", "data.dataset._target_=planted.run", PYTHONPATH=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_constructor_is_allowed_by_a_file_that_names_it(run: Run, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("conf", "ghostnet"):
        shutil.copytree(REPOSITORY / name, project / name)
    shutil.copy(REPOSITORY / "train.py", project)
    (project / "ghostnet" / "mine.py").write_text(
        "def mine(named, /, lr: float, weight_decay: float):\n    raise ValueError(f'lr {lr} reached')\n"
    )
    words = [*TINY, "data=samples", "optim.weight_decay=0", "--cfg", "job"]
    command = [sys.executable, str(project / "train.py"), "optim={}", *words]
    (project / "conf" / "optim" / "mine.yaml").write_text("_target_: ghostnet.mine.mine\nlr: 4\nweight_decay: 0\n")
    command[2] = "optim=mine"
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "_target_: ghostnet.mine.mine" in done.stdout


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("data", "dataset", "_target_"), "ghostnet.tools.doctor.__main__.main", "named by no file of conf/"),
        (("model", "_target_"), "os.system", "not in a module of this project"),
        (("amp",), None, "amp"),
        (("data", "batch_size"), "${oc.decode:'['}", "can't be read"),
        (("data", "batch_size"), "${nowhere:1}", "can't be read"),
    ],
)
def test_the_config_of_a_checkpoint_is_checked_as_a_users_is(
    key: tuple[str, ...], value: object, message: str, run: Run, tmp_path: Path, trained: Path
) -> None:
    saved = torch.load(trained / "best.pt", weights_only=True)
    node = saved["config"]
    for name in key[:-1]:
        node = node[name]
    if value is None:
        del node[key[-1]]
    else:
        node[key[-1]] = value
    del saved["sealed"]  # as a version without checksums wrote it
    torch.save(saved, tmp_path / "theirs.pt")
    told = refused(run("evaluate.py", "ckpt=theirs.pt"))
    assert message in told
    assert "theirs.pt" in told


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(c)}: &{chr(c)} [{','.join([f'*{chr(c - 1)}'] * 9)}]\n" for c in range(98, 112)
)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", BOMB, "an alias"),
        ("config.yaml", "[1", "can't be read"),
        ("config.yaml", "- 1", "no config of a run"),
        ("config.yaml", "a: " + "[" * 2000 + "]" * 2000, "can't be read"),
        (".hydra/overrides.yaml", "a: 1", "no list of words"),
        (".hydra/overrides.yaml", "- '[['", "not of the form key=value"),
        (".hydra/overrides.yaml", "- +hydra.callbacks.x._target_=planted.run", "a setting of Hydra's own"),
        (".hydra/overrides.yaml", "- hydra/launcher=joblib", "a setting of Hydra's own"),
        (".hydra/overrides.yaml", "- optim._target_=planted.run", "not in a module of this project"),
        (".hydra/overrides.yaml", "- optim._target_=ghostnet.optim.cosine", "named by no file of conf/"),
    ],
)
def test_a_run_folder_of_anyone_is_checked_when_it_is_run_again(
    file: str, text: str, message: str, run: Run, tmp_path: Path, trained: Path
) -> None:
    (tmp_path / "planted.py").write_text("open('ran', 'w')\n")
    folder = copied(trained, tmp_path)
    (folder / file).write_text(text)
    assert message in refused(run("train.py", f"rerun={folder}", PYTHONPATH=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_target_in_the_config_of_a_run_is_refused_when_it_is_run_again(
    run: Run, tmp_path: Path, trained: Path
) -> None:
    folder = copied(trained, tmp_path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["optim"]["_target_"] = "ghostnet.tools.doctor.__main__.main"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert "named by no file of conf/" in refused(run("train.py", f"rerun={folder}"))


# Secrets


def test_no_key_of_the_environment_is_in_a_run_folder_or_what_is_printed(trained: Path) -> None:
    assert list(trained.glob("wandb/offline-run-*"))
    assert keys_in(trained) == []


def test_no_key_is_in_the_folder_of_a_run_that_failed(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "optim.lr=1e30", "clip_grad_norm=null", "logger=wandb"]
    done = run("train.py", *words, "hydra.run.dir=here", **KEYS)
    assert done.returncode == 1
    assert keys_in(tmp_path) == []
    assert not any(key in done.stdout + done.stderr for key in KEYS.values())


def test_the_doctor_tells_no_key(run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ghostnet.tools.doctor", "experiment=quickstart", "logger=wandb"]
    env = environment() | KEYS | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout
    assert not any(key in done.stdout + done.stderr for key in KEYS.values())


def test_a_command_that_holds_a_key_is_refused_without_repeating_it(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    key = KEYS["WANDB_API_KEY"]
    for word in (f"hydra.job.env_set.WANDB_API_KEY={key}", f"+hydra.job.env_set.HF_TOKEN={key}", f"data.root={key}"):
        done = run("train.py", *TINY, f"data.root={tiny_data}", word, WANDB_API_KEY=key)
        assert "_KEY: the command holds this secret" in refused(done)
        assert key not in done.stderr
    done = run("train.py", *TINY, "data.root=${oc.env:WANDB_API_KEY}", WANDB_API_KEY=key)
    assert key not in refused(done)
    done = run("train.py", *TINY, f"data.root={tiny_data}", "+hydra.job.env_set.HF_TOKEN=hf_other_one")
    assert "hydra.job.env_set.HF_TOKEN: the run folder would hold it" in refused(done)
    assert not (tmp_path / "outputs").exists()


def test_what_differs_from_the_commit_is_kept_without_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    (tmp_path / "new.py").write_text(f"key = '{KEYS['HF_TOKEN']}'\n")
    for name in (".env", ".env.local", ".netrc", "card.pem"):
        (tmp_path / name).write_text("another key\n")
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    _, diff = record.code.__wrapped__()
    assert "key = '***'" in diff
    assert "another key" not in diff


def test_a_secret_is_told_by_the_name_of_its_variable() -> None:
    path, long = {"GOOGLE_APPLICATION_CREDENTIALS": "/etc/hostname"}, {"PATH": "/usr/bin:/bin:/usr"}
    others = {"TOKENIZERS_PARALLELISM": "anything-at-all", "KEYBOARD": "pc105-de-nodeadkeys", "TOKEN": "1"}
    assert secrets.values(KEYS | path | long | others) == KEYS
    assert set(secrets.values({"DB_PASSWORD": "x" * 8, "apikey": "y" * 8, "MY_API_KEY": "z" * 5000})) >= {"DB_PASSWORD"}


# Damaged data


def scans(count: int) -> bytes:
    data = encoded(torch.zeros(24, 32, 3, dtype=torch.uint8).numpy(), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


DAMAGED = {
    "cut.jpg": encoded(torch.zeros(24, 32, 3, dtype=torch.uint8).numpy(), "JPEG")[:300],
    "noise.png": bytes(range(256)),
    "empty.jpg": b"",
    "bomb.png": png_of_size(20_000, 20_000),
    "scans.jpg": scans(1000),
}


@pytest.fixture
def damaged(tmp_path: Path, image_folder: Path) -> Path:
    """The image folder with pictures of each kind of damage in both splits."""
    root = tmp_path / "data"
    shutil.copytree(image_folder, root)
    for split in ("train", "val"):
        for name, content in DAMAGED.items():
            (root / split / "class1" / name).write_bytes(content)
    return root


FOLDER = [*TINY, "data=imagefolder", "data.image_size=32", "data.batch_size=16", "hydra.run.dir=here"]


def test_damaged_images_are_skipped_and_counted_in_both_splits(run: Run, tmp_path: Path, damaged: Path) -> None:
    done = run("train.py", *FOLDER, f"data.root={damaged}", "data.on_error=skip", "epochs=3")
    assert done.returncode == 0, done.stderr
    result = record.result(tmp_path / "here")
    assert result["skipped_val"] == len(DAMAGED)
    assert 1 <= result["skipped_train"] <= len(DAMAGED)
    assert all(f"{damaged}/val/class1/{name}" in done.stdout for name in DAMAGED)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["empty.jpg", "bomb.png"])
def test_a_damaged_image_of_either_split_ends_the_run_in_one_message(
    name: str, split: str, run: Run, damaged: Path
) -> None:
    for path in damaged.rglob("*"):
        if path.name in DAMAGED and (path.name, path.parent.parent.name) != (name, split):
            path.unlink()
    told = refused(run("train.py", *FOLDER, f"data.root={damaged}", "epochs=8"))
    assert f"{damaged}/{split}/class1/{name}" in told


def test_an_image_that_is_deleted_while_training_goes_on_is_named(tmp_path: Path, image_folder: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(image_folder, root)
    words = [*FOLDER, f"data.root={root}", "epochs=500", "eval_every=500", "log_every=1"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as training:
        until = time.monotonic() + 60
        while not (tmp_path / "here" / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        gone = root / "train" / "class2" / "001.JPEG"
        gone.unlink()
        _, told = training.communicate(timeout=60)
    assert training.returncode == 1
    assert f"error: {gone} can't be read: No such file or directory." in told
    assert "resume=auto" in told
    assert (tmp_path / "here" / "last.pt").exists()


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_an_image_is_no_hang(tmp_path: Path, image_folder: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "data")
    pipe = tmp_path / "data" / "train" / "class0" / "000.jpg"
    pipe.unlink()
    os.mkfifo(pipe)
    dataset = ImageFolder("train", str(tmp_path / "data"))
    with pytest.raises(SampleError, match="is no file"):
        dataset.image(0)


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    with pytest.raises(SampleError, match=r"x can't be decoded: it has 1,0\d\d scans"):
        picture(scans(1000), "x")
    assert picture(scans(0), "x").cut().shape[:2] == (24, 32)


def test_an_idx_file_is_read_no_further_than_its_header_says(tmp_path: Path) -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    with (tmp_path / "x.gz").open("wb") as file:
        file.write(squeeze.compress(bytes([0, 0, 8, 1, 0, 0, 0, 4])))
        for _ in range(2000):
            file.write(squeeze.compress(bytes(1 << 20)))
        file.write(squeeze.flush())
    before = int(Path("/proc/self/statm").read_text().split()[1])
    with pytest.raises(UserError, match="is no whole IDX file"):
        read_idx(tmp_path, "x", 1)
    (tmp_path / "y").write_bytes(bytes([0, 0, 8, 1]) + b"\xff" * 4)
    with pytest.raises(UserError, match="is no whole IDX file"):
        read_idx(tmp_path, "y", 1)
    assert int(Path("/proc/self/statm").read_text().split()[1]) - before < 100_000_000 // os.sysconf("SC_PAGE_SIZE")
