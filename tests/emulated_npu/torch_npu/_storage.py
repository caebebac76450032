"""What users see of the real package's ways with storages: a warning when one is copied, a line when one is pickled."""

import os

import torch

LEGACY = (
    'Warning: torch.save with "_use_new_zipfile_serialization = False" is not recommended for NPU tensors, which may'
    ' cause unexpected errors. It is better to set "_use_new_zipfile_serialization = True". If it is necessary to use'
    " this, please convert the NPU tensors to CPU tensors for saving."
)


def _may_warn():
    switch = os.environ.get("TORCH_NPU_WARNING_DISABLE", os.environ.get("TORCH_NPU_DISABLED_WARNING"))
    return switch != "1" and os.environ.get("RANK", "0") == "0"


def register():
    """Have torch's own functions do so, for tensors on the host too."""
    deepcopy, save = torch.storage.TypedStorage._deepcopy, torch.serialization._legacy_save
    printed = False

    def warn_and_deepcopy(self, memo):
        _ = self.device  # torch warns of that: "TypedStorage is deprecated"
        return deepcopy(self, memo)

    def print_and_save(*args, **kwargs):  # what pickle does with a tensor, such as an object collective's
        nonlocal printed
        if not printed and _may_warn():
            print(LEGACY)
        printed = True
        return save(*args, **kwargs)

    torch.storage.TypedStorage._deepcopy = warn_and_deepcopy
    torch.serialization._legacy_save = print_and_save
