"""Shards, ours and others': the same samples as other readers see, and every broken one named."""

import io
import json
import os
import random
import struct
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostnet.data import shards
from ghostnet.data.datasets import ImageFolder, check_same_classes
from ghostnet.data.shards import Index, Shards
from ghostnet.data.tars import ROW, scan
from ghostnet.door.overrides import check_command
from ghostnet.errors import SampleError, UserError
from ghostnet.tools.pack.__main__ import pack


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ghostnet/shards"


def jpeg(number, kind="JPEG"):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 100, 200)).save(content, kind)
    return content.getvalue()


def tar(path, members, form=tarfile.USTAR_FORMAT):
    """A tar file of (name, bytes), or of TarInfos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            file.addfile(info, io.BytesIO(member[1]))
    return path


def samples(count, start=0):
    for number in range(start, start + count):
        yield f"{number:05}.jpg", jpeg(number)
        yield f"{number:05}.cls", str(number % 3).encode()


@pytest.fixture
def others(tmp_path):
    """Three shards of four images for training, one for val, by nobody in particular."""
    for number in range(3):
        tar(tmp_path / f"others/train/part-{number}.tar", samples(4, 4 * number))
    tar(tmp_path / "others/val/part-0.tar", samples(6))
    return tmp_path / "others"


@pytest.fixture
def ours(image_folder, tmp_path):
    words = [f"data.root={image_folder}", f"out={tmp_path}/ours", "size=null"]
    pack(check_command("pack", words, multirun=False).jobs[0])
    return tmp_path / "ours"


# Ours


@pytest.mark.parametrize("split", ["train", "val"])
def test_our_shards_are_the_folder_they_were_packed_from(split, ours, image_folder):
    folder, dataset = ImageFolder(split, str(image_folder)), Shards(split, str(ours))
    assert dataset.classes == folder.classes
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == folder.labels.tolist()
    assert len(dataset) == len(folder)
    for number in range(len(folder)):
        if folder.files[number].lower().endswith("jpeg"):
            assert dataset.read(number)[0] == folder.path(number).read_bytes()
        pictures = (np.asarray(each.image(number).cut(), float) for each in (dataset, folder))
        assert np.abs(np.subtract(*pictures)).mean() < 5


def test_an_image_is_called_by_its_shard_and_name(ours):
    shard, offset, length, _ = Shards("val", str(ours)).index.rows[0].item()
    with (ours / "val/000000.tar").open("r+b") as file:
        file.seek(offset + length // 2)
        file.write(b"changed")
    assert shard == 0
    with pytest.raises(SampleError, match=r"^/.*ours/val/000000.tar has changed since it was indexed.* pack it anew"):
        Shards("val", str(ours)).image(0)
    assert Shards("val", str(ours)).read(1)[1].startswith(f"{ours}/val/000000.tar: class0/001")


def test_shards_may_be_copied_elsewhere(ours, tmp_path):
    ours.rename(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*.tar"):
        os.utime(path, (1, 1))
    assert len(Shards("train", str(tmp_path / "elsewhere"))) == 64


@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "a folder"])
def test_a_shard_that_differs_from_the_index_is_told_when_it_is_opened(change, ours):
    path = ours / "train/000000.tar"
    size = path.stat().st_size
    if change in ("missing", "a folder"):
        path.unlink()
        message = "is missing, but the index names it"
    else:
        os.truncate(path, size + (-1 if change == "shorter" else 1))
        message = "bytes, but had .* when packed"
    if change == "a folder":
        path.mkdir()
    with pytest.raises(UserError, match=rf"^{path} .*{message}.*Copy it again, or remove the folder and pack it anew"):
        Shards("train", str(ours))


@pytest.mark.parametrize("change", ["cut short", "can't be read"])
def test_a_shard_that_is_cut_or_lost_during_training_is_a_sample_error(change, ours):
    dataset = Shards("train", str(ours))
    if change == "cut short":
        os.truncate(ours / "train/000000.tar", 5000)
    else:
        (ours / "train/000000.tar").unlink()
    for number in range(len(dataset)):
        try:
            dataset.image(number)
        except SampleError as error:
            assert change in str(error)  # noqa: PT017 (some lie before the cut)
    with pytest.raises(SampleError):
        dataset.image(int(np.argmax(dataset.index.rows["offset"])))


def index_with(path, **changes):
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **arrays)


ROWS = np.zeros(64, ROW)


@pytest.mark.parametrize(
    "case",
    [
        "empty",
        "cut",
        "text",
        "another zip",
        "a pickle",
        "beyond",
        "before",
        "no such shard",
        "a path",
        "labels",
        "counts",
    ],
)
def test_an_index_that_is_none_is_named(case, ours, tmp_path):
    path = ours / "train/index.npz"
    whole = path.read_bytes()
    far, near, other = (np.array([row] * 64, ROW) for row in ((0, 1 << 60, 9, 9), (0, 0, 9, 9), (7, 512, 9, 9)))
    match case:
        case "empty" | "cut" | "text":
            path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no index"}[case])
        case "another zip":
            np.savez(path, x=np.zeros(3))
        case "a pickle":
            index_with(path, shards=np.array([Path("/etc/passwd")], object))
        case "beyond" | "before" | "no such shard":
            index_with(path, rows={"beyond": far, "before": near, "no such shard": other}[case])
        case "a path":
            index_with(path, shards=np.array(["../val/000000.tar"]))
        case "labels":
            index_with(path, labels=np.full(64, -1, np.int32))
        case "counts":
            index_with(path, labels=np.zeros(3, np.int32))
    with pytest.raises(UserError, match=rf"^{path} can't be read: .*pack it anew"):
        Shards("train", str(ours))


def test_damaged_indices_end_in_a_data_set_or_a_user_error(ours):
    path = ours / "val/index.npz"
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 5])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            dataset = Shards("val", str(ours))
            dataset.read(0)
        except (UserError, SampleError):
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("state", ['{"settings": {}, "done": null}', "{}", "[", "3"])
def test_what_is_not_packed_to_the_end_is_not_trained_on(state, ours):
    (ours / "pack.json").write_text(state)
    with pytest.raises(UserError, match=r"is not packed to the end. Repeat the command"):
        Shards("train", str(ours))


def test_the_index_of_imagenet_takes_less_than_40_mb():
    rows = np.zeros(1_281_167, ROW)
    rows["offset"] = 512
    index = Index(["000000.tar"], [1 << 40], rows, np.zeros(len(rows), np.int64))
    assert index.rows.nbytes + index.labels.nbytes < 40e6


# Others'


def labels_of(root, split="train"):
    """Label and red of each image, which is its number."""
    dataset = Shards(split, str(root))
    return [(int(label), int(dataset.image(n).cut()[4, 4, 0])) for n, label in enumerate(dataset.labels)]


EXPECTED = [(number % 3, number) for number in range(12)]


def near(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        assert abs(one[1] - other[1]) < 4


def test_shards_of_others_come_sorted_by_name_and_place(others):
    near(labels_of(others), EXPECTED)
    near(labels_of(others, "val"), EXPECTED[:6])
    train, val = Shards("train", str(others)), Shards("val", str(others))
    assert train.classes == ["0", "1", "2"]
    check_same_classes(train, val)


def test_what_the_webdataset_library_writes_is_read(tmp_path):
    wds = pytest.importorskip("webdataset")
    (tmp_path / "train").mkdir()
    with wds.ShardWriter(str(tmp_path / "train/%04d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(12):
            kind = ("jpg", "png", "webp", "jpeg")[number % 4]
            image = jpeg(number, {"jpg": "JPEG", "jpeg": "JPEG"}.get(kind, kind.upper()))
            writer.write({"__key__": f"some/folder.x/{number:04}", kind: image, "cls": number % 3, "txt": "a caption"})
    near(labels_of(tmp_path), EXPECTED)


@pytest.mark.parametrize("names", ["imagenet1k-{}-0000.tar", "{}_00.tar", "my.{}.tar", "{}00.tar"])
@pytest.mark.parametrize("val", ["val", "validation"])
def test_splits_may_be_told_by_the_names_of_the_shards(names, val, tmp_path):
    tar(tmp_path / names.format("train"), samples(12))
    tar(tmp_path / names.format(val), samples(6))
    tar(tmp_path / "interval-retrain.tar", samples(3))
    near(labels_of(tmp_path), EXPECTED)
    near(labels_of(tmp_path, "val"), EXPECTED[:6])


def test_labels_may_be_in_json_and_classes_in_a_file(tmp_path):
    members = [("a.jpg", jpeg(0)), ("a.json", b'{"label": 1, "x": [2]}'), ("b.json", b'{"label": 9}')]
    members += [("b.cls", b" 0\n"), ("b.jpg", jpeg(1)), ("__meta__/x.json", b"{}"), ("info.json", b"{}")]
    tar(tmp_path / "train/0.tar", members)
    near(labels_of(tmp_path), [(1, 0), (0, 1)])
    (tmp_path / "classes.txt").write_text("cat\nÖzi\n")
    assert Shards("train", str(tmp_path)).classes == ["cat", "Özi"]
    (tmp_path / "classes.json").write_text('["dog", "cow", "third"]')
    assert Shards("train", str(tmp_path)).classes == ["dog", "cow", "third"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a list"),
        ('["a", "a"]', "different class names"),
        ('{"a": 1}', "must be a list"),
        ("[", "classes.json can't be read"),
        ("[" * 100_000, "classes.json can't be read"),
        ('["a"]', "train has the label 2, but there are 1 class names"),
    ],
)
def test_class_names_that_do_not_go_with_the_labels_are_told(text, message, others):
    (others / "classes.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Shards("train", str(others))


ODD = [
    "../../../escape",
    "/tmp/absolute",
    "x" * 300 + "/" + "y" * 200,
    "ü\udcff",
    "a b'\n",
    "CON",
    "./dot/1",
    "dot/1.5",
]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_however_odd_or_long_are_only_names(form, tmp_path):
    members = [(f"{key}.{kind}", data) for key in ODD for kind, data in (("jpg", jpeg(0)), ("cls", b"0"))]
    tar(tmp_path / "data/train/0.tar", members, form)
    before = sorted(tmp_path.rglob("*"))
    assert len(labels_of(tmp_path / "data")) == len(ODD)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and "cache" not in path.parts] == []


def test_shards_are_scanned_once_and_again_when_they_change(others, monkeypatch, cache):
    assert len(Shards("train", str(others))) == 12
    assert len(list(cache.iterdir())) == 1
    real, calls = shards.scan, []
    monkeypatch.setattr(shards, "scan", lambda path, classes: (calls.append(path.name), real(path, classes))[1])
    assert len(Shards("train", str(others))) == 12
    assert not calls
    tar(others / "train/part-1.tar", samples(5, 4))
    assert len(Shards("train", str(others))) == 13
    assert sorted(calls) == ["part-0.tar", "part-1.tar", "part-2.tar"]
    next(cache.iterdir()).write_bytes(b"garbage")
    assert len(Shards("train", str(others))) == 13


def test_without_a_place_for_the_cache_shards_are_read_all_the_same(others, cache):
    cache.parent.parent.write_text("a file where the folder should be")
    near(labels_of(others), EXPECTED)


def test_a_shard_of_others_that_changes_during_training_is_named(others):
    dataset = Shards("train", str(others))
    tar(others / "train/part-1.tar", samples(4, 5))
    with pytest.raises(SampleError, match=rf"^{others}/train/part-1.tar has changed since it was indexed"):
        dataset.image(4)
    dataset.image(0)


# What is no shard


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], "a.jpg has no label beside it"),
        ([("a.cls", b"1")], "a.cls has no image beside it"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1")], "a.jpg has no label beside it"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "a.cls holds no class index, .* but 'cat'"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "holds no class index"),
        ([("a.jpg", b"x"), ("a.cls", b"1" * 5000)], "holds no class index"),
        ([("a.jpg", b"x"), ("a.cls", b"99999999")], "holds no class index"),
        ([("a.jpg", b"x"), ("a.cls", b"")], "holds no class index"),
        ([("a.jpg", b"x"), ("a.json", b'{"caption": "x"}')], "a.json holds no class index"),
        ([("a.jpg", b"x"), ("a.json", b"[" * 100_000)], "a.json holds no class index"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": true}')], "a.json holds no class index"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "a.png is a second image of its key"),
        ([("a.txt", b"x")], "no images in 1 shards for train"),
        ([], "no images in 1 shards for train"),
    ],
)
def test_samples_that_are_none_are_named_with_their_shard(members, message, tmp_path):
    path = tar(tmp_path / "train/0.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        Shards("train", str(tmp_path))
    assert str(caught.value).startswith(
        str(path if members and "none" not in message and "no images" not in message else path.parent)
    )


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_sparse_files_are_refused(kind, tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    tar(tmp_path / "train/0.tar", [info, ("a.cls", b"1")])
    with pytest.raises(UserError, match=r"a.jpg is (a link|stored as a sparse file)"):
        Shards("train", str(tmp_path))


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size < 0 or size >= 8**11:
        block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size & ((1 << 88) - 1)).to_bytes(11, "big")
    else:
        block[124:136] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE]
)
@pytest.mark.parametrize("size", [-512, -1, 1 << 20, 8**11 - 1, 1 << 62, 1 << 80])
def test_absurd_sizes_are_refused(size, kind, tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(header("a.jpg", 512) + bytes(512) + header("b.jpg", size, kind) + bytes(2048))
    with pytest.raises(UserError, match=rf"^{path} is cut short or no tar file: .* claims -?[\d,]+ bytes"):
        scan(path)


def test_a_name_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "0.tar"
    with path.open("wb") as file:
        file.write(header("././@LongLink", 1 << 30, tarfile.GNUTYPE_LONGNAME))
        file.truncate((1 << 30) + 4096)
    with pytest.raises(UserError, match="a name in it claims 1,073,741,824 bytes"):
        scan(path)
    with path.open("wb") as file:
        file.write(header("a.jpg", 2 << 30))
        file.truncate((2 << 30) + 4096)
    with pytest.raises(UserError, match=r"a.jpg claims 2,147,483,648 bytes, which no image has"):
        scan(path)


PAX = [
    b"",
    b"x",
    b"5",
    b"-5 path=x\n",
    b"0 =\n",
    b"99 path=x\n",
    b"2 ",
    b"12 size=-99\n",
    b"99999999999 path=x",
    b"\xb2 a=b\n",
]


@pytest.mark.parametrize("records", PAX)
def test_pax_headers_however_broken_are_read_or_named(records, tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(
        header("x", len(records), tarfile.XHDTYPE)
        + records.ljust(-(-len(records) // 512) * 512, b"\0")
        + header("a.jpg", 0)
        + header("a.cls", 1)
        + b"1".ljust(512, b"\0")
        + bytes(1024)
    )
    if records:
        with pytest.raises(UserError, match=r"a pax header in it can't be read|claims -1 bytes"):
            scan(path)
    else:
        assert scan(path)[1] == [1]


def test_a_chain_of_headers_without_end_is_no_recursion(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes((header("x", 2, tarfile.GNUTYPE_LONGNAME) + b"y".ljust(512, b"\0")) * 20_000)
    with pytest.raises(UserError, match="without a tar's end mark"):
        scan(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_cut_anywhere_is_named(form, tmp_path):
    members = [*samples(3), ("n" * 150 + ".jpg", jpeg(1)), ("n" * 150 + ".cls", b"1")]
    whole = tar(tmp_path / "whole.tar", members, form).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "0.tar"
    for length in [*range(0, end, 512), *range(1, end, 777), end]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"^{path} is cut short or no tar file|{path}: .* has no label"):
            scan(path)
    path.write_bytes(whole[: end + 512])
    assert scan(path)[1] == [0, 1, 2, 1]


@pytest.mark.timeout(60)
def test_damaged_shards_end_in_samples_or_a_user_error(others):
    path = others / "train/part-0.tar"
    whole, rng, refused = path.read_bytes()[:9000], random.Random(0), 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            at = rng.randrange(len(data))
            data[at] = rng.randrange(256)
            block = at // 512 * 512
            if rng.random() < 0.7:  # a header whose checksum is right all the same
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
        path.write_bytes(data)
        try:
            dataset = Shards("train", str(others))
            for number in range(len(dataset)):
                dataset.image(number)
        except UserError as error:
            assert "/" in str(error)  # noqa: PT017 (some end well)
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
def test_compressed_shards_are_refused_with_the_way_out(name, tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / name, "w:gz") as file:
        file.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(UserError, match=rf"train/{name} is compressed, .* Unpack it to a plain .tar"):
        Shards("train", str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"x", b"<html>404</html>" * 100, struct.pack("<400I", *range(400))])
def test_what_is_no_tar_is_named(content, tmp_path):
    (tmp_path / "train").mkdir()
    path = tmp_path / "train/0.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} is cut short or no tar file"):
        Shards("train", str(tmp_path))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (None, "data.root is not set: give the folder .* ghostnet.tools.pack"),
        ("absent", "data.root=.*absent does not exist"),
        ("file", "data.root=.*file is not a folder"),
        ("empty", r"holds no shards for train: looked for train/\*.tar and \*train\*.tar.*ghostnet.tools.pack"),
        ("pipe", "holds no shards for train"),
    ],
)
def test_a_root_without_shards_is_told(case, message, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipe/train").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe/train/0.tar")
    (tmp_path / "pipe/train/1.tar").mkdir()
    with pytest.raises(UserError, match=message):
        Shards("train", case and str(tmp_path / case))


def test_an_image_folder_that_is_one_of_shards_says_so(ours):
    with pytest.raises(UserError, match=r"no images in train.* It has tar shards: data=shards reads those"):
        ImageFolder("train", str(ours))


# Threads


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_many_threads_read_from_more_shards_than_may_be_open(tmp_path, monkeypatch):
    for number in range(40):
        tar(tmp_path / f"train/{number:02}.tar", samples(3, 3 * number))
    monkeypatch.setattr(shards.resource, "getrlimit", lambda which: (32, 32))
    dataset = Shards("train", str(tmp_path))
    expected = [(number % 3, number) for number in range(120)]
    before, most, lock = open_files(), [0], threading.Lock()

    def look(number):
        found = int(dataset.labels[number]), int(dataset.image(number).cut()[4, 4, 0])
        with lock:
            most[0] = max(most[0], open_files() - before)
        return number, found

    with ThreadPoolExecutor(8) as pool:
        for number, found in pool.map(look, random.Random(0).choices(range(120), k=2000)):
            near([found], [expected[number]])
    assert most[0] <= 16 + 8 + 1
    dataset.open.cache_clear()
    assert open_files() <= before


def test_json_index_for_timm_names_every_shard(ours):
    info = json.loads((ours / "_info.json").read_text())
    for split, count in (("train", 64), ("val", 24)):
        assert info["splits"][split]["num_samples"] == sum(info["splits"][split]["shard_lengths"]) == count
        assert all((ours / name).is_file() for name in info["splits"][split]["filenames"])
