"""Faults around a training, each really caused to a whole command: what it says, how it ends, what is left."""

import contextlib
import ctypes
import fcntl
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time

import psutil
import pytest

from ghostnet import checkpoint
from tests.conftest import REPOSITORY, TINY, environment
from tests.test_distributed import TWO, free_port, left_over, start, torchrun, wait_for_step
from tests.test_train import assert_same_state, result, rows

STALL = ["stall_timeout=4"]


def ended(process, code, seconds=60):
    """Wait for a command to end -> (stdout, stderr); it gives one message and no traceback."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert left_over(process.pid) == []
    return out, err


def launched_ranks(process):
    """The processes of the ranks that a command launched, in their order."""
    children = psutil.Process(process.pid).children()
    return sorted((p for p in children if "resource_tracker" not in " ".join(p.cmdline())), key=lambda p: p.pid)


@pytest.fixture
def slow_disk(tmp_path):
    """The environment of a command whose disk hangs or is slow, once a file in the folder says so."""
    folder = tmp_path / "slow_disk"
    folder.mkdir()
    return {"SLOW_DISK": str(folder), "PYTHONPATH": str(REPOSITORY / "tests" / "slow_disk")}


@pytest.mark.slow
def test_a_picture_that_never_comes_ends_the_run_with_the_stacks(tmp_path, image_folder, slow_disk):
    words = ["model.width=0.1", "epochs=300", "data.batch_size=16", "data.image_size=32", "log_every=1"]
    words += ["data.workers=1", f"data.root={image_folder}", "device=cpu", "schedule.warmup_epochs=0", *STALL]
    process = start(*words, "hydra.run.dir=here", cwd=tmp_path, **slow_disk)
    wait_for_step(process, tmp_path / "here", 5)
    (tmp_path / "slow_disk/hang").touch()
    _, err = ended(process, 1)
    stacks, message = err.split("error: ", 1)
    assert stacks, err
    assert stacks.startswith("Stacks of rank 0, process ")
    assert "data/loader.py" in stacks
    assert "the run has not gone on for" in message
    assert "in the loader's threads, which read the pictures" in message
    assert "stall_timeout=4" in message
    assert "the loader's threads" in (tmp_path / "here/train.log").read_text()


@pytest.mark.parametrize("words", [["pack", "out=shards"], ["doctor"]], ids=str)
def test_a_picture_that_never_comes_ends_a_tool_too(tmp_path, image_folder, slow_disk, words):
    (tmp_path / "slow_disk/hang").touch()
    command = [sys.executable, "-m", f"ghostnet.tools.{words[0]}", *words[1:], f"data.root={image_folder}"]
    env = environment() | slow_disk
    env["PYTHONPATH"] = f"{env['PYTHONPATH']}:{REPOSITORY}"
    done = subprocess.run(
        [*command, "stall_timeout=4"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Stacks of rank 0, process ")
    assert "error: the run has not gone on for" in done.stderr
    assert "in images to be read" in done.stderr


def test_a_rank_that_hangs_is_named_and_all_stacks_are_shown(tmp_path, tiny_data):
    process = start(*TINY, "epochs=400", f"data.root={tiny_data}", *TWO, *STALL, "hydra.run.dir=here", cwd=tmp_path)
    wait_for_step(process, tmp_path / "here", 12)
    launched_ranks(process)[1].send_signal(signal.SIGSTOP)
    _, err = ended(process, 1)
    for part in ("Stacks of rank 0", "Stacks of rank 1", "error: rank 1 hangs", "rank 0 waits for "):
        assert err.count(part) == 1, err
    assert err.count("error: ") == 1


@pytest.mark.slow
def test_a_rank_that_hangs_under_torchrun_is_named_and_all_stacks_are_shown(tmp_path, tiny_data):
    words = [*TINY, "epochs=400", f"data.root={tiny_data}", "data.batch_size=16", *STALL, "hydra.run.dir=here"]
    (tmp_path / "second").mkdir()
    port = free_port()
    second, first = torchrun(port, 1, words, tmp_path / "second"), torchrun(port, 0, words, tmp_path)
    wait_for_step(first, tmp_path / "here", 12)
    (rank,) = psutil.Process(second.pid).children()
    rank.send_signal(signal.SIGSTOP)
    _, err = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert first.returncode == second.returncode == 1
    for part in ("Stacks of rank 0", "Stacks of rank 1", "error: rank 1 hangs", "rank 0 waits for "):
        assert err.count(part) == 1, err


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_under_torchrun_ends_all_and_the_run_goes_on(tmp_path, tiny_data, killed):
    words = [*TINY, f"data.root={tiny_data}", "data.batch_size=16", "save_every=2", "hydra.run.dir=here", "resume=auto"]
    (tmp_path / "second").mkdir()
    port = free_port()
    second, first = torchrun(port, 1, words, tmp_path / "second"), torchrun(port, 0, words, tmp_path)
    wait_for_step(first, tmp_path / "here", 5)
    (rank,) = psutil.Process((first, second)[killed].pid).children()
    rank.send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert first.returncode
    assert second.returncode
    other = said[1 - killed]
    assert "error: " in other, other
    assert left_over(first.pid) == left_over(second.pid) == []
    port = free_port()
    second, first = torchrun(port, 1, words, tmp_path / "second"), torchrun(port, 0, words, tmp_path)
    out, err = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), err
    assert re.search(r"^resume  .*here/last.pt, step \d+ of 20", out, re.M), out
    assert [row["step"] for row in rows(tmp_path / "here") if "train/loss" in row] == list(range(2, 21, 2))


@pytest.mark.slow
def test_slow_saves_trip_no_time_out_on_any_rank(tmp_path, tiny_data, slow_disk):
    """A save takes twice the time that a rank may hang."""
    (tmp_path / "slow_disk/slow").write_text("4")
    words = [*TINY, f"data.root={tiny_data}", *TWO, "stall_timeout=2", "save_every=3", "hydra.run.dir=here"]
    process = start(*words, cwd=tmp_path, **slow_disk)
    _, err = ended(process, 0, 120)
    assert err == ""


# The disk


def drop_root_s_right_to_write_anywhere():
    """In a command to be started: root too is held to what a folder's mode says. Others are already."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def whole(words, cwd):
    """The folder of a training that nothing disturbs."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *words, "hydra.run.dir=whole"]
    subprocess.run(command, cwd=cwd, env=environment(), check=True, capture_output=True, timeout=120)
    return cwd / "whole"


@pytest.fixture(scope="session")
def words(tiny_data):
    """Of a training of 80 steps."""
    return [*TINY, f"data.root={tiny_data}", "epochs=8", "save_every=5"]


@pytest.fixture(scope="session")
def undisturbed(words, tmp_path_factory):
    """Its folder, where nothing disturbs it."""
    return whole(words, tmp_path_factory.mktemp("undisturbed"))


def assert_ends_in_the_same_bits(run, words, folder, undisturbed):
    """Go on with a run where it was cut off: it ends as one that was not."""
    done = run("train.py", *words, f"hydra.run.dir={folder}", "resume=auto")
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "best.pt"):
        assert_same_state(undisturbed / name, folder / name)
    assert rows(undisturbed) == rows(folder)
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_a_checkpoint_too_large_for_the_disk_ends_the_run_and_the_one_before_stays(run, tmp_path, words, undisturbed):
    process = start(*words, "hydra.run.dir=here", cwd=tmp_path)
    wait_for_step(process, tmp_path / "here", 12)
    kept = checkpoint.load(tmp_path / "here/last.pt")["step"]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # as ulimit -f
    _, err = ended(process, 1)
    message, saved, command = err.strip().split("\n")
    assert re.match(r"error: .*/here/(last|best)\.pt can't be written: File too large: it takes \d\.\d MB, ", message)
    assert "MB are free there. The " in message
    assert ".pt of before is kept, and whole. Raise the limit" in message
    assert saved == "The last checkpoint is saved. To go on once that is mended:"
    assert command.endswith("hydra.run.dir=here resume=auto")
    assert checkpoint.load(tmp_path / "here/last.pt")["step"] >= kept
    assert_ends_in_the_same_bits(run, words, tmp_path / "here", undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], check=False, capture_output=True
    ).returncode:
        pytest.skip("nothing may be mounted here: the limit on file sizes and /dev/full do it in the tests beside")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk):
    """Take all the space of a file system."""
    with contextlib.suppress(OSError), (disk / "others").open("wb", 0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("log_every", [1000, 1])
@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_with_space_again_it_ends_in_the_same_bits(
    run, tmp_path, words, small_disk, log_every
):
    """By the checkpoint, or by metrics.jsonl."""
    words = [*words, f"log_every={log_every}"]
    folder = small_disk / "here"
    process = start(*words, f"hydra.run.dir={folder}", cwd=tmp_path)
    until = time.monotonic() + 60
    while not (folder / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    fill(small_disk)
    _, err = ended(process, 1)
    assert "can't be written: No space left on device" in err.split("\n")[0]
    assert "Free some space there" in err
    assert "To go on once that is mended:\n  python train.py" in err
    checkpoint.load(folder / "last.pt")
    full = run("train.py", *words, f"hydra.run.dir={folder}", "resume=auto")
    assert full.returncode == 1
    assert full.stderr.startswith("error: ")
    assert full.stderr.count("\n") == 1
    (small_disk / "others").unlink()
    assert_ends_in_the_same_bits(run, words, folder, whole(words, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "train.log"])
def test_a_file_that_finds_no_space_is_named_and_nothing_is_lost(run, tmp_path, words, name, undisturbed):
    here = tmp_path / "here"
    here.mkdir()
    if name == "train.log":
        (here / name).symlink_to("/dev/full")
    process = start(*words, "hydra.run.dir=here", "resume=auto", cwd=tmp_path)
    wait_for_step(process, here, 4)
    if name == "metrics.jsonl":
        kept = (here / name).read_text()
        (tmp_path / "full").symlink_to("/dev/full")
        (tmp_path / "full").replace(here / name)
    if name == "result.json":
        (here / ".result.json.tmp").mkdir()
    _, err = ended(process, 0 if name == "train.log" else 1)
    assert re.match(rf"(error|note) .*/here/{re.escape(name)} can't be written: ", err.replace("error:", "error "))
    if name == "train.log":
        assert err.endswith("The run goes on without it.\n")
        assert err.count("\n") == 1
        (here / name).unlink()
    elif name == "metrics.jsonl":
        (here / name).unlink()
        (here / name).write_text(kept)
    else:
        assert "resume=auto" in err
        (here / ".result.json.tmp").rmdir()
    done = run("train.py", *words, "hydra.run.dir=here", "resume=auto")
    assert done.returncode == 0, done.stderr
    assert_same_state(undisturbed / "last.pt", here / "last.pt")
    assert result(here)["status"] == "completed"


@pytest.mark.slow
def test_an_id_of_weights_and_biases_that_can_not_be_written_stops_no_training(tmp_path, words):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/wandb_id").symlink_to(tmp_path / "nowhere/id")
    words = [*words, "logger=wandb", "epochs=1", "hydra.run.dir=here", "resume=auto"]
    out, err = ended(start(*words, cwd=tmp_path), 0)
    assert re.search(r"Weights & Biases failed at step 0: .*wandb_id can't be written: No such file.* goes on wi", out)
    assert err == ""
    assert result(tmp_path / "here")["status"] == "completed"


@pytest.mark.slow
def test_a_full_disk_under_the_files_of_weights_and_biases_stops_no_training(tmp_path, words, small_disk):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/wandb").symlink_to(small_disk)
    fill(small_disk)
    words = [*words, "logger=wandb", "hydra.run.dir=here", "resume=auto"]
    out, err = ended(start(*words, cwd=tmp_path), 0)
    assert "Weights & Biases failed at step" in out, out
    assert "python -m ghostnet.tools.wandb_sync here" in out
    assert err == ""
    assert result(tmp_path / "here")["status"] == "completed"


@pytest.mark.slow
def test_a_run_folder_that_became_read_only_ends_the_run_and_is_refused_at_the_door(run, tmp_path, words, undisturbed):
    here = tmp_path / "here"
    hold = {"preexec_fn": drop_root_s_right_to_write_anywhere}
    process = start(*words, "hydra.run.dir=here", cwd=tmp_path, options=hold)
    wait_for_step(process, here, 12)
    here.chmod(0o555)
    try:
        _, err = ended(process, 1)
        assert re.match(r"error: .*/here/(last|best)\.pt can't be written: Permission denied\. The ", err)
        assert "Make the folder writable" in err
        assert "To go on once that is mended:" in err
        before = sorted(here.iterdir())
        _, err = ended(start(*words, "hydra.run.dir=here", "resume=auto", cwd=tmp_path, options=hold), 1)
        assert err.startswith("error: here/train.log can't be written: Permission denied. Make the folder writable")
        assert sorted(here.iterdir()) == before
    finally:
        here.chmod(0o755)
    assert_ends_in_the_same_bits(run, words, here, undisturbed)


@pytest.mark.parametrize("how", ["removed", pytest.param("moved", marks=pytest.mark.slow)])
def test_a_run_folder_that_is_gone_ends_the_run_and_does_not_come_back(tmp_path, words, how):
    words, here = [*words, "epochs=200", "logger=wandb"], tmp_path / "here"
    process = start(*words, "hydra.run.dir=here", cwd=tmp_path)
    wait_for_step(process, here, 12)
    if how == "moved":
        here.rename(tmp_path / "there")
    else:
        while here.exists():  # the run may be writing into it
            shutil.rmtree(here, ignore_errors=True)
    _, err = ended(process, 1)
    assert re.match(r"error: .*/here/\S+ can't be written: .*/here is not there any more; it was removed or moved", err)
    assert err.count("error:") == 1
    assert not here.exists()
    if how == "moved":
        checkpoint.load(tmp_path / "there/last.pt")


# Signals, terminals, readers


def test_a_second_ctrl_c_ends_a_save_at_once_and_the_last_checkpoint_stays_whole(tmp_path, words, slow_disk):
    here = tmp_path / "here"
    process = start(*words, "hydra.run.dir=here", cwd=tmp_path, **slow_disk)
    wait_for_step(process, here, 14)
    (tmp_path / "slow_disk/slow").write_text("60")
    process.send_signal(signal.SIGINT)
    until = time.monotonic() + 60
    while not list(here.glob(".last.pt.*.tmp")) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(1.2)  # longer than an echo
    assert process.poll() is None
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 130)
    assert time.monotonic() - before < 30  # and not the minute that the save would take
    assert err == "stopped at once, as asked. The last checkpoint is whole; resume=auto goes on from it.\n"
    assert checkpoint.load(here / "last.pt")["step"] % 10 == 0


def wait_for_evaluation(process, folder, step):
    """Wait until a run has trained to a step, the last of an epoch, and not yet evaluated it."""
    wait_for_step(process, folder, step)
    assert not [row for row in rows(folder) if row["step"] >= step and "eval/top1" in row]


SLOW_EVALUATION = ["data=samples", "data.eval_batch_size=1", "data.batch_size=3000", "epochs=2", "model.width=0.1"]
SLOW_EVALUATION += ["data.workers=1", "log_every=1", "device=cpu", "schedule.warmup_epochs=0", "data.root=null"]


@pytest.mark.slow
def test_sigterm_in_the_middle_of_an_evaluation_saves_and_evaluates_again(run, tmp_path):
    here = tmp_path / "here"
    process = start(*SLOW_EVALUATION, "hydra.run.dir=here", cwd=tmp_path)
    wait_for_evaluation(process, here, 2)
    process.send_signal(signal.SIGTERM)
    _, err = ended(process, 143)
    assert "last.pt is saved. To go on:" in err
    saved = checkpoint.load(here / "last.pt")
    assert (saved["step"], saved["evaluated"]) == (2, 0)
    assert_ends_in_the_same_bits(run, SLOW_EVALUATION, here, whole(SLOW_EVALUATION, tmp_path))


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_an_evaluation_ends_all_with_one_message(tmp_path):
    words = [*SLOW_EVALUATION, "device=cpu_2p", "data.batch_size=1500"]
    process = start(*words, "hydra.run.dir=here", cwd=tmp_path)
    wait_for_evaluation(process, tmp_path / "here", 2)
    launched_ranks(process)[0].kill()
    _, err = ended(process, 1)
    assert err.startswith("error: rank 0 was killed by SIGKILL, and all others were ended.")
    assert err.count("\n") == 1


def terminal(*words, cwd, ignored=False):
    """Start train.py in a terminal of its own -> (process, the end of the terminal that is to be closed)."""
    master, slave = pty.openpty()

    def take_it():
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment() | {"TERM": "xterm"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=take_it,
    )
    os.close(slave)
    threading.Thread(target=drain, args=(master,), daemon=True).start()
    return process, master


def drain(master):
    with contextlib.suppress(OSError):
        while os.read(master, 65536):
            pass


@pytest.mark.parametrize("devices", [[], pytest.param(TWO, marks=pytest.mark.slow)])
def test_a_closed_terminal_has_the_run_save_and_end(run, tmp_path, words, devices):
    words, here = [*words, *devices], tmp_path / "here"
    process, master = terminal(*words, "hydra.run.dir=here", cwd=tmp_path)
    wait_for_step(process, here, 12)
    hang_up(master)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert left_over(process.pid) == []
    assert checkpoint.load(here / "last.pt")["step"] >= 12
    assert "Traceback" not in (here / "train.log").read_text()
    if devices:
        assert_ends_in_the_same_bits(run, words, here, whole(words, tmp_path))


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(tmp_path, words):
    here = tmp_path / "here"
    process, master = terminal(*words, "hydra.run.dir=here", cwd=tmp_path, ignored=True)
    wait_for_step(process, here, 12)
    hang_up(master)
    assert process.wait(60) == 0
    assert result(here)["status"] == "completed"
    assert "stdout can't be written any more" in (here / "train.log").read_text()


def hang_up(master):
    """Close a terminal, although a thread may be reading from it."""
    os.dup2(os.open(os.devnull, os.O_RDWR), master)


@pytest.mark.parametrize(
    "shell",
    ["| head -1", *(pytest.param(other, marks=pytest.mark.slow) for other in ("> /dev/full", ">&-", ">&- 2>&-"))],
)
def test_a_training_outlives_whoever_reads_it(tmp_path, tiny_data, shell):
    words = [*TINY, f"data.root={tiny_data}", "epochs=1", "hydra.run.dir=here"]
    command = f"set -o pipefail; {sys.executable} {REPOSITORY}/train.py {' '.join(words)} {shell}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0
    assert done.stdout.count("\n") == ("head" in shell)
    assert done.stderr == (
        "stdout can't be written any more: No space left on device. It goes on. train.log has what it says.\n"
        if "full" in shell
        else ""
    )
    assert result(tmp_path / "here")["status"] == "completed"
    assert "Final Train Accuracy" in (tmp_path / "here/train.log").read_text()
    checkpoint.load(tmp_path / "here/last.pt")


PAGES = ["train.py --help", "evaluate.py --help", "train.py --cfg job", "-m ghostnet.tools.plan --help"]
PAGES += [f"-m ghostnet.tools.{name} --help" for name in ("diff", "doctor", "translate", "pack", "benchmark")]
PAGES += ["-m ghostnet.tools.leaderboard --help", "-m ghostnet.tools.wandb_sync --help"]
PAGES += ["-m ghostnet.tools.translate 'bash ./test/train_full_8p.sh --data_path=/x'"]


@pytest.mark.parametrize("page", [*PAGES[:1], *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES[1:])])
def test_a_page_ends_silently_with_its_reader_and_says_where_it_finds_no_space(tmp_path, page):
    def shell(redirection):
        # A reader that is gone before the first line.
        command = f"{sys.executable} {page} {redirection}"
        return subprocess.run(
            ["bash", "-c", command], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60
        )

    piped = shell("| true")
    assert (piped.stdout, piped.stderr) == ("", "")
    full = shell("> /dev/full")
    assert full.returncode == 1
    assert full.stderr == "error: standard output can't be written: No space left on device.\n"
    closed = shell(">&-")
    assert "Traceback" not in closed.stderr


# Two at once


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_the_lock_of_a_killed_one_is_gone(run, tmp_path, words):
    words, here = [*words, "epochs=300", "hydra.run.dir=here", "resume=auto"], tmp_path / "here"
    first = start(*words, cwd=tmp_path)
    wait_for_step(first, here, 12)
    second = run("train.py", *words)
    assert second.returncode == 1
    assert re.fullmatch(
        rf"error: .*/here: another process is at work here \(process {first.pid} on \S+\)\.\n", second.stderr
    )
    assert first.poll() is None
    first.kill()
    first.communicate()
    third = start(*words, cwd=tmp_path)
    wait_for_step(third, here, rows(here)[-1]["step"] + 4)
    third.send_signal(signal.SIGTERM)
    out, _ = ended(third, 143)
    assert "resume  " in out


PASSED_OVER = """
import os, signal, sys, time, weakref
from ghostnet.interrupts import insist

class Thing: pass

def fall_into(reference):
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000): pass

def terminated(signum, frame):
    raise SystemExit(128 + signum)

insist()
signal.signal(signal.SIGTERM, terminated)
signal.signal(signal.SIGINT, signal.default_int_handler)
thing = Thing()
reference = weakref.ref(thing, fall_into)
del thing
print("goes on", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_falls_into_a_callback_comes_again(name, code):
    program = [sys.executable, "-c", PASSED_OVER.replace("{name}", name)]
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "goes on\n", "")


def test_what_else_callbacks_raise_is_told_as_ever():
    program = "from ghostnet.interrupts import insist\ninsist()\nclass Bad:\n    def __del__(self): 1 / 0\nBad()"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "ZeroDivisionError" in done.stderr
