"""Data sets against the files they were made of, and every root that is none."""

import gzip
import itertools
import os
import random
import shutil
import subprocess
import sys
import zlib
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from ghostnet.data import datasets
from ghostnet.data.datasets import (
    DEBIAN_FASHION_MNIST,
    FashionMnist,
    ImageFolder,
    Samples,
    Synthetic,
    check_same_classes,
    read_idx,
)
from ghostnet.errors import UserError
from tests.conftest import REPOSITORY

SAMPLES = REPOSITORY / "samples"
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
VAL_IMAGES, VAL_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
PICTURES = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
LABELS = (np.arange(30) * 7 % 10).astype(np.uint8)

original = pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")


# ImageFolder


def colour(number):
    return (number * 37 % 256, number * 91 % 256, number * 53 % 256)


def save(path, number, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), colour(number)).save(path, kind)
    return path


@pytest.fixture
def root(tmp_path):
    """Two classes in both splits, one picture each."""
    for number, name in enumerate(("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png")):
        save(tmp_path / "data" / name, number)
    return tmp_path / "data"


def test_pictures_of_a_folder_come_sorted_with_the_labels_of_their_folders(tmp_path):
    names = ["b/2.png", "b/10.PNG", "b/x.tar.JPEG", "a/Ω 1.Jpg", "a/z.jpeg", "c/1.WebP", "B/1.png"]
    kinds = {"png": "PNG", "jpg": "JPEG", "peg": "JPEG", "ebp": "WEBP"}
    for number, name in enumerate(names):
        save(tmp_path / "train" / name, number, kinds[name[-3:].lower()])
    dataset = ImageFolder("train", str(tmp_path))
    assert dataset.classes == ["B", "a", "b", "c"]
    assert dataset.labels.dtype == np.int64
    assert len(dataset) == len(dataset.labels) == len(names)
    for index, name in enumerate(sorted(names)):
        assert dataset.classes[dataset.labels[index]] == name[0]
        pixel = dataset.image(index).cut()[2, 2]
        assert np.abs(np.subtract(pixel, colour(names.index(name)))).max() < 4


def test_hidden_files_other_files_and_folders_in_a_class_are_passed_over(root):
    save(root / "train/.thumbnails/1.png", 1)
    save(root / "train/cat/.nested/1.png", 1)
    (root / "train/cat/._1.png").write_bytes(b"of a Mac")
    (root / "train/cat/labels.txt").write_text("cat")
    (root / "train/notes.png").write_text("no class")
    dataset = ImageFolder("train", str(root))
    assert dataset.classes == ["cat", "dog"]
    assert [dataset.path(index) for index in range(len(dataset))] == [
        root / "train/cat/1.png",
        root / "train/dog/1.png",
    ]


def test_the_home_folder_may_be_written_as_a_tilde(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(ImageFolder("val", "~/data")) == 2


def broken_root(case, root):
    match case:
        case "null":
            return None
        case "missing":
            shutil.rmtree(root)
        case "file":
            shutil.rmtree(root)
            root.write_text("")
        case "empty":
            shutil.rmtree(root)
            root.mkdir()
        case "no train":
            shutil.move(root / "train", root / "training")
        case "train is a file":
            shutil.rmtree(root / "train")
            (root / "train").write_text("")
        case "no classes":
            shutil.rmtree(root / "train")
            save(root / "train/1.png", 1)
        case "no images":
            for file in (root / "train").rglob("*.png"):
                file.rename(file.with_suffix(".svg"))
        case "an empty class":
            (root / "train/eel").mkdir()
        case "a class of hidden files":
            (root / "train/dog/1.png").rename(root / "train/dog/.1.png")
    return str(root)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("null", "data.root is not set: give the folder .* experiment=quickstart"),
        ("missing", "data.root=.*/data does not exist. Looked for .*/data/train/<class>/"),
        ("file", "data.root=.*/data is not a folder"),
        ("empty", "data.root=.*/data is empty"),
        ("no train", r"data.root=.*/data has no folder train \(it holds training, val\)"),
        ("train is a file", r"data.root=.*/data has no folder train \(it holds train, val\)"),
        ("no classes", "data.root=.*/data has no images in train. Looked for .*/data/train/<class>/"),
        ("no images", "data.root=.*/data has no images in train"),
        ("an empty class", "1 of 3 class folders in train hold no image, eel first"),
        ("a class of hidden files", "1 of 2 class folders in train hold no image, dog first"),
    ],
)
def test_a_root_without_a_data_set_is_told_with_what_was_looked_for(case, message, root):
    with pytest.raises(UserError, match=f"^{message}" if "class folders" not in message else message):
        ImageFolder("train", broken_root(case, root))


@pytest.mark.parametrize("case", ["broken", "gone", "a folder", "unreadable"])
def test_a_picture_that_can_not_be_read_is_named(case, root):
    dataset = ImageFolder("train", str(root))
    path = root / "train/dog/1.png"
    if case == "broken":
        path.write_bytes(path.read_bytes()[:50])
    else:
        path.unlink()
    if case == "a folder":
        path.mkdir()
    if case == "unreadable":
        path.symlink_to(path)
    with pytest.raises(UserError, match=rf"^{path} can't be (read|decoded): \w+"):
        dataset.image(1).cut()
    assert tuple(dataset.image(0).cut()[0, 0]) == colour(0)


class Named:
    def __init__(self, *classes):
        self.classes = list(classes)


def test_the_same_classes_in_both_splits_pass(root):
    check_same_classes(ImageFolder("train", str(root)), ImageFolder("val", str(root)))


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("cat dog", "cat dgo", r"1 only in train \(dog\); 1 only in val \(dgo\)\. Did you mean dog\?"),
        ("cat dog", "cat", r"train \(2\) and val \(1\) differ: 1 only in train \(dog\)\. Both"),
        ("cat", "cat dog", r"train \(1\) and val \(2\) differ: 1 only in val \(dog\)\. Both"),
        ("a", "a b c d e", r"4 only in val \(b, c, d, …\)"),
        ("a b", "b a", "the same names in another order"),
    ],
)
def test_splits_with_other_classes_are_told_by_the_names_that_differ(train, val, message):
    with pytest.raises(UserError, match=message):
        check_same_classes(Named(*train.split()), Named(*val.split()))


# Fashion-MNIST


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write(folder, name, data, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


def write_all(folder, zipped=False):
    for name in (TRAIN_IMAGES, VAL_IMAGES):
        write(folder, name, idx(PICTURES), zipped)
    for name in (TRAIN_LABELS, VAL_LABELS):
        write(folder, name, idx(LABELS), zipped)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_fashion_mnist_is_read_plain_and_gzipped_from_its_folder_or_torchvisions(tmp_path, split, below, zipped):
    write_all(tmp_path / below, zipped)
    dataset = FashionMnist(split, str(tmp_path))
    assert len(dataset) == 30
    assert dataset.labels.tolist() == LABELS.tolist()
    for index in range(30):
        np.testing.assert_array_equal(dataset.image(index).cut(), PICTURES[index])


@original
@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("val", 10_000)])
def test_fashion_mnist_of_debians_package_is_found_whole_and_balanced(split, count):
    dataset = FashionMnist(split, None)
    assert dataset.pictures.shape == (count, 28, 28)
    assert np.bincount(dataset.labels).tolist() == [count // 10] * 10
    assert len(dataset.classes) == 10


GOOD = idx(PICTURES)
DAMAGED = {
    **{f"{length} bytes": GOOD[:length] for length in (0, 1, 3, 4, 6, 8, 15, 16, 17, len(GOOD) - 1)},
    "a byte more": GOOD + b"\0",
    "text": b"<html>404 Not Found</html>",
    "labels": idx(LABELS),
    "floats": bytes([0, 0, 13, 3]) + GOOD[4:],
    "an overflowing count": bytes([0, 0, 8, 3]) + b"\xff" * 12,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_idx_file_is_named(case, zipped, tmp_path):
    write_all(tmp_path, zipped)
    path = write(tmp_path, TRAIN_IMAGES, DAMAGED[case], zipped)
    with pytest.raises(UserError, match=rf"^{path} is no whole IDX file of 3 dimensions"):
        FashionMnist("train", str(tmp_path))


def test_corrupted_gzip_files_end_in_the_array_or_a_user_error(tmp_path):
    rng = random.Random(0)
    whole = gzip.compress(idx(LABELS))
    refusals = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "x.gz").write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            assert read_idx(tmp_path, "x", 1).tolist() == LABELS.tolist()
        except UserError:
            refusals += 1
    assert refusals > 200


@pytest.mark.parametrize(
    ("pictures", "labels"),
    [
        (PICTURES, LABELS[:29]),
        (PICTURES[:29], LABELS),
        (PICTURES, LABELS + 1),
        (PICTURES[:0], LABELS[:0]),
        (PICTURES[:, :0], LABELS),
    ],
    ids=["a label less", "a picture less", "a label of 10", "none", "no pixels"],
)
def test_pictures_and_labels_that_do_not_belong_together_are_told(pictures, labels, tmp_path):
    write_all(tmp_path)
    write(tmp_path, VAL_IMAGES, idx(pictures))
    write(tmp_path, VAL_LABELS, idx(labels))
    assert len(FashionMnist("train", str(tmp_path))) == 30
    with pytest.raises(UserError, match=rf"^{tmp_path}: t10k has {len(pictures)} pictures and {len(labels)} labels"):
        FashionMnist("val", str(tmp_path))


@pytest.mark.parametrize("gone", [TRAIN_IMAGES, TRAIN_LABELS])
def test_a_folder_without_one_of_the_files_is_told_with_the_names_that_are_looked_for(gone, tmp_path):
    write_all(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(UserError, match=rf"^data\.root={tmp_path} holds no .* {TRAIN_IMAGES} and {TRAIN_LABELS}"):
        FashionMnist("train", str(tmp_path))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where a download goes, on a machine without Debian's package."""
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ghostnet/FashionMNIST/raw"


def replace_download(monkeypatch, download):
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)


def downloaded(url, download_root, filename, md5):
    """What torchvision leaves behind: the archive and the file it holds."""
    name = filename.removesuffix(".gz")
    data = idx(PICTURES if "images" in name else LABELS)
    write(Path(download_root), name, data)
    write(Path(download_root), name, data, zipped=True)


@pytest.mark.parametrize(
    "fault",
    [
        URLError("no route to host"),
        ConnectionResetError("reset"),
        RuntimeError("File not found or corrupted."),
        IncompleteRead(b"half"),
        PermissionError(13, "Permission denied"),
        TimeoutError("timed out"),
    ],
    ids=repr,
)
def test_a_download_that_fails_says_what_else_to_do(fault, cache, monkeypatch):
    def fail(*args, **kwargs):
        raise fault

    replace_download(monkeypatch, fail)
    with pytest.raises(UserError, match=r"can't be downloaded \(.*dataset-fashion-mnist, or .*data\.root="):
        FashionMnist("train", None)


def test_a_cache_that_can_not_be_written_is_told(cache, monkeypatch):
    cache.parent.parent.parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"can't be downloaded .*cache"):
        FashionMnist("train", None)


def test_a_download_is_used_once_and_found_again(cache, monkeypatch):
    replace_download(monkeypatch, downloaded)
    assert FashionMnist("train", None).labels.tolist() == LABELS.tolist()
    replace_download(monkeypatch, None)
    assert len(FashionMnist("val", None)) == 30


def test_a_download_that_was_cut_off_is_completed(cache, monkeypatch):
    write(cache, TRAIN_IMAGES, idx(PICTURES))
    replace_download(monkeypatch, downloaded)
    assert len(FashionMnist("train", None)) == 30
    (cache / VAL_LABELS).unlink()
    (cache / f"{VAL_LABELS}.gz").unlink()
    assert len(FashionMnist("val", None)) == 30


@pytest.mark.parametrize("value", [None, ""])
def test_where_no_cache_folder_is_set_the_download_goes_to_the_home_folder(value, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    replace_download(monkeypatch, downloaded)
    FashionMnist("train", None)
    assert (tmp_path / ".cache/ghostnet/FashionMNIST/raw" / TRAIN_IMAGES).is_file()


# Samples


@pytest.mark.parametrize(("split", "per_class"), [("train", 600), ("val", 100)])
def test_the_samples_are_class_balanced(split, per_class):
    dataset = Samples(split, None)
    assert len(dataset) == 10 * per_class
    assert np.bincount(dataset.labels).tolist() == [per_class] * 10


def test_the_samples_take_at_most_5_mb():
    assert sum(path.stat().st_size for path in SAMPLES.iterdir() if path.is_file()) <= 5_000_000


@original
@pytest.mark.parametrize(("split", "per_class"), [("train", 600), ("val", 100)])
def test_the_samples_are_the_first_of_each_class_of_the_original(split, per_class):
    samples, whole = Samples(split, None), FashionMnist(split, None)
    for label in range(10):
        expected = whole.pictures[whole.labels == label][:per_class]
        np.testing.assert_array_equal(samples.pictures[samples.labels == label], expected)


@original
def test_make_remakes_the_samples(tmp_path):
    shutil.copy(SAMPLES / "make.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, str(tmp_path / "make.py")], env=environment, check=True, capture_output=True)
    made = sorted(path for path in tmp_path.glob("*.gz"))
    assert [path.name for path in made] == sorted(path.name for path in SAMPLES.glob("*.gz"))
    for path in made:
        ours, theirs = path.read_bytes(), (SAMPLES / path.name).read_bytes()
        assert gzip.decompress(ours) == gzip.decompress(theirs)
        # Other versions of zlib pack the same content in other ways.
        assert "ng" in zlib.ZLIB_RUNTIME_VERSION or ours == theirs


# Synthetic


def test_synthetic_pictures_have_the_size_asked_for_and_their_classes_brightness():
    dataset = Synthetic("train", None, image_size=24, num_classes=10, num_train=45, num_val=7)
    assert len(dataset) == len(dataset.labels) == 45
    assert len(dataset.classes) == 10
    assert np.bincount(dataset.labels).tolist() == [5] * 5 + [4] * 5
    pictures = [dataset.image(index).cut() for index in range(10)]
    assert {picture.shape for picture in pictures} == {(24, 24, 3)}
    assert all(a.mean() < b.mean() for a, b in itertools.pairwise(pictures))
    assert np.ptp(pictures[9]) > 100, "no noise"


@pytest.mark.parametrize("num_classes", [1, 2, 16, 17, 1000])
def test_synthetic_is_the_same_every_time_and_both_splits_have_the_same_classes(num_classes):
    made = [Synthetic(split, None, 8, num_classes, 40, 20) for split in ("train", "train", "val")]
    assert [len(dataset) for dataset in made] == [40, 40, 20]
    check_same_classes(made[0], made[2])
    for index in range(20):
        one, two, three = (dataset.image(index).cut().tobytes() for dataset in made)
        assert one == two == three
