"""Runs that are killed anywhere, again and again, end in the bits of a run that nobody killed."""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from ghostnet import checkpoint
from tests import torture
from tests.kills import PHASES, SETTINGS, Aim, Kill, Tally, draw

KILLS = int(os.environ.get("GHOSTNET_TORTURE_KILLS", "300"))
CHAIN = 6
"""Kills of one case."""
CASES = -(-KILLS // CHAIN)


@pytest.fixture(scope="session")
def tortured(tmp_path_factory, tiny_data):
    return torture.Torture(tmp_path_factory.mktemp("torture"), tiny_data)


@pytest.mark.torture
@pytest.mark.parametrize("case", range(CASES))
def test_a_run_killed_again_and_again_ends_in_the_same_bits(tortured, case, request):
    seed = torture.tally.seed
    rng, setting = random.Random(f"{seed} {case}"), SETTINGS[case % len(SETTINGS)]
    name = f"tests/test_torture.py::{request.node.name}"
    print(f"again: GHOSTNET_TORTURE_SEED={seed} GHOSTNET_TORTURE_KILLS={KILLS} python -m pytest -m torture '{name}'")
    kills = min(CHAIN, KILLS - CHAIN * case)
    tortured.case(setting, rng, kills, torture.tally, list(PHASES))


def test_a_run_killed_while_it_saves_accumulates_and_evaluates_ends_in_the_same_bits(tortured):
    setting, folder = SETTINGS[0], tortured.place / "chosen"
    for aim, signum, target in (
        (Aim("save", "os.rename", "last.pt", 2), signal.SIGKILL, "group"),
        (Aim("accumulation", "call", "seeding.py:seed_step", 3), signal.SIGTERM, "command"),
        (Aim("evaluation", "call", "metrics.py:hits", 3), signal.SIGINT, "group"),
    ):
        assert tortured.kill(setting, folder, Kill(aim, signum, target, "0"))
        step = checkpoint.load(folder / "last.pt")["step"]
        # Of a save that was cut the one before is there; who is asked to end saves all steps that were whole.
        assert step == {"save": 2, "accumulation": 3, "evaluation": 10}[aim.phase]
    tortured.finish(setting, folder, [])
    assert_differences_are_found(tortured, setting, folder)


def assert_differences_are_found(tortured, setting, folder):
    """One row twice, one row less, one bit of the weights, of the optimizer and of the moving average."""
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for lines in (rows[:5] + rows[4:], rows[:5] + rows[6:]):
        (folder / "metrics.jsonl").write_text("".join(lines))
        with pytest.raises(AssertionError):
            tortured.compare(setting, folder)
    (folder / "metrics.jsonl").write_text("".join(rows))
    shutil.copy2(folder / "last.pt", folder / "kept")
    for part in ("model", "ema", "optimizer"):
        state = checkpoint.load(folder / "kept")
        tensors = state["optimizer"]["state"][0] if part == "optimizer" else state[part]
        tensor = next(value for value in tensors.values() if value.is_floating_point() and value.dim())
        first = (0,) * tensor.dim()
        tensor[first] = torch.nextafter(tensor[first], torch.tensor(torch.inf))
        checkpoint.save(state, folder / "last.pt")
        with pytest.raises(AssertionError, match=part):
            tortured.compare(setting, folder)
    shutil.move(folder / "kept", folder / "last.pt")
    tortured.compare(setting, folder)


def test_ctrl_c_among_the_imports_ends_without_a_word(tortured):
    kill = Kill(Aim("start-up", "import", "hydra"), signal.SIGINT, "group", "0")
    assert tortured.kill(SETTINGS[0], tortured.place / "early", kill)
    assert tortured.said(tortured.place / "early") == ""


def test_a_command_that_hangs_shows_where(tortured):
    script = "import os, time\nopen(os.environ['READY'], 'w')\ntime.sleep(100)"
    ready, err = tortured.place / "ready", tortured.place / "hangs.err"
    with err.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONFAULTHANDLER": "1", "READY": str(ready)},
            stderr=file,
            start_new_session=True,
        )
    while not ready.exists():
        assert process.poll() is None
    assert tortured.wait(process, 0.1) is None
    assert 'File "<string>", line 3' in tortured.said(tortured.place / "hangs")
    assert process.poll() is not None


def test_torture_is_for_those_who_ask_for_it(request):
    asked = "torture" in request.config.option.markexpr
    assert asked or not [item.name for item in request.session.items if item.get_closest_marker("torture")]


def test_a_seed_draws_the_same_kills_again_and_all_phases_of_every_setting():
    for setting in SETTINGS:
        one, two = ([str(draw(rng, setting, list(PHASES))) for _ in range(400)] for rng in map(random.Random, (1, 1)))
        assert one == two
        drawn = {draw(random.Random(number), setting, list(PHASES)).aim.phase for number in range(400)}
        assert drawn >= PHASES.keys() - ({"accumulation"} if setting.accumulate == 1 else set())
    there = {(setting.device, setting.ranks, setting.amp) for setting in SETTINGS}
    for amp in ("none", "bf16", "fp16", "o2"):
        assert {("cpu", 1, amp), ("cpu", 2, amp), ("npu", 1, amp)} <= there
    assert {("cpu", 1, "apex"), ("npu", 2, "o2")} <= there


def test_the_tally_tells_what_was_killed_and_what_survived():
    tally, kill = Tally(7), Kill(Aim("save", "open", "x"), signal.SIGKILL, "1", "0")
    tally.killed += [(SETTINGS[5], kill), (SETTINGS[0], kill)]
    tally.survived.append((SETTINGS[5], kill))
    assert tally.lines() == [
        "2 kills, 1 survived; 0 came too late; seed 7",
        "  signal: SIGKILL 1/2",
        "  phase: save 1/2",
        "  ranks: 1 cpu 0/1, 2 cpu 1/1",
        "  amp: none 1/2",
        "  to: one rank 1/2",
    ]
