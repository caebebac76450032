"""Run folders as train.py leaves them, in no time."""

import functools
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ghostnet.door.overrides import Checked, check_command

HYDRA = "hydra:\n  runtime:\n    version: 1.3.2\n    choices:\n{}      hydra/launcher: basic\n  verbose: false\n"
BASE = ("data=samples", "device=cpu")


@functools.cache
def checked(words: tuple[str, ...]) -> Checked:
    return check_command("train", [*BASE, *words], multirun=False)


def metrics(rows: int, top1: float, spike: int | None) -> str:
    """Rows of training, and one of an evaluation after every tenth."""
    lines: list[dict[str, Any]] = []
    for row in range(1, rows + 1):
        loss = 60.0 if row == spike else 0.3 + 2 / row + row % 7 / 100
        values = {"step": 5 * row, "epoch": row // 10 + 1, "time": 1.79e9 + row / 3, "train/loss": loss}
        lines.append(values | {"train/lr": 0.4 * (1 - row / rows), "train/fps": 900.0, "train/data_wait": 0.01})
        if row % 10 == 0:
            accuracy = {"eval/loss": 2 / row, "eval/top1": top1 * row / rows, "eval/top5": 99.0, "best": True}
            lines.append(values | accuracy | {"eval/fps": 15_000.0})
            del lines[-1]["train/loss"]
    return "".join(json.dumps(line) + "\n" for line in lines)


def make_run(
    folder: Path,
    words: list[str],
    status: str | None = "completed",
    top1: float = 70.0,
    fps: float = 1000.0,
    error: str | None = None,
    rows: int = 20,
    spike: int | None = None,
) -> Path:
    """One run; status: None for one that was cut off."""
    command = checked(tuple(words))
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(command.jobs[0]), folder / "config.yaml")
    choices = {key: value for key, value in command.hydra.runtime.choices.items() if "/" not in str(key)}
    lines = "".join(f"      {key}: {'null' if value is None else value}\n" for key, value in choices.items())
    (folder / ".hydra" / "hydra.yaml").write_text(HYDRA.format(lines))
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(words)))
    record = {"rerun": " ".join(["python train.py", *BASE, *words]), "overrides": [*BASE, *words], "started": 1.79e9}
    (folder / "run.json").write_text(json.dumps(record | {"seed": command.jobs[0]["seed"]}))
    (folder / "metrics.jsonl").write_text(metrics(rows, top1, spike))
    numbers = {"top1": top1, "top5": 99.0, "loss": 0.5, "fps": fps, "seconds": 60.0}
    if status is not None:
        result = {"status": status} | ({"error": error} if status == "failed" else numbers)
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def make_thousand(place: Path, count: int, rows: int) -> None:
    """Many runs: a search over learning rates and widths, three seeds each."""
    model = make_run(place / "first", ["seed=1", "optim.lr=0.4"], rows=rows)
    texts = {path.name: path.read_text() for path in model.glob("*.*") if path.is_file()}
    hydra = (model / ".hydra/hydra.yaml").read_text()
    for number in range(1, count):
        lr, width, seed = 0.01 * (1 + number // 3), (0.5, 1.0, 1.3)[number // 3 % 3], 1 + number % 3
        folder = place / f"search/optim.lr={lr:.2f},model.width={width},seed={seed}"
        (folder / ".hydra").mkdir(parents=True)
        config = texts["config.yaml"].replace("seed: 1", f"seed: {seed}").replace("  lr: 0.4", f"  lr: {lr:.2f}")
        (folder / "config.yaml").write_text(config.replace("width: 1.0", f"width: {width}"))
        (folder / "run.json").write_text(texts["run.json"])
        (folder / "metrics.jsonl").write_text(texts["metrics.jsonl"])
        result = json.loads(texts["result.json"]) | {"top1": 60 + number % 97 / 4, "fps": 500 + number * 37 % 1000}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / ".hydra/hydra.yaml").write_text(hydra)
