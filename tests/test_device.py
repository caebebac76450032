"""Devices: what is chosen, what is refused and why. Cards are stand-ins, so that this runs anywhere."""

import contextlib
import os
import platform
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ghostnet import device
from ghostnet.errors import UserError

CPU = torch.device("cpu")


class Cards:
    """Stands in for torch.cuda or torch.npu with two cards and notes the calls."""

    def __init__(self, available=True, bf16=True):
        self.available, self.bf16, self.calls = available, bf16, []
        self.config = SimpleNamespace(allow_internal_format=True)

    def is_available(self):
        return self.available

    def device_count(self):
        return 2

    def is_bf16_supported(self, including_emulation=True):
        return self.bf16 or including_emulation

    def get_device_name(self, device):
        return f"Card {device.index}"

    def __getattr__(self, name):
        return lambda *words, **settings: self.calls.append((name, *words, *settings.items()))


@pytest.fixture
def machine(monkeypatch):
    """A machine with the cards that are given."""

    def install(cuda=None, npu=None, cuda_build=None):
        monkeypatch.setattr(torch, "cuda", cuda or Cards(available=False))
        monkeypatch.setattr("torch.version.cuda", cuda_build)
        monkeypatch.setitem(sys.modules, "torch_npu", None)  # as if it were not installed
        monkeypatch.delattr(torch, "npu", raising=False)
        if npu:
            torch_npu = ModuleType("torch_npu")
            torch_npu.__spec__ = ModuleSpec("torch_npu", None)
            monkeypatch.setitem(sys.modules, "torch_npu", torch_npu)
            monkeypatch.setattr(torch, "npu", npu, raising=False)

    yield install
    torch.set_flush_denormal(False)


def test_auto_takes_cuda_where_it_is_and_else_the_cpu_and_says_why(machine):
    machine()
    kind, why = device.choose("auto")
    assert (kind, device.resolve(kind)) == ("cpu", CPU)
    assert "torch_npu is not installed" in why
    assert why.endswith("no CUDA card is visible")
    machine(cuda=Cards())
    kind, why = device.choose("auto")
    assert (kind, device.resolve(kind)) == ("cuda", torch.device("cuda", 0))
    assert why.endswith("a CUDA card is there")
    machine(cuda=Cards(), npu=Cards())
    assert device.choose("auto") == ("npu", "auto: an NPU is there")


def test_auto_takes_cuda_beside_a_torch_npu_that_a_cuda_build_of_torch_would_abort_and_never_leaves_npus_idle(machine):
    machine(cuda=Cards(), npu=Cards(), cuda_build="13.0")
    kind, why = device.choose("auto")
    assert kind == "cuda"
    assert "is a CUDA build, beside which torch_npu aborts" in why
    assert why.endswith("a CUDA card is there")
    machine(npu=Cards(), cuda_build="13.0")
    way_out = r"needs the CPU build of torch: pip install -r requirements-npu\.txt .*To run without a card: device=cpu$"
    for kind in ("auto", "npu"):
        with pytest.raises(UserError, match=f"^device={kind}.* is a CUDA build.*{way_out}"):
            device.choose(kind)
    assert device.choose("cpu") == ("cpu", "as asked")
    machine(cuda_build="13.0")
    assert device.choose("auto")[0] == "cpu"


def test_a_backend_of_torch_compile_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"^compile\.backend=indictor: .* Did you mean inductor\? There are: .*inductor"
    ):
        device.check_compile(CPU, "indictor")
    device.check_compile(CPU, "inductor")
    device.check_compile(CPU, "eager")


def test_what_torch_compile_needs_on_npus_is_named_before_it_is_missed(monkeypatch, tmp_path):
    card = SimpleNamespace(type="npu")
    for name in ("TORCHINDUCTOR_NPU_BACKEND", "TASK_QUEUE_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch._dynamo.list_backends", lambda exclude_tags: ["inductor", "npugraphs", "npugraph_ex"])
    others = tmp_path / "triton" / "backends" / "nvidia"
    others.mkdir(parents=True)
    triton = SimpleNamespace(__spec__=ModuleSpec("triton", None, is_package=True))
    triton.__spec__.submodule_search_locations.append(str(tmp_path / "triton"))
    for module in (None, triton):
        monkeypatch.setitem(sys.modules, "triton", module)
        with pytest.raises(UserError, match="pip install triton-ascend"):
            device.check_compile(card, "inductor")
    others.with_name("ascend").mkdir()
    device.check_compile(card, "inductor")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TORCHINDUCTOR_NPU_BACKEND", "dvm")
    device.check_compile(card, "inductor")
    for graphs in ("npugraphs", "npugraph_ex"):
        with pytest.raises(UserError, match=rf"^compile\.backend={graphs}: .* export TASK_QUEUE_ENABLE=1\.$"):
            device.check_compile(card, graphs)
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    device.check_compile(card, "npugraphs")


def test_a_kind_that_is_named_is_taken_as_asked(machine):
    machine(cuda=Cards(), npu=Cards())
    assert [device.choose(kind) for kind in ("cpu", "cuda", "npu")] == [
        (kind, "as asked") for kind in ("cpu", "cuda", "npu")
    ]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("npu", r"device=npu_…: torch_npu is not installed: pip install.* To run without a card: device=cpu"),
        ("cuda", r"device=cuda_…: torch .* sees no CUDA card.* or run without a card: device=cpu"),
    ],
)
def test_a_kind_of_card_that_is_not_there_is_refused_with_the_way_out(machine, kind, words):
    machine()
    with pytest.raises(UserError, match=words):
        device.choose(kind)


def test_a_driver_without_a_card_is_told_from_a_missing_driver(machine, monkeypatch):
    machine(npu=Cards(available=False))
    assert device.choose("auto")[0] == "cpu"
    with pytest.raises(UserError, match="torch_npu and CANN are there, but no card is: check npu-smi info"):
        device.choose("npu")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "9")
    with pytest.raises(UserError, match="ASCEND_RT_VISIBLE_DEVICES is '9'"):
        device.choose("npu")


def test_the_card_that_is_asked_for_is_made_current(machine):
    cards = Cards()
    machine(cuda=cards)
    assert device.resolve("cuda", 1) == torch.device("cuda", 1)
    assert cards.calls == [("set_device", 1)]


def test_cards_that_are_not_there_are_refused_by_number(machine):
    machine(cuda=Cards())
    device.check_cards("cuda", 2, None)
    device.check_cards("cuda", 2, [1, 0])
    device.check_cards("cpu", 500, None)
    with pytest.raises(
        UserError, match=r"device\.count=3: cuda card 2 is not there; cards 0 to 1 are\. Give device\.co"
    ):
        device.check_cards("cuda", 3, None)
    with pytest.raises(UserError, match=r"device\.ids=\[0, 5\]: cuda card 5 is not there"):
        device.check_cards("cuda", 2, [0, 5])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(("user", "kept"), [({}, True), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, False)])
def test_on_the_cpu_the_pages_of_freed_tensors_are_used_again_unless_the_user_tunes_the_c_library(user, kept):
    program = """
import resource, torch
from ghostnet.device import resolve
resolve("cpu")
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # the system may take pages back at any time
"""
    ran = subprocess.run([sys.executable, "-c", program], env=os.environ | user, capture_output=True, check=True)
    assert (int(ran.stdout) < 50) is kept


def test_the_cpu_flushes_denormal_numbers_to_zero(machine):
    machine()
    small = torch.full((), 1e-39)
    assert small * 0.5 > 0
    device.resolve("cpu")
    assert small * 0.5 == 0


def test_defaults_of_the_environment_give_way_to_the_users_own(monkeypatch):
    for name in device.ENVIRONMENT["npu"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "7")
    device.set_environment("cpu")
    assert "TASK_QUEUE_ENABLE" not in os.environ
    device.set_environment("npu")
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "7"
    assert os.environ["TASK_QUEUE_ENABLE"] == "2"
    assert os.environ["TORCH_NPU_LAZY_FUSION"] == "0"
    assert int(os.environ["HCCL_EXEC_TIMEOUT"]) < 1868
    for name in device.ENVIRONMENT["npu"]:
        monkeypatch.delenv(name)


def pci(root, cards):
    for address, vendor, kind, cpus in cards:
        folder = root / address
        folder.mkdir()
        for name, text in (("vendor", vendor), ("class", kind), ("local_cpulist", cpus)):
            (folder / name).write_text(text + "\n")


@pytest.fixture
def bus(tmp_path, monkeypatch):
    """Two Ascend cards, the second on the side of CPU 1, and a CUDA card there too."""
    ascend = (device.HUAWEI, "0x120000")
    pci(tmp_path, [("0000:c1:00.0", *ascend, "0"), ("0000:c2:00.0", *ascend, "1,7-9")])
    pci(tmp_path, [("0000:01:00.0", device.HUAWEI, "0x020000", "5"), ("0000:8a:00.0", "0x10de", "0x030200", "1-3")])
    monkeypatch.setattr(device, "PCI", tmp_path)
    monkeypatch.setattr(device, "cpus", lambda: {0, 1, 2})
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    return tmp_path


def cpus_near(kind, index):
    return device.cpus_near(SimpleNamespace(type=kind, index=index))


def test_the_cpus_near_a_card_are_those_of_its_side_that_this_process_may_use(bus, machine, monkeypatch):
    cards = Cards()
    cards.get_device_properties = lambda index: SimpleNamespace(pci_domain_id=0, pci_bus_id=0x8A, pci_device_id=0)
    machine(cuda=cards)
    assert cpus_near("npu", 0) == {0}
    assert cpus_near("npu", 1) == {1}
    assert cpus_near("cuda", 0) == {1, 2}
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    assert cpus_near("npu", 0) == {1}


def test_all_cpus_are_near_where_the_side_can_not_be_told(bus, machine, monkeypatch):
    machine(cuda=Cards())  # an older torch, whose properties don't say
    assert cpus_near("npu", 2) == cpus_near("cuda", 0) == cpus_near("cpu", None) == {0, 1, 2}
    monkeypatch.setattr(device, "cpus", lambda: {2})  # none of the card's own
    assert cpus_near("npu", 0) == {2}
    monkeypatch.setattr(device, "PCI", bus / "none")
    assert cpus_near("npu", 0) == {2}


def test_peak_memory_of_the_cpu_is_what_the_process_had_resident():
    before = device.peak_memory(CPU)
    held = torch.ones(100_000_000, dtype=torch.uint8) + 1
    assert device.peak_memory(CPU) >= max(before, len(held))
    assert 50_000_000 < before < 24 * 2**30


def test_marks_of_the_cpu_are_seconds():
    first = device.mark(CPU)
    time.sleep(0.02)
    second = device.mark(CPU)
    device.wait_for(second)
    assert 0.02 <= device.seconds_between(first, second) < 1


def test_syncbatchnorm_is_refused_on_the_cpu():
    with pytest.raises(UserError, match="sync_bn=true: torch's SyncBatchNorm needs cards"):
        device.check_sync_bn(CPU)
    device.check_sync_bn(torch.device("cuda", 0))


def test_half_precision_is_float16_on_cards_and_bfloat16_on_the_cpu():
    assert device.half_dtype(CPU) == torch.bfloat16
    assert device.half_dtype(torch.device("cuda", 0)) == torch.float16


def test_bf16_is_refused_on_a_card_without_it_and_taken_elsewhere(machine):
    machine(cuda=Cards(bf16=False))
    device.check_bf16(CPU)
    with pytest.raises(UserError, match=r"amp=bf16: Card 0 has no bfloat16\. Use amp=fp16 or amp=o2\."):
        device.check_bf16(torch.device("cuda", 0))
    machine(cuda=Cards())
    device.check_bf16(torch.device("cuda", 0))


def test_the_cpu_is_described_with_its_threads_and_needs_no_pinned_memory_and_no_waiting():
    threads = torch.get_num_threads()
    assert device.describe(CPU).endswith(", 1 thread" if threads == 1 else f", {threads} threads")
    assert not device.describe(CPU).startswith(",")
    assert not device.pinned(CPU)
    assert device.memory_format(CPU) == device.memory_format(torch.device("cuda")) == torch.channels_last
    device.synchronize(CPU)


def test_copies_to_the_cpu_are_the_tensors_themselves():
    images, labels = torch.ones(2, 3), torch.ones(2)
    copies, wait = device.copy_to(CPU, images, labels)
    assert copies[0] is images
    assert copies[1] is labels
    wait()


def test_copies_to_a_card_are_made_aside_and_what_comes_after_waits_for_them(machine):
    events = []

    class Event:
        def record(self, stream):
            events.append(("record", stream.name))

        def synchronize(self):
            events.append("wait")

    class Stream:
        def __init__(self, device, name="aside"):
            self.name = name

        def wait_event(self, event):
            events.append((self.name, "waits"))

    class Source:
        def to(self, target, non_blocking):
            events.append((target.type, non_blocking))
            return self

        def record_stream(self, stream):
            events.append(("used by", stream.name))

    @contextlib.contextmanager
    def stream(chosen):
        events.append(("begin", chosen.name))
        yield
        events.append(("end", chosen.name))

    cards = Cards()
    cards.Event, cards.Stream, cards.stream = Event, Stream, stream
    cards.current_stream = lambda device: Stream(device, "computing")
    machine(cuda=cards)
    device._stream_for_copies.cache_clear()
    _, wait = device.copy_to(torch.device("cuda", 0), Source(), Source())
    device._stream_for_copies.cache_clear()
    aside = [("begin", "aside"), ("cuda", True), ("cuda", True), ("record", "aside"), ("end", "aside")]
    assert events == [*aside, ("computing", "waits"), ("used by", "computing"), ("used by", "computing")]
    wait()
    assert events[-1] == "wait"


def test_the_cpus_are_those_that_this_process_may_use():
    assert device.cpu_count() == len(os.sched_getaffinity(0))
