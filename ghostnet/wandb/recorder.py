"""The process beside a run that sends its rows to Weights & Biases: python -m ghostnet.wandb.recorder.

The first line of its standard input is a request as JSON; it then follows the run folder's metrics.jsonl until another
line brings the result, or until the end of the input tells that the run is gone. What it has to say is JSON lines. As a
process of its own it can hang, fail or be killed without harm to the training.
"""

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

INTERVAL = 1.0
"""Seconds between two looks at metrics.jsonl."""
CONFIRMATIONS = 10
"""How often the server is asked, an interval apart, whether it has all rows."""
STATE = "wandb_synced"
"""The file in the run folder that tells what Weights & Biases has of the run."""


@dataclass(frozen=True)
class Request:
    """What is to be recorded."""

    folder: str
    """The run folder."""
    id: str
    """Of the run at Weights & Biases."""
    online: bool
    options: dict[str, Any]
    """Further arguments of wandb.init."""
    artifact: bool
    """Upload best.pt at the end."""
    timeout: float
    """Seconds that the end may take."""
    live: bool
    """The run goes on meanwhile, and may fall back to a record on disk; else all of it is on disk."""
    pid: int
    """The process whose CPU time and memory are measured beside it."""


class OfflineError(Exception):
    """The server can't be reached, or there is no login: true of any run."""


class UnconfirmedError(Exception):
    """The server may not have all rows."""


class Lines:
    """The lines that a file gets, as they come; one that isn't ended yet is left for later."""

    def __init__(self, path: Path, behind: int = 0) -> None:
        self.path, self.position, self.count, self.file = path, behind, 0, 0
        """count: how many rows the file has; file: which one it is."""

    def new(self) -> Iterator[str]:
        """Those since the last call."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            if self.file and self.file != os.fstat(file.fileno()).st_ino:  # a run was taken back: a shorter file
                self.position = self.count = 0
            self.file = os.fstat(file.fileno()).st_ino
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.position += len(line)
                yield line.decode(errors="replace").rstrip("\n")

    def of_json(self) -> Iterator[dict[str, Any]]:
        """The rows among them; a line cut short by a kill is none."""
        for line in self.new():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                self.count += 1
                yield row


def history_step(row: dict[str, Any]) -> int:
    """Where a row stands in the history of Weights & Biases: a step's train row before its eval row.

    A function of the row alone, so that a row that is sent again, by a resumed run or by wandb_sync, is not doubled.
    """
    return 2 * int(row["step"]) + ("eval/top1" in row)


def state(folder: Path) -> dict[str, Any]:
    """What is known to be recorded of a run; empty where nothing is.

    rows: how many of metrics.jsonl; result: whether the result too; online: at the server, else on disk only; path:
    entity/project/id at the server, None where it never was there; where: wandb's own folder of the last record.
    """
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_state(folder: Path, run: Any, online: bool, rows: int, result: bool) -> None:  # noqa: ANN401 (wandb's run)
    """Write what state() reads, whole or not at all."""
    known = {"rows": rows, "result": result, "online": online, "where": str(run.settings.sync_dir)}
    known["path"] = run.path if online else state(folder).get("path")
    temporary = folder / f".{STATE}.tmp"
    temporary.write_text(json.dumps(known) + "\n", encoding="utf-8")
    temporary.replace(folder / STATE)


class Channel:
    """The way back to the process that asked."""

    def __init__(self) -> None:
        # wandb and the libraries below it print as they like: this descriptor is not theirs.
        self.file: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)

    def tell(self, event: str, **facts: object) -> None:
        """One message; nobody there to hear it is no error."""
        with contextlib.suppress(OSError):
            self.file.write((json.dumps({"event": event, **facts}) + "\n").encode())


def main() -> None:
    """Record one run -> exit code 0, or 1 where it failed, which the last message explains."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they are for the training, which says when to end
        signal.signal(each, signal.SIG_IGN)
    request = Request(**json.loads(sys.stdin.buffer.readline()))
    channel = Channel()
    try:
        record(request, channel)
    except BaseException as error:
        channel.tell("failed", why=explain(error), offline=isinstance(error, OfflineError))
        os._exit(1)  # wandb's exit hooks would wait for a service that may be gone
    os._exit(0)


def explain(error: BaseException) -> str:
    """An error of wandb's in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install {error.name}"
    if isinstance(error, ConnectionError) or type(error).__name__ in ("HandleAbandonedError", "MailboxClosedError"):
        return "its service process is gone"
    if isinstance(error, TimeoutError):
        return "it did not take everything in time"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def record(request: Request, channel: Channel) -> None:
    """Open the run, send it what metrics.jsonl has and gets, close it."""
    import wandb

    folder = Path(request.folder)
    log_file = folder / "train.log"
    printed = Lines(log_file, log_file.stat().st_size if request.live and log_file.exists() else 0)
    run, online = opened(wandb, request, channel)
    there = run.starting_step if online else 0
    if there and not request.live:
        printed = Lines(Path(os.devnull))
    write_state(folder, run, online, 0, result=False)
    channel.tell("started", url=run.url if online else None)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    rows, sent, last = Lines(folder / "metrics.jsonl"), 0, None
    while last is None:
        last = told(INTERVAL)
        for row in rows.of_json():
            if history_step(row) >= there:
                # Of a run that was taken back, the history keeps the rows of the first time.
                sent, there = sent + 1, history_step(row) + 1
                run.log(row | {"_timestamp": row["time"]}, step=history_step(row), commit=True)
            if not request.live and rows.count % 100 == 0:
                channel.tell("rows", count=rows.count)
        for line in printed.new():
            print(line)
    result = last.get("result")
    artifact = finish(wandb, run, request, result)
    if online:
        channel.tell("uploaded")
        confirm(wandb, run.path, rows.count)
    write_state(folder, run, online, rows.count, result is not None)
    where = run.path if online else str(run.settings.sync_dir)
    wandb.teardown()
    channel.tell("done", online=online, where=where, rows=rows.count, sent=sent, artifact=artifact)


def told(seconds: float) -> dict[str, Any] | None:
    """The line that ends the run, waited for so long; an empty one where the process that asked is gone."""
    if not select.select([sys.stdin.buffer], [], [], seconds)[0]:
        return None
    line = sys.stdin.buffer.readline()
    return dict(json.loads(line)) if line.endswith(b"\n") else {}


def opened(wandb: Any, request: Request, channel: Channel) -> tuple[Any, bool]:  # noqa: ANN401 (the module)
    """The run, and whether it is online; a live one is recorded on disk where there is no login or no network."""
    settings = {
        "finish_timeout": request.timeout,
        "finish_timeout_raises": True,
        "x_stats_pid": request.pid,
        "program": "train.py",
        "console": "wrap",
        "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", "30")),
        "stop_fn": lambda: channel.tell("stop"),
    }

    # An agent of a W&B sweep sets WANDB_DIR to the folder that it was started in, whatever its user wants.
    place = request.folder if os.environ.get("WANDB_SWEEP_ID") else os.environ.get("WANDB_DIR") or request.folder
    Path(place).mkdir(parents=True, exist_ok=True)

    def init(mode: str) -> Any:  # noqa: ANN401 (a run of wandb)
        return wandb.init(mode=mode, dir=place, resume="allow", settings=settings, **request.options)

    why = None
    if request.online:
        try:
            if wandb.login(prompt=False, verify=False):
                return init("online"), True
            why = "no Weights & Biases login (wandb login, or WANDB_API_KEY)"
        except (wandb.errors.Error, TimeoutError) as error:
            why = f"Weights & Biases can't be reached ({explain(error)})"
        if not request.live:
            raise OfflineError(why)
        wandb.teardown()  # the service still holds the id of the run that failed
        channel.tell("offline", why=why)
    return init("offline"), False


def finish(wandb: Any, run: Any, request: Request, result: dict[str, Any] | None) -> str | None:  # noqa: ANN401
    """The summary, the best checkpoint where that is asked for, and the end of the run -> the artifact's name."""
    best, name = Path(request.folder) / "best.pt", None
    if result is not None:
        facts = {key: result[key] for key in ("top1", "top5", "loss", "best_epoch")}
        run.summary.update({f"best/{key}": facts[key] for key in ("top1", "top5", "loss")} | {"fps": result["fps"]})
        if request.artifact and best.exists():
            artifact = wandb.Artifact(f"ghostnet-{request.id}", type="model", metadata=facts)
            name = f"{run.entity}/{run.project}/{artifact.name}:best"
            # As it lies there, without a copy in wandb's own staging folder: nothing writes to it any more.
            artifact.add_file(str(best), policy="immutable")
            run.log_artifact(artifact, aliases=["best"])
    run.finish(exit_code=0 if result is not None else 1)
    return name


def confirm(wandb: Any, path: str, rows: int) -> None:  # noqa: ANN401 (the module)
    """Ask the server whether it has so many rows; UnconfirmedError where it hasn't: finish() is silent on that."""
    lines = 0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["WANDB_DIR"] = scratch  # where Api makes a folder for each run that is asked for
        for attempt in range(CONFIRMATIONS):
            time.sleep(attempt and INTERVAL)  # a busy server takes a moment
            try:
                lines = int(wandb.Api(timeout=10).run(path).historyLineCount or 0)
            except Exception as error:
                raise UnconfirmedError(f"it does not tell how many rows it has ({explain(error)})") from None
            if lines >= rows:
                return
    raise UnconfirmedError(f"it has {lines:,} of {rows:,} rows")


if __name__ == "__main__":
    main()
