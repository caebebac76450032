"""The NPU path: whole commands on a stand-in for torch_npu (tests/emulated_npu), whose devices compute on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
import torch
from omegaconf import OmegaConf

from ghostnet import checkpoint
from tests.conftest import REPOSITORY, TINY, environment
from tests.test_distributed import left_over, start, wait_for_step
from tests.test_train import HARD, assert_same_state, result, rows

NPU = str(REPOSITORY / "tests" / "emulated_npu")
CPU = os.pathsep.join([str(REPOSITORY / "tests" / "contiguous"), str(REPOSITORY)])
"""On the CPU, what computes in the NPU's memory format."""
SHORT = [word for word in TINY if not word.startswith("device=")] + ["epochs=1"]
TWO = ["device=npu_8p", "device.count=2", "data.batch_size=16"]
STEP = {"amp.py", "ema.py", "ghostnet.py", "layers.py", "loader.py", "metrics.py", "optim.py", "transforms.py"}
STEP |= {"nonfinite.py", "loss_scale.py"}
"""The files whose work is done in every step, but for metrics.py, which is where a log reads."""


@pytest.fixture(scope="module", autouse=True)
def _built():
    """Compile the stand-in once, before tests with time limits do."""
    env = environment() | {"PYTHONPATH": NPU, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", "import torch, torch_npu"], env=env, check=True, timeout=300)


def reports(folder):
    """What the processes that used cards counted, by rank."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted((report for report in found if report["ops"]), key=lambda report: report["rank"] or 0)


def assert_the_step_never_waits(report, steps, logs):
    """No synchronisation but where a log reads, two copies to the device a step, both without waiting."""
    waits, copies = Counter(), Counter()
    for _, kind, detail, caller in (row for row in report["trace"] if len(row) == 4):
        file, _, place = caller.partition(":")
        where = f"{file} {place.partition(' ')[2]}"
        if kind == "synchronization" and "other thread" not in detail:
            waits[where] += 1
        elif kind == "h2d":
            copies[where, "non_blocking" in detail] += 1
    # Once each: normalisation's constants, and what DistributedDataParallel looks at when it starts.
    once = [
        where for where in ("transforms.py _constants", "transforms.py _neighbours", "amp.py forward") if waits[where]
    ]
    assert sum(waits.pop(where) for where in once) <= 8
    assert waits["metrics.py read"] == logs
    reads = {"metrics.py read", "metrics.py state_dict", "loss_scale.py state_dict", "loss_scale.py now"}
    reads = (reads | {"nonfinite.py read", "nonfinite.py _first_bad", "nonfinite.py skipped"}) & set(waits)
    in_steps = {where for where in waits if where.split()[0] in STEP or where.split()[1:] in (["_update"], ["train"])}
    assert in_steps == reads, waits
    batches = copies["device.py <listcomp>", True] + copies["device.py copy_to", True]
    assert 2 * steps <= batches <= 2 * steps + 8  # and those of the evaluations
    assert not copies["device.py <listcomp>", False] + copies["device.py copy_to", False]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("amp", [pytest.param("none", marks=SLOW), pytest.param("bf16", marks=SLOW), "fp16"])
def test_a_card_trains_the_bits_of_the_cpu_and_the_step_never_waits(run, tmp_path, tiny_data, amp):
    words = [*SHORT, *HARD, f"data.root={tiny_data}", f"amp={amp}", "log_every=5"]
    cpu = run("train.py", *words, "device=cpu", "hydra.run.dir=cpu", PYTHONPATH=CPU)
    assert cpu.returncode == 0, cpu.stderr
    settings = {"PYTHONPATH": NPU, "EMULATED_NPU_REPORT": str(tmp_path), "EMULATED_NPU_TRACE": "1"}
    npu = run("train.py", *words, "device=npu_1p", "hydra.run.dir=npu", **settings)
    assert (npu.returncode, npu.stderr) == (0, "")
    assert "device  npu:0: Ascend910B2" in npu.stdout
    assert result(tmp_path / "npu")["device"] == "npu"
    assert result(tmp_path / "npu")["memory"][0] > 100_000
    assert rows(tmp_path / "npu") == rows(tmp_path / "cpu")
    assert_same_state(tmp_path / "npu" / "last.pt", tmp_path / "cpu" / "last.pt")
    (report,) = reports(tmp_path)
    setup = report["setup"]
    assert setup.index("first tensor") > setup.index("set_compile_mode(jit_compile=False)")
    assert setup.index("first tensor") > setup.index("config.allow_internal_format=False")
    assert report["ops"]["aten::convolution_backward"] >= 20 * 50
    assert_the_step_never_waits(report, steps=20, logs=2)

    again = run("evaluate.py", "ckpt=npu", *TWO[:2], PYTHONPATH=NPU, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    printed = json.loads(again.stdout.splitlines()[-1])
    assert (printed["top1"], printed["world_size"]) == (result(tmp_path / "cpu")["top1"], 2)


@pytest.mark.parametrize("loss_scale", [pytest.param("128.0", marks=pytest.mark.slow), "dynamic"])
def test_two_cards_under_o2_reduce_half_gradients_by_hccl_and_resume_bit_exactly(run, tmp_path, tiny_data, loss_scale):
    words = [*SHORT, *HARD, *TWO, "data.batch_size=8", f"data.root={tiny_data}", f"amp.loss_scale={loss_scale}"]
    words += ["device.ids=[1,0]", "log_every=5"]
    settings = {"PYTHONPATH": NPU, "EMULATED_NPU_REPORT": str(tmp_path), "EMULATED_NPU_TRACE": "1"}
    done = run("train.py", *words, "hydra.run.dir=whole", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert "device  npu:1: Ascend910B2, contiguous_format; 2 ranks" in done.stdout
    assert result(tmp_path / "whole")["amp"] == "o2"
    both = reports(tmp_path)
    assert [report["rank"] for report in both] == [0, 1]
    for report, card in zip(both, (1, 0), strict=True):
        assert f"set_device({card})" in report["setup"]
        assert report["allreduce_dtypes"]["float16"] >= 10  # the weights'
        assert report["allreduce_dtypes"]["float32"] >= 10  # BatchNorm's
        assert report["allreduce_dtypes"]["float16"] < 20  # accumulated gradients are reduced once
        assert_the_step_never_waits(report, steps=20, logs=2)

    process = start(*words, "hydra.run.dir=cut", cwd=tmp_path, PYTHONPATH=NPU)
    wait_for_step(process, tmp_path / "cut", 5)
    signum = signal.SIGTERM if loss_scale == "dynamic" else signal.SIGINT
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    resumed = run("train.py", *words, "hydra.run.dir=cut", "resume=auto", PYTHONPATH=NPU)
    assert resumed.returncode == 0, resumed.stderr
    assert 5 <= int(re.search(r"resume  .*, step (\d+) of 10", resumed.stdout)[1]) < 10
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert_same_state(tmp_path / "cut" / "last.pt", tmp_path / "whole" / "last.pt")


@pytest.mark.slow
def test_two_cards_train_the_bits_of_two_ranks_on_the_cpu(run, tmp_path, tiny_data):
    words = [*SHORT, f"data.root={tiny_data}", "data.batch_size=16", "amp=none"]
    assert run("train.py", *words, "device=cpu_2p", "hydra.run.dir=cpu", PYTHONPATH=CPU).returncode == 0
    assert run("train.py", *words, *TWO, "hydra.run.dir=npu", PYTHONPATH=NPU).returncode == 0
    assert rows(tmp_path / "npu") == rows(tmp_path / "cpu")
    assert_same_state(tmp_path / "npu" / "last.pt", tmp_path / "cpu" / "last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("cards", [1, 2])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16", "o2"])
@pytest.mark.parametrize("experiment", ["quickstart", "fashion_mnist"])  # 32 px, whose last stage is 1 by 1, and 48 px
def test_the_experiments_train_resume_and_evaluate_in_every_precision(run, tmp_path, tiny_data, experiment, amp, cards):
    place = TWO[:2] if cards == 2 else ["device=npu_1p"]
    words = [*place, f"amp={amp}", f"data.root={tiny_data}", "data.workers=1", "data.eval_batch_size=50"]
    train = [f"experiment={experiment}", *words, "model.width=0.1", f"data.batch_size={40 // cards}", "log_every=4"]
    for epochs in (2, 3):
        more = ["schedule.warmup_epochs=1", "eval_every=1", "hydra.run.dir=run", f"epochs={epochs}", "resume=auto"]
        done = run("train.py", *train, *more, PYTHONPATH=NPU)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert [row["step"] for row in rows(tmp_path / "run") if "eval/top1" in row] == [8, 16, 24]
    done = run("evaluate.py", "ckpt=run/last.pt", *words, PYTHONPATH=NPU)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    last = rows(tmp_path / "run")[-1]
    assert f"Acc@1 {last.get('ema/top1', last['eval/top1']):.3f}" in done.stdout


@pytest.mark.slow
def test_synchronised_batchnorm_on_two_cards_is_that_of_the_whole_batch(run, tmp_path, tiny_data):
    words = [*SHORT, f"data.root={tiny_data}", "amp=none", "model.dropout=0", "log_every=1"]
    assert run("train.py", *words, "device=npu_1p", "hydra.run.dir=one", PYTHONPATH=NPU).returncode == 0
    done = run("train.py", *words, *TWO, "sync_bn=true", "hydra.run.dir=two", PYTHONPATH=NPU)
    assert done.returncode == 0, done.stderr
    one, two = ([row["train/loss"] for row in rows(tmp_path / name)[:2]] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    ranks = checkpoint.load(tmp_path / "two" / "last.pt")["ranks"]
    torch.testing.assert_close(ranks[0]["statistics"], ranks[1]["statistics"], rtol=0, atol=0)


@pytest.mark.slow
def test_a_sweep_over_precisions_runs_on_two_cards_each(run, tmp_path, tiny_data):
    words = ["-m", *SHORT, *TWO, f"data.root={tiny_data}", "amp=o2,fp16", "hydra.sweep.dir=sweep"]
    done = run("train.py", *words, PYTHONPATH=NPU)
    assert (done.returncode, done.stderr) == (0, "")
    found = [result(tmp_path / "sweep" / f"amp={amp}") for amp in ("o2", "fp16")]
    assert [(job["amp"], job["world_size"], job["device"]) for job in found] == [("o2", 2, "npu"), ("fp16", 2, "npu")]


@pytest.mark.slow
def test_jobs_at_once_have_cards_of_their_own(run, tmp_path, tiny_data):
    words = ["-m", *SHORT, "device=npu_1p", "data.batch_size=16", f"data.root={tiny_data}", "seed=1,2", "sweep=two"]
    words += ["hydra/launcher=joblib"]
    done = run("train.py", *words, "hydra.launcher.n_jobs=2", PYTHONPATH=NPU)
    assert (done.returncode, done.stderr) == (0, "")
    configs = [OmegaConf.load(tmp_path / "multirun" / "two" / f"seed={seed}" / "config.yaml") for seed in (1, 2)]
    assert sorted(config.device.ids[0] for config in configs) == [0, 1]
    many = run("train.py", *words, "hydra.launcher.n_jobs=99", PYTHONPATH=NPU)
    assert many.returncode == 1
    assert "hydra.launcher.n_jobs=99: jobs of 1 cards at once" in many.stderr


OVERFLOW = """
import math, torch, ghostnet
from ghostnet import device, loss_scale, optim
assert device.choose("npu") == ("npu", "as asked")
card = device.resolve("npu")
weight = torch.ones(3, device=card, requires_grad=True)
optimizer = optim.fused_sgd([("weight", weight)], lr=1.0, momentum=0.9, weight_decay=0.0, nesterov=False)
scaler = loss_scale.grad_scaler(card)
for factor in (math.inf, 1.0):
    scaler.scale(weight.sum() * factor).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    print(weight.tolist(), scaler.get_scale())
"""


def test_an_overflow_on_a_card_that_saturates_skips_a_fused_step_and_prints_nothing():
    env = environment() | {"PYTHONPATH": os.pathsep.join([NPU, str(REPOSITORY)]), "EMULATED_NPU_GENERATION": "1"}
    done = subprocess.run([sys.executable, "-c", OVERFLOW], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[1.0, 1.0, 1.0] 32768.0", "[0.0, 0.0, 0.0] 32768.0"], done.stderr


@pytest.mark.slow
def test_cards_that_saturate_get_their_own_gradscaler_and_no_bf16(run, tmp_path, tiny_data):
    words = [*SHORT, *TWO, f"data.root={tiny_data}"]
    settings = {"PYTHONPATH": NPU, "EMULATED_NPU_GENERATION": "1"}
    for amp in ("o2", "fp16"):
        done = run("train.py", *words, f"amp={amp}", "amp.loss_scale=dynamic", f"hydra.run.dir={amp}", **settings)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Ascend910A" in done.stdout
        scale = checkpoint.load(tmp_path / amp / "last.pt")["amp"]
        assert 0 < scale["scale"] <= 2.0**16
    done = run("train.py", *words, "amp=bf16", **settings)
    assert done.returncode == 1
    assert done.stderr == "error: amp=bf16: Ascend910A has no bfloat16. Use amp=fp16 or amp=o2.\n"


SET_UP = """
import copy, sys, torch, ghostnet
from ghostnet import device
assert device.choose("npu")[0] == "npu"
card = device.resolve("npu", 0, {"None": None, "True": True, "False": False}[sys.argv[1]])
copied = torch.storage.TypedStorage._deepcopy

def deepcopy(self, memo):  # as the real torch_npu has it
    self.device
    return copied(self, memo)

torch.storage.TypedStorage._deepcopy = deepcopy
copy.deepcopy(torch.nn.BatchNorm2d(3).to(card))
print(torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32)
"""


@pytest.mark.parametrize(("asked", "then"), [(None, "True False"), (True, "True True"), (False, "False False")])
def test_a_card_is_set_up_with_hf32_as_asked_and_copies_of_buffers_warn_of_nothing(asked, then):
    env = environment() | {"PYTHONPATH": os.pathsep.join([NPU, str(REPOSITORY)])}
    command = [sys.executable, "-W", "error", "-c", SET_UP, str(asked)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == (then, "")


def test_compiling_for_cards_names_what_is_missing_before_the_data_are_read(run, tiny_data):
    for word, way_out in (("compile=true", "pip install triton-ascend"), ("compile=npugraph", "no such backend")):
        done = run("train.py", *SHORT, f"data.root={tiny_data}", "device=npu_1p", word, PYTHONPATH=NPU)
        assert done.returncode == 1
        assert way_out in done.stderr
        assert done.stderr.count("\n") == 1
        assert "data  " not in done.stdout


ABORT = """
import os, pathlib
if "TORCH_DEVICE_BACKEND_AUTOLOAD" in os.environ:  # which the doctor leaves out of its look at other programs
    pathlib.Path(__file__).with_name("imported").touch()
os.abort()
"""
TRAIN, TOOL = str(REPOSITORY / "train.py"), "ghostnet.tools."
BESIDE_CUDA_BUILD = {
    (TRAIN, "device=npu_1p"): 1,
    (TRAIN, " ".join(TWO)): 1,
    (TRAIN, "device=auto"): 1,
    (TRAIN, "-m seed=1,2 device=auto"): 1,
    (TRAIN, "-m seed=1,2 device=auto hydra/launcher=joblib hydra.launcher.n_jobs=2"): 1,
    (TRAIN, "device=cpu_2p data.batch_size=16 hydra.run.dir=two"): 0,
    ("-m", f"{TOOL}plan", "device=auto"): 0,
    ("-m", f"{TOOL}doctor", "device=npu_1p"): 1,
    ("-m", f"{TOOL}doctor", "device=auto"): 1,
    ("-m", f"{TOOL}benchmark", "step device=auto"): 1,
}
"""Commands -> their exit codes, without a card."""


@pytest.mark.slow
@pytest.mark.parametrize("words", BESIDE_CUDA_BUILD, ids=lambda words: " ".join(words[-2:]).rpartition("/")[2])
def test_no_process_imports_torch_npu_beside_a_cuda_build_of_torch_which_would_abort_it(tmp_path, tiny_data, words):
    package(tmp_path / "packages", "torch==" + torch.__version__.partition("+")[0], ABORT)
    path = os.pathsep.join([str(tmp_path / "packages"), NPU, str(REPOSITORY)])
    env = environment() | {"PYTHONPATH": path, "EMULATED_NPU_CUDA_BUILD": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    program, own = words[:-1], words[-1]
    small = [] if "benchmark" in program[-1] else [*SHORT, f"data.root={tiny_data}"]
    done = subprocess.run(
        [sys.executable, *program, *small, *own.split()],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == BESIDE_CUDA_BUILD[words], done.stderr
    assert not (tmp_path / "packages" / "torch_npu" / "imported").exists()
    said = " ".join((done.stdout + done.stderr).split())
    assert ("needs the CPU build of torch" in said) == ("device=cpu_2p" not in own)
    assert "Traceback" not in said


def package(folder, requires, code="raise RuntimeError('not to be imported')\n"):
    info = folder / "torch_npu-2.0.0.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", "Name: torch_npu", "Version: 2.0.0", f"Requires-Dist: {requires}", ""]
    (info / "METADATA").write_text("\n".join(lines))
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(code)
    points = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
    (info / "entry_points.txt").write_text(points)


@pytest.mark.slow
def test_four_ways_of_having_no_npu_are_told_apart_each_with_its_way_out(run, tmp_path, tiny_data):
    package(tmp_path / "other", "torch==2.0.0")
    cases = {
        "torch_npu is not installed: pip install -r requirements-npu.txt.": {},
        "torch_npu can't find CANN (libhccl.so: cannot open shared object file: No such file or directory): source "
        "/usr/local/Ascend/cann/set_env.sh": {"PYTHONPATH": NPU, "EMULATED_NPU_CANN": "0"},
        "torch_npu and CANN are there, but no card is: check npu-smi info": {
            "PYTHONPATH": NPU,
            "EMULATED_NPU_COUNT": "0",
        },
        f"torch_npu 2.0.0 goes with torch ==2.0.0, but torch {torch.__version__} is installed: pip install -r": {
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "other"), NPU])
        },
    }
    for message, settings in cases.items():
        for device in ("npu_1p", "npu_8p") if not settings else ("npu_8p",):
            done = run("train.py", *SHORT, f"data.root={tiny_data}", f"device={device}", **settings)
            assert done.returncode == 1
            assert done.stderr.startswith(f"error: device=npu_…: {message}"), done.stderr
            assert done.stderr.endswith("To run without a card: device=cpu\n")
            assert done.stderr.count("\n") == 1
        assert not list(tmp_path.glob("outputs/*/*"))
    # Everywhere else it is no hindrance: not even to a plain `device=cpu`.
    words = [*SHORT, f"data.root={tiny_data}", "hydra.run.dir=cpu", "device=auto"]
    done = run("train.py", *words, PYTHONPATH=NPU, EMULATED_NPU_CANN="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"device  cpu: .* \(auto: torch_npu can't find CANN .*; no CUDA card is visible\)", done.stdout)


@pytest.mark.slow
def test_auto_takes_an_npu_where_there_is_one_and_cards_that_are_missing_are_named(run, tmp_path, tiny_data):
    words = [*SHORT, f"data.root={tiny_data}"]
    done = run("train.py", *words, "device=auto", "hydra.run.dir=auto", PYTHONPATH=NPU)
    assert done.returncode == 0, done.stderr
    assert "device  npu:0: Ascend910B2, contiguous_format (auto: an NPU is there)" in done.stdout
    for more, message in (
        (["device.count=2"], "device.count=2: npu card 1 is not there; card 0 is. Give device.count=1, or device.ids"),
        (["device.count=1", "device.ids=[3]"], "device.ids=[3]: npu card 3 is not there; card 0 is."),
    ):
        done = run("train.py", *words, "device=npu_8p", *more, PYTHONPATH=NPU, EMULATED_NPU_COUNT="1")
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {message}"), done.stderr
        assert not list(tmp_path.glob("outputs/*/*"))


def test_a_rank_that_dies_on_its_card_ends_the_run_with_its_reason(tmp_path, tiny_data):
    words = [*SHORT, *TWO, f"data.root={tiny_data}", "epochs=200", "hydra.run.dir=here"]
    process = start(*words, cwd=tmp_path, PYTHONPATH=NPU)
    wait_for_step(process, tmp_path / "here", 12)
    ranks = [p for p in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(p.cmdline())]
    before = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err[:31]) == (1, "error: rank 1 was killed by SIG")
    assert time.monotonic() - before < 15
    assert left_over(process.pid) == []
