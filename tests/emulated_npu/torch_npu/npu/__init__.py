"""The module torch.npu."""

import types

import torch

from torch_npu import _runtime, _storage
from torch_npu.npu import _options, utils
from torch_npu.npu._options import set_compile_mode
from torch_npu.npu.graphs import NPUGraph, graph, make_graphed_callables
from torch_npu.npu.utils import _lazy_init, is_bf16_supported

_storage.register()
library = _runtime.library
TOTAL_MEMORY = 64 << 30
config = _options.Config()
conv = _options.AllowHF32("conv", True)
matmul = _options.AllowHF32("matmul", False)

__all__ = [
    "NPUGraph",
    "amp",
    "config",
    "conv",
    "graph",
    "is_bf16_supported",
    "make_graphed_callables",
    "matmul",
    "set_compile_mode",
    "utils",
]

# ---------------------------------------------------------------- devices


def is_available():
    return device_count() > 0


def device_count():
    return library.emulated_npu_count()


def is_initialized():
    return bool(library.emulated_npu_initialized())


def init():
    _lazy_init()


def _is_in_bad_fork():
    return bool(library.emulated_npu_forked())


def _get_device_index(device=None, optional=False, allow_cpu=False):
    if isinstance(device, int):
        return device
    if device is None:
        return torch._C._accelerator_getDeviceIndex()
    device = torch.device(device)
    if allow_cpu and device.type == "cpu":
        return -1
    if device.type != "npu":
        raise ValueError(f"Expected a npu device, but got: {device}")
    return torch._C._accelerator_getDeviceIndex() if device.index is None else device.index


_utils = types.SimpleNamespace(_get_device_index=_get_device_index)


def _card(device=None):
    """The index of a card that is there."""
    index = _get_device_index(device)
    if not 0 <= index < device_count():
        raise RuntimeError(f"Invalid NPU device id {index}: {device_count()} available")
    return index


def set_device(device):
    index = _card(device)
    _lazy_init()
    _runtime.set_up(f"set_device({index})")
    torch._C._accelerator_setDeviceIndex(index)


def current_device():
    _lazy_init()
    return torch._C._accelerator_getDeviceIndex()


class device:  # noqa: N801 - torch's name
    """Makes a card the current one for a while."""

    def __init__(self, device):
        self.index = _get_device_index(device)

    def __enter__(self):
        self.previous = current_device()
        torch._C._accelerator_setDeviceIndex(_card(self.index))

    def __exit__(self, *exc):
        torch._C._accelerator_setDeviceIndex(self.previous)


def get_device_properties(device=None):
    _lazy_init()
    name = "Ascend910A" if utils.FIRST_GENERATION else "Ascend910B2"
    return types.SimpleNamespace(name=name, total_memory=TOTAL_MEMORY, index=_card(device))


def get_device_name(device=None):
    return get_device_properties(device).name


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16, torch.float32] if is_bf16_supported() else [torch.float16, torch.float32]


# ---------------------------------------------------------------- streams and events


class Stream(torch.Stream):
    def __new__(cls, device=None, priority=0, **kwargs):
        if "stream_id" in kwargs:
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, device=torch.device("npu", _card(device)), priority=priority)


class Event:
    """Makes a torch.Event, whose elapsed_time would refuse one of a subclass."""

    def __new__(cls, enable_timing=False, blocking=False, interprocess=False):
        return torch.Event("npu", enable_timing=enable_timing, blocking=blocking)


class StreamContext:
    """Makes a stream the current one for a while; None is no change."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        if self.stream is not None:
            self.stream.__enter__()

    def __exit__(self, *exc):
        if self.stream is not None:
            self.stream.__exit__(*exc)


def stream(stream):
    return StreamContext(stream)


def _wrapped(stream):
    return Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def current_stream(device=None):
    _lazy_init()
    return _wrapped(torch._C._accelerator_getStream(_card(device)))


def default_stream(device=None):
    _lazy_init()
    return Stream(stream_id=0, device_index=_card(device), device_type=int(torch._C._autograd.DeviceType.PrivateUse1))


def set_stream(stream):
    if stream is not None:
        torch._C._accelerator_setStream(stream)


def synchronize(device=None):
    _lazy_init()
    torch._C._accelerator_synchronizeDevice(_card(device))


# ---------------------------------------------------------------- random numbers


def _default_generators():
    library.emulated_npu_hand_out_defaults(1)
    try:
        return tuple(torch.Generator(torch.device("npu", index)) for index in range(device_count()))
    finally:
        library.emulated_npu_hand_out_defaults(0)


default_generators = _default_generators()


def manual_seed(seed):
    if default_generators:
        default_generators[_card()].manual_seed(int(seed))


def manual_seed_all(seed):
    for generator in default_generators:
        generator.manual_seed(int(seed))


def initial_seed():
    return default_generators[_card()].initial_seed()


def get_rng_state(device="npu"):
    return default_generators[_card(device)].get_state()


def set_rng_state(new_state, device="npu"):
    default_generators[_card(device)].set_state(new_state)


def get_rng_state_all():
    return [generator.get_state() for generator in default_generators]


def set_rng_state_all(new_states):
    for generator, state in zip(default_generators, new_states, strict=True):
        generator.set_state(state)


# ---------------------------------------------------------------- memory


def memory_allocated(device=None):
    """Bytes of the live storages on a card."""
    return library.emulated_npu_allocated(_card(device))


def max_memory_allocated(device=None):
    return library.emulated_npu_peak(_card(device))


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def reset_peak_memory_stats(device=None):
    library.emulated_npu_reset_peak(_card(device))


def mem_get_info(device=None):
    _lazy_init()
    return TOTAL_MEMORY - memory_allocated(device), TOTAL_MEMORY


def empty_cache():
    pass


from torch_npu.npu import amp  # noqa: E402 - the scaler asks this module
