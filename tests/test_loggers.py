"""What a run records: rows that survive a resume, and what the real wandb has written to its offline file."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from ghostnet.loggers import JsonLines, RunInfo
from tests.conftest import TINY, Run


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def recorded(folder: Path) -> tuple[Any, dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """(run, config, rows of history, summary) of the one offline run in a folder."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    run, config, history, summary = None, {}, [], {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= items(record.run.config.update)
        elif kind == "history":
            history.append(items(record.history.item))
        elif kind == "summary":
            summary |= items(record.summary.update)
    return run, config, history, summary


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_wandb_records_nested_config_rows_over_step_and_the_best_as_summary(
    run: Run, tmp_path: Path, tiny_data: Path
) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "logger.wandb.mode=offline", "hydra.run.dir=here"]
    words += ["logger.wandb.group=g", "logger.wandb.name=first", "logger.wandb.tags=[a,b]", "logger.wandb.notes=why"]
    done = run("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "wandb sync" in done.stdout
    info, config, history, summary = recorded(tmp_path / "here")
    assert (info.project, info.run_group, info.display_name, info.notes) == ("ghostnet", "g", "first", "why")
    assert list(info.tags) == ["a", "b"]
    assert config["model"]["width"] == 0.1
    assert config["schedule"]["warmup_epochs"] == 0.5
    expected = rows(tmp_path / "here")
    assert [{k: row[k] for k in want} for row, want in zip(history, expected, strict=True)] == expected
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert summary["best/top1"] == result["top1"]
    assert summary["fps"] == result["fps"]


def test_a_resumed_run_goes_on_under_the_same_id(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "logger.wandb.mode=offline", "hydra.run.dir=here"]
    assert run("train.py", *words, "epochs=1").returncode == 0
    assert run("train.py", *words, "epochs=2", "resume=auto").returncode == 0
    ids = {
        path.suffixes and path.stem.removeprefix("run-") for path in (tmp_path / "here").glob("wandb/offline*/*.wandb")
    }
    assert len(list((tmp_path / "here").glob("wandb/offline-run-*"))) == 2
    assert len(ids) == 1


def test_without_a_login_wandb_goes_on_offline_and_says_so(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "epochs=1", "hydra.run.dir=here"]
    done = run("train.py", *words, HOME=str(tmp_path), WANDB_API_KEY="", WANDB_MODE="online")
    assert done.returncode == 0, done.stderr
    assert "recording offline" in done.stdout
    assert "wandb sync" in done.stdout
    assert recorded(tmp_path / "here")[2]


def test_without_a_network_wandb_goes_on_offline_and_says_so(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "epochs=1", "hydra.run.dir=here"]
    refused = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"}
    done = run("train.py", *words, HOME=str(tmp_path), WANDB_MODE="online", **refused)
    assert done.returncode == 0, done.stderr
    assert "recording offline" in done.stdout
    assert json.loads((tmp_path / "here" / "result.json").read_text())["status"] == "completed"


def test_wandb_disabled_leaves_nothing(run: Run, tmp_path: Path, tiny_data: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "logger=wandb", "logger.wandb.mode=disabled", "epochs=1"]
    done = run("train.py", *words, "hydra.run.dir=here", WANDB_MODE="online")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "here" / "wandb").exists()


@pytest.mark.parametrize(("step", "evaluated", "kept"), [(6, 5, 4), (5, 0, 2), (5, 5, 3), (20, 20, 5)])
def test_a_resumed_run_drops_the_rows_it_will_write_again(tmp_path: Path, step: int, evaluated: int, kept: int) -> None:
    written: list[dict[str, Any]] = [{"step": 4}, {"step": 5}, {"step": 5, "eval/top1": 1.0}, {"step": 6}, {"step": 9}]
    lines = [json.dumps(row) + "\n" for row in written]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 10, "tra')
    logger = JsonLines()
    logger.start(RunInfo(tmp_path, {}, step, evaluated, 20, 2))
    assert rows(tmp_path) == written[:kept]
    logger.log({"step": 21})
    assert rows(tmp_path) == [*written[:kept], {"step": 21}]
