"""Reads any published GhostNet checkpoint, recognised by its content. Nothing in a file is ever run."""

import argparse
import os
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ghostnet import seal
from ghostnet.errors import UserError
from ghostnet.models.claims import bounded, check_legacy, check_safetensors, check_zip
from ghostnet.models.ghostnet import LAST_CHANNELS, STEM_CHANNELS, GhostNet
from ghostnet.models.layers import round_channels

ZIP_MAGIC = b"PK\x03\x04"  # torch.save since torch 1.6
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before: the pickle of its magic number
CLASSIFIER = ("classifier.weight", "classifier.bias")
# Averaged weights are the ones to use, so they come first. ema, model: ours. state_dict: the reference and timm.
NESTED = ("ema", "state_dict_ema", "state_dict", "model")
PUBLISHED = {0.5: "ghostnet_050", 1.0: "ghostnet_100", 1.3: "ghostnet_130"}
SHOWN = 5
NUMPY_LETTERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "b1": "?"}  # as the struct module names them


def read_file(path: str | Path) -> Any:  # noqa: ANN401 - a file holds what it holds
    """Read a file of torch.save or safetensors, whatever its name, onto the CPU. UserError if unsafe or unreadable.

    Where it has a checksum, as ours have, its content must agree with it.
    """
    path = Path(path)
    head = _head(path)
    try:
        if (whole := seal.is_whole(path)) is False:
            raise UserError(_damaged(path))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            with bounded(size):
                if len(head) > 8 and head[8:9] == b"{" and head[5:8] == bytes(3):
                    check_safetensors(file, size)
                    return safetensors.torch.load(path.read_bytes())
                if head.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
                    content = _torch_file(file, size, head)
                    if whole is None and isinstance(content, dict) and content.get("sealed"):
                        raise UserError(_damaged(path))
                    return content
    except UserError:
        raise
    except Exception as error:  # the bytes of a torn file decide what is raised
        raise UserError(_explain(path, error)) from error
    raise UserError(
        f"{path} is no checkpoint: expected a file written by torch.save or safetensors, found another kind"
    )


def _torch_file(file: IO[bytes], size: int, head: bytes) -> Any:  # noqa: ANN401
    check_zip(file, size) if head.startswith(ZIP_MAGIC) else check_legacy(file)
    file.seek(0)
    with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to whoever wrote the file
        # An open file, since from a path torch would go by the ending of its name.
        return torch.load(file, map_location="cpu", weights_only=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict under the published names, fp32 on the CPU; averaged where there is one. UserError without weights."""
    content = read_file(path)
    if isinstance(content, Mapping):
        content = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(map(is_plain, content.values())):
        found = _describe(content)
        raise UserError(
            f"{path} holds no weights: expected a state dict, or one under {', '.join(NESTED)}; found {found}"
        )
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {
        str(name).removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in content.items()
    }


def is_plain(value: object) -> bool:
    """Whether a value is a tensor of numbers that are all there: no view that makes many of few, no other layout."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_complex()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Load a file into the model, all or nothing -> what the user should know of it. UserError if it does not fit.

    A classifier of another number of classes is left as initialised; anything else must match exactly.
    """
    return fit(model, read_weights(path), path)


def fit(model: nn.Module, found: dict[str, Tensor], path: str | Path) -> list[str]:
    """Do what load_weights does with a state dict that was read from a path. Other models than GhostNet fit exactly."""
    expected: dict[str, Tensor] = model.state_dict()
    messages: list[str] = []
    if not isinstance(model, GhostNet):
        if differences := _differences(found, expected):
            raise UserError(f"{path} does not fit {type(model).__name__}: {differences}")
        model.load_state_dict(found)
        return messages
    classes = _classes(found, expected)
    if classes not in (None, model.num_classes):
        found |= {name: expected[name] for name in CLASSIFIER}
        messages.append(f"{path}: classifier of {classes} classes replaced by a new one of {model.num_classes}")
    if differences := _differences(found, expected):
        hint = _hint(found, model)
        raise UserError(f"{path} does not fit GhostNet of width {model.width:g}: {differences}{hint}")
    model.load_state_dict(found)
    return messages


def _describe(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"the keys {_few([str(key) for key in content])}" if content else "nothing"


def _head(path: Path) -> bytes:
    """First bytes of a file; UserError where there are none."""
    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY_MAGIC))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the path of a checkpoint inside it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if not head:
        raise UserError(f"{path} is empty: download or copy it again")
    return head


def _damaged(path: Path) -> str:
    others = ", ".join(sorted(other.name for other in path.parent.glob("*.pt") if other.name != path.name))
    return (
        f"{path} is damaged: its content is not what its checksum says. Copy it again"
        f"{f', or take another of {path.parent}: {others}' if others else ''}"
    )


def _explain(path: Path, error: Exception) -> str:
    """Why a file that begins like a checkpoint could not be read, and the way out."""
    if blocked := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"{path} was refused, and nothing in it was run: it asks for {blocked[1]}, and weights need no code. "
            "If the file is your own, save model.state_dict() instead"
        )
    if isinstance(error, MemoryError):
        return f"{path} was refused: reading it would take far more memory than a checkpoint of its size"
    # The first sentence of torch's own reason: the advice around it is to read the file unsafely.
    reason = re.split(r"WeightsUnpickler error:\s*", str(error))[-1].partition("\n")[0].partition(". ")[0]
    return (
        f"{path} is truncated, damaged or no checkpoint: download or copy it again ({type(error).__name__}: {reason})"
    )


class _NumpyType:
    """Stands in for numpy.dtype while a file is read."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = str(state[1]).replace("|", "=")


def _numpy_scalar(kind: _NumpyType, raw: bytes) -> object:
    """Stands in for numpy's scalar: a Python number, or its bytes where it is none."""
    letter = NUMPY_LETTERS.get(kind.code)
    return struct.unpack(kind.order + letter, raw)[0] if letter else raw


def _npu_tensor(*parts: object) -> object:
    """Stands in for the way of torch_npu, which adds a card's layout to what torch writes of a tensor."""
    return torch._utils._rebuild_tensor_v2(*parts[:6])  # type: ignore[no-untyped-call]


def _harmless() -> list[Any]:
    """List what a published file may name beside tensors; a pair answers a name in the file with a stand-in."""
    return [
        argparse.Namespace,
        (_NumpyType, "numpy.dtype"),
        (_numpy_scalar, "numpy.core.multiarray.scalar"),
        (_numpy_scalar, "numpy._core.multiarray.scalar"),
        (_npu_tensor, "torch_npu.utils.storage._rebuild_npu_tensor"),
        (int, "torch_npu.npu._format.Format"),
    ]


def _classes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int | None:
    """Classes of the classifier in a file; None where it is no linear layer on the expected features."""
    weight, bias = (found.get(name) for name in CLASSIFIER)
    if weight is None or bias is None or weight.shape[1:] != expected[CLASSIFIER[0]].shape[1:]:
        return None
    return weight.shape[0] if bias.shape == weight.shape[:1] else None


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Count what keeps a state dict from fitting, with the first names of each sort; empty where it fits."""
    shapes = [
        f"{name} {tuple(found[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    sorts = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(names)} {sort} ({_few(names)})" for sort, names in sorts.items() if names)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _hint(found: Mapping[str, Tensor], model: GhostNet) -> str:
    """Say what a state dict that does not fit seems to be, and what to do; empty where it cannot be told."""
    if not any(".ghost1." in name for name in found):
        return ". It is no GhostNet: give a checkpoint of GhostNet (arXiv 1911.11907)"
    if any(".short_conv." in name or "_rpr_" in name for name in found):
        return ". It looks like GhostNetV2 or V3: give a checkpoint of the first GhostNet (arXiv 1911.11907)"
    width = _width(found)
    if width is None or round_channels(LAST_CHANNELS * width) == round_channels(LAST_CHANNELS * model.width):
        return ""
    setting = f"model={PUBLISHED[width]}" if width in PUBLISHED else f"model.width={width:g}"
    return f". It looks like width {width:g}: use {setting}"


def _width(found: Mapping[str, Tensor]) -> float | None:
    """Roundest width that gives the first and last channels of a state dict; None where there is none."""
    stem, head = found.get("conv_stem.weight"), found.get("conv_head.weight")
    if stem is None or head is None or stem.ndim != 4 or head.ndim != 4:
        return None
    for digits in (1, 2, 3):
        width = round(head.shape[1] / LAST_CHANNELS, digits)
        channels = (round_channels(STEM_CHANNELS * width), round_channels(LAST_CHANNELS * width))
        if width > 0 and channels == (stem.shape[0], head.shape[1]):
            return width
    return None
