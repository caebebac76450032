"""Would this training start here, and be fed? python -m ghostnet.tools.doctor [images=all] [the words of train.py].

One page, a line for each finding, OK, WARN or FAIL with the way out; the exit code is 0 where nothing fails. Nothing is
trained, and no run folder is made. images=N or images=all: how many images are decoded, 200 unless told.
"""

from __future__ import annotations  # so that an old Python comes as far as being told so

import importlib
import importlib.util
import itertools
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace

from ghostnet.tools import entry
from ghostnet.tools.doctor import data, machine, run, software
from ghostnet.tools.doctor.finding import FAIL, OK, WARN, Case, Finding, Findings, first_line

GROUPS = ("experiment", "model", "data", "optim", "schedule", "amp", "device", "logger")
COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red"}
CHECKS: tuple[Callable[[Case], Findings], ...] = (
    *(software.torch, software.torchvision, software.cann, software.autoload, software.apex),
    *(machine.device, machine.environment, machine.ports, machine.cpus, machine.memory),
    *(data.data, data.images, data.loader),
    *(run.recipe, run.run_folder, run.wandb),
)
"""In the order of the page; later ones use what earlier ones found out."""


def examine(words: list[str]) -> Findings:
    """All lines of the page for the words of a command."""
    base = list(told("python", software.python()))
    base += told("packages", software.packages()) if base[0].status == OK else []
    if any(finding.status == FAIL for finding in base):
        yield from base
        return
    from ghostnet.door.manual import settings
    from ghostnet.door.overrides import check_command
    from ghostnet.door.typed import without_dashes
    from ghostnet.errors import ConfigError
    from ghostnet.experiments.folders import settle

    own = [word for word in words if word.startswith("images=")]
    try:
        count = how_many(own[-1].removeprefix("images=") if own else "200")
        if flags := [word for word in words if word.startswith("-")]:
            hint = without_dashes(flags[0], ["images", *settings("train")])
            raise ConfigError(f"{flags[0]}: the doctor takes the words of one job, and no flags.{hint}")
        checked = check_command("train", [word for word in words if word not in own], multirun=False)
    except ConfigError as error:
        yield from (Finding(FAIL, fault, name="config") for fault in str(error).split("\n       "))
        return
    chosen = ((group, checked.hydra.runtime.choices.get(group)) for group in GROUPS)
    yield Finding(OK, ", ".join(f"{group} {option}" for group, option in chosen if option), "", "config")
    yield from base
    case = Case(checked.jobs[0], lambda: settle(checked, words), count)
    try:
        importlib.import_module("torch")
    except Exception as error:
        yield Finding(FAIL, f"can't be imported: {first_line(error)}", "pip install -r requirements.txt", "torch")
        return
    for check in CHECKS:
        yield from told(check.__name__.replace("_", " "), check(case))


def told(name: str, findings: Findings) -> Findings:
    """A check's findings under its name; what it raises is a red line."""
    try:
        for finding in findings:
            yield replace(finding, name=name)
    except Exception as error:
        from ghostnet.errors import explain

        unforeseen = f"{type(error).__name__}: {first_line(error)}"
        way_out = "" if explain(error) else "nobody foresaw this: the message above says what is wrong on this machine"
        yield Finding(FAIL, explain(error) or unforeseen, way_out, name)


def how_many(value: str) -> int | None:
    """The value of images=…, None for all; ConfigError for what is none."""
    from ghostnet.errors import ConfigError

    if value != "all" and not (value.isdecimal() and int(value) > 0):
        raise ConfigError(f"images={value}: must be a whole number > 0, or all.")
    return None if value == "all" else int(value)


def show(finding: Finding) -> None:
    """Print one line, in colour on a terminal."""
    terminal = sys.stdout.isatty()
    width = min(100, shutil.get_terminal_size().columns) if terminal else 100
    head = f"{finding.status:<5} {finding.name:<11} "
    parts = [*finding.what.split("\n"), *([f"→ {finding.way_out}"] if finding.way_out else [])]
    # A path stays whole, so that it can be copied.
    wrapped = [textwrap.wrap(part, width - len(head), break_long_words=False, break_on_hyphens=False) for part in parts]
    text = head + f"\n{' ' * len(head)}".join(itertools.chain.from_iterable(wrapped))
    if not terminal or importlib.util.find_spec("rich") is None:
        print(text, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    coloured = Text(text)
    coloured.stylize(COLOURS[finding.status], 0, len(head) if finding.status == OK else None)
    Console().print(coloured, soft_wrap=True)


def page(words: list[str]) -> int:
    """Print the page -> 0 where training would start, else 1."""
    print(f"Would this start here?  {shlex.join(['python', 'train.py', *words])}\n", flush=True)
    statuses, no_data = [], False
    for finding in examine(words):
        show(finding)
        statuses.append(finding.status)
        no_data |= (finding.name, finding.status) == ("data", WARN)
    fails, warnings = statuses.count(FAIL), statuses.count(WARN)
    answer = (
        f"No, because of {fails} FAIL." if fails else "Once data.root is given, as it seems." if no_data else "Yes."
    )
    print(f"\n{answer}{f' {warnings} WARN beside.' if warnings else ''}")
    return 1 if fails else 0


def main(typed: list[str]) -> int:
    """The exit code."""
    return entry.ended(page, __doc__, typed)


if __name__ == "__main__":
    entry.start(main)
