"""Which class a label means: folders that are numbers, files of names, weights of others, shards of others."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ghostnet import checkpoint
from ghostnet.data.datasets import ImageFolder
from ghostnet.data.shards import Shards
from ghostnet.errors import UserError
from ghostnet.models.ghostnet import GhostNet
from tests.conftest import REPOSITORY, environment
from tests.test_train import result

QUICK = ["device=cpu", "data.image_size=32", "model=ghostnet_050", "model.width=0.1", "epochs=1", "data.batch_size=4"]
QUICK += ["schedule.warmup_epochs=0", "schedule.cooldown_epochs=0"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def jpeg(shade):
    content = io.BytesIO()
    Image.new("RGB", (40, 40), (shade % 256, 90, 90)).save(content, "JPEG")
    return content.getvalue()


def folder(root, counts, splits=("val",)):
    """Class folders with so many images each."""
    for split in splits:
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.jpg").write_bytes(jpeg(number))


def always(path, classes, label):
    """Weights of somebody else that say one class whatever they see."""
    state = GhostNet(classes, 0.1).state_dict()
    state["classifier.weight"].zero_()
    state["classifier.bias"].copy_(torch.eye(classes)[label])
    torch.save({"state_dict": state}, path)


def tool(place, name, *words):
    command = [sys.executable, "-m", f"ghostnet.tools.{name}", *words]
    env = environment() | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=120)


def evaluated(run, *words):
    return run("evaluate.py", "model=ghostnet_050", "model.width=0.1", "data.image_size=32", "device=cpu", *words)


def test_folders_that_are_numbers_are_in_the_order_of_numbers(run, tmp_path):
    folder(tmp_path / "data", {str(number): 10 if number == 2 else 1 for number in range(12)})
    always(tmp_path / "w.pth", 12, 2)
    done = evaluated(run, "ckpt=w.pth", f"data.root={tmp_path / 'data'}")
    assert "Acc@1 47.619" in done.stdout, done.stderr
    assert ImageFolder("val", str(tmp_path / "data")).classes == [str(number) for number in range(12)]
    (tmp_path / "data" / "val" / "x").mkdir()
    (tmp_path / "data" / "val" / "x" / "0.jpg").write_bytes(jpeg(0))
    assert ImageFolder("val", str(tmp_path / "data")).classes[:4] == ["0", "1", "10", "11"]  # as torchvision has them


def test_weights_of_others_on_some_of_their_classes_want_a_file_of_all_names(run, tmp_path):
    folder(tmp_path / "data", {"a": 1, "c": 10, "d": 1})
    always(tmp_path / "w.pth", 4, 2)
    words = ["ckpt=w.pth", "model.num_classes=4", f"data.root={tmp_path / 'data'}"]
    done = evaluated(run, *words)
    assert done.returncode == 1
    assert "data.classes=FILE" in done.stderr
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    done = evaluated(run, *words, "data.classes=names.txt")
    assert "Acc@1 83.333" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a\nb\na\n", "line 3 names a a second time"),
        ("a\n\nb\n", "line 2 is empty"),
        ("", "names no class"),
        ("a\nbb\n", "1 of the 2 classes of the data are not among the 2 of data.classes=.*: b. Did you mean bb"),
        (None, "can't be read"),
    ],
)
def test_what_is_wrong_with_a_file_of_names_is_told(tmp_path, text, what):
    folder(tmp_path, {"a": 1, "b": 1})
    if text is not None:
        (tmp_path / "names").write_text(text)
    with pytest.raises(UserError, match=what):
        ImageFolder("val", str(tmp_path), str(tmp_path / "names"))


def test_a_class_without_validation_images_is_trained_on_and_scored_if_a_file_names_it(run, tmp_path):
    folder(tmp_path / "data", {"a": 8, "b": 8, "c": 8}, ("train",))
    folder(tmp_path / "data", {"a": 4, "b": 0})
    for told in ("1 of 2 class folders in val hold no image, b first", "2 only in train (b, c)"):
        done = run("train.py", *QUICK, f"data.root={tmp_path / 'data'}")
        assert done.returncode == 1
        assert told in done.stderr
        assert "data.classes=FILE" in done.stderr
        (tmp_path / "data" / "val" / "b").is_dir() and (tmp_path / "data" / "val" / "b").rmdir()
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    words = [*QUICK, f"data.root={tmp_path / 'data'}", "data.classes=names.txt", "hydra.run.dir=run"]
    done = run("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "run" / "last.pt")["classes"] == ["a", "b", "c"]
    again = run("evaluate.py", "ckpt=run", "device=cpu")
    assert f"Acc@1 {result(tmp_path / 'run')['top1']:.3f}" in again.stdout


def test_images_in_folders_and_of_all_formats_are_those_of_torchvision_and_the_rest_is_told(run, tmp_path):
    random, data = np.random.default_rng(0), tmp_path / "data"
    for split in ("train", "val"):
        for name in "ab":
            (data / split / name / "more" / "deep").mkdir(parents=True)
            for number, place in enumerate(["0.jpg", "more/1.bmp", "2.tif", "more/deep/3.png", "4.ppm", "5.webp"] * 2):
                path = data / split / name / place.replace(".", f"{number}.")
                Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
            for junk in ("@eaDir/x.jpg", "__MACOSX/._0.jpg", ".ipynb_checkpoints/0.jpg", "._0.jpg", "notes.txt"):
                (data / split / name / junk).parent.mkdir(exist_ok=True)
                (data / split / name / junk).write_bytes(b"")
        (data / split / "@eaDir").mkdir()
    for split in ("train", "val"):
        ours = ImageFolder(split, str(data))
        theirs = torchvision.datasets.ImageFolder(
            str(data / split),
            is_valid_file=lambda path: (
                "/@" not in path and "/_" not in path and "/." not in path and not path.endswith(".txt")
            ),
            allow_empty=True,
        )
        paths = sorted((path, ours.classes[label]) for path, label in zip(ours.files, ours.labels, strict=True))
        expected = [(path, theirs.classes[label]) for path, label in theirs.samples]
        assert paths == sorted((path.removeprefix(f"{data / split}/"), name) for path, name in expected)
        assert len(paths) == 24
        for index in range(24):
            pixels = np.asarray(Image.open(ours.path(index)).convert("RGB"))
            if ours.path(index).suffix != ".jpg" and ours.path(index).suffix != ".webp":
                assert np.array_equal(ours.image(index).cut(), pixels)
    words = [*QUICK, f"data.root={data}"]
    for _ in range(2):  # the second time from the index
        done = run("train.py", *words)
        assert done.returncode == 0, done.stderr
        assert "data    24 + 24 images of 2 classes" in done.stdout
        assert (
            f"note    11 files or folder passed over in {data / 'val'}, hidden or no image by its name: a/"
            in done.stdout
        )


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_no_sample_of_a_shard_is_lost_for_dots_in_its_key(tmp_path):
    members = []
    for number in range(12):
        key = f"v1.{number}" if number % 4 == 1 else f"dir.x/{number}"
        members += [(f"{key}.jpg", jpeg(number)), (f"{key}.cls", str(number % 4).encode())]
        members += [(f"{key}.mask.png", b"no image"), (f"{key}.note", b"")] if number % 2 else []
        members += [(f"._{number}.jpg", b"junk"), (f"__MACOSX/{number}.jpg", b"junk")]
    shard(tmp_path / "val" / "0.tar", members)
    assert Shards("val", str(tmp_path)).labels.tolist() == [number % 4 for number in range(12)]


def test_labels_of_shards_may_be_names_and_lie_in_other_members(tmp_path):
    names = ["tench", "goldfish"]
    members = []
    for number, suffix in enumerate(("cls", "txt", "index", "json")):
        label = names[number % 2] if suffix in ("cls", "txt") else str(number % 2)
        content = f'{{"label": "{names[number % 2]}"}}' if suffix == "json" else label
        members += [(f"{number}.jpg", jpeg(number)), (f"{number}.{suffix}", content.encode())]
    shard(tmp_path / "val" / "0.tar", members)
    with pytest.raises(UserError, match=r"0.cls holds no class index.*'tench'.*data.classes=FILE"):
        Shards("val", str(tmp_path))
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    data = Shards("val", str(tmp_path), str(tmp_path / "names.txt"))
    assert (data.labels.tolist(), data.classes) == ([0, 1, 0, 1], names)
    (tmp_path / "names.txt").write_text("goldfish\ntench\n")
    assert Shards("val", str(tmp_path), str(tmp_path / "names.txt")).labels.tolist() == [1, 0, 0, 0]


def test_evaluation_prepares_other_data_as_the_checkpoints_were_unless_told_otherwise(run, tmp_path):
    folder(tmp_path / "data", {"0": 4, "1": 4}, ("train", "val"))
    members = [
        (f"{n}.{kind}", jpeg(n) if kind == "jpg" else b"%d" % (n % 2)) for n in range(8) for kind in ("jpg", "cls")
    ]
    shard(tmp_path / "shards" / "val" / "0.tar", members)
    words = [*QUICK, f"data.root={tmp_path / 'data'}", "data.preprocessing.crop=1.0", "hydra.run.dir=run"]
    assert run("train.py", *words).returncode == 0
    words = ["evaluate.py", "ckpt=run", "device=cpu", "data=shards", f"data.root={tmp_path / 'shards'}", "--cfg", "job"]
    done = run(*words[:-2])
    assert done.returncode == 0, done.stderr
    from omegaconf import OmegaConf

    import evaluate

    saved = checkpoint.load(tmp_path / "run" / "last.pt")["config"]
    cfg = OmegaConf.create(
        {
            "ckpt": "run",
            "ema": None,
            "device": saved["device"],
            "data": saved["data"]
            | {
                "dataset": {"_target_": "ghostnet.data.shards.Shards", "root": None},
                "image_size": 224,
                "preprocessing": saved["data"]["preprocessing"] | {"crop": 0.875},
            },
        }
    )
    kept = evaluate.with_saved(cfg, saved, ["data=shards"])["data"]
    assert (kept["image_size"], kept["preprocessing"]["image_size"], kept["preprocessing"]["crop"]) == (32, 32, 1.0)
    named = evaluate.with_saved(cfg, saved, ["data.image_size=224", "data=shards"])["data"]
    assert (named["image_size"], named["preprocessing"]["crop"]) == (224, 1.0)


def test_a_whole_number_in_a_shard_is_an_index_even_if_classes_have_numbers_as_names(tmp_path):
    """pack writes indices beside classes.json, and so does every WebDataset with a classes.txt."""
    members = [(f"{n}.{kind}", jpeg(n) if kind == "jpg" else b"%d" % n) for n in range(3) for kind in ("jpg", "cls")]
    shard(tmp_path / "val" / "0.tar", members)
    (tmp_path / "classes.txt").write_text("1\n2\n3\n")
    data = Shards("val", str(tmp_path))
    assert [data.classes[label] for label in data.labels] == ["1", "2", "3"]


def test_shards_that_name_their_classes_are_scored_by_name_among_those_of_a_file(run, tmp_path):
    folder(tmp_path / "data", {"a": 1, "c": 10, "d": 1}, ("train", "val"))
    done = tool(tmp_path, "pack", f"data.root={tmp_path / 'data'}", "out=packed")
    assert done.returncode == 0, done.stderr
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    assert Shards("val", str(tmp_path / "packed"), str(tmp_path / "names.txt")).labels.tolist() == [0, *[2] * 10, 3]
    always(tmp_path / "w.pth", 4, 2)
    words = ["ckpt=w.pth", "data=shards", "data.root=packed", "model.num_classes=4"]
    assert "data.classes=FILE" in evaluated(run, *words).stderr
    assert "Acc@1 83.333" in evaluated(run, *words, "data.classes=names.txt").stdout
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    told = evaluated(run, *words[:-1], "data.classes=names.txt").stderr
    assert "1 of the 3 classes of the data are not among the 3 of data.classes=names.txt: d." in told


def test_labels_that_are_numbers_are_outputs_of_anybodys_weights_though_val_lacks_the_last(run, tmp_path):
    members = [(f"{n}.{kind}", jpeg(n) if kind == "jpg" else b"%d" % n) for n in range(3) for kind in ("jpg", "cls")]
    shard(tmp_path / "data" / "val" / "0.tar", members)
    always(tmp_path / "w.pth", 5, 2)
    words = ["ckpt=w.pth", "data=shards", "data.root=data"]
    assert "model.num_classes=" in evaluated(run, *words).stderr
    assert "Acc@1 33.333" in evaluated(run, *words, "model.num_classes=5").stdout


@pytest.mark.parametrize(
    ("members", "labels", "left"),
    [
        # A part of a sample before it, one behind it; a format that nothing reads; what systems leave.
        (
            ["1.aux.png", "1.cls=0", "1.jpg", "1.mask.png", "2.heic", "2.json=1", "3.jpg", "3.cls=1", "._3.jpg"],
            [0, 1],
            5,
        ),
        (["v1.1.jpg", "v1.1.cls=0", "v1.1.mask.png", "v1.2.cls=1", "v1.2.jpg"], [0, 1], 1),
        (["v1.jpg", "v1.cls=0", "v1.2.jpg", "v1.2.cls=1"], [0, 1], 0),
        (["v1.1.jpg", "v1.1.cls=0", "v1.2.jpg", "v1.3.jpg", "v1.3.cls=1"], "v1.2.jpg has no label", 0),
        (["1.jpg", "1.output.cls=1"], "1.jpg has no label", 0),
        (["1.left.jpg", "1.right.jpg", "1.cls=1"], "1.left.jpg has no label", 0),
    ],
)
def test_members_of_shards_are_read_or_refused_or_counted(tmp_path, members, labels, left):
    named = [member.partition("=") for member in members]
    texts = {name: f'{{"label": {text}}}' if name.endswith("json") else text for name, _, text in named}
    shard(tmp_path / "val" / "0.tar", [(name, text.encode() or jpeg(0)) for name, text in texts.items()])
    shard(tmp_path / "val" / "1.tar", [("z.jpg", jpeg(0)), ("z.cls", b"0")])
    if isinstance(labels, str):
        with pytest.raises(UserError, match=labels):
            Shards("val", str(tmp_path))
        return
    for _ in range(2):  # the second time from the index
        data = Shards("val", str(tmp_path))
        assert data.labels.tolist() == [*labels, 0]
        assert data.note.startswith(f"{left} members of shards" if left else "")
        assert bool(data.note) == bool(left)


def test_what_is_passed_over_is_told_by_evaluation_pack_and_doctor(run, tmp_path):
    folder(tmp_path / "data", {"a": 8, "b": 8}, ("train", "val"))
    (tmp_path / "data" / "val" / "of no class.jpg").write_bytes(jpeg(0))
    (tmp_path / "data" / "val" / "a" / "x.heic").write_bytes(b"x")
    note = f"2 files or folder passed over in {tmp_path / 'data' / 'val'}, hidden or no image by its name: a/x.heic"
    always(tmp_path / "w.pth", 2, 0)
    assert f"note: {note}" in evaluated(run, "ckpt=w.pth", f"data.root={tmp_path / 'data'}").stdout
    root = f"data.root={tmp_path / 'data'}"
    assert f"note: {note}" in tool(tmp_path, "pack", root, "out=packed").stdout
    assert note in " ".join(tool(tmp_path, "doctor", root, *QUICK).stdout.split())


def test_a_folder_that_cant_be_read_is_not_passed_over(tmp_path, monkeypatch):
    folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "val" / "a" / "deep").mkdir()
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="deep"):
        ImageFolder("val", str(tmp_path))


def test_a_class_without_validation_images_is_packed_if_a_file_names_it(run, tmp_path):
    folder(tmp_path / "data", {"a": 8, "b": 8, "c": 8}, ("train",))
    folder(tmp_path / "data", {"a": 4, "c": 4})
    words = ["pack", f"data.root={tmp_path / 'data'}", "out=packed"]
    assert "data.classes=FILE" in tool(tmp_path, *words).stderr
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert tool(tmp_path, *words, "data.classes=names.txt").returncode == 0
    packed = Shards("val", str(tmp_path / "packed"))
    assert (packed.classes, packed.labels.tolist()) == (["a", "b", "c"], [0] * 4 + [2] * 4)
    done = run("train.py", *QUICK, "data=shards", "data.root=packed")
    assert "of 3 classes" in done.stdout, done.stderr


def test_a_missing_file_of_names_is_told_before_anything_starts(run, tmp_path):
    folder(tmp_path / "data", {"a": 8}, ("train", "val"))
    done = run("train.py", *QUICK, f"data.root={tmp_path / 'data'}", "data.classes=nowhere.txt", "hydra.run.dir=run")
    assert "data.classes=nowhere.txt: nowhere.txt is no file." in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_size_that_a_command_names_goes_before_the_checkpoints(run, tmp_path):
    folder(tmp_path / "data", {"a": 4, "b": 4}, ("train", "val"))
    root = f"data.root={tmp_path / 'data'}"
    assert run("train.py", *QUICK, root, "hydra.run.dir=run").returncode == 0
    kept = result_of(run("evaluate.py", "ckpt=run", "device=cpu", "data=imagefolder", root, "data.cache_val=true"))
    assert kept["images"] == 8
    sizes = {path.stat().st_size for path in (tmp_path / "cache" / "ghostnet" / "val").iterdir()}
    assert sizes == {8 * (32 * 32 * 3 + 8)}
    words = ["ckpt=run", "device=cpu", "data=imagefolder", root, "data.cache_val=true", "data.image_size=48"]
    assert result_of(run("evaluate.py", *words))["images"] == 8
    sizes = {path.stat().st_size for path in (tmp_path / "cache" / "ghostnet" / "val").iterdir()}
    assert sizes == {8 * (32 * 32 * 3 + 8), 8 * (48 * 48 * 3 + 8)}


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_that_it_lies_in_is_passed_over(tmp_path, target):
    folder(tmp_path, {"a": 1, "b/more": 1})
    (tmp_path / "val" / "b" / "more" / "link").symlink_to(target)
    data = ImageFolder("val", str(tmp_path))
    assert list(data.files) == ["a/0.jpg", "b/more/0.jpg"]
    assert data.note.endswith("b/more/link")


def test_folders_that_link_to_each_other_end(tmp_path):
    folder(tmp_path, {"a": 1, "b/more": 1})
    (tmp_path / "val" / "a" / "there").symlink_to("../b/more")
    (tmp_path / "val" / "b" / "more" / "back").symlink_to("../../a")
    assert list(ImageFolder("val", str(tmp_path)).files) == [
        *("a/0.jpg", "a/there/0.jpg"),
        *("b/more/0.jpg", "b/more/back/0.jpg"),
    ]


def test_resuming_with_the_classes_in_another_order_asks_for_the_checkpoints(run, tmp_path):
    folder(tmp_path / "data", {"a": 4, "b": 4}, ("train", "val"))
    (tmp_path / "names.txt").write_text("b\na\n")
    words = [*QUICK, f"data.root={tmp_path / 'data'}", "hydra.run.dir=run"]
    assert run("train.py", *words, "data.classes=names.txt").returncode == 0
    for more in ((), ("force=true",)):
        done = run("train.py", *words, "resume=run", "epochs=2", *more)
        assert done.returncode == 1
        assert "the checkpoint's 2 classes are in another order, b, a. Name them in that order" in done.stderr
    done = run("train.py", *words, "resume=run", "epochs=2", "data.classes=names.txt")
    assert done.returncode == 0, done.stderr


def test_other_data_are_read_with_all_options_of_the_checkpoint_that_no_word_names(run, tmp_path):
    folder(tmp_path / "data", {"a": 4, "b": 4}, ("train", "val"))
    root = f"data.root={tmp_path / 'data'}"
    assert run("train.py", *QUICK, root, "data.on_error=skip", "hydra.run.dir=run").returncode == 0
    (tmp_path / "data" / "val" / "a" / "broken.jpg").write_bytes(b"no image")
    words = ["ckpt=run", "device=cpu", "data=imagefolder", root]
    assert result_of(run("evaluate.py", *words))["skipped"] == 1
    assert run("evaluate.py", *words, "data.on_error=raise").returncode == 1


def result_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
