"""What a run records: rows that survive a resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from ghostnet.loggers import JsonLines, RunInfo


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
