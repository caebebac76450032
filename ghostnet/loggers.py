"""What a run shows and leaves behind: the console, metrics.jsonl. Each logger takes the same rows."""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ghostnet.disk import refused, writing

Row = dict[str, Any]
log = logging.getLogger("ghostnet")


@dataclass(frozen=True)
class RunInfo:
    """What a logger may want to know when a run starts."""

    folder: Path
    config: dict[str, Any]
    step: int
    """More than 0: a resumed run."""
    evaluated: int
    """The step of the last evaluation that finished."""
    total_steps: int
    epochs: int
    prefix: str = ""
    """Of what is printed, where other runs print beside this one."""


class Logger(Protocol):
    """A place that rows go to: `step`, `epoch`, and train/* or eval/* values."""

    def start(self, run: RunInfo) -> None:
        """Called once, before the first row."""

    def log(self, row: Row) -> None:
        """One row of metrics."""

    def back(self, step: int, evaluated: int) -> None:
        """The run was taken back to a step; the rows after it will come again. evaluated: as of RunInfo."""

    def finish(self, result: Row | None) -> None:
        """The run's result, or None where it was cut short."""


class JsonLines:
    """metrics.jsonl in the run folder: one row a line; a resumed run drops the rows that it will write again."""

    def __init__(self) -> None:
        self.path = Path()

    def start(self, run: RunInfo) -> None:
        """Keep the rows up to the step the run goes on from."""
        self.path = run.folder / "metrics.jsonl"
        self.back(run.step, run.evaluated)

    def back(self, step: int, evaluated: int) -> None:
        """Keep the rows up to the step."""
        if self.path.exists():
            kept = [line for line in self._rows() if self._is_past(json.loads(line), step, evaluated)]
            temporary = self.path.with_suffix(".tmp")
            with writing(self.path):
                temporary.write_text("".join(kept), encoding="utf-8")
                temporary.replace(self.path)

    def _rows(self) -> Iterator[str]:
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            # A line cut short by a kill is not a row.
            with contextlib.suppress(json.JSONDecodeError):
                json.loads(line)
                yield line

    @staticmethod
    def _is_past(row: Row, step: int, evaluated: int) -> bool:
        return bool(row["step"] <= (evaluated if "eval/top1" in row else step))

    def log(self, row: Row) -> None:
        """Append a row; StorageError where it can't be."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(row), allow_nan=False) + "\n")

    def finish(self, result: Row | None) -> None:
        """Nothing is left to do: every row is on disk."""


class LogFile(logging.FileHandler):
    """train.log: where it can't be written the run goes on, and that is said once."""

    lost = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Say it."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and not self.lost:
            self.lost = True
            fault = refused(Path(self.baseFilename), error)
            print(f"note    {fault} The run goes on without it.", file=sys.stderr, flush=True)
        elif not isinstance(error, OSError):
            super().handleError(record)

    def close(self) -> None:
        """What can't be written any more is lost."""
        with contextlib.suppress(OSError):
            super().close()


class Display(Progress):
    """Bars, and below them one line of numbers that is cut where the terminal is narrow."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars, then the line."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.note, no_wrap=True, overflow="ellipsis")


class ConsoleLogger:
    """A live display on a terminal, plain lines elsewhere; lines of epochs and results on both, and in train.log."""

    def __init__(self, quiet: bool = False, prefix: str = "") -> None:
        """quiet: say nothing at all. prefix: of each line, where other runs print beside this one: no live display."""
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.live, self.prefix = self.console.is_terminal and not quiet and not prefix, prefix
        self.progress = Display(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.started, self.first_step = time.monotonic(), 0

    def start(self, run: RunInfo) -> None:
        """Open the display."""
        self.run, self.first_step, self.started = run, run.step, time.monotonic()
        if self.live:
            per_epoch = run.total_steps // run.epochs
            self.steps = self.progress.add_task("all steps", total=run.total_steps, completed=run.step)
            self.epoch = self.progress.add_task("epoch", total=per_epoch, completed=run.step % per_epoch)
            self.evaluation = self.progress.add_task("evaluation", total=None, visible=False)
            self.progress.start()

    def back(self, step: int, evaluated: int) -> None:
        """Of the time left, go by the steps that are done from here on."""
        self.first_step, self.started = step, time.monotonic()

    def advance(self, step: int) -> None:
        """Move the bars to a step."""
        if self.live:
            per_epoch = self.run.total_steps // self.run.epochs
            epoch, within = divmod(step - 1, per_epoch)
            self.progress.update(self.steps, completed=step)
            if within == 0:
                self.progress.reset(self.epoch)
            description = f"epoch {epoch + 1}/{self.run.epochs}"
            self.progress.update(self.epoch, completed=within + 1, description=description)

    def evaluating(self, done: int, total: int) -> None:
        """Move the evaluation's bar; it is gone when done."""
        if self.live:
            self.progress.update(self.evaluation, completed=done, total=total, visible=done < total)

    def log(self, row: Row) -> None:
        """A line, or on a terminal a note beside the bar, for a train row; a line for an eval row."""
        if "train/loss" in row:
            note = (
                f"loss {row['train/loss']:.4f}  lr {row['train/lr']:.5f}  {row['train/fps']:,.0f} img/s  "
                f"wait {100 * row['train/data_wait']:.0f} %"
            )
            if "train/reduction" in row:
                note += f"  reduction {100 * row['train/reduction']:.0f} %"
            if self.live:
                self.progress.note = note
                log.info("epoch %s step %s  %s", row["epoch"], row["step"], note)
            else:
                self.say(
                    f"epoch {row['epoch']}/{self.run.epochs} step {row['step']}/{self.run.total_steps}  "
                    f"{note}  eta {self._eta(row['step'])}"
                )
        else:
            ema = f"  EMA Acc@1 {row['ema/top1']:.3f}" if "ema/top1" in row else ""
            self.say(
                f"epoch {row['epoch']}/{self.run.epochs}  Acc@1 {row['eval/top1']:.3f}  Acc@5 {row['eval/top5']:.3f}  "
                f"loss {row['eval/loss']:.4f}{ema}  {row['eval/fps']:,.0f} img/s"
                f"{'  best so far' if row['best'] else ''}"
            )

    def _eta(self, step: int) -> str:
        done = step - self.first_step
        seconds = (self.run.total_steps - step) * (time.monotonic() - self.started) / max(1, done)
        return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02}:{int(seconds % 60):02}"

    def say(self, text: str) -> None:
        """One line, on the console and in the log file."""
        self.console.print(self.prefix + text, markup=False)
        log.info(text)

    def finish(self, result: Row | None) -> None:
        """Close the display and print the reference's table and final lines."""
        if self.live:
            self.progress.stop()
        if result is None:
            return
        name = f"{result['world_size']}p-{result['device'].upper()}"
        cells = [name, f"{result['top1']:.3f}", f"{result['fps']:.1f}", str(result["epochs"])]
        cells += [result["amp"].upper(), result["torch"]]
        table = Table(*("NAME", "Acc@1", "FPS", "Epochs", "AMP_Type", "Torch_Version"))
        table.add_row(*cells)
        if not self.prefix:
            self.console.print(table)
        log.info("NAME | Acc@1 | FPS | Epochs | AMP_Type | Torch_Version: %s", " | ".join(cells))
        self.say(f"Final Performance images/sec : {result['fps']:.2f}")
        self.say(f"Final Train Accuracy : {result['top1']:.3f}")
        self.say(f"E2E Training Duration sec : {result['seconds']:.0f}")
        many = result["world_size"] > 1
        parts = {"compute": result["compute"], "data wait": result["data_wait"]}
        parts |= {"reduction": result["reduction"]} if many else {}
        memory = ", ".join(f"{size / 2**30:.2f}" for size in result["memory"])
        self.say(
            f"Of the training time: {', '.join(f'{name} {100 * share:.1f} %' for name, share in parts.items())}; "
            f"peak memory {memory} GiB"
        )
        if "baseline" in result:
            self.say(
                f"Scaling efficiency : {100 * result['scaling_efficiency']:.1f} % of {result['world_size']} × "
                f"{result['baseline_fps']:.1f} images/sec ({result['baseline']})"
            )
            for difference in result["baseline_differs"]:
                self.say(f"note    the baseline differs: {difference}")


@contextlib.contextmanager
def evaluation_bar(total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar over the images of an evaluation, on a terminal; gives the function that moves it by so many images."""
    console = Console()
    columns = [*Progress.get_default_columns(), MofNCompleteColumn()]
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("evaluation", total=total)
        yield lambda images: progress.advance(task, images)


def say(text: str) -> None:
    """One line on the console and in the log file, where there is no display to go through."""
    print(text, flush=True)
    log.info(text)


def jsonable(row: Row) -> Row:
    """A row with numbers that JSON has: NaN and infinities become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
