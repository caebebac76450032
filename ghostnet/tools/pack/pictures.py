"""Image files as they are packed: shrunk, as JPEG, or just as they were."""

import io
from pathlib import Path

from PIL import Image

from ghostnet.data.decode import picture, whole
from ghostnet.errors import SampleError


def packed(path: Path, size: int | None, quality: int) -> tuple[bytes, int]:
    """The JPEG that is packed for an image file, and the bytes of the file; SampleError names what can't be read.

    A JPEG, RGB or grey, that needs no shrinking stays byte for byte. Others are shrunk to a shorter side of `size` as
    Preprocessing does, so that the recipe's evaluation (256 px, bicubic) does not resize again. Colour is stored at
    half the resolution, Pillow's 4:2:0: photographs come so, and full colour costs more to store and to decode.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SampleError(f"{path} can't be read: {error.strerror}.") from None
    source = picture(data, path)
    (width, height), shorter = source.size, min(source.size)
    if size is not None and shorter > size:
        target = int(size * width / shorter), int(size * height / shorter)
        image = Image.fromarray(whole(source, target)).resize(target, Image.Resampling.BICUBIC)
    elif _is_plain_jpeg(data):
        source.cut()  # what can't be decoded is not packed
        return data, len(data)
    else:
        image = Image.fromarray(source.cut())
    stream = io.BytesIO()
    try:
        image.save(stream, "JPEG", quality=quality)
    except (OSError, ValueError) as error:  # a side beyond JPEG's 65,535
        raise SampleError(f"{path} can't be stored as JPEG: {error}. Replace or remove it.") from None
    return stream.getvalue(), len(data)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether it is a JPEG that every reader takes for RGB or grey: no CMYK, no second picture behind the first."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    header = Image.open(io.BytesIO(data))
    return header.format == "JPEG" and header.mode in ("RGB", "L")
