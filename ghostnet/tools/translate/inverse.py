"""A config of ours as a command of the reference, and what of it the reference can't do."""

import shlex
from typing import Any

from ghostnet.config import Config, flat
from ghostnet.door.overrides import check_command
from ghostnet.tools.translate.command import IMAGES_PER_LR
from ghostnet.tools.translate.flags import ASSUMED, FLAGS, SCRIPTS, VERSIONS

SAME = ("data.root", "data.workers", "log_every", "eval_every", "resume", "baseline", "device.ids")
"""Keys that change nothing of what is trained."""
OPTIMIZERS = {
    "fused_sgd": "npufusedsgd",
    "npu_fused_sgd": "npufusedsgd",
    "sgd": "momentum",
    "rmsprop": "rmsprop",
    "adamw": "adamw",
}
SHORT = {"--batch-size": "-b", "--workers": "-j"}


def reference(cfg: Config, classes: int) -> tuple[str | None, list[str]]:
    """(the command, what it can't do); no command where nothing would be left of the run. classes: of the model."""
    values = dict(flat(cfg))
    unable = _unable(values)
    if not values["data.dataset._target_"].endswith(".ImageFolder"):
        return None, ["data: it reads image folders alone"]
    for script, (cards, _, experiment) in SCRIPTS.items():  # of the version that the experiments follow
        if cards == values["device.count"] and _same(values, experiment):
            words = [f"--data_path={values['data.root'] or '…'}"]
            words += [f"--device_id={values['device.ids'][0]}"] if values["device.ids"] and cards == 1 else []
            more = ["its script trains 40 epochs"] if script == "train_full_1p.sh" else []
            return shlex.join(["bash", f"./test/{script}", *words]), [*more, *unable]
    return _line(values, classes), unable


def _same(values: dict[str, Any], experiment: str) -> bool:
    """Whether a config trains what an experiment does."""
    of_experiment = dict(flat(check_command("train", [f"experiment={experiment}"], multirun=False).jobs[0]))
    own = {key: value for key, value in values.items() if not key.startswith("logger.")}
    theirs = {key: value for key, value in of_experiment.items() if not key.startswith("logger.")}
    differ = {key for key in own | theirs if own.get(key) != theirs.get(key)}
    return differ <= {*SAME, "data.dataset.root"}


def _line(values: dict[str, Any], classes: int) -> str:
    """The Python line with every flag whose value is not the program's own, after the file that tells the version."""
    version = VERSIONS[_version(values)]
    count, ids = values["device.count"], values["device.ids"]
    batch = values["data.batch_size"] * count
    program = "train_ghostnet_1p.py" if count == 1 else "train_ghostnet_8p.py"
    words = [values["data.root"] or "…", "--model", "GhostNet"]
    words += ["--opt", OPTIMIZERS.get(values["optim._target_"].rpartition(".")[2], "npufusedsgd")]
    words += ["--lr", f"{values['optim.lr'] * batch / IMAGES_PER_LR:g}", "--num-classes", str(classes)]
    words += ["--sched", values["schedule._target_"].rpartition(".")[2]]
    amp = values["amp._target_"].rpartition(".")[2]
    words += {"O2": ["--amp"], "Apex": ["--amp"], "Fp16": ["--native-amp"]}.get(amp, [])
    for flag in FLAGS:
        value = values.get(flag.key)
        if flag.of == "evaluate" or flag.fate != "home" or flag.key not in values:
            continue
        if value == version.default(flag):
            continue
        if flag.key in ("resume", "model.num_classes", "data.image_size", "ema") or value is None or value is False:
            continue
        if flag.key.startswith("data.preprocessing.") and value == _USUAL.get(flag.key):
            continue
        words += [SHORT.get(flag.name, flag.name), *_shown(value)]
    if values["data.image_size"] != 224:
        words += ["--input-size", "3", *2 * [str(values["data.image_size"])]]
    if values["data.augment.interpolation"] != "random":
        words += ["--train-interpolation", values["data.augment.interpolation"]]
    if values["model.weights"] and values["model.freeze"]:
        words.append("--pretrained")
    source, python = f"source test/{version.environment}; ", ["python3", "-u", program, *words]
    if count == 1:
        return source + shlex.join([*python, *(["--npu", str(ids[0])] if ids else [])])
    line = shlex.join([*python, "--world_size", str(count)])
    return f"{source}export WORLD_SIZE={count}; for i in $(seq 0 {count - 1}); do {line} --local_rank $i & done; wait"


def _version(values: dict[str, Any]) -> str:
    """The version of the reference that has the loss scale of a config."""
    scale = values.get("amp.loss_scale")
    return next((name for name, version in VERSIONS.items() if version.loss_scale == scale), ASSUMED)


_USUAL = {
    "data.preprocessing.crop": 0.875,
    "data.preprocessing.mean": [0.485, 0.456, 0.406],
    "data.preprocessing.std": [0.229, 0.224, 0.225],
    "data.preprocessing.interpolation": "bicubic",
}
"""What the reference has without a flag, too."""


def _shown(value: Any) -> list[str]:  # noqa: ANN401 (a config's)
    if value is True:
        return []
    return [f"{v:g}" if isinstance(v, float) else str(v) for v in (value if isinstance(value, list) else [value])]


def _unable(values: dict[str, Any]) -> list[str]:
    """What a config asks for that the reference has not."""
    kind, amp = values["device.kind"], values["amp._target_"].rpartition(".")[2]
    optimizer, schedule = (values[f"{group}._target_"].rpartition(".")[2] for group in ("optim", "schedule"))
    wanted = {
        f"device.kind={kind}: it trains on NPUs alone": kind in ("cpu", "cuda"),
        "device.ids: with several cards its ranks take 0, 1, 2, …": (
            bool(values["device.ids"]) and values["device.count"] > 1
        ),
        "amp=bf16: it has float16 alone": amp == "Bf16",
        "amp.loss_scale: its O2 has dynamic (its version for PyTorch 1.8) or 128 (1.5)": (
            amp in ("O2", "Apex")
            and values["amp.loss_scale"] not in [version.loss_scale for version in VERSIONS.values()]
        ),
        f"optim={optimizer}: it is not known to have it": optimizer not in OPTIMIZERS,
        "optim.nesterov=true: only --opt sgd has it there": bool(values.get("optim.nesterov")),
        f"schedule={schedule}: it has cosine and step": schedule not in ("cosine", "step"),
        "schedule.interval=step: its learning rate moves once an epoch": values.get("schedule.interval") == "step",
        f"accumulate={values['accumulate']}: every batch is a step": values["accumulate"] > 1,
        "ema_decay: it keeps no average of the weights": values["ema_decay"] > 0,
        "eval_every: it evaluates after every epoch": values["eval_every"] != 1,
        "model.weights: it starts from a file only to train the classifier alone (./model_best.pth.tar)": (
            bool(values["model.weights"]) and not values["model.freeze"]
        ),
        "model.freeze=true without model.weights": values["model.freeze"] and not values["model.weights"],
        "data.augment.randaugment: it has none": values["data.augment.randaugment"] > 0,
        "data.on_error=skip: an image that can't be read ends it": values.get("data.on_error") == "skip",
        "data.cache_val=true: it decodes the evaluation images every time": bool(values.get("data.cache_val")),
        "compile=true: it has no torch.compile": bool(values.get("compile.backend")),
        "resume: it can't go on in the middle of an epoch, nor from files of this project": bool(values["resume"]),
        "logger=wandb: it writes summary.csv": bool(values.get("logger.wandb._target_")),
        "sync_bn=true on one card": values["sync_bn"] and values["device.count"] == 1,
    }
    return [why for why, holds in wanted.items() if holds]
