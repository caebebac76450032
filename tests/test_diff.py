"""Two runs compared: what differs is told, and the words that turn one into the other do so, none of them idle."""

import json
import shlex
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from ghostnet.config import flat
from ghostnet.door.overrides import check_command
from ghostnet.errors import UserError
from ghostnet.tools.diff import compare
from ghostnet.tools.diff.folder import read
from ghostnet.tools.diff.words import differ, way
from tests.conftest import REPOSITORY, TINY, environment


def call(*words, **env):
    return subprocess.run(
        [sys.executable, "-m", "ghostnet.tools.diff", *map(str, words)],
        cwd=REPOSITORY,
        env=environment() | env,
        capture_output=True,
        text=True,
        timeout=100,
    )


def config(words):
    return check_command("train", words, multirun=False).jobs[0]


def made(folder, words, result=None, losses=(), record=None, keep_words=True):
    """A run folder as train.py leaves it, without the training."""
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config(words)), folder / "config.yaml")
    if keep_words:
        OmegaConf.save(OmegaConf.create(words), folder / ".hydra" / "overrides.yaml")
    if result is not None:
        (folder / "result.json").write_text(json.dumps({"status": "completed"} | result))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    rows = [json.dumps({"step": step, "epoch": 1, "train/loss": loss}) + "\n" for step, loss in losses]
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


COMMANDS = [
    ["experiment=quickstart", "epochs=5", "model.width=0.1", "device=cpu"],
    ["data=samples", "optim=adamw", "model=ghostnet_050", "amp=bf16", "data.image_size=28", "log_every=10"],
    ["experiment=full_8p", "data.root=/data/x", "seed=7"],
    ["logger=wandb", "logger.wandb.tags=[a,b]", "logger.wandb.name='1e5'", "data=synthetic", "schedule=step"],
    ["optim=rmsprop", "accumulate=2", "device=cpu_2p", "data.root='/a b/c=1'", "amp=fp16", "save_every=5"],
]


FURTHER = [pytest.param(pair, marks=pytest.mark.slow) for pair in ((1, 0), (0, 2), (2, 3), (3, 1), (3, 4), (4, 0))]


@pytest.mark.parametrize("pair", [(0, 1), *FURTHER], ids=str)
def test_the_words_turn_a_into_b_and_each_is_needed(pair):
    one, other = (COMMANDS[number] for number in pair)
    target = config(other)
    found = way(one, config(one), target, other)
    assert (found.left, found.fault, found.drifted) == ([], None, ())
    assert differ(config([*one, *found.words]), target) == []
    for word in found.words:
        rest = [w for w in found.words if w != word]
        assert way_reaches(one, rest, target) is False, f"{word} is idle"


def way_reaches(words, more, target):
    try:
        return differ(config([*words, *more]), target) == []
    except UserError:
        return False


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([], ["optim.lr=0.2"], ["optim.lr=0.2"]),
        ([], ["model=ghostnet_050"], ["model.width=0.5"]),
        ([], ["amp=bf16"], ["amp=bf16"]),
        ([], ["optim=adamw"], ["optim=adamw"]),
        ([], ["data=samples", "epochs=30"], ["data=samples", "epochs=30"]),
        (["logger=wandb"], [], ["logger=default"]),
        ([], ["experiment=quickstart"], ["experiment=quickstart"]),
        (["data=samples"], ["data=samples", "data.image_size=28"], ["data.image_size=28"]),
        (["epochs=30"], ["epochs=30", "resume=auto"], []),
    ],
)
def test_a_group_is_chosen_where_that_is_shorter(one, other, expected):
    assert way(one, config(one), config(other), other).words == expected


@pytest.mark.slow
def test_two_real_runs_and_the_command_that_is_told_trains_the_second_again(run, tiny_data, tmp_path):
    words = [*TINY, f"data.root={tiny_data}", "epochs=1"]
    other = [*words, "optim=sgd", "optim.lr=2", "data.batch_size=64", "schedule=linear"]
    for name, these in (("a", words), ("b", other)):
        done = run("train.py", *these, f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
    done = call(tmp_path / "a", tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    assert set(command[2:]) - set(words) == {"optim=sgd", "optim.lr=2", "data.batch_size=64", "schedule=linear"}
    repeated = run("train.py", *command[2:], "hydra.run.dir=c")
    assert repeated.returncode == 0, repeated.stderr
    third = json.loads(call(tmp_path / "b", tmp_path / "c", "json=true").stdout)
    assert third["config"] == []
    assert third["overrides"] == []
    assert third["environment"] == []
    assert third["loss"]["rows_compared"] > 0
    assert third["loss"]["first_step_that_differs"] is None
    first = json.loads(call(tmp_path / "a", tmp_path / "b", "format=json").stdout)
    assert ["optim.lr", 4, 2] in first["config"]
    assert first["loss"]["first_step_that_differs"] == 2
    metrics = {name: (a, b) for name, a, b in first["metrics"]}
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in "ab"]
    assert metrics["Acc@1"] == tuple(result["top1"] for result in results)
    assert metrics["FPS"] == tuple(result["fps"] for result in results)
    assert metrics["seconds"] == tuple(result["seconds"] for result in results)


def test_code_and_environment_are_told_where_they_differ(tmp_path):
    patch = "diff --git a/train.py b/train.py\n--- a/train.py\n+++ b/train.py\n@@ -1 +1,2 @@\n-old\n+new\n+more\n"
    records = [
        {"commit": "aaa", "versions": {"torch": "2.14.0", "ghostnet": "0.2"}, "hardware": {"cpus": 2}, "host": "x"},
        {"commit": "bbb", "versions": {"torch": "2.14.1", "ghostnet": "0.2"}, "hardware": {"cpus": 2}, "host": "x"},
    ]
    one, other = (made(tmp_path / name, [], record=record) for name, record in zip("ab", records, strict=True))
    (other / "code.diff").write_text(patch)
    runs = read(str(one)), read(str(other))
    assert compare.code(*runs) == [("commit", "aaa", "bbb"), ("not committed", "nothing", "train.py +2 -1")]
    assert compare.environment(*runs) == [("torch", "2.14.0", "2.14.1")]


def test_metrics_stand_side_by_side_with_their_difference(tmp_path):
    one = made(tmp_path / "a", [], {"top1": 80.0, "fps": 100.0, "seconds": 50.0, "loss": 0.5, "memory": [2**20, 2**21]})
    other = made(tmp_path / "b", [], {"top1": 82.0, "fps": 150.0, "seconds": 40.0, "loss": 0.4, "memory": [2**22]})
    text = call(one, other).stdout
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "Acc@1 80.0000 82.0000 +2.0000 (+2.5 %)" in lines
    assert "FPS 100.0000 150.0000 +50.0000 (+50.0 %)" in lines
    assert "seconds 50.0000 40.0000 -10.0000 (-20.0 %)" in lines
    assert "peak memory, MiB 2.0000 4.0000 +2.0000 (+100.0 %)" in lines


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([(2, 1.0), (4, 0.5)], (2, None)),
        ([(2, 1.0), (4, 0.25)], (2, 4)),
        ([(2, 2.0), (4, 0.5)], (2, 2)),
        ([(3, 1.0), (5, 0.5)], (0, None)),
        ([(1, 9.0), (2, 1.0)], (1, None)),
    ],
)
def test_the_first_step_whose_loss_differs(losses, expected, tmp_path):
    one = made(tmp_path / "a", [], losses=[(2, 1.0), (4, 0.5)])
    other = made(tmp_path / "b", [], losses=losses)
    found = compare.losses(read(str(one)), read(str(other)))
    assert (found.compared, found.step) == expected


def test_runs_of_earlier_versions_are_read_without_what_they_had_not(tmp_path):
    old = made(tmp_path / "a", ["seed=1"], {"top1": 1.0})
    saved = OmegaConf.load(old / "config.yaml")
    for key in ("compile", "sweep", "rerun"):
        del saved[key]
    del saved.data["on_error"], saved.data["cache_val"]
    OmegaConf.save(saved, old / "config.yaml")
    new = made(tmp_path / "b", ["seed=2"], {"top1": 2.0})
    for pair, word in (((old, new), "seed=2"), ((new, old), "seed=1")):
        found = json.loads(call(*pair, "json=true").stdout)
        assert found["overrides"] == [word]
        assert [key for key, *_ in found["config"]] == ["seed"]
        assert found["not_reached"] == found["drifted"] == []


def test_where_conf_has_changed_since_it_is_told_and_b_is_reached_all_the_same(tmp_path):
    one, other = made(tmp_path / "a", []), made(tmp_path / "b", ["seed=2"])
    for folder in (one, other):
        saved = OmegaConf.load(folder / "config.yaml")
        saved.epochs = 77  # a default of then
        OmegaConf.save(saved, folder / "config.yaml")
    found = json.loads(call(one, other, "json=true").stdout)
    assert found["drifted"] == ["epochs"]
    assert sorted(found["overrides"]) == ["epochs=77", "seed=2"]


def test_a_run_that_has_not_kept_its_words_starts_from_the_plain_command(tmp_path):
    one = made(tmp_path / "a", ["seed=5"], keep_words=False)
    other = made(tmp_path / "b", ["seed=5", "epochs=9"])
    text = call(one, other).stdout
    assert "A has not kept its overrides" in text
    assert text.splitlines()[-1] == "python train.py epochs=9 seed=5" or "seed=5" in text.splitlines()[-1]


def test_the_words_of_a_command_that_went_on_are_not_those_of_the_run(tmp_path):
    one = made(tmp_path / "a", [])
    OmegaConf.save(OmegaConf.create(["seed=42", "resume=auto", "sweep=x"]), one / ".hydra" / "overrides.yaml")
    assert read(str(one)).words == ["seed=42"]


def test_a_run_without_a_result_was_cut_off(tmp_path):
    text = call(made(tmp_path / "a", []), made(tmp_path / "b", [], {"top1": 5.0})).stdout
    assert ["status", "cut", "off", "completed"] in [line.split() for line in text.splitlines()]
    assert "no two train/loss rows are of the same step" in text


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (None, ["{}/none", "{}/a"], "none does not exist: give a run's folder"),
        (None, ["{}/a/config.yaml", "{}/a"], "is a file: give the run's folder"),
        (None, ["{}", "{}/a"], "is no run's folder: it has no config.yaml. It is a sweep: give one of its jobs"),
        (None, ["{}/a"], "two runs are compared, 1 was given"),
        (None, ["{}/a", "{}/a", "{}/a"], "two runs are compared, 3 were given"),
        (None, ["{}/a", "{}/a", "jsn=true"], "jsn=true: no such word. Did you mean json?"),
        (None, ["{}/a", "{}/a", "format=xml"], "format=xml: there are"),
        (None, ["{}/a", "{}/a", "--json"], "--json: no such flag"),
        (("config.yaml", "a: [1"), ["{}/a", "{}/a"], "config.yaml can't be read"),
        (("config.yaml", "a: 1"), ["{}/a", "{}/a"], "is no config of a run"),
        (("result.json", "{"), ["{}/a", "{}/a"], "result.json can't be read"),
        (("result.json", "[]"), ["{}/a", "{}/a"], "result.json holds no object"),
    ],
)
def test_what_is_no_run_ends_in_one_message(prepare, words, message, tmp_path):
    made(tmp_path / "a", [])
    if prepare:
        (tmp_path / "a" / prepare[0]).write_text(prepare[1])
    done = call(*(word.format(tmp_path) for word in words))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_values_survive_the_way_through_the_grammar():
    words = ["data.root='/a b/,=[x]'", "model.weights='null'", "logger=wandb", "logger.wandb.notes='it''s: {1}'"]
    words = [word.replace("''s", "\\'s") for word in words]
    found = way([], config([]), config(words), [])
    assert found.left == []
    assert dict(flat(config(found.words))) == dict(flat(config(words)))


def test_it_starts_without_torch(tmp_path):
    one, other = made(tmp_path / "a", []), made(tmp_path / "b", ["seed=2"])
    code = "import sys; from ghostnet.tools.diff.__main__ import main; "
    code += f"main([{str(one)!r}, {str(other)!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
