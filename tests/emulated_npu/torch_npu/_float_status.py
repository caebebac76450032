"""The flag that an overflow raises on a first-generation card; reading it makes no host wait."""

import torch

from torch_npu import _runtime, counters


def npu_get_float_status(status):
    """Eight numbers on the card, the first of which is not 0 after an overflow; status is overwritten, too."""
    counters.python_ops["npu::npu_get_float_status"] += 1
    return status.fill_(float(_runtime.library.emulated_npu_overflow()))


def npu_clear_float_status(status):
    """Lower the flag."""
    counters.python_ops["npu::npu_clear_float_status"] += 1
    _runtime.library.emulated_npu_clear_overflow()
    return torch.zeros_like(status)
