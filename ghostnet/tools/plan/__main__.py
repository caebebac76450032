"""What would this command do? python -m ghostnet.tools.plan [-m] <the words of train.py> [its own words].

One page: the run folder, the config and what in it is not the default, device, data, model, steps, the learning rate,
memory, disk, time, and the reference's command. Nothing is trained, and no folder is made. With -m: the jobs of a sweep
and what they take together. Its own words:

  fps=N                 images per second of training, for the time that the run would take
  measure=true|SECONDS  trains for a minute, or so long, on the device with the data, to know it; leaves nothing behind
  plot=FILE.png         the learning rate over the epochs as a picture
  json=true             all numbers as JSON

Without the data: data=synthetic data.dataset.num_train=1281167 data.dataset.num_val=50000 has ImageNet's counts.
Without the device: everything but its memory in use is told, and that the command would not start here.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ghostnet.config import Config
from ghostnet.door.overrides import Checked
from ghostnet.door.overrides import examine as examine_command
from ghostnet.door.presence import Presence
from ghostnet.errors import ConfigError
from ghostnet.experiments import launch
from ghostnet.experiments.folders import Place
from ghostnet.experiments.grid import plain
from ghostnet.experiments.jobs import say
from ghostnet.experiments.record import is_done
from ghostnet.experiments.rerun import expanded
from ghostnet.tools import entry
from ghostnet.tools.plan import door

if TYPE_CHECKING:
    from ghostnet.tools.plan.curve import Curve
    from ghostnet.tools.plan.job import Job, Speed

SLOWED_BY = ("model", "data", "amp", "device", "accumulate", "ema_decay", "sync_bn", "compile", "clip_grad_norm")
"""What the speed of training depends on, with the kind of optimizer."""


def plan(typed: list[str]) -> None:
    """Check, find out, print; UserError with one message."""
    own, typed_words, flag = door.split(typed)
    words = expanded([plain(word) for word in typed_words], flag)
    checked = examine_command("train", words, flag, Presence(trains=True))
    place = launch.pass_door(checked, None, words, settles=True)
    assert place is not None

    # From here on torch is needed.
    from ghostnet.loggers import jsonable
    from ghostnet.tools.plan import curve, page

    jobs = examine(own, checked, words, place)
    if own.plot:
        curve.draw(curves(jobs), own.plot)
    if own.json:
        found: Any = [jsonable(page.as_json(job)) for job in jobs]
        print(json.dumps(found if checked.multirun else found[0], indent=1, allow_nan=False))
        return
    print(f"What would it do?  {shlex.join(['python', 'train.py', *(['-m'] if flag else []), *typed_words])}\n")
    if checked.multirun:
        show_sweep(jobs, place, checked)
    else:
        show_run(jobs[0], checked, words)
    if own.plot:
        print(f"\n{own.plot} shows the learning rate.")


def examine(own: door.Own, checked: Checked, words: list[str], place: Place) -> "list[Job]":
    """All jobs with their facts and, where it is asked for, their speed."""
    from ghostnet.tools.plan.facts import Survey
    from ghostnet.tools.plan.job import Job
    from ghostnet.tools.plan.sources import composed

    survey, clock, jobs = Survey(), _Clock(own), []
    there = next(path for path in (place.folder.absolute(), *place.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    for cfg, planned in zip(checked.jobs, door.jobs(words, checked), strict=True):
        folder = place.folder / planned.folder
        facts = survey.facts(cfg, composed(planned.words), folder)
        speed = clock.speed(cfg, planned, facts.missing)
        done = bool(cfg["sweep"] and planned.folder) and is_done(folder)
        jobs.append(Job(planned.name, cfg, folder, folder.exists(), done, free, facts, speed))
    return jobs


def curves(jobs: "list[Job]") -> "list[Curve]":
    """The learning rates of all jobs, each once; those of several jobs say of how many."""
    of: dict[object, list[Job]] = {}
    for job in jobs:
        of.setdefault(tuple(job.curve.sampled(200)), []).append(job)
    return [
        replace(same[0].curve, name=same[0].name + (f" and {len(same) - 1} more" if len(same) > 1 else ""))
        for same in of.values()
    ]


class _Clock:
    """The speed of jobs: as it is given, or measured once for all that have it in common."""

    def __init__(self, own: door.Own) -> None:
        self.own = own
        self.measured: dict[str, Speed] = {}

    def speed(self, cfg: Config, planned: door.Planned, missing: str | None) -> "Speed | None":
        """Of one job; ConfigError where it is to be measured on a device that is not here."""
        from ghostnet.tools.plan.job import Speed
        from ghostnet.tools.plan.measure import measure

        if self.own.fps:
            return Speed(self.own.fps, None, "the speed is that of fps=…")
        if not self.own.measure:
            return None
        if missing:
            raise ConfigError(f"measure=…: {missing}")
        key = json.dumps([*(cfg.get(key) for key in SLOWED_BY), cfg["optim"]["_target_"]])
        if key not in self.measured:
            found = measure(planned.words, cfg, self.own.measure, _teller(planned.name))
            tell("")
            what = f"measured over {found.steps:,} steps, {found.seconds:.0f} s"
            what += f"; evaluation {found.eval_fps:,.1f} images/s" if found.eval_fps else "; no evaluation came in it"
            self.measured[key] = Speed(found.fps, found.eval_fps, what)
        return self.measured[key]


def show_run(job: "Job", checked: Checked, words: list[str]) -> None:
    """The page of one run."""
    from ghostnet.tools.plan import page
    from ghostnet.tools.plan.sources import differences

    print("\n".join(page.of_job(job)))
    choices = dict(checked.hydra.runtime.choices)
    changed = differences(job.cfg, choices, words)
    print("\nNot the default:" if changed else "\nAll values are the defaults.")
    table = [(d.key, page.shown(d.value), page.shown(d.default), d.source) for d in changed]
    widths = [max((len(row[column]) for row in table), default=0) for column in range(3)]
    for key, value, default, source in table:
        print(f"  {key:<{widths[0]}}  {value:<{widths[1]}}  was {default:<{widths[2]}}  {source}")
    print("\nThe config:")
    print("\n".join(page.config(job.cfg, choices)))


def show_sweep(jobs: "list[Job]", place: Place, checked: Checked) -> None:
    """The table of a sweep's jobs, and what is left of them takes together."""
    from rich.console import Console
    from rich.table import Column, Table

    from ghostnet.tools.plan import page

    right = ("parameters", "M multiply-adds", "batch", "steps", "peak rate", "memory", "disk", "time")
    numbers = [Column(heading, justify="right") for heading in right]
    table = Table("job", Column("", overflow="fold"), *numbers)
    for number, job in enumerate(jobs):
        facts = job.facts
        state = " (is done)" if job.done else f" (goes on at step {facts.start:,})" if facts.start else ""
        cells = [f"{facts.params:,}", f"{facts.macs / 1e6:,.1f}", f"{facts.global_batch_size:,}"]
        cells += [f"{facts.steps:,}", f"{facts.peak:.4g}", page.size(facts.memory.total), page.size(job.disk)]
        cells += [page.duration(job.seconds) if job.speed else "–"]
        table.add_row(str(number), f"{job.name}{state}", *cells)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    first, trials = jobs[0].facts, checked.hydra.sweeper.get("n_trials")
    there = ", which is there: what is done is not done again" if place.given and place.folder.exists() else ""
    print("\n".join(page.line("folder", f"{place.folder}{there}")))
    print("\n".join(page.line("device", first.device, *([f"not here: {first.missing}"] if first.missing else []))))
    if trials is not None and not all(checked.names):
        print("\n".join(page.line("search", *_of_search(jobs, int(trials)))))
    else:
        print("\n".join(page.line("in all", _in_all([job for job in jobs if not job.done], jobs))))


def _in_all(left: "list[Job]", jobs: "list[Job]") -> str:
    from ghostnet.tools.plan import page

    done = f" ({len(jobs) - len(left)} of {len(jobs)} are done)" if len(left) < len(jobs) else ""
    total = (
        f"{len(left)} jobs{done}, {sum(j.facts.steps for j in left):,} steps, {sum(j.images for j in left):,} images"
    )
    total += f", {page.size(sum(job.disk for job in left))} of disk of {page.size(jobs[0].free)} that are free"
    if all(job.speed for job in left):
        total += f", {page.duration(sum(job.seconds for job in left))} one after the other"
        total += ", without starts, saving and waiting"
    return total


def _of_search(jobs: "list[Job]", trials: int) -> list[str]:
    """Of a search only the corners of its space are known before."""
    from ghostnet.tools.plan import page

    lines = [f"{trials} trials; the table has those at the ends of each range"]
    steps, disk = max(job.facts.steps for job in jobs), max(job.disk for job in jobs)
    text = f"at most {trials * steps:,} steps, {page.size(trials * disk)} of disk"
    if all(job.speed for job in jobs):
        text += f", {page.duration(trials * max(job.seconds for job in jobs))} one after the other"
    return [*lines, text]


def tell(text: str) -> None:
    """What is going on, on a terminal, beside the results; the next text takes its place."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _teller(name: str) -> Callable[[str], None]:
    return lambda text: tell(f"{f'{name}: ' if name else ''}{text}")


def main(typed: list[str]) -> int:
    """The exit code."""
    return entry.ended(plan, __doc__, typed, say)


if __name__ == "__main__":
    entry.start(main, say)
