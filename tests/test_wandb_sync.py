"""python -m ghostnet.tools.wandb_sync: what lies in run folders goes to a server, once."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ghostnet.wandb.recorder import history_step
from tests.conftest import REPOSITORY, environment
from tests.wandb_file import recorded
from tests.wandb_server import Server

pytestmark = pytest.mark.slow

RESULT = {"status": "completed", "top1": 50.0, "top5": 90.0, "loss": 1.5, "best_epoch": 2, "fps": 100.0}
Sync = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def sync(tmp_path: Path) -> Sync:
    def command(*words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "ghostnet.tools.wandb_sync", *words],
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)} | env,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return command


def rows(steps: int, first: int = 1) -> list[dict[str, Any]]:
    """A train row a step, an eval row after every third."""
    made = []
    for step in range(first, steps + 1):
        made.append({"step": step, "epoch": 1, "time": 1.7e9 + step, "train/loss": 1 / step})
        if step % 3 == 0:
            made.append({"step": step, "epoch": 1, "time": 1.7e9 + step, "eval/top1": 1.0 * step, "best": True})
    return made


def make_run(folder: Path, steps: int = 6, wandb: dict[str, Any] | None = None, **record: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"optim": {"lr": 0.4}, "seed": 1, "logger": {"wandb": wandb}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(steps)))
    (folder / "result.json").write_text(json.dumps(RESULT))
    if record:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_sweep_is_sent_whole_with_its_group_and_names_and_once(
    sync: Sync, tmp_path: Path, wandb_server: Server
) -> None:
    for lr in (1, 2):
        sweep = str(tmp_path / "multirun" / "first")
        make_run(tmp_path / "multirun" / "first" / f"optim.lr={lr}", sweep=sweep, name=f"optim.lr={lr}")
    done = sync("multirun", **wandb_server.environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("8 of 8 rows sent to me/ghostnet/") == 2
    sent = list(wandb_server.runs.values())
    assert {(run["groupName"], run["displayName"]) for run in sent} == {
        ("first", "optim.lr=1"),
        ("first", "optim.lr=2"),
    }
    for folder in (tmp_path / "multirun" / "first").iterdir():
        name = (folder / "wandb_id").read_text().strip()
        assert wandb_server.rows(name) == rows(6)
        assert json.loads(wandb_server.runs[name]["history"][0])["_timestamp"] == 1.7e9 + 1
        assert wandb_server.runs[name]["summary"]["best/top1"] == 50.0
        assert wandb_server.runs[name]["exit"] == 0
    asked = wandb_server.requests
    again = sync("multirun", **wandb_server.environment)
    assert again.returncode == 0
    assert again.stdout.count("skipped, me/ghostnet/") == 2
    assert wandb_server.requests == asked


def test_rows_that_the_server_has_are_not_doubled_and_those_that_came_since_are_sent(
    sync: Sync, tmp_path: Path, wandb_server: Server
) -> None:
    folder = make_run(tmp_path / "run", steps=3)
    assert sync("run", **wandb_server.environment).returncode == 0
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(9, first=4))
    done = sync("run", **wandb_server.environment)
    assert "8 of 12 rows sent" in done.stdout
    (folder / "wandb_synced").unlink()  # as of a logger that was killed: the server alone knows
    assert "0 of 12 rows sent" in sync("run", **wandb_server.environment).stdout
    (name,) = wandb_server.runs
    assert wandb_server.rows(name) == rows(9)
    assert len({history_step(row) for row in rows(9)}) == 12


def test_a_run_that_did_not_come_to_an_end_is_sent_as_failed(sync: Sync, tmp_path: Path, wandb_server: Server) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "result.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tor')
    assert sync("run", **wandb_server.environment).returncode == 0
    (sent,) = wandb_server.runs.values()
    assert (sent["exit"], len(sent["history"])) == (1, 8)


def test_the_runs_own_project_holds_unless_the_command_gives_another(
    sync: Sync, tmp_path: Path, wandb_server: Server
) -> None:
    old = {"_target_": "ghostnet.loggers.Wandb", "project": "own", "mode": "offline", "entity": None, "tags": ["t"]}
    make_run(tmp_path / "run", wandb=old)
    assert "sent to me/own/" in sync("run", **wandb_server.environment).stdout
    assert "skipped" in sync("run", **wandb_server.environment).stdout
    other = sync("run", "project=other", "group=g", "tags=[a,b]", **wandb_server.environment)
    assert "sent to me/other/" in other.stdout
    (sent,) = wandb_server.runs.values()
    assert (sent["groupName"], sent["tags"]) == ("g", ["a", "b"])


def test_offline_writes_what_wandb_sync_uploads(sync: Sync, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    done = sync("run", "mode=offline")
    assert done.returncode == 0
    assert "8 of 8 rows recorded offline; to upload it: wandb sync" in done.stdout
    run, config, history, summary = recorded(folder)
    assert run.run_id == (folder / "wandb_id").read_text().strip()
    assert config["optim"] == {"lr": 0.4}
    assert [{key: row[key] for key in want} for row, want in zip(history, rows(6), strict=True)] == rows(6)
    assert summary["best/top1"] == 50.0
    assert "skipped" in sync("run", "mode=offline").stdout
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1


def test_a_run_that_fails_is_told_in_one_line_and_the_others_go_on(
    sync: Sync, tmp_path: Path, wandb_server: Server
) -> None:
    make_run(tmp_path / "runs" / "a")
    (make_run(tmp_path / "runs" / "b") / "config.yaml").write_text("a: [")
    (make_run(tmp_path / "runs" / "c") / "metrics.jsonl").write_text("")
    done = sync("runs", **wandb_server.environment)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("error: runs/b: ")]
    assert "runs/a: 8 of 8 rows sent" in done.stdout
    assert "runs/c: skipped, it has no rows" in done.stdout
    assert "2 of 3 runs are there." in done.stdout


@pytest.mark.parametrize("broken", [500, 403, "close", "hang"])
def test_a_server_that_refuses_is_one_line_a_run(sync: Sync, tmp_path: Path, wandb_server: Server, broken: Any) -> None:
    for name in "abcdef":
        make_run(tmp_path / "runs" / name)
    wandb_server.broken = broken
    started = time.monotonic()
    done = sync("runs", **wandb_server.environment, WANDB_INIT_TIMEOUT="3")
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert sorted(line[:14] for line in lines) == [f"error: runs/{name}:" for name in "abcdef"]
    assert all("can't be reached" in line for line in lines)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"x" * 40 in path.read_bytes()]


def test_wandb_mode_says_where_there_is_no_network(sync: Sync, tmp_path: Path) -> None:
    make_run(tmp_path / "wandb" / "run")
    assert "1 of 1 runs are recorded." in sync("wandb", WANDB_MODE="dryrun").stdout
    assert len(list(tmp_path.glob("wandb/run/wandb/offline-run-*"))) == 1


def test_an_environment_without_wandb_is_told_instead_of_sending_nothing(sync: Sync, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    done = sync("run", WANDB_DISABLED="true")
    assert done.returncode == 1
    assert done.stderr == "error: nothing would be sent: WANDB_DISABLED or WANDB_MODE says so. Give mode=online.\n"


def test_without_a_login_it_says_so(sync: Sync, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    done = sync("run", WANDB_MODE="online", WANDB_API_KEY="")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "error: run: no Weights & Biases login (wandb login, or WANDB_API_KEY)." in done.stderr


def test_a_run_that_is_training_is_left_to_its_own_logger(sync: Sync, tmp_path: Path, wandb_server: Server) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = sync("run", **wandb_server.environment)
    assert (done.returncode, "it is running" in done.stdout) == (0, True)
    assert not wandb_server.runs


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no run: give run folders"),
        (["nowhere"], "nowhere: no folder"),
        (["empty"], "empty: no run below it"),
        (["run", "projct=x"], "projct=x: no folder, and none of project="),
        (["run", "mode=disabled"], "mode=disabled: nothing would be sent"),
        (["run", "timeout=-1"], "timeout=-1: must be a number > 0"),
        (["run", "project=a/b"], "a project's name can't have /"),
        (["run", "--all"], "--all: no such flag"),
        (["run", "run2", "name=x"], "name=x: these are 2 runs"),
    ],
)
def test_what_is_wrong_with_the_command_is_told_at_once(
    sync: Sync, tmp_path: Path, words: list[str], told: str
) -> None:
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "run")
    make_run(tmp_path / "run2")
    done = sync(*words)
    assert (done.returncode, told in done.stderr, done.stderr.count("error:")) == (1, True, 1)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "wandb").exists()


def test_it_starts_without_torch_and_wandb(tmp_path: Path) -> None:
    code = "import sys, ghostnet.tools.wandb_sync; print(sorted({'torch', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    assert done.stdout == "[]\n"
