"""A line of the reference -> the words of our command, and what became of the flags that have none."""

from dataclasses import dataclass, field
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ghostnet.config import flat, unresolved
from ghostnet.door.groups import CONF
from ghostnet.door.overrides import check_command
from ghostnet.door.words import quoted
from ghostnet.errors import ConfigError
from ghostnet.experiments.sweeps import register
from ghostnet.tools.translate.flags import OPTIMIZERS, OWN_OF, SCRIPTS
from ghostnet.tools.translate.shell import UNKNOWN, Line

NOTHING, ITSELF, NONE, WARNING, NOTE = "did nothing there", "here by itself", "no home here", "warning", "note"
VERSION = "version"
HEADINGS = {"nothing": NOTHING, "itself": ITSELF, "none": NONE}
IMAGES_PER_LR = 1024
"""optim.lr is given for so many images a step; the reference's --lr for the global batch, whatever it is."""
WIDTHS = {0.5: "ghostnet_050", 1.0: "ghostnet_100", 1.3: "ghostnet_130"}
SPECIAL = {"optim.eps", "optim.betas", "schedule.decay_epochs", "schedule.decay_rate", "data.workers", "dist_bn"}
"""Keys that are set only where their flag is given, or their group has them."""


@dataclass
class Command:
    """Our command for one of the reference."""

    program: str
    """train or evaluate."""
    words: list[str]
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    """(heading, flag as it was typed, why)."""


def translate(line: Line) -> Command:
    """Our command; ConfigError with the door's message where a value is not allowed here."""
    command = Command(line.program, [])
    for word, near in line.strangers.items():
        word = word.replace(UNKNOWN, "")
        way_out = f"no flag of its: left out. {near}" if word.startswith("-") else "left out: the data path was given"
        command.remarks.append((WARNING, word, way_out.rstrip()))
    _version(line, command)
    if line.script:
        _of_script(line, command)
    else:
        for name, text in line.typed.items():
            flag = line.flags[name]
            if flag.fate != "home" and not (flag.fate == "none" and line.given[name] == flag.default):
                command.remarks.append((HEADINGS[flag.fate], text, flag.why))
        (_training if line.program == "train" else _evaluation)(line, command)
    try:
        check_command(line.program, command.words, multirun=False)
    except ConfigError as fault:
        raise ConfigError(f"the reference's values are not allowed here:\n       {fault}") from None
    return command


def _version(line: Line, command: Command) -> None:
    """Tell which version the line was taken for, how that is known, and what it has of its own."""
    told = ["both evaluate alike"]
    if line.program == "train":
        values = f"loss scale {_text(line.of.loss_scale)}, {line.of.cooldown} cool-down epochs unless others are given"
        told = [f"PyTorch {line.version}, {line.told_by}", f"{values}; published: {line.of.results}"]
    command.remarks += [(VERSION, "", text) for text in told]


def _data(line: Line, command: Command) -> str:
    if line.data is None:
        flag = "--data_path=…" if line.script else "the data path"
        raise ConfigError(f"{flag} is not given: there the command ends with an error.")
    if UNKNOWN in line.data:
        command.remarks.append((WARNING, "the data path", "only the shell knows it: put it in the place of DATA_PATH"))
        return "DATA_PATH"
    return line.data


def _of_script(line: Line, command: Command) -> None:
    """A script of test/ is an experiment; of the flags it reads, those that do something are kept."""
    root = f"data.root={quoted(_data(line, command))}"
    if line.program == "evaluate":
        if not (checkpoint := line.given.get("--checkpoint")):
            raise ConfigError("--checkpoint=… is not given: there the command ends with an error.")
        command.words = [f"ckpt={quoted(checkpoint)}", root]
        command.remarks.append((NOTE, "", "the script evaluates in half precision: amp=fp16 does so here"))
    else:
        cards, own, experiment = SCRIPTS[line.script or ""]
        command.words = [f"experiment={experiment}", root]
        wanted = {"schedule.cooldown_epochs": own.get("--cooldown-epochs", line.of.cooldown)}
        command.words += _differing(wanted | {"amp.loss_scale": line.of.loss_scale}, _composed(command.words)[1])
        device = line.given.get("--device_id")
        if device and cards == 1 and UNKNOWN not in device and device != "0":
            command.words.append(f"device.ids=[{device}]")
    for name, text in line.typed.items():
        if name == "--world_size":
            command.remarks.append((NOTHING, text, "the script reads it and uses it nowhere; here: device.count"))
        elif name == "--device_id" and (line.program == "evaluate" or SCRIPTS[line.script or ""][0] == 8):
            command.remarks.append((NOTHING, text, "it names the log's folder alone; here: device.ids=[…]"))
        elif name not in ("--device_id", "--checkpoint"):
            flag = line.flags[name]
            here = f"; here: {flag.key}={_text(line.given[name])}" if flag.key else ""
            command.remarks.append((NOTHING, text, f"the script reads no such flag{here}"))
    _notes(line, command)


def _notes(line: Line, command: Command) -> None:
    if line.program == "evaluate":
        return
    if line.script == "train_full_1p.sh":
        command.remarks.append((NOTE, "", "its README speaks of 10 epochs, the script trains 40: epochs=40"))
    if line.script and "performance" in line.script:
        command.remarks.append((NOTE, "", "evaluated once, after the last epoch; there after each: eval_every=1"))
    if line.script or str(line.given.get("--opt")).lower() == "npufusedsgd":
        why = "its npufusedsgd itself is optim=npu_fused_sgd; fused_sgd takes the same steps, on any device"
        command.remarks.append((NOTE, "", why))
    command.remarks.append(
        (
            NOTE,
            "",
            "there the learning rate moves once an epoch, here with every step: schedule.interval=epoch for that",
        )
    )


def _training(line: Line, command: Command) -> None:
    """The words that make an experiment's config that of the line: what it gives, and the program's own defaults."""
    value = {flag.name: line.given.get(flag.name, line.of.default(flag)) for flag in line.flags.values()}
    cards = _cards(line, command)
    experiment = "full_8p" if cards > 1 else "full_1p"
    groups, wanted = _wanted(line, value, command)
    words = [f"experiment={experiment}", f"data.root={quoted(_data(line, command))}"]
    base = _composed(words)
    words += [f"{group}={option}" for group, option in groups.items() if option != base[0][group]]
    base = _composed(words)
    batch = value["--batch-size"] if value["--batch-size"] != UNKNOWN else base[1]["device.batch_size"]
    lr = value["--lr"] if value["--lr"] != UNKNOWN else 0.4 * cards
    wanted |= {"optim.lr": float(f"{lr * IMAGES_PER_LR / (batch * cards):.10g}"), "device.count": cards}
    if isinstance(line.given.get("--npu"), int) and cards == 1 and line.given["--npu"]:
        wanted["device.ids"] = [line.given["--npu"]]
    command.words = words + _differing(wanted, base[1])
    _notes(line, command)


def _differing(wanted: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """The words for those of `wanted` that differ from `base`, the values that a command has without them."""
    return [
        f"{key}={_text(new)}"
        for key, new in wanted.items()
        if (key in base and base[key] != new) or key.startswith("hydra.")
    ]


def _cards(line: Line, command: Command) -> int:
    """How many cards train together."""
    given = line.given.get("--world_size")
    if isinstance(given, int):
        return max(1, given)
    if line.looped and line.looped > 1:
        command.remarks.append((NOTE, "", f"a loop starts {line.looped}: taken for as many cards of one run"))
        return line.looped
    return 1


def _composed(words: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the chosen option of each group, all values) of a command."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=words, return_hydra_config=True)
    raw = unresolved(cfg)
    raw.pop("hydra")
    # One by one: hydra's own node can't be resolved here.
    values = {key: OmegaConf.select(cfg, key) if "$" in str(value) else value for key, value in flat(raw)}
    return dict(cfg.hydra.runtime.choices), values


def _wanted(line: Line, value: dict[str, Any], command: Command) -> tuple[dict[str, str], dict[str, Any]]:
    """(options of groups, values of keys) that a line means; what can't be had becomes a remark."""
    groups = {"amp": _amp(value), "schedule": value["--sched"], "optim": OPTIMIZERS.get(value["--opt"].lower(), "")}
    if groups["schedule"] not in ("cosine", "step"):
        command.remarks.append((NONE, line.typed.get("--sched", ""), "schedules here: cosine, step, linear"))
        groups["schedule"] = "cosine"
    if not groups["optim"]:
        command.remarks.append(
            (NONE, line.typed.get("--opt", ""), "optimizers here: fused_sgd, npu_fused_sgd, sgd, rmsprop, adamw")
        )
        groups["optim"] = "fused_sgd"
    wanted: dict[str, Any] = {}
    for flag in line.flags.values():
        new = value[flag.name]
        if flag.fate != "home" or not flag.key or (flag.key in SPECIAL and flag.name not in line.given):
            continue
        if new == UNKNOWN or (new is None and flag.name not in line.given and flag.key != "clip_grad_norm"):
            if new == UNKNOWN and flag.key != "data.workers":
                command.remarks.append((WARNING, line.typed[flag.name], "only the shell knows it: left out"))
            continue
        wanted[flag.key] = new
    for key in [key for key in wanted if key.startswith("optim.")]:
        if key.removeprefix("optim.") not in OWN_OF[groups["optim"]]:
            wanted.pop(key)
    if groups["schedule"] == "step":
        wanted["schedule.decay_epochs"] = value["--decay-epochs"]
        wanted["schedule.decay_rate"] = value["--decay-rate"]
    _one_by_one(line, value, command, groups, wanted)
    _as_the_door_wants(command, wanted)
    return groups, wanted


def _as_the_door_wants(command: Command, wanted: dict[str, Any]) -> None:
    """What did the same there, or nothing, and is a fault here."""
    epochs, warmup, decay = (wanted.get(f"{k}epochs", 0) for k in ("", "schedule.warmup_", "schedule.decay_"))
    if epochs and warmup > epochs:
        wanted["schedule.warmup_epochs"] = epochs
        why = f"there a warm-up of {warmup} epochs never reached its peak in {epochs}; here it ends with the training"
        command.remarks.append((NOTE, "", why))
    if epochs and decay >= epochs:
        wanted["schedule.decay_rate"] = 1.0  # the training ends before the first decay
    if wanted.get("optim.nesterov") and not wanted.get("optim.momentum", 0.9):
        wanted["optim.nesterov"] = False


def _one_by_one(
    line: Line, value: dict[str, Any], command: Command, groups: dict[str, str], wanted: dict[str, Any]
) -> None:
    """Flags whose values are others here, or that set several keys."""
    wanted["save_every"] = wanted["save_every"] or None
    if groups["amp"] == "o2":
        wanted["amp.loss_scale"] = line.of.loss_scale
    if wanted.get("dist_bn") == "":
        wanted.pop("dist_bn")
    if "schedule.decay_epochs" in wanted and wanted["schedule.decay_epochs"] == int(wanted["schedule.decay_epochs"]):
        wanted["schedule.decay_epochs"] = int(wanted["schedule.decay_epochs"])
    if wanted.get("model.width") in WIDTHS:
        groups["model"] = WIDTHS[wanted.pop("model.width")]
    if value["--opt"].lower() in ("sgd", "nesterov"):
        wanted["optim.nesterov"] = True
    if groups["optim"] in ("rmsprop", "adamw") and value["--opt-eps"] is None:
        wanted["optim.eps"] = 1e-8  # torch's
    if value["--pretrained"]:
        wanted |= {"model.weights": "model_best.pth.tar", "model.freeze": True}
        command.remarks.append((NOTE, "", "--pretrained read ./model_best.pth.tar, a name that was fixed there"))
    if value["--resume"]:
        why = "of this project: last.pt or its run folder; of the reference's, the weights alone: model.weights=FILE"
        command.remarks.append((NOTE, line.typed["--resume"], why))
    if multiple := line.given.get("--validation-batch-size-multiplier"):
        wanted["data.eval_batch_size"] = multiple * value["--batch-size"]
    if "--train-interpolation" in line.given:
        if value["--train-interpolation"] == "random":
            why = "no interpolation drawn at random: data.augment.interpolation is bilinear"
            command.remarks.append((NONE, line.typed["--train-interpolation"], why))
        else:
            wanted["data.augment.interpolation"] = value["--train-interpolation"]
    _image_size(line, wanted)


def _image_size(line: Line, wanted: dict[str, Any]) -> None:
    if size := line.given.get("--input-size"):
        if len(size) != 3 or size[0] != 3 or size[1] != size[2]:
            raise ConfigError(
                f"{line.typed['--input-size']}: pictures here are square and RGB, --input-size 3 224 224."
            )
        wanted["data.image_size"] = size[1]


def _amp(value: dict[str, Any]) -> str:
    """--amp and --apex-amp are apex's O2, which o2 is without apex; --native-amp: autocast."""
    return "o2" if value["--amp"] or value["--apex-amp"] else "fp16" if value["--native-amp"] else "none"


def _evaluation(line: Line, command: Command) -> None:
    """evaluate.py: what is not given comes from the checkpoint, or from conf/."""
    checkpoint = line.given.get("--checkpoint")
    if not checkpoint or checkpoint == UNKNOWN:
        raise ConfigError("--checkpoint is not given: give it the file whose weights are evaluated.")
    words = [f"ckpt={quoted(checkpoint)}", f"data.root={quoted(_data(line, command))}"]
    wanted = {
        flag.key: line.given[flag.name]
        for flag in line.flags.values()
        if flag.fate == "home" and flag.key not in ("", "ckpt") and line.given.get(flag.name, UNKNOWN) != UNKNOWN
    }
    if (width := wanted.pop("model.width", 1.0)) != 1.0:
        words.append(f"model={WIDTHS[width]}" if width in WIDTHS else f"model.width={_text(width)}")
    if any(line.given.get(name) for name in ("--amp", "--apex-amp", "--native-amp")):
        words.append("amp=o2" if line.given.get("--apex-amp") else "amp=fp16")
    _image_size(line, wanted)
    command.words = words + [f"{key}={_text(new)}" for key, new in wanted.items()]


def _text(value: Any) -> str:  # noqa: ANN401 (of any kind)
    """A value as it is written in a word."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else quoted(str(value))
