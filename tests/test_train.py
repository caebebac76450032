"""What users run: whole commands of train.py and evaluate.py, in subprocesses, on real images."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from ghostnet import checkpoint
from tests.conftest import REPOSITORY, TINY, Run, environment

HARD = ["data.mix.mixup=0.2", "data.mix.cutmix=1.0", "data.augment.erasing=0.5", "data.augment.randaugment=1"]
HARD += ["model.dropout=0.2", "ema_decay=0.9", "accumulate=2", "data.batch_size=16"]
"""All that draws random numbers, switched on."""


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what the clock decides."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clock = {"time", "train/fps", "train/compute", "train/data_wait", "train/reduction", "eval/fps"}
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def assert_same_state(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits: weights, average, optimizer, scale, meter, best so far."""

    def compare(x: object, y: object, where: str) -> None:
        assert type(x) is type(y), where
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), where  # type: ignore[arg-type]
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), where  # type: ignore[attr-defined]
            for key in x.keys() - {"config", "seconds", "time", "eval/fps", "speed"}:
                compare(x[key], y[key], f"{where}.{key}")  # type: ignore[index]
        elif isinstance(x, list | tuple):
            assert len(x) == len(y), where  # type: ignore[arg-type]
            for number, pair in enumerate(zip(x, y, strict=True)):  # type: ignore[call-overload]
                compare(*pair, f"{where}[{number}]")
        else:
            assert x == y, where

    compare(checkpoint.load(a), checkpoint.load(b), "checkpoint")


def stop_after(
    step: int, signum: int, words: list[str], cwd: Path, folder: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run train.py and send it a signal once metrics of a step are on disk in a run folder, that of the words."""
    folder = folder or next(Path(word.split("=", 1)[1]) for word in words if word.startswith("hydra.run.dir="))
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *words],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(folder)):
            break
        time.sleep(0.005)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_a_run_leaves_config_metrics_result_checkpoints_and_log(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    done = run("train.py", *TINY, f"data.root={tiny_data}", "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "here"
    left = {path.name for path in folder.iterdir()}
    own = {".hydra", ".lock", "config.yaml", "metrics.jsonl", "result.json", "run.json", "train.log"}
    own |= {"last.pt", "previous-1.pt", "best.pt"}
    assert left - {"code.diff"} == own
    overrides = (folder / ".hydra" / "overrides.yaml").read_text()
    assert all(word in overrides for word in TINY)
    found = result(folder)
    expected = {"status": "completed", "epochs": 2, "steps": 20, "amp": "none", "device": "cpu", "world_size": 1}
    expected |= {"batch_size": 32, "torch": torch.__version__}
    assert {key: found[key] for key in expected} == expected
    assert found["fps"] > 0
    assert found["seconds"] > 0
    assert f"data.root={tiny_data}" in found["command"]
    written = rows(folder)
    assert [row["step"] for row in written if "train/loss" in row] == list(range(2, 21, 2))
    evaluations = [row for row in written if "eval/top1" in row]
    assert [row["step"] for row in evaluations] == [10, 20]
    assert found["top1"] == max(row["eval/top1"] for row in evaluations)
    for part in ("NAME", "Acc@1", "FPS", "Epochs", "AMP_Type", "Torch_Version", "1p-CPU"):
        assert part in done.stdout
    for line in ("Final Performance images/sec", "Final Train Accuracy", "E2E Training Duration sec"):
        assert line in done.stdout
        assert line in (folder / "train.log").read_text()


def test_evaluate_prints_exactly_the_accuracy_of_the_run(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "hydra.run.dir=here", "ema_decay=0.5", "amp=o2"]
    assert run("train.py", *words).returncode == 0
    reported = result(tmp_path / "here")
    for ckpt, extra in (("here/best.pt", []), ("here", ["data.eval_batch_size=7", "data.workers=2"])):
        done = run("evaluate.py", f"ckpt={ckpt}", *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout.splitlines()[-1])
        assert printed["top1"] == reported["top1"]
        assert printed["top5"] == reported["top5"]
        assert printed["loss"] == pytest.approx(reported["loss"], rel=1e-3)
        assert printed["ema"]
        assert printed["amp"] == "o2"
        assert f"Acc@1 {reported['top1']:.3f}" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"here"}, "an evaluation leaves files behind"


@pytest.mark.slow
def test_evaluate_takes_data_and_precision_from_the_command(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    assert run("train.py", *TINY, f"data.root={tiny_data}", "hydra.run.dir=here", "epochs=1").returncode == 0
    done = run("evaluate.py", "ckpt=here", "data=samples", "data.image_size=32", "amp=bf16")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["images"] == 1000
    assert printed["amp"] == "bf16"
    for words, part in (
        (["data.root=/nowhere"], "data.root=/nowhere"),
        (["model.width=0.5"], "width 0.1"),
        (["model.num_classes=20"], "classifier of 10 classes"),
        (["ema=true"], "no moving average"),
        (["-m"], "-m is for train.py"),
    ):
        done = run("evaluate.py", "ckpt=here", *words)
        assert done.returncode == 1
        assert part in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_evaluate_goes_by_the_names_of_the_classes(run: Run, tmp_path: Path, image_folder: Path) -> None:
    """A folder with some of the classes gives the same hits as these classes have among all."""
    words = [*TINY, f"data.root={image_folder}", "data=imagefolder", "data.image_size=32", "data.batch_size=16"]
    assert run("train.py", *words, "hydra.run.dir=here", "epochs=3").returncode == 0
    hits = 0
    for names in (("class0", "class2"), ("class1",), ("class3",)):
        for name in names:
            shutil.copytree(image_folder / "val" / name, tmp_path / "-".join(names) / "val" / name)
        done = run("evaluate.py", "ckpt=here", f"data.root={tmp_path}/{'-'.join(names)}")
        assert done.returncode == 0, done.stderr
        hits += json.loads(done.stdout.splitlines()[-1])["top1_hits"]
    assert hits == round(result(tmp_path / "here")["top1"] * 24 / 100)
    (tmp_path / "other" / "val").mkdir(parents=True)
    shutil.copytree(image_folder / "val" / "class0", tmp_path / "other" / "val" / "cat")
    unknown = run("evaluate.py", "ckpt=here", f"data.root={tmp_path}/other")
    assert unknown.returncode == 1
    assert "cat" in unknown.stderr


@pytest.mark.parametrize(("words", "part"), [
    ([], "ckpt"),
    (["ckpt=nowhere.pt"], "nowhere.pt does not exist"),
    (["ckpt=empty"], "holds no best.pt"),
    (["ckpt=text.pt"], "text.pt"),
    (["ckpt=text.pt", "dat.root=x"], "data.root?"),
])  # fmt: skip
def test_evaluate_says_what_is_wrong(run: Run, tmp_path: Path, words: list[str], part: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("not weights")
    done = run("evaluate.py", *words)
    assert done.returncode == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("amp", ["none", pytest.param("o2", marks=pytest.mark.slow)])
def test_a_run_stopped_in_mid_epoch_resumes_bit_exactly(run: Run, tmp_path: Path, tiny_data: Path, amp: str) -> None:
    words = [*TINY, *HARD, f"data.root={tiny_data}", "log_every=1", f"amp={amp}"]
    assert run("train.py", *words, "hydra.run.dir=whole").returncode == 0
    stopped = stop_after(3, signal.SIGTERM, [*words, f"hydra.run.dir={tmp_path}/cut"], tmp_path)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "resume=auto" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    step = checkpoint.load(tmp_path / "cut" / "last.pt")["step"]
    assert 3 <= step < 20
    assert step % 10, "not in mid-epoch: the test proves nothing"
    # Once more, by Ctrl-C, and with another number of threads.
    words = [*words, f"hydra.run.dir={tmp_path}/cut", "resume=auto", "data.workers=3"]
    again = stop_after(step + 2, signal.SIGINT, words, tmp_path)
    assert again.returncode in (128 + signal.SIGINT, 0)
    assert run("train.py", *words).returncode == 0
    assert_same_state(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert_same_state(tmp_path / "whole" / "best.pt", tmp_path / "cut" / "best.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    for key in ("top1", "top5", "loss", "best_epoch", "steps"):
        assert result(tmp_path / "whole")[key] == result(tmp_path / "cut")[key]


def test_sigterm_before_the_first_step_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "train.py"), "data=samples", "model.width=10", "hydra.run.dir=here"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"data "):  # now it builds a model that takes long
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"nothing was saved" in err
    assert b"Traceback" not in err


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_save_in_its_own_folder(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "log_every=1", "save_every=3"]
    assert run("train.py", *words, "hydra.run.dir=whole").returncode == 0
    killed = stop_after(14, signal.SIGKILL, [*words, f"hydra.run.dir={tmp_path}/cut"], tmp_path)
    assert killed.returncode == -signal.SIGKILL
    done = run("train.py", *words, f"resume={tmp_path}/cut/last.pt")
    assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


@pytest.mark.slow
def test_resuming_another_run_is_refused_with_the_difference(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "epochs=1"]
    assert run("train.py", *words, "hydra.run.dir=here").returncode == 0
    before = (tmp_path / "here" / "last.pt").read_bytes()
    config = (tmp_path / "here" / "config.yaml").read_text()
    other = run("train.py", *words, "resume=here", "seed=7")
    assert other.returncode == 1
    assert "seed was 42, is 7" in other.stderr
    assert (tmp_path / "here" / "config.yaml").read_text() == config
    for words_, part in (
        ([*words, "resume=auto"], "hydra.run.dir="),
        ([*words, "resume=here/best.pt"], "last.pt"),
        ([*words, "resume=nowhere/last.pt"], "nowhere/last.pt does not exist"),
        ([*words, "resume=here", f"data.root={REPOSITORY / 'samples'}", "epochs=3"], "6,000"),
        ([*words, "resume=here", "data.batch_size=16"], "data.batch_size × device.count × accumulate was 32, is 16"),
    ):
        refused = run("train.py", *words_)
        assert refused.returncode == 1
        assert part in refused.stderr
        assert "Traceback" not in refused.stderr
    fresh = run("train.py", *words, "hydra.run.dir=here")
    assert fresh.returncode == 1
    assert "resume=auto" in fresh.stderr
    assert (tmp_path / "here" / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "hydra.run.dir=here"]
    assert run("train.py", *words, "epochs=1").returncode == 0
    done = run("train.py", *words, "epochs=3", "resume=auto")
    assert done.returncode == 0, done.stderr
    assert "epochs was 1, is 3" in done.stdout
    assert result(tmp_path / "here")["steps"] == 30


def test_epochs_1_alone_trains_and_made_longer_goes_on_at_the_rates_of_the_longer_training(
    run: Run, tmp_path: Path, tiny_data: Path
) -> None:
    words = [*TINY, f"data.root={tiny_data}", "hydra.run.dir=here", "schedule=linear", "schedule.warmup_epochs=2"]
    words += ["log_every=1", "schedule.min_lr=0", "schedule.warmup_lr=0"]
    done = run("train.py", *words, "epochs=1.0")
    assert done.returncode == 0, done.stderr
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note ")]
    shortened = "note    schedule.warmup_epochs=2 is longer than epochs=1: it is shortened to 1"
    assert note == f"{shortened}, and comes to the peak of 0.125 at its end"
    done = run("train.py", *words, "epochs=4", "resume=auto")
    assert done.returncode == 0, done.stderr
    rates = {row["step"]: row["train/lr"] for row in rows(tmp_path / "here") if "train/lr" in row}
    up, longer = [0.125 * step / 10 for step in range(10)], [0.125 * step / 20 for step in range(10, 20)]
    down = [0.125 * (40 - step) / 20 for step in range(20, 40)]
    assert list(rates.values()) == pytest.approx([*up, *longer, *down], rel=1e-9, abs=1e-12)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "hydra.run.dir=here", "schedule.warmup_epochs=0", "clip_grad_norm=null"]
    done = run(
        "train.py",
        *words,
        "schedule=step",
        "schedule.decay_rate=1",
        "schedule.warmup_epochs=0.5",
        "optim.lr=1e12",
        "save_every=1",
    )
    assert done.returncode == 1
    assert re.search(r"not finite .*first at epoch \d+, step \d+, learning rate \d", done.stderr), done.stderr
    assert "last.pt" in done.stderr
    assert "Traceback" not in done.stderr
    saved = checkpoint.load(tmp_path / "here" / "last.pt")
    assert all(value.isfinite().all() for value in saved["model"].values()), "bad weights were saved as good"


@pytest.mark.parametrize(
    ("program", "words", "part"),
    [
        ("train.py", ["data=imagefolder", "data.root=/nowhere"], "data.root=/nowhere does not exist"),
        ("train.py", ["data=imagefolder"], "data.root is not set"),
        ("train.py", ["data=samples", "model.weights=/nowhere.pth"], "/nowhere.pth does not exist"),
        ("train.py", ["-m", "data=samples,imagefolder"], "data.root is not set"),
        ("train.py", ["data=samples", "resume=/nowhere.pt"], "/nowhere.pt does not exist"),
        ("train.py", ["data=samples", "optim.lrr=1"], "optim.lrr"),
        ("train.py", ["data=samples", "--cfg", "job"], ""),
        ("train.py", ["--help"], ""),
        ("evaluate.py", ["ckpt=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_what_is_wrong_with_a_command_is_told_before_torch_is_loaded(
    run: Run, tmp_path: Path, program: str, words: list[str], part: str
) -> None:
    place = tmp_path / "no torch" / "torch"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise SystemExit('torch was loaded')\n")
    done = run(program, *words, PYTHONPATH=str(place.parent))
    assert done.returncode == (1 if part else 0)
    assert "torch was loaded" not in done.stderr
    assert part in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no torch"]


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    done = run("train.py", *TINY, f"data.root={tiny_data}", "data.batch_size=1000")
    assert done.returncode == 1
    assert "data.batch_size" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_by_the_command_it_prints(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "optim.lr=2,4", "log_every=1"]
    assert run("train.py", "-m", *words, "hydra.sweep.dir=whole").returncode == 0
    watched = ["-m", *words, f"hydra.sweep.dir={tmp_path}/cut"]
    stopped = stop_after(4, signal.SIGTERM, watched, tmp_path, tmp_path / "cut" / "optim.lr=4")
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    command = next(line.strip() for line in stopped.stderr.splitlines() if line.startswith("  python"))
    first = result(tmp_path / "cut" / "optim.lr=2")
    done = run("train.py", *shlex.split(command)[2:])
    assert done.returncode == 0, done.stderr
    for name in ("optim.lr=2", "optim.lr=4"):
        assert_same_state(tmp_path / "whole" / name / "last.pt", tmp_path / "cut" / name / "last.pt")
        assert rows(tmp_path / "whole" / name) == rows(tmp_path / "cut" / name)
    assert result(tmp_path / "cut" / "optim.lr=2")["fps"] == first["fps"], "a finished job was measured anew"


def test_a_sweep_does_not_overwrite_another(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = ["-m", *TINY, f"data.root={tiny_data}", "epochs=1", "hydra.sweep.dir=here"]
    assert run("train.py", *words).returncode == 0
    again = run("train.py", *words, "seed=1,2")
    assert again.returncode == 1
    assert "resume=auto" in again.stderr


def test_several_values_without_m_are_explained(run: Run, tmp_path: Path) -> None:
    for word in ("optim.lr=0.2,0.4", "optim=sgd,adamw"):
        done = run("train.py", word)
        assert done.returncode == 1
        assert f"train.py -m {word}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_sweep_goes_on_after_a_failed_job_and_fails_at_the_end(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "epochs=1"]
    single = run("train.py", *words, "optim.lr=0.4", "hydra.run.dir=single")
    assert single.returncode == 0
    done = run("train.py", "-m", *words, "data.batch_size=100000,32", "optim.lr=0.2,0.4", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "100000" in done.stderr
    names = [f"data.batch_size={size},optim.lr={lr}" for size in (100000, 32) for lr in (0.2, 0.4)]
    statuses = [result(tmp_path / "sweep" / name)["status"] for name in names]
    assert statuses == ["failed", "failed", "completed", "completed"]
    assert_same_state(tmp_path / "single" / "last.pt", tmp_path / "sweep" / names[3] / "last.pt")
    table = done.stdout[done.stdout.rindex("best first") :]
    best, other = sorted(names[2:], key=lambda name: -result(tmp_path / "sweep" / name)["top1"])
    assert "failed" in table
    assert table.index(f"│ {best} ") < table.index(f"│ {other} ") < table.index("failed")


def test_a_sweep_without_faults_exits_with_0(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    done = run("train.py", "-m", *TINY, f"data.root={tiny_data}", "epochs=1", "optim.lr=0.2,0.4")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    assert {path.name for path in sweep.iterdir()} == {"optim.lr=0.2", "optim.lr=0.4", "multirun.yaml", ".lock"}


def test_two_runs_in_one_second_get_folders_of_their_own(tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "epochs=1"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    runs = [subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(120) for process in runs] == [0, 0]
    assert len(list((tmp_path / "outputs").glob("*/*/result.json"))) == 2


def test_training_reads_a_folder_of_jpeg_png_and_webp(run: Run, tmp_path: Path, image_folder: Path) -> None:
    words = [*TINY, f"data.root={image_folder}", "data=imagefolder", "data.image_size=32", "data.batch_size=16"]
    done = run("train.py", *words, "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    assert "64 + 24 images of 4 classes" in done.stdout
    assert result(tmp_path / "here")["num_classes"] == 4


def test_a_damaged_image_is_named(run: Run, tmp_path: Path, image_folder: Path) -> None:
    root = tmp_path / "data"
    for path in image_folder.rglob("*.*"):
        target = root / path.relative_to(image_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    bad = root / "train" / "class2" / "005.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    words = [*TINY, f"data.root={root}", "data=imagefolder", "data.image_size=32", "data.batch_size=16"]
    done = run("train.py", *words, "hydra.run.dir=here")
    assert done.returncode == 1
    assert str(bad) in done.stderr
    assert "Traceback" not in done.stderr
    # What was trained so far is saved, and goes on once the file is mended, by the command that was printed.
    bad.write_bytes((image_folder / bad.relative_to(root)).read_bytes())
    command = next(line.strip() for line in done.stderr.splitlines() if line.startswith("  python"))
    mended = run("train.py", *shlex.split(command)[2:])
    assert mended.returncode == 0, mended.stderr
    assert run("train.py", *words, "hydra.run.dir=whole").returncode == 0
    assert_same_state(tmp_path / "whole" / "last.pt", tmp_path / "here" / "last.pt")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_every_precision_trains(run: Run, tmp_path: Path, tiny_data: Path, amp: str) -> None:
    done = run("train.py", *TINY, f"data.root={tiny_data}", "hydra.run.dir=here", f"amp={amp}", "epochs=1")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "here")["amp"] == amp


def test_apex_says_how_to_get_it_and_what_does_the_same(run: Run, tiny_data: Path) -> None:
    done = run("train.py", *TINY, f"data.root={tiny_data}", "amp=apex")
    assert done.returncode == 1
    assert "github.com/Ascend/apex" in done.stderr
    assert "amp=o2" in done.stderr


@pytest.mark.parametrize("kind", ["cuda_1p", "npu_1p"])
def test_a_missing_card_is_an_error(run: Run, tiny_data: Path, kind: str) -> None:
    done = run("train.py", *TINY, f"data.root={tiny_data}", f"device={kind}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert f"device={kind.split('_')[0]}" in done.stderr
    assert "device=cpu" in done.stderr


@pytest.mark.parametrize("name", ["full_1p", "performance_1p", "full_8p", "performance_8p"])
def test_the_published_experiments_run_on_a_cpu(run: Run, tmp_path: Path, image_folder: Path, name: str) -> None:
    words = [f"experiment={name}", f"data.root={image_folder}", "device=cpu", "model.width=0.1", "data.image_size=32"]
    words += ["data.batch_size=16", "epochs=1", "schedule.cooldown_epochs=0", "schedule.warmup_epochs=1"]
    done = run("train.py", *words, "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "here")["amp"] == "o2"


@pytest.mark.parametrize("name", ["quickstart", "fashion_mnist"])
def test_the_small_experiments_run_shortened(run: Run, tmp_path: Path, tiny_data: Path, name: str) -> None:
    words = [f"experiment={name}", f"data.root={tiny_data}", "model.width=0.1", "epochs=1", "data.batch_size=32"]
    done = run("train.py", *words, "schedule.warmup_epochs=1", "device=cpu", "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "here")["steps"] == 10


def test_fine_tuning_starts_from_published_weights_and_moves_the_classifier_alone(
    run: Run, tmp_path: Path, tiny_data: Path
) -> None:
    published = timm.create_model("ghostnet_050", pretrained=False).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in published.items()}}, tmp_path / "w.pth.tar")
    words = [*TINY, f"data.root={tiny_data}", "model=ghostnet_050", "model.width=0.5", "epochs=1", "hydra.run.dir=here"]
    done = run("train.py", *words, "model.weights=w.pth.tar", "model.freeze=true")
    assert done.returncode == 0, done.stderr
    assert "classifier of 1000 classes replaced by a new one of 10" in done.stdout
    trained = checkpoint.load(tmp_path / "here" / "last.pt")["model"]
    for name, value in published.items():
        if not name.startswith("classifier"):
            assert torch.equal(trained[name], value), name
    wrong = run("train.py", *TINY, f"data.root={tiny_data}", "model.weights=w.pth.tar")
    assert wrong.returncode == 1
    assert "model=ghostnet_050" in wrong.stderr


def test_evaluate_reads_published_weights_as_they_are(run: Run, tmp_path: Path, image_folder: Path) -> None:
    """The counts are those of timm's own model on the same pixels."""
    model = timm.create_model("ghostnet_050", pretrained=False, num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "timm.bin")
    words = ["ckpt=timm.bin", "model=ghostnet_050", f"data.root={image_folder}", "data.image_size=64", "device=cpu"]
    done = run("evaluate.py", *words)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    transform = timm.data.create_transform((3, 64, 64), interpolation="bicubic", crop_pct=0.875)
    hits = 0
    for path in sorted(image_folder.glob("val/*/*")):
        with Image.open(path) as image, torch.inference_mode():
            hits += int(model(transform(image.convert("RGB"))[None]).argmax() == int(path.parent.name[-1]))
    assert printed["top1_hits"] == hits
    assert printed["images"] == 24


@pytest.mark.slow
def test_the_loop_is_the_same_for_any_number_of_threads(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, *HARD, f"data.root={tiny_data}", "epochs=1"]
    for threads in (1, 4):
        done = run("train.py", *words, f"data.workers={threads}", f"hydra.run.dir=t{threads}")
        assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "t1" / "last.pt", tmp_path / "t4" / "last.pt")


def test_a_folder_that_cannot_be_written_is_named(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("train.py", *TINY, f"data.root={tiny_data}", "hydra.run.dir=file/run")
    assert done.returncode == 1
    assert "file/run" in done.stderr
    assert "Traceback" not in done.stderr


def test_output_into_a_closed_pipe_ends_quietly(tmp_path: Path, tiny_data: Path) -> None:
    command = f"{sys.executable} {REPOSITORY}/train.py {' '.join(TINY)} data.root={tiny_data} epochs=1 | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("device")
    assert "Traceback" not in done.stderr


def test_a_terminal_shows_bars_with_an_eta(tmp_path: Path, tiny_data: Path) -> None:
    master, slave = os.openpty()
    command = [sys.executable, str(REPOSITORY / "train.py"), *TINY, f"data.root={tiny_data}", "hydra.run.dir=here"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment() | {"TERM": "xterm"}, stdout=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:
            break
    assert process.wait(60) == 0
    text = shown.decode(errors="replace")
    for part in ("all steps", "epoch 2/2", "10/10", "eta", "20/20", "img/s", "loss", "lr"):
        assert part in text


# Compiling


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_before_training(run, tiny_data):
    words = ["data=samples", f"data.root={tiny_data}", "device=cpu", "compile=true", "hydra.run.dir=run"]
    done = run("train.py", *words, CXX="/nowhere/g++", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert done.returncode == 1
    assert "compile=true: torch.compile can't make the step on cpu" in done.stderr
    assert "compile=false" in done.stderr
    assert "Traceback" not in done.stderr
