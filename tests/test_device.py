"""Devices: what is chosen, what is refused and why. Cards are stand-ins, so that this runs anywhere."""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
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

    def is_bf16_supported(self):
        return self.bf16

    def get_device_name(self, device):
        return f"Card {device.index}"

    def __getattr__(self, name):
        return lambda *words, **settings: self.calls.append((name, *words, *settings.items()))


@pytest.fixture
def machine(monkeypatch):
    """A machine with the cards that are given."""

    def install(cuda=None, npu=None):
        monkeypatch.setattr(torch, "cuda", cuda or Cards(available=False))
        monkeypatch.setitem(sys.modules, "torch_npu", None)  # as if it were not installed
        monkeypatch.delattr(torch, "npu", raising=False)
        if npu:
            torch_npu = ModuleType("torch_npu")
            torch_npu.__spec__ = ModuleSpec("torch_npu", None)
            monkeypatch.setitem(sys.modules, "torch_npu", torch_npu)
            monkeypatch.setattr(torch, "npu", npu, raising=False)

    yield install
    torch.set_flush_denormal(False)


def test_auto_takes_cuda_where_it_is_and_else_the_cpu(machine):
    machine()
    assert device.resolve("auto") == CPU
    machine(cuda=Cards())
    assert device.resolve("auto") == torch.device("cuda", 0)


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
        device.resolve(kind)


def test_a_driver_without_a_card_is_told_from_a_missing_driver(machine):
    machine(npu=Cards(available=False))
    assert device.resolve("auto") == CPU
    with pytest.raises(UserError, match=r"torch_npu is installed but sees no card: source CANN's set_env\.sh"):
        device.resolve("npu")


def test_the_card_that_is_asked_for_is_made_current_and_another_is_refused(machine):
    cards = Cards()
    machine(cuda=cards)
    assert device.resolve("cuda", 1) == torch.device("cuda", 1)
    assert cards.calls == [("set_device", 1)]
    with pytest.raises(UserError, match=r"device\.ids: card 2 is not there; cuda cards 0 to 1 are\."):
        device.resolve("cuda", 2)


def test_the_cpu_flushes_denormal_numbers_to_zero(machine):
    machine()
    small = torch.full((), 1e-39)
    assert small * 0.5 > 0
    device.resolve("cpu")
    assert small * 0.5 == 0


def test_an_npu_is_set_up_before_any_model_moves_to_it():
    script = """
        import sys
        import torch
        from tests.test_device import Cards, ModuleSpec, ModuleType
        torch.utils.rename_privateuse1_backend("npu")  # for the whole process
        torch.npu, sys.modules["torch_npu"] = Cards(), ModuleType("torch_npu")
        sys.modules["torch_npu"].__spec__ = ModuleSpec("torch_npu", None)
        from ghostnet import device
        for kind in ("npu", "auto"):
            print(device.resolve(kind, 1), torch.npu.calls, torch.npu.config.allow_internal_format)
            torch.npu.calls.clear()
        card = torch.device("npu", 1)
        print(device.describe(card), device.half_dtype(card), device.memory_format(card), device.pinned(card))
        device.synchronize(card)
        print(torch.npu.calls)
        torch.npu.bf16 = False
        try:
            device.check_bf16(card)
        except device.UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in script.splitlines())],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = "[('set_device', 1), ('set_compile_mode', ('jit_compile', False))]"
    assert done.stdout.splitlines() == [
        f"npu:1 {calls} False",
        f"npu:1 {calls} False",
        "Card 1 torch.float16 torch.contiguous_format True",
        "[('synchronize', device(type='npu', index=1))]",
        "amp=bf16: Card 1 has no bfloat16. Use amp=fp16 or amp=o2.",
    ], done.stderr


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
    assert device.describe(CPU).endswith(f", {torch.get_num_threads()} threads")
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


def test_copies_to_a_card_are_under_way_until_the_event_has_passed(machine):
    events = []

    class Event:
        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("wait")

    class Source:
        def to(self, target, non_blocking):
            events.append((target.type, non_blocking))
            return "copy"

    cards = Cards()
    cards.Event = Event
    machine(cuda=cards)
    copies, wait = device.copy_to(torch.device("cuda", 0), Source(), Source())
    assert copies == ["copy", "copy"]
    assert events == [("cuda", True), ("cuda", True), "record"]
    wait()
    assert events[-1] == "wait"


def test_the_cpus_are_those_that_this_process_may_use():
    assert device.cpu_count() == len(os.sched_getaffinity(0))
