"""benchmark results: the leaderboard over a thousand runs, as text and as a page."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from ghostnet.errors import UserError
from ghostnet.tools.benchmark.programs import SMALL
from ghostnet.tools.benchmark.subject import Failed, Finished, Metrics, Subject, program

RUNS = 1000
ROWS = 400
"""Of the metrics of each run."""
WIDTHS = ("0.5", "1.0", "1.3")


def results(words: list[str], place: Path) -> list[Subject]:
    """Seconds of the table, with a row for each seed, and of the page; and how large that is."""
    runs = place / "runs"
    _make(words, runs)
    board = [sys.executable, "-m", "ghostnet.tools.leaderboard", str(runs)]

    def read(finished: Finished) -> Metrics:
        return {"seconds": finished.seconds, "cpu_seconds": finished.cpu_seconds, "memory": finished.memory}

    def size(finished: Finished) -> Metrics:
        return {"bytes": (finished.folder / "board.html").stat().st_size}

    def page(folder: Path) -> list[str]:
        return [*board, f"html={folder / 'board.html'}"]

    head = f"leaderboard, {RUNS:,} runs"
    return [
        Subject(head, lambda _: board, read),
        Subject(f"{head}, seeds=each", lambda _: [*board, "seeds=each"], read),
        Subject(f"{head}, html=FILE", page, read),
        Subject("its page", page, size, once=True, sentence=lambda found: f"{found['bytes'] / 1e6:.1f} MB"),
    ]


def _make(words: list[str], runs: Path) -> None:
    """One real run of so many steps, and copies of it under other learning rates, widths, seeds and accuracies."""
    first = runs / "first"
    training = [*SMALL, f"data.dataset.num_train={32 * ROWS}", "log_every=1", "optim.lr=0.4", "seed=1", *words]
    done = subprocess.run(
        program("train.py", *training, f"hydra.run.dir={first}"),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise Failed(done.stderr.strip())
    for file in [*first.glob("*.pt"), *first.glob(".lock")]:
        file.unlink()
    config = (first / "config.yaml").read_text(encoding="utf-8")
    result = json.loads((first / "result.json").read_text(encoding="utf-8"))
    width = next(line.strip() for line in config.splitlines() if line.startswith("  width:"))
    if "\n  lr: 0.4\n" not in config or "\nseed: 1\n" not in config:
        raise UserError("results: leave optim.lr and seed out, they are what its runs differ in.")
    for number in range(1, RUNS):
        group, seed = divmod(number, 3)
        text = config.replace("\nseed: 1\n", f"\nseed: {seed + 1}\n")
        text = text.replace("\n  lr: 0.4\n", f"\n  lr: {0.01 * (1 + group):.2f}\n")
        folder = shutil.copytree(first, runs / f"search/{number}")
        (folder / "config.yaml").write_text(
            text.replace(f"\n  {width}\n", f"\n  width: {WIDTHS[group % 3]}\n"), encoding="utf-8"
        )
        numbers = {"top1": 60 + number % 97 / 4, "fps": 500 + number * 37 % 1000}
        (folder / "result.json").write_text(json.dumps(result | numbers), encoding="utf-8")
