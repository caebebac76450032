"""How fast is it, and what do others take for the same work: python -m ghostnet.tools.benchmark ….

  python -m ghostnet.tools.benchmark loader   data.root=/data/imagenet    pictures a second that reach the step
  python -m ghostnet.tools.benchmark step     data.batch_size=32          whole training steps over synthetic data
  python -m ghostnet.tools.benchmark evaluate data.root=/data/imagenet    evaluate.py
  python -m ghostnet.tools.benchmark train    data.root=/data/imagenet    train.py, one epoch
  python -m ghostnet.tools.benchmark start                                train.py to its first step, --help, faults
  python -m ghostnet.tools.benchmark sweep                                what a job of a sweep costs beside its run
  python -m ghostnet.tools.benchmark results                              the leaderboard over a thousand runs
  python -m ghostnet.tools.benchmark checkpoint                           what saves cost the loop, in per cent
  python -m ghostnet.tools.benchmark scale    device=npu_8p               train.py on 1, 2, 4, … devices

Ours and, where they are installed, timm, torchvision, webdataset and SPDL (pip install timm …), each in a process of
its own, one after the other, several rounds in turn. Told are medians with the range of the rounds, how many times as
fast ours is, CPU seconds and the peak of memory of the process and all that it starts. Its words, in any order:

  rounds=3              how often each is measured
  peers=all             or none, or names: peers=timm,torchvision
  json=FILE             writes every number of every round
  report=FILE.html      draws them, on a page that needs nothing else
  seconds=10            loader, step: how long each is measured in a round, after a warm-up
  shards=DIR            loader: ours over these shards of the same pictures (ghostnet.tools.pack), too
  images=N              evaluate, train: about so many of each split, the same number of each class
  ckpt=FILE|RUN         evaluate: whose weights; random ones unless told, whose accuracy says nothing
  timm=FILE             train, start: the train.py of a clone of timm; unless told, what this tool has written like it
  counts=1,2,4          scale: numbers of devices

All others are words of train.py (of evaluate.py for evaluate): data.root=…, data.augment.color_jitter=0, amp=bf16, ….
CPU seconds are the operating system's, of all processes of a subject (loader, step: while it is measured; else of the
whole command). Memory is the most that the process has held, with what its
descendants hold beside it, which is looked at four times a second. Ctrl-C ends it.
"""

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ghostnet.config import Config
from ghostnet.tools import entry
from ghostnet.tools.benchmark import door, report, results
from ghostnet.tools.benchmark.door import Case
from ghostnet.tools.benchmark.peers import absent
from ghostnet.tools.benchmark.subject import Failed, Metrics, Subject, measure

UNITS = dict.fromkeys(("start", "sweep", "results", "checkpoint"), "seconds")
"""Of what is compared; images/s elsewhere."""
ALONE = {"scale", "sweep", "results", "checkpoint"}
"""Benchmarks that measure nobody else."""


def chosen(case: Case, place: Path) -> tuple[list[Subject], dict[str, str]]:
    """What a command measures, and the peers that it leaves out, with the reason."""
    from ghostnet.tools.benchmark import boards, checkpoints, data, loader, peers, programs, step

    own, cfg, name = case.own, case.cfg, case.benchmark
    wanted = [] if name in ALONE else [peer for peer in own.peers if name == "loader" or peer == "timm"]
    left_out = {peer: reason for peer in wanted if (reason := absent(peer))}
    if name == "loader":
        folder = None if data.kind_of(cfg) == "Shards" else data.folder(cfg, None, place / "data")
        there = [peer for peer in wanted if peer not in left_out]
        others, unfit = peers.loaders(cfg, folder, own.seconds, there)
        return loader.subjects(cfg, own.seconds, own.shards, others), left_out | unfit
    if wanted and not left_out and (reason := programs.fits_timm(cfg)):
        left_out["timm"] = reason
    timm = bool(wanted) and not left_out
    make: dict[str, Callable[[], list[Subject]]] = {
        "step": lambda: step.subjects(cfg, own.seconds, timm),
        "evaluate": lambda: programs.evaluate(cfg, case.words, own.ckpt, own.images, timm, place),
        "train": lambda: programs.train(cfg, case.words, own.timm, own.images, timm, place),
        "start": lambda: programs.start(cfg, case.words, own.timm, timm, place),
        "scale": lambda: step.scale(case.words, cfg["data"]["batch_size"], list(own.counts or _counts(cfg))),
        "sweep": lambda: programs.sweep(case.words),
        "results": lambda: boards.results(case.words, place),
        "checkpoint": lambda: checkpoints.subjects(cfg, case.words),
    }
    return make[name](), left_out


def _counts(cfg: Config) -> list[int]:
    """1, 2, 4, … up to the devices that are there."""
    from ghostnet.device import cards, choose, cpu_count

    kind, _ = choose(cfg["device"]["kind"])
    there = cpu_count() if kind == "cpu" else cards(kind)
    return [1 << power for power in range(max(1, there).bit_length())]


def rounds(case: Case, subjects: list[Subject], left_out: dict[str, str], place: Path) -> dict[str, list[Metrics]]:
    """Every subject in turn, so many times -> its metrics of each; a peer that fails is left out from there on."""
    found: dict[str, list[Metrics]] = {}
    for turn in range(case.own.rounds):
        for number, subject in enumerate(subjects):
            if subject.name in left_out or (turn and subject.once):
                continue
            head = f"round {turn + 1} of {case.own.rounds}  {subject.name}"
            tell(f"{head} …", end="\r" if sys.stderr.isatty() else "\n")
            started = time.monotonic()
            try:
                metrics = measure(subject, place / f"{turn}-{number}")
            except Failed as fault:
                if subject.peer is None:
                    raise
                left_out[subject.name] = str(fault).partition(": ")[2]
                found.pop(subject.name, None)
                continue
            found.setdefault(subject.name, []).append(metrics)
            key = next((key for key in ("speed", "seconds") if key in metrics), None)
            said = f"{results.number(metrics[key])} {UNITS.get(case.benchmark, 'images/s')}" if key else "done"
            tell(f"{head}: {said}, took {time.monotonic() - started:.0f} s")
    return found


def tell(text: str, end: str = "\n") -> None:
    """Progress, beside the results; on a terminal the next line replaces one that ends in a return."""
    print(f"{text}\033[K" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


def run(typed: list[str]) -> None:
    """Check, measure, print, write; UserError with one message."""
    from ghostnet.loggers import jsonable

    case = door.check(typed)
    with tempfile.TemporaryDirectory(prefix="benchmark") as name:
        place = Path(name)
        subjects, left_out = chosen(case, place)
        for peer, reason in left_out.items():
            tell(f"left out: {peer}: {reason}")
        measured = rounds(case, subjects, left_out, place)
    command = shlex.join(["python", "-m", "ghostnet.tools.benchmark", *typed])
    head = {"benchmark": case.benchmark, "command": command, "rounds": case.own.rounds}
    head |= {"unit": UNITS.get(case.benchmark, "images/s"), "machine": results.machine(case.cfg["device"]["kind"])}
    result = results.collect(head, subjects, measured, left_out)
    results.show(result)
    if case.own.json:
        case.own.json.write_text(json.dumps(jsonable(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if case.own.report:
        case.own.report.write_text(report.page(result), encoding="utf-8")


def main(typed: list[str]) -> int:
    """The exit code."""
    return entry.ended(run, __doc__, typed, tell)


if __name__ == "__main__":
    entry.start(main, tell)
