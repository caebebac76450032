"""The only room that knows npu, cuda and cpu apart."""

import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ghostnet.errors import UserError

Kind = Literal["auto", "cpu", "cuda", "npu"]


def resolve(kind: Kind, index: int = 0) -> torch.device:
    """The card or processor to compute on, set up and made current; UserError where there is none of that kind.

    auto takes an NPU, then CUDA, then the CPU.
    """
    if kind == "auto":
        kind = "npu" if _npu_available() else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        # Denormal numbers, common in late training, take the slow path of the processor.
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    if kind == "npu" and not _npu_available():
        raise UserError(f"device=npu_…: {_npu_absence()} To run without a card: device=cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device=cuda_…: torch {torch.__version__} sees no CUDA card. Check nvidia-smi and the driver, "
            "or run without a card: device=cpu"
        )
    module = _module(kind)
    if index >= module.device_count():
        raise UserError(f"device.ids: card {index} is not there; {kind} cards 0 to {module.device_count() - 1} are.")
    module.set_device(index)
    if kind == "npu":
        # Both before any model moves: the defaults of first-generation cards compile every new shape for minutes.
        module.set_compile_mode(jit_compile=False)
        module.config.allow_internal_format = False
    return torch.device(kind, index)


def _module(kind: str) -> Any:  # noqa: ANN401 (a module that torch_npu adds to torch at run time)
    return torch.cuda if kind == "cuda" else torch.npu  # type: ignore[attr-defined]


def _npu_available() -> bool:
    return importlib.util.find_spec("torch_npu") is not None and hasattr(torch, "npu") and torch.npu.is_available()


def _npu_absence() -> str:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: pip install -r requirements-npu.txt."
    return "torch_npu is installed but sees no card: source CANN's set_env.sh, and check npu-smi info."


def describe(device: torch.device) -> str:
    """The hardware in words, for logs and results: the card's name, or the processor and its threads."""
    if device.type != "cpu":
        return str(_module(device.type).get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def cpu_count() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type != "cpu":
        _module(device.type).synchronize(device)


def half_dtype(device: torch.device) -> torch.dtype:
    """What O2 calls half: float16 on cards, bfloat16 on CPUs, whose float16 kernels are slow or missing."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def check_bf16(device: torch.device) -> None:
    """UserError on a card without bfloat16: first-generation Ascend cards would silently compute in fp32."""
    if device.type != "cpu" and not _module(device.type).is_bf16_supported():
        raise UserError(f"amp=bf16: {describe(device)} has no bfloat16. Use amp=fp16 or amp=o2.")


def apex_options(device: torch.device) -> dict[str, Any]:
    """What Ascend's apex wants to be told beyond NVIDIA's: one buffer for all gradients."""
    return {"combine_grad": True} if device.type == "npu" else {}


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last where its kernels win (CPU, CUDA), contiguous on NPUs."""
    return torch.contiguous_format if device.type == "npu" else torch.channels_last


def pinned(device: torch.device) -> bool:
    """Whether host buffers should be pinned: only beside a card, where no card is visible pinning raises."""
    return device.type != "cpu"


def copy_to(device: torch.device, *tensors: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
    """Copies on the device, under way without waiting, and a function that waits until the sources may be reused.

    On the CPU these are the tensors themselves: they are free once the step that uses them has returned.
    """
    if device.type == "cpu":
        return list(tensors), lambda: None
    copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
    event = _module(device.type).Event()
    event.record()
    return copies, event.synchronize
