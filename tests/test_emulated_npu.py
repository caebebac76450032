"""The stand-in torch_npu, which the other tests take for a card; each test in its own process: a backend loads once."""

import copy
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def python(*arguments, **environment):
    """Run Python with the stand-in on its path and warnings as errors."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("EMULATED_NPU_") or "CACHE" in key},
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "emulated_npu"), str(ROOT)]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def apart(body):
    """The test whose body runs in a process of its own, which writes nothing to stderr."""

    @functools.wraps(body)
    def test():
        result = python(body.__code__.co_filename, body.__name__)
        assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr

    return test


def load(**environment):
    os.environ.update(environment)
    import torch_npu

    return torch_npu


def difference(before, after):
    return {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}


def assert_same(a, b):
    """Both the same bits, in nested containers of tensors and numbers, wherever the tensors are."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.detach().cpu(), b.detach().cpu())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


# ---------------------------------------------------------------- one card


def ghostnet():
    """GhostNet, which computes on the CPU what it does on a card: nothing again, by PyTorch's own kernels."""
    from ghostnet.models import layers

    layers.computes_again = layers.lacks_kernels = lambda device: False
    from ghostnet.models.ghostnet import GhostNet

    return GhostNet(num_classes=10, width=0.35, dropout=0.2)


def train(device, make_optimizer, steps=2):
    """Everything that GhostNet's training steps on a device leave behind."""
    torch.manual_seed(1)
    model = ghostnet()
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    model, images, labels = model.to(device), images.to(device), labels.to(device)
    optimizer = make_optimizer(model.parameters())
    torch.manual_seed(2)  # the CPU's random numbers made the weights, the card's are fresh: dropout needs the same
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        losses += [loss, norm]
    gradients = [parameter.grad for parameter in model.parameters()]
    return losses, gradients, model.state_dict(), optimizer.state_dict()["state"]


@apart
def test_a_training_step_on_npu_is_bit_equal_to_the_cpu():
    counters = load().counters
    for make_optimizer in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=True),
        lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
        lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, eps=1e-3, foreach=True),
    ):
        reference, before = train("cpu", make_optimizer), counters.snapshot()["ops"]
        result = train("npu", make_optimizer)
        assert_same(reference, result)
        assert result[2]["conv_stem.weight"].device == torch.device("npu", 0)
        ran = difference(before, counters.snapshot()["ops"])
        assert ran["aten::convolution"] == 2 * sum(
            name.endswith("weight") and w.dim() == 4 for name, w in result[2].items()
        )
        assert ran["aten::convolution_backward"] == ran["aten::convolution"]
    assert any(name.startswith("aten::_foreach_") for name in ran)
    assert not torch.equal(train("npu", make_optimizer, 1)[0][0].cpu(), torch.zeros(()))


@apart
def test_fused_and_foreach_optimizers_equal_the_cpus_with_their_loss_scale():
    load()
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(3)]

    def steps(device, kind, **options):
        parameters = [nn.Parameter(p.to(device, copy=True)) for p in start]
        optimizer = getattr(torch.optim, kind)(parameters, lr=0.05, weight_decay=0.01, **options)
        scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2)
        scales = []
        for number, step in enumerate(gradients):
            scaler.scale(torch.ones((), device=device))
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = (gradient * 8).to(device)
            if number == 1:
                parameters[0].grad[0, 0] = float("inf")  # this step is skipped
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return parameters, optimizer.state_dict()["state"], scales

    for kind, options in (
        ("SGD", {"fused": True, "momentum": 0.9}),
        ("SGD", {"foreach": True, "momentum": 0.9, "nesterov": True}),
        ("AdamW", {"foreach": True}),
        ("RMSprop", {"foreach": True, "momentum": 0.9}),
    ):
        reference, result = steps("cpu", kind, **options), steps("npu", kind, **options)
        assert_same(reference, result)
        assert result[2] == [8.0, 4.0, 4.0]
        assert not torch.equal(result[0][1].detach().cpu(), start[1])

    a = [torch.randn(4, generator=generator), torch.randn(2, 2, generator=generator)]
    results = []
    for device in ("cpu", "npu"):
        one, two = [t.to(device, copy=True) for t in a], [(t + 1).to(device) for t in a]
        torch._foreach_lerp_(one, two, 0.25)
        torch._foreach_div_(two, torch.full((), 3.0, device=device))
        torch._foreach_copy_(two[:1], one[:1])
        found, scale = torch.zeros((), device=device), torch.full((), 4.0, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(one, found, torch.full((), 0.1, device=device))
        torch._amp_update_scale_(scale, torch.zeros((), dtype=torch.int32, device=device), found, 2.0, 0.5, 1)
        results.append([one, two, found, scale])
    assert_same(*results)
    assert results[1][3].device.type == "npu"


@apart
def test_devices_streams_events_memory_and_random_numbers():
    torch_npu = load(EMULATED_NPU_COUNT="3")
    npu = torch.npu
    assert npu is torch_npu.npu
    assert torch_npu.__version__ == "2.14.0"
    assert torch.accelerator.current_accelerator().type == "npu"
    assert npu.is_available()
    assert npu.device_count() == 3
    assert (npu.get_device_name(0), npu.is_bf16_supported(), torch_npu.npu.utils.is_support_inf_nan()) == (
        "Ascend910B2",
        True,
        True,
    )
    assert npu.get_device_properties(1).total_memory == npu.mem_get_info(1)[1] > 1 << 30

    npu.set_device(2)
    assert npu.current_device() == 2
    assert torch.ones(1, device="npu").device.index == 2
    with npu.device(1):
        assert torch.ones(1).to("npu").device.index == 1
    npu.set_device("npu:0")
    with pytest.raises(RuntimeError, match="Invalid NPU device id 3"):
        npu.set_device(3)
    with pytest.raises(RuntimeError, match="Invalid NPU device id 7"):
        torch.ones(1, device="npu:7")
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="npu:0") + torch.ones(2, device="npu:1")
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="npu") + torch.ones(2)
    assert (torch.ones(2, device="npu") + torch.tensor(1.0)).tolist() == [2, 2]

    side, start, end = npu.Stream(), npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    start.record()
    with npu.stream(side):
        assert npu.current_stream() == side
        time.sleep(0.02)
        end.record()
    assert npu.current_stream() == npu.default_stream() != side
    npu.current_stream().wait_stream(side)
    npu.current_stream().wait_event(end)
    end.wait()
    end.synchronize()
    assert end.query()
    assert 15 < start.elapsed_time(end) < 2000
    torch.ones(2, device="npu").record_stream(side)

    pinned = torch.ones(4).pin_memory()
    assert pinned.is_pinned()
    assert pinned[2:].is_pinned()
    assert torch.empty(2, pin_memory=True).is_pinned()
    assert not torch.ones(4).is_pinned()
    assert torch.ones(3, device="npu").to("cpu", non_blocking=True).is_pinned()

    for seed in (3, 4):
        torch.manual_seed(seed)
        on_card, state = torch.randn(5, device="npu"), npu.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(torch.randn(5), on_card.cpu())
        npu.set_rng_state(state)
        assert torch.equal(torch.rand(3), torch.rand(3, device="npu").cpu())
    own = torch.Generator("npu").manual_seed(5)
    assert_same(torch.rand(3, device="npu", generator=own), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    for p in (0.2, 0.45, 0.74, 1.0):  # of 0.45 and 0.74 torch.native_dropout rounds otherwise
        results = []
        for device in ("cpu", "npu"):
            torch.manual_seed(9)
            x = torch.linspace(-3, 3, 400).to(device).requires_grad_()
            y = F.dropout(x, p)
            y.square().sum().backward()
            results.append([y, x.grad])
        assert_same(*results)

    before = npu.memory_allocated()
    npu.reset_peak_memory_stats()
    x = torch.zeros(1000, device="npu")
    y = x + 1
    view = y[10:]
    del y
    assert npu.memory_allocated() == before + 8000
    del x, view
    assert npu.memory_allocated() == before
    assert npu.max_memory_allocated() == before + 8000


@apart
def test_tensors_on_npu_can_be_viewed_copied_saved_and_read_back():
    load()
    x = torch.arange(12.0).view(3, 4).to("npu")
    y = x.t()[1:]
    y.mul_(2)
    x[0].add_(x[1])
    assert x.tolist() == [[4, 12, 16, 20], [4, 10, 12, 14], [8, 18, 20, 22]]
    assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    out = torch.empty(0, device="npu")
    assert torch.add(x, 1, out=out) is out
    assert out.sum().item() == x.sum().item() + 12
    x.resize_(5, 4)[3:].zero_()
    assert x[2:].tolist() == [[8, 18, 20, 22], [0] * 4, [0] * 4]
    assert torch.split(torch.ones(4, device="npu") * 2, 2)[1].tolist() == [2, 2]
    assert x.nonzero().shape == (12, 2)
    assert x[x > 15].tolist() == [16, 20, 18, 20, 22]
    assert float(torch.tensor(2.5, device="npu")) == 2.5
    assert str(torch.ones(1, device="npu")) == "tensor([1.], device='npu:0')"
    with pytest.raises(TypeError, match="can't convert npu:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(TypeError):
        __import__("numpy").asarray(x)

    with pytest.warns(UserWarning, match="TypedStorage is deprecated"):
        twin = copy.deepcopy(x)
    twin.zero_()
    assert x.sum().item() > 0
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).npu()
    assert model[0].weight.is_npu
    assert_same(copy.deepcopy(model).state_dict(), model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for location, device in (("cpu", "cpu"), (None, "npu"), ("npu:1", "npu")):
        file.seek(0)
        loaded = torch.load(file, map_location=location)
        assert {value.device.type for value in loaded.values()} == {device}
        assert_same(loaded, model.state_dict())
    nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).load_state_dict(model.state_dict())
    storage = torch.UntypedStorage(8, device="npu")
    storage.fill_(1)
    storage.resize_(16)
    assert (storage.device.type, storage.nbytes(), list(storage.cpu()[:8])) == ("npu", 16, [1] * 8)


@apart
def test_autocast_runs_matrix_products_in_low_precision_and_losses_in_fp32():
    load()
    model, x = nn.Linear(4, 3).to("npu"), torch.randn(2, 4).to("npu")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("npu", dtype=dtype):
            y = model(x)
            loss = F.mse_loss(y, y.detach() + 1)
            assert (y.dtype, loss.dtype, (y + 1).dtype, y.softmax(1).dtype) == (
                dtype,
                torch.float32,
                dtype,
                torch.float32,
            )
            assert F.conv2d(x.view(1, 2, 2, 2), torch.ones(1, 2, 1, 1, device="npu")).dtype == dtype
        loss.backward()
        assert model.weight.grad.dtype == torch.float32
        half = F.linear(*[t.to(dtype) for t in (x, model.weight, model.bias)])
        assert torch.equal(y.cpu(), half.cpu())
    assert model(x).dtype == torch.float32


# ---------------------------------------------------------------- loss scales


@apart
def test_both_grad_scalers_skip_an_overflow_and_only_the_npus_can_be_static():
    load()

    def scaled_step(scaler, gradient):
        parameter = nn.Parameter(torch.ones(2, device="npu"))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        loss = scaler.scale((parameter * torch.tensor(gradient).to("npu")).sum())
        loss.backward()
        scaler.unscale_(optimizer)
        gradients = parameter.grad.tolist()
        scaler.step(optimizer)
        scaler.update()
        return gradients, parameter.tolist(), scaler.get_scale()

    infinity = float("inf")
    for kind in (torch.npu.amp.GradScaler, functools.partial(torch.amp.GradScaler, "npu")):
        scaler = kind(init_scale=16.0, growth_interval=2)
        assert scaled_step(scaler, [1.0, 2.0]) == ([1, 2], [0, -1], 16)
        assert scaled_step(scaler, [1.0, infinity]) == ([1, infinity], [1, 1], 8)
        assert scaled_step(scaler, [1.0, 2.0]) == ([1, 2], [0, -1], 8)
        assert scaled_step(scaler, [1.0, 2.0]) == ([1, 2], [0, -1], 16)
    torch_state, scaler = scaler.state_dict(), torch.npu.amp.GradScaler(init_scale=16.0, dynamic=False)
    assert scaled_step(scaler, [1.0, infinity]) == ([1, infinity], [0, -infinity], 16)
    assert scaler.state_dict()["dynamic"] is False
    assert torch.npu.amp.GradScaler().state_dict() == {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
        "dynamic": True,
    }
    with pytest.raises(KeyError, match="dynamic"):
        torch.npu.amp.GradScaler().load_state_dict(torch_state)
    parameter = nn.Parameter(torch.ones(2, device="npu"))
    parameter.grad = torch.ones(2, device="npu")
    scaler = torch.npu.amp.GradScaler()
    scaler.scale(parameter.sum())
    with pytest.raises(TypeError, match="grad_scaler"):
        scaler.step(torch.optim.SGD([parameter], momentum=0.9, fused=True))


# ---------------------------------------------------------------- what is counted


@apart
def test_what_makes_the_host_wait_is_counted():
    counters = load().counters
    npu, pageable, pinned = torch.npu, torch.ones(4), torch.ones(4).pin_memory()
    card = pageable.to("npu")

    def counted(action):
        before = counters.snapshot()
        action()
        after = counters.snapshot()
        return difference(before["copies"], after["copies"]), difference(
            before["synchronizations"], after["synchronizations"]
        )

    model = nn.Linear(4, 2).to("npu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(card).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert counted(step)[1] == {}

    h2d, d2h = {"blocking h2d copy": 1}, {"blocking d2h copy": 1}
    item = {"aten::_local_scalar_dense": 1}
    host = torch.empty(4, pin_memory=True)
    for action, copies, synchronizations in (
        (lambda: pageable.to("npu"), {"h2d": 1}, h2d),
        (lambda: pageable.to("npu", non_blocking=True), {"h2d": 1}, h2d),
        (lambda: pinned.to("npu"), {"h2d": 1}, h2d),
        (lambda: pinned.to("npu", non_blocking=True), {"h2d": 1, "h2d_non_blocking": 1}, {}),
        (lambda: card.copy_(pinned[2:3], non_blocking=True), {"h2d": 1, "h2d_non_blocking": 1}, {}),
        (lambda: torch._foreach_copy_([card], [pageable]), {"h2d": 1}, h2d),
        (lambda: card[torch.tensor([1, 2])], {"h2d": 1}, h2d),
        (lambda: card.cpu(), {"d2h": 1}, d2h),
        (lambda: host.copy_(card, non_blocking=True), {"d2h": 1, "d2h_non_blocking": 1}, {}),
        (lambda: torch.empty(4).copy_(card, non_blocking=True), {"d2h": 1}, d2h),
        (lambda: card.tolist(), {"d2h": 1}, d2h),
        (lambda: card.clone(), {"d2d": 1}, {}),
        (lambda: card.to("npu:1"), {"d2d": 1}, {}),
        (lambda: card * 2.5 + torch.tensor(1.0), {}, {}),
        (lambda: card[0].item(), {}, item),
        (lambda: bool(card[0] > 0), {}, item),
        (lambda: card.nonzero(), {}, {"aten::nonzero": 1}),
        (lambda: card[card > 0], {}, {"aten::nonzero": 1}),
        (lambda: card.masked_select(card > 0), {}, {"aten::masked_select": 1}),
        (lambda: card.unique(), {}, {"aten::_unique2": 1}),
        (lambda: npu.synchronize(), {}, {"torch.npu.synchronize": 1}),
        (lambda: torch.accelerator.synchronize(), {}, {"torch.npu.synchronize": 1}),
        (lambda: npu.current_stream().synchronize(), {}, {"stream.synchronize": 1}),
        (lambda: npu.current_stream().record_event().synchronize(), {}, {"event.synchronize": 1}),
        (lambda: npu.current_stream().wait_stream(npu.Stream()), {}, {}),
    ):
        assert counted(action) == (copies, synchronizations), action.__code__.co_firstlineno

    event = npu.current_stream().record_event()
    with ThreadPoolExecutor(1) as pool:
        other = counted(lambda: pool.submit(event.synchronize).result())
    assert other == ({}, {"event.synchronize (other thread)": 1})


def reporting():
    """What the next test has a process report."""
    torch_npu = load()
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = False
    torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = False
    torch_npu.counters.mark("start")
    x = torch.ones(3).to("npu")
    torch.npu.set_compile_mode(jit_compile=True)
    x.sum().item()
    torch_npu.counters.mark("end")
    sys.exit(3)


def test_a_process_reports_who_waited_and_in_which_order_it_was_set_up(tmp_path):
    began = time.time()
    result = python(__file__, "reporting", EMULATED_NPU_REPORT=str(tmp_path), EMULATED_NPU_TRACE="1", RANK="5")
    assert (result.returncode, result.stderr) == (3, "")
    [file] = tmp_path.iterdir()
    report = json.loads(file.read_text())
    assert file.name.removesuffix(".json").isdigit()
    assert report["rank"] == 5
    assert report["setup"] == [
        "set_compile_mode(jit_compile=False)",
        "config.allow_internal_format=False",
        "conv.allow_hf32=False",
        "matmul.allow_hf32=False",
        "first tensor",
        "set_compile_mode(jit_compile=True)",
    ]
    assert report["ops"]["aten::_local_scalar_dense"] == 1
    assert report["copies"] == {"h2d": 1, "h2d_non_blocking": 0, "d2h": 0, "d2h_non_blocking": 0, "d2d": 0}
    assert report["events"] == ["start", "end"]
    assert [row[1:3] for row in report["trace"]] == [
        ["mark", "start"],
        ["h2d", "12 bytes"],
        ["synchronization", "blocking h2d copy"],
        ["synchronization", "torch.npu.synchronize"],
        ["synchronization", "aten::_local_scalar_dense"],
        ["mark", "end"],
    ]
    times = [row[0] for row in report["trace"]]
    assert began < times[0] <= times[-1] < time.time()
    assert times == sorted(times)
    lines = Path(__file__).read_text().splitlines()
    for row, code in zip(report["trace"][1:5], (".to(", ".to(", "jit_compile=True", ".item()"), strict=True):
        place, function = row[3].split()
        assert function == "reporting"
        assert code in lines[int(place.removeprefix("test_emulated_npu.py:")) - 1]


# ---------------------------------------------------------------- what can be missing


@apart
def test_a_machine_without_a_card_has_the_driver_only():
    load(EMULATED_NPU_COUNT="0")
    assert not torch.npu.is_available()
    assert torch.npu.device_count() == 0
    torch.manual_seed(0)
    assert nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)
    for action in (lambda: torch.ones(1).pin_memory(), lambda: torch.empty(1, pin_memory=True)):
        with pytest.raises(RuntimeError, match="NPU"):
            action()
    for action in (
        lambda: torch.ones(1, device="npu"),
        lambda: torch.ones(1).to("npu"),
        lambda: torch.npu.set_device(0),
    ):
        with pytest.raises(RuntimeError, match=r"Invalid NPU device id 0: 0 available|No NPUs are available"):
            action()
    with pytest.raises(RuntimeError, match="No NPUs are available"):
        torch.npu.synchronize()


def test_without_cann_the_import_fails_before_anything_is_registered():
    code = "import torch\ntry:\n    import torch_npu\nexcept ImportError as error:\n    print(error)\n"
    code += "print(torch._C._get_privateuse1_backend_name(), hasattr(torch, 'npu'))"
    result = python("-c", code, EMULATED_NPU_CANN="0")
    assert result.stdout.splitlines() == [
        "libhccl.so: cannot open shared object file: No such file or directory",
        "privateuseone False",
    ]
    result = python("-c", "import torch", EMULATED_NPU_CANN="0", TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert result.returncode == 1
    assert "Failed to load the backend extension: torch_npu" in result.stderr


def test_import_torch_loads_it_by_the_entry_point_and_children_inherit_the_switch():
    code = (
        "import os, torch; print(torch.ones(2, device='npu').sum().item(), os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    )
    result = python("-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert (result.stdout, result.stderr) == ("2.0 1\n", "")


@apart
def test_a_forked_process_must_not_use_a_card_that_is_in_use():
    load()
    torch.ones(1, device="npu")
    child = os.fork()
    if child == 0:
        try:
            torch.manual_seed(0)
            torch.ones(1, device="npu")
        except RuntimeError as error:
            os._exit(7 if "Cannot re-initialize NPU in forked subprocess" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# ---------------------------------------------------------------- several cards


@functools.cache
def ranks(*names, **environment):
    """Run the functions name(rank, group) in two processes at once, and say how each ended: {name: [error, error]}.

    Starting them takes most of the time, hence all in one go.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: python(__file__, "rank_main", rank, folder, *names, **environment), "01"))
        outcomes = [json.loads((Path(folder) / rank).read_text()) for rank in "01"]
    for result in results:
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return {name: [outcome[name] for outcome in outcomes] for name in names}


def expect(wanted, outcomes):
    assert outcomes == wanted, "\n".join(outcomes)


def rank_main(rank, folder, *names):
    load()
    rank = int(rank)
    torch.npu.set_device(rank)
    store = dist.FileStore(f"{folder}/store", 2)
    limit = timedelta(seconds=20)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    group, outcomes = dist.new_group(backend="hccl", timeout=limit), {}
    for name in names:
        outcomes[name] = "left"
        (Path(folder) / str(rank)).write_text(json.dumps(outcomes))
        try:
            globals()[name](rank, group)
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
        (Path(folder) / str(rank)).write_text(json.dumps(outcomes))
    dist.destroy_process_group()


def averaged(group, bucket):
    """A communication hook, as a program writes one."""
    buffer = bucket.buffer()
    future = dist.all_reduce(buffer, group=group, async_op=True).get_future()
    return future.then(lambda done: done.value()[0].div_(2))


def distributed_steps(device, rank, group, hook):
    torch.manual_seed(rank)  # DDP makes the ranks start from rank 0's weights
    model = ghostnet().to(device)
    images, labels = torch.randn(4, 3, 48, 48).to(device), torch.arange(4).to(device)
    indices = {"npu": [rank], "cpu": None}[device]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.14 calls this argument deprecated
        ddp = DistributedDataParallel(model, indices, broadcast_buffers=False, process_group=group)
    if hook:
        ddp.register_comm_hook(group, averaged)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, foreach=True)
    torch.manual_seed(2 + rank)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(ddp(images), labels).backward()
        optimizer.step()
    return [p.grad for p in model.parameters()], model.state_dict()


def compare_ddp(rank, group):
    from torch_npu import counters

    for hook in (False, True):
        reference = distributed_steps("cpu", rank, None, hook)
        before = counters.snapshot()
        result = distributed_steps("npu", rank, group, hook)
        after = counters.snapshot()
        assert_same(reference, result)
        assert result[1]["classifier.weight"].device.index == rank
        ran = difference(before["collectives"], after["collectives"])
        assert ran["allreduce"] >= 2
        assert difference(before["allreduce_dtypes"], after["allreduce_dtypes"]) == {"float32": ran["allreduce"]}


def test_ddp_over_hccl_is_bit_equal_to_ddp_over_gloo_on_the_cpu():
    expect(["", ""], ranks(*TOGETHER)["compare_ddp"])


def try_collectives(rank, group):
    assert dist.get_backend(group) == "hccl"
    for dtype in (torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32):
        for operation, expected in (("SUM", 5), ("PRODUCT", 6), ("MIN", 2), ("MAX", 3)):
            x = torch.full((3,), rank + 2, dtype=dtype, device="npu")
            dist.all_reduce(x, getattr(dist.ReduceOp, operation), group=group)
            assert x.tolist() == [expected] * 3
    x = torch.full((2,), float(rank), device="npu")
    dist.broadcast(x, 1, group=group)
    assert x.tolist() == [1, 1]
    pieces = [torch.empty(1, device="npu") for _ in range(2)]
    dist.all_gather(pieces, torch.full((1,), float(rank), device="npu"), group=group)
    assert [piece.item() for piece in pieces] == [0, 1]
    whole = torch.empty(2, device="npu")
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.14's name, and the older
    gather(whole, torch.full((1,), float(rank), device="npu"), group=group)
    assert whole.tolist() == [0, 1]
    mine = torch.empty(1, device="npu")
    dist.reduce_scatter(mine, [torch.full((1,), rank + 10.0 * i, device="npu") for i in range(2)], group=group)
    assert mine.item() == 1 + 20 * rank
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(mine, torch.arange(2.0, device="npu") + rank, group=group)
    assert mine.item() == 1 + 2 * rank
    if rank:
        dist.send(torch.full((1,), 4.0, device="npu"), 0, group=group)
    else:
        dist.recv(mine, 1, group=group)
        assert mine.item() == 4
    dist.barrier(group=group, device_ids=[rank])  # without device_ids torch warns that it guesses
    with pytest.raises(RuntimeError, match="Cannot use AVG with HCCL"):
        dist.all_reduce(x, dist.ReduceOp.AVG, group=group)
    with pytest.raises(RuntimeError, match=r"Unsupported data type torch\.float64"):
        dist.all_reduce(x.double(), group=group)
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(1), group=group)
    with pytest.raises(RuntimeError, match="No backend type associated with device type npu"):
        dist.all_reduce(x)


def test_hccl_has_the_collectives_and_the_refusals_of_the_real_one():
    expect(["", ""], ranks(*TOGETHER)["try_collectives"])


def lose_a_peer(rank, group):
    dist.all_reduce(torch.ones(1, device="npu"), group=group)
    if rank:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1, device="npu"), group=group)
    assert time.monotonic() - began < 10


def test_a_peer_that_dies_makes_the_other_raise_an_error():
    expect(["", "left"], ranks(*FIRST_GENERATION, EMULATED_NPU_GENERATION="1")["lose_a_peer"])


def normalize_in_sync(rank, group):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 5, 3, 3, generator=generator) * 3 + 1
    weights = torch.randn(6, 5, 3, 3, generator=generator)
    own = slice(0, 2) if rank == 0 else slice(2, 6)  # unequal, so that the counts matter
    for dtype, rounding in ((torch.float32, 2e-5), (torch.float16, 2e-2)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            reference, synced = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
            for layer in (reference, synced):
                layer.weight.data, layer.bias.data = torch.arange(1.0, 6.0), torch.arange(5.0)
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(synced, group).to("npu")
            whole = images.clone(memory_format=memory_format).requires_grad_()
            part = images[own].clone(memory_format=memory_format).to("npu", dtype).requires_grad_()
            for _ in range(2):
                expected = reference(whole)
                (expected * weights).sum().backward()
                result = synced(part)
                (result * weights[own].to("npu", dtype)).sum().backward()
            assert (result.dtype, part.grad.dtype, synced.weight.grad.dtype) == (dtype, dtype, torch.float32)
            total = torch.stack([synced.weight.grad, synced.bias.grad])
            dist.all_reduce(total, group=group)
            for got, wanted in (
                (result, expected[own]),
                (part.grad, whole.grad[own]),
                (total, torch.stack([reference.weight.grad, reference.bias.grad])),
                (synced.running_mean, reference.running_mean),
                (synced.running_var, reference.running_var),
            ):
                torch.testing.assert_close(got.float().cpu(), wanted, rtol=rounding, atol=rounding * 10)
            assert synced.running_var.cpu().ne(1).all()


def test_sync_batch_norm_on_two_cards_equals_the_whole_batch_on_one():
    expect(["", ""], ranks(*TOGETHER)["normalize_in_sync"])


def overflow_on_one_rank(rank, group):
    from torch_npu.npu.amp import GradScaler

    assert torch.npu.get_device_name() == "Ascend910A"
    parameter = nn.Parameter(torch.ones(1, device="npu"))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = GradScaler(init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    # the real one asks the default group, which has no npu here: a program must have it ask its hccl group
    with pytest.raises(RuntimeError, match="No backend type associated with device type npu"):
        scaler.unscale_(optimizer)
    default = dist.group.WORLD
    dist.distributed_c10d._update_default_pg(group)
    scaler = GradScaler(init_scale=4.0)
    scaler.scale(parameter.sum())
    if rank == 0:
        parameter.grad.fill_(float("inf"))
        assert parameter.grad.isfinite()
    scaler.step(optimizer)
    scaler.update()
    dist.distributed_c10d._update_default_pg(default)
    assert (parameter.item(), scaler.get_scale()) == (1, 2)


def test_on_a_first_generation_card_ranks_agree_on_an_overflow():
    expect(["", ""], ranks(*FIRST_GENERATION, EMULATED_NPU_GENERATION="1")["overflow_on_one_rank"])


@apart
def test_a_first_generation_card_has_neither_bf16_nor_inf():
    torch_npu = load(EMULATED_NPU_GENERATION="1")
    assert torch.npu.get_device_name(0) == "Ascend910A"
    assert not torch.npu.is_bf16_supported()
    assert not torch_npu.npu.utils.is_support_inf_nan()
    with pytest.warns(UserWarning, match="not supported"):
        context = torch.autocast("npu", dtype=torch.bfloat16)
    with context:
        assert F.linear(torch.ones(1, 1, device="npu"), torch.ones(1, 1, device="npu")).dtype == torch.float32


TOGETHER = ("try_collectives", "compare_ddp", "normalize_in_sync")
FIRST_GENERATION = ("overflow_on_one_rank", "lose_a_peer")

if __name__ == "__main__":
    body = globals()[sys.argv[1]]
    getattr(body, "__wrapped__", body)(*sys.argv[2:])
