"""Train GhostNet: python train.py [group=option …] [key=value …]; python train.py -m key=a,b for a sweep."""

import contextlib
import json
import logging
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ghostnet.config import Checked, Config, build, check_command, flat, resolved
from ghostnet.errors import ConfigError, UserError

log = logging.getLogger("ghostnet")


def run(cfg: Config, folder: Path, command: str) -> dict[str, Any]:
    """One run, in flow order: device, data, model, optimizer, the loop, the result. -> What result.json holds."""
    started = time.monotonic()
    import torch

    from ghostnet import checkpoint, engine
    from ghostnet.data.datasets import check_same_classes
    from ghostnet.data.loader import EvalLoader, Feeder, TrainLoader
    from ghostnet.device import cpu_count, describe, memory_format, resolve
    from ghostnet.ema import Ema
    from ghostnet.loggers import ConsoleLogger, RunInfo
    from ghostnet.models.ghostnet import freeze_backbone
    from ghostnet.models.weights import load_weights
    from ghostnet.optim import Timeline, scaled_lr
    from ghostnet.seeding import seed_init

    console = ConsoleLogger()

    # Device
    if cfg["device"]["count"] > 1:
        raise ConfigError(f"device.count={cfg['device']['count']}: this version trains on one device. device.count=1")
    device = resolve(cfg["device"]["kind"], (cfg["device"]["ids"] or [0])[0])
    console.say(f"device {device}: {describe(device)}")

    # Data
    data, seed = cfg["data"], cfg["seed"]
    train_set, val_set = build(data["dataset"], "train"), build(data["dataset"], "val")
    check_same_classes(train_set, val_set)
    preprocessing = build(data["preprocessing"])
    feeder = Feeder(device, data["workers"] or cpu_count(), data["image_size"])
    eval_feeder = Feeder(device, data["workers"] or cpu_count(), data["image_size"])
    train_loader = TrainLoader(train_set, preprocessing, build(data["augment"]), data["batch_size"], seed, feeder)
    eval_loader = EvalLoader(val_set, preprocessing, data["eval_batch_size"], eval_feeder)
    steps_per_epoch = engine.steps_per_epoch(train_loader, cfg["accumulate"])
    console.say(f"data {len(train_set):,} + {len(val_set):,} images of {len(train_set.classes)} classes")

    # Model
    num_classes = cfg["model"]["num_classes"] or len(train_set.classes)
    if num_classes < len(train_set.classes):
        raise ConfigError(f"model.num_classes={num_classes}, but the data have {len(train_set.classes)} classes.")
    extras = ("num_classes", "weights", "freeze")
    seed_init(seed)
    model = build({k: v for k, v in cfg["model"].items() if k not in extras}, num_classes=num_classes)
    if cfg["model"]["weights"]:
        for message in load_weights(model, cfg["model"]["weights"]):
            console.say(message)
    if cfg["model"]["freeze"]:
        freeze_backbone(model)
    parameters = sum(p.numel() for p in model.parameters())
    console.say(f"model {parameters:,} parameters, {num_classes} classes")
    model = model.to(device, memory_format=memory_format(device))

    # Optimizer, precision, schedule
    global_batch_size = data["batch_size"] * cfg["accumulate"]
    peak = scaled_lr(cfg["optim"]["lr"], global_batch_size)
    schedule = build(cfg["schedule"], Timeline(peak, cfg["epochs"], steps_per_epoch))
    ema = Ema(model, cfg["ema_decay"]) if cfg["ema_decay"] else None
    amp = build(cfg["amp"])
    optimizer = amp.initialize(model, lambda named: build(cfg["optim"] | {"lr": peak}, named), device)
    state = engine.TrainState(model, optimizer, amp, ema, device)
    recipe = engine.Recipe(
        preprocessing,
        build(data["mix"]),
        schedule,
        seed,
        cfg["label_smoothing"],
        cfg["clip_grad_norm"],
        cfg["accumulate"],
    )
    epochs = cfg["epochs"] + cfg["schedule"]["cooldown_epochs"]
    total_steps = epochs * steps_per_epoch
    warmup = cfg["schedule"]["warmup_epochs"]
    if warmup >= epochs:
        console.say(
            f"note: the warm-up ({warmup:g} epochs) fills the whole training ({epochs}): the learning rate ends at "
            f"{schedule(total_steps - 1):.2g} and never reaches {peak:.2g}"
        )

    # Resume
    earlier_seconds = 0.0
    if (path := _resume_path(cfg["resume"], folder)) is not None:
        saved = checkpoint.load(path)
        _check_same_run(saved["config"], cfg)
        state.load_state_dict(saved)
        earlier_seconds = saved["seconds"]
        best = path.with_name(checkpoint.BEST)
        if best.exists() and not (folder / checkpoint.BEST).exists():
            shutil.copy2(best, folder / checkpoint.BEST)
        console.say(f"resume from {path}, step {state.step} of {total_steps}")

    # Loggers
    loggers = [console, *_file_loggers(cfg)]
    for logger in loggers:
        logger.start(RunInfo(folder, cfg, state.step, state.evaluated, total_steps, epochs))

    def write(row: dict[str, Any]) -> None:
        for logger in loggers:
            logger.log(row)

    def save(name: str) -> None:
        seconds = earlier_seconds + time.monotonic() - started
        facts = {"config": cfg, "classes": train_set.classes, "num_classes": num_classes, "seconds": seconds}
        checkpoint.save(state.state_dict() | facts, folder / name)

    result = None
    # The loop
    try:
        with engine.StopSignal() as stop:
            try:
                while True:
                    epoch = state.step // steps_per_epoch
                    due = state.step == total_steps or epoch % cfg["eval_every"] == 0
                    if state.step % steps_per_epoch == 0 and state.evaluated < state.step and due:
                        row = _evaluate(state, eval_loader, console, epoch, stop)
                        write(row)
                        if row["best"]:
                            save(checkpoint.BEST)
                        save(checkpoint.LAST)
                    if state.step >= total_steps:
                        break
                    for step in engine.train(state, train_loader, recipe):
                        console.advance(step)
                        if step % cfg["log_every"] == 0 or step % steps_per_epoch == 0:
                            write(_train_row(state, step, steps_per_epoch, folder))
                        if cfg["save_every"] and step % cfg["save_every"] == 0:
                            _stop_if_not_finite(state, folder)
                            save(checkpoint.LAST)
                            state.speed.resume()
                        stop.check()
            except engine.Interrupted:
                _stop_if_not_finite(state, folder)
                save(checkpoint.LAST)
                raise

        # Result
        seconds = earlier_seconds + time.monotonic() - started
        best = state.best
        result = {
            "status": "completed",
            "top1": best["ema/top1"] if ema else best["eval/top1"],
            "top5": best["ema/top5"] if ema else best["eval/top5"],
            "loss": best["ema/loss"] if ema else best["eval/loss"],
            "best_epoch": best["epoch"],
            "last_top1": state.last["ema/top1"] if ema else state.last["eval/top1"],
            "fps": state.speed.fps,
            "data_wait": state.speed.data_wait,
            "eval_fps": state.last["eval/fps"],
            "epochs": epochs,
            "steps": state.step,
            "amp": amp.name,
            "device": device.type,
            "device_name": describe(device),
            "world_size": 1,
            "batch_size": data["batch_size"],
            "global_batch_size": global_batch_size,
            "params": parameters,
            "num_classes": num_classes,
            "seed": seed,
            "torch": torch.__version__,
            "seconds": seconds,
            "command": command,
        }
        _write_json(folder / "result.json", result)
    finally:
        for logger in reversed(loggers):
            logger.finish(result)
        feeder.close()
        eval_feeder.close()
    return result


def _resume_path(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to go on with; None for a fresh start."""
    from ghostnet import checkpoint

    if resume is None:
        return None
    if resume == "auto":
        path = folder / checkpoint.LAST
        return path if path.exists() else None
    return checkpoint.find(resume, checkpoint.LAST)


# What must not change within a run; the rest may, such as epochs, the learning rate, threads or where the data lie.
FIXED = ("seed", "accumulate", "model._target_", "model.width", "model.freeze", "amp._target_", "optim._target_")
FIXED += ("data.batch_size", "data.image_size", "data.dataset._target_", "schedule.cooldown_epochs", "ema_decay")


def _check_same_run(saved: Config, cfg: Config) -> None:
    """ConfigError with the differences where a checkpoint's run is another than the one that should go on."""
    before, now = dict(flat(saved)), dict(flat(cfg))
    differ = [f"{key}: {before.get(key)} then, {now.get(key)} now" for key in FIXED if before.get(key) != now.get(key)]
    if differ:
        raise ConfigError(
            f"resume: the checkpoint comes from a different run: {'; '.join(differ)}. Repeat the run's own settings, or "
            "start a new run from its weights with model.weights=PATH."
        )


def _file_loggers(cfg: Config) -> list[Any]:
    """metrics.jsonl, and Weights & Biases where it was chosen."""
    from ghostnet.loggers import JsonLines

    return [JsonLines(), *([build(cfg["logger"]["wandb"])] if cfg["logger"]["wandb"] else [])]


def _train_row(state: Any, step: int, steps_per_epoch: int, folder: Path) -> dict[str, Any]:  # noqa: ANN401
    """A row of metrics after a step; waits for the device."""
    _stop_if_not_finite(state, folder)
    loss = state.meter.read()
    fps, data_wait = state.speed.read()
    return {
        "step": step,
        "epoch": (step - 1) // steps_per_epoch + 1,
        "time": time.time(),
        "train/loss": loss,
        "train/lr": state.optimizer.param_groups[0]["lr"],
        "train/fps": fps,
        "train/data_wait": data_wait,
    }


def _stop_if_not_finite(state: Any, folder: Path) -> None:  # noqa: ANN401
    """UserError with the step, the learning rate and the last good checkpoint where a loss was not finite."""
    from ghostnet import checkpoint

    bad = state.meter.bad_step()
    if bad is not None:
        last = folder / checkpoint.LAST
        raise UserError(
            f"the loss is not finite at step {bad}, learning rate {state.optimizer.param_groups[0]['lr']:.4g}. "
            + (f"The last good checkpoint is {last}. " if last.exists() else "There is no checkpoint yet. ")
            + "Try a lower optim.lr, a longer schedule.warmup_epochs, or amp=none."
        )


def _evaluate(state: Any, loader: Any, console: Any, epoch: int, stop: Any) -> dict[str, Any]:  # noqa: ANN401
    """Evaluate the weights and their average; keep the row in the state, and as its best where it is."""
    from ghostnet import engine

    done, total = 0, len(loader.dataset) * (2 if state.ema else 1)

    def on_batch(images: int) -> None:
        nonlocal done
        done += images
        console.evaluating(done, total)
        stop.check()

    result = engine.evaluate(state.model, state.amp, loader, on_batch)
    row = {"step": state.step, "epoch": epoch, "time": time.time(), "eval/loss": result.loss}
    row |= {"eval/top1": result.top1, "eval/top5": result.top5, "eval/fps": result.fps}
    if state.ema:
        average = engine.evaluate(state.amp.for_evaluation(state.ema.module), state.amp, loader, on_batch)
        row |= {"ema/loss": average.loss, "ema/top1": average.top1, "ema/top5": average.top5}
    key = "ema/top1" if state.ema else "eval/top1"
    row["best"] = not state.best or row[key] > state.best[key]
    state.last, state.evaluated = row, state.step
    if row["best"]:
        state.best = row
    return row


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


failed_jobs: list[str] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def job(cfg: DictConfig) -> float | None:
    """One job: run it; in a sweep a failure is reported and the next job goes on."""
    from ghostnet.engine import Interrupted

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    sweep = hydra_cfg.mode == RunMode.MULTIRUN
    command = shlex.join(["python", Path(sys.argv[0]).name, *typed])
    try:
        config = resolved(cfg)
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        if sweep:
            print(f"\njob {hydra_cfg.job.num}: {' '.join(hydra_cfg.overrides.task)} -> {folder}", flush=True)
        return float(run(config, folder, command)["top1"])
    except Interrupted as signal_:
        again = [a for a in typed if not a.startswith(("resume=", "hydra.run.dir="))]
        again += [] if sweep else [f"hydra.run.dir={os.path.relpath(folder)}", "resume=auto"]
        _say(f"{signal_}: the step was finished and {folder / 'last.pt'} saved. To go on:")
        _say("  " + shlex.join(["python", Path(sys.argv[0]).name, *again]))
        raise SystemExit(128 + signal_.signum) from None
    except Exception as error:
        message = _explain(error)
        if message is None and not sweep:
            raise
        log.exception("failed")
        _say(f"error: {message or repr(error)}")
        failed_jobs.append(str(folder))
        if not sweep:
            raise SystemExit(1) from None
        _write_json(folder / "result.json", {"status": "failed", "error": message or repr(error)})
        return None


typed: list[str] = sys.argv[1:]
"""The command line as the user typed it."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _explain(error: Exception) -> str | None:
    """A fault that the user can mend in one message; None for a bug of ours."""
    import torch

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory. Give a smaller data.batch_size, and accumulate=2 or more for the same global batch."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    return None


def main() -> None:
    """Check the whole command at the door, give the run a folder of its own, and launch."""
    args = get_args_parser().parse_args()
    if args.help or args.hydra_help or args.shell_completion or args.info:
        job()
        return
    try:
        checked = check_command(args.config_name or "train", args.overrides, args.multirun)
        if args.cfg is None:
            _claim_folder(args.multirun, checked)
    except ConfigError as error:
        _say(f"error: {error}")
        sys.exit(1)
    try:
        job()
    except KeyboardInterrupt:
        _say("stopped at once, on request.")
        sys.exit(130)
    finally:
        if args.multirun and args.cfg is None:
            _print_table(Path(_hydra_value("hydra.sweep.dir")))
    if failed_jobs:
        sys.exit(1)


def _claim_folder(multirun: bool, checked: Checked) -> None:
    """Settle the run's or sweep's folder: as given, else where the resumed run lies, else a new one of its own."""
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    given = any(a.startswith(f"{key}=") for a in typed)
    folder = Path(checked.hydra.sweep.dir if multirun else checked.hydra.run.dir)
    resume = checked.jobs[0]["resume"]
    if given:
        if not multirun and resume is None and any(folder.glob("*.pt")):
            raise ConfigError(
                f"{folder} holds a run already: resume=auto goes on with it; for a new run give another hydra.run.dir."
            )
        sys.argv.append(f"{key}={_quoted(folder)}")
        return
    if resume not in (None, "auto") and not multirun:
        path = Path(resume).expanduser()
        folder = path if path.is_dir() else path.parent
    else:
        # Two runs started in the same second get folders of their own.
        folder.parent.mkdir(parents=True, exist_ok=True)
        first, number = folder, 1
        while True:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
                folder = first.with_name(f"{first.name}-{number}")
    sys.argv.append(f"{key}={_quoted(folder)}")


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _hydra_value(key: str) -> str:
    return next(a for a in reversed(sys.argv) if a.startswith(f"{key}=")).split("=", 1)[1].strip("'")


def _print_table(folder: Path) -> None:
    """All jobs of a sweep, best first."""
    from rich.console import Console
    from rich.table import Table

    rows = []
    for number in sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name)):
        overrides = OmegaConf.load(number / ".hydra" / "overrides.yaml")
        result: dict[str, Any] = {"status": "cut off"}
        with contextlib.suppress(OSError, ValueError):
            result = json.loads((number / "result.json").read_text())
        rows.append((result, number.name, [str(o) for o in overrides]))
    shared = set.intersection(*(set(o) for _, _, o in rows)) if len(rows) > 1 else set()
    rows.sort(key=lambda row: -row[0].get("top1", -1.0))
    table = Table("job", "overrides", "Acc@1", "Acc@5", "loss", "FPS", "seconds", "status")
    for result, number, overrides in rows:
        cells = [f"{result[k]:{f}}" if k in result else "-" for k, f in
                 (("top1", ".3f"), ("top5", ".3f"), ("loss", ".4f"), ("fps", ".1f"), ("seconds", ".0f"))]
        table.add_row(number, " ".join(o for o in overrides if o not in shared), *cells, result["status"])
    Console().print(table)
    print(f"sweep folder: {folder}")


if __name__ == "__main__":
    main()
