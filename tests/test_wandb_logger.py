"""Weights & Biases beside a training: what real wandb records, on disk and at a server, and what its failures do."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ghostnet.loggers import RunInfo
from ghostnet.wandb.logger import Wandb, described, sweep_name
from ghostnet.wandb.recorder import Lines, history_step, state
from tests.conftest import REPOSITORY, TINY, Run, environment
from tests.wandb_file import recorded, records
from tests.wandb_server import Server

pytestmark = pytest.mark.slow

KEY = "x" * 40
LONG = ["epochs=20", "eval_every=20", "logger=wandb", "logger.wandb.timeout=3"]
"""A run of long enough that W&B is there for most of it."""


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition: Any, seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


def children(pid: int) -> dict[int, str]:
    """The processes that a process has started, with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def recorder(pid: int) -> int | None:
    """The recorder of a training."""
    return next((child for child, line in children(pid).items() if "ghostnet.wandb.recorder" in line), None)


def service(pid: int) -> int | None:
    """wandb's service process of a training, once it records."""
    own = recorder(pid)
    return next((child for child, line in children(own).items() if "wandb-core" in line), None) if own else None


@contextlib.contextmanager
def training(tmp_path: Path, *words: str, **env: str) -> Iterator["subprocess.Popen[str]"]:
    """A training that goes on meanwhile."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment() | env, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_wandb_records_nested_config_rows_over_step_and_the_best_as_summary(
    run: Run, tmp_path: Path, tiny_data: Path
) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "logger.wandb.mode=offline", "hydra.run.dir=here"]
    words += ["logger.wandb.group=g", "logger.wandb.name=first", "logger.wandb.tags=[a,b]", "logger.wandb.notes=why"]
    done = run("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "wandb sync" in done.stdout
    info, config, history, summary = recorded(tmp_path / "here")
    assert (info.project, info.run_group, info.display_name, info.notes) == ("ghostnet", "g", "first", "why")
    assert list(info.tags) == ["a", "b"]
    assert config["model"]["width"] == 0.1
    assert config["schedule"]["warmup_epochs"] == 0.5
    expected = rows(tmp_path / "here")
    assert [{k: row[k] for k in want} for row, want in zip(history, expected, strict=True)] == expected
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert summary["best/top1"] == result["top1"]
    assert summary["fps"] == result["fps"]


def test_a_resumed_run_goes_on_under_the_same_id(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "logger.wandb.mode=offline", "hydra.run.dir=here"]
    assert run("train.py", *words, "epochs=1").returncode == 0
    assert run("train.py", *words, "epochs=2", "resume=auto").returncode == 0
    ids = {
        path.suffixes and path.stem.removeprefix("run-") for path in (tmp_path / "here").glob("wandb/offline*/*.wandb")
    }
    assert len(list((tmp_path / "here").glob("wandb/offline-run-*"))) == 2
    assert len(ids) == 1


def test_without_a_login_wandb_goes_on_offline_and_says_so(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "epochs=1", "hydra.run.dir=here"]
    done = run("train.py", *words, HOME=str(tmp_path), WANDB_API_KEY="", WANDB_MODE="online")
    assert done.returncode == 0, done.stderr
    assert "recording offline" in done.stdout
    assert "wandb sync" in done.stdout
    assert recorded(tmp_path / "here")[2]


def test_without_a_network_wandb_goes_on_offline_and_says_so(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "epochs=1", "hydra.run.dir=here"]
    refused = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"}
    done = run("train.py", *words, HOME=str(tmp_path), WANDB_MODE="online", **refused)
    assert done.returncode == 0, done.stderr
    assert "recording offline" in done.stdout
    assert json.loads((tmp_path / "here" / "result.json").read_text())["status"] == "completed"


def test_wandb_disabled_leaves_nothing(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "logger.wandb.mode=disabled", "epochs=1"]
    done = run("train.py", *words, "hydra.run.dir=here", WANDB_MODE="online")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "here" / "wandb").exists()


def test_an_online_run_has_all_rows_its_name_and_no_trace_of_the_key(
    run: Run, tmp_path: Path, tiny_data: Path, wandb_server: Server
) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "hydra.run.dir=here", "logger.wandb.name=first"]
    done = run("train.py", *words, **wandb_server.environment)
    assert done.returncode == 0, done.stderr
    (name,) = wandb_server.runs
    assert f"/me/ghostnet/runs/{name}" in done.stdout
    assert wandb_server.rows(name) == rows(tmp_path / "here")
    sent = wandb_server.runs[name]
    assert (sent["displayName"], sent["jobType"], sent["exit"]) == ("first", "train", 0)
    assert json.loads(sent["config"])["run"]["value"]["command"].startswith("python train.py data=fashion_mnist")
    assert sent["summary"]["best/top1"] == json.loads((tmp_path / "here" / "result.json").read_text())["top1"]
    assert state(tmp_path / "here") | {"where": ""} == {
        "rows": len(rows(tmp_path / "here")),
        "result": True,
        "online": True,
        "where": "",
        "path": f"me/ghostnet/{name}",
    }
    for text in (
        done.stdout,
        done.stderr,
        *(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()),
    ):
        assert KEY not in text


def test_the_jobs_of_a_sweep_are_one_group_and_named_by_what_differs(
    run: Run, tmp_path: Path, tiny_data: Path, wandb_server: Server
) -> None:
    words = [*TINY, f"data.root={tiny_data}", "epochs=1", "logger=wandb", "seed=1,2", "optim.lr=2,4", "sweep=first"]
    done = run("train.py", "-m", *words, **wandb_server.environment)
    assert done.returncode == 0, done.stderr
    names = {(sent["groupName"], sent["displayName"]) for sent in wandb_server.runs.values()}
    assert names == {("first", f"optim.lr={lr},seed={seed}") for lr in (2, 4) for seed in (1, 2)} or names == {
        ("first", f"seed={seed},optim.lr={lr}") for lr in (2, 4) for seed in (1, 2)
    }


def test_a_run_that_was_killed_and_resumed_has_each_row_once(
    run: Run, tmp_path: Path, tiny_data: Path, wandb_server: Server
) -> None:
    words = [*TINY, f"data.root={tiny_data}", *LONG, "hydra.run.dir=here"]
    with training(tmp_path, *words, **wandb_server.environment) as process:
        wait_for(lambda: any(len(sent["history"]) > 8 for sent in wandb_server.runs.values()))
        own = recorder(process.pid)
        process.kill()
        process.wait()
        wait_for(lambda: not Path(f"/proc/{own}").exists())
    done = run("train.py", *words, "resume=auto", **wandb_server.environment)
    assert done.returncode == 0, done.stderr
    (name,) = wandb_server.runs
    assert list(map(history_step, wandb_server.rows(name))) == list(map(history_step, rows(tmp_path / "here")))


def test_rows_that_were_recorded_offline_are_sent_when_the_run_goes_on_online(
    run: Run, tmp_path: Path, tiny_data: Path, wandb_server: Server
) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "hydra.run.dir=here"]
    assert run("train.py", *words, "epochs=1").returncode == 0
    assert not wandb_server.runs
    assert run("train.py", *words, "epochs=2", "resume=auto", **wandb_server.environment).returncode == 0
    (name,) = wandb_server.runs
    assert wandb_server.rows(name) == rows(tmp_path / "here")


def test_a_run_of_before_the_logger_moved_goes_on(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "hydra.run.dir=here"]
    assert run("train.py", *words, "epochs=1").returncode == 0
    for path in (tmp_path / "here" / "config.yaml", tmp_path / "here" / "last.pt"):
        saved = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else torch.load(path, weights_only=True)
        node = (saved if path.suffix == ".yaml" else saved["config"])["logger"]["wandb"]
        node["_target_"] = "ghostnet.loggers.Wandb"
        for key in ("artifact", "job_type", "timeout"):
            del node[key]
        if path.suffix == ".yaml":
            path.write_text(yaml.safe_dump(saved))
        else:
            torch.save(saved, path)
    done = run("train.py", *words, "resume=auto")
    assert done.returncode == 0, done.stderr
    assert "logger.wandb" not in done.stdout
    assert run("evaluate.py", "ckpt=here/last.pt").returncode == 0


def test_the_best_checkpoint_is_recorded_as_an_artifact_where_that_is_asked_for(
    run: Run, tmp_path: Path, tiny_data: Path
) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "epochs=1", "logger.wandb.artifact=true"]
    assert run("train.py", *words, "hydra.run.dir=here").returncode == 0
    (path,) = (tmp_path / "here").glob("wandb/offline-run-*/*.wandb")
    requests = [record.request for record in records(path) if record.request.HasField("log_artifact")]
    found = [request.log_artifact.artifact for request in requests]
    found += [record.artifact for record in records(path) if record.WhichOneof("record_type") == "artifact"]
    (artifact,) = found
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    name = (tmp_path / "here" / "wandb_id").read_text().strip()
    assert (artifact.name, artifact.type, set(artifact.aliases)) == (f"ghostnet-{name}", "model", {"best", "latest"})
    assert json.loads(artifact.metadata)["top1"] == result["top1"]
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.size) == ("best.pt", (tmp_path / "here" / "best.pt").stat().st_size)
    assert Path(entry.local_path).samefile(tmp_path / "here" / "best.pt")


@pytest.mark.parametrize("broken", [500, 403, "close", "hang"])
def test_a_server_that_fails_in_mid_run_stops_no_training_and_loses_no_row(
    tmp_path: Path, tiny_data: Path, wandb_server: Server, broken: Any
) -> None:
    with training(
        tmp_path, *TINY, f"data.root={tiny_data}", *LONG, "hydra.run.dir=here", **wandb_server.environment
    ) as process:
        wait_for(lambda: wandb_server.runs and (tmp_path / "here" / "metrics.jsonl").exists())
        wandb_server.broken = broken
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("Weights & Biases failed") == 1
    assert "python -m ghostnet.tools.wandb_sync here" in output
    assert "Traceback" not in output
    assert [row["step"] for row in rows(tmp_path / "here") if "train/loss" in row] == list(range(2, 201, 2))
    assert json.loads((tmp_path / "here" / "result.json").read_text())["status"] == "completed"
    assert KEY not in output
    for path in (tmp_path / "here").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize("victim", [service, recorder])
def test_a_killed_service_stops_no_training_and_loses_no_row(tmp_path: Path, tiny_data: Path, victim: Any) -> None:
    with training(tmp_path, *TINY, f"data.root={tiny_data}", *LONG, "hydra.run.dir=here") as process:
        wait_for(lambda: list((tmp_path / "here").glob("wandb/offline-run-*/*.wandb")))
        os.kill(wait_for(lambda: victim(process.pid)), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("Weights & Biases failed at step") == 1
    assert "Training goes on without it." in output
    assert "python -m ghostnet.tools.wandb_sync here" in output
    assert "Traceback" not in output
    assert [row["step"] for row in rows(tmp_path / "here") if "train/loss" in row] == list(range(2, 201, 2))


@pytest.mark.slow
def test_a_service_that_hangs_holds_up_no_training_and_its_end_for_so_long_only(
    tmp_path: Path, tiny_data: Path
) -> None:
    with training(tmp_path, *TINY, f"data.root={tiny_data}", *LONG, "hydra.run.dir=here") as process:
        wait_for(lambda: list((tmp_path / "here").glob("wandb/offline-run-*/*.wandb")))
        stopped = wait_for(lambda: service(process.pid))
        os.kill(stopped, signal.SIGSTOP)
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            os.kill(stopped, signal.SIGKILL)
    assert process.returncode == 0, output
    assert "it did not end in time" in output
    assert len([row for row in rows(tmp_path / "here") if "train/loss" in row]) == 100


def test_a_training_that_is_killed_leaves_no_process(tmp_path: Path, tiny_data: Path) -> None:
    with training(tmp_path, *TINY, f"data.root={tiny_data}", *LONG, "hydra.run.dir=here") as process:
        family = [wait_for(lambda: recorder(process.pid)), wait_for(lambda: service(process.pid))]
        process.kill()
        process.wait()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), seconds=20)


def test_an_agent_of_a_wandb_sweep_drives_a_training(tmp_path: Path, tiny_data: Path, wandb_server: Server) -> None:
    # The agent of wandb itself, told what its server would tell it.
    code = (
        "import json, sys, yaml\nfrom wandb import wandb_agent\n"
        "sweep = yaml.safe_load(open('conf/wandb_sweep.yaml'))\n"
        "agent = wandb_agent.Agent(api=None, queue=None, sweep_id='sweep1')\n"
        "agent._sweep_command = sweep['command']\n"
        "args = {key: {'value': value} for key, value in json.loads(sys.argv[1]).items()}\n"
        "agent._command_run({'run_id': 'byagent1', 'program': sweep['program'], 'args': args})\n"
        "sys.exit(agent._run_processes['byagent1'].wait())\n"
    )
    args = {word.partition("=")[0]: word.partition("=")[2] for word in TINY}
    args |= {"optim.lr": 0.3, "label_smoothing": 0.0, "data.workers": 1, "epochs": 1}
    args |= {"data.root": str(tiny_data), "hydra.run.dir": str(tmp_path / "here")}
    own = {"WANDB_SWEEP_ID": "sweep1", "WANDB_PROJECT": "elsewhere", "WANDB_ENTITY": "me", "WANDB_DIR": str(tmp_path)}
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(args)],
        cwd=REPOSITORY,
        env=environment() | own | wandb_server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    sent = wandb_server.runs["byagent1"]
    assert (sent["sweep"], sent["project"], sent["groupName"], sent["displayName"]) == (
        "sweep1",
        "elsewhere",
        None,
        None,
    )
    assert json.loads(sent["config"])["optim"]["value"]["lr"] == 0.3
    metric = yaml.safe_load((REPOSITORY / "conf" / "wandb_sweep.yaml").read_text())["metric"]["name"]
    assert sent["summary"][metric] == rows(tmp_path / "here")[-1]["eval/top1"]
    assert (tmp_path / "here" / "wandb_id").read_text().strip() == "byagent1"


def test_the_stop_button_asks_the_training_to_end_as_ctrl_c_does(tmp_path: Path) -> None:
    logger = Wandb("p", "disabled", None, None, None, None, [], None, False, 1.0)
    logger.start(RunInfo(tmp_path, {}, 0, 0, 10, 1))
    logger.prefix = ""
    with pytest.raises(KeyboardInterrupt):
        logger._hear(iter([{"event": "stop"}]))


@pytest.mark.parametrize("word", ["project=a/b", "timeout=0", "artifact=maybe", "mode=on", "nmae=x"])
def test_what_wandb_would_refuse_is_told_before_a_step(run: Run, tmp_path: Path, tiny_data: Path, word: str) -> None:
    done = run("train.py", *TINY, f"data.root={tiny_data}", "logger=wandb", f"logger.wandb.{word}")
    assert (done.returncode, done.stderr.count("error:")) == (1, 1)
    assert f"logger.wandb.{word.partition('=')[0]}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_is_called_by_its_name_or_by_date_and_time() -> None:
    assert sweep_name("/x/multirun/first") == "first"
    assert sweep_name("/x/multirun/2026-11-24/10-11-12") == "2026-11-24/10-11-12"
    assert sweep_name("/x/elsewhere") == "elsewhere"
    assert sweep_name(None) is None


def test_jobs_of_before_run_json_are_known_by_what_hydra_wrote(tmp_path: Path) -> None:
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    job = {"mode": "MULTIRUN", "sweep": {"dir": str(tmp_path)}, "overrides": {"task": ["epochs=1", "seed=2"]}}
    (tmp_path / "0" / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": job}))
    whole = {"overrides": {"task": ["epochs=1", "seed=1,2"]}}
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": whole}))
    assert described(tmp_path / "0") == (tmp_path.name, "seed=2", {})
    assert described(tmp_path) == (None, None, {})


def test_lines_are_taken_once_and_whole(tmp_path: Path) -> None:
    lines, path = Lines(tmp_path / "file"), tmp_path / "file"
    assert list(lines.new()) == []
    path.write_text('{"a": 1}\n{"a"')
    assert list(lines.of_json()) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": 2}\ntorn\n{"a": 3}\n')
    assert list(lines.of_json()) == [{"a": 2}, {"a": 3}]
    assert list(lines.of_json()) == []


def test_the_environment_of_wandb_holds_where_config_and_command_say_nothing(
    run: Run, tmp_path: Path, tiny_data: Path
) -> None:
    said = {"PROJECT": "theirs", "ENTITY": "team", "NAME": "n", "RUN_GROUP": "g", "JOB_TYPE": "j", "NOTES": "why"}
    said |= {"TAGS": "a, b", "RUN_ID": "own1d", "DIR": str(tmp_path / "elsewhere"), "MODE": "offline"}
    variables = {f"WANDB_{name}": value for name, value in said.items()}
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "epochs=1"]
    done = run("train.py", *words, "hydra.run.dir=here", **variables)
    assert done.returncode == 0, done.stderr
    info, *_ = recorded(tmp_path / "elsewhere")
    assert (info.project, info.entity, info.display_name, info.run_group) == ("theirs", "team", "n", "g")
    assert (info.job_type, info.notes, list(info.tags), info.run_id) == ("j", "why", ["a", "b"], "own1d")
    assert not (tmp_path / "here" / "wandb").exists()
    assert (tmp_path / "here" / "wandb_id").read_text() == "own1d\n"

    given = ["project=ours", "entity=me", "name=m", "group=h", "job_type=k", "notes=so", "tags=[c]", "mode=offline"]
    del variables["WANDB_DIR"]
    own = [f"logger.wandb.{word}" for word in given]
    done = run("train.py", *words, *own, "hydra.run.dir=there", **variables | {"WANDB_MODE": "disabled"})
    assert done.returncode == 0, done.stderr
    info, *_ = recorded(tmp_path / "there")
    assert (info.project, info.entity, info.display_name, info.run_group) == ("ours", "me", "m", "h")
    assert (info.job_type, info.notes, list(info.tags)) == ("k", "so", ["c"])


@pytest.mark.parametrize("variable", [{"WANDB_DISABLED": "true"}, {"WANDB_DISABLED": "1"}, {"WANDB_MODE": "disabled"}])
def test_wandb_that_is_switched_off_by_the_environment_records_nothing_and_says_so_once(
    run: Run, tmp_path: Path, tiny_data: Path, variable: dict[str, str]
) -> None:
    done = run(
        "train.py", *TINY, f"data.root={tiny_data}", "logger=wandb", "epochs=1", "hydra.run.dir=here", **variable
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Weights & Biases records nothing: WANDB_DISABLED or WANDB_MODE says so.") == 1
    assert not list(tmp_path.rglob("wandb*"))


@pytest.mark.parametrize(
    ("variable", "fault"),
    [
        ({"WANDB_MODE": "ofline"}, "WANDB_MODE=ofline: must be one of online, offline, disabled."),
        ({"WANDB_PROJECT": "a/b"}, "WANDB_PROJECT=a/b: a project's name can't have /."),
    ],
)
def test_an_environment_that_wandb_would_refuse_is_told_before_a_folder_is_made(
    run: Run, tmp_path: Path, tiny_data: Path, variable: dict[str, str], fault: str
) -> None:
    done = run("train.py", *TINY, f"data.root={tiny_data}", "logger=wandb", "hydra.run.dir=here", **variable)
    assert (done.returncode, done.stderr) == (1, f"error: {fault}\n")
    assert not (tmp_path / "here").exists()
