"""What a training step costs on a card, and its optimizers there: on the strict stand-in for torch_npu."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from ghostnet import checkpoint
from tests.conftest import REPOSITORY, environment
from tests.test_npu import NPU, SHORT, TWO, assert_same_state, rows

LAUNCHES = """
import json, sys
import torch
import ghostnet
from hydra import compose, initialize_config_dir
from torch.utils._python_dispatch import TorchDispatchMode
from ghostnet import device, engine
from ghostnet.config import build, build_model, resolved

VIEWS = "as_strided contiguous detach empty empty_like empty_strided expand new_empty_strided permute select slice"
VIEWS = {*VIEWS.split(), *"split split_with_sizes squeeze t transpose unbind unsqueeze view _unsafe_view".split()}

class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

class Never:
    def check(self, error):
        pass

with initialize_config_dir(f"{sys.argv[1]}/conf", version_base="1.3"):
    cfg = resolved(compose("train", ["data=synthetic", "data.image_size=64", *sys.argv[2:]]))
assert device.choose("npu")[0] == "npu"
card = device.resolve("npu")
model = build_model(cfg["model"], 1000).to(card)
amp = build(cfg["amp"])
optimizer = amp.initialize(model, lambda named: build(cfg["optim"] | {"lr": 0.1}, named), card)
data = cfg["data"]
recipe = engine.Recipe(build(data["preprocessing"]), build(data["mix"]), lambda step: 0.1, 0, 0.1, 2.0, 1)
state = engine.TrainState(model, optimizer, amp, None, card, on_nan=cfg["on_nan"])
state.parallel.train()
images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8).to(card)
batch = images, torch.tensor([3, 5]).to(card)
from torch_npu import counters
for _ in range(3):
    with Launches() as launches:
        before = counters.snapshot()["synchronizations"]
        engine._update(state, iter([batch]), recipe, Never())
        after = counters.snapshot()["synchronizations"]
waits = {kind: count - before.get(kind, 0) for kind, count in after.items() if count != before.get(kind, 0)}
print(json.dumps({"launches": launches.names, "waits": waits, "optimizer": type(optimizer).__name__,
                  "fused": bool(optimizer.defaults.get("fused"))}))
"""


def step_on_a_card(*words, **settings):
    """What the third step of GhostNet 1.0x launches and waits for, on the stand-in."""
    env = environment() | {"PYTHONPATH": os.pathsep.join([NPU, str(REPOSITORY)]), "OMP_NUM_THREADS": "1"} | settings
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, str(REPOSITORY), *words], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("amp", "most"), [("none", 625), ("o2", 650), ("fp16", 835)])
def test_a_step_of_ghostnet_launches_no_more_operations_on_a_card_than_these(amp, most):
    """Counted where torch dispatches, without views, allocations and detach, with clipping and the look at NaN."""
    found = step_on_a_card(f"amp={amp}")
    kinds = Counter(found["launches"])
    assert len(found["launches"]) <= most, kinds
    assert kinds["convolution"] == kinds["convolution_backward"] == 95  # none is computed again
    assert kinds["clone"] == 0
    assert kinds["add_"] <= 20  # none of BatchNorm's counts of batches


@pytest.mark.parametrize("generation", ["1", "2"])
@pytest.mark.parametrize(
    "words",
    [
        ["amp=fp16"],
        ["amp=o2", "amp.loss_scale=dynamic"],
        ["amp=none", "on_nan=skip"],
        ["amp=o2", "amp.loss_scale=dynamic", "on_nan=skip", "optim=rmsprop"],
        ["amp=fp16", "optim=npu_fused_sgd"],
        ["amp=fp16", "optim=adamw"],
    ],
    ids=" ".join,
)
def test_no_step_waits_for_the_card_under_a_dynamic_scale_or_on_nan_skip(words, generation):
    found = step_on_a_card(*words, "model.width=0.2", EMULATED_NPU_GENERATION=generation)
    assert found["waits"] == {}


def test_the_default_optimizer_is_fused_where_the_card_has_a_kernel_for_it():
    small = ["amp=none", "model.width=0.2"]
    assert step_on_a_card(*small)["fused"]
    assert not step_on_a_card(*small, "optim.momentum=0")["fused"]
    assert not step_on_a_card(*small, EMULATED_NPU_GENERATION="1")["fused"]
    assert step_on_a_card(*small, "optim=npu_fused_sgd", EMULATED_NPU_GENERATION="1")["optimizer"] == "NpuFusedSGD"


def trained(run, tmp_path, name, *words, **settings):
    done = run("train.py", *SHORT, *words, f"hydra.run.dir={name}", PYTHONPATH=NPU, **settings)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_card_without_the_fused_kernel_trains_as_optim_sgd_and_says_so(run, tmp_path, tiny_data):
    words = [f"data.root={tiny_data}", "device=npu_1p", "amp=none"]
    first = trained(run, tmp_path, "first", *words, EMULATED_NPU_GENERATION="1")
    assert "note    optim=fused_sgd: Ascend910A has no kernel for it; computed as optim=sgd" in first
    no_momentum = trained(run, tmp_path, "momentum", *words, "optim.momentum=0")
    assert "note    optim=fused_sgd: its kernel for NPUs wants a momentum; computed as optim=sgd" in no_momentum
    assert "note    optim" not in trained(run, tmp_path, "second", *words)
    assert "note    optim" not in trained(run, tmp_path, "sgd", *words, "optim=sgd", EMULATED_NPU_GENERATION="1")
    assert rows(tmp_path / "first") == rows(tmp_path / "sgd")


@pytest.mark.slow
@pytest.mark.parametrize("cards", [1, 2])
@pytest.mark.parametrize("amp", ["none", "o2"])
def test_npu_fused_sgd_trains_the_bits_of_sgd_and_resumes(run, tmp_path, tiny_data, amp, cards):
    words = [f"data.root={tiny_data}", *(TWO if cards == 2 else ["device=npu_1p"]), f"amp={amp}", "clip_grad_norm=0.5"]
    for optim in ("sgd", "npu_fused_sgd"):
        trained(run, tmp_path, optim, *words, f"optim={optim}", "epochs=2")
    assert rows(tmp_path / "npu_fused_sgd") == rows(tmp_path / "sgd")
    assert_same_weights(tmp_path / "npu_fused_sgd", tmp_path / "sgd")
    trained(run, tmp_path, "half", *words, "optim=npu_fused_sgd")
    trained(run, tmp_path, "half", *words, "optim=npu_fused_sgd", "epochs=2", "resume=auto")
    again = trained(run, tmp_path, "whole", *words, "optim=npu_fused_sgd", "save_every=5", "epochs=2")
    assert "Final Train Accuracy" in again
    assert_same_state(tmp_path / "whole" / "last.pt", tmp_path / "npu_fused_sgd" / "last.pt")


def assert_same_weights(one, other):
    import torch

    ours, theirs = (checkpoint.load(folder / "last.pt")["model"] for folder in (one, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_npu_fused_sgd_elsewhere_ends_before_data_are_read(run, tmp_path, tiny_data):
    done = run("train.py", *SHORT, f"data.root={tiny_data}", "device=cpu", "optim=npu_fused_sgd")
    assert done.returncode == 1
    assert done.stderr.startswith("error: optim=npu_fused_sgd")
    assert "Traceback" not in done.stderr
