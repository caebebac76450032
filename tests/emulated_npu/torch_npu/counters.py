"""What ran on the npu, counted; with EMULATED_NPU_TRACE=1 also who made the host wait or copied, and when.

`snapshot()` and the report at exit (EMULATED_NPU_REPORT) are one dictionary:

- "rank": the environment's RANK, or null.
- "ops": {"aten::add.Tensor": count} of operators that ran on npu tensors.
- "copies": {"h2d", "h2d_non_blocking", "d2h", "d2h_non_blocking", "d2d": count}.  Non-blocking are those of the former
  that were asked to be and whose host memory is pinned.
- "synchronizations": {reason: count}: "torch.npu.synchronize", "stream.synchronize", "event.synchronize" from the main
  thread, "event.synchronize (other thread)", "blocking h2d copy", "blocking d2h copy" (`tolist` is one), and operators
  whose result the host must see: "aten::_local_scalar_dense" (`item`, `float(x)`, `if x`), "aten::nonzero" (also by a
  boolean index), "aten::masked_select", "aten::_unique2"...
- "collectives": {"allreduce": count} of hccl, and "allreduce_dtypes": {"float32": count}.
- "setup": set-up calls in their order, such as "set_compile_mode(jit_compile=False)", and "first tensor".
- "events": the marks' names.
- "trace", if asked for: [[seconds since the epoch, kind, detail, caller]].  Kind "synchronization" with the reason,
  "h2d" or "d2h" with "N bytes" or "N bytes, non_blocking", or "mark" with its name.  The caller is the innermost frame
  outside torch and this package, "file.py:line function", or "" in a thread without Python, such as autograd's.  A
  blocking copy makes two entries.
"""

import atexit
import collections
import json
import os
import sys
import time
from pathlib import Path

import torch

from torch_npu import _runtime

collectives = collections.Counter()
allreduce_dtypes = collections.Counter()
python_ops = collections.Counter()  # of operators whose kernels are Python
_events = []
_trace = [] if os.environ.get("EMULATED_NPU_TRACE") == "1" else None
_ours = tuple(str(Path(module).parent) + os.sep for module in (torch.__file__, __file__))


def snapshot():
    """The counters now, a copy: see the module's docstring."""
    taken = json.loads(_runtime.library.emulated_npu_snapshot())
    for name, count in python_ops.items():
        taken["ops"][name] = taken["ops"].get(name, 0) + count
    rank = os.environ.get("RANK", "")
    taken["rank"] = int(rank) if rank.isdecimal() else None
    taken |= {"collectives": dict(collectives), "allreduce_dtypes": dict(allreduce_dtypes), "events": list(_events)}
    if _trace is not None:
        taken["trace"] = list(_trace)
    return taken


def mark(name):
    """Note that something happened now."""
    _events.append(name)
    _note("mark", name)


def _caller():
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_ours):
        frame = frame.f_back
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def _note(kind, detail):
    if _trace is not None:
        _trace.append([time.time(), kind, detail, _caller()])


@_runtime.TRACER
def _tracer(kind, detail):
    _note(kind.decode(), detail.decode())


if _trace is not None:
    _runtime.library.emulated_npu_trace(_tracer)


def report_at_exit():
    """Have the counters written when this process ends, and not by those that are forked from it."""
    folder = os.environ.get("EMULATED_NPU_REPORT")
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    target = Path(folder).absolute() / f"{os.getpid()}.json"

    def write(pid=os.getpid()):  # noqa: B008 - the pid of now, not of a fork's exit
        if pid == os.getpid():
            part = target.with_suffix(".part")
            part.write_text(json.dumps(snapshot()), encoding="utf-8")
            part.replace(target)

    atexit.register(write)
