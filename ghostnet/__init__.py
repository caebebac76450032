"""GhostNet trained with plain PyTorch on Ascend NPUs, CUDA and CPU from one Hydra config."""

import importlib.util
import os
import sys

__version__ = "0.2.0"

# With torch_npu but without CANN `import torch` itself would fail, on the CPU too: device.py loads torch_npu.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

for needed in ("hydra", "omegaconf", "numpy", "torch", "torchvision", "simplejpeg", "rich"):
    if importlib.util.find_spec(needed) is None:
        raise SystemExit(f"error: {sys.executable} has no {needed}. Install: pip install -r requirements.txt")
