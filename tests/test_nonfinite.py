"""NaN and infinite losses and gradients: on the device, in the loop, and by whole commands that really meet them."""

import json
import math
import os
import re
import signal

import pytest
import torch

from ghostnet import checkpoint, engine, optim
from ghostnet.amp import O2, Amp, Fp16
from ghostnet.nonfinite import Watch
from ghostnet.rescue import MOST_REWINDS, MOST_SKIPS
from tests.conftest import REPOSITORY, TINY
from tests.test_engine import (
    NEVER,
    OPTIMIZERS,
    CountReads,
    _shallow,
    assert_same_bits,
    begin,
    feeder,
    ghostnet,
    loaders,
    recipe,
)
from tests.test_train import HARD, assert_same_state, result, rows

__all__ = ["_shallow", "feeder"]
CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
FAULTY = os.pathsep.join([str(REPOSITORY / "tests" / "bad_numbers"), str(REPOSITORY)])
AMPS = {
    "none": Amp,
    "fp16 static": lambda: Fp16(128.0),
    "fp16 dynamic": lambda: Fp16("dynamic"),
    "o2 static": lambda: O2(128.0),
    "o2 dynamic": lambda: O2("dynamic"),
}


# On the device


@pytest.mark.parametrize(
    ("values", "dynamic", "step"),
    [
        ([(1, 1), (2, 1), (NAN, NAN), (1, 1), (INF, INF)], False, 3),
        ([(1, 1), (-INF, 1), (1, NAN)], False, 2),
        ([(1, 1), (1, INF), (NAN, NAN)], False, 2),
        ([(1, 1), (1, INF), (NAN, NAN)], True, 3),
        ([(1, 1), (1, INF), (1, NAN)], True, 0),
        ([(1, 1), (3e38, 1)], False, 0),
    ],
)
def test_the_first_bad_step_is_kept_with_what_was_bad(values, dynamic, step):
    watch = Watch(CPU, skips=False)
    for number, (loss, norm) in enumerate(values, 1):
        watch.look(number, torch.tensor(float(loss)), torch.tensor(float(norm)), dynamic)
    found = watch.read()
    assert (found.step, found.skipped, found.in_a_row) == (step, 0, 0)
    if step:
        assert_same_bits(torch.tensor([found.loss, found.gradients]), torch.tensor(values[step - 1], dtype=torch.float))


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    watch, seen = Watch(CPU, skips=True), []
    for number, loss in enumerate((NAN, 1.0, NAN, INF, NAN), 1):
        watch.look(number, torch.tensor(loss), torch.tensor(1.0), dynamic=False)
        found = watch.read()
        seen.append((found.step, found.in_a_row, found.skipped))
    assert seen == [(1, 1, 1), (0, 0, 1), (3, 1, 2), (3, 2, 3), (3, 3, 4)]
    other = Watch(CPU, skips=True)
    other.load_state_dict(watch.state_dict())
    other.look(6, torch.tensor(NAN), torch.tensor(1.0), dynamic=False)
    assert (other.read().step, other.read().in_a_row, other.read().skipped) == (3, 4, 5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_is_skipped_leaves_weights_and_moments_as_if_it_had_not_been(name):
    def trained(bad_steps):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(4, 3, 2, 2)), torch.nn.Parameter(torch.randn(5))]
        optimizer = OPTIMIZERS[name]([(str(number), weight) for number, weight in enumerate(weights)])
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            gradients = [torch.randn(weight.shape, generator=generator) for weight in weights]
            if step in (0, 3):
                if not bad_steps:
                    continue
                gradients[0][0] = NAN
                gradients[1][0] = INF
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optim.step_unless(torch.tensor(step in (0, 3)), optimizer)
        moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        return [weight.detach() for weight in weights], moments

    assert_same_bits(trained(bad_steps=True), trained(bad_steps=False))


# In the loop


def train_with_bad_steps(state, loader, settings, bad, monkeypatch):
    """Train; in the bad steps (from 0) a pixel is infinite, and BatchNorm sees it."""
    mix = type(settings.mix).__call__

    def bad_mix(self, images, labels, seed, number):
        images, mixed = mix(self, images, labels, seed, number)
        if number // settings.accumulate in bad and number % settings.accumulate == settings.accumulate - 1:
            images[0, 0, 0, 0] = INF
        return images, mixed

    with monkeypatch.context() as patch:
        patch.setattr(type(settings.mix), "__call__", bad_mix)
        yield from engine.train(state, loader, settings, NEVER)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", AMPS)
def test_a_skipped_step_leaves_nothing_behind(feeder, name, optimizer, monkeypatch):
    """Weights, moments, average and BatchNorm's statistics are to the bit what they were; only the clock goes on."""
    state = begin(ghostnet(), AMPS[name](), optimizer)
    state.on_nan = "skip"
    state.__post_init__()
    settings = recipe(accumulate=2)
    contents = [state.state_dict()]
    for _ in train_with_bad_steps(state, loaders(feeder, 4)[0], settings, {0, 3}, monkeypatch):
        contents.append(checkpoint.copied(state.state_dict()))
    contents[0] = checkpoint.copied(begin(ghostnet(), AMPS[name](), optimizer).state_dict())
    for bad in (0, 3):
        before, after = contents[bad], contents[bad + 1]
        for part in ("model", "ema"):
            assert_same_bits(after[part], before[part])
        for number, moments in after["optimizer"]["state"].items():
            for key, value in moments.items():
                if key != "step" or optimizer == "adamw":
                    first = before["optimizer"]["state"].get(number, {}).get(key)
                    assert_same_bits(value, torch.zeros_like(value) if first is None else first)
        assert after["step"] == before["step"] + 1
    assert not torch.equal(contents[3]["model"]["bn1.running_mean"], contents[2]["model"]["bn1.running_mean"])
    assert all(value.isfinite().all() for value in contents[-1]["model"].values())
    found = state.watch.read()
    assert (found.skipped, found.in_a_row) == (2, 0)
    assert math.isfinite(state.meter.read())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["none", "o2 static", "fp16 dynamic"])
def test_where_nothing_is_bad_skipping_changes_no_bit(feeder, name, optimizer):
    states = []
    for on_nan in ("stop", "skip"):
        state = begin(ghostnet(), AMPS[name](), optimizer)
        state.on_nan = on_nan
        state.__post_init__()
        list(engine.train(state, loaders(feeder)[0], recipe(), NEVER))
        states.append(state.state_dict())
    assert_same_bits(*states)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["none", "o2 static"])
def test_a_step_that_may_be_skipped_does_not_wait_for_the_device(feeder, name, optimizer):
    state = begin(ghostnet(), AMPS[name](), optimizer)
    state.on_nan = "skip"
    state.__post_init__()
    with CountReads() as count:
        list(engine.train(state, loaders(feeder)[0], recipe(accumulate=2), NEVER))
        assert count.reads == 0
        state.watch.read()
    assert count.reads == 1


def test_a_rewind_puts_what_is_left_of_its_epoch_into_another_order_and_nothing_else(feeder):
    loader = loaders(feeder, 8, images=44)[0]
    plain, once, twice = (loader.indices(1, rewinds) for rewinds in ((), (2,), (2, 2)))
    assert (once[:2] == plain[:2]).all()
    assert (once[2:] != plain[2:]).any()
    assert (twice[2:] != once[2:]).any()
    whole = loaders(feeder, 8, images=40)[0]
    assert sorted(whole.indices(1, (2,)).flatten()) == list(range(40))
    pictures = [next(iter(whole.batches(0, 0, (), times)))[0].clone() for times in (0, 1)]
    assert not torch.equal(*pictures)


# By whole commands


WORDS = [*TINY, *HARD, "log_every=1", "save_every=3"]


def refused(done):
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("26 pixel", r"the loss is not finite \(nan; the gradients' norm is nan\)"),
        pytest.param(
            "26 gradients",
            r"the gradients are not finite \(their norm is (nan|inf), the loss \d\.\d+\)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_stops_with_its_step_and_keeps_a_whole_checkpoint(run, tmp_path, tiny_data, bad, what):
    """Two passes a step: pass 26 is of step 14; the last save before it is that of step 13."""
    words = [*WORDS, f"data.root={tiny_data}", "save_every=13", "log_every=5"]
    told = refused(run("train.py", *words, "hydra.run.dir=here", BAD=bad, PYTHONPATH=FAULTY))
    assert re.search(rf"^error: {what}, first at epoch 2, step 14, learning rate \d", told), told
    assert "amp=none computes in float32: precision is not the cause" in told
    assert all(part in told for part in ("here/last.pt", "optim.lr", "on_nan=skip", "on_nan=rewind"))
    saved = checkpoint.load(tmp_path / "here" / "last.pt")
    assert saved["step"] == 13
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_bit_exactly_once_the_cause_is_gone(run, tmp_path, tiny_data):
    words = [*WORDS, f"data.root={tiny_data}", "log_every=5"]
    refused(run("train.py", *words, "hydra.run.dir=here", BAD="26 pixel", PYTHONPATH=FAULTY))
    again = run("train.py", *words, "hydra.run.dir=here", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert run("train.py", *words, "hydra.run.dir=whole").returncode == 0
    assert_same_state(tmp_path / "whole" / "last.pt", tmp_path / "here" / "last.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["fp16", "o2"])
def test_the_message_says_what_precision_has_to_do_with_it(run, tiny_data, amp):
    words = [*TINY, f"data.root={tiny_data}", f"amp={amp}", "epochs=1"]
    for scale in ("128", "dynamic"):
        told = refused(run("train.py", *words, f"amp.loss_scale={scale}", BAD="5 pixel", PYTHONPATH=FAULTY))
        assert f"amp={amp} " in told
        assert ("bfloat16 here" if amp == "o2" else "65,504") in told


def assert_cut_ends_the_same(run, tmp_path, words, faulty, cut_in):
    """A run that is stopped in a pass and resumed ends in the bits of the one in the folder whole."""
    stopped = run("train.py", *words, "hydra.run.dir=cut", TERM_IN=str(cut_in), **faulty)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert checkpoint.load(tmp_path / "cut" / "last.pt")["step"] == cut_in // 2 + 1
    again = run("train.py", *words, "hydra.run.dir=cut", "resume=auto", **faulty)
    assert again.returncode == 0, again.stderr
    assert_same_state(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


@pytest.mark.parametrize("amp", ["none", pytest.param("fp16", marks=pytest.mark.slow)])
def test_bad_steps_are_skipped_and_counted(run, tmp_path, tiny_data, amp):
    words = [*WORDS, f"data.root={tiny_data}", "on_nan=skip", f"amp={amp}"]
    words += ["amp.loss_scale=dynamic"] if amp == "fp16" else []
    done = run("train.py", *words, "hydra.run.dir=here", BAD="26-29 pixel", PYTHONPATH=FAULTY)
    assert (done.returncode, done.stderr) == (0, "")
    assert "skipped 1 step that was not finite, 2 in all; 2 in a row up to now: the loss is not finite" in done.stdout
    trained = {row["step"]: row for row in rows(tmp_path / "here") if "train/loss" in row}
    assert [trained[step]["train/skipped"] for step in (13, 14, 15, 20)] == [0, 1, 2, 2]
    assert [step for step, row in trained.items() if row["train/loss"] is None] == [14, 15]
    assert result(tmp_path / "here")["skipped_steps"] == 2
    saved = checkpoint.load(tmp_path / "here" / "last.pt")
    assert all(value.isfinite().all() for part in ("model", "ema") for value in saved[part].values())


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["26-29 pixel rank=1", "26-29 gradients rank=0"])
def test_two_ranks_skip_together_and_a_stop_in_between_changes_no_bit(run, tmp_path, tiny_data, bad):
    words = [*WORDS, f"data.root={tiny_data}", "on_nan=skip", "device=cpu_2p", "data.batch_size=8", "log_every=2"]
    faulty = {"BAD": bad, "PYTHONPATH": FAULTY}
    assert run("train.py", *words, "hydra.run.dir=whole", **faulty).returncode == 0
    assert result(tmp_path / "whole")["skipped_steps"] == 2
    saved = checkpoint.load(tmp_path / "whole" / "last.pt")
    assert all(value.isfinite().all() for part in ("model", "ema") for value in saved[part].values())
    # SIGTERM goes to all of a terminal's processes: each rank asks itself.
    stopped = run("train.py", *words, "hydra.run.dir=cut", TERM_IN="27", **faulty)
    assert "Traceback" not in stopped.stderr
    again = run("train.py", *words, "hydra.run.dir=cut", "resume=auto", **faulty)
    assert again.returncode == 0, again.stderr
    assert_same_state(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


@pytest.mark.slow
def test_a_run_stopped_between_two_skipped_steps_resumes_bit_exactly(run, tmp_path, tiny_data):
    words, faulty = [*WORDS, f"data.root={tiny_data}", "on_nan=skip"], {"BAD": "26-31 pixel", "PYTHONPATH": FAULTY}
    assert run("train.py", *words, "hydra.run.dir=whole", **faulty).returncode == 0
    assert_cut_ends_the_same(run, tmp_path, words, faulty, cut_in=29)


@pytest.mark.slow
def test_a_run_that_can_only_skip_stops(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "on_nan=skip", "log_every=4", "save_every=1", "epochs=3"]
    told = refused(run("train.py", *words, "hydra.run.dir=here", BAD="2- pixel", PYTHONPATH=FAULTY))
    assert re.search(rf"{MOST_SKIPS} steps in a row were skipped, and no more than {MOST_SKIPS} may be: the loss", told)
    assert "first at epoch 1, step 3, " in told
    assert "on_nan=rewind" in told
    saved = checkpoint.load(tmp_path / "here" / "last.pt")
    assert saved["step"] == 3 - 1 + MOST_SKIPS - 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_run_is_taken_back_and_goes_on_with_other_samples(run, tmp_path, tiny_data):
    words = [*WORDS, f"data.root={tiny_data}", "on_nan=rewind", "log_every=2"]
    faulty = {"BAD": "32 pixel", "PYTHONPATH": FAULTY}
    whole = run("train.py", *words, "hydra.run.dir=whole", **faulty)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert (
        "rewind  the loss is not finite (nan; the gradients' norm is nan), first at epoch 2, step 17," in whole.stdout
    )
    assert "The run goes on from step 15" in whole.stdout
    found = rows(tmp_path / "whole")
    assert [row["step"] for row in found if "train/loss" in row] == list(range(2, 21, 2))
    assert [row["train/rewinds"] for row in found if "train/loss" in row] == [0] * 7 + [1] * 3
    assert result(tmp_path / "whole")["rewinds"] == 1


@pytest.mark.slow
def test_a_run_stopped_before_it_is_taken_back_resumes_bit_exactly(run, tmp_path, tiny_data):
    """The save of SIGTERM, one step before the bad one, is not what a resumed run is taken back to."""
    words, faulty = [*WORDS, f"data.root={tiny_data}", "on_nan=rewind"], {"BAD": "32 pixel", "PYTHONPATH": FAULTY}
    assert run("train.py", *words, "hydra.run.dir=whole", **faulty).returncode == 0
    assert_cut_ends_the_same(run, tmp_path, words, faulty, cut_in=31)


@pytest.mark.slow
def test_two_ranks_are_taken_back_together_before_the_first_save(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "on_nan=rewind", "device=cpu_2p", "data.batch_size=16", "epochs=1"]
    done = run("train.py", *words, "hydra.run.dir=here", BAD="4 pixel rank=1", PYTHONPATH=FAULTY)
    assert (done.returncode, done.stderr) == (0, "")
    assert "first at epoch 1, step 5, " in done.stdout
    assert "The run goes on from step 0" in done.stdout
    assert checkpoint.load(tmp_path / "here" / "last.pt")["rewinds"] == [0]


@pytest.mark.slow
def test_a_run_is_not_taken_back_for_ever(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "on_nan=rewind", "save_every=3", "hydra.run.dir=here"]
    told = refused(run("train.py", *words, BAD="7- pixel always", PYTHONPATH=FAULTY))
    assert "first at epoch 1, step 8, learning rate" in told
    assert f"after {MOST_REWINDS} rewinds to step 6" in told
    assert "on_nan=skip" in told
    saved = checkpoint.load(tmp_path / "here" / "last.pt")
    assert saved["step"] == 6
    assert run("train.py", *words, "resume=auto").returncode == 0


@pytest.mark.parametrize("amp", ["fp16", pytest.param("o2", marks=pytest.mark.slow)])
def test_a_loss_scale_that_collapses_ends_the_run(run, tmp_path, tiny_data, amp):
    words = [*TINY, f"data.root={tiny_data}", f"amp={amp}", "amp.loss_scale=dynamic", "epochs=3", "hydra.run.dir=here"]
    told = refused(run("train.py", *words, BAD="10- gradients", PYTHONPATH=FAULTY))
    assert re.search(rf"amp={amp}: the loss scale has collapsed to 0\.\d+ at epoch 3, step 2\d, learning rate", told), (
        told
    )
    assert all(part in told for part in ("amp=bf16", "amp=none", "optim.lr", "here/last.pt"))
    saved = checkpoint.load(tmp_path / "here" / "last.pt")
    assert saved["step"] == 20
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_apex_decides_by_itself_what_it_skips(run, tiny_data):
    told = refused(run("train.py", *TINY, f"data.root={tiny_data}", "amp=apex", "on_nan=skip"))
    assert "on_nan=skip: apex" in told
    assert "amp=o2" in told
    assert "stop, skip, rewind" in refused(run("train.py", *TINY, f"data.root={tiny_data}", "on_nan=nothing"))


# The clock


def test_a_clock_that_jumps_by_hours_changes_nothing(run, tmp_path, tiny_data):
    words = [*TINY, f"data.root={tiny_data}", "save_every=3", "hydra.run.dir=here"]
    done = run("train.py", *words, CLOCK_JUMPS="1", PYTHONPATH=FAULTY)
    assert (done.returncode, done.stderr) == (0, "")
    found = result(tmp_path / "here")
    assert 0 < found["seconds"] < 600
    assert found["fps"] > 1
    assert found["eval_fps"] > 1
    written = [json.loads(line) for line in (tmp_path / "here" / "metrics.jsonl").read_text().splitlines()]
    stamps = [row["time"] for row in written]
    assert max(stamps) - min(stamps) > 3600, "the clock did not jump: the test proves nothing"
    trained = [row for row in written if "train/fps" in row]
    assert all(row["train/fps"] > 1 and 0 <= row["train/data_wait"] <= 1 for row in trained)
    etas = re.findall(r"eta (\d+):(\d\d):(\d\d)", done.stdout)
    assert len(etas) == len(trained)
    assert all(hours == "0" and int(minutes) < 10 for hours, minutes, _ in etas)
