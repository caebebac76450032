"""The door as users meet it: every fault by whole commands, where it was set, in how much time; help and completion."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose

from ghostnet.config import changes, check_same_run, resolved
from ghostnet.door import drivers, groups, manual, overrides
from ghostnet.door.composing import Composer
from ghostnet.errors import ConfigError
from tests.conftest import REPOSITORY, environment


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project with a conf/ that a test may add to."""
    for name in ("train.py", "evaluate.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    for name in ("ghostnet", "samples"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "empty").mkdir()
    return tmp_path


def told(project: Path, *words: str, program: str = "train.py", **env: str) -> list[str]:
    """The faults that a command is refused for, in an empty folder that stays so."""
    command = [sys.executable, str(project / program), *words]
    where = environment() | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=project / "empty", env=where, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert not list((project / "empty").iterdir())
    return done.stderr.removeprefix("error: ").rstrip("\n").split("\n       ")


COMMAND = "Set by the command."
QUICK = "experiment=quickstart"
LISTED = {
    "unknown key": (["optim.lrr=1"], ["optim.lrr: no such key. Did you mean optim.lr?", COMMAND]),
    "unknown key at the top": (["epoch=1"], ["epoch: no such key. Did you mean epochs?"]),
    "wrong type": (["optim.lr=abc"], ["optim.lr=abc: must be a number > 0.", COMMAND]),
    "negative epochs": (["epochs=-1"], ["epochs=-1: must be a whole number >= 1."]),
    "width 0": (["model.width=0"], ["model.width=0: must be a number > 0."]),
    "a range upside down": (["data.augment.scale=[1,0.1]"], ["[least, most]"]),
    "two colours": (["data.preprocessing.std=[1,1]"], ["[red, green, blue]"]),
    "quoted number": (["optim.lr='0.1'"], ["optim.lr='0.1': must be a number > 0, not text. Leave the quotes out."]),
    "quoted null": (["save_every='null'"], ["save_every='null': ", "Leave the quotes out."]),
    "not whole": (["epochs=1.5"], ["epochs=1.5: must be a whole number >= 1."]),
    "search path": (["hydra.searchpath=[file:///tmp]"], ["hydra.searchpath: this program reads its own conf/ alone."]),
    "+typo": (["+typo=1"], ["typo: no such key."]),
    "++typo": (["++modle.width=1"], ["modle.width: no such key. Did you mean model.width?"]),
    "+ of what is there": (["+optim.lr=1"], ["optim.lr is there already. Leave the + out."]),
    "deleted": (["~optim.momentum"], ["optim.momentum: missing. It must be a number in [0, 1).", COMMAND]),
    "deleted top": (["~epochs"], ["epochs: missing. It must be a whole number >= 1."]),
    "deleted group": (["~amp"], ["~amp: train can't do without. There are: apex, bf16"]),
    "group option": (["amp=o3"], ["amp=o3: no such option. Did you mean o2? There are: apex, bf16, fp16, none, o2."]),
    "of several": (["experiment=[quickstart,ful_8p]"], ["experiment=ful_8p: no such option. Did you mean full_8p?"]),
    "two options": (["optim=[sgd,adamw]"], ["one option at a time", "-m optim=sgd,adamw"]),
    "+ of a group": (["+amp=o2"], ["leave the + out, amp=o2"]),
    "launcher": (["hydra/launcher=jolib"], ["hydra/launcher=jolib: no such option. Did you mean joblib?"]),
    "group of Hydra": (["hydra/lancher=basic"], ["hydra/lancher: no such group. Did you mean hydra/launcher?"]),
    "key of Hydra": (["hydra.run.dri=a"], ["hydra.run.dri: no such key. Did you mean hydra.run.dir?"]),
    "type of Hydra": (["hydra.job.chdir=maybe"], ["hydra.job.chdir=maybe: ", "bool"]),
    "no epochs": (["epochs=0"], ["epochs=0: must be a whole number >= 1."]),
    "null epochs": (["epochs=null"], ["epochs=null: must be a whole number >= 1."]),
    "no decay": (["schedule=step"], ["schedule.decay_epochs=30: the training ends before the first decay, epochs=10."]),
    "decay 0": (["schedule=step", "schedule.decay_epochs=0"], ["schedule.decay_epochs=0: must be a whole number >= 1"]),
    "nesterov": (["optim.nesterov=true", "optim.momentum=0"], ["optim.nesterov=true: needs a momentum"]),
    "batch of one": (["data.batch_size=1"], ["data.batch_size=1: at data.image_size=32 the last BatchNorm"]),
    "batch too large": (
        ["data=synthetic", "data.dataset.num_train=100", "data.batch_size=64", "accumulate=2"],
        ["a step takes 128 images", "there are 100 to train on"],
    ),
    "classes": (["data=synthetic", "model.num_classes=10"], ["model.num_classes=10: the data have 1000 classes."]),
    "cards": (["device.ids=[0,1]"], ["device.ids=[0, 1]: names 2 cards, but device.count is 1."]),
    "sync_bn": (["sync_bn=true", "device=cpu"], ["sync_bn=true: torch's SyncBatchNorm needs cards."]),
    "compile": (["compile=true", "amp=apex"], ["compile=true: apex changes the model"]),
    "compile twice": (
        ["compile=true", "compile.backend=eager"],
        ["compile.backend=eager: the command sets or removes"],
    ),
    "apex": (["amp=apex"], ["amp=apex: Ascend's apex is not installed", "amp=o2 does the same"]),
    "weights": (["model.weights=no.pth"], ["model.weights=no.pth: no.pth does not exist."]),
    "baseline": (["baseline=no"], ["baseline=no: no is no result.json"]),
    "resume": (["resume=no"], ["resume=no: no does not exist. Give a checkpoint file or a run folder."]),
    "data": (["data=imagefolder", "data.root=/no"], ["data.root=/no does not exist."]),
    "reference to nothing": (
        ["data.root=${nothing.here}"],
        ["data.root=${nothing.here}: Interpolation key 'nothing.here' not found."],
    ),
    "several values": (["optim.lr=1,2"], ["optim.lr=1,2: several values.", "train.py -m "]),
    "no word": (["epochs"], ["'epochs' is not of the form key=value"]),
}


@pytest.mark.parametrize("name", LISTED)
def test_a_fault_is_one_line_with_the_way_out_and_leaves_nothing(project: Path, name: str) -> None:
    words, parts = LISTED[name]
    line, *more = told(project, QUICK, *words)
    assert all(part in line for part in parts), line
    assert len(more) == (name == "compile")  # without apex


COMPILED = {
    "compile=true": "inductor",
    "compile=false": None,
    "compile=npugraphs": "npugraphs",
    "compile.backend=inductor": "inductor",
    "compile.backend=null": None,
    "seed=1": None,
}


@pytest.mark.parametrize(("word", "backend"), COMPILED.items())
def test_compile_takes_a_backend_and_true_and_false_stand_for_one(word, backend) -> None:
    (checked,) = overrides.check_command("train", [QUICK, "data=synthetic", word], multirun=False).jobs
    assert checked["compile"] == {"backend": backend}
    for before, named in ((False, None), (True, "inductor"), ({"backend": "eager"}, "eager")):
        told_of = [] if named == backend else [f"compile.backend was {named}, is {backend}"]
        assert changes(checked | {"compile": before}, checked) == told_of
        check_same_run(checked | {"compile": before}, checked)


def test_a_run_of_an_older_version_differs_in_no_key_that_came_later() -> None:
    (checked,) = overrides.check_command("train", [QUICK], multirun=False).jobs
    before = {key: value for key, value in checked["data"].items() if key not in ("classes", "max_pixels")}
    assert changes(checked | {"data": before}, checked) == []
    (other,) = overrides.check_command("train", [QUICK, "data.max_pixels=9"], multirun=False).jobs
    assert changes(checked | {"data": before}, other) == ["data.max_pixels was 200000000, is 9"]
    lacking = {key: value for key, value in before.items() if key != "image_size"}
    assert changes(checked | {"data": lacking}, checked) == ["data.image_size was None, is 32"]


MINE = """\
# @package _global_
# An experiment with faults.
defaults:
  - override /optim: sgdd
  - override /data: samples
epochs: 0
model:
  widht: 1.0
device:
  batch_size: no
schedule: {warmup_epochs: -1}
"""


def test_faults_of_files_name_the_file_and_the_line(project: Path) -> None:
    mine = project / "conf" / "experiment" / "mine.yaml"
    mine.write_text(MINE)
    lines = told(project, "experiment=mine")
    assert lines[0].startswith(
        "optim=sgdd: no such option. Did you mean sgd? There are: adamw, fused_sgd, npu_fused_sgd, rmsprop, sgd."
    )
    assert lines[0].endswith("Set by conf/experiment/mine.yaml, line 4.")
    mine.write_text(MINE.replace("sgdd", "sgd"))
    lines = told(project, "experiment=mine", "optim.momentum=1")
    assert sorted(lines) == [
        "device.batch_size=false: must be a whole number >= 1. Set by conf/experiment/mine.yaml, line 10.",
        "epochs=0: must be a whole number >= 1. Set by conf/experiment/mine.yaml, line 6.",
        "model.widht: no such key. Did you mean model.width? Known here: num_classes, width, dropout, weights, freeze. "
        "Set by conf/experiment/mine.yaml, line 8.",
        "optim.momentum=1: must be a number in [0, 1). Set by the command.",
        "schedule.warmup_epochs=-1: must be a number >= 0. Set by conf/experiment/mine.yaml, line 11.",
    ]


def test_a_file_of_this_machine_is_named_too_and_the_command_goes_before_it(project: Path) -> None:
    (project / "conf" / "local").mkdir()
    local = project / "conf" / "local" / "default.yaml"
    local.write_text("# @package _global_\ndata:\n  root: /nowhere\n")
    lines = told(project)
    assert lines == [
        "data.root=/nowhere does not exist. Looked for /nowhere/train/<class>/*.jpg|jpeg|png|webp|bmp|tif|gif|ppm. "
        "Set by conf/local/default.yaml, line 3."
    ]
    lines = told(project, "data.root=/no")
    assert lines[0].endswith(COMMAND)


def test_a_file_that_is_no_yaml_is_told_with_its_line_beside_other_faults(project: Path) -> None:
    (project / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nepochs: 3\n  seed: 4\n")
    lines = told(project, "experiment=mine", "optim.lrr=1")
    assert any("mine.yaml, line 3: mapping values are not allowed here." in line for line in lines)
    assert any(line.startswith("optim.lrr: no such key.") for line in lines)


def test_a_value_that_only_repeats_a_faulty_one_is_not_told_twice(project: Path) -> None:
    lines = told(project, "data=synthetic", "device.batch_size=0", "data.image_size=0")
    assert [line.partition(":")[0] for line in lines] == ["data.image_size=0", "device.batch_size=0"]


def test_all_faults_of_a_command_come_at_once_whatever_their_kind(project: Path) -> None:
    words = ["optim.lr=[", "optim.lrr=1", "epochs=0", "amp=o3", "+typo=1", "data.root=/no", "baseline=no"]
    words += ["model.weights=no.pth", "hydra/launcher=jolib", "hydra.run.dri=a", "sync_bn=true", "device=cpu"]
    words += ["resume=auto", "data.root=/no", "optim.nesterov=true", "optim.momentum=0"]
    lines = told(project, *words)
    for part in ("'optim.lr=['", "optim.lrr:", "epochs=0:", "amp=o3:", "typo:", "data.root=/no ", "baseline=no:"):
        assert sum(line.startswith(part) for line in lines) == 1, part
    for part in ("model.weights=no.pth:", "hydra/launcher=jolib:", "hydra.run.dri:", "sync_bn=true:", "resume=auto "):
        assert sum(line.startswith(part) for line in lines) == 1, part
    assert len(lines) == 13


def test_a_sweep_tells_each_fault_once_with_its_jobs_before_the_first_starts(project: Path) -> None:
    words = ["optim.lr=0.1,abc", "seed=1,2,3", "schedule=cosine,step", "epochs=10,40", "model.weights=no.pth"]
    lines = told(project, "-m", QUICK, *words)
    assert lines == [
        "model.weights=no.pth: no.pth does not exist. Give a checkpoint file. Set by the command.",
        "schedule.decay_epochs=30: the training ends before the first decay, epochs=10. Give fewer "
        "schedule.decay_epochs, or schedule.decay_rate=1 for a rate that stays. Set by conf/schedule/step.yaml, line 8 "
        "and the command. In 6 of 24 jobs: those with schedule=step epochs=10.",
        "optim.lr=abc: must be a number > 0. Set by the command.",
    ]
    lines = told(project, "-m", QUICK, "model=ghostnet_050,ghostnet_51", "experiment=quickstart,nothing", "amp=o2,o3")
    assert [line.partition(":")[0] for line in lines] == ["amp=o3", "model=ghostnet_51", "experiment=nothing"]


def test_a_fault_of_a_hundred_jobs_is_told_once(project: Path) -> None:
    lines = told(project, "-m", QUICK, "optim.lr=range(0.1,1.1,0.1)", "seed=range(10)", "epochs=0")
    assert len(lines) == 1
    words = [QUICK, "optim.lr=range(0.1,1.1,0.1)", "seed=range(10)", "amp=none,bf16"]
    assert len(overrides.check_command("train", words, multirun=True).jobs) == 220


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["optim.lr=0.1", "model=ghostnet_130", "model.width=2"],
        [QUICK, "data.augment.scale=[0.5,1]", "data.image_size=64", "device.batch_size=3", "data=synthetic"],
        ["logger=wandb", "logger.wandb.tags=[a,b]", "device=npu_8p", "amp=fp16", "data.root='a b'"],
        ["device=npu_8p", "hydra.run.dir=x", "++epochs=7", "data.preprocessing.mean=[0,0,0.5]", "seed=1", "seed=2"],
        ["experiment=full_8p", "device=cpu", "data.dataset.root=${data.root}", "data.root=/x"],
    ],
    ids=str,
)
def test_jobs_are_composed_as_hydra_composes_them(words: list[str]) -> None:
    with overrides._hydra():
        composer = Composer("train")
        for _ in range(2):  # the second is made of what the first has composed
            assert composer.job(words).config == resolved(compose("train", overrides=words))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--epochs", "3"], ["--epochs: no such flag. Settings are given without dashes: epochs=…"]),
        (["--warmup-epochs=3"], ["Settings are given without dashes: schedule.warmup_epochs=…"]),
        (["--lr=3"], ["optim.lr=…"]),
        (["--optim.lr=0.1"], ["Settings are given without dashes: optim.lr=…"]),
        (["--model=ghostnet_050"], ["Settings are given without dashes: model=…"]),
        (["--data", "samples"], ["Settings are given without dashes: data=…"]),
        (["--experiment=quickstart"], ["Settings are given without dashes: experiment=…"]),
        (["--hydra.run.dir=x"], ["Settings are given without dashes: hydra.run.dir=…"]),
        (["epochs=1\r"], ["Windows line ends", "dos2unix"]),
        (["epochs=1", "\r"], ["Windows line ends", "dos2unix"]),
        (["--multirunn"], ["Did you mean --multirun?"]),
        (["--cfg", "foo"], ["invalid choice: 'foo'"]),
        (["-m", "--cfg", "job"], ["leave -m out"]),
        (["--config-dir", "/tmp"], ["conf/experiment/NAME.yaml"]),
        (["seed=1", "--cfg", "job", "seed=2"], ["seed=2: words stand together"]),
    ],
    ids=str,
)
def test_a_flag_that_is_none_is_told_with_what_was_meant(project: Path, flags: list[str], parts: list[str]) -> None:
    (line,) = told(project, *flags)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        (["evaluate.py"], ["--ckpt=x"], "ckpt"),
        (["-m", "ghostnet.tools.plan"], ["--optim.lr=0.1"], "optim.lr"),
        (["-m", "ghostnet.tools.plan"], ["--fps=3"], "fps"),
        (["-m", "ghostnet.tools.doctor"], ["--data=samples"], "data"),
        (["-m", "ghostnet.tools.benchmark"], ["step", "--data.batch-size=8"], "data.batch_size"),
        (["-m", "ghostnet.tools.benchmark"], ["evaluate", "--ckpt=x"], "ckpt"),
        (["-m", "ghostnet.tools.pack"], ["--data.root=x"], "data.root"),
        (["-m", "ghostnet.tools.wandb_sync"], ["--project=x"], "project"),
        (["-m", "ghostnet.tools.diff"], ["a", "b", "--json=true"], "json"),
        (["-m", "ghostnet.tools.leaderboard"], ["--sort=top1"], "sort"),
    ],
    ids=str,
)
def test_every_program_tells_that_settings_have_no_dashes_and_scripts_no_windows_line_ends(
    program: list[str], words: list[str], meant: str
) -> None:
    for typed, part in ((words, f"without dashes: {meant}=…"), ([*words[:-1], "x=1\r"], "Windows line ends")):
        command = [sys.executable, *program, *typed]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert part in " ".join((done.stdout + done.stderr).split())
        assert "Traceback" not in done.stderr


GBK = "# @package _global_\n# 实验\nepochs: 7\n".encode("gbk")
FILES = {
    "gbk": (GBK, "line 2: is not UTF-8. Save the file as UTF-8."),
    "mac": (b"\0\5\x16\7\0\2\0\0\xff\xfe", "line 1: is not UTF-8. Save the file as UTF-8."),
    "utf16": ("# @package _global_\nepochs: 7\n".encode("utf-16"), "line 1: is not UTF-8. Save the file as UTF-8."),
    "control": (b"# @package _global_\nepochs: 7\n# \x07\n", "line 3: special characters are not allowed."),
    "tab": (b"# @package _global_\nmodel:\n\twidth: 1\n", "line 3: found character '\\t' that cannot start any token."),
    "twice": (b"# @package _global_\nepochs: 7\nepochs: 8\n", "line 3: found duplicate key epochs."),
    "list": (b"# @package _global_\n- epochs\n", "line 2: key: value is expected."),
    "number": (b"7\n", "line 1: key: value is expected."),
    "headless": (
        b"epochs: 7\n",
        "line 1: must be '# @package _global_', else its keys are not those of the whole config.",
    ),
    "late": (b"# mine\n# @package _global_\nepochs: 7\n", "line 1: must be '# @package _global_', else "),
    "bom": (b"\xef\xbb\xbf# @package _global_\nepochs: 7\n", "line 1: a byte order mark (BOM) hides '# @package"),
}


def finished(project: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    where = environment() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=project, env=where, capture_output=True, text=True, timeout=60)


def test_files_that_cant_be_read_disturb_no_command_that_does_not_choose_them(project: Path) -> None:
    for name, (text, _) in FILES.items():
        for group in ("experiment", "optim", "data"):
            (project / "conf" / group / f"{name}.yaml").write_bytes(text)
        (project / "conf" / "experiment" / f"._{name}.yaml").write_bytes(text)
    assert "epochs: 10\n" in finished(project, "train.py", QUICK, "--cfg", "job").stdout
    (line,) = told(project, QUICK, "optim.lrr=1")
    assert line.startswith("optim.lrr: no such key. Did you mean optim.lr?")
    (line,) = told(project, QUICK, "optim.beta=1")
    assert "no such key" in line
    assert "Settings are given without dashes: optim.lr=" in told(project, "--lr=1")[0]
    (line,) = told(project, QUICK, "experiment=._gbk")
    assert "no such option" in line
    assert "._" not in line.partition("There are:")[2]
    assert "\nValues. key=value sets one" in finished(project, "train.py", "--help").stdout
    evaluated = finished(project, "evaluate.py", "--help")
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    planned = finished(project, "-m", "ghostnet.tools.plan", QUICK)
    assert (planned.returncode, planned.stderr) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cant_be_read_is_one_message_with_its_line_if_it_is_chosen(project: Path, name: str) -> None:
    text, fault = FILES[name]
    (project / "conf" / "experiment" / "mine.yaml").write_bytes(text)
    lines = told(project, "experiment=mine", "data=samples")
    assert lines[0].startswith(f"conf/experiment/mine.yaml, {fault}")
    assert len(lines) == 1
    (project / "conf" / "experiment" / "mine.yaml").unlink()
    (project / "conf" / "local").mkdir()
    (project / "conf" / "local" / "default.yaml").write_bytes(text)
    for words in (["epochs=3", "data=samples"], [QUICK]):
        (line,) = told(project, *words)
        assert line.startswith(f"conf/local/default.yaml, {fault}")


def test_a_link_into_nowhere_is_no_option(project: Path) -> None:
    (project / "conf" / "experiment" / "mine.yaml").symlink_to("nowhere.yaml")
    (line,) = told(project, "experiment=mine", "data=samples")
    assert line.startswith("experiment=mine: no such option.")
    assert "mine" not in line.removeprefix("experiment=mine")


def test_a_file_that_another_file_chooses_is_told_by_its_own_name(project: Path) -> None:
    (project / "conf" / "optim" / "mine.yaml").write_bytes(GBK)
    (project / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optim: mine\n"
    )
    (line,) = told(project, "experiment=mine", "data=samples")
    assert line == "conf/optim/mine.yaml, line 2: is not UTF-8. Save the file as UTF-8."
    done = finished(project, "train.py", "experiment=mine", "--help")
    assert (done.returncode, done.stderr) == (1, f"error: {line}\n")


def test_an_experiment_in_a_folder_is_chosen_by_its_path(project: Path) -> None:
    (project / "conf" / "experiment" / "team").mkdir()
    (project / "conf" / "experiment" / "team" / "deep.yaml").write_text("# @package _global_\n# Ours.\nepochs: 7\n")
    chosen = finished(project, "train.py", "experiment=team/deep", "data=samples", "--cfg", "job")
    assert "epochs: 7\n" in chosen.stdout
    assert "team/deep" in finished(project, "train.py", "--help").stdout
    (line,) = told(project, "experiment=team/dep", "data=samples")
    assert "no such option. Did you mean team/deep?" in line
    (project / "conf" / "experiment" / "team" / "deep.yaml").write_text("epochs: 7\n")
    (line,) = told(project, "experiment=team/deep", "data=samples")
    assert line.startswith("conf/experiment/team/deep.yaml, line 1: must be '# @package _global_'")


def test_thirty_point_nought_is_thirty_wherever_whole_numbers_are_asked_for() -> None:
    words = ["epochs=30.0", "seed=1e1", "data=synthetic", "data.dataset.num_train=1e6", "device.ids=[0.0]"]
    words += ["device.batch_size=64.0", "model.num_classes=1000.0", "save_every=5.0", "ema_decay=0.0", "optim.lr=1.0"]
    (config,) = overrides.check_command("train", words, multirun=False).jobs
    whole = [config["epochs"], config["seed"], config["data"]["dataset"]["num_train"], config["device"]["ids"][0]]
    whole += [config["data"]["batch_size"], config["model"]["num_classes"], config["save_every"]]
    assert whole == [30, 10, 1_000_000, 0, 64, 1000, 5]
    assert {type(value) for value in whole} == {int}
    assert [type(config["ema_decay"]), type(config["optim"]["lr"])] == [float, float]


def test_a_choice_may_be_null(project: Path) -> None:
    experiment = "# @package _global_\ndefaults:\n  - override /data: samples\nhydra:\n  mode: MULTIRUN\n  sweeper:\n"
    (project / "conf" / "experiment" / "mine.yaml").write_text(
        f"{experiment}    params:\n      clip_grad_norm: choice(null, 2.0)\n"
    )
    found = finished(project, "-m", "ghostnet.tools.plan", "experiment=mine", "json=true")
    assert found.returncode == 0, found.stderr
    assert [job["config"]["clip_grad_norm"] for job in json.loads(found.stdout)] == [None, 2.0]
    (line,) = told(project, "-m", "data=samples", "clip_grad_norm=choice(null,-1)")
    assert line.startswith("clip_grad_norm=-1: must be a number > 0 or null.")
    (line,) = told(project, "data=samples", "clip_grad_norm=choice(null,2.0)")
    assert "clip_grad_norm=null,2.0: several values." in line


CUDA = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device ? "Tesla V100" : "A100", length); return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device ? 7 : 8) : 0; return attribute == 75 || attribute == 76 ? 0 : 1;
}
"""


def test_bf16_on_a_cuda_card_without_it_is_told_at_the_door_by_the_driver(project: Path) -> None:
    (project / "cuda.c").write_text(CUDA)
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", "libcuda.so.1", "cuda.c"], cwd=project, check=True)
    words = [QUICK, "amp=bf16", "device=cuda_1p", "epochs=0"]
    lines = told(project, *words, "device.ids=[1]", LD_LIBRARY_PATH=str(project))
    assert [line.partition(":")[0] for line in lines] == ["epochs=0", "amp=bf16"]
    assert "card 1 (Tesla V100, compute capability 7.0) has no bfloat16. Give amp=fp16 or amp=o2" in lines[1]
    lines = told(project, *words, "device.ids=[0]", LD_LIBRARY_PATH=str(project))
    assert len(lines) == 1
    # On a cluster other cards than these do the work.
    cluster = "hydra.launcher._target_=hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    lines = told(project, *words, "device.ids=[1]", cluster, LD_LIBRARY_PATH=str(project))
    assert [line.partition(":")[0] for line in lines] == ["epochs=0", "amp=bf16"][: len(lines)]


def test_bf16_on_a_first_ascend_card_is_told_by_its_pci_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, device in (("0000:01:00.0", "0xd801"), ("0000:02:00.0", "0xd802"), ("0000:03:00.0", "0x1111")):
        (tmp_path / address).mkdir()
        facts = {"vendor": "0x19e5", "device": device, "class": "0x120000" if device != "0x1111" else "0x020000"}
        for name, text in facts.items():
            (tmp_path / address / name).write_text(f"{text}\n")
    monkeypatch.setattr(drivers, "PCI", tmp_path)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    assert drivers.card_without_bf16("npu", [0, 1]) == "Ascend 910A"
    assert drivers.card_without_bf16("npu", [1, 2]) is None
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1,0")
    assert drivers.card_without_bf16("npu", [0]) is None
    assert drivers.card_without_bf16("npu", [1]) == "Ascend 910A"
    assert drivers.card_without_bf16("cpu", [0]) is None


def test_every_key_of_the_config_says_what_it_is() -> None:
    files = [path for path in groups.CONF.rglob("*.yaml") if path.parent.name not in ("experiment", "local")]
    files.remove(groups.CONF / "wandb_sweep.yaml")  # of W&B's server, not of a command
    silent = [
        f"{path.relative_to(groups.CONF)}, line {line.number}: {key}"
        for path in files
        for key, line in groups.lines(path).items()
        if line.value is not None and not line.comment and not key.startswith("hydra.")
        # Which are not a command's to set: what is built, and what only repeats another key.
        if not key.endswith("_target_") and not line.value.startswith("${")
    ]
    assert not silent
    assert len(files) > 25


def help_of(*words: str) -> tuple[str, str]:
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_help_is_a_page_with_every_group_option_and_value(name: str) -> None:
    page, imports = help_of(f"{name}.py", "--help")
    assert f"  python {name}.py " in page
    assert max(map(len, page.splitlines())) <= 120
    taken = manual._chosen(name, [])
    assert {"model", "data", "amp", "device"} <= set(taken)
    for group, option in taken.items():
        for each in groups.options(group):
            said = groups.heading(group, each)
            assert re.search(rf"^ +({group} +)?{'[*] ' if each == option else ''}{each}\b", page, re.M), each
            assert " ".join(said.split()[:4]) in page
        if option in ("", "basic"):  # none, or Hydra's own
            continue
        for key, line in groups.lines(groups.CONF / group / f"{option}.yaml").items():
            assert line.value is None or not line.comment or f"  {group}.{key}={line.value}" in page
    for key, line in groups.lines(groups.CONF / f"{name}.yaml").items():
        assert line.value is None or key.startswith("hydra") or f"  {key}={line.value} " in page
    assert not re.search(r"\| +(torch|numpy|wandb)$", imports, re.M)


def test_help_shows_the_values_of_the_options_that_a_command_chooses() -> None:
    page, _ = help_of("train.py", QUICK, "optim=adamw", "--help")
    assert "  optim.betas=[0.9, 0.999]" in page
    assert "of data=samples:" in page
    assert "of experiment=quickstart, in place of those above:\n  epochs=10" in page


def test_hydras_own_questions_are_answered() -> None:
    assert "== Flags ==" in help_of("train.py", "--hydra-help")[0]
    assert "epochs: 3\n" in help_of("train.py", "epochs=3", "schedule.warmup_epochs=1", "--cfg", "job")[0]
    assert "Installed Hydra Plugins" in help_of("train.py", "--info", "plugins")[0]


def completed(line: str) -> list[str]:
    """What bash offers for the last word of a line."""
    script = 'eval "$(python train.py --shell-completion install=bash)"\nCOMP_LINE="$1"; COMP_POINT=${#1}\n'
    script += 'COMP_WORDS=($1); COMP_CWORD=$2\nhydra_bash_completion\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    where = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    count = len(line.split()) - (0 if line.endswith(" ") else 1)
    command = ["bash", "-c", script, "bash", line, str(count)]
    done = subprocess.run(command, cwd=REPOSITORY, env=where, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("python train.py opt", ["optim.", "optim="]),
        (
            "python train.py optim=",
            ["optim=adamw", "optim=fused_sgd", "optim=npu_fused_sgd", "optim=rmsprop", "optim=sgd"],
        ),
        ("python train.py optim=adamw optim.be", ["optim.betas."]),
        ("python train.py -m seed=1,2 epo", ["epochs="]),
        ("python train.py experiment=qu", ["experiment=quickstart"]),
        ("python train.py experiment=quickstart data.augment.h", ["data.augment.hflip="]),
        ("python evaluate.py ck", ["ckpt="]),
        ("python train.py data.root=./sam", ["data.root=./samples"]),
    ],
)
def test_the_shell_completes_groups_options_keys_and_paths(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_completion_installs_in_every_shell_and_answers_without_torch(shell: str, tmp_path: Path) -> None:
    script, imports = help_of("train.py", "--shell-completion", f"install={shell}")
    assert "hydra" in script
    assert not re.search(r"\| +torch$", imports, re.M)


def test_an_error_is_raised_once_for_a_library_call_too() -> None:
    with pytest.raises(ConfigError, match=r"epochs=0: must be a whole number >= 1\. Set by the command\.$"):
        overrides.check_command("train", ["epochs=0"], multirun=False)


@pytest.mark.parametrize("words", [["train.py"], ["evaluate.py", "ckpt=x"]])
def test_what_is_not_installed_is_told_in_one_line(words: list[str]) -> None:
    bare = [sys.executable, "-S", *words]  # without site-packages
    done = subprocess.run(bare, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no hydra. Install: pip install -r requirements.txt")
    assert done.stderr.count("\n") == 1
