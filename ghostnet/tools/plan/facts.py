"""What a job would train, on what and how long: the numbers of train.py, by the code that it takes them from."""

import functools
import json
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ghostnet import checkpoint, engine
from ghostnet.amp import O2, Amp, Bf16
from ghostnet.config import Config, build, build_model
from ghostnet.data.datasets import check_same_classes
from ghostnet.data.loader import AHEAD, TrainLoader
from ghostnet.device import images_at_once, peak_memory
from ghostnet.distributed import ALONE, Ranks
from ghostnet.ema import Ema
from ghostnet.errors import ConfigError, UserError
from ghostnet.metrics import mean_meter
from ghostnet.models.ghostnet import GhostNet, freeze_backbone, macs
from ghostnet.optim import Schedule, Timeline, scaled_lr
from ghostnet.tools.plan import machine
from ghostnet.tools.plan.memory import Memory, nbytes, of_evaluation, of_passes

if TYPE_CHECKING:
    from ghostnet.data.datasets import Dataset

CPU = torch.device("cpu")
PASSES = "a batch's passes, with gradients", "evaluation"
OF_PROCESS, OF_TENSORS = 215 << 20, 0.73
"""Bytes of a CPU process, and for each byte of a batch's tensors, that no tensor accounts for: fitted to the peaks of
eight runs of 32 to 224 px, width 0.5 and 1, batch 16 to 128, fp32, bf16 and O2, one and two ranks (torch 2.14.1, glibc,
two cores); with it the estimate was within 3 % of each."""


@dataclass(frozen=True)
class Facts:
    """All that is known of a job before it is started."""

    device: str
    """In words."""
    kind: str
    """cpu, cuda or npu."""
    missing: str | None
    """Why the job could not start on this machine; None where it could."""
    ranks: int
    train: int
    val: int
    """Images."""
    classes: int
    params: int
    trained: int
    macs: int
    amp: str
    global_batch_size: int
    steps_per_epoch: int
    epochs: int
    total_steps: int
    start: int
    """The step that a resumed job goes on from."""
    peak: float
    lr: Schedule
    evaluations: int
    """From here on, each of the weights and, if there is one, of their average."""
    checkpoint: int
    """Bytes."""
    memory: Memory
    available: int | None
    """Bytes that the device has; None where it is not here."""

    @property
    def steps(self) -> int:
        """Left to do."""
        return self.total_steps - self.start


class Survey:
    """Finds the facts of jobs; what several of them share is found once."""

    def __init__(self) -> None:
        self.base = peak_memory(CPU)
        """Of this process with all that training loads: what a training process has before its first tensor."""
        self.splits: dict[str, tuple[Dataset, Dataset]] = {}
        self.models: dict[str, dict[str, Any]] = {}

    def facts(self, cfg: Config, raw: Config, folder: Path) -> Facts:
        """The facts of one job. raw: its config with interpolations. ConfigError, UserError as train.py has them."""
        kind, device, missing = machine.device(cfg)
        train, val = self._splits(cfg)
        ranks, data = Ranks(0, cfg["device"]["count"]), cfg["data"]
        unused: Any = None
        loader = TrainLoader(train, unused, unused, data["batch_size"], cfg["seed"], unused, ranks)
        steps_per_epoch = engine.steps_per_epoch(loader, cfg["accumulate"])
        num_classes = cfg["model"]["num_classes"] or len(train.classes)
        if num_classes < len(train.classes):
            raise ConfigError(f"model.num_classes={num_classes}, but the data have {len(train.classes)} classes.")
        global_batch_size = data["batch_size"] * ranks.world_size * cfg["accumulate"]
        peak = scaled_lr(cfg["optim"]["lr"], global_batch_size)
        schedule = build(cfg["schedule"], Timeline(peak, cfg["epochs"], steps_per_epoch))
        epochs = cfg["epochs"] + cfg["schedule"]["cooldown_epochs"]
        total_steps, start = epochs * steps_per_epoch, _start(cfg, folder)
        if start > total_steps:
            raise ConfigError(f"resume: the run is at step {start:,}, past the {total_steps:,} of {epochs} epochs.")
        build(data["mix"])
        about = {
            "raw": raw,
            "train": train,
            "val": len(val),
            "num_classes": num_classes,
            "global_batch_size": global_batch_size,
        }
        model = self._model(cfg, kind, about, total_steps, epochs)
        return Facts(
            device=device,
            kind=kind,
            missing=missing or model["missing"],
            ranks=ranks.world_size,
            train=len(train),
            val=len(val),
            classes=len(train.classes),
            params=model["params"],
            trained=model["trained"],
            macs=model["macs"],
            amp=model["amp"],
            global_batch_size=global_batch_size,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            total_steps=total_steps,
            start=start,
            peak=peak,
            lr=schedule,
            evaluations=_evaluations(cfg, epochs, start // steps_per_epoch),
            checkpoint=model["checkpoint"],
            memory=self._memory(cfg, kind, model, len(train), len(val)),
            available=None if missing else machine.available(kind),
        )

    def _splits(self, cfg: Config) -> "tuple[Dataset, Dataset]":
        node = cfg["data"]["dataset"]
        name = json.dumps(node, sort_keys=True)
        if name not in self.splits:
            train, val = build(node, "train"), build(node, "val")
            check_same_classes(train, val)
            self.splits[name] = train, val
            self.base = max(self.base, peak_memory(CPU)) if not self.models else self.base
        return self.splits[name]

    def _model(self, cfg: Config, kind: str, about: dict[str, Any], total_steps: int, epochs: int) -> dict[str, Any]:
        """The numbers of the model and of what is kept of it, once for all jobs that have them in common."""
        shared = {key: cfg[key] for key in ("model", "amp", "optim", "ema_decay", "sync_bn", "compile")}
        shared["optim"] = {key: value for key, value in cfg["optim"].items() if key not in ("lr", "weight_decay")}
        data = {key: cfg["data"][key] for key in ("batch_size", "eval_batch_size", "image_size")}
        name = json.dumps([shared, data, kind, cfg["device"]["count"], about["num_classes"], about["val"]])
        if name not in self.models:
            self.models[name] = _examine(cfg, kind, about, total_steps, epochs)
        return self.models[name]

    def _memory(self, cfg: Config, kind: str, model: dict[str, Any], train: int, val: int) -> Memory:
        """The device's: on the CPU the whole process, its host batches among it."""
        data, ranks = cfg["data"], cfg["device"]["count"]
        parts = dict(model["memory"])
        pixels = 3 * data["image_size"] ** 2
        if kind == "cpu":
            per_epoch = [count // ranks for count in (train, val)]
            sizes = [min(data["batch_size"], per_epoch[0]), min(data["eval_batch_size"], per_epoch[1])]
            filled = [min((AHEAD + 2) * size, count) for size, count in zip(sizes, per_epoch, strict=True)]
            tensors = sum(model["memory"][name] for name in PASSES if name in model["memory"])
            parts |= {"kernels and the allocator, as measured": OF_PROCESS + round(OF_TENSORS * tensors)}
            parts |= {"host batches": sum(filled) * pixels, "Python, PyTorch and the data's index": self.base}
        else:
            parts["two batches of pixels"] = 2 * data["batch_size"] * pixels
        return Memory(parts)


def _start(cfg: Config, folder: Path) -> int:
    """The step that the job goes on from: of the checkpoint that train.py would take."""
    resume = "auto" if cfg["sweep"] else cfg["resume"]  # a sweep with a name goes on by itself
    if resume is None:
        return 0
    if resume == "auto":
        found = checkpoint.newest(folder)
        return int(found.state["step"]) if found else 0
    return int(checkpoint.load(checkpoint.find(resume, checkpoint.LAST))["step"])


def _evaluations(cfg: Config, epochs: int, done: int) -> int:
    """How many evaluations there are after `done` epochs; twice as many with an average."""
    due = sum(1 for epoch in range(done + 1, epochs + 1) if epoch % cfg["eval_every"] == 0 or epoch == epochs)
    return due * (2 if cfg["ema_decay"] else 1)


def _examine(cfg: Config, kind: str, about: dict[str, Any], total_steps: int, epochs: int) -> dict[str, Any]:
    """Make the model and all that trains it on this CPU, take a step without gradients, and look at what there is."""
    model = build_model(cfg["model"], about["num_classes"])
    if cfg["model"]["freeze"]:
        if not isinstance(model, GhostNet):
            raise ConfigError(f"model.freeze=true is for GhostNet, not for {type(model).__name__}.")
        freeze_backbone(model)
    model = model.to(memory_format=torch.channels_last)
    found: dict[str, Any] = {
        "params": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "macs": macs(model, cfg["data"]["image_size"]),
        "missing": None,
    }
    ema = Ema(model, cfg["ema_decay"]) if cfg["ema_decay"] else None
    try:
        amp: Amp = build(cfg["amp"])
    except ConfigError:
        raise
    except UserError as fault:  # apex: its O2 is ours, to the byte
        amp, found["missing"] = O2(cfg["amp"]["loss_scale"]), str(fault)
    found["amp"] = cfg["amp"]["_target_"].rpartition(".")[2].lower().replace("amp", "none", 1)
    optimizer = amp.initialize(model, lambda named: build(cfg["optim"] | {"lr": 1.0}, named), CPU)
    for parameter in amp.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = engine.TrainState(
        model, optimizer, amp, ema, CPU, ALONE, cfg["dist_bn"], cfg["on_nan"], total_steps, total_steps
    )
    found["checkpoint"] = checkpoint.size(_content(state, cfg["device"]["count"], about, epochs))

    data = cfg["data"]
    passes = functools.partial(of_passes, model, Bf16() if kind != "cpu" and amp.name == "fp16" else amp)
    parts = {
        "weights, with all that is kept of them": nbytes([amp.weights(model), model.state_dict()]),
        "the optimizer's state": nbytes(optimizer.state_dict()["state"]),
        "their average": nbytes(ema.module.state_dict()) if ema else 0,
    }
    working = passes(data["image_size"], data["batch_size"], kind)
    most = min(data["eval_batch_size"], about["val"])
    at_once = min(most, images_at_once(CPU, data["image_size"] ** 2)) if kind == "cpu" else most
    evaluating = of_evaluation(amp.for_evaluation(model, CPU), amp, data["image_size"], at_once)
    parts[PASSES[working < evaluating]] = max(working, evaluating)
    if cfg["device"]["count"] > 1:
        parts["gradients on their way"] = nbytes([p for p in model.parameters() if p.requires_grad])
    found["memory"] = {name: size for name, size in parts.items() if size}
    return found


def _content(state: engine.TrainState, ranks: int, about: dict[str, Any], epochs: int) -> dict[str, Any]:
    """What train.py saves after the last epoch."""
    number = 1.5
    names = ["loss", "top1", "top5", "fps"]
    row: dict[str, Any] = {"step": state.step, "epoch": epochs, "time": time.time()}
    row |= {f"eval/{name}": number for name in names}
    row |= {f"ema/{name}": number for name in names[:-1]} if state.ema else {}
    state.best = state.last = row | {"best": True}
    state.train_loss, state.speed.totals, state.speed.cold = number, [number] * 4, [number] * 4
    content = state.state_dict()
    if ranks > 1:
        statistics = torch.cat([buffer.flatten() for buffer in state._statistics()])
        own = pickle.dumps({"meter": state.meter.state_dict(), "statistics": statistics})
        content["ranks"] = [pickle.loads(own) for _ in range(ranks)]  # as they come from other processes
        content["meter"] = mean_meter([rank["meter"] for rank in content["ranks"]])
    train = about["train"]
    facts = {"config": about["raw"], "classes": train.classes, "images": len(train)}
    facts |= {"num_classes": about["num_classes"], "seconds": number, "global_batch_size": about["global_batch_size"]}
    return content | facts
