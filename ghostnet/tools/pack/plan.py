"""What is packed where: keys, order, and the state of a folder of shards that a repeated command goes on from."""

import collections
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostnet.data.datasets import ImageFolder
from ghostnet.data.shards import STATE, write_whole
from ghostnet.errors import ConfigError, SampleError, UserError
from ghostnet.seeding import fold_in
from ghostnet.tools.pack.pictures import packed
from ghostnet.watchdog import waiting

SPLITS = ("train", "val")
PROBES = 32
"""Images of a split that are packed on trial, to tell how much space all will take."""
GB = 10**9


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards."""

    size: int | None
    quality: int
    shard_mb: int


def keys(names: list[str]) -> list[str]:
    """A key for each '<class>/<file>': that without its ending where it is plain and its own, else one with a digest.

    In a key a dot begins the ending, and many readers want ASCII of at most 100 characters.
    """
    stems = collections.Counter(name.rpartition(".")[0] for name in names)
    return [_key(name, stems[name.rpartition(".")[0]] == 1) for name in names]


def _key(name: str, its_own: bool) -> str:
    stem = name.rpartition(".")[0]
    folder, _, file = stem.partition("/")
    folder, file = (re.sub(r"[^A-Za-z0-9_-]", "_", part)[:40] for part in (folder, file))
    folder = re.sub(r"^_+", "_", folder)  # readers pass over names that begin with two
    if f"{folder}/{file}" == stem and its_own and not re.search(r"-[0-9a-f]{12}$", file):
        return stem
    return f"{folder}/{file}-{hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()}"


def order(split: str, count: int) -> list[int]:
    """The order in which images are packed: those of training shuffled, since other readers read one after another."""
    if split == "val":
        return list(range(count))
    return [int(n) for n in np.random.default_rng(fold_in(0, "pack")).permutation(count)]


def begin(out: Path, sources: dict[str, ImageFolder], settings: Settings) -> dict[str, Any]:
    """The state of the folder, which is made or gone on with; ConfigError where it holds something else."""
    digest = hashlib.blake2b(digest_size=16)
    for split, source in sources.items():
        digest.update("\0".join([split, *source.classes, *source.files, ""]).encode("utf-8", "surrogateescape"))
    root = next(iter(sources.values())).folder.parent.resolve()
    if any(out.resolve().is_relative_to(root / split) for split in SPLITS):
        raise ConfigError(f"out={out} is among the images themselves: give another folder.")
    wanted = {"data.root": str(root), **asdict(settings), "names": digest.hexdigest()}
    path = out / STATE
    try:
        for left_by_killed in out.glob(".*.json.*.tmp"):
            left_by_killed.unlink()
        if path.exists():
            return _same(out, json.loads(path.read_text(encoding="utf-8")), wanted)
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"out={out} holds other files: give a new or an empty folder.")
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} can't be read. Remove {out} to begin anew, or give another out.") from None
    except OSError as error:
        raise ConfigError(f"out={out} can't be made: {error.strerror}. Give another folder.") from None
    state = {"settings": wanted, "done": None}
    save(out, state)
    return state


def _same(out: Path, state: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The state that was found, where it is of these settings and images."""
    then = state["settings"]
    if other := [key for key in wanted if key != "names" and then[key] != wanted[key]]:
        was, now = (", ".join(f"{key}={_show(values[key])}" for key in other) for values in (then, wanted))
        raise ConfigError(
            f"{out} was begun with {was}, not {now}. Repeat its settings to go on with it, or give another out."
        )
    if then["names"] != wanted["names"]:
        raise ConfigError(
            f"{out} was begun with other images: since then some were added to {wanted['data.root']}, removed or "
            "renamed. Undo that to go on, or give another out. (on_error=skip leaves out images that can't be read.)"
        )
    return {"settings": then, "done": state["done"]}


def _show(value: object) -> str:
    return "null" if value is None else str(value)


def save(out: Path, state: dict[str, Any]) -> None:
    """Write the state, whole or not at all."""
    write_whole(out / STATE, (json.dumps(state, indent=1) + "\n").encode())


def check_space(out: Path, sources: dict[str, ImageFolder], settings: Settings, threads: int) -> None:
    """UserError where the disk is clearly too small for what is still to be packed, told by packing a few on trial."""

    def probe(path: Path) -> int:
        try:
            return len(packed(path, settings.size, settings.quality)[0])
        except SampleError:
            return 0

    need = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for source in sources.values():
            chosen = [source.files[n * len(source) // PROBES] for n in range(PROBES)]
            with waiting("images to be read"):
                sizes = [size for size in pool.map(probe, (source.folder / name for name in chosen)) if size]
            # A header, an end that fills its block, and two blocks of label come with each.
            need += len(source) * (sum(sizes) / max(1, len(sizes)) + 1800)
    need -= sum(path.stat().st_size for path in out.glob("*/*.tar"))
    free = shutil.disk_usage(out).free
    if free < 0.9 * need:
        raise UserError(
            f"{out} has {free / GB:,.2f} GB free, but about {need / GB:,.2f} GB are needed. Free some space, "
            "give another out on a larger disk, or a smaller size or quality."
        )
