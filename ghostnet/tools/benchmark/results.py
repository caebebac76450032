"""What was measured: medians over the rounds, ratios, as a table and as JSON."""

import datetime
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ghostnet.tools.benchmark.subject import GIB, Metrics, Subject

Result = dict[str, Any]
"""As it is written to json=FILE."""


def collect(
    head: Result, subjects: Sequence[Subject], rounds: dict[str, list[Metrics]], left_out: dict[str, str]
) -> Result:
    """head: what is known without measuring. rounds: of each subject, by name; one that has none is left out."""
    found, facts = [], []
    for subject in subjects:
        if not (measured := rounds.get(subject.name)):
            continue
        keys = [key for key in measured[0] if all(isinstance(row.get(key), int | float) for row in measured)]
        medians = {key: statistics.median(row[key] for row in measured) for key in keys}
        row = {"name": subject.name, "peer": subject.peer, "rounds": measured, "median": medians}
        if subject.sentence:
            facts.append(row | {"sentence": subject.sentence(medians)})
        else:
            key = "speed" if "speed" in medians else "seconds"
            row |= {"what": key, "range": [pick(round_[key] for round_ in measured) for pick in (min, max)]}
            found.append(row | {"against": subject.against})
    _compare(found)
    return head | {"subjects": found, "facts": facts, "left_out": left_out}


def _compare(rows: list[Result]) -> None:
    """Give each peer how many times as fast ours is, and each number of devices its efficiency."""
    ours = [row for row in rows if row["peer"] is None]
    for row in rows:
        named = [other for other in ours if other["name"] == row["against"]] or ours[:1]
        if row["peer"] is not None and named:
            own, peer = (r["median"][r["what"]] for r in (named[0], row))
            row["ratio"] = own / peer if row["what"] == "speed" else peer / own
        timm = [other["median"]["speed"] for other in rows if other["peer"] == "timm" and other["what"] == "speed"]
        if row["peer"] is None and row["what"] == "speed" and timm:
            row["over_timm"] = row["median"]["speed"] / max(timm)
        if "save_seconds" in row["median"]:
            row["cost"] = row["median"]["seconds"] / ours[0]["median"]["seconds"] - 1
        if "devices" in row["median"]:
            first = ours[0]["median"]
            share = row["median"]["speed"] / row["median"]["devices"] / (first["speed"] / first["devices"])
            row["efficiency"] = share
        del row["against"]


def number(value: float) -> str:
    """Three figures or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def gib(value: float) -> str:
    """Bytes in GiB."""
    return f"{value / GIB:.2f} GiB"


def speed(row: Result) -> str:
    """The median with its range."""
    low, high = row["range"]
    return f"{number(row['median'][row['what']])} [{number(low)}–{number(high)}]"


def columns(result: Result) -> list[tuple[str, Callable[[Result], str]]]:
    """Heading and cell of each column that this benchmark has something for."""

    def has(key: str) -> bool:
        return any(key in row["median"] for row in result["subjects"])

    def cell(key: str, form: Callable[[float], str]) -> Callable[[Result], str]:
        return lambda row: form(row["median"][key]) if key in row["median"] else "–"

    def share(key: str, form: Callable[[float], str]) -> Callable[[Result], str]:
        return lambda row: form(row[key]) if key in row else "–"

    per = "CPU seconds" if result["unit"] == "seconds" else "CPU s / 1,000 images"
    found = [("subject", lambda row: str(row["name"])), (f"{result['unit']} [range]", speed)]
    found += [("ours is", share("ratio", lambda ratio: f"{ratio:.2f} × as fast"))] if _any(result, "ratio") else []
    found += [("over timm", share("over_timm", lambda ratio: f"{ratio:.2f} ×"))] if _any(result, "over_timm") else []
    found += [("efficiency", share("efficiency", lambda s: f"{100 * s:.0f} %"))] if _any(result, "efficiency") else []
    found += [("saving costs", share("cost", lambda s: f"{100 * s:+.2f} %"))] if _any(result, "cost") else []
    found += [
        ("a save", cell("save_bytes", lambda size: f"{size / 1e6:,.1f} MB")),
        ("written in", cell("save_seconds", lambda s: f"{s:.2f} s")),
        ("of the loop's time", cell("save_held", lambda s: f"{1000 * s:.0f} ms")),
    ][: 3 * has("save_bytes")]
    found += [("of the loop alone", cell("loop", number))] if has("loop") else []
    found += [(per, cell("cpu_seconds", number))] if has("cpu_seconds") else []
    found += [("s to compile", cell("compile_seconds", number))] if has("compile_seconds") else []
    found += [("peak memory", cell("memory", gib))] if has("memory") else []
    found += [("on the card", cell("card_memory", gib))] if has("card_memory") else []
    found += [("Acc@1", cell("top1", lambda v: f"{v:.3f}")), ("loss", cell("loss", lambda v: f"{v:.4f}"))][
        : 2 * has("top1")
    ]
    return found


def _any(result: Result, key: str) -> bool:
    return any(key in row for row in result["subjects"])


def machine(kind: str) -> Result:
    """What it was measured on."""
    import platform

    import torch

    from ghostnet.device import choose, cpu_count, describe, resolve

    chosen, _ = choose(kind)  # type: ignore[arg-type]
    found = {"cpu": describe(torch.device("cpu")).rpartition(",")[0], "cpus": cpu_count()}
    found |= {"device": describe(resolve(chosen)) if chosen != "cpu" else "cpu", "torch": torch.__version__}
    now = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    return found | {"python": platform.python_version(), "date": now}


def lines(result: Result) -> list[str]:
    """What goes below the table."""
    here = result["machine"]
    card = "" if here["device"] == "cpu" else f"{here['device']}, "
    said = [fact["sentence"] for fact in result["facts"]]
    said += [f"left out: {name}: {why}" for name, why in result["left_out"].items()]
    rounds = f"{result['rounds']} round{'s' if result['rounds'] > 1 else ''} in turn"
    what = f"{card}{here['cpu']}, {here['cpus']} CPUs, torch {here['torch']}, {here['date'][:10]}"
    return [*said, f"medians of {rounds}; {what}"]


def show(result: Result) -> None:
    """Print the table and what goes below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=200)
    table = Table(*(heading for heading, _ in columns(result)))
    for row in result["subjects"]:
        table.add_row(*(cell(row) for _, cell in columns(result)))
    if result["subjects"]:
        console.print(table)
    for line in lines(result):
        console.print(line, highlight=False, markup=False)
