"""What the card can do, under the real package's names."""

import os

from torch_npu import _runtime

FIRST_GENERATION = os.environ.get("EMULATED_NPU_GENERATION") == "1"


def _lazy_init():
    if _runtime.library.emulated_npu_forked():
        raise RuntimeError(
            "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you must use the 'spawn'"
            " start method"
        )
    if not _runtime.library.emulated_npu_count():
        raise RuntimeError("No NPUs are available")
    _runtime.library.emulated_npu_initialize()


def is_support_inf_nan():
    """Whether inf and NaN stay what they are; a first-generation card saturates."""
    _lazy_init()
    return not FIRST_GENERATION


def is_bf16_supported(including_emulation=False):
    """Whether the card computes in bfloat16."""
    _lazy_init()
    return not FIRST_GENERATION


def get_cann_version(module="CANN"):
    """The version of Ascend's toolkit."""
    return "9.1.0"
