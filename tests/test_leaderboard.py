"""Runs side by side: whole commands over run folders, real ones and some made by the same rules."""

import csv
import fcntl
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from conftest import REPOSITORY, TINY, Run, environment
from run_folders import make_run, make_thousand

from ghostnet.experiments import results
from ghostnet.experiments.confidence import over_seeds, student_t
from ghostnet.experiments.runs import find, read
from ghostnet.tools.leaderboard.curves import curves

ACCURACIES = {(0.2, 1): 71.0, (0.2, 2): 73.0, (0.2, 3): 72.5, (0.4, 1): 80.0, (0.4, 2): 81.0}


def leaderboard(*words: str | Path, cwd: Path = REPOSITORY, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ghostnet.tools.leaderboard", *map(str, words)],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": str(REPOSITORY)} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def rows_of(*words: str | Path) -> list[dict[str, Any]]:
    done = leaderboard(*words, "format=json")
    assert (done.returncode, done.stderr) == (0, "")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """2 learning rates, 3 and 2 seeds."""
    for (lr, seed), top1 in ACCURACIES.items():
        make_run(
            tmp_path / f"sweep/optim.lr={lr},seed={seed}", [f"optim.lr={lr}", f"seed={seed}"], top1=top1, fps=100 / lr
        )
    return tmp_path / "sweep"


@pytest.mark.parametrize("freedom", [*range(1, 41), 60, 100, 1000])
def test_students_t_is_scipys(freedom: int) -> None:
    assert student_t(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=1e-5)


def test_a_mean_over_seeds_has_scipys_interval_and_a_seed_counts_once() -> None:
    values = [71.0, 73.0, 72.5]
    mean = over_seeds(enumerate(values))
    assert mean is not None
    low, high = scipy.stats.t.interval(0.95, 2, loc=scipy.stats.tmean(values), scale=scipy.stats.sem(values))
    assert (mean.value - (mean.confidence or 0), mean.value + (mean.confidence or 0)) == pytest.approx((low, high))
    assert over_seeds([(0, 71.0), (1, 72.0), (1, 74.0), (2, 72.5), (3, None)]) == mean
    alone = over_seeds([(1, 70.0), (1, 72.0)])
    assert alone is not None
    assert (alone.value, alone.confidence, alone.seeds) == (71.0, None, 1)


def test_runs_that_differ_only_in_their_seed_are_one_row(sweep: Path) -> None:
    best, other = rows_of(sweep)
    assert (best["name"], best["settings"], best["seeds"]) == ("optim.lr=0.4", {"optim.lr": 0.4}, [1, 2])
    assert (best["top1"], other["top1"]) == (80.5, pytest.approx(72.16667, abs=1e-4))
    assert other["top1_confidence"] == pytest.approx(4.302653 * 1.040833 / math.sqrt(3), rel=1e-5)
    assert [run["folder"].rpartition("=")[2] for run in other["runs"]] == ["1", "2", "3"]
    each = rows_of(sweep, "seeds=each")
    assert [row["top1"] for row in each] == sorted(ACCURACIES.values(), reverse=True)
    assert each[0]["settings"] == {"optim.lr": 0.4, "seed": 2}


def test_what_did_not_complete_is_in_no_mean(sweep: Path) -> None:
    words = ["optim.lr=0.4", "seed=3"]
    make_run(sweep / "optim.lr=0.4,seed=3", words, status="pruned", top1=20.0)
    make_run(sweep / "optim.lr=0.4,seed=4", ["optim.lr=0.4", "seed=4"], status="failed", error="not finite")
    best = rows_of(sweep)[0]
    assert (best["top1"], best["status"]) == (80.5, "2 completed, 1 pruned, 1 failed")
    text = leaderboard(sweep).stdout
    assert "80.500 ± 6.353" in text
    assert next(line for line in text.splitlines() if "optim.lr=0.4" in line).split("│")[3].strip() == "2"


def test_the_columns_are_what_differs(tmp_path: Path) -> None:
    make_run(tmp_path / "a", ["optim=adamw", "amp=bf16"])
    make_run(tmp_path / "b", ["optim=sgd", "optim.lr=0.3", "resume=auto", "logger.wandb=null"])
    make_run(tmp_path / "c", ["optim=sgd", "model.width=0.5", "data.image_size=64"])
    assert list(rows_of(tmp_path)[0]["settings"]) == ["optim", "amp", "optim.lr", "model.width", "data.image_size"]
    values = {row["name"]: row["settings"] for row in rows_of(tmp_path)}
    assert values["a"] | values["c"] == values["c"]
    assert (values["a"]["amp"], values["b"]["amp"], values["b"]["optim.lr"]) == ("bf16", "none", 0.3)


def test_every_state_of_a_run_is_told(tmp_path: Path) -> None:
    names = ("done", "failed", "pruned", "cut", "running", "broken", "empty", "numberless", "no_config", "bare")
    for number, name in enumerate(names, 1):
        status = name if name in ("failed", "pruned") else "completed"
        make_run(
            tmp_path / name,
            [f"epochs={number}", "schedule.warmup_epochs=0"],
            status=status,
            error="out of memory" if status == "failed" else None,
        )
    for name in ("cut", "running", "bare"):
        (tmp_path / name / "result.json").unlink()
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / "bare" / name).unlink()
    (tmp_path / "broken" / "result.json").write_text('{"status": "completed", "top1": 9')
    (tmp_path / "empty" / "result.json").write_text("")
    (tmp_path / "numberless" / "result.json").write_text('{"status": "completed", "top1": "high"}')
    (tmp_path / "no_config" / "config.yaml").write_bytes(b"\xff\xfe[")
    with (tmp_path / "running" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {row["name"]: row for row in rows_of(tmp_path)}
    damaged = dict.fromkeys(("broken", "empty", "numberless", "no_config"), "damaged")
    others = {"done": "completed", "failed": "failed", "pruned": "pruned", "cut": "cut off", "running": "running"}
    assert {name: row["status"] for name, row in rows.items()} == damaged | others | {"bare": "cut off"}
    assert rows["broken"]["runs"][0]["damaged"] == "result.json is cut short or no JSON"
    assert rows["failed"]["runs"][0]["error"] == "out of memory"
    text = leaderboard(tmp_path)
    assert (text.returncode, text.stderr) == (0, "")
    assert f"damaged: {tmp_path / 'numberless'}: result.json: top1 is no number" in text.stdout


def test_what_is_no_finite_number_counts_as_none(tmp_path: Path) -> None:
    for number, text in enumerate(("NaN", "Infinity", "null", "1" + "0" * 400), 1):
        make_run(tmp_path / str(number), [f"epochs={number}", "schedule.warmup_epochs=0"])
        (tmp_path / str(number) / "result.json").write_text(f'{{"status": "completed", "top1": {text}, "fps": 5}}')
    done = leaderboard(tmp_path, "format=json", f"html={tmp_path / 'board.html'}")
    assert done.returncode == 0, done.stderr
    assert "NaN" not in done.stdout
    assert [(row["top1"], row["fps"], row["status"]) for row in json.loads(done.stdout)] == [
        (None, 5.0, "completed")
    ] * 4


def test_runs_are_found_at_any_depth_once_and_not_in_what_runs_keep_for_others(sweep: Path) -> None:
    folder = sweep / "optim.lr=0.2,seed=1"
    for inner in ("wandb/offline-run-1/files", ".hydra"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
        (folder / inner / "config.yaml").write_text("a: 1\n")
    (sweep / "loop").symlink_to(sweep, target_is_directory=True)
    assert len(rows_of(sweep, sweep.parent, folder, "seeds=each")) == 5
    for number in (9, 10):
        make_run(sweep / str(number), [])
    assert [path.name for path in find(sweep)][:2] == ["9", "10"]


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    for name in (b"\xff\xfe", b"[red]x[/red]", b"new\nline", b"a=b", b"filter=x"):
        make_run(tmp_path / os.fsdecode(name) / "run", ["optim.lr=0.2"])
    done = leaderboard(tmp_path, "seeds=each", f"html={tmp_path / 'board.html'}")
    assert done.returncode == 0, done.stderr
    assert "[red]x[/red]/run" in done.stdout
    for form in ("csv", "json", "markdown"):
        assert leaderboard(tmp_path, "seeds=each", f"format={form}").returncode == 0
    assert len(rows_of(tmp_path / "a=b")) == len(rows_of(f"{tmp_path}/filter=x")) == 1


def test_a_run_of_an_older_version_is_rerun_by_its_overrides(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ["optim.lr=0.2", "data.root='/data/a b'"])
    (tmp_path / "run/run.json").unlink()
    (tmp_path / "run/.hydra/hydra.yaml").unlink()
    run = read(tmp_path / "run")
    assert run.rerun == """python train.py optim.lr=0.2 'data.root='"'"'/data/a b'"'"''"""
    assert (run.config["amp"], run.config["optim.lr"]) == ("Amp", 0.2)


def test_settings_are_those_that_the_whole_yaml_has(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from ghostnet.config import flat, resolved

    make_run(tmp_path, ["data.augment.scale=[0.08,1]", "data.root='a: b # c\n- d'", "optim.weight_decay=1e-7"])
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    whole = {k: tuple(v) if isinstance(v, list) else v for k, v in flat(resolved(loaded))}  # type: ignore[arg-type]
    assert {key: value for key, value in read(tmp_path).config.items() if key in whole} == whole


def test_the_text_table_fits_the_terminal(sweep: Path) -> None:
    for width in (80, 120):
        out = leaderboard(sweep, COLUMNS=str(width), TTY_COMPATIBLE="1", TERM="dumb").stdout
        assert max(map(len, out.splitlines())) <= width
        assert "80.500 ± 6.353" in out


def test_csv_and_markdown_have_the_numbers_of_json(sweep: Path) -> None:
    make_run(sweep / "odd|name_<b>", ["optim.lr=0.1", "data.augment.scale=[0.08,1]"], top1=1.0)
    rows = rows_of(sweep)
    table = list(csv.DictReader(io.StringIO(leaderboard(sweep, "format=csv").stdout)))
    assert [float(line["top1"]) for line in table] == [row["top1"] for row in rows]
    assert [line["name"] for line in table] == [row["name"] for row in rows]
    assert table[2]["data.augment.scale"] == "[0.08,1]"
    assert table[0]["rerun"].splitlines() == [run["rerun"] for run in rows[0]["runs"]]
    lines = leaderboard(sweep, "format=markdown").stdout.splitlines()
    assert lines[0].startswith("| run | optim.lr | data.augment.scale | seeds | Acc@1 | FPS | time | status |")
    assert len(lines) == 2 + len(rows)
    assert lines[4].startswith(r"| odd\|name\_\<b\> |")


def test_rows_are_sorted_cut_and_filtered(sweep: Path) -> None:
    assert [row["settings"]["optim.lr"] for row in rows_of(sweep, "sort=optim.lr")] == [0.2, 0.4]
    assert [row["settings"]["optim.lr"] for row in rows_of(sweep, "sort=-optim.lr")] == [0.4, 0.2]
    assert [row["fps"] for row in rows_of(sweep, "sort=fps")] == [500.0, 250.0]
    assert [row["time"] for row in rows_of(sweep, "sort=time", "seeds=each", "top=2")] == [60.0, 60.0]
    assert [row["seeds"] for row in rows_of(sweep, "filter=optim.lr<0.3,seed!=2")] == [[1, 3]]
    # Of the rows, not of the runs: else the mean would be that of lucky seeds.
    assert [row["top1"] for row in rows_of(sweep, "filter=top1>72.2")] == [80.5]
    make_run(sweep / "cut", ["optim.lr=9"], status=None)
    assert [row["top1"] for row in rows_of(sweep, "sort=-top1")][-1] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "which runs? Give folders that hold some: python -m ghostnet.tools.leaderboard outputs multirun"),
        (("",), "'': no such folder. Give folders that hold runs."),
        (("nowhere",), "nowhere: no such folder. Give folders that hold runs."),
        (("README.md",), "README.md: no folder. Give folders that hold runs."),
        ((".", "srot=top1"), "srot: no such word. Did you mean sort?"),
        ((".", "--csv"), "--csv: no such flag."),
        ((".", "format=xml"), "format=xml: no such option."),
        ((".", "format=jso"), "format=jso: no such option. Did you mean json?"),
        ((".", "seeds=2"), "seeds=2: no such option."),
        ((".", "top=0"), "top=0: must be a whole number > 0."),
        ((".", "top=²"), "top=²: must be a whole number > 0."),
        ((".", "html=no/where.html"), "html=no/where.html: must be a file in a folder that is there."),
        ((".", "sort="), "sort=: by what?"),
        ((".", "filter=optim.lr"), "filter: 'optim.lr' is no condition."),
        ((".", "filter=optim.lr>high"), "filter: 'optim.lr>high': > needs a number behind it."),
        (("SWEEP", "sort=lr"), "sort: lr: the runs have no such key. Did you mean optim.lr?"),
        (("SWEEP", "filter=optim.lrr>1"), "filter: optim.lrr: the runs have no such key. Did you mean optim.lr?"),
        (("SWEEP", "filter=seed>7"), "filter: none of the 5 runs meets it."),
        (("conf",), "conf: no run in there. A run's folder has a config.yaml."),
    ],
)
def test_what_is_wrong_ends_in_one_message(sweep: Path, words: tuple[str, ...], message: str) -> None:
    done = leaderboard(*(str(sweep) if word == "SWEEP" else word for word in words))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_all_faults_are_told_at_once() -> None:
    done = leaderboard("nowhere", "top=x", "format=xml")
    assert done.stderr.count("\n") == 3


def test_a_reader_that_has_enough_ends_it_quietly(tmp_path: Path) -> None:
    make_thousand(tmp_path, 300, rows=0)
    command = f"{sys.executable} -m ghostnet.tools.leaderboard {tmp_path} seeds=each format=json | head -c 10"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=REPOSITORY, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_thousand_runs_have_a_row_each(tmp_path: Path) -> None:
    make_thousand(tmp_path, 1000, rows=0)
    assert leaderboard(tmp_path, "seeds=each").stdout.count("completed") == 1000


def test_it_loads_no_torch() -> None:
    modules = "ghostnet.tools.leaderboard.__main__, ghostnet.tools.leaderboard.page"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    ).stdout
    assert out == "False\n"


def test_curves_are_those_of_the_metrics_with_their_extremes(tmp_path: Path) -> None:
    make_run(tmp_path, [], rows=300, spike=117)
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(f'{text[: text.index(chr(10)) + 1]}{{"step": 3, "train/lo\n{text}[]\n')
    whole, few = curves(tmp_path, 10_000, None), curves(tmp_path, 40, None)
    rows = [json.loads(line) for line in text.splitlines()]
    rows = [row for row in [rows[0], *rows] if "train/loss" in row]
    assert whole["loss"] == [pytest.approx(row["train/loss"], rel=1e-3) for row in rows]
    assert [sum(whole["s"][: i + 1]) for i in range(len(rows))] == [row["step"] for row in rows]
    assert len(few["s"]) == len(few["loss"]) <= 40
    assert (max(few["loss"]), min(few["loss"])) == (max(whole["loss"]), min(whole["loss"]))
    assert max(few["loss"]) > 50
    assert sum(few["s"]) == rows[-1]["step"]
    assert (few["loss"][0], few["loss"][-1]) == (whole["loss"][0], whole["loss"][-1])


def test_a_sweep_over_seeds_ends_with_its_table(run: Run, tiny_data: Path, tmp_path: Path) -> None:
    words = [*TINY, f"data.root={tiny_data}", "epochs=1", "optim.lr=2,1e9", "seed=1,2", "hydra.sweep.dir=sweep"]
    done = run("train.py", "-m", *words)
    assert done.returncode == 1, done.stderr
    first, second = done.stdout.split("over seeds, with 95 % confidence")
    jobs = [line.split("│") for line in first.split("best first")[1].splitlines() if line.startswith("│")]
    assert [cells[-2].strip() for cells in jobs] == ["completed", "completed", "failed", "failed"]
    results_ = [json.loads((tmp_path / f"sweep/optim.lr=2,seed={seed}/result.json").read_text()) for seed in (1, 2)]
    best = sorted((result["top1"] for result in results_), reverse=True)
    assert [float(cells[4]) for cells in jobs[:2]] == [pytest.approx(top1, abs=5e-4) for top1 in best]
    seeds = [line.split("│") for line in second.splitlines() if line.startswith("│")]
    assert len(seeds) == 2
    assert float(seeds[0][4].split("±")[0]) == pytest.approx(sum(best) / 2, abs=5e-4)
    assert done.stdout.rstrip().endswith("sweep folder: sweep")
    rows = rows_of(tmp_path / "sweep")
    assert rows[0]["top1"] == pytest.approx(sum(best) / 2)
    assert rows[0]["runs"][0]["rerun"].startswith("python train.py data=fashion_mnist")
    assert results.columns([read(path) for path in find(tmp_path / "sweep")], grouped=True) == ["optim.lr"]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
