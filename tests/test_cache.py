"""Evaluation pictures that are kept: found as they were made, never where anything about them has changed."""

import errno
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from ghostnet.data import cache as room
from ghostnet.data.cache import PictureCache, open_cache
from ghostnet.data.datasets import ImageFolder, Samples
from ghostnet.data.transforms import Preprocessing
from ghostnet.distributed import ALONE
from ghostnet.errors import ConfigError

PICTURES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)


def spec(**changes):
    settings = {"image_size": 8, "crop": 0.875, "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic"}
    return Preprocessing(**settings | changes)


def found(cache, index):
    out = np.zeros((8, 8, 3), np.uint8)
    return out if cache.read(index, out) else None


def test_what_was_kept_is_found_by_another_and_the_rest_is_not(tmp_path):
    one = PictureCache(tmp_path / "new", "x", 20, 8)
    for index in range(0, 20, 3):
        one.write(index, PICTURES[index])
    other = PictureCache(tmp_path / "new", "x", 20, 8)
    assert other.kept() == 7
    for index in range(20):
        if index % 3:
            assert found(other, index) is None
        else:
            np.testing.assert_array_equal(found(other, index), PICTURES[index])


@pytest.mark.parametrize("changed", [("y", 20, 8), ("x", 21, 8), ("x", 20, 9)])
def test_another_identity_count_or_size_is_another_file(tmp_path, changed):
    one = PictureCache(tmp_path, "x", 20, 8)
    one.write(0, PICTURES[0])
    assert PictureCache(tmp_path, *changed).kept() == 0


def test_no_damaged_picture_is_found(tmp_path):
    cache = PictureCache(tmp_path, "x", 20, 8)
    for index, picture in enumerate(PICTURES):
        cache.write(index, picture)
    whole = cache.path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 5)):
            damaged[place] ^= int(rng.integers(1, 256))
        cut = int(rng.integers(0, len(whole))) if rng.random() < 0.2 else len(whole)
        cache.path.write_bytes(damaged[:cut])
        reader = PictureCache(tmp_path, "x", 20, 8)
        for index, picture in enumerate(PICTURES):
            kept = found(reader, index)
            assert kept is None or np.array_equal(kept, picture)
        reader.close()


def test_threads_that_write_and_read_at_once_find_only_whole_pictures(tmp_path):
    caches = [PictureCache(tmp_path, "x", 20, 8) for _ in range(4)]
    faults = []

    def work(cache):
        for index in [*range(20)] * 20:
            kept = found(cache, index)
            if kept is None:
                cache.write(index, PICTURES[index])
            elif not np.array_equal(kept, PICTURES[index]):
                faults.append(index)

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert caches[0].kept() == 20


def test_where_the_file_can_not_be_made_nothing_is_kept_and_why_is_told(tmp_path):
    (tmp_path / "file").touch()
    cache = PictureCache(tmp_path / "file" / "val", "x", 20, 8)
    cache.write(0, PICTURES[0])
    assert found(cache, 0) is None
    assert str(cache).endswith("can't be made: Not a directory; evaluation images are not kept.")


def test_on_a_full_disk_what_was_kept_stays_and_no_more_is_written(tmp_path, monkeypatch):
    cache = PictureCache(tmp_path, "x", 20, 8)
    cache.write(0, PICTURES[0])

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(room.os, "pwrite", full)
    cache.write(1, PICTURES[1])
    assert "can't be written: No space left on device" in str(cache)
    np.testing.assert_array_equal(found(cache, 0), PICTURES[0])
    assert found(cache, 1) is None


def test_any_change_of_files_or_preprocessing_is_another_file(tmp_path):
    for number in range(4):
        path = tmp_path / f"val/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PICTURES[number]).save(path)

    def place(**changes):
        cache = open_cache(ImageFolder("val", str(tmp_path)), spec(**changes), ALONE)
        cache.close()
        return cache.path

    first = place()
    assert place() == first
    assert place(mean=[0.1] * 3) == first, "it is applied to what is kept"
    others = [place(crop=0.9), place(interpolation="bilinear"), place(image_size=9)]
    os.utime(tmp_path / "val/a/0.png", ns=(1, 1))
    others.append(place())
    (tmp_path / "val/a/0.png").rename(tmp_path / "val/a/1.png")
    others.append(place())
    assert len({first, *others}) == 6


def test_pictures_that_are_in_memory_are_not_kept():
    with pytest.raises(ConfigError, match=r"data\.cache_val=true is for image files, and Samples has none"):
        open_cache(Samples("val", None), spec(), ALONE)


@pytest.mark.slow
def test_later_evaluations_decode_nothing_and_give_the_same(run, tmp_path, image_folder):
    words = [
        f"data.root={image_folder}",
        "data.image_size=32",
        "model.width=0.1",
        "device=cpu",
        "schedule.warmup_epochs=1",
        "data.cache_val=true",
    ]
    keep = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    trained = run("train.py", *words, "epochs=1", "data.batch_size=16", "hydra.run.dir=run", **keep)
    assert trained.returncode == 0, trained.stderr
    (kept,) = (tmp_path / "cache/ghostnet/val").iterdir()
    plain = run("evaluate.py", "ckpt=run", "device=cpu", "data.cache_val=false", **keep)
    before = {path: (path.read_bytes(), path.stat()) for path in (image_folder / "val").glob("*/*")}
    try:
        for path, (content, status) in before.items():
            path.write_bytes(b"?" * len(content))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        again = run("evaluate.py", "ckpt=run", "device=cpu", **keep)
        ranks = run("evaluate.py", "ckpt=run", "device=cpu_2p", **keep)
    finally:
        for path, (content, status) in before.items():
            path.write_bytes(content)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert f"cache: 24 of 24 evaluation images in {kept} (0.0 GB)" in again.stdout, again.stderr
    results = [json.loads(done.stdout.splitlines()[-1]) for done in (plain, again, ranks)]
    assert len({(result["top1_hits"], result["top5_hits"], round(result["loss"], 6)) for result in results}) == 1
