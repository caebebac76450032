"""Test-only stand-in for torch_npu, Huawei Ascend's PyTorch plugin: `npu` devices that compute on the CPU.

Put the folder that holds this package on PYTHONPATH.  `import torch` then loads it as it would the real wheel, by the
entry point; with TORCH_DEVICE_BACKEND_AUTOLOAD=0 `import torch_npu` does.  One process can do that once.

How it works.  guard.cpp, built with g++ by the first import (10 s; then it lies in a cache), registers PyTorch's
PrivateUse1 backend: devices, streams, events, pinned memory, generators, a counting allocator, autocast, and one kernel
for all operators, which lends the npu tensors' storages to CPU tensors, calls the CPU's kernel and relabels what comes
out.  Hence results are bit-equal to the CPU's, as long as both take the same road: of torch's optimizers fix `foreach`
and `fused`, which default to foreach on npu and to neither on the CPU.  Nothing is asynchronous, but what would make
the host wait for a real card is counted.  The modules:

- `_runtime`: builds, loads and registers guard.cpp.
- `counters`: what ran, in this process (`snapshot()`, `mark(name)`) or in a report at its end.
- `npu`: the module `torch.npu`, with `npu.utils`, `npu.amp` and, as far as they refuse, `npu.graphs`.
- `distributed`: the process group `hccl`, over gloo.
- `_float_status`: the flag that an overflow raises on a first-generation card.
- `optim`: NpuFusedSGD.
- `_sync_batch_norm`: the kernels under torch.nn.SyncBatchNorm, which the CPU lacks.

Environment variables:

- EMULATED_NPU_COUNT: cards, 2 by default.  0 is a driver without a card: is_available() is False, and so is everything
  that pins memory refused, as by the real one.
- EMULATED_NPU_GENERATION: 1 is an Ascend910A: no bf16, no fused optimizers, lists of tensors in loops, and an overflow
  leaves the largest number, NaN leaves 0, and both raise the card's flag. Anything else is an Ascend910B2.
- EMULATED_NPU_MEMORY: MiB of a card; what goes beyond is refused in the real one's words.  Unlimited by default.
- EMULATED_NPU_CANN: 0 is a machine without CANN, where the import fails.
- EMULATED_NPU_REPORT: a folder, where each process leaves `<pid>.json` with its counters when it exits.
- EMULATED_NPU_TRACE: 1 adds to the counters who synchronised or copied, and when.
- EMULATED_NPU_CACHE: where the built library lies, a folder of the user's in the temporary one by default.
- CXX: the compiler, g++ by default.

Not emulated: asynchrony, what the card's dtypes lack, its layouts, HF32, and its speed.
"""

import os

if os.environ.get("EMULATED_NPU_CANN") == "0":
    raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")

_autoload_setting = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # `import torch` below shall not import this again

import torch  # noqa: E402

from torch_npu import _runtime  # noqa: E402

_runtime.library.emulated_npu_register()
torch.utils.rename_privateuse1_backend("npu")

from torch_npu import _sync_batch_norm, counters, distributed, npu, optim  # noqa: E402
from torch_npu._float_status import npu_clear_float_status, npu_get_float_status  # noqa: E402
from torch_npu.version import __version__  # noqa: E402

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
torch.version.cann = npu.utils.get_cann_version()
_sync_batch_norm.register()
distributed.register()
counters.report_at_exit()

__all__ = [
    "__version__",
    "counters",
    "distributed",
    "npu",
    "npu_clear_float_status",
    "npu_get_float_status",
    "optim",
]


def _autoload():
    """Called by `import torch` after the entry point's module: child processes inherit the switch as it was."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_setting
