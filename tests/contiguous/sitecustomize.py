"""On PYTHONPATH: the CPU computes as NPUs do, in their memory format and by PyTorch's own kernels, to compare bits."""

import torch

from ghostnet import device

device.memory_format = lambda device: torch.contiguous_format
device.lacks_kernels = lambda device: False
device.images_at_once = lambda device, pixels: 1 << 20
device.computes_again = lambda device: False
