"""What the stand-in torch_npu refuses and costs as the real wheels do; each test in its own process."""

import contextlib
import copy
import io
import os
import pickle
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.test_emulated_npu import apart, difference, load, python

pytestmark = pytest.mark.slow
NOT_SUPPORTED = r"\n\[ERROR\] [-:\d]+ \(PID:\d+, Device:0, RankID:-1\) ERR01007 OPS feature not supported"


@apart
def test_channels_last_can_neither_be_made_nor_allocated_on_a_card():
    load()
    last, card = torch.channels_last, torch.randn(2, 3, 4, 4).to("npu")
    host = torch.randn(2, 3, 4, 4).contiguous(memory_format=last)
    empty = "Only c10::MemoryFormat::Contiguous is supported for creating a npu tensor"
    to = "Only contiguous_format or preserve_format is supported."
    for action, message in (
        (
            lambda: card.contiguous(memory_format=last),
            "NPU contiguous operator only supported contiguous memory format.",
        ),
        (lambda: torch.empty(2, 3, 4, 4, device="npu", memory_format=last), empty),
        (lambda: card.to(memory_format=last), to),
        (lambda: host.to("npu", memory_format=last), to),
        (lambda: nn.Conv2d(3, 4, 3).to("npu", memory_format=last), to),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}{NOT_SUPPORTED}$"):
            action()

    contiguous = card.stride()
    for made in (card.clone(memory_format=last), torch.empty_like(card, memory_format=last)):  # taken and ignored
        assert made.stride() == contiguous
    kept = host.to("npu")
    for same in (kept, kept.clone(), kept.half(), torch.empty_like(kept), kept.contiguous(memory_format=last)):
        assert same.stride() == host.stride()
    assert torch.equal(kept.cpu(), host)
    assert kept.contiguous().stride() == contiguous
    weight = torch.randn(3, 3, 1, 1).to("npu")
    for result in (
        kept + 1,
        kept * kept,
        kept.relu(),
        F.conv2d(kept, weight),
        F.batch_norm(kept, None, None, training=True),
    ):
        assert result.stride() == contiguous


@apart
def test_a_contiguous_tensor_of_1_by_1_pixels_counts_as_channels_last_and_its_gradient_can_not_follow():
    load()
    small = torch.ones(2, 3, 1, 1).to("npu")
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert small.contiguous(memory_format=torch.channels_last) is small
    large = torch.randn(2, 3, 2, 2).to("npu").requires_grad_()
    large.transpose(2, 3).contiguous().square().sum().backward()
    assert torch.equal(large.grad, 2 * large)


def fused(kind, gradient=1.0, found_inf=None, **options):
    """One step of a fused optimizer with two groups of two parameters: the first one after it, ops and waits."""
    from torch_npu import counters

    parameters = [nn.Parameter(torch.ones(3, device="npu")) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.full((3,), gradient, device="npu")
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.5, fused=True, **options)
    if found_inf is not None:
        optimizer.grad_scale, optimizer.found_inf = (torch.full((), x, device="npu") for x in (8.0, found_inf))
    before = counters.snapshot()
    optimizer.step()
    after = counters.snapshot()
    changes = [difference(before[key], after[key]) for key in ("ops", "synchronizations")]
    return parameters[0].tolist(), *changes


@apart
def test_fused_sgd_wants_momentum_and_reads_the_flag_of_an_overflow_once_per_group():
    load()
    for found_inf in (None, 0.0):
        with pytest.raises(RuntimeError, match=r"^momentum must be positive, but got 0$"):
            fused("SGD", found_inf=found_inf)
    values, ops, waits = fused("SGD", momentum=0.9)
    assert (values, ops["aten::_fused_sgd_"], waits) == ([0.5] * 3, 2, {})
    for found_inf, gradient, expected in ((0.0, 8.0, 0.5), (1.0, float("inf"), 1.0)):
        values, ops, waits = fused("SGD", gradient, found_inf, momentum=0.9)
        assert (values, waits) == ([expected] * 3, {"aten::_local_scalar_dense": 2})


@apart
def test_fused_adamw_is_a_loop_that_looks_at_neither_the_scale_nor_the_flag_of_an_overflow():
    load()
    values, ops, waits = fused("AdamW", weight_decay=0)
    assert (ops["aten::_fused_adamw_"], ops["aten::sub.Tensor"], waits) == (4, 4, {})
    assert values == fused("AdamW", 1.0, found_inf=0.0, weight_decay=0)[0]  # gradients that are eight times too large
    values, _, waits = fused("AdamW", float("inf"), found_inf=1.0)
    assert (str(values), waits) == ("[nan, nan, nan]", {})


@apart
def test_npu_fused_sgd_refuses_what_it_can_not_join_and_does_not_see_gradients_of_later():
    torch_npu = load()
    make = torch_npu.optim.NpuFusedSGD

    def parameter(**kind):
        made = nn.Parameter(torch.ones(2, 3).to(**kind))
        made.grad = torch.full_like(made, 2.0)
        return made

    with pytest.raises(ValueError, match=r"^set_to_none is not supported in fused optimizers$"):
        make([parameter(device="npu")], lr=1).zero_grad(set_to_none=True)
    with pytest.raises(ValueError, match=r"^Nesterov momentum requires a momentum and zero dampening$"):
        make([parameter(device="npu")], lr=1, nesterov=True)
    mixed = [parameter(device="npu"), parameter(device="npu", dtype=torch.float16)]
    for parameters, error, message in (
        ([parameter(device="cpu")], RuntimeError, "Tensors to combine must be on NPU, got cpu."),
        (mixed, RuntimeError, "Tensors to combine must have the same dtype."),
        ([parameter(device="npu", dtype=torch.bfloat16)], TypeError, "Fused optimizer's parameters must be either"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            make(parameters, lr=1).step()

    weight = parameter(device="npu")
    optimizer = make([weight], lr=1)
    optimizer.step()
    assert weight.tolist() == [[-1.0] * 3] * 2
    weight.grad = torch.full_like(weight, 100.0)
    optimizer.step()
    assert weight.tolist() == [[-3.0] * 3] * 2  # by the gradient that was there when they were joined


@apart
def test_a_first_generation_card_lacks_the_fused_kernels_and_loops_over_lists():
    torch_npu = load(EMULATED_NPU_GENERATION="1")
    pointer = NOT_SUPPORTED.replace("ERR01007 OPS feature not supported", "ERR01004 OPS invalid pointer")
    for kind, kernel, options in (("SGD", "aclnnFusedSgd", {"momentum": 0.9}), ("AdamW", "aclnnApplyAdamWV2", {})):
        message = f"{kernel} or {kernel}GetWorkspaceSize not in libopapi.so, or libopapi.so not found."
        with pytest.raises(RuntimeError, match=f"^{message}{pointer}$"):
            fused(kind, **options)
    tensors = [torch.ones(2, device="npu") for _ in range(3)]
    before = torch_npu.counters.snapshot()
    torch._foreach_mul_(tensors, 2.0)
    flag, scale = torch.zeros((), device="npu"), torch.ones((), device="npu")
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, scale)
    after = torch_npu.counters.snapshot()
    assert difference(before["ops"], after["ops"])["aten::_foreach_mul_.Scalar"] == 3
    flags = {"aten::_amp_foreach_non_finite_check_and_unscale_": 1}  # of the card's overflow flag
    assert difference(before["synchronizations"], after["synchronizations"]) == flags


def graphed():
    return torch.npu.make_graphed_callables(nn.Linear(2, 2).to("npu"), (torch.ones(1, 2, device="npu"),))


def captured():
    with torch.npu.graph(torch.npu.NPUGraph()):
        pass


@apart
def test_graphs_refuse_the_task_queue_of_level_2_and_are_not_emulated_otherwise():
    load(TASK_QUEUE_ENABLE="2")
    refused = "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture, please export TASK_QUEUE_ENABLE=1/0."
    ending = NOT_SUPPORTED.replace("ERR01007 OPS", "ERR00007 PTA")
    for action in (graphed, captured):
        os.environ["TASK_QUEUE_ENABLE"] = "2"
        with pytest.raises(RuntimeError, match=f"^{refused}{ending}$"):
            action()
        del os.environ["TASK_QUEUE_ENABLE"]
        with pytest.raises(NotImplementedError, match="the stand-in for torch_npu captures no graphs"):
            action()
    with torch.autocast("npu"), pytest.raises(RuntimeError, match="does not support the autocast caching"):
        graphed()


def test_without_triton_torch_compile_ends_in_an_error_and_npugraphs_is_a_backend():
    code = "import torch, torch_npu; torch.compile(lambda x: x.relu() * 2, backend={!r})(torch.ones(2, device='npu'))"
    for backend, error in (
        ("inductor", r"InductorError: \w+: 'npu'"),
        ("npugraphs", "the stand-in for torch_npu captures no graphs"),
    ):
        result = python("-W", "default", "-c", code.format(backend))
        assert result.returncode == 1
        assert re.search(error, result.stderr), result.stderr


@apart
def test_a_copied_buffer_warns_once_and_a_pickled_tensor_prints_a_line_once():
    load()
    model = nn.BatchNorm1d(2)  # on the host: it's all the same to the real one
    with pytest.warns(UserWarning, match="TypedStorage is deprecated"):
        copy.deepcopy(model)
    copy.deepcopy(model.to("npu"))
    copy.deepcopy(nn.Linear(2, 2))  # parameters have storages of their own by other means
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for _ in range(2):
            assert torch.equal(pickle.loads(pickle.dumps(torch.ones(1))), torch.ones(1))
    [line] = printed.getvalue().splitlines()
    assert '"_use_new_zipfile_serialization = False" is not recommended for NPU tensors' in line


@pytest.mark.parametrize("setting", [{"RANK": "1"}, {"TORCH_NPU_WARNING_DISABLE": "1"}], ids=str)
def test_the_line_about_pickled_tensors_is_the_first_ranks_and_can_be_switched_off(setting):
    code = "import pickle, torch, torch_npu; pickle.dumps(torch.ones(1))"
    assert python("-c", code).stdout.startswith("Warning: torch.save")
    assert python("-c", code, **setting).stdout == ""


if __name__ == "__main__":
    globals()[sys.argv[1]].__wrapped__(*sys.argv[2:])
