"""The only room that knows npu, cuda and cpu apart."""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import InvalidRequirement, Requirement
from torch import Tensor

from ghostnet.errors import UserError
from ghostnet.schema import did_you_mean

Kind = Literal["auto", "cpu", "cuda", "npu"]
Mark = Any
"""A moment on a device: seconds on the CPU, an event on a card."""

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
"""What carries the collectives of each kind."""

ENVIRONMENT = {
    "npu": {
        "TASK_QUEUE_ENABLE": "2",  # launches kernels from a second thread, with the workspaces made there too
        # Eager fusion of element-wise operations and BatchNorm (1 or true), which A2 and A3 cards have. Off: it has
        # not been tried on cards yet.
        "TORCH_NPU_LAZY_FUSION": "0",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "HCCL_WHITELIST_DISABLE": "1",  # no list of the hosts that may connect
        "HCCL_CONNECT_TIMEOUT": "600",  # seconds; ranks that index a large data set first connect late
        "HCCL_EXEC_TIMEOUT": "1800",  # seconds; must stay below HCCL_EVENT_TIMEOUT, 1868
    }
}
"""Defaults of each kind's libraries; what the user's environment says goes first."""

NO_TRITON = ("ascendc", "dvm", "mlir")
"""Values of TORCHINDUCTOR_NPU_BACKEND with which torch.compile's inductor needs no Triton."""
GRAPHS = ("npugraphs", "npugraph_ex")
"""Backends of torch.compile that capture NPU graphs."""

PIXELS_PER_THREAD = 4 * 224 * 224
"""Whose widest layers stay in a core's share of the caches."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""

PCI = Path("/sys/bus/pci/devices")
HUAWEI, ACCELERATOR = "0x19e5", "0x1200"


def choose(kind: Kind) -> tuple[str, str]:
    """Return (cpu, cuda or npu; why). auto takes an NPU, then CUDA, then the CPU.

    Raises UserError if a kind that is named can't be used, and if auto would leave NPUs idle for the build of torch.
    """
    if kind == "cpu":
        return kind, "as asked"
    npu = npu_fault() if kind in ("npu", "auto") else None
    if kind == "npu" and npu is not None:
        raise UserError(f"device=npu_…: {npu} To run without a card: device=cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device=cuda_…: torch {torch.__version__} sees no CUDA card. Check nvidia-smi and the driver, "
            "or run without a card: device=cpu"
        )
    if kind != "auto":
        return kind, "as asked"
    if npu is None:
        return "npu", "auto: an NPU is there"
    if importlib.util.find_spec("torch_npu") is None:
        npu = "torch_npu is not installed"
    if torch.cuda.is_available():
        return "cuda", f"auto: {npu.rstrip('.')}; a CUDA card is there"
    if cuda_build_beside_torch_npu():
        raise UserError(f"device=auto: {npu} To run without a card: device=cpu")
    return "cpu", f"auto: {npu.rstrip('.')}; no CUDA card is visible"


def npu_fault() -> str | None:
    """Why no NPU can be used, with its way out; None where one can. Loads torch_npu."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: pip install -r requirements-npu.txt."
    if fault := cuda_build_beside_torch_npu():
        return fault
    if fault := torch_mismatch():
        return fault
    try:
        import torch_npu  # noqa: F401 (it adds torch.npu)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if ".so" in first or "ASCEND" in str(error):
            return (
                f"torch_npu can't find CANN ({first}): source /usr/local/Ascend/cann/set_env.sh (in older "
                "CANN ascend-toolkit/set_env.sh), "
                "or install the CANN toolkit that requirements-npu.txt names."
            )
        return f"torch_npu can't be loaded ({first}): reinstall it with pip install -r requirements-npu.txt."
    if not torch.npu.is_available():  # type: ignore[attr-defined]
        seen = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        return (
            "torch_npu and CANN are there, but no card is: check npu-smi info, the driver, and in a container "
            f"--device=/dev/davinci0{f'; ASCEND_RT_VISIBLE_DEVICES is {seen!r}' if seen is not None else ''}."
        )
    return None


def cuda_build_beside_torch_npu() -> str | None:
    """Why torch_npu must not be imported beside this torch, with the way out; None if it may be.

    Beside a CUDA build its static initialisers abort the process, which no `except` catches.
    """
    if not torch.version.cuda or importlib.util.find_spec("torch_npu") is None:
        return None
    return (
        f"torch {torch.__version__} is a CUDA build, beside which torch_npu aborts; torch_npu needs the CPU build of "
        "torch: pip install -r requirements-npu.txt in a new environment installs it."
    )


def torch_mismatch() -> str | None:
    """Why the installed torch_npu doesn't go with the installed torch, with the way out; None where it does."""
    try:
        version, wanted = importlib.metadata.version("torch_npu"), importlib.metadata.requires("torch_npu") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in wanted:
        with contextlib.suppress(InvalidRequirement):
            need = Requirement(line)
            if need.name != "torch" or (need.marker and not need.marker.evaluate()):
                continue
            if not need.specifier.contains(torch.__version__, prereleases=True):
                return (
                    f"torch_npu {version} goes with torch {need.specifier}, but torch {torch.__version__} is "
                    "installed: pip install -r requirements-npu.txt installs versions that match."
                )
    return None


def cards(kind: str) -> int:
    """How many cards of a kind are visible; of CPUs there is always one more."""
    return 1 << 20 if kind == "cpu" else int(_module(kind).device_count())


def check_cards(kind: str, count: int, ids: list[int] | None) -> None:
    """UserError where the cards that are asked for are not all there."""
    there = cards(kind)
    wanted = ids or list(range(count))
    missing = [index for index in wanted if index >= there]
    if missing:
        one = "card 0 is" if there == 1 else f"cards 0 to {there - 1} are"
        what = f"device.ids={ids}" if ids else f"device.count={count}"
        raise UserError(
            f"{what}: {kind} card {', '.join(map(str, missing))} is not there; {one}. "
            f"Give device.count={there}, or device.ids of those that are."
        )


def set_environment(kind: str) -> None:
    """Defaults for the libraries of a kind, where the user's environment says nothing; before they are first used."""
    for name, value in ENVIRONMENT.get(kind, {}).items():
        os.environ.setdefault(name, value)


def resolve(kind: str, index: int = 0, allow_hf32: bool | None = None) -> torch.device:
    """Set up the card or processor to compute on, make it current, and return it.

    kind: what choose() gave. allow_hf32: whether an NPU may multiply float32 numbers with 10-bit mantissas, in
    convolutions and in matrix products; None: as torch_npu has it, in convolutions alone.
    """
    if kind == "cpu":
        # Denormal numbers, common in late training, take the slow path of the processor.
        torch.set_flush_denormal(True)
        keep_memory()
        return torch.device("cpu")
    set_environment(kind)
    module = _module(kind)
    module.set_device(index)
    if kind == "npu":
        # Both before any model moves: the defaults of first-generation cards compile every new shape for minutes.
        torch.npu.set_compile_mode(jit_compile=False)  # type: ignore[attr-defined]
        torch.npu.config.allow_internal_format = False  # type: ignore[attr-defined]
        if allow_hf32 is not None:
            torch.npu.conv.allow_hf32 = allow_hf32  # type: ignore[attr-defined]
            torch.npu.matmul.allow_hf32 = allow_hf32  # type: ignore[attr-defined]
        # torch_npu's own way of copying a storage, which every deepcopy of a buffer takes, asks a TypedStorage for
        # its device.
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
    return torch.device(kind, index)


def keep_memory() -> bool:
    """Have the C library keep what tensors free, where it is glibc and the user's environment doesn't tune it.

    It would give each tensor of 32 MiB or more back at once, and fetch, fault in and clear its pages anew in every
    step: half of a training step's time and more.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or "MALLOC_MMAP_MAX_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def _module(kind: str) -> Any:  # noqa: ANN401 (a module that torch_npu adds to torch at run time)
    return torch.cuda if kind == "cuda" else torch.npu  # type: ignore[attr-defined]


def describe(device: torch.device) -> str:
    """The hardware in words, for logs and results: the card's name, or the processor and its threads."""
    if device.type != "cpu":
        return str(_module(device.type).get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def choices(device: torch.device) -> str:
    """What was chosen for the device's sake, in words."""
    words = [str(memory_format(device)).removeprefix("torch.")]
    if device.type == "cpu":
        words.append("freed memory kept" if keep_memory() else "memory settings as they were")
    return ", ".join(words)


def cpus() -> set[int]:
    """The CPUs this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_count() -> int:
    """How many CPUs this process may use."""
    return len(cpus())


def cpus_near(device: torch.device) -> set[int]:
    """The CPUs of this process on the card's side of the machine; all where that can't be told."""
    near: set[int] = set()
    with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):
        near = (
            _cpu_list((_pci_folder(device) / "local_cpulist").read_text(encoding="utf-8"))
            if device.type != "cpu"
            else set()
        )
    return near & cpus() or cpus()


def _pci_folder(device: torch.device) -> Path:
    index = device.index or 0
    if device.type == "cuda":
        card: Any = torch.cuda.get_device_properties(index)
        return PCI / f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
    # Ascend cards are numbered in the order of their PCI addresses.
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    number = int(visible.split(",")[index]) if visible else index

    def reads(folder: Path, name: str) -> str:
        return (folder / name).read_text(encoding="utf-8").strip()

    huawei = [folder for folder in sorted(PCI.iterdir()) if reads(folder, "vendor") == HUAWEI]
    return [folder for folder in huawei if reads(folder, "class").startswith(ACCELERATOR)][number]


def _cpu_list(text: str) -> set[int]:
    """The kernel's list of CPUs, '0-3,8' -> {0, 1, 2, 3, 8}."""
    spans = [part.split("-") for part in text.strip().split(",") if part]
    return {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}


def pinned_by_user(kind: str) -> bool:
    """Whether the environment leaves it to torch_npu to choose each rank's CPUs."""
    return kind == "npu" and bool(os.environ.get("CPU_AFFINITY_CONF"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type != "cpu":
        _module(device.type).synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: the card's, or of the process's resident memory."""
    if device.type != "cpu":
        return int(_module(device.type).max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mark(device: torch.device) -> Mark:
    """This moment on the device, without waiting for it: when all that was asked of it until now is done."""
    if device.type == "cpu":
        return time.perf_counter()
    event = _module(device.type).Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: Mark, after: Mark) -> float:
    """Seconds from one mark to another; the device must have reached both."""
    return float(after - before if isinstance(after, float) else before.elapsed_time(after) / 1000)


def wait_for(moment: Mark) -> None:
    """Wait until the device has reached a mark."""
    if not isinstance(moment, float):
        moment.synchronize()


def half_dtype(device: torch.device) -> torch.dtype:
    """What O2 calls half: float16 on cards, bfloat16 on CPUs, whose float16 kernels are slow or missing."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def check_bf16(device: torch.device) -> None:
    """UserError on a card without bfloat16: first-generation Ascend cards would silently compute in fp32."""
    if device.type != "cpu" and not has_bf16(device):
        raise UserError(f"amp=bf16: {describe(device)} has no bfloat16. Use amp=fp16 or amp=o2.")


def check_compile(device: torch.device, backend: str) -> None:
    """Raise UserError if torch.compile has no such backend, or if it can't work on this device as things are."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        listed = ", ".join(torch.compiler.list_backends())
        raise UserError(
            f"compile.backend={backend}: torch.compile has no such backend.{did_you_mean(backend, known)} "
            f"There are: {listed}."
        )
    if device.type != "npu":
        return
    generator = os.environ.get("TORCHINDUCTOR_NPU_BACKEND", "default")
    if backend == "inductor" and generator not in NO_TRITON and not _has_triton_ascend():
        raise UserError(
            "compile=true: on NPUs torch.compile needs Ascend's Triton, which is not installed: pip install "
            "triton-ascend. Without it: compile=false"
        )
    if backend in GRAPHS and (ENVIRONMENT["npu"] | os.environ)["TASK_QUEUE_ENABLE"] == "2":
        raise UserError(
            f"compile.backend={backend}: NPU graphs can't be captured under TASK_QUEUE_ENABLE=2, which is set unless "
            "the shell sets it: export TASK_QUEUE_ENABLE=1."
        )


def _has_triton_ascend() -> bool:
    """Whether the package triton is Ascend's: others have no backend for NPUs."""
    triton = importlib.util.find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or []
    return any((Path(folder) / "backends" / "ascend").is_dir() for folder in folders)


def compiler_of(device: torch.device) -> str:
    """What torch.compile needs beside torch on a device, in words."""
    return {
        "cpu": "a C++ compiler such as g++",
        "cuda": "Triton",
        "npu": "Triton (pip install triton-ascend)",
    }[device.type]


def check_sync_bn(device: torch.device) -> None:
    """UserError where torch has no SyncBatchNorm."""
    if device.type == "cpu":
        raise UserError("sync_bn=true: torch's SyncBatchNorm needs cards. Give sync_bn=false, or a device with cards.")


def saturates(device: torch.device) -> bool:
    """Whether an overflow becomes the largest number instead of infinity, as on first-generation Ascend cards."""
    if device.type != "npu":
        return False
    import torch_npu

    return not torch_npu.npu.utils.is_support_inf_nan()


def clear_overflow(device: torch.device) -> None:
    """Lower the flag that an overflow raises on a card that saturates; the host does not wait."""
    import torch_npu

    torch_npu.npu_clear_float_status(torch.zeros(8, device=device))


def overflowed(device: torch.device) -> Tensor:
    """Return 1.0, on the device, if the flag of an overflow is raised on any rank's card, else 0.0; nobody waits."""
    import torch_npu

    status = torch_npu.npu_get_float_status(torch.zeros(8, device=device))
    found: Tensor = (status[0] != 0).float()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found


def no_fused_sgd(device: torch.device, momentum: float) -> str | None:
    """Return why torch's fused SGD can't be used on a device, None if it can."""
    if device.type != "npu":
        return None
    if saturates(device):
        return f"{describe(device)} has no kernel for it"
    return None if momentum else "its kernel for NPUs wants a momentum"


def npu_fused_sgd_class(device: torch.device) -> Any:  # noqa: ANN401 (a class of torch_npu's)
    """Return torch_npu's NpuFusedSGD; UserError on other devices."""
    if device.type != "npu":
        raise UserError(f"optim=npu_fused_sgd is torch_npu's and needs NPUs, not {device.type}. Give optim=fused_sgd.")
    import torch_npu.optim

    return torch_npu.optim.NpuFusedSGD


def fused_adamw(device: torch.device) -> bool:
    """Whether torch's fused AdamW is one kernel: on NPUs it is a loop over the parameters, or missing."""
    return device.type != "npu"


def fused_step_skips(device: torch.device) -> bool:
    """Whether a fused optimizer's kernel looks at the flag of an overflow by itself: on NPUs the host reads it."""
    return device.type != "npu"


def apex_options(device: torch.device) -> dict[str, Any]:
    """What Ascend's apex wants to be told beyond NVIDIA's: one buffer for all gradients."""
    return {"combine_grad": True} if device.type == "npu" else {}


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last where its kernels win (CPU, CUDA), contiguous on NPUs."""
    return torch.contiguous_format if device.type == "npu" else torch.channels_last


def images_at_once(device: torch.device, pixels: int) -> int:
    """How many images of so many pixels a forward pass of evaluation takes: on the CPU, what its caches hold."""
    return max(1, torch.get_num_threads() * PIXELS_PER_THREAD // pixels) if device.type == "cpu" else 1 << 20


def lacks_kernels(device: torch.device) -> bool:
    """Whether PyTorch is slow at BatchNorm of few channels and at half-precision gradients of strided convolutions."""
    return device.type == "cpu"


def computes_again(device: torch.device) -> bool:
    """Whether the backward pass computes cheap values again rather than keep them: not on cards, with fast memory."""
    return device.type == "cpu"


def pinned(device: torch.device) -> bool:
    """Whether host buffers should be pinned: only beside a card, where no card is visible pinning raises."""
    return device.type != "cpu"


def copy_to(device: torch.device, *tensors: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
    """Copies on the device, under way without waiting, and a function that waits until the sources may be reused.

    They are made beside what the device computes meanwhile; what is asked of it from now on waits for them.
    On the CPU these are the tensors themselves: they are free once the step that uses them has returned.
    """
    if device.type == "cpu":
        return list(tensors), lambda: None
    module, aside = _module(device.type), _stream_for_copies(device)
    computing = module.current_stream(device)
    with module.stream(aside):
        copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
        event = module.Event()
        event.record(aside)
    computing.wait_event(event)
    for copy in copies:
        copy.record_stream(computing)  # their memory is not given to the next copies before the step is done with it
    return copies, event.synchronize


@functools.cache
def _stream_for_copies(device: torch.device) -> Any:  # noqa: ANN401 (a stream of torch.cuda or torch.npu)
    return _module(device.type).Stream(device)


def free_memory(device: torch.device) -> tuple[int, int]:
    """(free, all) bytes of a card's memory, whoever uses it."""
    free, total = _module(device.type).mem_get_info(device)
    return int(free), int(total)


def has_bf16(device: torch.device) -> bool:
    """Whether a card computes in bfloat16: first-generation Ascend cards don't, nor CUDA cards before Ampere."""
    # Which torch by itself takes for able, as they can be made to: slower than in float32.
    options = {"including_emulation": False} if device.type == "cuda" else {}
    return bool(_module(device.type).is_bf16_supported(**options))
