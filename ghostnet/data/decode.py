"""From the bytes of an image file to a picture in memory."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ghostnet.errors import SampleError

FORMATS = ("JPEG", "PNG", "WEBP")

# Pillow warns of odd metadata, which nobody reads here (JPEGs of ImageNet itself have broken EXIF), and no more than
# warns of a picture that is up to twice as large as it allows.
warnings.filterwarnings("ignore", module="PIL")
warnings.simplefilter("error", Image.DecompressionBombWarning)


def decode(data: bytes, name: str | Path) -> Image.Image:
    """An RGB or greyscale ("L") picture, told by its content, not its file name; UserError names what can't be read."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        # Colours that metadata declare transparent would make later conversions warn or fail.
        image.info.clear()
        return image if image.mode in ("RGB", "L") else to_rgb(image)
    except UnidentifiedImageError:
        raise SampleError(
            f"{name} is {'empty' if not data else 'no JPEG, PNG or WebP'}. Replace or remove it."
        ) from None
    except Exception as error:  # Pillow raises whatever a broken file leads its parsers to.
        fault = str(error) or type(error).__name__
        raise SampleError(f"{name} can't be decoded: {fault}. Replace or remove it.") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. 16-bit grey keeps its high byte (Pillow alone would clip it); transparency is dropped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
