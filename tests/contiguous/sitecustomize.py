"""On PYTHONPATH: the CPU computes in the memory format of NPUs, so that their bits can be compared."""

import torch

from ghostnet import device

device.memory_format = lambda device: torch.contiguous_format
