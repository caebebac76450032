"""An image folder becomes tar shards: python -m ghostnet.tools.pack data.root=SRC out=DST [size=256] [quality=90].

Any WebDataset reader opens them (<key>.jpg, <key>.cls: the label), timm by DST/_info.json; train.py data=shards
data.root=DST trains on them. Interrupted, the same command goes on behind the last finished shard. SRC is not changed.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from ghostnet import output, watchdog
from ghostnet.config import Config
from ghostnet.door import manual
from ghostnet.door.overrides import check_command
from ghostnet.door.typed import check_line_ends, without_dashes
from ghostnet.door.words import quoted
from ghostnet.errors import ConfigError, UserError, explain

if TYPE_CHECKING:
    from ghostnet.tools.pack.writer import Part

LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal for a bar."""


class Stopped(BaseException):
    """Ctrl-C, SIGTERM or SIGUSR1; no error, and not to be caught as one."""


def stop(signum: int, frame: FrameType | None) -> NoReturn:
    """End as soon as the images under way are done; a second signal ends at once, which harms nothing either."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_DFL)
    raise Stopped(signum)


def pack(cfg: Config) -> None:
    """Pack both splits, or what is missing of them, and say what came of it."""
    with watchdog.Watch(cfg["stall_timeout"], watchdog.tell):
        _pack(cfg)


def _pack(cfg: Config) -> None:
    from ghostnet.data import decode
    from ghostnet.data.datasets import ImageFolder, check_same_classes
    from ghostnet.data.shards import CLASSES, indexed, write_whole
    from ghostnet.device import cpu_count
    from ghostnet.tools.pack import plan
    from ghostnet.tools.pack.writer import notes, pack_split

    out = Path(cfg["out"]).expanduser()
    settings = plan.Settings(cfg["size"], cfg["quality"], cfg["shard_mb"])
    threads = cfg["workers"] or cpu_count()
    decode.allow(cfg["data"]["max_pixels"])
    where = {key: cfg["data"][key] for key in ("root", "classes")}
    sources = {split: ImageFolder(split, **where) for split in plan.SPLITS}  # type: ignore[arg-type]
    for note in filter(None, (source.note for source in sources.values())):
        print(f"note: {note}", flush=True)
    check_same_classes(sources["train"], sources["val"])
    state = plan.begin(out, sources, settings)
    with locked(out):
        if state["done"] is None:
            plan.check_space(out, sources, settings, threads)
            watchdog.is_ready()
            started, parts = time.monotonic(), {}
            with Progress(sum(map(len, sources.values()))) as progress:
                for split, source in sources.items():
                    order, skip = plan.order(split, len(source)), cfg["on_error"] == "skip"
                    folder = out / split
                    parts[split] = pack_split(source, order, folder, settings, skip, threads, progress.advance)
            write_whole(out / CLASSES, (json.dumps(sources["train"].classes, indent=0) + "\n").encode())
            write_whole(out / "_info.json", (json.dumps(for_timm(parts), indent=1) + "\n").encode())
            state["done"] = summary(sources, parts) | {
                "seconds": round(time.monotonic() - started, 1),
                "new": progress.new,
            }
            plan.save(out, state)
        for split in plan.SPLITS:
            indexed(out, split)  # type: ignore[arg-type]
            for path in (out / split).glob("??????.tar"):
                notes(path).unlink(missing_ok=True)
    report(out, state["done"])


def for_timm(parts: "dict[str, list[Part]]") -> dict[str, Any]:
    """What timm's reader of WebDatasets wants to know: the shards of each split and how many images each holds."""
    splits = {}
    for split, its in parts.items():
        lengths = [len(part.rows) for part in its]
        names = [f"{split}/{number:06}.tar" for number in range(len(its))]
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    return {"splits": splits}


def summary(sources: dict[str, Any], parts: "dict[str, list[Part]]") -> dict[str, Any]:
    """What is told at the end, and kept."""
    every = [part for its in parts.values() for part in its]
    skipped = [str(sources[split].path(n)) for split, its in parts.items() for p in its for n in p.skipped]
    return {
        "images": {split: sum(len(part.rows) for part in its) for split, its in parts.items()},
        "shards": len(every),
        "bytes_before": sum(part.before for part in every),
        "bytes_after": sum(part.size for part in every),
        "skipped": skipped,
    }


def report(out: Path, done: dict[str, Any]) -> None:
    """The last lines: what was left out, what is there, and the command that trains on it."""
    for path in done["skipped"]:
        print(f"left out: {path}")
    skipped = f", {len(done['skipped']):,} left out because they can't be read" if done["skipped"] else ""
    speed = f", {done['new'] / max(done['seconds'], 0.1):,.0f} img/s" if done["new"] else ""
    before, after = done["bytes_before"], done["bytes_after"]
    images = " + ".join(f"{count:,} {split}" for split, count in done["images"].items())
    print(
        f"{out} is complete: {images} images in {done['shards']:,} shards{skipped}{speed}\n"
        f"{before / 1e9:,.3f} GB before, {after / 1e9:,.3f} GB now ({100 * after / max(1, before):.0f} %). "
        "To train on it:\n"
        f"  python train.py data=shards data.root={quoted(out)}",
        flush=True,
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep others from packing into the same folder meanwhile; ConfigError where one does already.

    What is unfinished at the end is removed here, where a signal cannot come between a file and its owner.
    """
    folder = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every network file system locks folders
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another command is packing into {out} just now.") from None
        try:
            yield
        finally:
            for unfinished in out.rglob(".*.tmp"):
                unfinished.unlink(missing_ok=True)
    finally:
        os.close(folder)


class Progress:
    """A bar on a terminal, else a line from time to time: images, images per second, time left."""

    def __init__(self, total: int) -> None:
        from rich import progress

        self.total, self.done, self.new = total, 0, 0
        self.started = self.told = time.monotonic()
        columns = (progress.TextColumn("packing"), progress.BarColumn(), progress.TextColumn("{task.description}"))
        self.bar = progress.Progress(*columns, transient=True, disable=not sys.stdout.isatty())
        self.task = self.bar.add_task("", total=total)

    def advance(self, images: int, new: bool) -> None:
        """So many more are packed; new: by this command."""
        self.done += images
        self.new += images if new else 0
        now = time.monotonic()
        speed = self.new / max(1e-3, now - self.started)
        left = int((self.total - self.done) / speed) if speed else 0
        text = f"{self.done:,}/{self.total:,} images  {speed:,.0f} img/s  "
        text += f"eta {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        self.bar.update(self.task, completed=self.done, description=text)
        if self.bar.disable and now - self.told > LINE_EVERY:
            self.told = now
            print(text, flush=True)

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def main(words: list[str]) -> int:
    """Pack -> exit code: 0 where all is packed, 1 after a message, 128 + the signal that stopped it."""
    if {"-h", "--help"} & set(words):
        print(manual.page("pack", __doc__ or ""))
        return 0
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, stop)
    if hasattr(sys.stdout, "reconfigure"):  # a file name may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_line_ends(words)
        if flags := [word for word in words if word.startswith("-")]:
            hint = without_dashes(flags[0], manual.settings("pack")) or " Settings are given as key=value."
            raise ConfigError(f"{flags[0]}: no such flag.{hint} --help lists them.")
        pack(check_command("pack", words, multirun=False).jobs[0])
        return 0
    except Stopped as signalled:
        signum = int(signalled.args[0])
        print(f"{signal.Signals(signum).name}: stopped. The same command goes on behind the last finished shard.")
        return 128 + signum
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        kept = (
            "" if isinstance(error, UserError) else " What is packed is kept: mend that, and the same command goes on."
        )
        print(f"error: {message}{kept}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    (output.end_with_reader if {"-h", "--help"} & set(sys.argv) else output.outlast)()
    sys.exit(main(sys.argv[1:]))
