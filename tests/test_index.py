"""The index of an image folder against os.walk(), whatever was changed meanwhile and whatever lies in the cache."""

import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ghostnet.data import index
from ghostnet.data.datasets import ImageFolder
from ghostnet.data.index import FileIndex
from tests.conftest import REPOSITORY

NAMES = ["1.png", "10.jpg", "2.JPEG", "a.webp", "é.Jpg", "\uff21.png", "\U0001f600.png", "two\nlines.png", "x y.jpeg"]
NAMES += [
    os.fsdecode(b"\xff.png"),
    os.fsdecode(b"\x80\xe9.jpg"),
    ".hidden.png",
    "notes.txt",
    "png",
    ".png",
    "b.png.tif",
]


FORMATS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def reference(folder):
    """(class, file) of every picture, in order."""
    _, classes, _ = next(os.walk(folder))
    found = []
    for name in sorted(classes):
        _, folders, files = next(os.walk(folder / name))
        images = [file for file in folders + files if Path(file).suffix.lower() in FORMATS]
        found += [(name, file) for file in sorted(images) if not file.startswith(".") and not name.startswith(".")]
    return found


def content(folder):
    """(class, file) of every picture, as the index has them."""
    files = FileIndex(folder)
    classes = np.repeat(np.array(files.classes, object), files.counts)
    assert len(files) == len(classes)
    found = [tuple(files[position].split("/")) for position in range(len(files))]
    assert [name for name, _ in found] == classes.tolist()
    return found


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ghostnet/index"


@pytest.fixture
def folder(tmp_path, cache):
    for name, number in itertools.product(("cat", "dog", "eel"), range(5)):
        write(tmp_path / "data/train" / name / f"{number}.png")
    return tmp_path / "data/train"


@pytest.fixture
def settled(monkeypatch):
    """As if all folders had been left alone for long, on a file system that keeps their times."""
    monkeypatch.setattr(index, "SETTLED", -1e9)
    monkeypatch.setattr(index, "_keeps_times", lambda opened: True)


@pytest.fixture
def listed(monkeypatch):
    """A number for each class folder that was read."""
    calls, listdir = [], os.listdir

    def count(path="."):
        if isinstance(path, int):
            calls.append(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", count)
    return calls


def tick(folder):
    """Wait until a change would get a time that no folder has yet."""
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    probe = folder.parent / "probe"
    while True:
        probe.touch()
        if probe.stat().st_ctime_ns > max(path.stat().st_ctime_ns for path in folders):
            return


# The same as a plain walk


def change(folder, rng):
    """Something that happens to data sets, and keeps what it can of the times."""
    classes = [path for path in folder.iterdir() if path.is_dir()]
    files = [path for one in classes for path in one.iterdir()]
    one, other, file = rng.choice(classes), rng.choice(classes), rng.choice(files or [None])
    fresh = f"{len(list(folder.parent.iterdir()))}-{rng.random()}"
    kind = rng.choice(["add", "add", "remove", "rename", "move", "class", "hide", "swap", "replace", "link", "older"])
    if kind == "add" or file is None:
        write(one / rng.choice(NAMES))
    elif kind == "remove":
        file.unlink()
    elif kind in ("rename", "older"):
        times = file.parent.stat()
        file.replace(file.parent / rng.choice(NAMES))
        if kind == "older":
            os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif kind == "move":
        file.replace(one / file.name)
    elif kind == "class":
        write(folder / rng.choice(["ant", "Bee", "\u00e9", os.fsdecode(b"\xfe")]) / rng.choice(NAMES))
    elif kind == "hide" and len(classes) > 2:
        one.rename(folder / f".{fresh}")
    elif kind == "swap" and one != other:
        one.rename(folder.parent / fresh)
        other.rename(one)
        (folder.parent / fresh).rename(other)
    elif kind == "replace":
        shutil.copytree(one.resolve(), folder.parent / fresh)
        write(folder.parent / fresh / rng.choice(NAMES))
        shutil.copystat(one, folder.parent / fresh)
        one.rename(folder.parent / f"{fresh} old")
        (folder.parent / fresh).rename(one)
    elif kind == "link":
        one.rename(folder.parent / fresh)
        one.symlink_to(rng.choice([folder.parent / fresh, other if other != one else folder.parent / fresh]))


@pytest.mark.parametrize("seed", range(4))
def test_after_any_change_the_index_is_that_of_a_plain_walk_with_and_without_cache(seed, folder, settled, listed):
    rng = random.Random(seed)
    read = []
    for _ in range(60):
        tick(folder)
        change(folder, rng)
        expected = reference(folder)
        listed.clear()
        assert content(folder) == expected
        read.append(len(listed))
        listed.clear()
        assert content(folder) == expected
        assert listed == [], "the cache was not used"
    assert sum(read) < 200, "more was read than what had changed"


def test_the_order_is_that_of_str_not_of_bytes(folder, settled):
    names = sorted(name for name in NAMES if name.lower().endswith(tuple(FORMATS)) and name[0] != ".")
    assert names != sorted(names, key=os.fsencode)
    for name in NAMES:
        write(folder / "ant" / name)
    for _ in range(2):
        assert content(folder)[: len(names)] == [("ant", name) for name in names]


def test_an_image_folder_has_the_paths_and_labels_of_a_plain_walk(folder, settled):
    for _ in range(2):
        dataset = ImageFolder("train", str(folder.parent))
        expected = reference(folder)
        assert [dataset.path(position) for position in range(len(dataset))] == [folder / a / b for a, b in expected]
        assert [dataset.classes[label] for label in dataset.labels] == [name for name, _ in expected]
        assert dataset.labels.dtype == np.int64


def test_the_same_folder_by_another_path_is_in_the_cache(folder, settled, listed, tmp_path, monkeypatch):
    expected = content(folder)
    (tmp_path / "link").symlink_to(folder.parent)
    monkeypatch.chdir(tmp_path)
    listed.clear()
    assert content(tmp_path / "link/train") == content(Path("data/train")) == expected
    assert listed == []


def test_a_folder_that_can_not_be_read_is_named(folder, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*/cat'"):
        FileIndex(folder)


# What the cache does not hold


NOW = 1_000_000_000


@pytest.fixture
def standing(monkeypatch):
    """A file system's clock that stands: what is changed within one of its ticks leaves the same times."""
    fstat = os.fstat

    def standing_fstat(opened):
        status = fstat(opened)
        others = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        times = {"st_ctime": float(NOW), "st_ctime_ns": NOW * 10**9, "st_mtime_ns": NOW * 10**9}
        return SimpleNamespace(**others | times)

    with monkeypatch.context() as patched:
        patched.setattr(index, "_keeps_times", lambda opened: True)
        patched.setattr(os, "fstat", standing_fstat)
        yield lambda age: patched.setattr(index, "time", SimpleNamespace(time=lambda: NOW + age))


@pytest.mark.parametrize(("age", "reads"), [(-5, 3), (0, 3), (1.5, 3), (10, 0)])
def test_a_folder_that_changed_a_moment_before_is_read_again(age, reads, folder, standing, listed):
    standing(age)
    content(folder)
    (folder / "cat/1.png").rename(folder / "cat/9.png")
    standing(100)
    listed.clear()
    seen = content(folder)
    assert len(listed) == reads
    assert (seen == reference(folder)) == bool(reads)


def test_a_folder_in_place_of_another_of_the_same_times_is_read(folder, standing):
    standing(10)
    write(folder / "cat/9.png")
    content(folder)
    (folder / "cat").rename(folder.parent / "cat")
    (folder / "dog").rename(folder / "cat")
    (folder.parent / "cat").rename(folder / "dog")
    assert content(folder) == reference(folder)


def test_folders_made_just_now_are_not_kept(folder, cache, settled, monkeypatch):
    monkeypatch.setattr(index, "SETTLED", 1e9)
    content(folder)
    assert not cache.exists()


@pytest.mark.parametrize("path", ["/proc", "/sys", "/dev/shm", "."])
def test_file_systems_are_told_apart_as_stat_tells_them(path):
    kind = subprocess.run(["stat", "-f", "-c", "%t", path], capture_output=True, text=True, check=True).stdout
    opened = os.open(path, os.O_RDONLY)
    try:
        assert index._keeps_times(opened) == (int(kind, 16) in index.KEEPS_TIMES)
    finally:
        os.close(opened)
    assert path not in ("/proc", "/sys") or int(kind, 16) not in index.KEEPS_TIMES


def test_where_folders_do_not_keep_their_times_nothing_is_kept(folder, cache, settled, listed, monkeypatch):
    monkeypatch.setattr(index, "_keeps_times", lambda opened: False)
    content(folder)
    content(folder)
    assert len(listed) == 6
    assert not cache.exists()


# Whatever lies in the cache


def damaged(whole, rng):
    """The bytes of a cache, changed, cut or grown somewhere."""
    data = bytearray(whole)
    match rng.randrange(4):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        case 3:
            at, other = rng.randrange(len(data)), rng.randrange(len(data))
            data[at : at + 8] = data[other : other + 8][::-1] + b"?"
    return bytes(data)


def test_a_damaged_cache_is_made_anew(folder, cache, settled):
    expected = content(folder)
    (path,) = cache.iterdir()
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        path.write_bytes(damaged(whole, rng))
        assert content(folder) == expected
        assert path.read_bytes() == whole


@pytest.mark.parametrize("what", [b"", b"\n", b"{}\n", bytes(1000), b"\x93NUMPY", "folder", "loop"])
def test_something_else_in_its_place_is_passed_over(what, folder, cache, settled):
    expected = content(folder)
    (path,) = cache.iterdir()
    path.unlink()
    if what == "folder":
        write(path / "file")
    elif what == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(what)
    assert content(folder) == expected
    assert len(list(cache.iterdir())) == 1


def test_the_cache_of_another_folder_is_passed_over(folder, cache, settled, listed):
    content(folder)
    (path,) = cache.iterdir()
    other = shutil.copytree(folder, folder.parent / "val")
    content(other)
    (theirs,) = set(cache.iterdir()) - {path}
    path.replace(theirs)
    listed.clear()
    assert content(other) == reference(other)
    assert len(listed) == 3


@pytest.mark.parametrize(("name", "value"), [("FORMAT", 0), ("EXTENSIONS", (".png", ".xyz"))])
def test_a_cache_of_another_version_is_passed_over(name, value, folder, cache, settled, listed, monkeypatch):
    write(folder / "cat/2.tif")
    with monkeypatch.context() as earlier:
        earlier.setattr(index, name, value)
        content(folder)
    listed.clear()
    assert content(folder) == reference(folder)
    assert len(listed) == 3
    assert len(list(cache.iterdir())) == 1


# Where it can't be kept


@pytest.mark.parametrize("case", ["a file", "below a file", "no home", "full"])
def test_a_cache_that_can_not_be_written_is_done_without(case, folder, cache, settled, tmp_path, monkeypatch):
    if case == "a file":
        write(cache)
    elif case == "below a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file") / "cache"))
    elif case == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "~nobody_of_that_name/cache")
    else:
        fdopen = os.fdopen

        class Full:
            def __init__(self, handle, mode):
                self.file = fdopen(handle, mode)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def writelines(self, lines):
                self.file.write(lines[0])
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fdopen", Full)
    for _ in range(2):
        assert content(folder) == reference(folder)
    assert case != "full" or list(cache.iterdir()) == []


def test_the_cache_holds_the_last_of_many_folders(tmp_path, cache, settled, listed):
    killed = write(cache / ".abc")
    os.utime(killed, (0, 0))
    for number in range(index.KEPT + 4):
        write(tmp_path / f"data{number}/cat/1.png")
        content(tmp_path / f"data{number}")
        for path in cache.iterdir():
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    assert len(list(cache.iterdir())) == index.KEPT
    assert not killed.exists()
    listed.clear()
    content(tmp_path / f"data{index.KEPT + 3}")
    assert listed == []


def test_processes_that_write_at_once_all_have_the_index(folder, cache, settled, listed):
    code = """if True:
        import sys
        from pathlib import Path
        from ghostnet.data import index
        index.SETTLED, index._keeps_times = -1e9, lambda opened: True
        folder, cache, expected = Path(sys.argv[1]), Path(sys.argv[2]), None
        for number in range(60):
            files = index.FileIndex(folder)
            assert expected in (None, files.names)
            expected = files.names
            for path in cache.glob("[!.]*") if number % 2 else ():
                path.unlink(missing_ok=True)
        print(len(files))
    """
    command = [sys.executable, "-c", code, str(folder), str(cache)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["15\n"] * 4
    content(folder)
    assert [path.name[0] == "." for path in cache.iterdir()] == [False]
    listed.clear()
    assert content(folder) == reference(folder)
    assert listed == []
