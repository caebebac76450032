"""Evaluate a checkpoint: Acc@1, Acc@5, loss, images per second.

  python evaluate.py ckpt=FILE|RUN_FOLDER [data.root=…]    model, data, precision of the checkpoint, if it is ours
  python evaluate.py ckpt=outputs/…/best.pt device=npu_8p  over all ranks, the same numbers
  python evaluate.py ckpt=wandb://entity/project/artifact:best    a checkpoint that lies at Weights & Biases
  python evaluate.py ckpt=ghostnet.pth data.root=/data/imagenet   anybody's GhostNet; model=ghostnet_130 for 1.3x
  python evaluate.py … --cfg job                           the whole config of a command, nothing run

--hydra-help tells of Hydra's own flags and settings.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until launch.enter(): no traceback of a Ctrl-C among the imports

import json
from typing import TYPE_CHECKING, Any

import ghostnet.installed  # noqa: F401  # isort: skip
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghostnet.config import Config, build, build_model, check, resolved, unresolved
from ghostnet.door.overrides import given_keys
from ghostnet.door.words import first_line
from ghostnet.errors import ConfigError, UserError, explain
from ghostnet.experiments import jobs, launch
from ghostnet.wandb.artifact import located

if TYPE_CHECKING:
    from ghostnet.distributed import Ranks


NAME_ALL = "Name all classes in a file, one a line in the order of the model's outputs: data.classes=FILE"

OF_THE_DATA = {"root", "classes", "dataset", "cache_val"}
"""What data=NAME replaces of a checkpoint's data; its other options hold unless a word names them."""


def run(job: tuple[Config, list[str]], ranks: "Ranks") -> dict[str, Any]:
    """One evaluation, in flow order: checkpoint, device, data, model, counts. -> What the last line prints.

    job: the command's config, resolved but for what the checkpoint gives, and its overrides. Every rank runs it.
    """
    import torch

    from ghostnet import checkpoint, engine
    from ghostnet.data import decode
    from ghostnet.data.cache import open_cache
    from ghostnet.data.datasets import among
    from ghostnet.data.loader import EvalLoader, Feeder
    from ghostnet.device import cpu_count, memory_format
    from ghostnet.distributed import settle
    from ghostnet.loggers import evaluation_bar
    from ghostnet.models.weights import choose_weights, fit, read_file
    from ghostnet.signals import StopSignal

    # Checkpoint
    cfg, overrides = OmegaConf.create(job[0]), job[1]
    path = checkpoint.find(cfg.ckpt, checkpoint.BEST)
    saved = read_file(path)
    own = checkpoint.is_own(saved)
    if own:
        checkpoint.check(saved, path)
    config = with_saved(cfg, saved["config"], overrides) if own else resolved(cfg)

    # Device, data
    asked = config["device"]
    ranks, device, words = settle(ranks, asked["kind"], asked["ids"], asked.get("allow_hf32"))
    amp = build(config["amp"])
    amp.check(device)
    data = config["data"]
    with ranks.main_first():
        val_set = build(data["dataset"], "val")
    decode.allow(data.get("max_pixels", decode.MAX_PIXELS))
    if ranks.is_main and (note := getattr(val_set, "note", "")):
        print(f"note: {note}", flush=True)
    feeder = Feeder(device, data["workers"] or cpu_count(), data["image_size"])
    preprocessing, skip = build(data["preprocessing"]), data.get("on_error") == "skip"
    cache = open_cache(val_set, preprocessing, ranks) if data.get("cache_val") else None
    loader = EvalLoader(val_set, preprocessing, data["eval_batch_size"], feeder, ranks, skip, cache)

    # Model
    num_classes = config["model"]["num_classes"] or (saved["num_classes"] if own else len(val_set.classes))
    if own:
        val_set.labels = among(val_set.labels, val_set.classes, saved["classes"], str(path), NAME_ALL)
    elif num_classes < len(val_set.classes):
        raise UserError(f"{path} tells {num_classes} classes apart, but the data have {len(val_set.classes)}.")
    elif num_classes > len(val_set.classes) and not getattr(val_set, "numbered", False):
        raise UserError(
            f"{path} tells {num_classes} classes apart, and the data have {len(val_set.classes)} of them: which can't "
            f"be known by their positions. {NAME_ALL}"
        )
    model = build_model(config["model"], num_classes)
    use_ema = own and saved["ema"] is not None and config["ema"] is not False
    if config["ema"] and not use_ema:
        raise ConfigError(f"ema=true, but {path} holds no moving average.")
    weights, which = (saved["ema" if use_ema else "model"], "") if own else choose_weights(saved, path)
    if messages := fit(model, weights, path):
        more = " and model.num_classes=, if labels are numbers of its outputs" if hasattr(val_set, "numbered") else ""
        raise UserError(
            f"{'; '.join(messages)}: an untrained classifier can't be evaluated. The data must have as many classes. "
            f"{NAME_ALL}{more}"
        )
    model = amp.for_evaluation(model.to(device, memory_format=memory_format(device)), device)
    if ranks.is_main:
        print(
            f"{path}{', moving average' if use_ema else ''}{which and f', {which}'}, {len(val_set):,} images, {words}",
            flush=True,
        )

    # Counts
    with evaluation_bar(sum(map(len, loader.indices)), quiet=not ranks.is_main) as advance:
        result = engine.evaluate(model, amp, loader, StopSignal(ranks), advance)
    feeder.close()
    if cache and ranks.is_main:
        print(f"cache: {cache}", flush=True)
    skipped = [fault for faults in ranks.gather(loader.skipped.news()) for fault in faults]
    for fault in skipped if ranks.is_main else ():
        print(f"skipped: {fault}", flush=True)
    return {
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "fps": result.fps,
        "top1_hits": result.top1_hits,
        "top5_hits": result.top5_hits,
        "images": result.count,
        "skipped": len(skipped),
        "ckpt": str(path),
        "step": saved["step"] if own else None,
        "ema": use_ema,
        "amp": amp.name,
        "device": device.type,
        "world_size": ranks.world_size,
        "torch": torch.__version__,
    }


def with_saved(cfg: DictConfig, saved: dict[str, Any], overrides: list[str]) -> Config:
    """The config of the command, with the checkpoint's model, data and precision where the command names none."""
    try:
        merged = OmegaConf.create(saved)
        OmegaConf.set_struct(merged, False)
        for key in ("device", "ema", "ckpt"):
            merged[key] = cfg[key]
        for key in sorted(given_keys(overrides), key=lambda key: key.count(".")):
            # A group that was chosen replaces the checkpoint's, a single key changes one value of it.
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key), merge=False)
            if key == "data":  # other images, which are read and prepared as the model was trained to see them
                for kept in (saved["data"].keys() & merged.data.keys()) - OF_THE_DATA:
                    OmegaConf.update(merged, f"data.{kept}", saved["data"][kept], merge=False)
        if classes := OmegaConf.select(merged, "data.classes"):
            OmegaConf.update(merged, "data.dataset.classes", classes)  # runs of version 0.4 did not hand it on
        config = resolved(merged)
    except (OmegaConfBaseException, LookupError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{cfg.ckpt}: the config in it can't be read: {first_line(error)}") from None
    used = ("ckpt", "ema", "model", "data", "amp", "device")
    faults = check("evaluate", {key: config[key] for key in used if key in config})
    if faults:
        raise ConfigError(f"{cfg.ckpt}, with the config in it: " + "\n       ".join(map(str, faults)))
    return config


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Evaluate and print; faults end in one message."""
    from ghostnet.loggers import jsonable

    try:
        cfg.ckpt = located(cfg.ckpt)
        job = unresolved(cfg), list(HydraConfig.get().overrides.task)
        result = jobs.on_ranks(run, job, resolved(cfg)["device"])
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        jobs.say(f"error: {message}")
        raise SystemExit(1) from None
    print(f"Acc@1 {result['top1']:.3f}  Acc@5 {result['top5']:.3f}  loss {result['loss']:.4f}  FPS {result['fps']:.1f}")
    print(json.dumps(jsonable(result), allow_nan=False), flush=True)
    return float(result["top1"])


if __name__ == "__main__":
    launch.enter("evaluate", main, run, trains=False)
