"""GhostNet trained with plain PyTorch on Ascend NPUs, CUDA and CPU from one Hydra config."""

__version__ = "0.1.0"
