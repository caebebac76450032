"""benchmark step: images a second through training steps over synthetic data; scale: the same on 1 to N devices."""

import json
from pathlib import Path
from typing import Any

from ghostnet.tools.benchmark.child import again, device_of, window
from ghostnet.tools.benchmark.subject import Finished, Metrics, Subject, child, program

WARM_UP = 5
"""Steps."""
STEPS = 24
"""Of a run of `scale`; the first five don't count."""


def subjects(cfg: dict[str, Any], seconds: float, peers: bool) -> list[Subject]:
    """engine.train over synthetic data, and the plain loop that timm's train.py has, over one batch that stays."""
    spec = {"cfg": cfg, "seconds": seconds}
    timm = child("timm", "timm_programs.step", spec, peer="timm")
    return [child("ours", "step.ours", spec), *([timm] if peers else [])]


def ours(spec: dict[str, Any]) -> Metrics:
    """The steps of train.py, on one device, put together as it does."""
    from ghostnet import engine
    from ghostnet.config import build, build_model
    from ghostnet.data.loader import Feeder, TrainLoader
    from ghostnet.device import check_compile, cpu_count, memory_format
    from ghostnet.ema import Ema
    from ghostnet.optim import Timeline, scaled_lr
    from ghostnet.seeding import seed_init
    from ghostnet.signals import StopSignal

    cfg, data = spec["cfg"], spec["cfg"]["data"]
    device, train_set = device_of(cfg), build(data["dataset"], "train")
    preprocessing = build(data["preprocessing"])
    feeder = Feeder(device, data["workers"] or cpu_count(), data["image_size"])
    loader = TrainLoader(train_set, preprocessing, build(data["augment"]), data["batch_size"], cfg["seed"], feeder)
    seed_init(cfg["seed"])
    model = build_model(cfg["model"], cfg["model"]["num_classes"] or len(train_set.classes))
    model = model.to(device, memory_format=memory_format(device))
    images = data["batch_size"] * cfg["accumulate"]
    peak = scaled_lr(cfg["optim"]["lr"], images)
    ema, amp = Ema(model, cfg["ema_decay"]) if cfg["ema_decay"] else None, build(cfg["amp"])
    optimizer = amp.initialize(model, lambda named: build(cfg["optim"] | {"lr": peak}, named), device)
    timeline = Timeline(peak, cfg["epochs"], engine.steps_per_epoch(loader, cfg["accumulate"]))
    recipe = engine.Recipe(
        preprocessing,
        build(data["mix"]),
        build(cfg["schedule"], timeline),
        cfg["seed"],
        cfg["label_smoothing"],
        cfg["clip_grad_norm"],
        cfg["accumulate"],
    )
    state = engine.TrainState(model, optimizer, amp, ema, device)
    compiled = {}
    if backend := cfg["compile"]["backend"]:
        check_compile(device, backend)
        seconds = engine.compile_step(state, recipe, data["batch_size"], data["image_size"], backend)
        compiled = {"compile_seconds": seconds}

    class Epoch:
        def __iter__(self) -> Any:  # noqa: ANN401 (an iterator of steps)
            return engine.train(state, loader, recipe, StopSignal())

    return window(again(Epoch()), images, spec["seconds"], device, WARM_UP) | compiled


def scale(words: list[str], batch_size: int, counts: list[int]) -> list[Subject]:
    """Whole runs of train.py over synthetic data, each device with the same batch."""
    return [_on(count, words, batch_size) for count in counts]


def _on(count: int, words: list[str], batch_size: int) -> Subject:
    images = batch_size * count * STEPS

    def command(folder: Path) -> list[str]:
        own = [
            f"device.count={count}",
            "epochs=1",
            "schedule.warmup_epochs=0",
            "schedule.cooldown_epochs=0",
            f"hydra.run.dir={folder / 'run'}",
        ]
        own += [f"data.dataset.num_train={images}", f"data.dataset.num_val={count}", f"log_every={STEPS // 3}"]
        return program("train.py", *words, *own)

    def read(finished: Finished) -> Metrics:
        result = json.loads(finished.text("run/result.json"))
        metrics = {"speed": result["fps"], "memory": finished.memory, "devices": count}
        if result["device"] != "cpu":
            metrics["card_memory"] = max(result["memory"])
        return metrics | {"cpu_seconds": 1000 * finished.cpu_seconds / images}

    return Subject(f"{count} device{'s' if count > 1 else ''}", command, read)
