"""What the stand-in torch_npu refuses and costs as the real wheels do; each test in its own process."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.test_emulated_npu import apart, load

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


if __name__ == "__main__":
    globals()[sys.argv[1]].__wrapped__(*sys.argv[2:])
