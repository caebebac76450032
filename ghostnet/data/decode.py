"""From the bytes of an image file to pixels: of the part that is needed, no finer than it is needed."""

import io
import warnings
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ghostnet.errors import SampleError

Array = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Size = tuple[int, int]
"""Width and height in pixels."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
COLOURS = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "GRAY"}
"""What a JPEG may hold for libjpeg-turbo to decode it, and as what; the rest is Pillow's."""

MAX_PIXELS = 200_000_000
"""The default of data.max_pixels: cameras of phones give up to 200 megapixels. An RGB image takes 3 bytes a pixel."""
LARGE = 1 << 26
"""Pixels above which evaluation takes a JPEG coarser than it is; ImageNet has none."""
PNG = b"\x89PNG\r\n\x1a\n"
METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""The chunks of a PNG that nobody reads here, and that may unpack to any size."""

MOST_SCANS = 200
"""Of a JPEG: progressive ones have about ten. Each goes over all pixels, for a few bytes in the file."""

# Pillow warns of odd metadata, which nobody reads here (JPEGs of ImageNet itself have broken EXIF).
warnings.filterwarnings("ignore", module="PIL")
Image.MAX_IMAGE_PIXELS = None  # data.max_pixels is the limit, and the error names it

_limit = MAX_PIXELS


def allow(max_pixels: int) -> None:
    """Set how many pixels an image of this process may have: data.max_pixels."""
    global _limit
    _limit = max_pixels


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


def whole(picture: Picture, target: Size) -> Array:
    """All pixels of an image that will be resized to target: as fine as they are, unless it is LARGE."""
    width, height = picture.size
    return picture.cut(at_least=target if width * height > LARGE else None)


def as_picture(found: object, name: str | Path) -> Picture:
    """Take what a data set's image() gave: a Picture, a PIL image, or uint8 pixels (H, W, 3) or grey (H, W).

    SampleError for a PIL image that can't be decoded, TypeError for anything else.
    """
    if isinstance(found, Image.Image):
        check_size(found.size, name)
        try:
            found.load()
        except Exception as error:  # Pillow raises whatever a broken file leads its parsers to.
            raise SampleError(f"{name} can't be decoded: {error or type(error).__name__}.") from None
        found = np.array(found if found.mode in ("RGB", "L") else to_rgb(found))
    if isinstance(found, np.ndarray):
        if found.dtype != np.uint8 or found.shape[2:] not in ((), (3,)) or found.ndim < 2 or not found.size:
            raise TypeError(
                f"image() gave an array {found.shape} of {found.dtype}: uint8 (H, W, 3), or (H, W) for grey, is needed"
            )
        return Pixels(found)
    if not hasattr(found, "cut"):
        raise TypeError(f"image() gave a {type(found).__name__}: a PIL image or a numpy array is needed")
    return cast("Picture", found)


class Jpeg:
    """A JPEG whose header alone has been read."""

    def __init__(self, data: bytes, name: str | Path, size: Size, colours: str) -> None:
        self.data, self.name, self.size, self.colours = data, name, size, colours

    def cut(self, box: Box | None = None, at_least: Size | None = None) -> Array:
        """The box's pixels; where it is twice, four or eight times at_least, libjpeg decodes it so much coarser.

        The box is moved by less than so many pixels then, to where the coarser pixels begin.
        """
        box = box or (0, 0, *self.size)
        factor = shrinkage(box, at_least)
        width, height = (-(-side // factor) for side in self.size)
        try:
            pixels: Array = simplejpeg.decode_jpeg(self.data, self.colours, min_height=height, min_width=width)
        except ValueError:  # of any oddity: Pillow reads on where it can, and says what is wrong where it can't
            return by_pillow(self.data, self.name).cut(box)
        pixels = pixels[:, :, 0] if self.colours == "GRAY" else pixels
        left, top, right, bottom = coarser(box, factor)
        return pixels[top:bottom, left:right]


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
        if (scans := data.count(b"\xff\xda")) > MOST_SCANS:
            raise SampleError(f"{name} can't be decoded: it has {scans:,} scans. Replace or remove it.")
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return by_pillow(data, name)
        check_size((width, height), name)
        if colours in COLOURS and width * height:
            return Jpeg(data, name, (width, height), COLOURS[colours])
    return by_pillow(data, name)


def by_pillow(data: bytes, name: str | Path) -> Pixels:
    """A picture in any of the formats, decoded by Pillow; SampleError names what can't be read."""
    try:
        image = Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)
        check_size(image.size, name)
        image.load()
        # Colours that metadata declare transparent would make the conversion warn or fail.
        image.info.clear()
        return Pixels(np.array(image if image.mode in ("RGB", "L") else to_rgb(image)))
    except SampleError:
        raise
    except UnidentifiedImageError:
        raise SampleError(
            f"{name} is {'empty' if not data else 'no JPEG, PNG or WebP'}. Replace or remove it."
        ) from None
    except Exception as error:  # Pillow raises whatever a broken file leads its parsers to.
        fault = str(error) or type(error).__name__
        raise SampleError(f"{name} can't be decoded: {fault}. Replace or remove it.") from None


def check_size(size: Size, name: str | Path) -> None:
    """SampleError for an image of more pixels than data.max_pixels."""
    if size[0] * size[1] > _limit:
        raise SampleError(
            f"{name} has {size[0]:,} × {size[1]:,} pixels, more than data.max_pixels={_limit}. "
            "Give a higher data.max_pixels, or replace or remove it."
        )


def without_metadata(data: bytes) -> bytes:
    """A PNG without its texts and colour profile: Pillow would unpack them, and refuses those of more than 1 MiB."""
    if not data.startswith(PNG) or not any(kind in data for kind in METADATA):
        return data
    kept, start = [PNG], len(PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, kind, content, checksum
        if data[start + 4 : start + 8] not in METADATA:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. 16-bit grey keeps its high byte (Pillow alone would clip it); transparency is dropped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
