"""The process group `hccl`: gloo's collectives on the npu tensors' memory, with HCCL's refusals.

A collective has ended when its call returns, whatever `async_op` says: its future is for those who ask for it.  A
future that gloo's threads complete would run Python in them, which ends the process with noise when it comes at its
exit.  A peer that dies makes the others' call raise, as gloo does.
"""

import torch
import torch.distributed as dist

from torch_npu import counters
from torch_npu._runtime import host

_COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)
_POINT_TO_POINT = ("recv", "recv_anysource", "send")
_NAMES = {"_allgather_base": "all_gather_single", "_reduce_scatter_base": "reduce_scatter_single"}
_FLAT = {"all_gather_single", "reduce_scatter_single"}  # HCCL sees no shapes here, gloo would want them to fit
_REDUCIBLE = {torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32}


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _on_host(value):
    if isinstance(value, torch.Tensor):
        if value.device.type != "npu":
            raise RuntimeError(f"No backend type associated with device type {value.device.type}")
        return host(value)
    return [_on_host(item) for item in value] if isinstance(value, list | tuple) else value


def _check_reduction(name, args):
    reduction = next((kind for arg in args if (kind := getattr(arg, "reduceOp", None)) is not None), None)
    if reduction is None:
        return
    kinds = dist.ReduceOp
    if not any(reduction == kind for kind in (kinds.SUM, kinds.PRODUCT, kinds.MIN, kinds.MAX)):
        names = ("AVG", "BAND", "BOR", "BXOR", "PREMUL_SUM")
        raise RuntimeError(f"Cannot use {next(n for n in names if reduction == getattr(kinds, n))} with HCCL")
    for tensor in _tensors(args):
        if tensor.dtype not in _REDUCIBLE:
            raise RuntimeError(f"HCCL {name}: Unsupported data type {tensor.dtype}")


def _collective(method):
    name = _NAMES.get(method, method)

    def run(self, *args, **kwargs):
        if self._carries_hosts and all(tensor.device.type == "cpu" for tensor in _tensors(args)):
            return getattr(self._gloo, method)(*args, **kwargs)
        _check_reduction(name, args)
        counters.collectives[name] += 1
        if name in ("allreduce", "allreduce_coalesced"):
            counters.allreduce_dtypes.update(str(tensor.dtype).removeprefix("torch.") for tensor in _tensors(args))
        arguments = [_on_host(arg) for arg in args]
        if name in _FLAT:
            arguments[:2] = [tensor.view(-1) for tensor in arguments[:2]]
        getattr(self._gloo, method)(*arguments, **kwargs).wait()
        future = torch.futures.Future()  # not gloo's, which is of host tensors
        future.set_result(args[0] if args and isinstance(args[0], list | tuple) else list(_tensors(args[:1])))
        return torch._C._distributed_c10d._create_work_from_future(future)

    return run


def _point_to_point(method):
    def run(self, *args, **kwargs):
        counters.collectives[method] += 1
        return getattr(self._gloo, method)(*[_on_host(arg) for arg in args], **kwargs)

    return run


class ProcessGroupHCCL(dist.ProcessGroup):
    """A process group of npu tensors that hands their memory to a gloo group of its own.

    With the backend "cpu:gloo,npu:hccl" it is the group of CPU tensors too, since torch lets a group that is written in
    Python be all of it; those are gloo's then and count nothing.
    """

    def __init__(self, options):
        super().__init__(options.group_rank, options.group_size)
        self._gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
        self._carries_hosts = torch.device("cpu") in options.process_group._device_types
        for kind in ("npu", "cpu") if self._carries_hosts else ("npu",):
            self._register_backend(torch.device(kind), dist.ProcessGroup.BackendType.CUSTOM, self._gloo)

    def getBackendName(self):  # noqa: N802 - torch's name
        return "hccl"


def register():
    """Make `hccl` known to torch.distributed, as the backend of npu tensors."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return
    for make, methods in ((_collective, _COLLECTIVES), (_point_to_point, _POINT_TO_POINT)):
        for method in methods:
            if hasattr(dist.ProcessGroupGloo, method):
                setattr(ProcessGroupHCCL, method, make(method))
    dist.Backend.register_backend(
        "hccl", lambda options, _: ProcessGroupHCCL(options), extended_api=True, devices=["npu"]
    )
