"""GhostNet trained with plain PyTorch on Ascend NPUs, CUDA and CPU from one Hydra config."""

import os

__version__ = "0.2.0"

# `import torch` would import torch_npu too, and fail without CANN, or abort beside a CUDA build of torch: device.py
# imports it once it is known to work. Processes that are started inherit this.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
