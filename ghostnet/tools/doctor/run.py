"""Checks of the run: what it trains, its folder, its login for Weights & Biases."""

from __future__ import annotations  # so that an old Python comes as far as being told so

import os
import shutil

from ghostnet.tools.doctor.finding import FAIL, GIB, OK, WARN, Case, Finding, Findings, fresh_python, installed, needed


def recipe(case: Case) -> Findings:
    """Whether model, weights, optimizer and schedule can be made of this config."""
    from ghostnet.config import build, build_model
    from ghostnet.models.weights import load_weights
    from ghostnet.optim import Timeline, scaled_lr

    cfg = case.cfg
    classes = cfg["model"]["num_classes"] or (len(case.train.classes) if case.train else 1000)
    model = build_model(cfg["model"], classes)
    peak = scaled_lr(cfg["optim"]["lr"], cfg["data"]["batch_size"] * case.ranks * cfg["accumulate"])
    build(cfg["optim"] | {"lr": peak}, list(model.named_parameters()))
    build(cfg["schedule"], Timeline(peak, cfg["epochs"], 100))
    build(cfg["data"]["mix"])
    if cfg["model"]["weights"]:
        load_weights(model, cfg["model"]["weights"])
    case.parameters = sum(parameter.numel() for parameter in model.parameters())
    yield Finding(OK, f"{case.parameters:,} parameters, peak learning rate {peak:.4g}")


def run_folder(case: Case) -> Findings:
    """Whether the run folder can be written and holds its checkpoints, and what the run would go on from."""
    from ghostnet import checkpoint

    folder, resume = case.place().folder.absolute(), case.cfg["resume"]
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        yield Finding(FAIL, f"{place} can't be written", "another folder with hydra.run.dir=…")
        return
    if resume not in (None, "auto"):
        checkpoint.find(resume, checkpoint.LAST)
    # fp32 weights, their average, one moment (SGD) or two.
    copies = 1 + (case.cfg["ema_decay"] > 0) + (1 if "sgd" in case.cfg["optim"]["_target_"] else 2)
    files = 2 + case.cfg["keep"]  # best.pt, and the one that is being written
    need, free = files * 4 * copies * case.parameters, shutil.disk_usage(place).free
    what = f"{free / GIB:,.2f} GiB free in {place}, {need / GIB:,.2f} GiB for {files} checkpoints"
    if free < max(need, GIB):
        yield Finding(needed(free < need), what, "free some space, or another folder with hydra.run.dir=…")
    else:
        yield Finding(OK, what)


def wandb(case: Case) -> Findings:
    """Whether there is a login for Weights & Biases, where it is asked for."""
    from ghostnet.wandb.logger import in_force

    node = case.cfg["logger"]["wandb"]
    mode = in_force(node["mode"]) if node else "disabled"
    login = "import sys, wandb; sys.exit(0 if wandb.login(prompt=False, verify=False) else 'no login')"
    if mode != "disabled" and installed("wandb") is None:
        yield Finding(FAIL, "not installed", "pip install -r requirements.txt, or logger=default")
    elif node and mode == "disabled":
        yield Finding(OK, "records nothing, as asked")
    elif mode == "offline":
        yield Finding(OK, "records offline, as asked")
    elif mode == "online":
        if fault := fresh_python(login, 20, os.environ | {"WANDB_SILENT": "true"}):
            yield Finding(WARN, f"{fault}: it will record offline", "wandb login, or export WANDB_API_KEY=…")
        else:
            yield Finding(OK, "a login is there; whether the server can be reached is not tried")
