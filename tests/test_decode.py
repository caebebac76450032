"""Pictures from bytes, against the arrays they were made of."""

import io
import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ghostnet.data.decode import decode
from ghostnet.errors import UserError
from tests.conftest import REPOSITORY

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
GREY = NOISE[:, :, 0]
DEEP = np.random.default_rng(1).integers(0, 65536, (24, 32), np.uint16)
BITS = (GREY > 127).astype(np.uint8) * 255
Y, X = np.mgrid[0:24, 0:32].astype(np.uint8)
SMOOTH = np.stack([4 * X + 60, 6 * Y + 50, 2 * X + 3 * Y + 40], 2)
ALPHA = np.dstack([NOISE, GREY])
PALETTE = Image.fromarray(SMOOTH).quantize(16)
PALETTE_COLOURS = np.asarray(PALETTE.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(PALETTE)]


def encoded(picture, kind, **options):
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_size(width, height):
    """A whole 1-bit PNG of any size, without its pixels in memory."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(1)
    rows = b"".join(squeeze.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_with_broken_exif():
    data = encoded(SMOOTH, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    count = data.index(b"II*\0") + 8
    return data[:count] + b"\xff\x00" + data[count + 2 :]


LOSSLESS = {
    "PNG RGB": (encoded(NOISE, "PNG"), NOISE),
    "PNG grey": (encoded(GREY, "PNG"), GREY),
    "PNG RGBA": (encoded(ALPHA, "PNG"), NOISE),
    "PNG grey and alpha": (encoded(Image.fromarray(GREY).convert("LA"), "PNG"), np.dstack([GREY] * 3)),
    "PNG palette": (encoded(PALETTE, "PNG"), PALETTE_COLOURS),
    "PNG palette, one colour transparent": (encoded(PALETTE, "PNG", transparency=3), PALETTE_COLOURS),
    "PNG palette, alphas": (encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))), PALETTE_COLOURS),
    "PNG RGB, one colour transparent": (encoded(NOISE, "PNG", transparency=(9, 8, 7)), NOISE),
    "PNG 16-bit grey": (encoded(DEEP, "PNG"), np.dstack([(DEEP // 256).astype(np.uint8)] * 3)),
    "PNG 1-bit": (encoded(Image.fromarray(BITS).convert("1"), "PNG"), np.dstack([BITS] * 3)),
    "WebP RGB": (encoded(NOISE, "WEBP", lossless=True), NOISE),
    "WebP RGBA": (encoded(ALPHA, "WEBP", lossless=True, exact=True), NOISE),
}
LOSSY = {
    "JPEG RGB": encoded(SMOOTH, "JPEG", quality=90),
    "JPEG RGB, progressive": encoded(SMOOTH, "JPEG", quality=90, progressive=True),
    "JPEG grey": encoded(SMOOTH[:, :, 0], "JPEG", quality=90),
    "JPEG CMYK": encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95),
    "WebP": encoded(SMOOTH, "WEBP", quality=90),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_give_the_pixels_they_were_made_of(name):
    data, expected = LOSSLESS[name]
    picture = decode(data, name)
    assert picture.mode == ("L" if expected.ndim == 2 else "RGB")
    np.testing.assert_array_equal(np.asarray(picture), expected)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_files_give_the_picture_they_were_made_of(name):
    picture = decode(LOSSY[name], name)
    expected = SMOOTH[:, :, 0] if "grey" in name else SMOOTH
    assert picture.mode == ("L" if "grey" in name else "RGB")
    assert np.abs(np.asarray(picture).astype(int) - expected).mean() < 2


def test_the_format_is_told_by_the_content_not_the_name():
    np.testing.assert_array_equal(np.asarray(decode(encoded(NOISE, "PNG"), "n02105855_2933.JPEG")), NOISE)


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_picture_brings_no_metadata_that_a_later_conversion_could_trip_over(name):
    picture = decode(LOSSLESS[name][0], name)
    assert picture.convert("RGB").convert("L").mode == "L"
    assert not picture.info


BROKEN = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "GIF": encoded(SMOOTH, "GIF"),
    "zero wide": png_of_size(0, 8),
    "zero high": png_of_size(8, 0),
    "only a JPEG's first bytes": LOSSY["JPEG RGB"][:3],
    **{f"truncated {name}": data[: len(data) // 2] for name, data in LOSSY.items()},
    **{f"truncated {name}": data[: len(data) // 2] for name, (data, _) in LOSSLESS.items()},
    "JPEG without its last 40 bytes": LOSSY["JPEG RGB"][:-40],
    "100 million pixels, of which Pillow only warns": png_of_size(10_000, 10_000),
    "400 million pixels": png_of_size(20_000, 20_000),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_picture_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=r"^/data/train/dog/1\.jpg (is|can't be decoded: ..)"):
        decode(BROKEN[name], "/data/train/dog/1.jpg")


def test_an_empty_file_is_called_empty():
    with pytest.raises(UserError, match=r"^x\.png is empty"):
        decode(b"", "x.png")


@pytest.mark.parametrize("warnings", ["default", "ignore", "error"])
def test_bombs_are_refused_and_broken_exif_is_passed_over_without_a_word(warnings, tmp_path):
    (tmp_path / "bomb").write_bytes(png_of_size(10_000, 10_000))
    (tmp_path / "exif").write_bytes(jpeg_with_broken_exif())
    program = """
import sys
from pathlib import Path
from ghostnet.data.decode import decode
from ghostnet.errors import UserError
print(decode(Path("exif").read_bytes(), "exif").size)
try:
    decode(Path("bomb").read_bytes(), "bomb")
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-W", warnings, "-c", program]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith("(32, 24)\nbomb can't be decoded: Image size (100000000 pixels) exceeds limit")


def corrupted(data, rng):
    """Bytes changed, cut out or put in; a PNG's checksums made to fit half of the time, so that more is parsed."""
    data = bytearray(data)
    place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 64))
    match rng.randrange(3):
        case 0:
            for _ in range(rng.randint(1, 6)):
                data[(place + rng.randrange(16)) % len(data)] = rng.randrange(256)
        case 1:
            del data[place : place + rng.randint(1, 20)]
        case 2:
            data[place:place] = rng.randbytes(rng.randint(1, 20))
    if data[:4] == b"\x89PNG" and rng.random() < 0.5:
        start = 8
        while (end := start + 8 + int.from_bytes(data[start : start + 4], "big")) + 4 <= len(data):
            data[end : end + 4] = struct.pack(">I", zlib.crc32(data[start + 4 : end]))
            start = end + 4
    return bytes(data)


CORRUPTIBLE = {
    **LOSSY,
    "JPEG with EXIF": jpeg_with_broken_exif(),
    **{name: LOSSLESS[name][0] for name in ("PNG RGB", "PNG palette, alphas", "PNG 16-bit grey", "WebP RGB")},
}


@pytest.mark.parametrize("name", CORRUPTIBLE)
def test_corrupted_bytes_end_in_a_picture_or_a_user_error(name):
    rng = random.Random(0)
    refusals = []
    for _ in range(150):
        try:
            assert decode(corrupted(CORRUPTIBLE[name], rng), "1.jpg").mode in ("RGB", "L")
        except UserError as error:
            refusals.append(str(error))
    assert refusals
    assert all(refusal.startswith("1.jpg ") for refusal in refusals)


def test_many_threads_decode_the_same_pixels_as_one():
    files = [data for data, _ in LOSSLESS.values()] * 20
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda data: np.asarray(decode(data, "x")), files))
    for picture, (_, expected) in zip(pictures, list(LOSSLESS.values()) * 20, strict=True):
        np.testing.assert_array_equal(picture, expected)
