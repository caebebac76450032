"""From the bytes of an image file to a picture in memory."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ghostnet.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")


def decode(data: bytes, name: str | Path) -> Image.Image:
    """An RGB or greyscale ("L") picture, told by its content, not its file name; UserError names what can't be read."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except UnidentifiedImageError:
        raise UserError(f"{name} is {'empty' if not data else 'no JPEG, PNG or WebP'}. Replace or remove it.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} can't be decoded: {error}. Replace or remove it.") from None
    return image if image.mode in ("RGB", "L") else to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. 16-bit grey keeps its high byte (Pillow alone would clip it); transparency is dropped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
