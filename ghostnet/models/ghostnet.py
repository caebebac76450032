"""GhostNet (arXiv 1911.11907): the model, the count of its multiply-adds, and its backbone frozen for fine-tuning."""

import copy
import math
from collections import OrderedDict
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghostnet.models.layers import BatchNorm, Bottleneck, round_channels
from ghostnet.schema import Fraction, Positive, PositiveInt

# Table 1 of the paper at width 1.0, one line per stage and as many stages as the published names count.
# Each bottleneck: kernel, expanded channels, output channels, squeeze-excite, stride.
STAGES: tuple[tuple[tuple[int, int, int, bool, int], ...], ...] = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    ((3, 200, 80, False, 1), *2 * ((3, 184, 80, False, 1),), (3, 480, 112, True, 1), (3, 672, 112, True, 1)),
    ((5, 672, 160, True, 2),),
    2 * ((5, 960, 160, False, 1), (5, 960, 160, True, 1)),
)
STEM_CHANNELS = 16
LAST_CHANNELS = 960
HEAD_CHANNELS = 1280  # at every width


class GhostNet(nn.Module):
    """GhostNet of any width > 0, dropout in [0, 1) before the classifier; ValueError outside these.

    Weights start as torch initialises them (Kaiming uniform): the authors' code and timm set nothing else.
    """

    def __init__(self, num_classes: PositiveInt = 1000, width: Positive = 1.0, dropout: Fraction = 0.2) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        if not 0 < width < math.inf:
            raise ValueError(f"width must be a positive number such as 0.5, 1.0 or 1.3, not {width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
        self.num_classes = num_classes
        self.width = width
        self.dropout = dropout
        self.frozen = False

        channels = round_channels(STEM_CHANNELS * width)
        self.conv_stem = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm(channels)
        stages = []
        for rows in STAGES:
            stage = nn.Sequential()
            for kernel, expanded, out, squeeze_excite, stride in rows:
                in_channels, channels = channels, round_channels(out * width)
                block = Bottleneck(
                    in_channels, round_channels(expanded * width), channels, kernel, squeeze_excite, stride
                )
                stage.append(block)
            stages.append(stage)
        last = round_channels(LAST_CHANNELS * width)
        conv, norm = nn.Conv2d(channels, last, 1, bias=False), BatchNorm(last)
        stages.append(nn.Sequential(nn.Sequential(OrderedDict(conv=conv, bn1=norm, act=nn.ReLU(inplace=True)))))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(last, HEAD_CHANNELS, 1)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv_stem(images)), inplace=True)
        x = F.adaptive_avg_pool2d(self.blocks(x), 1)
        x = F.relu(self.conv_head(x), inplace=True).flatten(1)
        logits: Tensor = self.classifier(F.dropout(x, self.dropout, self.training))
        return logits

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen backbone stays in eval mode, so that its BatchNorm statistics stand still."""
        super().train(mode)
        if self.frozen:
            for name, child in self.named_children():
                child.train(mode and name == "classifier")
        return self


def freeze_backbone(model: GhostNet) -> None:
    """Leave only the classifier to train, for fine-tuning; dropout stays on in train mode."""
    model.frozen = True
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    model.train(model.training)


def macs(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of the convolutions and linear layers for one square image of image_size pixels."""
    twin = copy.deepcopy(model).to("meta").eval()  # without memory: the model itself is neither run nor hooked
    total = 0

    def count(layer: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        total += output.numel() * layer.weight[0].numel()

    for layer in twin.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        twin(torch.empty(1, 3, image_size, image_size, device="meta"))
    return total
