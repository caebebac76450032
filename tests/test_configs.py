"""Every config composes and builds what it names; every fault of a command is told at the door."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from ghostnet import config
from ghostnet.door import groups, overrides
from ghostnet.door.words import quoted
from ghostnet.errors import ConfigError
from ghostnet.models.ghostnet import GhostNet
from ghostnet.optim import Timeline
from tests.conftest import REPOSITORY, Run

GROUPS = [(group, option) for group in groups.groups() for option in groups.options(group)]
EXPERIMENTS = groups.options("experiment")


def checked(*words: str) -> config.Config:
    return overrides.check_command("train", words, multirun=False).jobs[0]


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_passes_the_door(group: str, option: str) -> None:
    assert checked(f"{group}={option}")["epochs"] >= 1


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_config_file_opens_with_a_comment_that_says_what_it_is(group: str, option: str) -> None:
    lines = (groups.CONF / group / f"{option}.yaml").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("# @package")).startswith("# ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_headed_by_its_command(name: str) -> None:
    head = (groups.CONF / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"python train.py experiment={name}" in head
    assert re.search(r"Target: |Expected: ", head), "no expected result"


@pytest.mark.parametrize("name", ["ghostnet_050", "ghostnet_100", "ghostnet_130"])
def test_every_model_group_builds_its_width(name: str) -> None:
    node = {k: v for k, v in checked(f"model={name}")["model"].items() if k not in ("weights", "freeze")}
    model = config.build(node | {"num_classes": 10})
    assert isinstance(model, GhostNet)
    assert model.width == {"050": 0.5, "100": 1.0, "130": 1.3}[name[-3:]]


@pytest.mark.parametrize("name", [name for name in groups.options("optim") if not name.startswith("npu_")])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16", "o2"])
def test_every_optimizer_takes_a_step_in_every_precision(name: str, amp: str) -> None:
    cfg = checked(f"optim={name}", f"amp={amp}")
    model = GhostNet(4, 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    precision = config.build(cfg["amp"])
    device = torch.device("cpu")
    optimizer = precision.initialize(model, lambda named: config.build(cfg["optim"] | {"lr": 0.5}, named), device)
    logits = precision.forward(model, torch.randn(4, 3, 32, 32))
    assert logits.dtype == torch.float32
    precision.backward(torch.nn.functional.cross_entropy(logits, torch.arange(4)))
    precision.step(optimizer, 2.0)
    # A first step of fp16 may overflow its scale of 65,536 and be skipped; the others must move every weight.
    moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert moved > 0.9 * len(before) or (amp == "fp16" and precision.state_dict()["scale"] < 65536)


@pytest.mark.parametrize("name", groups.options("schedule"))
def test_every_schedule_starts_low_and_ends_at_its_least(name: str) -> None:
    cfg = checked(f"schedule={name}", "schedule.cooldown_epochs=2", "epochs=90")
    schedule = config.build(cfg["schedule"], Timeline(1.0, 90, 10))
    assert schedule(0) == cfg["schedule"]["warmup_lr"]
    assert max(map(schedule, range(900))) == pytest.approx(1.0, rel=0.05)
    assert schedule(900) == schedule(919) == cfg["schedule"]["min_lr"]


def test_npu_devices_come_with_o2_unless_another_precision_is_named() -> None:
    assert checked("device=npu_8p")["amp"]["_target_"] == "ghostnet.amp.O2"
    assert checked("device=npu_8p", "amp=none")["amp"]["_target_"] == "ghostnet.amp.Amp"
    assert checked("experiment=full_8p", "amp=fp16")["amp"]["_target_"] == "ghostnet.amp.Fp16"
    assert checked("device=cpu")["amp"]["_target_"] == "ghostnet.amp.Amp"


OF_PYTORCH_1_5 = ("schedule.cooldown_epochs=10", "amp.loss_scale=128")
"""What makes an experiment that of the reference's version for PyTorch 1.5: those that the files name."""


@pytest.mark.parametrize(("words", "cooldown", "scale"), [((), 2, "dynamic"), (OF_PYTORCH_1_5, 10, 128.0)])
def test_full_8p_is_the_published_recipe_of_either_version(
    words: tuple[str, ...], cooldown: int, scale: float | str
) -> None:
    cfg = checked("experiment=full_8p", *words)
    published = {
        "epochs": 400, "seed": 42, "label_smoothing": 0.1, "clip_grad_norm": 2.0, "accumulate": 1, "ema_decay": 0.0,
        "model.width": 1.0, "model.dropout": 0.2, "data.batch_size": 1024, "data.eval_batch_size": 512,
        "data.image_size": 224, "data.preprocessing.crop": 0.875, "data.preprocessing.interpolation": "bicubic",
        "data.augment.scale": [0.08, 1.0], "data.augment.hflip": 0.5, "data.augment.color_jitter": 0.4,
        "optim._target_": "ghostnet.optim.fused_sgd", "optim.lr": 0.4, "optim.momentum": 0.9,
        "optim.weight_decay": 4e-5, "schedule.warmup_epochs": 4, "schedule.warmup_lr": 1e-6,
        "schedule.min_lr": 1e-5, "schedule.cooldown_epochs": cooldown, "amp.loss_scale": scale, "device.count": 8,
    }  # fmt: skip
    values = dict(config.flat(cfg))
    assert {key: values[key] for key in published} == published


@pytest.mark.parametrize(
    ("name", "values", "target", "words_of_1_5", "target_of_1_5"),
    [
        ("full_1p", (10, 2, "dynamic", 1), "1,379 img/s", OF_PYTORCH_1_5, None),
        (
            "full_8p",
            (400, 2, "dynamic", 8),
            "73.129 % top-1 at 9,559 img/s",
            OF_PYTORCH_1_5,
            "73.3796 % at 4,329 img/s",
        ),
        ("performance_1p", (2, 0, "dynamic", 1), "1,379 img/s", OF_PYTORCH_1_5[1:], None),
        ("performance_8p", (2, 0, "dynamic", 8), "9,559 img/s", OF_PYTORCH_1_5[1:], "4,329 img/s"),
    ],
)
def test_an_experiment_has_the_settings_of_the_target_beside_it_and_names_the_other_version_s(
    name: str, values: tuple[object, ...], target: str, words_of_1_5: tuple[str, ...], target_of_1_5: str | None
) -> None:
    got = dict(config.flat(checked(f"experiment={name}")))
    assert tuple(got[k] for k in ("epochs", "schedule.cooldown_epochs", "amp.loss_scale", "device.count")) == values
    head = (groups.CONF / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    (line,) = [line for line in head.splitlines() if "Target: " in line]
    assert target in line
    assert "PyTorch 1.8" in line
    (line,) = [line for line in head.splitlines() if "PyTorch 1.5" in line]
    assert f": {' '.join(words_of_1_5)};" in line
    assert "no numbers" in line if target_of_1_5 is None else target_of_1_5 in line


@pytest.mark.parametrize("name", ["o2", "apex"])
def test_o2_has_the_dynamic_scale_of_apex_s_default(name: str) -> None:
    assert checked(f"amp={name}")["amp"]["loss_scale"] == "dynamic"


FAULTS = {
    "optim.lrr=1": ["optim.lrr", "optim.lr?"],
    "optim.lr=abc": ["optim.lr=abc", "a number > 0"],
    "model=ghostnet_99": ["model=ghostnet_99", "ghostnet_050, ghostnet_100, ghostnet_130"],
    "+optim.foo=1": ["optim.foo", "lr, momentum, weight_decay, nesterov"],
    "amp=o3": ["amp=o3", "o2?"],
    "data=null": ["data"],
    "data.preprocessing=null": ["data.preprocessing"],
    "device.ids=[0,1]": ["device.count"],
    "device.ids=[-1]": ["device.ids"],
    "data.dataset.num_val=4": ["data=synthetic"],
    "data.preprocessing.image_size=64": ["data.image_size=224"],
    "amp.loss_scale=64": ["amp.loss_scale", "amp=apex, amp=fp16, amp=o2"],
    "lr=0.1": ["lr", "optim.lr?"],
    "optimm=sgd": ["optimm", "optim?"],
    "+typo=1": ["typo"],
    "epochs=0": ["epochs=0", ">= 1"],
    "epochs=1.5": ["epochs=1.5", "whole number"],
    "label_smoothing=1": ["label_smoothing=1", "[0, 1)"],
    "data.augment.hflip=2": ["data.augment.hflip=2", "[0, 1]"],
    "data.preprocessing.interpolation=cubic": ["data.preprocessing.interpolation=cubic", "bicubic"],
    "model.freeze=1": ["model.freeze=1", "true or false"],
    "amp=o2 amp.loss_scale=big": ["amp.loss_scale=big", "dynamic"],
    "~optim.momentum": ["optim.momentum", "missing"],
    "optim._target_=os.system": ["os.system", "not in a module of this project"],
    "optim.lr=[": ["optim.lr='['"],
    "hydra.run.dir=x=y": ["hydra.run.dir='x=y'"],
    "epochs": ["epochs=…"],
    "data.augment.scale=[0,1]": ["data.augment.scale", "in (0, 1]"],
    "data.augment.magnitude=31": ["in [0, 30]"],
    "=3": ["="],
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_names_the_key_and_what_was_meant(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(*words.split())
    for part in FAULTS[words]:
        assert part in str(caught.value)


def test_all_faults_of_a_command_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        checked("optim.lrr=1", "epochs=no", "amp=o3", "model.dropout=3")
    assert all(part in str(caught.value) for part in ("optim.lrr", "epochs=no", "amp=o3", "model.dropout=3"))


@pytest.mark.parametrize("path", ["a b", "x=y", "ü", "it's (1)", "[a,b]"])
def test_a_quoted_path_is_taken_as_it_is(path: str) -> None:
    word = f"data.root={quoted(path)}"
    assert checked(word)["data"]["root"] == path


def test_a_sweep_without_jobs_is_refused() -> None:
    with pytest.raises(ConfigError, match="no job"):
        overrides.check_command("train", ["seed=range(0)"], multirun=True)


def test_a_sweep_is_checked_whole_before_its_first_job() -> None:
    with pytest.raises(ConfigError, match=r"optim.lr=abc"):
        overrides.check_command("train", ["optim.lr=0.1,abc", "seed=1,2"], multirun=True)
    checked = overrides.check_command("train", ["optim.lr=0.1,0.2", "seed=1,2"], multirun=True)
    swept = [(job["optim"]["lr"], job["seed"]) for job in checked.jobs]
    assert swept == list(itertools.product((0.1, 0.2), (1, 2)))


@pytest.mark.parametrize("words", ["optim.lrr=1", "optim.lr=abc", "model=ghostnet_99", "+optim.foo=1", "amp=o3"])
def test_a_faulty_command_leaves_nothing_on_disk(run: Run, tmp_path: Path, words: str) -> None:
    done = run("train.py", words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_without_data_the_error_names_both_ways_out_and_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    done = run("train.py")
    assert done.returncode == 1
    assert "data.root=/" in done.stderr
    assert "experiment=quickstart" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_readme_tree_has_every_file() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for path in [*(REPOSITORY / "ghostnet").rglob("*.py"), *(REPOSITORY / "tests").glob("*.py")]:
        if path.name != "__init__.py":
            assert path.name in readme, f"{path.name} is not in the README's tree"
