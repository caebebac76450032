"""Hostile inputs by the thousand, each a function of (kind, seed, number): a program that tests/test_fuzz.py runs.

  python -m tests.fuzzing KIND SEED FIRST COUNT FOLDER

An input must end in a value or in a UserError. The last line tells what became of them. One that takes longer than
SECONDS or crashes native code ends the process; FOLDER/at names it. Memory is limited by the kernel.
"""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import signal
import string
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ghostnet.errors import UserError

SECONDS = 10
MEMORY = 2 << 30
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
Try = Callable[[random.Random], Any]
"""Makes one input, and has it read."""


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut out, put in, repeated, or overwritten by a number at an edge."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not changed:
            break
        at = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 96))
        match rng.randrange(6):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at : at + rng.choice((1, 2, 8, 64, len(changed)))]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
            case 4:
                changed[at:at] = changed[at : at + rng.choice((4, 16, 256))]
            case 5:
                size, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
                number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
                changed[at : at + size] = number.to_bytes(size, order)
    return bytes(changed)


def put(path: Path, content: bytes) -> None:
    """A new file in the place of the last: file systems take their time to cut one short."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# Checkpoints


def checkpoints(folder: Path) -> Try:
    import argparse

    import safetensors.torch
    import torch

    from ghostnet import checkpoint
    from ghostnet.models import weights

    tensors = {"conv_stem.weight": torch.ones(2, 1, 3, 3), "count": torch.tensor(3), "half": torch.ones(4).half()}
    facts = {"config": {"model": {"width": 1.0}, "seed": 1}, "classes": ["a"], "images": 4, "num_classes": 1, "step": 2}
    facts |= {
        "global_batch_size": 4,
        "seconds": 1.5,
        "model": tensors,
        "ema": None,
        "optimizer": {"state": {0: (1, 2)}},
    }
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, **facts}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    legacy = io.BytesIO()
    torch.save({"state_dict": tensors, "args": argparse.Namespace(a=1)}, legacy, _use_new_zipfile_serialization=False)
    seeds = [file.getvalue(), legacy.getvalue(), safetensors.torch.save(tensors)]
    path = folder / "last.pt"

    def zipped(content: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, content if name == pickled else data)
        return out.getvalue()

    def trial(rng: random.Random) -> object:
        match rng.randrange(4):
            case 0:
                content = mutated(rng.choice(seeds), rng)
            case 1:
                content = zipped(mutated(members[pickled], rng))
            case 2:
                content = zipped(soup(rng))
            case _:
                header = mutated(seeds[2][8 : 8 + int.from_bytes(seeds[2][:8], "little")], rng)
                content = struct.pack("<Q", len(header)) + header + seeds[2][-82:]
        put(path, content)
        state = weights.read_file(path)
        if checkpoint.is_own(state):
            checkpoint.check(state, path)
        return weights.read_weights(path)

    return trial


GLOBALS = (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"builtins\nbytearray", b"torch\nTensor")
GLOBALS += (b"_codecs\nencode", b"torch\nSize", b"argparse\nNamespace", b"builtins\nset", b"torch\nFloatStorage")
GLOBALS += (
    b"numpy.core.multiarray\nscalar",
    b"numpy\ndtype",
    b"os\nsystem",
    b"builtins\neval",
    b"collections\nCounter",
)
GLOBALS += (b"torch._utils\n_rebuild_parameter", b"torch._utils\n_rebuild_sparse_tensor", b"torch\nstrided")
GLOBALS += (b"torch._utils\n_rebuild_meta_tensor_no_storage", b"torch._utils\n_rebuild_qtensor", b"torch\nfloat32")


def soup(rng: random.Random) -> bytes:
    """A pickle of calls to what weights may name, with arguments that they are not made for."""
    parts = [b"\x80\x02}("]
    for count in range(rng.randint(1, 8)):
        parts.append(b"K" + bytes([count]))
        call = rng.random() < 0.8
        parts.append(b"c" + rng.choice(GLOBALS) + b"\n(" if call else b"(")
        for _ in range(rng.randint(0, 7)):
            parts.append(argument(rng))
        parts.append(b"t" + (rng.choice((b"R", b"R", b"\x81")) if call else b"") + b"q" + bytes([count]))
        if call and rng.random() < 0.1:
            parts.append(argument(rng) + b"b")
    return b"".join([*parts, b"u."])


def argument(rng: random.Random) -> bytes:
    """The pickle of a value, a reference to an earlier one, or a storage that is there."""
    number = rng.choice((*NUMBERS, -1, 2, 3, 4, 9, 1 << 31, 1 << 34)) * rng.choice((1, 1, 1, -1))
    texts = ("hex", "ascii", "abcd", "rot13", "zlib", "f4", "<f8", "0", "cpu", "meta", "float")
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + rng.choice(b"0123").to_bytes() + b"X\3\0\0\0cpu"
    choices = (
        lambda: pickle.dumps(number, 2)[2:-1],
        lambda: pickle.dumps(rng.choice(texts), 2)[2:-1].replace(b"q\0", b""),
        lambda: b"h" + bytes([rng.randrange(8)]),
        lambda: b"(" + b"".join(argument(rng) for _ in range(rng.randrange(4))) + b"t",
        lambda: b"(" + b"".join(pickle.dumps(rng.choice((0, 1, 2, number)), 2)[2:-1] for _ in range(2)) + b"t",
        lambda: rng.choice((b"N", b"\x88", b"\x89", b"}", b"]", b"G\x7f\xf0\0\0\0\0\0\0")),
        lambda: storage + pickle.dumps(rng.choice((4, 18, 1, number)), 2)[2:-1] + b"tQ",
        lambda: b"c" + rng.choice(GLOBALS) + b"\n",
    )
    return rng.choice(choices)()


# Tar shards and their indices


def shards(folder: Path) -> Try:
    import numpy as np

    from ghostnet.data.shards import Index
    from ghostnet.data.tars import scan

    path, seeds = folder / "0.tar", []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=form) as archive:
            long = "" if form == tarfile.USTAR_FORMAT else "é" * 80
            for name, content in (("a.jpg", b"x" * 700), ("a.cls", b"1"), (f"../{long}b.png", b"y"), ("b.json", b"{}")):
                info = tarfile.TarInfo(name if name != "b.json" else f"../{long}b.json")
                content = b'{"label": 3}' if name == "b.json" else content
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        seeds.append(path.read_bytes()[:6144])
        scan(path)
    index = folder / "index.npz"
    Index(["0.tar"], [6144], scan(path)[0], np.array([1, 3], np.int64)).save(index)
    whole = index.read_bytes()

    def trial(rng: random.Random) -> object:
        if rng.random() < 0.2:
            put(index, mutated(whole, rng))
            with contextlib.suppress(ValueError):  # what the caller tells with the file's name
                return Index.load(index)
            return None
        data = bytearray(mutated(rng.choice(seeds), rng))
        for block in range(0, len(data) - 511, 512):
            if rng.random() < 0.3:
                at, size = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
                data[block + at : block + at + size] = mutated(bytes(data[block + at : block + at + size]), rng)[
                    :size
                ].ljust(size, b"\0")
            if any(data[block : block + 512]) and rng.random() < 0.8:  # or no parser gets behind the checksum
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
        put(path, data)
        rows, labels = scan(path)[:2]
        assert len(rows) == len(labels)
        assert all(0 <= row["offset"] <= len(data) - int(row["length"]) for row in rows)
        return labels

    return trial


# Pictures


def pictures(folder: Path) -> Try:
    import numpy as np
    from PIL import Image

    from ghostnet.data.decode import picture

    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    colour, seeds = Image.fromarray(noise), []
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        *(("RGB", "JPEG", {"quality": 50}), ("RGB", "JPEG", {"progressive": True}), ("L", "JPEG", {})),
        *(("CMYK", "JPEG", {}), ("RGB", "JPEG", {"restart_marker_rows": 1, "subsampling": 0})),
        *(
            ("RGB", "PNG", {}),
            ("P", "PNG", {"transparency": 3}),
            ("1", "PNG", {}),
            ("LA", "PNG", {}),
            ("I;16", "PNG", {}),
        ),
        *(("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True}), ("RGB", "PNG", {"save_all": True, "frames": 2})),
        ("RGB", "WEBP", {"save_all": True, "frames": 2}),
    ]
    for mode, kind, options in kinds:
        file = io.BytesIO()
        if options.pop("frames", 0):
            options["append_images"] = [colour.rotate(180)]
        colour.convert(mode).save(file, kind, **options)
        seeds.append(file.getvalue())

    def trial(rng: random.Random) -> object:
        data = mutated(rng.choice(seeds), rng)
        if data[:4] == b"\x89PNG" and rng.random() < 0.8:
            data = with_checksums(data)
        read = picture(data, "1.jpg")
        width, height = read.size
        left, top = rng.randrange(width), rng.randrange(height)
        box = left, top, rng.randint(left + 1, width), rng.randint(top + 1, height)
        pixels = read.cut(box, rng.choice((None, (8, 8)))) if rng.random() < 0.5 else read.cut()
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] in ((), (3,))
        return pixels.shape

    return trial


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold."""
    mended, start = bytearray(data), 8
    while (end := start + 8 + int.from_bytes(mended[start : start + 4], "big")) + 4 <= len(mended):
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(mended[start + 4 : end]))
        start = end + 4
    return bytes(mended)


# Words of a command


KEYS = (
    "optim.lr",
    "optim",
    "data",
    "data.root",
    "model.width",
    "model",
    "epochs",
    "seed",
    "amp",
    "device.ids",
    "hydra",
)
KEYS += (
    "hydra.run.dir",
    "experiment",
    "sweep",
    "rerun",
    "data.dataset",
    "data.dataset._target_",
    "+x",
    "~optim",
    "++a.b",
)
KEYS += (
    "logger.wandb",
    "data.augment.scale",
    "hydra.job.name",
    "hydra/launcher",
    "local",
    "model@x",
    "data.dataset.root",
)
VALUES = (
    "1",
    "-1",
    "1e999",
    "nan",
    "null",
    "true",
    "[1,2]",
    "{a:1}",
    "a,b",
    "interval(0,1)",
    "range(1,5)",
    "choice(a,b)",
)
VALUES += (
    "sgd",
    "shards",
    "${seed}",
    "${a}",
    "${oc.env:HOME}",
    "${oc.decode:x}",
    "'${'",
    "''",
    "???",
    "ghostnet.optim.sgd",
)
VALUES += (
    "os.system",
    "{_target_:os.system}",
    "../..",
    "é",
    "\0",
    "tag(x, 1)",
    "glob(*)",
    "[[[[",
    "}}",
    "9" * 30,
    "${.a}",
)
VALUES += ("${${seed}}", "1_0", "0x1", "'a\\'b'", "sort(3,1)", "extend_list(1)", "${hydra:job.name}", "cast")


GOOD = ("optim=adamw", "data=samples", "epochs=3", "seed=1,2", "experiment=quickstart", "ckpt=x.pt", "data.root=.")


def word(rng: random.Random) -> str:
    """A word as users mistype it, as nobody would, or a good one."""
    if rng.random() < 0.2:
        return rng.choice(GOOD)
    text = rng.choice(KEYS) + rng.choice(("=", "=", "=", "=", "", "==", ":", "@", " = "))
    text += "".join(rng.choice((*VALUES, *string.punctuation)) for _ in range(rng.choice((1, 1, 1, 2, 3, 6))))
    if rng.random() < 0.3:
        text = mutated(text.encode(), rng).decode("utf-8", "surrogateescape")
    return text * rng.choice((1,) * 60 + (40,))


def words(folder: Path) -> Try:
    """Each by itself: whether it is a word, what it names, what is wrong with it."""
    from ghostnet.door.overrides import _hydra, _well_formed
    from ghostnet.door.words import group_fault, is_choice, parsed

    def trial(rng: random.Random) -> object:
        text = word(rng)
        with opened[0]:
            good, faults = _well_formed("train", [text])
            if not good:
                assert faults
                raise UserError(faults[0])
            return group_fault("train", parsed(text)) if is_choice(parsed(text)) else parsed(text)

    class Kept:
        def __enter__(self) -> None:
            if not self.entered:
                _hydra().__enter__()
                self.entered = True

        def __exit__(self, *_: object) -> None: ...

        entered = False

    opened = [Kept()]
    return trial


def commands(folder: Path) -> Try:
    """Several words through the whole door, with what they name looked for."""
    from ghostnet.door.overrides import examine, refuse
    from ghostnet.door.presence import Presence

    os.chdir(folder)

    def trial(rng: random.Random) -> object:
        name = rng.choice(("train", "train", "train", "evaluate", "pack"))
        look: Any = Presence(trains=True) if name == "train" else lambda *_: []
        checked = examine(name, [word(rng) for _ in range(rng.randint(1, 3))], rng.random() < 0.2, look)
        refuse(checked.faults)
        return checked

    return trial


KINDS: dict[str, Callable[[Path], Try]] = {
    "checkpoints": checkpoints,
    "shards": shards,
    "pictures": pictures,
    "words": words,
    "commands": commands,
}


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """No more memory than there is now and MEMORY; and no file left but the input."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, though it may be within native code
    yield


def main(kind: str, seed: str, first: int, count: int, folder: Path) -> None:
    """Try the inputs; the last line is what became of them, as JSON."""
    trial = KINDS[kind](folder)
    ends = {"values": 0, "refused": 0}
    failures: dict[int, str] = {}
    with limited(), (folder / "at").open("w") as at:
        for number in range(first, first + count):
            os.pwrite(at.fileno(), f"{number}\n".encode(), 0)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                trial(random.Random(f"{kind} {seed} {number}"))
                ends["values"] += 1
            except UserError as error:
                ends["refused"] += 1
                if not str(error).strip():
                    failures[number] = "no message"
            except Exception as error:
                failures[number] = f"{type(error).__name__}: {error}"[:300]
        signal.setitimer(signal.ITIMER_REAL, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps(ends | {"failures": failures, "peak_mib": peak}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
