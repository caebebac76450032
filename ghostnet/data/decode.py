"""From the bytes of an image file to pixels: of the part that is needed, no finer than it is needed."""

import io
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ghostnet.errors import SampleError

Array = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Size = tuple[int, int]
"""Width and height in pixels."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

FORMATS = ("JPEG", "PNG", "WEBP")
COLOURS = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "GRAY"}
"""What a JPEG may hold for libjpeg-turbo to decode it, and as what; the rest is Pillow's."""

BASELINE, SCAN, END = (0xC0, 0xC1), 0xDA, b"\xff\xd9"
"""Markers of JPEG (ITU-T T.81): headers of sequential pictures, the start of a scan, the end."""
TAIL = 64
"""Bytes after the end that files may have."""
MARGIN = 8
"""Rows below a box that libjpeg's smoothing of colours may look at."""

# Pillow warns of odd metadata, which nobody reads here (JPEGs of ImageNet itself have broken EXIF), and no more than
# warns of a picture that is up to twice as large as it allows.
warnings.filterwarnings("ignore", module="PIL")
warnings.simplefilter("error", Image.DecompressionBombWarning)


class Picture(Protocol):
    """A picture that is decoded when, and as far as, it is asked for."""

    size: Size

    def cut(self, box: Box | None = None, at_least: Size | None = None) -> Array:
        """Pixels of a box (null: all), uint8 (H, W, 3), of a grey picture (H, W).

        at_least: they may be coarser than the picture, but no smaller than this; null: as fine as they are.
        SampleError where they can't be decoded.
        """
        ...


class Pixels:
    """A picture that is in memory already, uint8 (H, W, 3) or grey (H, W)."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.size = array.shape[1], array.shape[0]

    def cut(self, box: Box | None = None, at_least: Size | None = None) -> Array:
        """A view of the box, as fine as it is."""
        left, top, right, bottom = box or (0, 0, *self.size)
        return self.array[top:bottom, left:right]


class Jpeg:
    """A JPEG whose header alone has been read."""

    def __init__(self, data: bytes, name: str | Path, size: Size, colours: str) -> None:
        self.data, self.name, self.size, self.colours = data, name, size, colours

    def cut(self, box: Box | None = None, at_least: Size | None = None) -> Array:
        """The box's pixels; where it is twice, four or eight times at_least, libjpeg decodes it so much coarser.

        Rows below the box are not decoded.
        The box is moved by less than so many pixels then, to where the coarser pixels begin.
        """
        box = box or (0, 0, *self.size)
        factor = shrinkage(box, at_least)
        whole, (width, height) = self.data, self.size
        needed = min(height, box[3] + MARGIN * factor)
        position = height_of_rows(whole) if needed < height else None
        data: bytes | bytearray = whole
        if position:
            data = bytearray(whole)
            data[position : position + 2] = needed.to_bytes(2, "big")
            height = needed
        least = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        try:
            # Rows that are left over would be a fault to it; a file that is cut short has no `position`.
            pixels: Array = simplejpeg.decode_jpeg(data, self.colours, strict=position is None, **least)
        except ValueError:  # of any oddity: Pillow reads on where it can, and says what is wrong where it can't
            return by_pillow(whole, self.name).cut(box)
        pixels = pixels[:, :, 0] if self.colours == "GRAY" else pixels
        left, top, right, bottom = coarser(box, factor)
        return pixels[top:bottom, left:right]


def height_of_rows(data: bytes) -> int | None:
    """Where a JPEG's header has its height, if a smaller one makes libjpeg stop earlier at the same pixels.

    None where it doesn't: progressive files and those with a scan for each colour hold all rows more than once, a file
    that doesn't end as it should is to be read whole, so that its fault is found.
    """
    if data.rfind(END, -TAIL) < 0:
        return None
    start, height, components = 2, None, 0
    while start + 10 < len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker in BASELINE:
            height, components = start + 5, data[start + 9]
        elif marker == SCAN:
            return height if height and data[start + 4] == components else None
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return None


def shrinkage(box: Box, at_least: Size | None) -> int:
    """By which of 1, 2, 4, 8 a box may be shrunk and stay at least so large."""
    if at_least is None:
        return 1
    spare = min((box[2] - box[0]) // at_least[0], (box[3] - box[1]) // at_least[1])
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))


def coarser(box: Box, factor: int) -> Box:
    """A box in pixels that are so much coarser; it holds as many of them as it is long, rounded down."""
    left, top = box[0] // factor, box[1] // factor
    return left, top, left + (box[2] - box[0]) // factor, top + (box[3] - box[1]) // factor


def picture(data: bytes, name: str | Path) -> Picture:
    """An RGB or grey picture, told by its content, not its file name; SampleError names what can't be read.

    Of a JPEG only the header is read here. Its EXIF orientation is passed over, as published weights were trained.
    """
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return by_pillow(data, name)
        # Larger ones are for Pillow to refuse.
        if colours in COLOURS and 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 0):
            return Jpeg(data, name, (width, height), COLOURS[colours])
    return by_pillow(data, name)


def by_pillow(data: bytes, name: str | Path) -> Pixels:
    """A picture in any of the formats, decoded by Pillow; SampleError names what can't be read."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        # Colours that metadata declare transparent would make the conversion warn or fail.
        image.info.clear()
        return Pixels(np.array(image if image.mode in ("RGB", "L") else to_rgb(image)))
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
