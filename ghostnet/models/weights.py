"""Reads any published GhostNet checkpoint, recognised by its content. Nothing in a file is ever run."""

import argparse
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from ghostnet import seal
from ghostnet.errors import UserError
from ghostnet.models.claims import bounded, check_is_torchs, check_legacy, check_safetensors, check_zip
from ghostnet.models.ghostnet import LAST_CHANNELS, STEM_CHANNELS, GhostNet
from ghostnet.models.layers import round_channels

T = TypeVar("T")

ZIP_MAGIC = b"PK\x03\x04"  # torch.save since torch 1.6
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before: the pickle of its magic number
CLASSIFIER = ("classifier.weight", "classifier.bias")
# Averaged weights are the ones to use, so they come first. ema, model: ours. state_dict: the reference's.
AVERAGED = ("ema", "state_dict_ema", "model_ema", "ema_model", "params_ema", "ema_state_dict")
NESTED = (*AVERAGED, "state_dict", "model", "model_state_dict", "params", "net", "network", "weights", "module")
DEEPEST = 4
"""Containers in each other."""
WRAPPERS = ("module", "_orig_mod")
"""What DistributedDataParallel, AveragedModel and torch.compile put into the names of what they wrap."""
KINDS = (
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "an HTML page: download the file itself"),
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS: git lfs pull fetches the file itself"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive: unpack it"),
    (re.compile(rb"BZh"), "a bzip2 archive: unpack it"),
    (re.compile(rb"\xfd7zXZ"), "an xz archive: unpack it"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "a zstd archive: unpack it"),
    (re.compile(rb"7z\xbc\xaf"), "a 7z archive: unpack it"),
    (re.compile(rb"(?s).{257}ustar"), "a tar archive: unpack it"),
)
"""What is mistaken for a checkpoint, by the file's first bytes, and the way out."""
PUBLISHED = {0.5: "ghostnet_050", 1.0: "ghostnet_100", 1.3: "ghostnet_130"}
COUNTER = "num_batches_tracked"
HEAD = 512
"""Bytes of a file that tell what it is."""
SHOWN = 5
BUILTINS = ("dict", "list", "tuple", "int", "float", "str", "bool", "object", "slice", "range", "xrange", "frozenset")
NUMPY_LETTERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "b1": "?"}  # as the struct module names them


INERT = (
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath")),
    *("pathlib.PureWindowsPath", "pathlib._local.PureWindowsPath"),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "types.SimpleNamespace", "copyreg._reconstructor"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in BUILTINS),
    *("numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy._core.numeric._frombuffer", "numpy.core.numeric._frombuffer"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "typing.Any"),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata", "SCMode", "DictKeyType")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Integer", "Float", "String", "Boolean", "Bytes", "Path")),
    *("omegaconf.nodes.EnumNode", "omegaconf.nodes.InterpolationResultNode", "omegaconf.nodes.ValueNode"),
    *("typing.Dict", "typing.List", "typing.Union", "typing.Optional"),
)
"""Classes that people keep beside their weights; none of them is needed, so none is built."""


def read_file(path: str | Path) -> Any:  # noqa: ANN401 - a file holds what it holds
    """Read a file of torch.save or safetensors, whatever its name, onto the CPU. UserError if unsafe or unreadable.

    Where it has a checksum, as ours have, its content must agree with it.
    """
    path = Path(path)
    head = _head(path)
    if kind := next((words for pattern, words in KINDS if pattern.match(head)), None):
        raise UserError(f"{path} is no checkpoint but {kind}")
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
    if head.startswith(ZIP_MAGIC):
        check_is_torchs(file)
        check_zip(file, size)
    else:
        check_legacy(file)
    file.seek(0)
    with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to whoever wrote the file
        # An open file, since from a path torch would go by the ending of its name.
        return torch.load(file, map_location="cpu", weights_only=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict without names of wrappers, fp32 on the CPU; averaged if there is one. UserError without weights."""
    return choose_weights(read_file(path), path)[0]


def choose_weights(content: object, path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Take the weights of what read_file() gave, as read_weights() does -> them, and which of several, or ''."""
    found = dict(_state_dicts(content))
    if not found:
        raise UserError(
            f"{path} holds no weights: expected a state dict, or one under {', '.join(NESTED)}; "
            f"found {_describe(_innermost(content))}"
        )
    taken, *others = found
    weights = _unwrapped({str(name): value for name, value in found[taken].items()})
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    averaged = ", which are averaged" if taken.partition(".")[0] in AVERAGED else ""
    return weights, f"weights of {taken}{averaged}; not taken: {', '.join(others)}" if others else ""


def _state_dicts(content: object, where: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[Any, Tensor]]]:
    """Yield each state dict in a file with the dotted keys that lead to it, those to prefer first."""
    if not isinstance(content, Mapping):
        return
    if content and all(map(is_plain, content.values())):
        yield where, content
    elif depth < DEEPEST:
        for key in NESTED:
            yield from _state_dicts(content.get(key), f"{where}.{key}" if where else key, depth + 1)


def _innermost(content: object) -> object:
    """What lies where the weights should be."""
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            break
        content = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    return content


def _unwrapped(state: Mapping[str, T]) -> dict[str, T]:
    """The same under names without WRAPPERS, at whatever place; as it is where two would have the same name."""
    names = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state]
    return dict(zip(names if len(set(names)) == len(names) else state, state.values(), strict=True))


def _renamed(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names that the model gives them, as far as they are the same but for wrappers.

    One prefix of all of them is taken off, as Lightning puts it before a module's model; what lies beside that, such
    as the weights of a loss, is not the model's.
    """
    own = dict(zip(_unwrapped(expected), expected, strict=True))
    found = _unwrapped(found)
    if "n_averaged" not in own:
        found.pop("n_averaged", None)  # AveragedModel counts there
    first = next(iter(own))
    prefixes = {name.removesuffix(first) for name in found if name.endswith(f".{first}")}
    if len(prefixes) == 1 and not found.keys() & own.keys():
        (prefix,) = prefixes
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    if not any(name.endswith(COUNTER) for name in found):  # files of torch before 0.4.1, and of other libraries
        found |= {name: expected[own[name]] for name in own if name.endswith(COUNTER)}
    return {own.get(name, name): value for name, value in found.items()}


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
    weights, which = choose_weights(read_file(path), path)
    return [*([f"{path}: {which}"] if which else []), *fit(model, weights, path)]


def fit(model: nn.Module, found: dict[str, Tensor], path: str | Path) -> list[str]:
    """Do what load_weights does with a state dict that was read from a path. Other models than GhostNet fit exactly.

    UserError for weights that are NaN or infinite.
    """
    expected: dict[str, Tensor] = model.state_dict()
    messages: list[str] = []
    found = _renamed(found, expected)
    if not isinstance(model, GhostNet):
        if differences := _differences(found, expected):
            raise UserError(f"{path} does not fit {type(model).__name__}: {differences}")
        _check_finite(found, path)
        model.load_state_dict(found)
        return messages
    classes = _classes(found, expected)
    if classes not in (None, model.num_classes):
        found |= {name: expected[name] for name in CLASSIFIER}
        messages.append(f"{path}: classifier of {classes} classes replaced by a new one of {model.num_classes}")
    if differences := _differences(found, expected):
        hint = _hint(found, model)
        raise UserError(f"{path} does not fit GhostNet of width {model.width:g}: {differences}{hint}")
    _check_finite(found, path)
    model.load_state_dict(found)
    return messages


def _check_finite(found: Mapping[str, Tensor], path: str | Path) -> None:
    bad = [name for name, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(
            f"{path}: {bad[0]}{f' and {len(bad) - 1} more tensors hold' if bad[1:] else ' holds'} NaN or infinite "
            "numbers: the training that wrote it had gone bad. Take an earlier checkpoint"
        )


def _describe(content: object) -> str:
    if isinstance(content, _Inert):
        return "an object that holds none"
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"the keys {_few([str(key) for key in content])}" if content else "nothing"


def _head(path: Path) -> bytes:
    """First bytes of a file; UserError where there are none."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
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


class _Inert:
    """Stands in for whatever a file holds beside weights: takes its parts, and does nothing with them."""

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


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


def _plain_dict(*_: object) -> dict[Any, Any]:
    """Stands in for defaultdict, whose items follow."""
    return {}


def _plain_list(*_: object) -> list[Any]:
    """Stands in for deque, whose items follow."""
    return []


def _harmless() -> list[Any]:
    """List what a published file may name beside tensors; a pair answers a name in the file with a stand-in."""
    return [
        argparse.Namespace,
        (_NumpyType, "numpy.dtype"),
        (_numpy_scalar, "numpy.core.multiarray.scalar"),
        (_numpy_scalar, "numpy._core.multiarray.scalar"),
        (_npu_tensor, "torch_npu.utils.storage._rebuild_npu_tensor"),
        (int, "torch_npu.npu._format.Format"),
        (_plain_dict, "collections.defaultdict"),
        (_plain_list, "collections.deque"),
        *((_Inert, name) for name in INERT),
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
