"""Packing: what other libraries read, what an interrupted command leaves, what is refused."""

import fcntl
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from ghostnet.data.datasets import ImageFolder
from ghostnet.data.decode import Pixels, picture
from ghostnet.data.shards import Shards
from ghostnet.door.overrides import check_command
from ghostnet.errors import ConfigError, UserError
from ghostnet.tools.pack import plan
from ghostnet.tools.pack.__main__ import pack
from ghostnet.tools.pack.pictures import packed
from ghostnet.tools.pack.writer import Shard
from tests.conftest import REPOSITORY, environment

SPLITS = ("train", "val")


def pack_here(source, out, *words):
    words = [f"data.root='{source}'", f"out='{out}'", "size=null", "shard_mb=1", *words]
    pack(check_command("pack", words, multirun=False).jobs[0])
    return out


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """120 + 30 JPEGs that together fill some shards of 1 MiB, in three classes."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("val", 30)):
        for number in range(count):
            path = root / split / f"class{number % 3}" / f"{split}_{number:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (200, 300, 3), np.uint8)
            Image.fromarray(pixels).save(path, quality=92)
    return root


@pytest.fixture(scope="module")
def whole(noise, tmp_path_factory):
    """The same packed without an interruption."""
    return pack_here(noise, tmp_path_factory.mktemp("whole") / "out", "size=150")


def contents(out):
    """Every file of a folder of shards but the state, which tells of the time it took."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "pack.json"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(source, out, *words):
    return [sys.executable, "-m", "ghostnet.tools.pack", f"data.root='{source}'", f"out='{out}'", *words]


def run_pack(source, out, *words, **options):
    options = {"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command(source, out, *words), **options)


# What others read


def test_the_webdataset_library_reads_the_same_bytes_and_labels(noise, whole):
    wds = pytest.importorskip("webdataset")
    for split in SPLITS:
        ours, theirs = Shards(split, str(whole)), {}
        for path in sorted((whole / split).glob("*.tar")):
            with path.open("rb") as file:
                samples = wds.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
                for sample in wds.tariterators.group_by_keys(samples):
                    theirs[sample["__key__"]] = sample["jpg"], int(sample["cls"])
        folder = ImageFolder(split, str(noise))
        assert len(theirs) == len(ours) == len(folder)
        for number, name in enumerate(folder.files):
            data, label = theirs[name.removesuffix(".jpg")]
            assert data == ours.read(number)[0]
            assert label == ours.labels[number] == folder.labels[number]


def test_a_webdataset_pipeline_reads_every_image_once(whole):
    wds = pytest.importorskip("webdataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shards = [str(path) for path in sorted((whole / "train").glob("*.tar"))]
        dataset = wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
        labels = [label for image, label in dataset if image.size == (225, 150)]
    assert sorted(labels) == sorted([0, 1, 2] * 40)


def test_timm_reads_every_image_once_with_its_label(whole):
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = create_dataset("wds/own", root=str(whole), split="val", is_training=False, batch_size=1)
        labels = [label for image, label in dataset]
    assert len(dataset) == 30
    assert labels == Shards("val", str(whole)).labels.tolist()


def test_training_images_are_packed_shuffled_and_read_in_the_folders_order(noise, whole):
    folder, shards = ImageFolder("train", str(noise)), Shards("train", str(whole))
    assert shards.classes == folder.classes
    assert shards.labels.tolist() == folder.labels.tolist()
    places = [tuple(row)[:2] for row in shards.index.rows.tolist()]
    assert places != sorted(places)
    in_file_order = [shards.labels[number] for number in sorted(range(120), key=places.__getitem__)]
    assert len(set(in_file_order[:15])) == 3
    assert len(list((whole / "train").glob("*.tar"))) > 2
    assert max(path.stat().st_size for path in whole.rglob("*.tar")) <= 1 << 20


@pytest.mark.slow
def test_training_on_shards_gives_the_bits_of_training_on_the_folder(noise, run, tmp_path):
    pack_here(noise, tmp_path / "shards")
    rows = {}
    for data, root in (("imagefolder", noise), ("shards", tmp_path / "shards")):
        words = [
            "model.width=0.1",
            "epochs=1",
            "schedule.warmup_epochs=1",
            "data.batch_size=16",
            "data.image_size=32",
            "device=cpu",
        ]
        words += ["device=cpu", "schedule.cooldown_epochs=0", "log_every=1", f"hydra.run.dir={data}"]
        done = run("train.py", f"data={data}", f"data.root={root}", *words)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / data / "metrics.jsonl").read_text().splitlines()
        rows[data] = [{k: v for k, v in json.loads(line).items() if k.endswith(("loss", "top1"))} for line in lines]
    assert len(rows["shards"]) > 2
    assert rows["shards"] == rows["imagefolder"]


# Pictures


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)).resize((400, 300))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [None, 300, 1000])
def test_a_jpeg_that_needs_no_shrinking_stays_byte_for_byte(mode, size, tmp_path):
    path = save(tmp_path / "a.jpg", PICTURE.convert(mode), progressive=True, exif=b"Exif\0\0broken")
    assert packed(path, size, 50) == (path.read_bytes(), path.stat().st_size)


@pytest.mark.parametrize(
    ("name", "mode", "kept"),
    [
        *(("a.jpg", "CMYK", "RGB"), ("a.png", "RGB", "RGB"), ("a.png", "RGBA", "RGB"), ("a.png", "P", "RGB")),
        *(("a.webp", "RGB", "RGB"), ("a.png", "I;16", "RGB"), ("a.png", "L", "L"), ("a.png", "1", "RGB")),
    ],
)
@pytest.mark.parametrize("size", [None, 150])
def test_what_is_no_plain_jpeg_becomes_one_of_the_same_look(name, mode, kept, size, tmp_path):
    image = PICTURE
    if mode == "I;16":
        image = Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
    path = save(tmp_path / name, image if mode == "I;16" else image.convert(mode))
    data, before = packed(path, size, 95)
    assert before == path.stat().st_size
    with Image.open(io.BytesIO(data)) as result:
        assert (result.format, result.mode, min(result.size)) == ("JPEG", kept, size or 300)
        pictures = (result, Image.fromarray(picture(path.read_bytes(), path).cut()))
        pixels = (
            np.asarray(picture.convert("L").resize((40, 30), Image.Resampling.BOX), float) for picture in pictures
        )
        assert np.abs(np.subtract(*pixels)).mean() < 4


@pytest.mark.parametrize(
    ("size", "expected"), [((500, 375), (341, 256)), ((375, 500), (256, 341)), ((900, 300), (768, 256))]
)
def test_the_shorter_side_is_shrunk_as_the_evaluation_does(size, expected, tmp_path):
    from ghostnet.data.transforms import Preprocessing

    path = save(tmp_path / "a.png", PICTURE.resize(size))
    with Image.open(io.BytesIO(packed(path, 256, 100)[0])) as result:
        assert result.size == expected
        preprocessing = Preprocessing(224, 0.875, [0.5] * 3, [0.5] * 3, "bicubic")
        difference = preprocessing(Pixels(np.array(result))).astype(int)
        difference -= preprocessing(Pixels(np.array(PICTURE.resize(size))))
    assert np.abs(difference).mean() < 3


def test_keys_are_unique_plain_and_the_names_of_the_files_where_those_are_plain():
    names = [
        "n01/n01_1.JPEG",
        "n02/n01_1.JPEG",
        "a/1.jpg",
        "a/1.png",
        "a/1.b.jpg",
        "a/1_b.jpg",
        "a.b/1.jpg",
        "__x__/1.jpg",
    ]
    names += [
        f"a/{'long' * 60}.jpg",
        f"{'long' * 60}/1.jpg",
        "a/Ω.jpg",
        "a/Ψ.jpg",
        "a/\udcff.jpg",
        "a/ .jpg",
        "a/b-0123456789ab.jpg",
    ]
    keys = plan.keys(names)
    assert keys[:2] == ["n01/n01_1", "n02/n01_1"]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert key.isascii()
        assert "." not in key
        assert len(key) <= 96
        assert not key.startswith("__")
    assert plan.keys(names[::-1]) == keys[::-1]


def test_odd_names_are_packed_and_read_by_webdataset_too(tmp_path):
    wds = pytest.importorskip("webdataset")
    names = ["a.b/1.jpg", "__x__/1.jpg", "c/1.jpg", "c/1.jpeg", "c/a.b.jpg", "c/ ü'\n.jpg", "c/" + "n" * 200 + ".jpg"]
    paths = [os.fsencode(name) for name in names] + [b"c/\xff\xfe.jpg"]
    for split in SPLITS:
        for number, path in enumerate(paths):
            full = tmp_path / "odd" / split / os.fsdecode(path)
            save(full, Image.new("L", (20, 20), 10 * number), format="JPEG")
    out = pack_here(tmp_path / "odd", tmp_path / "out")
    folder, shards = ImageFolder("train", str(tmp_path / "odd")), Shards("train", str(out))
    assert shards.classes == folder.classes == ["__x__", "a.b", "c"]
    for number in range(len(paths)):
        assert shards.read(number)[0] == folder.path(number).read_bytes()
    with (out / "train/000000.tar").open("rb") as file:
        samples = wds.tariterators.tar_file_expander([{"url": "", "stream": file}])
        assert len(list(wds.tariterators.group_by_keys(samples))) == len(paths)


# Interruptions


def forked(work):
    """Run it in a child process -> exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_a_command_killed_at_any_flush_and_repeated_gives_the_same_bytes(noise, whole, tmp_path):
    real = os.fsync
    for last in range(1, 100):
        out, calls = tmp_path / str(last), []

        def killed(file, last=last, calls=calls):
            calls.append(file)
            if len(calls) == last:
                os._exit(9)
            real(file)

        def work(out=out, killed=killed):
            os.fsync = killed
            pack_here(noise, out, "size=150")

        code = forked(work)
        if code == 0:
            break
        assert code == 9
        pack_here(noise, out, "size=150")
        assert contents(out) == contents(whole)
        shutil.rmtree(out)
    assert last > 20


MOMENTS = ["pack.json", "train/.000000.tar.tmp", "train/000001.tar", "val/000000.tar"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_and_its_repetition_gives_the_same_bytes(signum, moment, noise, whole, tmp_path):
    out = tmp_path / "out"
    words = ["size=150", "shard_mb=1", "workers=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(noise, out, *words), cwd=REPOSITORY, env=environment(), **pipes)
    try:
        while not (out / moment).exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signum)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in errors
    if signum != signal.SIGKILL and process.returncode:  # it may have come to its end in the meantime
        assert process.returncode == 128 + signum
        assert "stopped. The same command goes on" in printed
        assert not list(out.rglob("*.tmp"))
    pack_here(noise, out, *words)
    assert contents(out) == contents(whole)


def test_a_signal_between_a_file_and_its_owner_leaves_nothing_unfinished(noise, tmp_path, monkeypatch):
    opened, real = [], Shard.__init__

    def stopped_behind_the_second(self, folder, number):
        real(self, folder, number)
        opened.append(self.temporary)
        if len(opened) == 2:
            self.file.close()
            raise KeyboardInterrupt

    monkeypatch.setattr(Shard, "__init__", stopped_behind_the_second)
    with pytest.raises(KeyboardInterrupt):
        pack_here(noise, tmp_path / "out", "size=150")
    assert len(opened) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_shard_that_is_damaged_meanwhile_is_written_again(noise, whole, tmp_path):
    out = tmp_path / "out"
    real = plan.save

    def stop_before_the_end(folder, state):
        if state["done"]:
            raise KeyboardInterrupt
        real(folder, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "save", stop_before_the_end)
        with pytest.raises(KeyboardInterrupt):
            pack_here(noise, out, "size=150")
    with pytest.raises(UserError, match="is not packed to the end"):
        Shards("train", str(out))
    os.truncate(out / "train/000001.tar", 5000)
    (out / "val/.000000.tar.npz").write_bytes(b"garbage")
    (out / "train/.000009.tar.tmp").write_bytes(b"left")
    pack_here(noise, out, "size=150")
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("limit", [100_000, 700_000])
def test_a_full_disk_ends_in_one_message_and_the_command_goes_on_later(limit, noise, whole, tmp_path):
    def cap():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    out = tmp_path / "out"
    done = run_pack(noise, out, "size=150", "shard_mb=1", preexec_fn=cap)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large. What is packed is kept" in done.stderr
    assert not list(out.rglob("*.tmp"))
    pack_here(noise, out, "size=150")
    assert contents(out) == contents(whole)


def test_too_little_space_is_told_before_a_shard_is_begun(noise, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"out has 0.00 GB free, but about 0\.0\d GB are needed"):
        pack_here(noise, tmp_path / "out")
    assert not list(tmp_path.rglob("*.tar"))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    pack_here(noise, tmp_path / "out")


def test_a_finished_folder_is_left_alone(noise, whole):
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    done = run_pack(noise, whole, "size=150", "shard_mb=1")
    assert done.returncode == 0
    assert "is complete: 120 train + 30 val images in " in done.stdout
    assert f"python train.py data=shards data.root={whole}" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times


# What is refused


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images in both splits; one of train is broken."""
    for split in SPLITS:
        for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
            save(tmp_path / "folder" / split / name, PICTURE)
    path = tmp_path / "folder/train/cat/2.png"
    path.write_bytes(path.read_bytes()[:500])
    return tmp_path / "folder"


def test_a_broken_image_stops_it_with_its_path_and_is_left_out_where_asked(folder, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"train/cat/2.png can't be decoded.* on_error=skip leaves such images out"):
        pack_here(folder, out)
    pack_here(folder, out, "on_error=skip")
    printed = capsys.readouterr().out
    assert f"left out: {folder}/train/cat/2.png" in printed
    assert "3 train + 4 val images in 2 shards, 1 left out" in printed
    shards = Shards("train", str(out))
    assert (len(shards), shards.labels.tolist()) == (3, [0, 1, 1])
    pack_here(folder, out)
    assert capsys.readouterr().out == printed


def test_a_broken_image_whose_name_is_no_text_is_named_too(folder, tmp_path):
    (folder / "train/cat/2.png").rename(folder / "train/cat" / os.fsdecode(b"\xff.png"))
    done = run_pack(folder, tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "\\udcff.png can't be decoded" in done.stderr
    done = run_pack(folder, tmp_path / "out", "on_error=skip")
    assert (done.returncode, done.stderr) == (0, "")
    assert "left out: " in done.stdout
    assert "\\udcff.png" in done.stdout


def test_a_split_without_a_readable_image_is_told(folder, tmp_path):
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"None of the 4 images in .*train can be read"):
        pack_here(folder, tmp_path / "out", "on_error=skip")


def test_a_disk_that_is_gone_does_not_count_as_broken_images(noise, tmp_path, monkeypatch):
    from ghostnet.tools.pack import writer

    def gone(path, size, quality):
        raise writer.SampleError(f"{path} can't be read: Stale file handle.")

    monkeypatch.setattr(writer, "packed", gone)
    monkeypatch.setattr(writer, "HOPELESS", 10)
    with pytest.raises(UserError, match=r"10 images in a row can't be read, .* Stale file handle"):
        pack_here(noise, tmp_path / "out", "on_error=skip")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=100"], r"was begun with size=150, not size=100. Repeat its settings"),
        (["size=150", "quality=80", "shard_mb=2"], r"begun with quality=90, shard_mb=1, not quality=80, shard_mb=2"),
        (["size=null"], r"not size=null"),
    ],
)
def test_other_settings_than_those_begun_with_are_refused(words, message, noise, whole):
    before = contents(whole)
    with pytest.raises(ConfigError, match=message):
        pack_here(noise, whole, *words)
    assert contents(whole) == before


def test_another_source_or_a_changed_one_is_refused(noise, whole, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"begun with data.root=.*noise.*, not data.root=.*folder"):
        pack_here(folder, whole, "size=150")
    pack_here(folder, tmp_path / "out", "on_error=skip")
    (folder / "val/cat/1.png").rename(folder / "val/cat/3.png")
    with pytest.raises(ConfigError, match="was begun with other images"):
        pack_here(folder, tmp_path / "out", "on_error=skip")


@pytest.mark.parametrize("case", ["among the images", "other files", "a file", "garbage", "another state"])
def test_a_place_that_can_not_be_packed_into_is_refused(case, folder, tmp_path):
    out, message = tmp_path / "out", "holds other files"
    if case == "among the images":
        out, message = folder / "train/new", "is among the images themselves"
    elif case == "a file":
        out.write_text("")
        message = "can't be made: File exists"
    else:
        out.mkdir()
        texts = {"other files": ("mine", ""), "garbage": ("pack.json", "{"), "another state": ("pack.json", "[1]")}
        (out / texts[case][0]).write_text(texts[case][1])
        message = message if case == "other files" else r"pack\.json can't be read"
    with pytest.raises(ConfigError, match=message):
        pack_here(folder, out)


def test_two_commands_do_not_pack_into_one_folder(noise, whole):
    held = os.open(whole, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another command is packing into"):
            pack_here(noise, whole, "size=150")
    finally:
        os.close(held)


def test_a_shard_that_was_lost_after_the_end_is_told(folder, tmp_path):
    out = pack_here(folder, tmp_path / "out", "on_error=skip")
    (out / "val/000000.tar").unlink()
    with pytest.raises(
        UserError, match=r"val/000000.tar is missing, but the index names it.* remove the folder and pack"
    ):
        pack_here(folder, out, "on_error=skip")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.root=a", "out: must be given, out=…"),
        ("out=a", "data.root: must be given, data.root=…"),
        ("data.root=a out=b sise=3", "sise: no such key. Did you mean size?"),
        ("data.root=a out=b quality=101", "quality=101: must be a whole number in [1, 100]"),
        ("data.root=a out=b size=0", "size=0: must be a whole number >= 1 or null"),
        ("data.root=a out=b on_error=ignore", "on_error=ignore: must be one of raise, skip"),
        ("data.root=a out=b data.batch_size=3", "data.batch_size: no such key. data has: root"),
        ("data.root=a out=b size=1,2", "size=1,2: several values."),
        ("data.root=a out=b -m", "-m: no such flag"),
        ("imagenet out=b", "did you mean data.root=imagenet?"),
        ("data.root=a out=b", "data.root=a does not exist"),
    ],
)
def test_a_faulty_command_is_told_and_leaves_nothing_behind(words, message, tmp_path):
    env = environment() | {"PYTHONPATH": str(REPOSITORY)}
    line = [sys.executable, "-m", "ghostnet.tools.pack", *words.split()]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_explains_every_key(tmp_path):
    done = run_pack("a", "b", "--help")
    assert done.returncode == 0
    for key in ("data.root=SRC", "out=", "size=256", "quality=90", "shard_mb=256", "on_error=raise", "workers=null"):
        assert key in done.stdout


def test_random_sizes_of_shards_hold_all_images_in_the_same_order(noise, tmp_path):
    whole = pack_here(noise, tmp_path / "large", "shard_mb=64")
    assert len(list(whole.rglob("*.tar"))) == 2
    small = pack_here(noise, tmp_path / "small")
    for split in SPLITS:
        one, many = Shards(split, str(whole)), Shards(split, str(small))
        for number in random.Random(0).sample(range(len(one)), 10):
            assert one.read(number)[0] == many.read(number)[0]
