"""Pictures to arrays: the preprocessing that a model is trained and served with, and the augmentation of training."""

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ghostnet.data.decode import Array, Box, Picture, Size, whole
from ghostnet.device import images_at_once
from ghostnet.schema import (
    Magnitude,
    NonNegative,
    NonNegativeInt,
    PositiveColour,
    PositiveInt,
    PositiveRange,
    Probability,
    ProbabilityColour,
    Share,
    ShareRange,
)
from ghostnet.seeding import fold_in

Interpolation = Literal["bilinear", "bicubic", "nearest"]


Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

THIN = 8
"""Long to short side of a resized image, above which no more of it is made than is needed."""
LUMA = torch.tensor([19595.0, 38470.0, 7471.0])
"""Of red, green and blue, in 65536ths."""


def resample(pixels: Array, size: Size, interpolation: Interpolation, out: Array | None = None) -> Array:
    """Uint8 (H, W, 3) or grey (H, W) pixels in another size, antialiased, in out where they fit, else in new memory.

    By torch's kernels, several times as fast as Pillow's and equal to them but for the rounding of a few values by one.
    """
    shape = (size[1], size[0], *pixels.shape[2:])
    target = out if out is not None and out.shape == shape else np.empty(shape, np.uint8)
    if pixels.shape == shape:
        np.copyto(target, pixels)
        return target
    pixels = pixels if pixels.flags.writeable else pixels.copy()  # torch warns of memory that it might write to
    given, wanted, (width, height) = _planes(pixels), _planes(target), size
    # The functions behind torch.nn.functional.interpolate, which has no `out` and would write planes, not pixels.
    if interpolation == "bilinear":
        torch.ops.aten._upsample_bilinear2d_aa.out(given, [height, width], False, None, None, out=wanted)
    elif interpolation == "bicubic":
        torch.ops.aten._upsample_bicubic2d_aa.out(given, [height, width], False, None, None, out=wanted)
    else:
        torch.ops.aten._upsample_nearest_exact2d.out(given, [height, width], None, None, out=wanted)
    return target


def _planes(pixels: Array) -> Tensor:
    """A view as torch wants pictures, (1, C, H, W), by numpy: each call of torch lets go of Python's lock."""
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None] if pixels.ndim == 3 else pixels[None, None])


def resample_part(pixels: Array, size: Size, box: Box, interpolation: Interpolation) -> Array:
    """The box of what resample(pixels, size) would give, to the last bit; of thin images without making the rest.

    One of 1 × 20,000 px whose shorter side becomes 256 px would have 256 × 5,120,000.
    """
    left, top, right, bottom = box
    height, width = pixels.shape[:2]
    # Where an image is enlarged so far, a few of its rows or columns make the whole box.
    if size[1] > THIN * size[0] and size[1] > height:
        rows, weights = _taps(height, size[1], top, bottom, interpolation)
        across = resample(pixels[rows.min() : rows.max() + 1], (size[0], int(np.ptp(rows)) + 1), interpolation)
        return _weigh(across[:, left:right], rows - rows.min(), weights)
    if size[0] > THIN * size[1] and size[0] > width:
        columns, weights = _taps(width, size[0], left, right, interpolation)
        part = pixels[:, columns.min() : columns.max() + 1].swapaxes(0, 1)
        across = np.ascontiguousarray(_weigh(part, columns - columns.min(), weights).swapaxes(0, 1))
        return resample(across, (right - left, size[1]), interpolation)[top:bottom]
    return resample(pixels, size, interpolation)[top:bottom, left:right]


def _taps(given: int, wanted: int, start: int, stop: int, interpolation: Interpolation) -> tuple[Indices, Indices]:
    """Say which given places make the wanted ones from start to stop, (stop - start, taps), and 2^14 × their weights.

    It is torch's own arithmetic for bytes where something is enlarged.
    """
    places = np.arange(start, stop)
    if interpolation == "nearest":
        scale = np.float32(given) / np.float32(wanted)
        nearest = np.floor(((places + 0.5) * np.float64(scale)).astype(np.float32)).astype(np.int64)
        return nearest.clip(0, given - 1)[:, None], np.full((len(places), 1), 1 << 14)
    support = 1 if interpolation == "bilinear" else 2
    centres = given / wanted * (places + 0.5)
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + support + 0.5).astype(np.int64), given)
    taps = first[:, None] + np.arange(2 * support + 1)
    x = np.abs(taps - centres[:, None] + 0.5)
    if interpolation == "bilinear":
        weights = np.where(x < 1, 1 - x, 0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((x - 5) * x + 8) * x * -0.5 + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights = np.where(taps < last[:, None], weights, 0)
    weights /= weights.sum(1, keepdims=True)
    return taps.clip(0, given - 1), np.trunc(weights * (1 << 14) + np.copysign(0.5, weights)).astype(np.int64)


def _weigh(pixels: Array, rows: Indices, weights: Indices) -> Array:
    """Sums of rows (H, …) by weights, uint8 (len(rows), …)."""
    total = np.einsum("nt...,nt->n...", pixels[rows].astype(np.int64), weights)
    summed: Array = ((total + (1 << 13)) >> 14).clip(0, 255).astype(np.uint8)
    return summed


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input, in evaluation, prediction and export. Stored with every checkpoint."""

    image_size: PositiveInt
    """Side of the square input in pixels."""
    crop: Share
    """The central crop's share of the resized shorter side, in (0, 1]: 224 px and 0.875 resize to 256 first."""
    mean: ProbabilityColour
    """Red, green, blue, of values in [0, 1]."""
    std: PositiveColour
    interpolation: Interpolation

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"preprocessing.crop must be in (0, 1], not {self.crop}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3:
                raise ValueError(f"preprocessing.{name} must be [red, green, blue], not {list(values)}")
        if not min(self.std) > 0:
            raise ValueError(f"preprocessing.std must be above 0, not {list(self.std)}")

    def __call__(self, picture: Picture) -> Array:
        """Resize the shorter side, antialiased, then cut the centre -> uint8 (S, S, 3), of a grey picture (S, S)."""
        size, (width, height) = self.image_size, picture.size
        shorter = math.floor(size / self.crop)
        # Multiplied, divided, then truncated as torchvision's Resize does, so that both evaluate the same pixels.
        target = int(shorter * width / min(picture.size)), int(shorter * height / min(picture.size))
        left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
        # As fine as it is: published accuracies were measured so.
        pixels = whole(picture, target)
        return resample_part(pixels, target, (left, top, left + size, top + size), self.interpolation)

    def normalize(self, images: Tensor) -> Tensor:
        """Uint8 (N, S, S, 3) on any device -> normalised fp32 (N, 3, S, S); channels_last in memory."""
        mean, std = _constants(tuple(self.mean), tuple(self.std), images.shape[2], images.device)
        normalised = torch.empty(images.shape, device=images.device)
        at_once = images_at_once(images.device, images.shape[1] * images.shape[2])
        for source, target in zip(torch.split(images, at_once), torch.split(normalised, at_once), strict=True):
            # By rows of pixels: single pixels take four times as long.
            target.flatten(2).copy_(source.flatten(2)).sub_(mean).div_(std)
        return normalised.permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=8)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and deviation on the 0..255 scale of a row of pixels, (3 · width,), copied to a device once."""
    return (
        torch.tensor([255 * v for v in mean] * width, device=device),
        torch.tensor([255 * v for v in std] * width, device=device),
    )


@dataclass(frozen=True)
class Augment:
    """What happens to a training picture: random crop, flips, colour jitter, RandAugment, random erasing."""

    scale: ShareRange
    """Area of the random crop, as shares of the picture's: [least, most]."""
    ratio: PositiveRange
    """Width to height of the random crop: [least, most], drawn evenly in the logarithm."""
    hflip: Probability
    vflip: Probability
    color_jitter: NonNegative
    """Brightness, contrast and saturation are each scaled by a factor in 1 ± this, in random order."""
    randaugment: NonNegativeInt
    """How many of RandAugment's operations (arXiv 1909.13719) a picture gets; 0: none."""
    magnitude: Magnitude
    """RandAugment's strength, 0 to 30."""
    erasing: Probability
    """Probability that a random rectangle is overwritten with noise (arXiv 1708.04896)."""
    interpolation: Interpolation

    def __post_init__(self) -> None:
        for name, pair in (("scale", self.scale), ("ratio", self.ratio)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"augment.{name} must be [least, most] with 0 < least <= most, not {list(pair)}")
        if self.scale[1] > 1:
            raise ValueError(f"augment.scale is a share of the picture's area, at most 1, not {self.scale[1]}")
        if self.magnitude > 30:
            raise ValueError(f"augment.magnitude is 0 to 30, not {self.magnitude}")

    def __call__(
        self, picture: Picture, rng: random.Random, preprocessing: Preprocessing, out: Array | None = None
    ) -> Array:
        """One augmented picture, uint8 (S, S, 3) or (S, S), a function of the picture and of rng alone.

        It is made in out (S, S, 3) where that is possible, else in new memory.
        """
        size = preprocessing.image_size, preprocessing.image_size
        pixels = resample(picture.cut(self.crop_box(picture.size, rng), size), size, self.interpolation, out)
        axes = [axis for axis, probability in ((1, self.hflip), (0, self.vflip)) if rng.random() < probability]
        if axes:
            tensor = torch.from_numpy(pixels)
            tensor.copy_(tensor.flip(axes))  # numpy takes ten times as long
        if self.color_jitter:
            jitter(pixels, self.color_jitter, rng)
        if self.randaugment:
            image = Image.fromarray(pixels)
            for _ in range(self.randaugment):
                image = rand_augment(image, self.magnitude, rng)
            pixels = np.asarray(image)
        if rng.random() < self.erasing:
            return erase(pixels, preprocessing, rng)
        return pixels

    def crop_box(self, size: Size, rng: random.Random) -> Box:
        """The part that torchvision's RandomResizedCrop takes: ten tries, then the largest central crop."""
        width, height = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                return left, top, left + w, top + h
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def jitter(pixels: Array, strength: float, rng: random.Random) -> None:
    """Brightness, contrast and saturation, each times a factor in 1 ± strength, in random order, in place.

    (H, W, 3), or grey (H, W), which has no saturation. Pillow's arithmetic to the last bit, in less than half the time.
    """
    picture = torch.from_numpy(pixels).view(-1, 1 if pixels.ndim == 2 else 3)
    planes = picture.t().to(torch.float32, memory_format=torch.contiguous_format)  # (channels, pixels)
    adjustments = [_no_light, _mean_grey] if pixels.ndim == 2 else [_no_light, _mean_grey, _grey]
    for of_nothing in rng.sample(adjustments, len(adjustments)):
        # Pillow's factors have single precision.
        factor = float(np.float32(rng.uniform(max(0.0, 1 - strength), 1 + strength)))
        zero = of_nothing(planes)
        planes.sub_(zero).mul_(factor).add_(zero).clamp_(0, 255).floor_()
    picture.copy_(planes.t())


def _no_light(planes: Tensor) -> Tensor | float:
    return 0.0


def _mean_grey(planes: Tensor) -> Tensor | float:
    return math.floor(_grey(planes).mean(dtype=torch.float64).item() + 0.5)


def _grey(planes: Tensor) -> Tensor:
    """Luma (ITU-R 601-2) in whole numbers; its sums are exact in fp32."""
    return planes[0] if len(planes) == 1 else torch.mv(planes.t(), LUMA).add_(32768).mul_(1 / 65536).floor_()


def erase(image: Array, preprocessing: Preprocessing, rng: random.Random) -> Array:
    """Overwrite a rectangle (2 % to 33 % of the area, sides 0.3 to 3.3) with noise of the data's mean and deviation."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            noise = np.random.default_rng(rng.getrandbits(64)).standard_normal((h, w, *image.shape[2:]), np.float32)
            channels = slice(None) if image.ndim == 3 else 0
            mean, std = (np.array(v, np.float32)[channels] for v in (preprocessing.mean, preprocessing.std))
            image = image.copy()
            image[top : top + h, left : left + w] = (255 * (noise * std + mean)).clip(0, 255).astype(np.uint8)
            return image
    return image


# RandAugment's operations: name -> (whether the sign is random, strength 0..1 and picture side -> the value applied).
RANDAUGMENT: dict[str, tuple[bool, Callable[[float, int], float]]] = {
    "identity": (False, lambda m, side: 0.0),
    "shear_x": (True, lambda m, side: 0.3 * m),
    "shear_y": (True, lambda m, side: 0.3 * m),
    "translate_x": (True, lambda m, side: 150 / 331 * side * m),
    "translate_y": (True, lambda m, side: 150 / 331 * side * m),
    "rotate": (True, lambda m, side: 30.0 * m),
    "brightness": (True, lambda m, side: 0.9 * m),
    "color": (True, lambda m, side: 0.9 * m),
    "contrast": (True, lambda m, side: 0.9 * m),
    "sharpness": (True, lambda m, side: 0.9 * m),
    "posterize": (False, lambda m, side: 8 - round(4 * m)),
    "solarize": (False, lambda m, side: 255 * (1 - m)),
    "autocontrast": (False, lambda m, side: 0.0),
    "equalize": (False, lambda m, side: 0.0),
}


def rand_augment(image: Image.Image, magnitude: float, rng: random.Random) -> Image.Image:
    """One of RandAugment's 14 operations, drawn by rng, at magnitude 0 to 30, with torchvision's ranges."""
    name = rng.choice(list(RANDAUGMENT))
    signed, value_of = RANDAUGMENT[name]
    value = value_of(magnitude / 30, image.width)
    return apply(image, name, -value if signed and rng.random() < 0.5 else value)


def apply(image: Image.Image, name: str, value: float) -> Image.Image:
    """One operation of RandAugment by torchvision's functions."""
    from torchvision.transforms import functional as F

    degrees = math.degrees(math.atan(value)) if name.startswith("shear") else 0.0
    operations: dict[str, Callable[[], Image.Image]] = {
        "identity": lambda: image,
        "shear_x": lambda: F.affine(image, 0.0, [0, 0], 1.0, [degrees, 0.0], center=[0, 0]),
        "shear_y": lambda: F.affine(image, 0.0, [0, 0], 1.0, [0.0, degrees], center=[0, 0]),
        "translate_x": lambda: F.affine(image, 0.0, [int(value), 0], 1.0, [0.0, 0.0]),
        "translate_y": lambda: F.affine(image, 0.0, [0, int(value)], 1.0, [0.0, 0.0]),
        "rotate": lambda: F.rotate(image, value),
        "brightness": lambda: F.adjust_brightness(image, 1 + value),
        "color": lambda: F.adjust_saturation(image, 1 + value),
        "contrast": lambda: F.adjust_contrast(image, 1 + value),
        "sharpness": lambda: F.adjust_sharpness(image, 1 + value),
        "posterize": lambda: F.posterize(image, int(value)),
        "solarize": lambda: F.solarize(image, value),
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
    }
    return operations[name]()


@dataclass(frozen=True)
class Mixed:
    """The labels of what was mixed into a batch, and the share of the loss that its own labels keep."""

    partners: Tensor
    share: float


@dataclass(frozen=True)
class Mix:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of neighbours in the batch; both on: one of them a batch.

    Neighbours (0 with 1, 2 with 3 …) were drawn at random already, and where batch sizes are even, stay together for
    any number of ranks.
    """

    mixup: NonNegative
    """Alpha of the Beta distribution that the share is drawn from; 0: off."""
    cutmix: NonNegative
    """Alpha of the Beta distribution that the kept area is drawn from; 0: off."""

    def __call__(self, images: Tensor, labels: Tensor, seed: int, step: int) -> tuple[Tensor, Mixed | None]:
        """Mix normalised images (N, C, H, W), a function of (seed, step); None where nothing is mixed."""
        if not (self.mixup or self.cutmix):
            return images, None
        rng = random.Random(fold_in(seed, "mix", step))
        partner = _neighbours(len(images), images.device)
        cut = bool(self.cutmix) and (not self.mixup or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = rng.betavariate(alpha, alpha)
        if not cut:
            return torch.lerp(images[partner], images, share), Mixed(labels[partner], share)
        height, width = images.shape[2:]
        h, w = (round(side * math.sqrt(1 - share)) for side in (height, width))
        y, x = rng.randint(0, height), rng.randint(0, width)
        rows, columns = _span(y, h, height), _span(x, w, width)
        images = images.clone()
        images[:, :, rows, columns] = images[partner][:, :, rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        return images, Mixed(labels[partner], 1 - area / (height * width))


def _span(centre: int, length: int, limit: int) -> slice:
    return slice(max(0, centre - length // 2), min(limit, centre + length - length // 2))


@functools.lru_cache(maxsize=4)
def _neighbours(count: int, device: torch.device) -> Tensor:
    """Index of each one's neighbour, 1 0 3 2 …; the last of an odd count is its own."""
    order: Sequence[int] = [min(i ^ 1, count - 1) for i in range(count)]
    return torch.tensor(order, device=device)
