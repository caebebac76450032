"""Preprocessing and augmentation against torchvision's, mixing against a plain loop over samples."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import (
    ColorJitter,
    InterpolationMode,
    Normalize,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    ToTensor,
)
from torchvision.transforms import functional as TF
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2 import functional as F2

from ghostnet.data import transforms
from ghostnet.data.decode import Pixels
from ghostnet.data.transforms import (
    RANDAUGMENT,
    Augment,
    Mix,
    Preprocessing,
    apply,
    erase,
    jitter,
    rand_augment,
    resample,
    resample_part,
)
from ghostnet.engine import cross_entropy

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OFF = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "vflip": 0.0, "color_jitter": 0.0, "randaugment": 0}
OFF |= {"magnitude": 9, "erasing": 0.0, "interpolation": "bilinear"}
ALL = {"scale": [0.3, 1.0], "ratio": [0.75, 4 / 3], "hflip": 0.5, "vflip": 0.5, "color_jitter": 0.4, "randaugment": 2}
ALL |= {"erasing": 0.5}
SIZES = [(300, 200), (200, 300), (98, 49), (49, 98), (800, 200), (200, 800), (196, 49), (64, 64), (71, 53), (53, 71)]
SIZES += [(20, 13), (13, 20), (5, 90), (1, 1), (32, 32), (33, 32), (32, 37)]


def picture(width, height, seed=0, mode="RGB"):
    noise = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise if mode == "RGB" else noise[:, :, 0])


def pixels(image):
    return Pixels(np.array(image))


def resized(image, height, width, interpolation):
    """What torchvision's second version makes of the picture as a tensor, where bytes stay bytes."""
    kind = InterpolationMode["NEAREST_EXACT" if interpolation == "nearest" else interpolation.upper()]
    return F2.resize(
        torch.from_numpy(np.array(image)[None] if image.mode == "L" else np.array(image).transpose(2, 0, 1)),
        [height, width],
        kind,
    )


def preprocessing(image_size=32, crop=1.0, interpolation="bilinear", mean=MEAN, std=STD):
    return Preprocessing(image_size, crop, mean, std, interpolation)


# Preprocessing


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("image_size", "crop"), [(32, 1.0), (28, 0.875), (33, 0.95), (24, 0.7), (31, 0.5)])
def test_preprocessing_gives_the_pixels_of_torchvisions_resize_and_center_crop(image_size, crop, interpolation, mode):
    shorter = math.floor(image_size / crop)
    for width, height in SIZES:
        image = picture(width, height, mode=mode)
        ours = preprocessing(image_size, crop, interpolation)(pixels(image))
        # Its own rounding of the longer side.
        size = Resize(shorter, InterpolationMode.NEAREST)(image).size
        expected = F2.center_crop(resized(image, size[1], size[0], interpolation), [image_size, image_size])
        np.testing.assert_array_equal(ours, expected.permute(1, 2, 0).squeeze(2).numpy(), f"{width}×{height}")


def test_a_thin_image_has_the_pixels_of_its_whole_resize_without_the_memory(monkeypatch):
    rng, made = random.Random(0), []
    resize = transforms.resample
    monkeypatch.setattr(transforms, "resample", lambda *given: made.append(given[1]) or resize(*given))
    for number in range(90):
        short = rng.randint(1, 6)
        sides = [short, rng.randint(9 * short, 200)][:: rng.choice([1, -1])]
        image = pixels(picture(*sides, number, mode=rng.choice(["RGB", "L"])))
        shorter = rng.randint(7, 40)
        target = tuple(int(shorter * side / short) for side in sides)
        crop = rng.randint(2, shorter)
        left, top = (round((side - crop) / 2) for side in target)
        for interpolation in ("nearest", "bilinear", "bicubic"):
            expected = resize(image.array, target, interpolation)[top : top + crop, left : left + crop]
            made.clear()
            ours = resample_part(image.array, target, (left, top, left + crop, top + crop), interpolation)
            np.testing.assert_array_equal(ours, expected, f"{sides} {target} {crop} {interpolation}")
            assert max(math.prod(size) for size in made) < math.prod(target)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 2_000_000)])
def test_an_absurdly_thin_image_is_evaluated_from_its_middle(size):
    image = Pixels(np.full(size[::-1], 120, np.uint8))
    assert (preprocessing(224, 0.875, "bicubic")(image) == 120).all()


@pytest.mark.parametrize(("interpolation", "off"), [("bilinear", 1), ("bicubic", 2)])
def test_a_photo_is_resampled_as_pillow_does_but_for_the_rounding_of_few_values(interpolation, off, photo):
    for width, height in ((341, 256), (224, 224), (97, 301), (800, 700), (33, 20)):
        ours = resample(np.array(photo), (width, height), interpolation)
        theirs = photo.resize((width, height), Image.Resampling[interpolation.upper()])
        difference = np.abs(ours.astype(int) - np.asarray(theirs))
        assert difference.max() <= off
        assert (difference > 0).mean() < 0.05


def test_preprocessing_rounds_the_longer_side_as_torchvision_does_for_every_shape():
    # Only the centre's place depends on the rounding: pictures of one channel and nearest neighbours are enough.
    ours = preprocessing(25, 0.84, "nearest")
    rng = random.Random(0)
    for _ in range(1500):
        image = picture(rng.randint(1, 120), rng.randint(1, 120), mode="L")
        size = Resize(29, InterpolationMode.NEAREST)(image).size
        expected = F2.center_crop(resized(image, size[1], size[0], "nearest"), [25, 25])[0]
        np.testing.assert_array_equal(ours(pixels(image)), expected.numpy(), str(image.size))


def test_normalize_equals_torchvisions_to_tensor_and_normalize():
    images = [picture(32, 32, seed) for seed in range(3)]
    expected = torch.stack([Normalize(MEAN, STD)(ToTensor()(image)) for image in images])
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    before = batch.clone()
    normalized = preprocessing().normalize(batch)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalized, expected, rtol=0, atol=2e-6)
    assert torch.equal(batch, before)


def test_normalize_first_used_in_an_evaluation_serves_training_too():
    spec = preprocessing(mean=[0.11, 0.22, 0.33])
    batch = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with torch.inference_mode():
        expected = spec.normalize(batch).clone()
    weight = torch.ones(1, requires_grad=True)
    (spec.normalize(batch) * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(spec.normalize(batch), expected)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"crop": 0.0}, "crop must be"),
        ({"crop": 1.01}, "crop must be"),
        ({"mean": [0.5]}, "mean must be"),
        ({"std": [0.5] * 4}, "std must be"),
        ({"std": [0.2, 0.0, 0.2]}, "std must be above 0"),
    ],
)
def test_preprocessing_refuses_what_is_out_of_range(faulty, message):
    with pytest.raises(ValueError, match=message):
        preprocessing(**faulty)


# Augment


class TorchDraws:
    """random.Random's interface over torch's generator, to draw what torchvision draws; noise is the same always."""

    def uniform(self, low, high):
        return torch.empty(1).uniform_(low, high).item()

    def randint(self, low, high):
        return torch.randint(low, high + 1, (1,)).item()

    def getrandbits(self, count):
        return 0


class Script:
    """random.Random's interface over fixed answers, and what was asked."""

    def __init__(self, order, values):
        self.order, self.values, self.asked = order, list(values), []

    def sample(self, population, k):
        return [population[index] for index in self.order]

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.values.pop(0)


@pytest.mark.parametrize("size", [(500, 375), (28, 28), (31, 97), (400, 20), (3, 60), (1, 1), (50, 41)])
@pytest.mark.parametrize(
    ("scale", "ratio"),
    # The last is rarely met, so that all ten tries are taken.
    [([0.08, 1.0], [0.75, 4 / 3]), ([0.5, 1.0], [0.5, 2.0]), ([0.85, 1.0], [0.75, 4 / 3])],
)
def test_the_crop_is_torchvisions_for_the_same_draws(size, scale, ratio):
    augment = Augment(**OFF | {"scale": scale, "ratio": ratio})
    image = picture(*size, mode="L")
    for seed in range(100):
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, scale, ratio)
        torch.manual_seed(seed)
        assert augment.crop_box(size, TorchDraws()) == (left, top, left + width, top + height)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1000), (1000, 1), (97, 31), (31, 97), (64, 64)])
def test_where_no_crop_fits_it_is_torchvisions_largest_central_one(size):
    scale, ratio = [1.0, 1.0], [0.75, 4 / 3]
    # A share of the whole area and a drawn ratio other than the picture's never fit.
    top, left, height, width = RandomResizedCrop.get_params(picture(*size, mode="L"), scale, ratio)
    box = Augment(**OFF | {"scale": scale, "ratio": ratio}).crop_box(size, random.Random(0))
    assert box == (left, top, left + width, top + height)


def test_crops_hold_a_pixel_and_stay_inside_for_any_shape_and_range():
    rng = random.Random(0)
    for _ in range(2000):
        width, height = rng.randint(1, 60), rng.randint(1, 60)
        scale, ratio = sorted((rng.uniform(0.001, 1), rng.uniform(0.001, 1))), sorted((rng.uniform(0.05, 20),) * 2)
        left, top, right, bottom = Augment(**OFF | {"scale": scale, "ratio": ratio}).crop_box((width, height), rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_crops_take_every_place_equally_often():
    augment = Augment(**OFF | {"scale": [0.25, 0.25]})
    rng = random.Random(0)
    places = Counter(augment.crop_box((16, 16), rng)[:2] for _ in range(81 * 60))
    assert len(places) == 81
    # Chi-square with 80 degrees of freedom: mean 80, deviation 12.6.
    assert sum((count - 60) ** 2 / 60 for count in places.values()) < 140


def test_a_crop_of_the_inputs_size_is_a_slice_of_the_picture():
    augment = Augment(**OFF | {"scale": [0.25, 0.25]})
    image = picture(64, 64)
    for seed in range(20):
        left, top, right, bottom = augment.crop_box(image.size, random.Random(seed))
        ours = augment(pixels(image), random.Random(seed), preprocessing())
        np.testing.assert_array_equal(ours, np.asarray(image)[top:bottom, left:right])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_a_whole_picture_is_resized_as_torchvision_does(interpolation):
    image = picture(71, 71)
    ours = Augment(**OFF | {"interpolation": interpolation})(pixels(image), random.Random(0), preprocessing())
    np.testing.assert_array_equal(ours, resized(image, 32, 32, interpolation).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_a_crop_is_resized_as_torchvision_does_by_itself(interpolation):
    augment = Augment(**OFF | {"scale": [0.1, 0.8], "ratio": [0.5, 2.0], "interpolation": interpolation})
    image = picture(90, 70)
    for seed in range(20):
        part = image.crop(augment.crop_box(image.size, random.Random(seed)))
        ours = augment(pixels(image), random.Random(seed), preprocessing())
        np.testing.assert_array_equal(ours, resized(part, 32, 32, interpolation).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_flips_mirror_the_picture_as_often_as_they_should(mode):
    image = picture(32, 32, mode=mode)
    array = np.asarray(image)
    mirrored = {(False, False): array, (True, False): array[:, ::-1]}
    mirrored |= {(False, True): array[::-1], (True, True): array[::-1, ::-1]}
    names = {flipped.tobytes(): name for name, flipped in mirrored.items()}
    augment = Augment(**OFF | {"hflip": 0.5, "vflip": 0.25})
    seen = Counter(names[augment(pixels(image), random.Random(seed), preprocessing()).tobytes()] for seed in range(800))
    # Three standard deviations of 800 draws.
    assert abs(seen[True, False] + seen[True, True] - 400) < 43
    assert abs(seen[False, True] + seen[True, True] - 200) < 37


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_colour_jitter_applies_torchvisions_adjustments_in_the_drawn_order(strength):
    image = picture(32, 32)
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    low, high = ColorJitter(brightness=strength).brightness
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        factors = [low, (low + high) / 2 + 0.1, high]
        script = Script(order, factors)
        ours = np.array(image)
        jitter(ours, strength, script)
        expected = image
        for index, factor in zip(order, factors, strict=True):
            expected = adjust[index](expected, factor)
        np.testing.assert_array_equal(ours, np.asarray(expected))
        assert script.asked == [(low, high)] * 3


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_colour_jitter_of_photos_and_grey_pictures_has_the_pixels_of_torchvision_too(strength, photo):
    for seed, mode in itertools.product(range(40), ("RGB", "L")):
        image = photo.convert(mode).crop((seed, seed, 160 + seed, 120))
        ours, rng = np.array(image), random.Random(seed)
        jitter(ours, strength, random.Random(seed))
        adjust = [TF.adjust_brightness, TF.adjust_contrast] + ([TF.adjust_saturation] if mode == "RGB" else [])
        for function in rng.sample(adjust, len(adjust)):
            image = function(image, rng.uniform(max(0.0, 1 - strength), 1 + strength))
        np.testing.assert_array_equal(ours, np.asarray(image))


TORCHVISION = {"autocontrast": "AutoContrast"} | {
    name: "".join(map(str.capitalize, name.split("_"))) for name in RANDAUGMENT if name != "autocontrast"
}
SPACE = RandAugment()._augmentation_space(31, (32, 32))


def test_randaugment_has_torchvisions_operations():
    assert sorted(TORCHVISION.values()) == sorted(SPACE)
    assert len(RANDAUGMENT) == 14


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", RANDAUGMENT)
def test_each_operation_of_randaugment_is_torchvisions_at_each_magnitude(name, mode):
    magnitudes, signed = SPACE[TORCHVISION[name]]
    ours_signed, value_of = RANDAUGMENT[name]
    assert ours_signed == signed
    image = picture(32, 32, mode=mode)
    for magnitude in (0, 1, 9, 15, 30):
        value = value_of(magnitude / 30, 32)
        reference = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
        assert value == pytest.approx(reference, rel=1e-6, abs=1e-6)
        for sign in (1, -1) if signed else (1,):
            ours = apply(image, name, sign * reference)
            expected = _apply_op(image, TORCHVISION[name], sign * reference, InterpolationMode.NEAREST, None)
            assert ours.mode == mode
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_randaugment_draws_every_operation_and_sign_equally_often(monkeypatch):
    seen = Counter()

    def count(image, name, value):
        seen[name, math.copysign(1, value)] += 1
        return image

    monkeypatch.setattr(transforms, "apply", count)
    rng = random.Random(0)
    for _ in range(14 * 400):
        rand_augment(picture(8, 8), 9, rng)
    for name, (signed, _) in RANDAUGMENT.items():
        # Four standard deviations of a count of 400, and of one of 200.
        assert abs(seen[name, 1.0] + seen[name, -1.0] - 400) < 80
        assert abs(seen[name, -1.0] - 200 * signed) < 57


@pytest.mark.parametrize("shape", [(64, 64, 3), (64, 64)])
def test_erasing_overwrites_one_rectangle_of_legal_size_with_noise_of_the_data(shape):
    image = np.zeros(shape, np.uint8)
    spec = preprocessing(mean=[0.5, 0.6, 0.7], std=[0.05, 0.05, 0.05])
    places, values = set(), []
    for seed in range(300):
        erased = erase(image, spec, random.Random(seed))
        pixels = erased.reshape(64, 64, -1)
        changed = pixels.any(axis=2)
        assert changed.any()
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        h, w = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        assert changed.sum() == h * w, "not a rectangle"
        assert h < 64
        assert w < 64
        # Sides are rounded by half a pixel at most.
        assert (h - 0.5) * (w - 0.5) <= 64 * 64 / 3
        assert (h + 0.5) * (w + 0.5) >= 64 * 64 * 0.02
        assert (h - 0.5) / (w + 0.5) <= 3.3
        assert (h + 0.5) / (w - 0.5) >= 0.3
        places.add((rows[0], columns[0]))
        values.append(pixels[changed])
    assert len(places) > 200
    noise = np.concatenate(values) / 255
    np.testing.assert_allclose(noise.mean(axis=0), [0.5, 0.6, 0.7][: noise.shape[1]], atol=0.005)
    np.testing.assert_allclose(noise.std(axis=0), 0.05, atol=0.002)
    assert not image.any(), "the picture itself was changed"


def test_erasing_takes_torchvisions_rectangle_for_the_same_draws():
    image = np.zeros((16, 16), np.uint8)
    white = preprocessing(mean=[1.0] * 3, std=[1e-6] * 3)
    for seed in range(500):
        torch.manual_seed(seed)
        top, left, height, width, _ = RandomErasing.get_params(torch.zeros(1, 16, 16), (0.02, 1 / 3), (0.3, 3.3), [0.0])
        torch.manual_seed(seed)
        expected = np.zeros((16, 16), bool)
        expected[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(erase(image, white, TorchDraws()) > 0, expected)


def test_erasing_comes_as_often_as_its_probability():
    image = Image.new("L", (32, 32))
    augment = Augment(**OFF | {"erasing": 0.25})
    erased = sum(augment(pixels(image), random.Random(seed), preprocessing()).any() for seed in range(800))
    assert abs(erased - 200) < 37


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_augmentation_is_a_function_of_picture_and_seed_and_leaves_the_picture_alone(mode):
    augment = Augment(**OFF | ALL)
    image = picture(50, 40, mode=mode)
    before = image.tobytes()
    results = [augment(pixels(image), random.Random(seed), preprocessing()) for seed in range(60)]
    for seed, result in enumerate(results):
        assert result.dtype == np.uint8
        assert result.shape == ((32, 32, 3) if mode == "RGB" else (32, 32))
        np.testing.assert_array_equal(result, augment(pixels(image), random.Random(seed), preprocessing()))
    assert len({result.tobytes() for result in results}) == 60
    assert image.tobytes() == before


def test_a_grey_picture_is_augmented_like_its_rgb_copy():
    # Without colour jitter and erasing, which draw less for a grey picture.
    augment = Augment(**OFF | ALL | {"color_jitter": 0.0, "erasing": 0.0})
    grey = picture(50, 40, mode="L")
    for seed in range(60):
        one, three = (augment(pixels(p), random.Random(seed), preprocessing()) for p in (grey, grey.convert("RGB")))
        assert np.abs(three.astype(int) - one[:, :, None]).max() <= 1


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"scale": [0.0, 1.0]}, "scale must be"),
        ({"scale": [0.9, 0.1]}, "scale must be"),
        ({"scale": [0.5]}, "scale must be"),
        ({"scale": [0.5, 1.5]}, "at most 1"),
        ({"ratio": [2.0, 1.0]}, "ratio must be"),
        ({"ratio": [-1.0, 1.0]}, "ratio must be"),
        ({"ratio": [1.0, float("nan")]}, "ratio must be"),
        ({"magnitude": 31}, "magnitude is 0 to 30"),
    ],
)
def test_augment_refuses_what_is_out_of_range(faulty, message):
    with pytest.raises(ValueError, match=message):
        Augment(**OFF | faulty)


# Mix

IMAGES = torch.randn(7, 3, 12, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 1, 4, 1, 5, 0, 2])
PARTNERS = [1, 0, 3, 2, 5, 4, 6]


def test_nothing_is_mixed_where_both_are_off():
    images, mixed = Mix(0.0, 0.0)(IMAGES, LABELS, 1, 2)
    assert images is IMAGES
    assert mixed is None


def test_mixup_equals_a_loop_over_samples():
    for step in range(20):
        images, mixed = Mix(0.2, 0.0)(IMAGES, LABELS, 1, step)
        for index, partner in enumerate(PARTNERS):
            expected = mixed.share * IMAGES[index] + (1 - mixed.share) * IMAGES[partner]
            torch.testing.assert_close(images[index], expected)
            assert mixed.partners[index] == LABELS[partner]


def test_cutmix_pastes_one_rectangle_of_the_neighbour_and_weighs_by_its_area():
    own = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 12, 10)
    shares = []
    for step in range(100):
        images, mixed = Mix(0.0, 1.0)(own, LABELS, 1, step)
        pasted = (images != own)[0, 0]
        for index, partner in enumerate(PARTNERS):
            expected = torch.where(pasted, float(partner), float(index)).expand(3, 12, 10)
            assert torch.equal(images[index], expected)
            assert mixed.partners[index] == LABELS[partner]
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns[None, :])
        assert rows.diff().sum() <= 2
        assert columns.diff().sum() <= 2
        assert mixed.share == pytest.approx(1 - pasted.sum().item() / 120)
        shares.append(mixed.share)
    assert min(shares) < 0.3
    assert max(shares) > 0.9


def test_the_loss_of_a_mixed_batch_equals_a_weighted_loop_over_samples():
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    for mix in (Mix(0.2, 0.0), Mix(0.0, 1.0)):
        for step in range(5):
            _, mixed = mix(IMAGES, LABELS, 1, step)
            losses = []
            for index, partner in enumerate(PARTNERS):
                target = torch.zeros(6)
                target[LABELS[index]] += mixed.share
                target[LABELS[partner]] += 1 - mixed.share
                target = 0.9 * target + 0.1 / 6
                losses.append(-(target * F.log_softmax(logits[index], 0)).sum())
            torch.testing.assert_close(cross_entropy(logits, LABELS, mixed, 0.1), torch.stack(losses).mean())


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixups_share_is_beta_distributed(alpha):
    image, label = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    shares = np.array([Mix(alpha, 0.0)(image, label, 5, step)[1].share for step in range(2000)])
    reference = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    points = np.linspace(0, 1, 41)
    ours, theirs = ((values[:, None] <= points).mean(axis=0) for values in (shares, reference))
    # Kolmogorov and Smirnov's bound for 2,000 draws at one in a thousand.
    assert np.abs(ours - theirs).max() < 1.95 / math.sqrt(2000)


def test_mixing_is_a_function_of_seed_and_step_and_leaves_the_batch_alone():
    before = IMAGES.clone()
    for mix in (Mix(0.2, 0.0), Mix(0.0, 1.0)):
        first, again, later, other = (
            mix(IMAGES, LABELS, seed, step) for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7))
        )
        assert torch.equal(first[0], again[0])
        assert len({mixed.share for _, mixed in (first, again, later, other)}) == 3
    assert torch.equal(IMAGES, before)


def test_where_both_are_on_half_of_the_batches_are_cut():
    own = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    cut = sum(bool((Mix(1.0, 1.0)(own, labels, 3, step)[0].frac() == 0).all()) for step in range(400))
    assert abs(cut - 200) < 40


@pytest.mark.parametrize("mix", [Mix(0.2, 0.0), Mix(0.0, 1.0)], ids=["mixup", "cutmix"])
def test_mixing_keeps_the_memory_format(mix):
    images, _ = mix(IMAGES.contiguous(memory_format=torch.channels_last), LABELS, 1, 2)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_neighbours_stay_together_when_a_batch_is_split_over_ranks():
    for mix in (Mix(0.2, 0.0), Mix(0.0, 1.0)):
        whole, _ = mix(IMAGES[:6], LABELS[:6], 1, 2)
        parts = [mix(IMAGES[start : start + 2], LABELS[start : start + 2], 1, 2)[0] for start in (0, 2, 4)]
        assert torch.equal(whole, torch.cat(parts))
