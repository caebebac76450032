"""Checkpoints beside the loop: of the step they were asked for, one at a time, whole wherever the run is killed."""

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from ghostnet import checkpoint, saving
from ghostnet.amp import Amp
from ghostnet.engine import TrainState
from ghostnet.errors import UserError
from tests.conftest import REPOSITORY, TINY, environment
from tests.test_train import HARD, assert_same_state, rows, stop_after


@pytest.fixture
def state():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return TrainState(model, torch.optim.SGD(model.parameters(), 0.1), Amp(), None, torch.device("cpu"))


@pytest.fixture
def slow(monkeypatch):
    """Writes wait for an event; notes how many run at once and what was written in which order."""
    gate, running, most, written, save = threading.Event(), [], [], [], checkpoint.save

    def slowly(content, path, keep=1):
        running.append(path)
        most.append(len(running))
        gate.wait(10)
        size = save(content, path, keep)
        written.append((path.name, content["step"]))
        running.remove(path)
        return size

    monkeypatch.setattr(checkpoint, "save", slowly)
    return gate, most, written


def test_what_is_written_is_the_state_of_the_step_and_not_of_the_write(state, slow, tmp_path):
    gate, _, _ = slow
    state.optimizer.zero_grad()
    state.model(torch.ones(4, 3)).sum().backward()
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with saving.Saver(tmp_path, 1, dict) as saver:
        state.step = 3
        saver.save(state, "last.pt")
        with torch.no_grad():
            for tensor in [*state.model.parameters(), *state.model.buffers()]:
                tensor.add_(1)
        state.step = 4
        assert not (tmp_path / "last.pt").exists(), "the loop waited for the write"
        gate.set()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["step"] == 3
    assert all(torch.equal(saved["model"][name], value) for name, value in before.items())


def test_one_file_is_written_at_a_time_in_the_order_asked_for_and_all_before_the_end(state, slow, tmp_path):
    gate, most, written = slow
    threading.Timer(0.2, gate.set).start()
    with saving.Saver(tmp_path, 2, dict) as saver:
        for step in range(1, 6):
            state.step = step
            saver.save(state, *(["best.pt"] if step % 2 else []), "last.pt")
    assert max(most) == 1
    assert written == [
        (name, step) for step in range(1, 6) for name in ("best.pt", "last.pt") if name > "c" or step % 2
    ]


def test_a_state_that_is_saved_already_is_not_saved_again(state, slow, tmp_path):
    gate, _, written = slow
    gate.set()
    state.step, state.evaluated = 5, 5
    with saving.Saver(tmp_path, 2, dict, (5, 5)) as saver:
        saver.save(state, "last.pt")
        state.step = 6
        saver.save(state, "last.pt")
        saver.save(state, "last.pt")
        saver.flush(state)
        assert written == [("last.pt", 6)]


def test_a_write_that_failed_is_told_at_the_next_step_and_at_the_end(state, tmp_path):
    def one_save_then(act):
        state.step += 1
        with saving.Saver(tmp_path / "missing", 2, dict) as saver:
            saver.save(state, "last.pt")
            act(saver)

    def steps(saver):
        until = time.monotonic() + 10
        while time.monotonic() < until:
            saver.check()
            time.sleep(0.01)
        raise AssertionError

    def stopped_at_once(saver):
        raise KeyboardInterrupt

    for act in (steps, lambda saver: None):
        with pytest.raises(UserError, match=r"last\.pt can't be written: No such file"):
            one_save_then(act)
    # What ends the run by itself is told, not that.
    with pytest.raises(KeyboardInterrupt):
        one_save_then(stopped_at_once)


def torn(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(".tmp")]


def kill_while_saving(words, cwd, folder, saves):
    """Run train.py until it has a checkpoint half written, after so many saves; kill it -> whether it was so."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    seen = set()
    until = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < until:
        if not folder.exists():
            time.sleep(0.01)
            continue
        if torn(folder) and (folder / "last.pt").exists():
            seen.add((folder / "last.pt").stat().st_mtime_ns)
            if len(seen) > saves:
                break
    process.send_signal(signal.SIGKILL)
    process.wait()
    return bool(torn(folder))


@pytest.mark.slow
def test_a_run_killed_while_it_saves_ends_in_the_same_bits(run, tmp_path, tiny_data):
    words = [*TINY, *HARD, f"data.root={tiny_data}", "log_every=1", "save_every=1"]
    assert run("train.py", *words, "hydra.run.dir=whole").returncode == 0
    cut = tmp_path / "cut"
    words = [*words, "hydra.run.dir=cut", "resume=auto"]
    for saves in (2, 4, 3):  # about when: test_checkpoint.py kills a writer at every moment of a save
        kill_while_saving(words, tmp_path, cut, saves)
    done = run("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "resume  " in done.stdout
    for name in ("last.pt", "best.pt", "previous-1.pt"):
        assert_same_state(tmp_path / "whole" / name, cut / name)
    assert rows(tmp_path / "whole") == rows(cut)
    assert torn(cut) == []
    assert "saved last.pt, step 20: " in (cut / "train.log").read_text()


@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_passed_over_and_the_run_ends_in_the_same_bits(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "save_every=3", "hydra.run.dir=here"]
    assert run("train.py", *words).returncode == 0
    here, whole = tmp_path / "here", (tmp_path / "here" / "last.pt").read_bytes()
    (tmp_path / "whole.pt").write_bytes(whole)
    written = rows(here)
    (here / "best.pt").unlink()  # of the same step: the next newest would be it
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    for content in (flipped, b""):
        (here / "last.pt").write_bytes(content)
        for program, word in (("train.py", "resume=here"), ("evaluate.py", "ckpt=here/last.pt")):
            refused = run(program, *(words if program == "train.py" else []), word)
            assert refused.returncode == 1
            assert refused.stderr.count("\n") == 1
            assert "last.pt is damaged" in refused.stderr or "last.pt is empty" in refused.stderr
            assert "previous-1.pt" in refused.stderr or "resume=auto" in refused.stderr or not content
        done = run("train.py", *words, "resume=auto")
        assert done.returncode == 0, done.stderr
        assert "note    skipped" in done.stdout
        assert "It is now last.pt.damaged; the run goes on from previous-1.pt" in done.stdout
        assert "previous-1.pt, step 18 of 20" in done.stdout
        assert (here / "last.pt.damaged").read_bytes() == content
        assert_same_state(tmp_path / "whole.pt", here / "last.pt")
        assert rows(here) == written
        (here / "best.pt").unlink(missing_ok=True)
    (here / "last.pt").write_bytes(flipped)
    (here / "previous-1.pt").write_bytes(b"")
    refused = run("train.py", *words, "resume=auto")
    assert refused.returncode == 1
    assert "holds no whole checkpoint" in refused.stderr
    assert (here / "last.pt").read_bytes() == flipped


@pytest.mark.slow
def test_another_seed_is_refused_unless_forced_and_another_model_always(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "hydra.run.dir=here"]
    assert run("train.py", *words, "epochs=1").returncode == 0
    words = [*words, "resume=auto"]
    refused = run("train.py", *words, "seed=7", "data.batch_size=16")
    assert refused.returncode == 1
    for part in ("seed was 42, is 7", "data.batch_size × device.count × accumulate was 32, is 16", "force=true"):
        assert part in refused.stderr
    apart = [*words[:-2], "hydra.run.dir=parts", "resume=here"]
    parts = run("train.py", *apart, "data.batch_size=8", "accumulate=4", "epochs=2")
    assert parts.returncode == 0, parts.stderr
    assert "note    accumulate was 1, is 4" in parts.stdout
    done = run("train.py", *words, "seed=7", "data.batch_size=16", "force=true")
    assert done.returncode == 0, done.stderr
    assert "note    seed was 42, is 7" in done.stdout
    assert "note    data.batch_size was 32, is 16" in done.stdout
    other = run("train.py", *words, "data.batch_size=16", "seed=7", "model.width=0.2", "force=true")
    assert other.returncode == 1
    assert "model.width was 0.1, is 0.2" in other.stderr
    assert "force=true does not help" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_samples(run, tmp_path, tiny_data, order):
    """BatchNorm stands still, so that nothing but a step's samples decides its loss."""
    words = [*TINY, f"data.root={tiny_data}", "log_every=1", "model.freeze=true", "model.dropout=0"]
    ranks = {1: ["device=cpu", "data.batch_size=32"], 2: ["device=cpu_2p", "data.batch_size=16"]}
    assert run("train.py", *words, *ranks[1], "hydra.run.dir=whole").returncode == 0
    cut = [*words, f"hydra.run.dir={tmp_path}/cut"]
    stopped = stop_after(3, signal.SIGTERM, [*cut, *ranks[order[0]]], tmp_path)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    at = checkpoint.load(tmp_path / "cut" / "last.pt")["step"]
    assert 3 <= at < 20
    assert at % 10, "not in mid-epoch: the test proves less"
    done = run("train.py", *cut, *ranks[order[1]], "resume=auto")
    assert done.returncode == 0, done.stderr
    losses = [[row["train/loss"] for row in rows(tmp_path / name) if "train/loss" in row] for name in ("whole", "cut")]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    saved = [checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "cut")]
    torch.testing.assert_close(saved[1], saved[0], rtol=1e-4, atol=1e-5)
