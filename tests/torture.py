"""Kill train.py at chosen and at random moments, go on, and compare with a run that nobody killed.

A case is a setting (ranks, device, amp …) and a chain of kills of one run. Every wait has a limit; a process that
passes it shows the stacks of all its threads.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ghostnet import checkpoint
from tests.conftest import REPOSITORY, environment
from tests.kills import SETTINGS, Kill, Setting, Tally, draw
from tests.test_amp import STAND_IN
from tests.test_distributed import left_over
from tests.test_train import assert_same_state, result, rows

LIMIT = 240.0
"""Seconds that one command may take, on a busy machine too."""
ENDS = 60.0
"""Seconds within which a command ends that was asked to, or lost a rank."""
HOLD = 20.0
"""Seconds for which a process waits at a moment to be killed there."""
CLOCK = {"fps", "compute", "data_wait", "reduction", "eval_fps", "seconds", "memory", "command", "compile_seconds"}
"""What of result.json the clock decides, or the folder's name."""

tally = Tally(int(os.environ.get("GHOSTNET_TORTURE_SEED", "0")))


class Torture:
    """Runs, kills and compares, in a folder; whole runs are kept for all cases of a setting."""

    def __init__(self, place: Path, data: Path) -> None:
        self.place, self.data, self.numbers = place, data, itertools.count()
        (place / "apex" / "apex").mkdir(parents=True, exist_ok=True)
        (place / "apex" / "apex" / "__init__.py").write_text("")
        (place / "apex" / "apex" / "amp.py").write_text(STAND_IN)

    def whole(self, setting: Setting) -> Path:
        """The run that nobody kills."""
        folder = self.place / f"whole-{SETTINGS.index(setting)}"
        if not (folder / "result.json").exists():
            run = self.start(setting, folder, None)
            assert self.wait(run, LIMIT) == 0, self.said(folder)
            assert self.said(folder) == "", "a run says something on stderr"
        return folder

    def start(self, setting: Setting, folder: Path, aimed: Kill | None) -> "subprocess.Popen[bytes]":
        """The command, in a session of its own; what it says goes to files beside its folder."""
        path = [REPOSITORY / "tests" / "emulated_npu"] if setting.device == "npu" else []
        path += [REPOSITORY / "tests" / "aim"] if aimed and aimed.aim.event else []
        path += [self.place / "apex"] if setting.amp == "apex" else []
        env = environment() | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONFAULTHANDLER": "1"}
        if setting.amp == "apex" or "sync_bn=true" in setting.more:
            env["PYTHONWARNINGS"] = "ignore"  # torch's, of strides that the stand-ins give gradients
        if path and aimed:
            aim = aimed.aim
            told = {"event": aim.event, "name": aim.name, "count": aim.count, "rank": aimed.rank}
            env["TORTURE_AIM"] = json.dumps(told | {"mark": str(self._mark(folder)), "hold": HOLD if aim.hold else 0})
        self._mark(folder).unlink(missing_ok=True)
        words = [*setting.words(self.data), f"hydra.run.dir={folder}", "resume=auto"]
        with folder.with_suffix(".out").open("wb") as out, folder.with_suffix(".err").open("wb") as err:
            command = [sys.executable, str(REPOSITORY / "train.py"), *words]
            return subprocess.Popen(command, cwd=self.place, env=env, stdout=out, stderr=err, start_new_session=True)

    def said(self, folder: Path) -> str:
        """The stderr of the last command in a folder."""
        return folder.with_suffix(".err").read_text(errors="replace")

    @staticmethod
    def _mark(folder: Path) -> Path:
        return folder.with_suffix(".mark")

    def wait(self, process: "subprocess.Popen[bytes]", limit: float) -> int | None:
        """The exit code, of a command that leaves no process behind; None where it hangs: then its stacks are told."""
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None and not left_over(process.pid):
            return code
        with contextlib.suppress(psutil.Error):  # faulthandler tells the stacks of all threads; the launcher's last,
            for rank in psutil.Process(process.pid).children():  # as the kernel ends the ranks with it
                rank.send_signal(signal.SIGABRT)
            time.sleep(1)
        for signum in (signal.SIGABRT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
            time.sleep(1)
        process.wait()
        return None

    def kill(self, setting: Setting, folder: Path, kill: Kill) -> bool:
        """Run and kill once -> whether it was killed; AssertionError where it does not end as it should."""
        process = self.start(setting, folder, kill)
        mark, aim, begun = self._mark(folder), kill.aim, time.monotonic()
        while process.poll() is None and time.monotonic() - begun < LIMIT:
            if aim.event and mark.exists():
                break
            if not aim.event and time.monotonic() - begun >= aim.delay:
                break
            time.sleep(0.001)
        else:
            code = self.wait(process, 0)
            assert code is not None, f"hangs: {kill}\n{self.said(folder)}"
            assert code == 0, f"{kill}: exit code {code} before it came\n{self.said(folder)}"
            return False
        if aim.event:
            time.sleep(aim.delay)
        before = process.poll()
        if before is None:
            self._send(process, kill)
        mark.unlink(missing_ok=True)
        code = self.wait(process, ENDS)
        assert code is not None, f"hangs after {kill}\n{self.said(folder)}"
        self._check(setting, folder, kill, code)
        return before is None and code != 0

    def _send(self, process: "subprocess.Popen[bytes]", kill: Kill) -> None:
        with contextlib.suppress(ProcessLookupError):
            if kill.target == "group":
                os.killpg(process.pid, kill.signum)
            elif kill.target == "command" or not (pid := _rank(process.pid, kill.target)):
                process.send_signal(kill.signum)
            else:
                os.kill(pid, kill.signum)

    def _check(self, setting: Setting, folder: Path, kill: Kill, code: int) -> None:
        """Its exit code and its one message; what it left can be gone on with, and no more than two saves are lost."""
        # But for what gloo logs by itself of a peer that is gone while they connect.
        said = re.sub(r"^\[.*(/gloo/|ProcessGroupGloo).*\n", "", self.said(folder), flags=re.MULTILINE)
        what = f"{kill}: exit code {code}, stderr:\n{said}"
        lost = re.fullmatch(r"error: rank \d was killed by SIGKILL, and all others were ended\..*\n", said)
        asked = {128 + kill.signum, -kill.signum}
        if kill.signum == signal.SIGKILL:
            assert code in (-kill.signum, 0) or (code == 1 and lost), what
        else:
            assert code in (asked | {0}), what
        assert "Traceback" not in said, what
        assert code == -signal.SIGKILL or len(said.splitlines()) <= 2, what
        steps = [row["step"] for row in _whole_rows(folder)]
        # The save before the last may be in the writing; the one before that is done.
        due = ((max(steps, default=0) - 1) // setting.save_every - 1) * setting.save_every
        found = checkpoint.newest(folder)
        at = found.state["step"] if found else 0
        assert not (found and found.damaged), what
        assert at >= due, f"only step {at} of {max(steps)} is saved, {what}"
        if "is saved" in said:
            assert at >= max(steps, default=0), what

    def compare(self, setting: Setting, folder: Path) -> None:
        """The end of a run that was killed is that of the one which was not."""
        whole = self.whole(setting)
        for name in ("last.pt", "best.pt"):
            assert_same_state(whole / name, folder / name)
        assert rows(folder) == rows(whole)
        ends = [{key: value for key, value in result(end).items() if key not in CLOCK} for end in (whole, folder)]
        assert ends[0] == ends[1]
        left = [path.name for path in folder.iterdir() if path.name.endswith((".tmp", ".damaged"))]
        assert not left, left

    def case(self, setting: Setting, rng: random.Random, kills: int, tally: Tally, phases: list[str]) -> None:
        """A chain of kills; where the run has ended before all are done, another one is begun."""
        self.whole(setting)
        done = 0
        while done < kills:
            folder, chain = self.place / f"cut-{next(self.numbers)}", []
            while done < kills and not (folder / "result.json").exists():
                kill = draw(rng, setting, phases)
                if self.kill(setting, folder, kill):
                    chain.append((setting, kill))
                    tally.killed.append((setting, kill))
                    done += 1
                else:
                    tally.missed += 1
            self.finish(setting, folder, [str(kill) for _, kill in chain])
            tally.survived += chain

    def finish(self, setting: Setting, folder: Path, chain: list[str]) -> None:
        """Go on to the end, and compare."""
        code = self.wait(self.start(setting, folder, None), LIMIT)
        told = "\n  ".join([f"{setting}, killed by", *chain])
        assert code == 0, f"{told}\nexit code {code}\n{self.said(folder)}"
        assert self.said(folder) == "", told
        try:
            self.compare(setting, folder)
        except AssertionError as error:
            raise AssertionError(f"{told}\nends in other bits: {error}") from error


def _whole_rows(folder: Path) -> list[dict[str, object]]:
    """The rows so far; none is cut short by a kill."""
    return rows(folder) if (folder / "metrics.jsonl").exists() else []


def _rank(launcher: int, rank: str) -> int | None:
    """The process of a rank; None where it isn't there yet."""
    with contextlib.suppress(psutil.Error):
        children = sorted(psutil.Process(launcher).children(), key=lambda child: child.pid)  # begun in their order
        ranks = [child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        return dict(enumerate(ranks)).get(int(rank))
    return None
