"""Train GhostNet.

  python train.py [group=option …] [key=value …]           one run, in a folder of its own
  python train.py experiment=quickstart                    on images that ship with it, about a minute on two cores
  python train.py data.root=/data/imagenet                 ImageNet: train/<class>/*, val/<class>/*
  python train.py -m optim.lr=0.2,0.4 seed=1,2 …           a sweep: a job for each combination, a table at the end
  python train.py … hydra.run.dir=runs/a resume=auto       go on where runs/a was stopped, or start it
  python train.py optim=adamw data=shards --help           this page, with the values of those options
  python train.py … --cfg job                              the whole config of a command, nothing run
  eval "$(python train.py --shell-completion install=bash)"    completion of groups, options, keys

Completion in fish: python train.py --shell-completion install=fish | source; in zsh as above, after
autoload -Uz bashcompinit && bashcompinit. --hydra-help tells of Hydra's own flags and settings.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until launch.enter(): no traceback of a Ctrl-C among the imports

import contextlib
import functools
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ghostnet.installed  # noqa: F401  # isort: skip
import hydra
from omegaconf import DictConfig

from ghostnet.config import build, build_model, changes, check_same_run, same_batch
from ghostnet.errors import ConfigError
from ghostnet.experiments import folders, jobs, launch, record

if TYPE_CHECKING:
    from ghostnet.data.datasets import Dataset
    from ghostnet.distributed import Ranks
    from ghostnet.engine import TrainState
    from ghostnet.loggers import ConsoleLogger, Row
    from ghostnet.loop import Cadence


def run(job: jobs.Job, ranks: "Ranks") -> dict[str, Any]:
    """One run, in flow order: device, data, model, optimizer, loggers, the loop, the result. -> result.json.

    Every rank runs it; the main one prints and writes.
    """
    started = time.monotonic()
    import torch

    from ghostnet import engine, saving
    from ghostnet.data import decode
    from ghostnet.data.cache import open_cache
    from ghostnet.data.datasets import check_same_classes
    from ghostnet.data.loader import EvalLoader, Feeder, TrainLoader
    from ghostnet.device import check_compile, check_sync_bn, cpu_count, describe, memory_format, peak_memory
    from ghostnet.distributed import settle, synchronized
    from ghostnet.ema import Ema
    from ghostnet.loggers import ConsoleLogger, JsonLines, RunInfo
    from ghostnet.loop import Cadence, Loop
    from ghostnet.models.ghostnet import GhostNet, freeze_backbone, macs
    from ghostnet.models.weights import load_weights
    from ghostnet.optim import Timeline, fused_sgd_note, scaled_lr, warmup_note
    from ghostnet.seeding import seed_init
    from ghostnet.signals import StopSignal
    from ghostnet.wandb.artifact import located

    cfg, folder, console = job.cfg, job.folder, ConsoleLogger(not ranks.is_main, job.prefix)
    data, seed, accumulate, backend = cfg["data"], cfg["seed"], cfg["accumulate"], cfg["compile"]["backend"]

    # Device
    asked = cfg["device"]
    ranks, device, words = settle(ranks, asked["kind"], asked["ids"], asked.get("allow_hf32"))
    console.say(f"device  {words}")
    amp = build(cfg["amp"])
    amp.check(device)
    if backend:
        check_compile(device, backend)

    # Data
    with ranks.main_first():
        train_set, val_set = build(data["dataset"], "train"), build(data["dataset"], "val")
    for note in filter(None, (getattr(data_set, "note", "") for data_set in (train_set, val_set))):
        console.say(f"note    {note}")
    check_same_classes(train_set, val_set)
    threads = data["workers"] or cpu_count()
    decode.allow(data.get("max_pixels", decode.MAX_PIXELS))
    feeders = [Feeder(device, threads, data["image_size"]) for _ in range(2)]
    skip = data.get("on_error") == "skip"
    preprocessing, augment = build(data["preprocessing"]), build(data["augment"])
    cache = open_cache(val_set, preprocessing, ranks) if data.get("cache_val") else None
    train_loader = TrainLoader(train_set, preprocessing, augment, data["batch_size"], seed, feeders[0], ranks, skip)
    eval_loader = EvalLoader(val_set, preprocessing, data["eval_batch_size"], feeders[1], ranks, skip, cache)
    steps_per_epoch = engine.steps_per_epoch(train_loader, accumulate)
    console.say(f"data    {len(train_set):,} + {len(val_set):,} images of {len(train_set.classes)} classes")
    if cache:
        console.say(f"cache   {cache}")

    # Model
    num_classes = cfg["model"]["num_classes"] or len(train_set.classes)
    if num_classes < len(train_set.classes):
        raise ConfigError(f"model.num_classes={num_classes}, but the data have {len(train_set.classes)} classes.")
    seed_init(seed)
    model = build_model(cfg["model"], num_classes)
    if cfg["model"]["weights"]:
        weights = ranks.from_main(lambda: located(cfg["model"]["weights"]))
        for message in load_weights(model, weights):
            console.say(message)
    if cfg["model"]["freeze"]:
        if not isinstance(model, GhostNet):
            raise ConfigError(f"model.freeze=true is for GhostNet, not for {type(model).__name__}.")
        freeze_backbone(model)
    model = model.to(device, memory_format=memory_format(device))
    params = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    multiply_adds = macs(model, data["image_size"])
    console.say(
        f"model   {params:,} parameters{f', {trained:,} of them trained' if trained < params else ''}, "
        f"{multiply_adds / 1e6:,.1f} M multiply-adds an image"
    )

    # Precision, optimizer, schedule
    global_batch_size = data["batch_size"] * ranks.world_size * accumulate
    peak = scaled_lr(cfg["optim"]["lr"], global_batch_size)
    ema = Ema(model, cfg["ema_decay"]) if cfg["ema_decay"] else None
    if cfg["sync_bn"]:
        check_sync_bn(device)
        model = synchronized(model, ranks)
    optimizer = amp.initialize(model, lambda named: build(cfg["optim"] | {"lr": peak}, named), device)
    if note := fused_sgd_note(cfg["optim"], device):
        console.say(f"note    {note}")
    schedule = build(cfg["schedule"], Timeline(peak, cfg["epochs"], steps_per_epoch))
    epochs = cfg["epochs"] + cfg["schedule"]["cooldown_epochs"]
    total_steps = epochs * steps_per_epoch
    console.say(
        f"steps   {total_steps:,}: {epochs} epochs of {steps_per_epoch:,} at a global batch of {global_batch_size:,}, "
        f"peak learning rate {peak:.4g}, amp {amp.name}"
    )
    if note := warmup_note(cfg["schedule"], cfg["epochs"], peak):
        console.say(f"note    {note}")
    mix = build(data["mix"])
    recipe = engine.Recipe(
        preprocessing, mix, schedule, seed, cfg["label_smoothing"], cfg["clip_grad_norm"], accumulate
    )

    # Resume
    state = engine.TrainState(model, optimizer, amp, ema, device, ranks, cfg["dist_bn"], cfg["on_nan"])
    cadence = Cadence(steps_per_epoch, total_steps, cfg["log_every"], cfg["eval_every"], cfg["save_every"])
    earlier, in_place = _resume(cfg, folder, state, cadence, global_batch_size, train_set, console)

    # Compile
    compile_seconds = None
    if backend:
        console.say("compile torch.compile makes the step: minutes where it is new, seconds where its cache has it")
        compile_seconds = engine.compile_step(state, recipe, data["batch_size"], data["image_size"], backend)
        console.say(f"compile {compile_seconds:.1f} s")

    # Loggers
    loggers = [console, JsonLines(), *([build(cfg["logger"]["wandb"])] if cfg["logger"]["wandb"] else [])]
    loggers = loggers if ranks.is_main else []

    def facts() -> dict[str, Any]:
        seconds = earlier + time.monotonic() - started
        about = {"config": job.raw, "classes": train_set.classes, "images": len(train_set), "num_classes": num_classes}
        return about | {"seconds": seconds, "global_batch_size": global_batch_size}

    saver = saving.Saver(folder, cfg["keep"], facts, (state.step, state.evaluated) if in_place else None)
    is_hopeless = functools.partial(_is_hopeless, folder)
    loop = Loop(state, recipe, train_loader, eval_loader, cadence, saver, console, loggers, is_hopeless)

    # The loop
    result = None
    if ranks.is_main:
        (folder / "result.json").unlink(missing_ok=True)  # of a shorter run that goes on here
    try:
        for logger in loggers:
            logger.start(RunInfo(folder, cfg, state.step, state.evaluated, total_steps, epochs, job.prefix))
        with saver, StopSignal(ranks) as stop:
            pruned = loop.run(stop)

        # Result
        source, speed = "ema" if ema else "eval", state.speed.total
        result = {
            "status": "pruned" if pruned else "completed",
            "top1": state.best[f"{source}/top1"],
            "top5": state.best[f"{source}/top5"],
            "loss": state.best[f"{source}/loss"],
            "best_epoch": state.best["epoch"],
            "last_top1": state.last[f"{source}/top1"],
            "train_loss": state.train_loss,
            "fps": speed.fps,
            "compute": speed.compute,
            "data_wait": speed.data_wait,
            "reduction": speed.reduction,
            "eval_fps": state.last["eval/fps"],
            "epochs": epochs,
            "steps": state.step,
            "amp": amp.name,
            "device": device.type,
            "device_name": describe(device),
            "world_size": ranks.world_size,
            "batch_size": data["batch_size"],
            "global_batch_size": global_batch_size,
            "image_size": data["image_size"],
            "params": params,
            "macs": multiply_adds,
            "num_classes": num_classes,
            "seed": seed,
            "torch": torch.__version__,
            "skipped_steps": state.watch.read(ranks).skipped,
            "rewinds": len(state.rewinds),
            "skipped_train": len(set().union(*ranks.gather(set(train_loader.skipped.faults)))),
            "skipped_val": len(set().union(*ranks.gather(set(eval_loader.skipped.faults)))),
            "memory": ranks.gather(peak_memory(device)),
            "compile_seconds": compile_seconds,
            "seconds": earlier + time.monotonic() - started,
            "command": job.command,
        }
        if cfg["baseline"]:
            result |= folders.efficiency(result, cfg["baseline"])
        if ranks.is_main:
            record.write_json(folder / "result.json", result)
        return result
    finally:
        with contextlib.ExitStack() as stack:  # each is ended, even where another fails
            for feeder in feeders:
                stack.callback(feeder.close)
            for logger in loggers:
                stack.callback(logger.finish, result)


def _resume(
    cfg: dict[str, Any],
    folder: Path,
    state: "TrainState",
    cadence: "Cadence",
    global_batch_size: int,
    train_set: "Dataset",
    console: "ConsoleLogger",
) -> tuple[float, bool]:
    """Go on from a checkpoint, where there is one -> seconds trained before, whether it is the folder's last.pt.

    ConfigError, UserError where it is of another run. All ranks call it.
    """
    from ghostnet import checkpoint, saving
    from ghostnet.data.datasets import check_same_data
    from ghostnet.wandb.logger import ID_FILE

    found, notes = state.ranks.from_main(lambda: saving.find(cfg["resume"], folder))
    for note in notes:
        console.say(f"note    {note}")
    if found is None:
        return 0.0, False
    path, saved = found.path, found.state
    checkpoint.check(saved, path)
    check_same_run(saved["config"], cfg)
    then, ranks = saved["global_batch_size"], state.ranks
    if then != global_batch_size and not cfg["force"]:
        raise ConfigError(
            f"resume: the global batch was {then}, is {global_batch_size}: {ranks.world_size} ranks × data.batch_size "
            f"× accumulate. {same_batch(then, ranks.world_size, cfg['accumulate'])}"
        )
    for change in changes(saved["config"], cfg):
        console.say(f"note    {change}")
    if difference := check_same_data(saved["classes"], saved["images"], train_set, cfg["force"]):
        console.say(f"note    {difference}")
    total_steps = cadence.total_steps
    if saved["step"] > total_steps:
        epochs = total_steps // cadence.steps_per_epoch
        raise ConfigError(f"resume: {path} is at step {saved['step']:,}, past the {total_steps:,} of {epochs} epochs.")
    with checkpoint.fitting(path):
        state.load_state_dict(saved)
    for name in (checkpoint.BEST, checkpoint.REWIND, ID_FILE) if ranks.is_main else ():
        if (path.parent / name).exists() and not (folder / name).exists():
            shutil.copy2(path.parent / name, folder / name)
    console.say(f"resume  {path}, step {state.step:,} of {total_steps:,}")
    return saved["seconds"], path == folder / checkpoint.LAST


def _is_hopeless(folder: Path, row: "Row") -> bool:
    """Whether a trial of a search need not go on; no other run is told so."""
    if not (folder / "trial.json").exists():
        return False
    from ghostnet.experiments.search import hopeless

    return hopeless(folder, row["epoch"], row["ema/top1" if "ema/top1" in row else "eval/top1"])


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One job."""
    return jobs.guard(cfg, run)


if __name__ == "__main__":
    launch.enter("train", main, run, trains=True)
