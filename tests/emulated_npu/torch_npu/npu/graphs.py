"""Graphs of operations: what the real ones refuse is refused; none is captured, which is said."""

import os
import time

import torch


def _not_supported():
    """What the real one ends its refusals with."""
    if os.environ.get("TORCH_NPU_COMPACT_ERROR_OUTPUT") == "1":
        return ""
    place = f"PID:{os.getpid()}, Device:{torch.npu.current_device()}, RankID:{os.environ.get('RANK', '-1')}"
    return f"\n[ERROR] {time.strftime('%Y-%m-%d-%H:%M:%S')} ({place}) ERR00007 PTA feature not supported"


class NPUGraph:
    def capture_begin(self, pool=None, capture_error_mode="global"):
        if os.environ.get("TASK_QUEUE_ENABLE") == "2" and os.environ.get("ASCEND_LAUNCH_BLOCKING") != "1":
            raise RuntimeError(
                "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture, please export TASK_QUEUE_ENABLE=1/0."
                + _not_supported()
            )
        raise NotImplementedError("the stand-in for torch_npu captures no graphs")


class graph:  # noqa: N801 - the real one's name
    """Would capture what runs within it; waits for the card before, as the real one."""

    def __init__(self, npu_graph, pool=None, stream=None, auto_dispatch_capture=False, capture_error_mode="global"):
        self.npu_graph, self.pool, self.capture_error_mode = npu_graph, pool, capture_error_mode

    def __enter__(self):
        torch.npu.synchronize()
        self.npu_graph.capture_begin(self.pool, self.capture_error_mode)

    def __exit__(self, *exc):
        pass


def make_graphed_callables(callables, sample_args, num_warmup_iters=3, allow_unused_input=False, pool=None):
    if torch.is_autocast_enabled("npu") and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "make_graphed_callables does not support the autocast caching. Please set `cache_enabled=False`."
        )
    for part in callables if isinstance(callables, tuple) else (callables,):
        if isinstance(part, torch.nn.Module) and (
            part._backward_hooks or part._forward_hooks or part._forward_pre_hooks
        ):
            raise RuntimeError(
                "Modules must not have hooks registered at the time they are passed. However, registering hooks on"
                " modules after passing them through make_graphed_callables is allowed."
            )
    with graph(NPUGraph(), pool):
        return callables


def npugraphs(graph_module, example_inputs, **kwargs):
    """torch.compile's backend of that name."""
    return make_graphed_callables(graph_module, tuple(example_inputs))
