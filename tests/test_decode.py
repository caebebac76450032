"""Pictures from bytes, against the arrays they were made of."""

import io
import itertools
import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from PIL import Image, PngImagePlugin
from skimage.metrics import peak_signal_noise_ratio

from ghostnet.data.decode import MAX_PIXELS, Jpeg, allow, as_picture, coarser, picture, shrinkage, whole
from ghostnet.data.transforms import resample
from ghostnet.errors import SampleError, UserError
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
    "BMP": (encoded(NOISE, "BMP"), NOISE),
    "GIF": (encoded(PALETTE, "GIF"), PALETTE_COLOURS),
    "TIFF": (encoded(NOISE, "TIFF", compression="tiff_lzw"), NOISE),
    "PPM": (encoded(NOISE, "PPM"), NOISE),
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
    assert picture(data, name).size == (32, 24)
    np.testing.assert_array_equal(picture(data, name).cut(), expected)
    np.testing.assert_array_equal(picture(data, name).cut((3, 5, 20, 11)), expected[5:11, 3:20])


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_files_give_the_picture_they_were_made_of(name):
    pixels = picture(LOSSY[name], name).cut()
    expected = SMOOTH[:, :, 0] if "grey" in name else SMOOTH
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 2


def test_the_format_is_told_by_the_content_not_the_name():
    np.testing.assert_array_equal(picture(encoded(NOISE, "PNG"), "n02105855_2933.JPEG").cut(), NOISE)


BROKEN = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "TGA": encoded(SMOOTH, "TGA"),
    "zero wide": png_of_size(0, 8),
    "zero high": png_of_size(8, 0),
    "only a JPEG's first bytes": LOSSY["JPEG RGB"][:3],
    **{f"truncated {name}": data[: len(data) // 2] for name, data in LOSSY.items()},
    **{f"truncated {name}": data[: len(data) // 2] for name, (data, _) in LOSSLESS.items()},
    "JPEG without its last 40 bytes": LOSSY["JPEG RGB"][:-40],
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_picture_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=r"^/data/train/dog/1\.jpg (is|can't be decoded: ..)"):
        picture(BROKEN[name], "/data/train/dog/1.jpg").cut()


def test_an_empty_file_is_called_empty():
    with pytest.raises(UserError, match=r"^x\.png is empty"):
        picture(b"", "x.png")


@pytest.mark.parametrize("warnings", ["default", "ignore", "error"])
def test_bombs_are_refused_and_broken_exif_is_passed_over_without_a_word(warnings, tmp_path):
    (tmp_path / "bomb").write_bytes(png_of_size(20_000, 20_000))
    (tmp_path / "exif").write_bytes(jpeg_with_broken_exif())
    program = """
import sys
from pathlib import Path
from ghostnet.data.decode import Jpeg, coarser, picture, shrinkage
from ghostnet.data.transforms import resample
from ghostnet.errors import UserError
print(picture(Path("exif").read_bytes(), "exif").cut().shape)
try:
    picture(Path("bomb").read_bytes(), "bomb")
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-W", warnings, "-c", program]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith("(24, 32, 3)\nbomb has 20,000 × 20,000 pixels, more than data.max_pixels=200000000. ")


@pytest.fixture
def allowed():
    yield allow
    allow(MAX_PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_limit_of_pixels_is_configurable_and_named(kind, allowed):
    data = encoded(NOISE, kind)
    allowed(32 * 24)
    assert picture(data, "x").cut().shape[:2] == (24, 32)
    allowed(32 * 24 - 1)
    with pytest.raises(SampleError, match=r"^x has 32 × 24 pixels, more than data\.max_pixels=767\. Give a higher"):
        picture(data, "x")
    with pytest.raises(SampleError, match=r"data\.max_pixels=767"):
        as_picture(Image.fromarray(NOISE), "x")


def test_a_jpeg_of_108_megapixels_is_read_and_evaluation_takes_it_coarser():
    stream = io.BytesIO()
    Image.new("L", (12_000, 9_000), 90).save(stream, "JPEG", quality=30)
    read = picture(stream.getvalue(), "phone.jpg")
    assert read.size == (12_000, 9_000)
    assert whole(read, (341, 256)).shape == (1125, 1500)
    assert read.cut().shape == (9_000, 12_000)


@pytest.mark.parametrize("kind", ["text", "compressed text", "international text", "profile"])
def test_a_png_with_megabytes_of_metadata_has_its_pixels(kind):
    info, options = PngImagePlugin.PngInfo(), {}
    if kind == "profile":
        options["icc_profile"] = bytes(3 << 20)
    elif kind == "international text":
        info.add_itxt("Comment", "x" * (3 << 20), zip=True)
    else:
        info.add_text("Comment", "x" * (3 << 20), zip=kind != "text")
    data = encoded(NOISE, "PNG", pnginfo=info, **options)
    np.testing.assert_array_equal(picture(data, "x").cut(), NOISE)


def test_a_data_set_may_give_images_and_arrays_and_nothing_else():
    grey = NOISE[:, :, 0]
    for found, expected in (
        (Image.fromarray(NOISE), NOISE),
        (Image.fromarray(grey), grey),
        (Image.fromarray(NOISE).convert("RGBA"), NOISE),
        (NOISE, NOISE),
        (grey, grey),
    ):
        np.testing.assert_array_equal(as_picture(found, "x").cut(), expected)
    for wrong in (NOISE / 255, NOISE[None], NOISE[..., :2], "x.png", None):
        with pytest.raises(TypeError, match=r"^image\(\) gave a"):
            as_picture(wrong, "x")
    with pytest.raises(SampleError, match=r"^x can't be decoded: "):
        as_picture(Image.open(io.BytesIO(encoded(NOISE, "PNG")[:-900])), "x")


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
            pixels = picture(corrupted(CORRUPTIBLE[name], rng), "1.jpg").cut()
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] in ((), (3,))
        except UserError as error:
            refusals.append(str(error))
    assert refusals
    assert all(refusal.startswith("1.jpg ") for refusal in refusals)


def as_jpeg(photo, **options):
    return encoded(photo, "JPEG", **{"quality": 90} | options)


@pytest.mark.parametrize(
    "options",
    [
        *({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}),
        *({"restart_marker_rows": 1}, {"quality": 30}, {"quality": 100}, {"keep_rgb": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photo_has_the_pixels_that_pillow_gives_it(mode, options, photo):
    data = as_jpeg(photo.convert(mode), **options)
    read = picture(data, "x")
    assert isinstance(read, Jpeg)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(read.cut(), expected)
    np.testing.assert_array_equal(read.cut((7, 30, 200, 151)), expected[30:151, 7:200])
    np.testing.assert_array_equal(read.cut((7, 30, 200, 151), (97, 61)), expected[30:151, 7:200])


@pytest.mark.parametrize(("factor", "decibels", "median"), [(2, 36, 40), (4, 34, 38), (8, 32, 36)])
def test_a_photo_decoded_coarser_is_that_decoded_whole_then_cut_and_resized_but_for_little_noise(
    factor, decibels, median, photos
):
    """Against Pillow's pixels and antialiased resize: peak signal to noise 32 dB at least, about 40 dB mostly."""
    ratios, rng = [], random.Random(0)
    for photo, subsampling in itertools.product(photos, (0, 2)):
        data = as_jpeg(photo, subsampling=subsampling)
        for _ in range(8):
            w, h = (rng.randint(side // 2, side) for side in photo.size)
            left, top = rng.randint(0, photo.width - w), rng.randint(0, photo.height - h)
            box = left, top, left + w, top + h
            size = int(w / factor / rng.uniform(1, 1.4)), int(h / factor / rng.uniform(1, 1.4))
            part = picture(data, "x").cut(box, size)
            assert part.shape == (h // factor, w // factor, 3)
            ours = resample(part, size, "bilinear")
            begun = tuple(factor * side for side in coarser(box, factor))
            assert all(0 <= a - b < 2 * factor for a, b in zip(box, begun, strict=True))
            theirs = Image.open(io.BytesIO(data)).crop(begun).resize(size, Image.Resampling.BILINEAR)
            ratios.append(peak_signal_noise_ratio(np.asarray(theirs), ours))
    assert min(ratios) > decibels
    assert np.median(ratios) > median


@pytest.mark.parametrize(
    ("box", "at_least", "factor"),
    [
        ((0, 0, 448, 448), (224, 224), 2),
        ((0, 0, 447, 500), (224, 224), 1),
        ((9, 9, 909, 909), (224, 224), 4),
        ((0, 0, 5000, 4000), (224, 224), 8),
        ((0, 0, 448, 448), None, 1),
        ((0, 0, 100, 100), (224, 224), 1),
    ],
)
def test_a_box_is_decoded_no_coarser_than_it_is_needed(box, at_least, factor):
    assert shrinkage(box, at_least) == factor


def test_boxes_of_any_photo_are_as_large_as_they_must_be():
    rng = random.Random(0)
    for _ in range(300):
        width, height = rng.randint(1, 90), rng.randint(1, 90)
        data = as_jpeg(Image.new("L", (width, height), 7), subsampling=0)
        left, top = rng.randrange(width), rng.randrange(height)
        box = left, top, rng.randint(left + 1, width), rng.randint(top + 1, height)
        least = rng.randint(1, 30), rng.randint(1, 30)
        pixels = picture(data, "x").cut(box, least)
        for side, wanted, most in zip(pixels.shape[::-1], least, (box[2] - left, box[3] - top), strict=True):
            assert min(wanted, most) <= side <= most


@pytest.mark.parametrize("options", [{"subsampling": n} for n in range(3)] + [{"progressive": True}], ids=str)
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_rows_below_a_box_change_nothing_in_it(factor, options, photo):
    data, rng = as_jpeg(photo, **options), random.Random(factor)
    width, height = photo.size
    whole = simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor))
    for bottom in rng.sample(range(8 * factor, height + 1), 40):
        least = width // factor, 8
        box = 0, bottom - 8 * factor, width, bottom
        left, top, right, end = coarser(box, factor)
        np.testing.assert_array_equal(picture(data, "x").cut(box, least), whole[top:end, left:right])


@pytest.mark.parametrize("marker", [b"\xff\xc4", b"\xff\xda"], ids=["tables", "scan"])
def test_a_file_that_pillow_refuses_is_refused_though_the_box_lies_above_its_fault(marker, photo):
    data = as_jpeg(photo)
    middle = len(data) // 2
    broken = data[:middle] + marker + data[middle + 2 :]
    with pytest.raises(OSError, match=r"broken|truncated"):
        Image.open(io.BytesIO(broken)).load()
    for box in ((0, 0, 100, 100), (0, 0, *photo.size)):
        with pytest.raises(UserError, match=r"x can't be decoded"):
            picture(broken, "x").cut(box)


ODD = {
    "a byte of its scan lost, which libjpeg warns of": lambda data: data[:-9000] + data[-8999:],
    "bytes after its end": lambda data: data + b"\0" * 100,
    "turned, says its EXIF": lambda data: data,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_photos_are_read_as_pillow_reads_them(name, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = ODD[name](as_jpeg(photo, exif=exif))
    np.testing.assert_array_equal(picture(data, "x").cut(), np.asarray(Image.open(io.BytesIO(data))))


def test_many_threads_decode_the_same_pixels_as_one():
    files = [data for data, _ in LOSSLESS.values()] * 20
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda data: picture(data, "x").cut(), files))
    for pixels, (_, expected) in zip(pictures, list(LOSSLESS.values()) * 20, strict=True):
        np.testing.assert_array_equal(pixels, expected)
