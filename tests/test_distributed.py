"""Ranks: what two of them find out together, and whole commands that launch or join them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from ghostnet import distributed, starters
from ghostnet.distributed import ALONE, Ranks
from ghostnet.errors import UserError
from tests.conftest import REPOSITORY, TINY, environment
from tests.test_train import HARD, assert_same_state, result, rows

CPU = torch.device("cpu")
TWO = ["device=cpu_2p", "data.batch_size=16"]
"""The global batch of TINY on two ranks."""


def module(name, *words):
    done = subprocess.run(
        [sys.executable, "-m", name, *words],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


# What two ranks find out


@pytest.fixture(scope="module")
def found():
    done = module("tests.rank_work")
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_each_rank_knows_which_it_is_and_all_hear_the_main_one(found):
    assert found["ranks"] == [[0, 0, True, 2, "launch"], [1, 1, False, 2, "launch"]]
    assert (found["argument"], found["largest"], found["from main"]) == ("told", 10, ["of 0", "of 0"])


def test_tensors_that_ranks_tell_each_other_are_not_pickled_in_the_format_of_old(found):
    assert found["tensors"] == [[[[0, 0], [1, 1]], [[0, 1, 2], "text"]]] * 2


def test_ranks_are_processes_of_the_launcher(found):
    (first, its_parent), (second, other_parent) = found["pids"]
    assert its_parent == other_parent == found["parent"]
    assert len({first, second, found["parent"]}) == 3


def test_ranks_have_cpus_of_their_own(found):
    (words, first), (_, second) = found["pinned"]
    if len(os.sched_getaffinity(0)) < 2:
        assert words == "1 CPU for 2 of them"
    else:
        assert re.fullmatch(r"\d+ CPUs? a rank", words)
        assert not set(first) & set(second)
        assert len(first) == len(second) == len(os.sched_getaffinity(0)) // 2


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_two_ranks_train_the_weights_of_one_with_frozen_batchnorm_to_float_rounding(found, accumulate):
    difference, moved = found["same as one"][accumulate]
    assert moved > 0.01
    assert difference < 1e-6 * moved + 1e-7


def test_gradients_are_reduced_once_a_step_also_when_they_are_accumulated(found):
    for name in ("fp32", "accumulated", "o2"):
        assert found["reductions"][name]["first buckets"] == found["reductions"][name]["steps"] == 5
    assert found["reductions"]["accumulated"]["torch.float32"] == 5 * found["reductions"]["all"]


def test_under_o2_gradients_travel_in_half_precision_but_for_batchnorms(found):
    o2, norm, everything = found["reductions"]["o2"], found["reductions"]["norm"], found["reductions"]["all"]
    assert o2["torch.float32"] == 5 * norm
    assert o2["torch.bfloat16"] == 5 * (everything - norm)


@pytest.mark.parametrize("dist_bn", ["reduce", "broadcast"])
def test_ranks_agree_on_batchnorms_statistics_for_evaluation_and_saving_and_keep_their_own(found, dist_bn):
    assert all(found["statistics"][dist_bn].values()), found["statistics"][dist_bn]


def test_a_rank_that_is_asked_to_stop_stops_all_before_the_same_step(found):
    assert found["stopped"] == [[3, "Interrupted: SIGUSR1"]] * 2


def test_a_rank_without_data_stops_all_before_the_same_step(found):
    assert found["broken"] == [[3, "PeerFailed: "], [3, "SampleError: picture 7 is broken"]]


def test_two_ranks_evaluate_to_the_numbers_of_one(found):
    two, one = found["evaluations"]
    assert two == one


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("killed", "UserError rank 1 was killed by SIGKILL, and all others were ended. The kernel does that where me"),
        ("sample", "SampleError rank 1: picture 9 is broken"),
        ("bug", "ZeroDivisionError: a bug of ours"),
        ("exit", "UserError rank 1 ended with exit code 7, and all others were ended."),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_own_message(how, words):
    start = time.monotonic()
    done = module("tests.rank_work", how)
    assert words in done.stdout
    assert done.stderr == ""
    assert time.monotonic() - start < 30  # of which most is the start; the others' time-out is half an hour


# Joining


NAMES = [*starters.RANKS, "MASTER_ADDR", "MASTER_PORT", *(name for names in starters.MPI.values() for name in names)]
NAMES += [name for name in os.environ if name.startswith(("SLURM_", "PET_"))]


@pytest.fixture
def plain(monkeypatch):
    """The environment of a process that nobody started as a rank; what a test sets in it is taken back."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_torchrun_srun_and_a_plain_start_are_told_apart(plain):
    plain.setenv("SLURM_NTASKS", "8")  # within a batch script, where nothing was started by srun
    plain.setenv("SLURM_PROCID", "0")
    assert starters.started_by() == ("", "")
    plain.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert starters.started_by() == ("", "")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        plain.setenv(name, "1")
    assert starters.started_by() == ("torchrun", "")


def test_a_shell_of_srun_is_no_rank_and_says_so(plain):
    plain.setenv("SLURM_STEP_NUM_TASKS", "8")
    plain.setenv("SLURM_PTY_PORT", "4444")
    starter, note = starters.started_by()
    assert starter == ""
    assert note.startswith("this is a shell of srun --pty: its 8 tasks (SLURM_STEP_NUM_TASKS) are not taken for ranks")
    assert "`unset SLURM_PTY_PORT`" in note


def test_the_command_of_srun_itself_is_a_rank_though_it_has_a_terminal(slurm):
    slurm.setenv("SLURM_PTY_PORT", "4444")
    slurm.setattr(starters, "_is_child_of_slurm", lambda: True)
    assert starters.started_by() == ("srun", "")


@pytest.mark.parametrize("starter", ["mpirun", "mpiexec"])
def test_ranks_of_mpi_meet_and_say_how_they_would_not(plain, starter):
    names = starters.MPI[starter]
    for name, value in zip(names, "3414", strict=True):
        plain.setenv(name, value)
    assert starters.started_by() == (
        starter,
        f"one of the 4 ranks that {starter} started ({names[1]}); they meet at 127.0.0.1:29500 "
        f"(MASTER_ADDR, MASTER_PORT). To train alone: `env -u {names[1]} python train.py …`.",
    )
    assert [os.environ[name] for name in starters.RANKS] == list("3414")


def test_ranks_of_mpi_on_several_machines_ask_where_to_meet(plain):
    for name, value in zip(starters.MPI["mpirun"], "3412", strict=True):
        plain.setenv(name, value)
    with pytest.raises(UserError, match=r"mpirun started 4 ranks .* set MASTER_ADDR to the host of rank 0"):
        starters.started_by()
    plain.delenv("OMPI_COMM_WORLD_LOCAL_RANK")
    starter, note = starters.started_by()
    assert starter == ""
    assert note.startswith("OMPI_COMM_WORLD_SIZE=4, but OMPI_COMM_WORLD_LOCAL_RANK is not set: MPI's variables are not")


def test_pods_of_a_pytorchjob_are_a_rank_each_or_are_for_torchrun(plain):
    for name, value in {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "4"}.items():
        plain.setenv(name, value)
    plain.setenv("PET_NPROC_PER_NODE", "2")
    starter, note = starters.started_by()
    assert (starter, "LOCAL_RANK" in os.environ) == ("", False)
    assert note.startswith("RANK=1 WORLD_SIZE=4 PET_NPROC_PER_NODE=2 are of a PyTorchJob, for torchrun")
    assert "this process trains alone" in note
    plain.delenv("PET_NPROC_PER_NODE")
    starter, note = starters.started_by()
    assert (starter, os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("torchrun", "0", "1")
    assert note.startswith("rank 1 of 4, alone on its machine")
    assert "they meet at job-master-0:23456" in note


def test_a_count_of_ranks_that_is_no_number_is_named(plain):
    plain.setenv("PMI_SIZE", "four")
    with pytest.raises(UserError, match="the environment's PMI_SIZE=four is no number"):
        starters.started_by()


@pytest.fixture
def listening():
    """A port at which somebody takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "others", "signum", "told"),
    [
        (0, "nobody", signal.SIGINT, "rank 0 waits for ranks 1, 2 of 3 to come to 127.0.0.1:{port}, for 5 s so far."),
        (
            1,
            "nobody",
            signal.SIGTERM,
            "rank 1 waits for rank 0 of 3: no answer at 127.0.0.1:{port} (Connection refused",
        ),
        (2, "a stranger", signal.SIGHUP, "rank 2 waits for rank 0 of 3: no answer at 127.0.0.1:{port} (something l"),
    ],
)
def test_a_rank_whose_others_never_come_says_so_and_ends_when_it_is_asked_once(
    rank, others, signum, told, listening, tmp_path, tiny_data
):
    port = free_port() if others == "nobody" else listening
    join = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
    join |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = start(*TINY, f"data.root={tiny_data}", cwd=tmp_path, **join)
    assert process.stderr.readline().startswith(told.format(port=port))
    process.send_signal(signum)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signum, err
    assert "stopped" in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_waits_for_its_job_ends_when_it_is_asked_once(tmp_path, tiny_data):
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    join = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    join |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    process = start(*TINY, f"data.root={tiny_data}", cwd=tmp_path, **join)
    here = torch.distributed.PrefixStore("here 0", store)
    here.wait(["1"])
    here.set("0", "")
    here.set("all", "")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "stopped at once, as asked.\n")


@pytest.fixture
def slurm(plain):
    tasks = {"PROCID": "5", "STEP_NUM_TASKS": "7", "LOCALID": "1", "NODEID": "1", "STEP_TASKS_PER_NODE": "4,3"}
    for name, value in (tasks | {"STEP_NODELIST": "n1", "JOB_ID": "12", "STEP_ID": "3"}).items():
        plain.setenv(f"SLURM_{name}", value)
    return plain


def test_what_srun_sets_becomes_what_torchrun_would_set(slurm):
    assert starters.started_by() == ("srun", "")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["5", "7", "1", "3", "n1"]
    first = os.environ.pop("MASTER_PORT")
    slurm.setenv("SLURM_STEP_ID", "4")
    slurm.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x3),1")
    starters._take_from_slurm()
    assert os.environ["MASTER_PORT"] != first
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_a_list_of_hosts_that_can_not_be_read_asks_for_the_first(slurm, tmp_path):
    slurm.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    slurm.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"the first host of 'n\[1-2\]' can't be told.* Set MASTER_ADDR"):
        starters._take_from_slurm()
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1; echo n2\n")
    (tmp_path / "scontrol").chmod(0o755)
    starters._take_from_slurm()
    assert os.environ["MASTER_ADDR"] == "n1"


def test_a_rank_has_the_card_of_its_place_or_the_one_that_srun_shows_it():
    third = Ranks(rank=6, world_size=8, local_rank=2, local_size=4, starter="torchrun")
    assert third.card(None, 4) == 2
    assert third.card([4, 5, 7, 6], 8) == 7
    assert Ranks(local_rank=2, starter="srun").card(None, 1) == 0
    assert ALONE.card([3], 8) == 3
    assert str(third) == "8 ranks on 2 machines"


@pytest.fixture
def machine(monkeypatch):
    """Pins a rank of a machine on which each rank may use some CPUs and is near some."""
    pinned = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: pinned.append(list(cpus)))
    monkeypatch.setattr(torch, "set_num_threads", pinned.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CPU_AFFINITY_CONF", raising=False)

    def pin(rank, may, near, kind="npu"):
        class Here(Ranks):
            def gather(self, value):
                others = [(value[0], r, set(may[r]), set(near[r])) for r in range(len(may))]
                return [*others, ("another machine", 9, {0}, {0})]

        monkeypatch.setattr(distributed, "cpus", lambda: set(may[rank]))
        monkeypatch.setattr(distributed, "cpus_near", lambda device: set(near[rank]))
        pinned.clear()
        return distributed.pin(Here(rank=rank, world_size=len(may) + 1), SimpleNamespace(type=kind)), list(pinned)

    return pin


def test_ranks_near_the_same_cpus_share_them_out(machine):
    may, near = [range(8)] * 4, [range(4), range(4), range(4, 8), range(4, 8)]
    assert [machine(rank, may, near) for rank in range(4)] == [
        ("2 CPUs a rank", [[2 * rank, 2 * rank + 1], 2]) for rank in range(4)
    ]


def test_cpus_stay_as_the_user_or_torch_npu_gave_them(machine, monkeypatch):
    own = [range(2), range(2, 4)]
    assert machine(0, own, own) == ("2 CPUs a rank, as they were given", [])
    assert machine(0, [range(3)], [range(3)]) == ("3 CPUs a rank, as they were given", [])
    assert machine(0, [range(1)] * 2, [range(1)] * 2) == ("1 CPU for 2 of them", [])
    monkeypatch.setenv("CPU_AFFINITY_CONF", "1")
    assert machine(0, [range(8)] * 2, [range(8)] * 2) == ("CPUs by CPU_AFFINITY_CONF", [])
    assert machine(1, [range(8)] * 2, [range(8)] * 2, "cpu") == ("4 CPUs a rank", [[4, 5, 6, 7], 4])


def test_a_user_who_set_openmps_threads_keeps_them(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine(1, [range(8)] * 2, [range(8)] * 2) == ("4 CPUs a rank", [[4, 5, 6, 7]])


# Whole commands


def start(*words, cwd, options=None, **env):
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *words],
        cwd=cwd,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **(options or {}),
    )


def wait_for_step(process, folder, step):
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(folder)):
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate()[1])


def left_over(session):
    """The processes of a session that are still there, once those that are ending have had a moment."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process.cmdline())
            except (psutil.Error, OSError):
                continue
        if not alive:
            break
        time.sleep(0.1)
    return alive


@pytest.mark.slow
def test_two_ranks_leave_one_folder_one_log_and_one_result(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "ema_decay=0.9", "logger=wandb"]
    single = run("train.py", *words, "hydra.run.dir=one")
    assert single.returncode == 0, single.stderr
    done = run("train.py", *words, *TWO, "hydra.run.dir=two", "baseline=one")
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    assert len(list((tmp_path / "two" / "wandb").glob("*run-*"))) == 1
    for text in (done.stdout, (tmp_path / "two" / "train.log").read_text()):
        assert text.count("device  cpu") == text.count("epoch 2/2 step 20/20") == 1
    assert re.search(r"2 ranks, \d CPUs? (a rank|for 2)", done.stdout)
    steps = [row["step"] for row in rows(tmp_path / "two") if "train/loss" in row]
    assert steps == list(range(2, 21, 2))
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert (one["world_size"], two["world_size"], two["global_batch_size"]) == (1, 2, 32)
    assert len(two["memory"]) == 2
    assert two["compute"] + two["data_wait"] + two["reduction"] == pytest.approx(1)
    assert two["reduction"] > 0 == one["reduction"]
    assert two["scaling_efficiency"] == pytest.approx(two["fps"] / 2 / one["fps"])
    assert "Scaling efficiency" in done.stdout
    assert "the baseline differs: batch_size 32 → 16" in done.stdout

    counts = []
    for words in (["device=cpu_2p"], ["device=cpu", "device.count=3", "data.eval_batch_size=9"], ["device=cpu"]):
        again = run("evaluate.py", "ckpt=two", *words, cwd=tmp_path)
        assert (again.returncode, again.stderr) == (0, "")
        printed = json.loads(again.stdout.splitlines()[-1])
        counts.append({key: printed[key] for key in ("top1_hits", "top5_hits", "images", "top1")})
        assert printed["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["top1"] == two["top1"]

    words = [*TINY, f"data.root={tiny_data}", "ema_decay=0.9", "hydra.run.dir=two", "resume=auto", "epochs=3"]
    refused = run("train.py", *words, "data.batch_size=16", cwd=tmp_path)
    assert refused.returncode == 1
    assert "data.batch_size × device.count × accumulate was 32, is 16" in refused.stderr
    longer = run("train.py", *words, cwd=tmp_path)  # the same global batch on one
    assert longer.returncode == 0, longer.stderr
    assert "device.count was 2, is 1" in longer.stdout
    assert (result(tmp_path / "two")["steps"], result(tmp_path / "two")["world_size"]) == (30, 1)
    losses = {row["step"]: row["train/loss"] for row in rows(tmp_path / "two") if "train/loss" in row}
    assert list(losses) == list(range(2, 31, 2))
    assert losses[22] < losses[2] - 0.05


@pytest.mark.slow
def test_two_ranks_stopped_in_mid_epoch_resume_bit_exactly(run, tmp_path, tiny_data):
    words = [*TINY, *HARD, f"data.root={tiny_data}", "device=cpu_2p", "data.batch_size=8"]
    assert run("train.py", *words, "hydra.run.dir=whole").returncode == 0
    # To all of its processes, as a terminal's Ctrl-C, and SIGTERM by systemd, Slurm and a shell's `kill %1`.
    for step, signum, name in ((4, signal.SIGINT, "Ctrl-C"), (12, signal.SIGTERM, "SIGTERM")):
        process = start(*words, "hydra.run.dir=cut", "resume=auto", cwd=tmp_path)
        wait_for_step(process, tmp_path / "cut", step)
        os.killpg(process.pid, signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, err
        assert err.startswith(f"{name}: {tmp_path / 'cut' / 'last.pt'} is saved. To go on:\n  python train.py ")
        assert left_over(process.pid) == []
    resumed = run("train.py", *words, "hydra.run.dir=cut", "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    at = int(re.search(r"resume  .*, step (\d+) of 20", resumed.stdout)[1])
    assert 12 <= at < 20
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert_same_state(tmp_path / "cut" / "last.pt", tmp_path / "whole" / "last.pt")
    assert_same_state(tmp_path / "cut" / "best.pt", tmp_path / "whole" / "best.pt")


@pytest.mark.parametrize("victim", ["rank", pytest.param("launcher", marks=pytest.mark.slow)])
def test_killing_one_process_ends_all_of_them(tmp_path, tiny_data, victim):
    process = start(*TINY, "epochs=200", f"data.root={tiny_data}", *TWO, "hydra.run.dir=here", cwd=tmp_path)
    wait_for_step(process, tmp_path / "here", 12)
    ranks = [p for p in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(p.cmdline())]
    assert len(ranks) == 2
    before = time.monotonic()
    (ranks[1] if victim == "rank" else process).send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert left_over(process.pid) == []
    assert time.monotonic() - before < 15
    if victim == "rank":
        assert process.returncode == 1
        assert err.startswith("error: rank 1 was killed by SIGKILL, and all others were ended.")
        assert "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_broken_pictures_are_skipped_told_and_counted_by_all_ranks_together(run, tmp_path, image_folder):
    root = tmp_path / "data"
    shutil.copytree(image_folder, root)
    broken = [root / "train/class0/000.jpg", root / "train/class2/004.jpg", root / "val/class1/001.JPEG"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    words = [
        "data=imagefolder",
        f"data.root={root}",
        "data.on_error=skip",
        "data.image_size=32",
        "model.width=0.1",
        "schedule.warmup_epochs=1",
    ]
    done = run("train.py", *words, "device=cpu_2p", "data.batch_size=8", "epochs=3", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    for path in broken:
        assert f"skipped {path} can't be decoded" in done.stdout
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["skipped_train"], result["skipped_val"]) == (2, 1)
    again = run("evaluate.py", "ckpt=run", "device=cpu")
    assert again.returncode == 0, again.stderr
    assert f"skipped: {broken[2]} can't be decoded" in again.stdout
    counts = json.loads(again.stdout.splitlines()[-1])
    assert (counts["images"], counts["skipped"]) == (23, 1)
    assert counts["top1"] == result["top1"]


@pytest.mark.slow
def test_a_broken_picture_on_one_rank_ends_the_run_with_its_path_and_saves_what_was_trained(
    run, tmp_path, image_folder
):
    root = tmp_path / "data"
    subprocess.run(["cp", "-r", str(image_folder), str(root)], check=True)
    broken = root / "train" / "class2" / "004.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    words = ["model.width=0.1", "epochs=1", "data.batch_size=4", "data.image_size=32", "log_every=1", "data.workers=1"]
    words += [f"data.root={root}", "device=cpu_2p", "schedule.warmup_epochs=0"]
    done = run("train.py", *words, "hydra.run.dir=here")
    assert done.returncode == 1
    assert re.search(rf"^error: (rank 1: )?{re.escape(str(broken))}", done.stderr), done.stderr
    assert "To go on once that is mended:" in done.stderr
    assert "Traceback" not in done.stderr
    saved = torch.load(tmp_path / "here" / "last.pt", weights_only=True)["step"]
    assert saved == max((row["step"] for row in rows(tmp_path / "here")), default=0)


@pytest.mark.slow
def test_a_sweep_of_four_jobs_of_two_ranks_leaves_no_process_and_no_port(tmp_path, tiny_data):
    words = ["-m", *TINY, "epochs=1", f"data.root={tiny_data}", *TWO, "optim.lr=1,2", "seed=1,2"]
    process = start(*words, "hydra.sweep.dir=sweep", cwd=tmp_path)
    ports = set()
    while process.poll() is None:
        try:
            inside = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            ports |= {c.laddr.port for p in inside for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            pass
        time.sleep(0.05)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    jobs = [result(tmp_path / "sweep" / f"optim.lr={lr},seed={seed}") for lr in (1, 2) for seed in (1, 2)]
    assert [job["world_size"] for job in jobs] == [2] * 4
    assert len({job["train_loss"] for job in jobs}) == 4
    assert "best first" in out
    assert left_over(process.pid) == []
    assert len(ports) >= 4  # each job had a port of its own
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_two_runs_at_once_do_not_disturb_each_other(run, tmp_path, tiny_data):
    words = [*TINY, "epochs=1", f"data.root={tiny_data}", *TWO]
    both = [start(*words, f"hydra.run.dir={name}", cwd=tmp_path) for name in "ab"]
    for process in both:
        assert process.wait(timeout=120) == 0, process.communicate()
        process.communicate()
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert_same_state(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(port, node, words, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
    command += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return subprocess.Popen(
        [*command, str(REPOSITORY / "train.py"), *words],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_machines_under_torchrun_train_the_bits_of_two_launched_ranks(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "data.batch_size=16", "hydra.run.dir=joined"]
    (tmp_path / "second").mkdir()
    port = free_port()
    second = torchrun(port, 1, words, tmp_path / "second")
    first = torchrun(port, 0, words, tmp_path)
    out, err = first.communicate(timeout=120)
    quiet, _ = second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), err
    assert "2 ranks on 2 machines" in out
    assert quiet == ""
    assert list((tmp_path / "second").iterdir()) == []
    assert run("train.py", *TINY, f"data.root={tiny_data}", *TWO, "hydra.run.dir=launched").returncode == 0
    assert rows(tmp_path / "joined") == rows(tmp_path / "launched")
    assert_same_state(tmp_path / "joined" / "last.pt", tmp_path / "launched" / "last.pt")


def test_ranks_that_are_not_those_of_the_command_are_refused_at_the_door(run, tmp_path, tiny_data):
    join = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = run("train.py", *TINY, f"data.root={tiny_data}", *TWO, **join, MASTER_PORT=str(free_port()))
    assert done.returncode == 1
    assert done.stderr.startswith("error: device.count=2, but torchrun started 1 on this machine. Give device.count=1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_faults_of_many_ranks_are_told_once_and_leave_nothing(run, tmp_path, tiny_data):
    for words, told in (
        (["data.root=/nowhere"], "error: "),
        ([f"data.root={tiny_data}", "sync_bn=true"], "error: sync_bn=true: torch's SyncBatchNorm needs cards."),
        ([f"data.root={tiny_data}", "baseline=nowhere"], "error: baseline=nowhere: nowhere is no result.json"),
        ([f"data.root={tiny_data}", "data.batch_size=900"], "error: data.batch_size=900 on 2 device(s) is more than"),
    ):
        done = run("train.py", *TINY, "device=cpu_2p", *words)
        assert done.returncode == 1
        assert done.stderr.startswith(told), done.stderr
        assert done.stderr.count("error") == 1
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("outputs/*/*"))
