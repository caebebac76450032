"""What the drivers say of the cards, without torch: for the door, which can't wait until it is loaded."""

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
HUAWEI, ACCELERATOR = "0x19e5", "0x1200"
FIRST_ASCENDS = {"0xd100": "Ascend 310", "0xd500": "Ascend 310P", "0xd801": "Ascend 910A"}
"""PCI device numbers of the cards without bfloat16."""

COMPUTE_CAPABILITY = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""
AMPERE = 8
"""The first with bfloat16."""


def card_without_bf16(kind: str, indices: list[int]) -> str | None:
    """The first of these cards of a kind that has no bfloat16; None where all have it, or it can't be told.

    kind auto: CUDA cards count where no torch_npu is installed, which would go first.
    """
    if kind == "auto":
        kind = "cuda" if importlib.util.find_spec("torch_npu") is None else "npu"
    names = _ascends() if kind == "npu" else _cuda_cards() if kind == "cuda" else {}
    return next((name for index in indices if (name := names.get(index))), None)


def _ascends() -> dict[int, str]:
    """Number -> name of the Ascend cards without bfloat16; cards are numbered in the order of their PCI addresses."""
    found = dict(enumerate(_accelerators()))
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    with contextlib.suppress(ValueError):
        order = [int(number) for number in visible.split(",")] if visible else list(found)
        chosen = {index: found.get(number, "") for index, number in enumerate(order)}
        return {index: FIRST_ASCENDS[device] for index, device in chosen.items() if device in FIRST_ASCENDS}
    return {}


def _accelerators() -> Iterator[str]:
    for folder in sorted(PCI.iterdir()) if PCI.is_dir() else ():
        with contextlib.suppress(OSError):
            vendor, device, kind = (
                (folder / name).read_text(encoding="utf-8").strip() for name in ("vendor", "device", "class")
            )
            if vendor == HUAWEI and kind.startswith(ACCELERATOR):
                yield device


@functools.cache
def _cuda_cards() -> dict[int, str]:
    """Index -> name of the CUDA cards without bfloat16, as CUDA_VISIBLE_DEVICES has them."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return {}
    found = {}
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        capability = ctypes.c_int(), ctypes.c_int()
        faults = [cuda.cuDeviceGet(ctypes.byref(device), index), cuda.cuDeviceGetName(name, len(name), device)]
        for value, attribute in zip(capability, COMPUTE_CAPABILITY, strict=True):
            faults.append(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
        major, minor = capability[0].value, capability[1].value
        if not any(faults) and major < AMPERE:
            found[index] = f"card {index} ({name.value.decode(errors='replace')}, compute capability {major}.{minor})"
    return found
