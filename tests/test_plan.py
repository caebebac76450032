"""A plan tells the numbers of the run itself, refuses what the run refuses, and leaves nothing behind."""

import json
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ghostnet.config import build, build_model
from ghostnet.door.overrides import check_command
from ghostnet.tools.plan import curve, memory
from ghostnet.tools.plan.__main__ import main
from ghostnet.tools.plan.sources import differences
from tests.conftest import REPOSITORY, TINY, environment

pytestmark = pytest.mark.slow

CONFIGS = {
    "plain": [],
    "average, half precision, accumulation": [
        "ema_decay=0.9",
        "optim=adamw",
        "amp=bf16",
        "accumulate=2",
        "eval_every=2",
    ],
    "O2, classifier alone, cool-down": ["amp=o2", "model.freeze=true", "schedule.cooldown_epochs=1", "optim=rmsprop"],
    "two ranks, by epochs": ["device=cpu_2p", "data.batch_size=16", "schedule=linear", "schedule.interval=epoch"],
}


def call(*words, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "ghostnet.tools.plan", *map(str, words)],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": str(REPOSITORY)} | env,
        capture_output=True,
        text=True,
        timeout=110,
    )


def planned(*words, cwd):
    done = call(*words, "json=true", cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_numbers_are_those_of_the_run(name, run, tiny_data, tmp_path):
    words = [*TINY, f"data.root={tiny_data}", "log_every=1", *CONFIGS[name]]
    plan = planned(*words, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    done = run("train.py", *words, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    same = ("params", "macs", "global_batch_size", "epochs", "world_size", "amp")
    assert {key: plan[key] for key in same} == {key: result[key] for key in same}
    assert plan["total_steps"] == result["steps"] == plan["steps_per_epoch"] * plan["epochs"]
    assert plan["evaluations"] == sum(("eval/loss" in row) + ("ema/loss" in row) for row in rows)
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    # Of so few steps, all are told.
    assert rates == {number: rate for number, (_, rate) in enumerate(plan["lr"], 1)}
    assert plan["peak_lr"] >= max(rates.values())
    # Where the last epoch isn't the best one, its row is kept beside that one's.
    row = 0 if result["best_epoch"] == result["epochs"] else 192
    assert 0 <= (folder / "last.pt").stat().st_size - plan["checkpoint_bytes"] <= row
    assert abs(plan["checkpoint_bytes"] - (folder / "best.pt").stat().st_size) <= 192
    assert plan["memory_bytes"] == pytest.approx(max(result["memory"]), rel=0.45)


def test_memory_is_affine_in_the_batch_and_counts_a_tensor_once():
    cfg = check_command("train", ["data=samples", "model.width=0.5"], multirun=False).jobs[0]
    model, amp = build_model(cfg["model"], 10).to(memory_format=torch.channels_last), build(cfg["amp"])
    estimated = memory.of_passes(model, amp, 64, 40, "cpu")
    model.train()
    images = torch.zeros(40, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with memory.Watch() as watch:
        F.cross_entropy(model(images + 1), torch.zeros(40, dtype=torch.int64)).backward()
    assert estimated == pytest.approx(watch.peak, rel=0.02)
    with memory.Watch() as watch:
        one = torch.zeros(1000)
        view, two = one[:10], one + 1
        assert watch.alive == 8000
        del one, view
        assert watch.alive == 4000
        del two
    assert (watch.alive, watch.peak) == (0, 8000)


def test_a_card_s_layers_keep_more_than_the_cpu_s():
    cfg = check_command("train", ["data=samples"], multirun=False).jobs[0]
    model, amp = build_model(cfg["model"], 10).to(memory_format=torch.channels_last), build(cfg["amp"])
    sizes = {kind: memory.of_passes(model, amp, 64, 32, kind) for kind in ("cpu", "npu", "cuda")}
    assert sizes["npu"] == sizes["cuda"] > 1.2 * sizes["cpu"]


FAULTS = [
    ["optim.lrr=1", "epochs=-3"],
    ["optim.lr=0.1,0.2"],
    ["data=imagefolder", "data.root=/none/at/all"],
    ["model.weights=/none.pth"],
    ["resume=auto"],
    ["resume=/none.pt"],
    ["hydra.run.dir=there"],
    ["data.batch_size=7000", "data=samples"],
    ["model.num_classes=3", "data=samples"],
    ["rerun=/none"],
]


@pytest.mark.parametrize("words", FAULTS, ids=" ".join)
def test_it_refuses_what_the_run_refuses_in_the_same_words(words, run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "last.pt").touch()
    ours, theirs = call(*words, "device=cpu", cwd=tmp_path), run("train.py", *words, "device=cpu")
    assert (ours.returncode, ours.stdout) == (1, "")
    assert ours.stderr == theirs.stderr
    assert ours.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fps=fast", "fps=fast: must be images per second, a number > 0"),
        ("fps=0", "fps=0: must be"),
        ("measure=-1", "measure=-1: must be true, or seconds"),
        ("json=1", "json=1: must be true or false"),
        ("plot=a.jpg", "must be a file that ends in .png"),
        ("plot=/none/a.png", "in a folder that is there"),
        ("measur=true", "measur: no such word. Did you mean measure?"),
        ("--cfg", "--cfg: the plan takes the words of train.py, -m, and no other flag"),
    ],
)
def test_its_own_words_are_checked(word, message, capsys):
    assert main([word, "data=samples"]) == 1
    assert message in capsys.readouterr().err


def test_fps_and_measure_exclude_each_other(capsys):
    assert main(["fps=10", "measure=true", "data=samples"]) == 1
    assert "give one of them" in capsys.readouterr().err


def test_the_time_is_that_of_all_images_at_the_given_speed(tmp_path):
    plan = planned("data=samples", "epochs=4", "eval_every=2", "fps=100", "device=cpu", cwd=tmp_path)
    # 46 steps of 128 images an epoch; two evaluations of 1,000, counted at the same speed.
    assert plan["seconds"] == (4 * 46 * 128 + 2 * 1000) / 100


def test_the_page_tells_all_of_it(tmp_path):
    done = call("experiment=quickstart", "device=cpu", "fps=1000", "plot=rate.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["rate.png"]
    text = " ".join(done.stdout.split())
    for words in (
        "python train.py experiment=quickstart device=cpu",
        "folder outputs/",
        "6,000 + 1,000 images of 10 classes",
        "3,914,318 parameters, 5.5 M multiply-adds an image",
        "128 images a step",
        "460: 10 epochs of 46",
        "cosine, peak 0.1,",
        " bytes each",
        "58,880 images at 1,000.0 images/s 59 s",
        "– data: it reads image folders alone",
        "optim.lr 0.8 was 0.4 conf/experiment/quickstart.yaml",
        "device.kind cpu was auto conf/device/cpu.yaml, chosen by device=cpu",
        "optim=fused_sgd, lr 0.8, momentum 0.9",
    ):
        assert words in text, words


def test_without_the_device_it_tells_what_is_missing_and_the_rest(image_folder, tmp_path):
    words = ["experiment=full_8p", f"data.root={image_folder}", "data.batch_size=4"]
    done = call(*words, "fps=9559", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "npu, 8 ranks" in done.stdout
    assert "not on this machine: device=npu_…: torch_npu is not installed" in done.stdout
    assert "32 images a step: 4 images a device × 8 devices" in done.stdout
    measured = call(*words, "measure=1", cwd=tmp_path)
    assert measured.returncode == 1
    assert measured.stderr.startswith("error: measure=…: device=npu_…: torch_npu is not installed")


def test_the_reference_s_script_is_named_where_it_does_the_same(image_folder, tmp_path):
    words = ["experiment=full_8p", "data.batch_size=1024", f"data.root={image_folder}"]
    # Too few images for its batch, as the run would say.
    assert "more than the 64 training images" in call(*words, cwd=tmp_path).stderr
    cfg = check_command("train", words, multirun=False).jobs[0]
    from ghostnet.tools.translate.inverse import reference

    assert reference(cfg, 1000)[0] == f"bash ./test/train_full_8p.sh --data_path={image_folder}"


def test_a_sweep_is_told_job_by_job_and_in_all(tiny_data, run, tmp_path):
    words = ["-m", *TINY, f"data.root={tiny_data}", "optim.lr=1,2", "model.width=0.1,0.2", "sweep=s", "epochs=1"]
    jobs = planned(*words, cwd=tmp_path)
    assert [job["name"] for job in jobs] == [f"model.width={w},optim.lr={lr}" for w in (0.1, 0.2) for lr in (1, 2)]
    assert [job["folder"] for job in jobs] == [f"multirun/s/{job['name']}" for job in jobs]
    assert [job["peak_lr"] for job in jobs] == [32 / 1024, 64 / 1024, 32 / 1024, 64 / 1024]
    assert jobs[0]["params"] == jobs[1]["params"] < jobs[2]["params"] == jobs[3]["params"]
    assert not (tmp_path / "multirun").exists()
    assert run("train.py", *[word.replace("0.1,0.2", "0.1") for word in words]).returncode == 0
    done = call(*words[:-3], "model.width=0.1", "sweep=s", "epochs=1", "fps=10", cwd=tmp_path)
    assert "0 jobs (2 of 2 are done)" in done.stdout, done.stdout + done.stderr


def test_of_a_search_the_ends_of_its_space_are_told(tmp_path):
    pytest.importorskip("optuna")
    space = "optim.lr=tag(log, interval(0.1, 1.6))"
    words = ["-m", "hydra/sweeper=optuna", "data=samples", "device=cpu", space, "hydra.sweeper.n_trials=5"]
    done = call(*words, "epochs=2", "schedule.warmup_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 trials; the table has those at the ends of each range" in done.stdout
    assert "at most 460 steps" in done.stdout


def test_a_resumed_run_is_planned_from_where_it_stopped(tiny_data, run, tmp_path):
    words = [*TINY, f"data.root={tiny_data}", "hydra.run.dir=run", "resume=auto"]
    assert run("train.py", *words).returncode == 0
    plan = planned(*words, "epochs=5", "fps=100", cwd=tmp_path)
    assert (plan["start"], plan["total_steps"], plan["evaluations"]) == (20, 50, 3)
    assert plan["seconds"] == (30 * 32 + 3 * 100) / 100
    refused = call(*words, "epochs=1", "schedule.warmup_epochs=0", cwd=tmp_path)
    assert "past the 10 of 1 epochs" in refused.stderr


@pytest.fixture
def place(tmp_path):
    """Where the measured run puts what it makes."""
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_measuring_trains_with_the_data_and_leaves_nothing_behind(tiny_data, place, tmp_path):
    words = [*TINY, f"data.root={tiny_data}", "epochs=50", "measure=2"]
    done = call(*words, "json=true", cwd=tmp_path, TMPDIR=str(place))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fps"] > 0
    assert plan["eval_fps"] > 0
    expected = 50 * 10 * 32 / plan["fps"] + 50 * 100 / plan["eval_fps"]
    assert plan["seconds"] == pytest.approx(expected)
    assert list(place.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_a_run_that_ends_before_its_time_is_measured_too(tiny_data, place, tmp_path):
    words = [*TINY, f"data.root={tiny_data}", "epochs=1", "data.batch_size=160", "measure=60", "json=true"]
    done = call(*words, cwd=tmp_path, TMPDIR=str(place))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fps"] > 0
    assert list(place.iterdir()) == []


def test_a_measured_run_that_fails_says_why(tiny_data, place, tmp_path):
    words = [*TINY, f"data.root={tiny_data}", "optim.lr=1e30", "epochs=50", "measure=60"]
    done = call(*words, cwd=tmp_path, TMPDIR=str(place))
    assert done.returncode == 1
    assert done.stderr.startswith("error: the measured run failed: ")
    assert "not finite" in done.stderr
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_it_while_it_measures_leaves_no_process_and_no_file(signum, code, tiny_data, place, tmp_path):
    words = [*TINY, f"data.root={tiny_data}", "epochs=500", "measure=300"]
    command = [sys.executable, "-m", "ghostnet.tools.plan", *words]
    env = environment() | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(place)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while not list(place.glob("*/run/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(place.glob("*/run/metrics.jsonl"))
    process.send_signal(signum)
    process.communicate(timeout=90)
    assert process.returncode == code
    assert list(place.iterdir()) == []
    assert not [path for path in Path("/proc").glob("[0-9]*") if str(place) in _command_of(path)]


def _command_of(process):
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def found(words):
    checked = check_command("train", words, multirun=False)
    return {d.key: d for d in differences(checked.jobs[0], dict(checked.hydra.runtime.choices), words)}


def test_the_source_of_each_value_is_the_word_or_the_file():
    rows = found(["experiment=full_8p", "data=samples", "optim.lr=0.3", "data.image_size=28"])
    assert rows["optim.lr"].source == "optim.lr=0.3"
    assert (rows["optim.lr"].value, rows["optim.lr"].default) == (0.3, 0.4)
    assert rows["schedule.cooldown_epochs"].source == "conf/experiment/full_8p.yaml"
    assert rows["amp.loss_scale"].source == "conf/amp/o2.yaml, chosen by conf/experiment/full_8p.yaml"
    assert rows["data.eval_batch_size"].source == "conf/data/samples.yaml, chosen by data=samples"
    assert rows["data.preprocessing.image_size"].source == "follows data.image_size"
    assert "seed" not in rows
    assert found(["device=npu_1p"])["amp._target_"].source == "conf/amp/o2.yaml, chosen by conf/device/npu_1p.yaml"
    assert found([]) == {}


def steps(rate, count=1000, epochs=10):
    return curve.Curve("rate", rate, count, epochs)


def test_the_curve_in_the_terminal_has_its_highest_point_where_the_rate_has():
    lines = curve.text(steps(lambda step: step if step < 500 else 0.0), width=40, height=8)
    plot = [line.partition("┤")[2] for line in lines[:8]]
    assert lines[0].lstrip().startswith("499")
    assert len(plot[0]) in (20, 21)  # the top is reached half the way along
    assert plot[-1][0] not in ("", chr(curve.BLANK))
    assert all(len(row) <= 40 for row in plot)
    assert lines[-1].split() == ["0", "2.5", "5", "7.5", "10", "epochs"]


def test_the_picture_shows_the_rate_at_its_place(tmp_path):
    path = tmp_path / "rate.png"
    curve.draw([steps(lambda step: 0.1 * step / 999)], path)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue = np.abs(pixels - (0x1F, 0x77, 0xB4)).sum(2) < 30
    left, right = curve.LEFT, curve.WIDTH - curve.RIGHT
    top, bottom = curve.TOP, curve.HEIGHT - curve.BOTTOM
    for share in (0.1, 0.5, 0.9):
        rows = np.flatnonzero(blue[:, round(left + share * (right - left))])
        assert rows.mean() == pytest.approx(bottom - share * (bottom - top), abs=3)
    # Ticks and their labels are there: ink left of the axis, and below it.
    assert (pixels[top:bottom, : left - 5].sum(2) < 300).any()
    assert (pixels[bottom + 8 :, left:right].sum(2) < 300).any()


@pytest.mark.parametrize(("step", "expected"), [(0.013, 0.02), (0.2, 0.2), (3, 5), (7, 10), (10, 10)])
def test_ticks_are_round_numbers(step, expected):
    assert math.isclose(curve._nice(step), expected)


def test_help_names_its_words():
    done = call("--help", cwd=REPOSITORY)
    assert done.returncode == 0
    for word in ("fps=N", "measure=true|SECONDS", "plot=FILE.png", "json=true", "-m"):
        assert word in done.stdout


def test_the_command_is_told_as_it_would_be_typed(capsys):
    assert main(["data=samples", "device=cpu", "hydra.run.dir='/tmp/none (b)'"]) == 0
    line = capsys.readouterr().out.splitlines()[0].partition("  ")[2]
    assert shlex.split(line) == ["python", "train.py", "data=samples", "device=cpu", "hydra.run.dir='/tmp/none (b)'"]
