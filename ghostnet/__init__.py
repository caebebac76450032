"""GhostNet trained with plain PyTorch on Ascend NPUs, CUDA and CPU from one Hydra config."""

import os

__version__ = "0.2.0"

# With torch_npu but without CANN `import torch` itself would fail, on the CPU too: device.py loads torch_npu.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
