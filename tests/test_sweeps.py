"""Sweeps: named by what differs, killed anywhere and repeated, several at once, searched; runs repeated."""

import contextlib
import importlib.util
import json
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time

import optuna
import psutil
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ghostnet.errors import ConfigError
from ghostnet.experiments import grid, record, workers
from ghostnet.experiments.rerun import as_word
from ghostnet.experiments.search import JOURNAL, STUDY, TRIAL, distribution, hopeless, open_study
from tests.conftest import REPOSITORY, TINY, environment
from tests.test_train import assert_same_state, result, rows, stop_after

LRS = "optim.lr=1,2,4"
JOBS = ["optim.lr=1", "optim.lr=2", "optim.lr=4"]
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
SPACE = ["hydra/sweeper=optuna", "optim.lr=tag(log, interval(0.001, 8))", "model.dropout=choice(0.0, 0.3)"]
SPACE += ["hydra.sweeper.n_trials=7", "hydra.sweeper.startup_trials=3", "epochs=3"]

SYNTHETIC = [
    "data=synthetic",
    "data.dataset.num_train=64",
    "data.dataset.num_val=32",
    "data.image_size=32",
    "device=cpu",
]
SYNTHETIC += [
    "data.batch_size=32",
    "data.eval_batch_size=32",
    "model.width=0.1",
    "epochs=1",
    "schedule.warmup_epochs=0",
]


def parsed(*words):
    return OverridesParser.create().parse_overrides(list(words))


def test_a_search_chooses_between_null_and_a_number(run, tmp_path):
    words = ["-m", *SYNTHETIC, "hydra/sweeper=optuna", "clip_grad_norm=choice(null,2.0)", "sweep=clip"]
    done = run("train.py", *words, "hydra.sweeper.n_trials=4", "hydra.sweeper.startup_trials=4")
    assert done.returncode == 0, done.stderr
    trials = [path for path in (tmp_path / "multirun" / "clip").iterdir() if path.is_dir()]
    found = {OmegaConf.load(path / "config.yaml").clip_grad_norm for path in trials}
    assert (len(trials), found) == (4, {None, 2.0})


def statuses(folder):
    return {job.name: record.status(job) for job in sorted(folder.iterdir()) if (job / "run.json").exists()}


def assert_same_sweeps(a, b, names):
    for name in names:
        assert_same_state(a / name / "last.pt", b / name / "last.pt")
        assert rows(a / name) == rows(b / name), name
        assert result(a / name)["top1"] == result(b / name)["top1"]


def killed(words, cwd, seconds):
    """Start a command and kill it, as a machine that fails does; whether it had ended before."""
    with (cwd / "killed.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "train.py"), *words], cwd=cwd, env=environment(), stdout=log, stderr=log
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
    return True


def until_unlocked(folder):
    deadline = time.monotonic() + 60
    while any(record.is_locked(path.parent) for path in folder.glob(f"*/{record.LOCK}")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "words",
    [
        ["optim.lr=0.1,0.2", "seed=1,2,3", "epochs=2"],
        ["model=ghostnet_050,ghostnet_100", "seed=range(3)"],
        ["optim.lr=0.1,0.2", "optim.lr=0.4", "+x=1,2"],
        ["optim.betas=[0.9,0.99],[0.9,0.95]", "name='a,b'"],
        ["epochs=3"],
    ],
)
def test_the_jobs_of_a_grid_are_those_of_hydra_and_each_has_a_name_of_its_own(words):
    jobs = grid.grid(parsed(*words))
    assert [job.words for job in jobs] == BasicSweeper.split_arguments(parsed(*words), None)[0]
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(len(job.name) <= 127 and "/" not in job.name for job in jobs)


def test_a_name_tells_what_differs_and_stays_when_values_are_added():
    assert [job.name for job in grid.grid(parsed(LRS, "epochs=2"))] == JOBS
    assert grid.grid(parsed("optim.lr=1,8", "epochs=2"))[0].name == JOBS[0]


def test_a_value_that_is_given_twice_is_one_job():
    assert [job.name for job in grid.grid(parsed("optim.lr=1,1,2"))] == JOBS[:2]


def test_names_that_a_file_system_can_not_have_are_kept_apart():
    a, b = grid.job_name({"data.root": "/a/b"}), grid.job_name({"data.root": "_a_b"})
    assert a != b
    long = {"x": "y" * 300}, {"x": "y" * 301}
    assert len({grid.job_name(each) for each in long}) == 2


@pytest.mark.slow
def test_a_repeated_sweep_does_what_is_not_done(run, tmp_path, tiny_data):
    words = ["-m", *TINY, f"data.root={tiny_data}", "epochs=1", "sweep=lr"]
    assert run("train.py", *words, "optim.lr=1,1e30").returncode == 1
    sweep = tmp_path / "multirun" / "lr"
    assert statuses(sweep) == {"optim.lr=1": "completed", "optim.lr=1e+30": "failed"}
    first = (sweep / "optim.lr=1" / "result.json").read_bytes()
    (sweep / "optim.lr=1e+30" / "metrics.jsonl").unlink(missing_ok=True)
    done = run("train.py", *words, "optim.lr=1,1e30,2")
    assert done.returncode == 1, "the failed job was tried again"
    assert "1 of 3 jobs are done already" in done.stdout
    assert "not finite" in done.stderr
    assert statuses(sweep) == {"optim.lr=1": "completed", "optim.lr=1e+30": "failed", "optim.lr=2": "completed"}
    assert (sweep / "optim.lr=1" / "result.json").read_bytes() == first
    other = run("train.py", *words, "optim.lr=1,2", "optim.momentum=0.5")
    assert other.returncode == 1
    assert "optim.lr=1: optim.momentum was 0.9, is 0.5" in other.stderr
    assert (sweep / "optim.lr=1" / "result.json").read_bytes() == first
    assert run("train.py", *words, "optim.lr=1,2", "log_every=3", "data.workers=2").returncode == 0
    (sweep / "optim.lr=2" / "result.json").unlink()
    with record.locked(sweep / "optim.lr=2"):
        busy = run("train.py", *words, "optim.lr=1,2")
    assert busy.returncode == 1, "a sweep with jobs that are not done is no success"
    assert "1 of 2 jobs are not done: optim.lr=2" in busy.stderr
    assert "python train.py -m" in busy.stderr.split("To go on:")[1]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["sweep=lr"], "Give -m"),
        (["-m", LRS, "sweep=../lr"], "letters, digits"),
        (["-m", LRS, "sweep=lr", "hydra.sweep.dir=there"], "multirun/lr"),
        (["-m", LRS, "sweep=lr", "resume=auto"], "goes on by itself"),
        (["-m", LRS, "sweep=a,b"], "one name"),
        (["-m", "optim.lr=interval(0.1,1)"], "hydra/sweeper=optuna"),
        (["-m", "hydra/sweeper=optuna"], "nothing to search"),
        (["-m", "hydra/sweeper=optuna", "optim.lr=interval(-1,1)"], "optim.lr=-1"),
        (["-m", "hydra/launcher=ray", LRS], "requirements-ray.txt"),
        (["rerun=nowhere"], "no run folder"),
        (["-m", LRS, *JOBLIB, "hydra.launcher.n_jobs=-1"], "hydra.launcher.n_jobs=-1: must be"),
        (["-m", LRS, "hydra.sweeper.max_batch_size=-1"], "hydra.sweeper.max_batch_size=-1: must be"),
        (["-m", "hydra/sweeper=optuna", "optim.lr=interval(1,2)", "hydra.sweeper.n_trials=x"], "n_trials=x: must be"),
        (
            ["-m", "hydra/sweeper=optuna", "optim.lr=interval(1,2)", "hydra.sweeper.n_trialss=3"],
            "mean hydra.sweeper.n_tr",
        ),
    ],
)
def test_a_sweep_that_can_not_be_is_told_before_anything_is_made(run, tmp_path, words, part):
    if "ray" in part and importlib.util.find_spec("ray"):
        part = "hydra/launcher=ray: "
    done = run("train.py", "data=samples", *words)
    assert done.returncode == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert part.endswith(": ") or not list(tmp_path.iterdir())


def test_a_sweep_killed_anywhere_and_repeated_ends_like_one_that_was_not(run, tmp_path, tiny_data):
    words = ["-m", *TINY, f"data.root={tiny_data}", LRS, "save_every=3"]
    assert run("train.py", *words, "sweep=whole").returncode == 0
    at, kills = random.Random(0), 0
    for _ in range(4):
        kills += not killed([*words, "sweep=cut"], tmp_path, at.uniform(1, 5))
    assert kills >= 2
    assert run("train.py", *words, "sweep=cut").returncode == 0
    assert_same_sweeps(tmp_path / "multirun" / "whole", tmp_path / "multirun" / "cut", JOBS)


@pytest.mark.slow
def test_a_killed_sweep_of_two_jobs_at_once_leaves_no_process_and_goes_on(run, tmp_path, tiny_data):
    words = ["-m", *TINY, f"data.root={tiny_data}", LRS, *JOBLIB, "save_every=3"]
    assert run("train.py", *words, "sweep=whole").returncode == 0
    for seconds in (3, 7):
        killed([*words, "sweep=cut"], tmp_path, seconds)
        until_unlocked(tmp_path / "multirun" / "cut")
    done = run("train.py", *words, "sweep=cut")
    assert done.returncode == 0, done.stderr
    assert_same_sweeps(tmp_path / "multirun" / "whole", tmp_path / "multirun" / "cut", JOBS)
    lines = [line for line in done.stdout.splitlines() if "epoch 2/2  Acc@1" in line]
    assert all(line.startswith("[optim.lr=") for line in lines)


@pytest.mark.slow
def test_a_stopped_sweep_of_two_jobs_at_once_saves_both(tmp_path, tiny_data):
    words = ["-m", *TINY, f"data.root={tiny_data}", LRS, *JOBLIB, "sweep=cut", "epochs=40", "log_every=1"]
    sweep = tmp_path / "multirun" / "cut"
    stopped = stop_after(3, signal.SIGTERM, words, tmp_path, sweep / JOBS[0])
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (sweep / JOBS[0] / "last.pt").exists()
    assert not (sweep / JOBS[2] / "metrics.jsonl").exists(), "a job was begun after the signal"
    assert "completed" not in statuses(sweep).values()


@pytest.mark.slow
def test_jobs_at_once_have_cpus_of_their_own(run, tmp_path, tiny_data):
    words = ["-m", *TINY, f"data.root={tiny_data}", "optim.lr=1,2", "epochs=1", *JOBLIB, "sweep=two"]
    done = run("train.py", *words)
    assert done.returncode == 0, done.stderr
    threads = {line.split(",")[1].strip() for line in done.stdout.splitlines() if "device  cpu" in line}
    each = max(1, workers.jobs_at_once({"kind": "cpu"}, None) * 2 // 2)
    assert threads == {f"{each} thread{'s' if each > 1 else ''}"}


@pytest.mark.slow
def test_fifty_jobs_two_at_a_time_leave_no_memory_no_files_and_no_processes(tmp_path):
    words = [*SYNTHETIC, "seed=range(50)", "sweep=fifty"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), "-m", *words, *JOBLIB],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    sweep, seen, children = tmp_path / "multirun" / "fifty", {}, set()
    while process.poll() is None:
        done = len(list(sweep.glob("*/result.json")))
        with contextlib.suppress(psutil.Error):
            for worker in psutil.Process(process.pid).children(recursive=True):
                children.add(worker)
                seen.setdefault(worker.pid, []).append((done, worker.memory_info().rss, worker.num_fds()))
        time.sleep(0.1)
    assert process.returncode == 0
    assert len(list(sweep.glob("*/result.json"))) == 50
    # The workers end by themselves once the launcher's process is gone.
    _, left = psutil.wait_procs(children, timeout=20)
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
    busy = [looks for looks in seen.values() if max(rss for _, rss, _ in looks) > 200e6]
    assert len(busy) == 2, "each worker did more than one job"
    for looks in busy:
        early = [(rss, fds) for done, rss, fds in looks if 8 <= done < 20]
        # Not at the very end, where Python takes torch down: that touches code which was never needed.
        late = [(rss, fds) for done, rss, fds in looks if 36 <= done < 48]
        # Medians: a look may fall into the moment in which a worker ends.
        assert statistics.median(rss for rss, _ in late) < 1.1 * statistics.median(rss for rss, _ in early)
        assert max(fds for _, fds in late) <= max(fds for _, fds in early)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: requirements-ray.txt")
def test_ray_runs_jobs_on_a_cluster_of_its_own(run, tmp_path):
    words = ["-m", *SYNTHETIC, "seed=1,2"]
    assert run("train.py", *words, "sweep=here").returncode == 0
    done = run("train.py", *words, "sweep=there", "hydra/launcher=ray", "hydra.launcher.ray.init.address=null")
    assert done.returncode == 0, done.stderr
    assert_same_sweeps(tmp_path / "multirun" / "here", tmp_path / "multirun" / "there", ["seed=1", "seed=2"])


@pytest.mark.slow
def test_submitit_runs_jobs_in_processes_of_its_own(run, tmp_path, tiny_data):
    words = ["-m", *TINY, f"data.root={tiny_data}", "optim.lr=1,2", "epochs=1"]
    assert run("train.py", *words, "sweep=here").returncode == 0
    done = run("train.py", *words, "hydra/launcher=submitit_local", "sweep=there")
    assert done.returncode == 0, done.stderr
    assert_same_sweeps(tmp_path / "multirun" / "here", tmp_path / "multirun" / "there", JOBS[:2])
    assert result(tmp_path / "multirun" / "there" / JOBS[0])["command"].startswith("python train.py -m")


def test_two_runs_do_not_share_a_folder(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "hydra.run.dir=one", "resume=auto"]
    assert run("train.py", *words).returncode == 0
    with record.locked(tmp_path / "one"):
        assert record.status(tmp_path / "one") == "running"
        done = run("train.py", *words)
    assert done.returncode == 1
    assert "another process is at work here (process" in done.stderr
    assert record.status(tmp_path / "one") == "completed"


def test_what_reproduces_a_run_is_in_its_folder(run, tmp_path, tiny_data):
    assert run("train.py", *TINY, f"data.root={tiny_data}", "epochs=1", "hydra.run.dir=one").returncode == 0
    told = record.read(tmp_path / "one")
    assert told["overrides"] == [*TINY, f"data.root={tiny_data}", "epochs=1"]
    assert told["command"] == shlex.join(["python", "train.py", *told["overrides"], "hydra.run.dir=one"])
    assert told["seed"] == 42
    assert told["sweep"] is told["name"] is None
    git = ["git", "-C", str(REPOSITORY)]
    assert told["commit"] == subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout)
    assert told["dirty"] == dirty == (tmp_path / "one" / "code.diff").exists()
    import torch

    assert torch.__version__.startswith(told["versions"]["torch"].split("+")[0])
    assert told["hardware"]["cpus"] >= 1


@pytest.mark.slow
def test_rerun_repeats_a_job_of_a_sweep_to_the_bit(run, tmp_path, tiny_data):
    words = ["-m", *TINY, f"data.root={tiny_data}", "epochs=1", "optim.lr=1,2", "seed=5,6", "sweep=lr"]
    assert run("train.py", *words).returncode == 0
    job = tmp_path / "multirun" / "lr" / "optim.lr=2,seed=6"
    done = run("train.py", f"rerun='{job}'", "hydra.run.dir=again")
    assert done.returncode == 0, done.stderr
    assert_same_state(job / "last.pt", tmp_path / "again" / "last.pt")
    assert rows(job) == rows(tmp_path / "again")
    assert result(job)["top1"] == result(tmp_path / "again")["top1"]
    told = shlex.split(record.read(job)["rerun"])
    assert run("train.py", *told[2:], "hydra.run.dir=told").returncode == 0
    assert rows(job) == rows(tmp_path / "told")
    assert run("train.py", f"rerun='{job}'", "seed=5", "hydra.run.dir=other").returncode == 0
    assert rows(tmp_path / "multirun" / "lr" / "optim.lr=2,seed=5") == rows(tmp_path / "other")


@pytest.mark.slow
def test_rerun_keeps_what_was_a_default_and_tells_of_what_is_gone(run, tmp_path, tiny_data):
    assert run("train.py", *TINY, f"data.root={tiny_data}", "epochs=1", "hydra.run.dir=one").returncode == 0
    config = (tmp_path / "one" / "config.yaml").read_text()
    (tmp_path / "one" / "config.yaml").write_text(config.replace("momentum: 0.9", "momentum: 0.5"))
    assert run("train.py", "rerun=one", "hydra.run.dir=two").returncode == 0
    assert "momentum: 0.5" in (tmp_path / "two" / "config.yaml").read_text()
    (tmp_path / "one" / "config.yaml").write_text(config + "warp: 9\n")
    done = run("train.py", "rerun=one", "hydra.run.dir=three")
    assert done.returncode == 1
    assert "this version has no warp" in done.stderr


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.25, 1e-5, "a", "a b", "1", "true", "null", "it's", "/x,y=z", "", [1, "b"], {}]
)
def test_a_value_is_written_as_hydra_reads_it(value):
    assert OverridesParser.create().parse_override(f"key={as_word(value)}").value() == value


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_with_the_same_trials(run, tmp_path, tiny_data):
    words = ["-m", *TINY, f"data.root={tiny_data}", *SPACE]
    assert run("train.py", *words, "sweep=whole").returncode == 0
    whole, cut = tmp_path / "multirun" / "whole", tmp_path / "multirun" / "cut"
    for seconds in (4, 7):
        assert not killed([*words, "sweep=cut"], tmp_path, seconds)
    done = run("train.py", *words, "sweep=cut")
    assert done.returncode == 0, done.stderr
    assert "search: 7 of 7 trials" in done.stdout

    def trials(folder):
        study = open_study(str(folder / JOURNAL), 3)
        return [(t.number, t.params, t.state, t.value, t.intermediate_values) for t in study.trials]

    assert trials(whole) == trials(cut)
    assert len(trials(whole)) == 7
    assert "pruned" in statuses(whole).values(), "startup trials of all learning rates, then hopeless ones"
    assert statuses(whole) == statuses(cut)
    for job in statuses(whole):
        assert rows(whole / job) == rows(cut / job)
    assert run("train.py", *words, "sweep=cut").returncode == 0
    assert len(trials(cut)) == 7
    other = run("train.py", *words, "model.dropout=choice(0.1,0.2)", "sweep=cut")
    assert other.returncode == 1
    assert "another space" in other.stderr
    other = run("train.py", *words, "optim.momentum=0.5", "hydra.sweeper.n_trials=8", "sweep=cut")
    assert other.returncode == 1
    assert "optim.momentum was 0.9, is 0.5" in other.stderr
    assert len(trials(cut)) == 7


def test_a_trial_below_the_median_of_the_others_is_hopeless(tmp_path):
    study = open_study(str(tmp_path / JOURNAL), 2, create=True)
    for values in ([10, 20, 30], [20, 30, 40]):
        trial = study.ask()
        for epoch, value in enumerate(values):
            trial.report(value, epoch)
        study.tell(trial, values[-1])
    trial = study.ask()
    where = {"storage": str(tmp_path / JOURNAL), "number": trial.number, "startup_trials": 2}
    (tmp_path / TRIAL).write_text(json.dumps(where))
    assert not hopeless(tmp_path, 0, 0.0), "the first epoch tells little"
    assert not hopeless(tmp_path, 2, 36.0)
    assert hopeless(tmp_path, 2, 34.0) is False, "an epoch is reported once, also by a run that goes on"
    other = study.ask()
    (tmp_path / TRIAL).write_text(json.dumps(where | {"number": other.number}))
    assert hopeless(tmp_path, 2, 34.0)
    assert not hopeless(tmp_path.parent, 2, 0.0), "no trial"
    assert optuna.load_study(storage=study._storage, study_name=STUDY).trials[2].intermediate_values == {
        0: 0.0,
        2: 36.0,
    }


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=choice(a, b)", {"a", "b"}),
        ("k=range(1, 6, 2)", {1, 3, 5}),
        ("k=int(interval(1, 3))", {1, 2, 3}),
        ("k=1,2", {"1", "2"}),
    ],
)
def test_a_space_has_the_values_of_hydras_grammar(text, values):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (override,) = parsed(text)
    assert {study.ask({"k": distribution(override)}).params["k"] for _ in range(60)} == values


def test_a_space_by_its_logarithm_is_no_uniform_one():
    (override,) = parsed("k=tag(log, interval(0.001, 1))")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    drawn = sorted(study.ask({"k": distribution(override)}).params["k"] for _ in range(101))
    assert 0.01 < drawn[50] < 0.1
    with pytest.raises(ConfigError, match="interval"):
        distribution(parsed("k=tag(log, interval(-1, 1))")[0])
