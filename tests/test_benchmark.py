"""Benchmarks as whole commands on tiny real data: what they tell, never how fast it was."""

import json
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ghostnet.errors import ConfigError
from ghostnet.tools.benchmark import __main__ as benchmark
from ghostnet.tools.benchmark import data, door, peers, processes, report, results
from ghostnet.tools.benchmark.subject import Failed, Subject, child, measure
from tests.conftest import REPOSITORY, TINY, environment

SMALL = ["device=cpu", "rounds=1", "model=ghostnet_050", "data.batch_size=8", "data.image_size=32", "data.workers=1"]


@pytest.fixture
def told(tmp_path):
    """The JSON, the page's HTML and the text that a benchmark gives."""

    def run(*words):
        files = [tmp_path / "out.json", tmp_path / "out.html"]
        done = subprocess.run(
            [sys.executable, "-m", "ghostnet.tools.benchmark", *words, f"json={files[0]}", f"report={files[1]}"],
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(files[0].read_text()), files[1].read_text(), done

    return run


class Page(HTMLParser):
    """The cells of the table, the texts of the charts, and whether every tag is closed in its turn."""

    VOID = ("meta", "rect", "line")

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.labels, self.bars = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "rect":
            self.bars.append(float(dict(attrs)["width"]))
        assert not {"src", "href", "onload"} & set(dict(attrs))
        assert tag not in ("script", "link", "img")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "td":
            self.cells.append(text)
        if self.open and self.open[-1] == "text":
            self.labels.append(text)


def check(result, page, names):
    """The subjects by name, after what holds for every benchmark."""
    rows = {row["name"]: row for row in result["subjects"]}
    assert list(rows) == names
    shown = Page(page)
    for row in result["subjects"]:
        assert all(len(row["rounds"]) == result["rounds"] for row in result["subjects"])
        assert row["median"][row["what"]] > 0
        assert row["range"][0] <= row["median"][row["what"]] <= row["range"][1]
        assert row["median"]["memory"] > 100 << 20 or result["unit"] == "seconds"
        assert results.speed(row) in shown.cells
        assert results.number(row["median"][row["what"]]) in shown.labels
        assert ("ratio" in row) == (row["peer"] is not None)
    assert {"cpu", "cpus", "torch", "date"} <= set(result["machine"])
    return rows


# Whole commands


@pytest.mark.slow
def test_loader_measures_ours_and_the_peers_and_tells_quality_and_dispatch(told, image_folder):
    words = ["loader", *SMALL, "seconds=0.05", "peers=timm,webdataset", f"data.root={image_folder}"]
    result, page, done = told(*words)
    check(result, page, ["ours, 1 thread", "timm, 1 worker", "timm, 2 workers"])
    quality, dispatch = (fact["median"] for fact in result["facts"])
    assert quality["pictures"] == 64
    assert 20 < quality["psnr_min"] <= quality["psnr_median"] <= 100
    assert dispatch["ratio"] > 0
    assert list(result["left_out"]) == ["webdataset"]
    assert "left out: webdataset: " in done.stdout
    assert "round 1 of 1  timm, 2 workers" in done.stderr
    assert result["command"].startswith("python -m ghostnet.tools.benchmark loader device=cpu")


@pytest.mark.slow
def test_step_measures_whole_steps_of_ours_and_of_timm(told):
    result, page, _ = told("step", *SMALL, "seconds=0.1", "amp=bf16")
    check(result, page, ["ours", "timm"])


@pytest.mark.slow
def test_evaluate_finds_the_accuracy_of_timm_to_the_digit(told, run, tiny_data, tmp_path):
    words = [*TINY, f"data.root={tiny_data}", "model.width=0.5", "epochs=5", "schedule.cooldown_epochs=0", "optim.lr=2"]
    assert run("train.py", *words, "hydra.run.dir=run").returncode == 0
    result, page, _ = told("evaluate", "device=cpu", "rounds=1", f"ckpt={tmp_path / 'run'}")
    rows = check(result, page, ["evaluate.py", "timm"])
    ours, timm = (rows[name]["median"] for name in ("evaluate.py", "timm"))
    assert ours["top1"] > 30
    assert (ours["top1"], ours["top5"]) == (timm["top1"], timm["top5"])
    assert ours["loss"] == pytest.approx(timm["loss"], rel=1e-4)


def test_evaluate_takes_random_weights_where_it_is_given_none(told, image_folder):
    words = ["device=cpu", "rounds=1", "peers=none", "images=8", "model=ghostnet_050", "data.image_size=32"]
    result, page, _ = told("evaluate", *words, f"data.root={image_folder}")
    check(result, page, ["evaluate.py"])


@pytest.mark.slow
def test_start_tells_seconds_to_help_to_a_message_and_to_the_first_step(told, tiny_data):
    words = ["device=cpu", "rounds=1", "model=ghostnet_050", "data=samples", f"data.root={tiny_data}"]
    result, page, _ = told("start", *words, "data.batch_size=8")
    names = ["train.py --help", "train.py --cfg job", "train.py with a typo"]
    names += ["train.py, 100 jobs with a fault", "train.py to the first step"]
    rows = check(result, page, [*names, "timm to the first step"])
    assert result["unit"] == "seconds"
    ours, timm = rows["train.py to the first step"]["median"], rows["timm to the first step"]
    assert timm["ratio"] == pytest.approx(timm["median"]["seconds"] / ours["seconds"])


@pytest.mark.slow
def test_checkpoint_tells_what_saving_costs_the_loop(told):
    result, page, done = told("checkpoint", *SMALL, "save_every=4", "optim.lr=0.01")
    rows = check(result, page, ["without saving", "save_every=4"])
    plain, saving = (row["median"] for row in rows.values())
    assert plain["steps"] == saving["steps"] == 12
    assert "saves" not in plain
    assert saving["saves"] == 3
    assert saving["save_bytes"] > 3 * 4 * 2_500_000  # weights, momentum, average
    assert 0 < saving["save_held"] < saving["seconds"]
    cost = rows["save_every=4"]["cost"]
    assert cost == pytest.approx(saving["seconds"] / plain["seconds"] - 1)
    assert f"{100 * cost:+.2f} %" in done.stdout


@pytest.mark.parametrize(
    ("signum", "code", "said"),
    [(signal.SIGINT, 130, "stopped, as asked.\n"), (signal.SIGTERM, 143, "SIGTERM: stopped.\n")],
)
def test_a_signal_ends_a_benchmark_and_all_that_it_started(tmp_path, signum, code, said):
    process = subprocess.Popen(
        [sys.executable, "-m", "ghostnet.tools.benchmark", "step", *SMALL, "seconds=100"],
        env=environment() | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(family := processes.tree(process.pid)) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signum)
    assert process.wait(30) == code
    assert process.stderr.read().endswith(said)
    process.stderr.close()
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert not list(tmp_path.iterdir())


# The door


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loadr"], "loadr: no such benchmark. Did you mean loader? python -m ghostnet.tools.benchmark {loader,"),
        ([], "which benchmark?"),
        (["loader", "rounds=0"], "rounds=0: must be a whole number > 0."),
        (["loader", "round=2"], "round: no such key"),
        (["loader", "seconds=nan"], "seconds=nan: must be a number > 0."),
        (["loader", "peers=tim"], "'tim' is none. Did you mean timm?"),
        (["loader", "json=/nowhere/x.json"], "json=/nowhere/x.json: must be a file in a folder that is there."),
        (["loader", "timm=train.py"], "timm=…: not a word of benchmark loader, but of start, train."),
        (["train", "timm=nowhere.py"], "timm=nowhere.py: no such file."),
        (["scale", "counts=1,0"], "counts=1,0: must be numbers of devices, 1,2."),
        (["loader", "-m"], "-m: a benchmark takes the words of one job, and no flags."),
        (["step", "data.batchsize=3"], "Did you mean data.batch_size?"),
        (["evaluate", "epochs=3"], "epochs: no such key."),
    ],
)
def test_bad_words_end_in_one_message_and_1(words, message, capsys):
    assert benchmark.main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_all_bad_words_are_told_at_once():
    with pytest.raises(ConfigError, match=r"(?s)rounds=x.*peers=y.*optim\.lrr"):
        door.check(["loader", "rounds=x", "peers=y", "optim.lrr=1"])


def test_data_that_are_not_there_end_in_one_message(capsys):
    assert benchmark.main(["loader", "device=cpu"]) == 1
    assert "error: data.root is not set" in capsys.readouterr().err


def test_help_is_a_page_with_every_word(capsys):
    assert benchmark.main(["--help"]) == 0
    page = capsys.readouterr().out
    for word in (*door.OWN, *door.COMMON, *(word for words in door.OWN.values() for word in words)):
        assert re.search(rf"\b{word}\b", page), word


def test_step_and_scale_are_over_synthetic_data_and_start_over_the_quickstart():
    for name in ("step", "scale"):
        case = door.check([name, "data.root=/photos", "data=imagefolder", "data.batch_size=4"])
        assert data.kind_of(case.cfg) == "Synthetic"
        assert case.cfg["data"]["batch_size"] == 4
    assert data.kind_of(door.check(["start", "device=cpu"]).cfg) == "Samples"
    assert data.kind_of(door.check(["start", "data.root=/photos"]).cfg) == "ImageFolder"


# The parts


def test_a_part_of_a_folder_has_as_many_of_each_class(image_folder, tmp_path):
    cfg = door.check(["train", f"data.root={image_folder}"]).cfg
    part = data.folder(cfg, 8, tmp_path)
    assert [len(list((part / "train" / f"class{label}").iterdir())) for label in range(4)] == [2] * 4
    assert all(path.read_bytes() for path in part.glob("val/*/*"))
    assert data.folder(cfg, None, tmp_path) == image_folder


def test_pictures_of_any_data_set_become_the_same_as_files(tiny_data, tmp_path):
    from ghostnet.data.datasets import FashionMnist, ImageFolder

    cfg = door.check(["start", "data=fashion_mnist", f"data.root={tiny_data}"]).cfg
    written, own = ImageFolder("val", str(data.folder(cfg, None, tmp_path))), FashionMnist("val", str(tiny_data))
    order = own.labels.argsort(kind="stable")
    assert written.labels.tolist() == own.labels[order].tolist()
    for place, index in enumerate(order.tolist()):
        assert (written.image(place).cut() == own.image(index).cut()).all()


def test_the_peak_of_memory_and_the_cpu_seconds_are_those_of_all_processes(tmp_path):
    worker = "import time; block = bytearray(b'x') * (64 << 20); end = time.process_time() + 0.3\n"
    worker += "while time.process_time() < end: pass\ntime.sleep(0.5)"
    code = f"import subprocess, sys; [p.wait() for p in [subprocess.Popen([sys.executable, '-c', {worker!r}])"
    code += " for _ in range(2)]]"
    read = vars
    found = measure(Subject("two", lambda folder: [sys.executable, "-c", code], read), tmp_path / "round")
    assert 128 << 20 < found["memory"] < 256 << 20
    assert 0.6 <= found["cpu_seconds"] < 3
    assert found["seconds"] > 0.5


def test_a_subject_that_fails_says_why_in_its_own_words(tmp_path):
    code = "import sys; sys.exit('Traceback\\nerror: no data.\\n  give some')"
    with pytest.raises(Failed, match=r"^bad: no data\.\n  give some$"):
        measure(Subject("bad", lambda folder: [sys.executable, "-c", code], vars), tmp_path / "round")
    spec = {"cfg": {"data": {"dataset": {"_target_": "ghostnet.data.datasets.ImageFolder", "root": "/nowhere"}}}}
    spec["cfg"] |= {"seed": 1}
    with pytest.raises(Failed, match=r"data\.root=/nowhere does not exist"):
        measure(child("ours", "loader.ours", spec), tmp_path / "child")


def test_a_peer_that_fails_is_left_out_and_ours_ends_the_benchmark(tmp_path):
    def made(name, code, peer=None):
        return Subject(name, lambda folder: [sys.executable, "-c", code], lambda done: {"seconds": 1.0}, peer=peer)

    case, left_out = door.check(["loader", "rounds=2"]), {}
    rows = benchmark.rounds(case, [made("a", ""), made("b", "raise ValueError(3)", "timm")], left_out, tmp_path / "1")
    assert (list(rows), len(rows["a"]), left_out) == (["a"], 2, {"b": "ValueError: 3"})
    with pytest.raises(Failed):
        benchmark.rounds(case, [made("a", "raise ValueError(3)")], {}, tmp_path / "2")


def test_peers_that_are_not_installed_are_named(monkeypatch, image_folder, tmp_path):
    monkeypatch.setattr(benchmark, "absent", lambda name: None if name == "timm" else "not installed")
    case = door.check(["loader", "device=cpu", f"data.root={image_folder}", "peers=timm,spdl"])
    subjects, left_out = benchmark.chosen(case, tmp_path)
    assert left_out == {"spdl": "not installed"}
    assert {subject.peer for subject in subjects} == {None, "timm"}


def test_timm_is_left_out_of_a_model_that_it_does_not_have(tmp_path):
    subjects, left_out = benchmark.chosen(door.check(["step", "device=cpu", "model.width=0.7"]), tmp_path)
    assert [subject.name for subject in subjects] == ["ours"]
    assert "not 0.7" in left_out["timm"]


def row(name, peer=None, **metrics):
    return Subject(name, list, dict, peer=peer), [metrics]


def collected(*rows, unit="images/s"):
    head = {"benchmark": "x", "command": "x", "rounds": 1, "unit": unit}
    head["machine"] = {"cpu": "c", "cpus": 1, "device": "cpu", "torch": "2", "date": "2026-01-01"}
    return results.collect(head, [s for s, _ in rows], {s.name: m for s, m in rows}, {})


def test_ratios_tell_how_many_times_as_fast_ours_is():
    speeds = collected(row("ours", speed=30.0), row("peer", "timm", speed=20.0))
    assert speeds["subjects"][1]["ratio"] == 1.5
    seconds = collected(row("ours", seconds=2.0), row("peer", "timm", seconds=3.0), unit="seconds")
    assert seconds["subjects"][1]["ratio"] == 1.5


def test_efficiency_is_a_devices_speed_as_a_share_of_the_first():
    scaled = collected(row("1", speed=100.0, devices=1), row("4", speed=300.0, devices=4))
    assert [r["efficiency"] for r in scaled["subjects"]] == [1.0, 0.75]


def test_bars_of_the_page_are_as_long_as_the_numbers_and_every_text_is_escaped():
    result = collected(row("<b>&", speed=100.0, memory=2 << 30), row("p", "timm", speed=50.0, memory=1 << 30))
    text = report.page(result)
    page = Page(text)
    assert "<b>" not in text
    assert [name for name in page.labels if not name[0].isdigit()] == ["<b>&", "p"] * 2
    assert page.bars == [report.BAR, report.BAR / 2] * 2
    assert "prefers-color-scheme: dark" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "spdl"])
def test_other_loaders_read_the_same_folder(name, image_folder, tmp_path):
    pytest.importorskip(name)
    cfg = door.check(["loader", *SMALL, f"data.root={image_folder}"]).cfg
    spec = {"cfg": cfg, "root": str(image_folder), "seconds": 0.1, "workers": 1}
    assert measure(child(name, f"peers.{name}", spec, peer=name), tmp_path / "round")["speed"] > 0


def test_webdataset_reads_shards(tmp_path, image_folder):
    wds = pytest.importorskip("webdataset")
    (tmp_path / "train").mkdir()
    with wds.TarWriter(str(tmp_path / "train" / "0.tar")) as tar:
        for number, path in enumerate(sorted(image_folder.glob("train/*/*.jpg"))):
            tar.write({"__key__": f"{number:04}", "jpg": path.read_bytes(), "cls": number % 4})
    cfg = door.check(["loader", *SMALL, f"data.root={tmp_path}"]).cfg
    spec = {"cfg": cfg, "root": str(tmp_path), "seconds": 0.1, "workers": 1}
    assert measure(child("wds", "peers.webdataset", spec, peer="webdataset"), tmp_path / "round")["speed"] > 0


def test_shards_are_for_webdataset_and_folders_for_the_others():
    cfg = door.check(["loader", "data.workers=2"]).cfg | {}
    found, left_out = peers.loaders(cfg, None, 1.0, list(peers.PEERS))
    assert [subject.peer for subject in found] == ["webdataset"]
    assert set(left_out) == {"timm", "torchvision", "spdl"}
    found, left_out = peers.loaders(cfg, Path("/photos"), 1.0, list(peers.PEERS))
    assert [subject.peer for subject in found] == ["timm", "timm", "torchvision", "spdl"]
