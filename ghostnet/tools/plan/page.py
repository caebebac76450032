"""The plan as a page, as a table of jobs, and as JSON."""

import textwrap
from typing import Any

from ghostnet.config import Config
from ghostnet.optim import warmup_in_force, warmup_note
from ghostnet.tools.plan import curve
from ghostnet.tools.plan.facts import Facts
from ghostnet.tools.plan.job import Job

GROUPS = ("model", "data", "optim", "schedule", "amp", "device", "logger")
WIDTH = 100
HEAD = 11


def line(name: str, *parts: str) -> list[str]:
    """A name and what there is to say, folded; each part begins a line."""
    lines: list[str] = []
    for part in parts:
        # A path or a command stays whole, so that it can be copied.
        lines += textwrap.wrap(part, WIDTH - HEAD, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{name if number == 0 else '':<{HEAD}}{text}" for number, text in enumerate(lines)]


def duration(seconds: float) -> str:
    """Seconds in words: 3 d 4 h, 2 h 05 min, 12 min 30 s, 45 s."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02.0f} s" if minutes else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def of_job(job: Job, curve_too: bool = True) -> list[str]:
    """All lines of one job."""
    facts, cfg = job.facts, job.cfg
    lines = line("folder", f"{job.folder}{', which is there' if job.there else ''}")
    lines += line("device", facts.device, *([f"not on this machine: {facts.missing}"] if facts.missing else []))
    lines += line("data", f"{facts.train:,} + {facts.val:,} images of {facts.classes:,} classes")
    some = f", {facts.trained:,} of them trained" if facts.trained < facts.params else ""
    lines += line("model", f"{facts.params:,} parameters{some}, {facts.macs / 1e6:,.1f} M multiply-adds an image")
    lines += line("batch", _batch(facts, cfg))
    lines += line("steps", _steps(facts))
    lines += line("rate", *_rate(job))
    lines += [f"{'':<{HEAD}}{row}" for row in curve.text(job.curve)] if curve_too else []
    lines += line("memory", *_memory(facts))
    lines += line("disk", *_disk(job))
    lines += line("time", *_time(job))
    command, unable = job.reference
    lines += line("reference", command or "it has no such command", *(f"– {what}" for what in unable))
    return lines


def _batch(facts: Facts, cfg: Config) -> str:
    parts = [f"{cfg['data']['batch_size']:,} images a device"]
    parts += [f"{facts.ranks} devices"] if facts.ranks > 1 else []
    parts += [f"{cfg['accumulate']} batches a step"] if cfg["accumulate"] > 1 else []
    return f"{facts.global_batch_size:,} images a step" + (f": {' × '.join(parts)}" if len(parts) > 1 else "")


def _steps(facts: Facts) -> str:
    resumed = f"; goes on at step {facts.start:,}, {facts.steps:,} are left" if facts.start else ""
    return f"{facts.total_steps:,}: {facts.epochs} epochs of {facts.steps_per_epoch:,}{resumed}"


def _rate(job: Job) -> list[str]:
    facts, node = job.facts, job.cfg["schedule"]
    name = node["_target_"].rpartition(".")[2]
    words = [f"{name}, peak {facts.peak:.4g}, from {facts.lr(0):.3g} to {facts.lr(facts.total_steps - 1):.3g}"]
    warmup = warmup_in_force(node["warmup_epochs"], job.cfg["epochs"], node["interval"])
    words[0] += f", {warmup:g} epochs of warm-up" if warmup else ""
    note = warmup_note(node, job.cfg["epochs"], facts.peak)
    return [*words, note] if note else words


def _memory(facts: Facts) -> list[str]:
    whose = "a process" if facts.kind in ("cpu", "auto") else "a card"
    has = f" of {size(facts.available)} that there are" if facts.available else ""
    method = (
        "estimated: tensors counted over two small batches, and what runs on a CPU were measured to take beside them"
        if facts.kind in ("cpu", "auto")
        else "estimated: tensors counted over two small batches; without kernels' scratch memory, the allocator's "
        "waste and the driver, and never compared with a card"
    )
    parts = sorted(facts.memory.parts.items(), key=lambda part: -part[1])
    return [
        f"{size(facts.memory.total)} for {whose}{has} ({method})",
        "; ".join(f"{name} {size(count)}" for name, count in parts),
    ]


def _disk(job: Job) -> list[str]:
    facts, cfg = job.facts, job.cfg
    before = f" and {job.kept - 1} before it (keep={cfg['keep']})" if job.kept > 1 else ""
    lines = [
        f"{size((1 + job.kept) * facts.checkpoint)}: best.pt, last.pt{before}, "
        f"{facts.checkpoint:,} bytes each; {size((2 + job.kept) * facts.checkpoint)} while one of them is replaced; "
        f"metrics.jsonl about {size(job.metrics)}; "
        f"{size(job.free)} are free there"
    ]
    if cfg["data"].get("cache_val"):
        cached = facts.val * 3 * cfg["data"]["image_size"] ** 2
        lines.append(f"{size(cached)} in ~/.cache/ghostnet/val: the evaluation images (data.cache_val)")
    return lines


def _time(job: Job) -> list[str]:
    if job.speed is None:
        return [f"{job.images:,} images to train on; fps=N or measure=true tells how long that takes"]
    speed = job.speed
    evaluated = f"{job.facts.evaluations:,} evaluations {duration(job.evaluating)}"
    bound = "" if speed.eval_fps else ", at the speed of training: they are faster than that"
    return [
        f"{duration(job.seconds)}: {job.images:,} images at {speed.fps:,.1f} images/s "
        f"{duration(job.training)}, {evaluated}{bound}; without start, saving and waiting",
        speed.told,
    ]


def config(cfg: Config, choices: dict[str, Any]) -> list[str]:
    """All values, a paragraph a group."""
    lines = []
    own = {key: value for key, value in cfg.items() if key not in GROUPS}
    lines += _paragraph("", own)
    for group in GROUPS:
        lines += _paragraph(f"{group}={choices.get(group)}", cfg[group])
    return lines


def _paragraph(head: str, node: Config) -> list[str]:
    text = ", ".join([*([head] if head else []), *_pairs(node, "")])
    return textwrap.wrap(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _pairs(node: Config, prefix: str) -> list[str]:
    pairs: list[str] = []
    for key, value in node.items():
        if isinstance(value, dict):
            pairs += _pairs(value, f"{prefix}{key}.")
        elif key != "_target_":
            pairs.append(f"{prefix}{key} {shown(value)}")
        elif prefix:
            pairs.append(f"{prefix.rstrip('.')} {value.rpartition('.')[2]}")
    return pairs


def shown(value: Any) -> str:  # noqa: ANN401 (a config's)
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def as_json(job: Job) -> dict[str, Any]:
    """The numbers of a job."""
    facts, speed = job.facts, job.speed
    found: dict[str, Any] = {
        name: getattr(facts, name)
        for name in (
            *("device", "missing", "train", "val", "classes", "params", "trained", "macs", "amp"),
            *("global_batch_size", "steps_per_epoch", "epochs", "total_steps", "start", "evaluations"),
        )
    }
    command, unable = job.reference
    return found | {
        "name": job.name,
        "folder": str(job.folder),
        "world_size": facts.ranks,
        "peak_lr": facts.peak,
        "lr": [[epoch, rate] for epoch, rate in job.curve.sampled(200)],
        "checkpoint_bytes": facts.checkpoint,
        "disk_bytes": job.disk,
        "memory_bytes": facts.memory.total,
        "memory": facts.memory.parts,
        "fps": speed.fps if speed else None,
        "eval_fps": speed.eval_fps if speed else None,
        "seconds": job.seconds if speed else None,
        "reference": command,
        "reference_lacks": unable,
        "config": job.cfg,
    }
