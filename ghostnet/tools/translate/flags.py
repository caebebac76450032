"""The flags of the reference's programs: what each did there, its default, and its home here.

The reference: Ascend ModelZoo's GhostNet for PyTorch, train_ghostnet_{1p,8p}.py and validate_ghostnet.py. It has two
versions, named after their PyTorch, which take the same flags.
"""

from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["home", "nothing", "itself", "none"]
"""home: a key here; nothing: did nothing there; itself: here without being asked; none: can't be had here."""
Kind = Literal["switch", "int", "float", "floats", "ints", "str"]


@dataclass(frozen=True)
class Flag:
    """One flag; `why` says what became of it where it has no key."""

    names: tuple[str, ...]
    fate: Fate
    kind: Kind
    default: Any = None
    """Of the reference's program, where the flag is not given. Version.default() knows those that depend on it."""
    key: str = ""
    """Here; '' where it takes more than one key or another value."""
    why: str = ""
    of: Literal["both", "train", "evaluate"] = "both"

    @property
    def name(self) -> str:
        """The long name."""
        return max(self.names, key=len)


def _home(names: str, kind: Kind, default: Any, key: str = "", of: Any = "train") -> Flag:  # noqa: ANN401 (of any kind)
    return Flag(tuple(names.split()), "home", kind, default, key, of=of)


def _gone(fate: Fate, names: str, kind: Kind, why: str, default: Any = None, of: Any = "train") -> Flag:  # noqa: ANN401
    return Flag(tuple(names.split()), fate, kind, default, why=why, of=of)


_EFFICIENTNET = "it is for other models than GhostNet"
_CREATED = "GhostNet was made without it"
_LOADER = "the loader here is always of that kind"

FLAGS = (
    # Model
    _home("--width", "float", 1.0, "model.width", "both"),
    _home("--drop", "float", 0.2, "model.dropout"),
    _home("--num-classes", "int", None, "model.num_classes", "both"),
    _home("--pretrained", "switch", False),
    _gone("nothing", "--model -m", "str", "the model was always GhostNet; its width is --width", of="both"),
    _gone("nothing", "--drop", "float", "evaluation drops nothing", of="evaluate"),
    _gone("nothing", "--pretrained", "switch", "the weights are those of --checkpoint", of="evaluate"),
    _gone("nothing", "--initial-checkpoint", "str", f"{_CREATED}. Here: model.weights=FILE"),
    _gone("nothing", "--gp", "str", _CREATED, of="both"),
    *(_gone("nothing", f"--drop-{what}", "float", _CREATED) for what in ("connect", "path", "block")),
    _gone("nothing", "--bn-tf", "switch", _EFFICIENTNET),
    *(_gone("nothing", f"--bn-{what}", "float", _EFFICIENTNET) for what in ("momentum", "eps")),
    _gone("none", "--torchscript", "switch", "no TorchScript. Here: compile=true", of="both"),
    _gone("none", "--split-bn", "switch", "no BatchNorm of its own for each augmentation split"),
    # Optimizer and schedule
    _home("--opt", "str", "sgd"),
    _home("--momentum", "float", 0.9, "optim.momentum"),
    _home("--weight-decay", "float", 1e-4, "optim.weight_decay"),
    _home("--opt-eps", "float", None, "optim.eps"),
    _home("--opt-betas", "floats", None, "optim.betas"),
    _home("--clip-grad", "float", None, "clip_grad_norm"),
    _home("--lr", "float", 0.4),
    _home("--sched", "str", "step"),
    _home("--epochs", "int", 200, "epochs"),
    _home("--warmup-lr", "float", 1e-4, "schedule.warmup_lr"),
    _home("--warmup-epochs", "int", 3, "schedule.warmup_epochs"),
    _home("--cooldown-epochs", "int", None, "schedule.cooldown_epochs"),
    _home("--min-lr", "float", 1e-5, "schedule.min_lr"),
    _home("--decay-epochs", "float", 30.0, "schedule.decay_epochs"),
    _home("--decay-rate --dr", "float", 0.1, "schedule.decay_rate"),
    _gone("none", "--lr-noise", "floats", "no noise on the learning rate"),
    *(_gone("nothing", f"--lr-noise-{what}", "float", "without --lr-noise") for what in ("pct", "std")),
    _gone("none", "--lr-cycle-mul", "float", "a schedule has one cycle", 1.0),
    _gone("none", "--lr-cycle-limit", "int", "a schedule has one cycle", 1),
    _gone("nothing", "--patience-epochs", "int", "it is for --sched plateau"),
    _gone("none", "--start-epoch", "int", "a run goes on at the step that its checkpoint holds"),
    # Data
    _home("-b --batch-size", "int", 1024, "data.batch_size"),
    _home("-b --batch-size", "int", 256, "data.eval_batch_size", "evaluate"),
    _home("-vb --validation-batch-size-multiplier", "int", 1),
    _home("-j --j --workers", "int", 4, "data.workers", "both"),
    _home("--img-size", "int", None, "data.image_size", "both"),
    _home("--input-size", "ints", None, "", "both"),
    _home("--crop-pct", "float", None, "data.preprocessing.crop", "both"),
    _home("--mean", "floats", None, "data.preprocessing.mean", "both"),
    _home("--std", "floats", None, "data.preprocessing.std", "both"),
    _home("--interpolation", "str", None, "data.preprocessing.interpolation", "both"),
    _home("--scale", "floats", [0.08, 1.0], "data.augment.scale"),
    _home("--ratio", "floats", [3 / 4, 4 / 3], "data.augment.ratio"),
    _home("--hflip", "float", 0.5, "data.augment.hflip"),
    _home("--vflip", "float", 0.0, "data.augment.vflip"),
    _home("--color-jitter", "float", 0.4, "data.augment.color_jitter"),
    _home("--reprob", "float", 0.0, "data.augment.erasing"),
    _home("--train-interpolation", "str", "random"),
    _home("--mixup", "float", 0.0, "data.mix.mixup"),
    _home("--cutmix", "float", 0.0, "data.mix.cutmix"),
    _home("--smoothing", "float", 0.1, "label_smoothing"),
    _gone("none", "--cutmix-minmax", "floats", "the share of CutMix is drawn by its alpha"),
    _gone("none", "--mixup-prob", "float", "every batch is mixed", 1.0),
    _gone("none", "--mixup-switch-prob", "float", "of both, one is drawn with equal chances", 0.5),
    _gone("none", "--mixup-mode", "str", "one share for a batch", "batch"),
    _gone("none", "--mixup-off-epoch", "int", "mixing goes on to the end", 0),
    _gone("nothing", "--recount", "int", "random erasing was never switched on"),
    _gone("nothing", "--resplit", "switch", "random erasing was never switched on"),
    _gone("none", "--no-aug", "switch", "no single switch: data.augment.* turns each part off"),
    _gone("none", "--aug-splits", "int", "no augmentation splits", 0),
    _gone("none", "--jsd", "switch", "no augmentation splits, so no loss over them"),
    _gone("none", "--dataset -d", "str", "a folder is read as ImageNet's layout; other data: data=…", "", "both"),
    _gone("none", "--train-split", "str", "the folder of training images is train", "train"),
    _gone("none", "--val-split", "str", "the folder of evaluation images is val", "validation"),
    _gone("none", "--split", "str", "the folder of evaluation images is val", "validation", "evaluate"),
    _gone("itself", "--no-prefetcher", "switch", _LOADER, of="both"),
    _gone("itself", "--use-multi-epochs-loader", "switch", _LOADER),
    _gone("itself", "--pin-mem", "switch", "batches are pinned beside a card", of="both"),
    _gone("itself", "--channels-last", "switch", "the memory format is the device's choice", of="both"),
    # Precision, devices
    _home("--amp", "switch", False, "", "both"),
    _home("--apex-amp", "switch", False, "", "both"),
    _home("--native-amp", "switch", False, "", "both"),
    _home("--npu", "int", None),
    _home("--world_size", "int", 1),
    _home("--sync-bn", "switch", False, "sync_bn"),
    _home("--dist-bn", "str", "", "dist_bn"),
    _home("--seed", "int", 42, "seed"),
    _gone("itself", "--local_rank", "str", "device.count ranks are started, each with its number"),
    _gone("nothing", "--distributed", "switch", "it was overwritten by whether WORLD_SIZE is set"),
    _gone("nothing", "--dist-url", "str", "it was not read"),
    _gone("nothing", "--dist-backend", "str", "it was not read"),
    _gone("none", "--num-gpu", "int", "evaluation over several cards: device=npu_8p", 1, "evaluate"),
    # What is left behind
    _home("--log-interval", "int", 50, "log_every"),
    _home("--recovery-interval", "int", 0, "save_every"),
    _home("--resume", "str", None, "resume"),
    _home("--output", "str", None, "hydra.run.dir"),
    _gone("none", "--no-resume-opt", "switch", "a run goes on with its optimizer; weights alone: model.weights=FILE"),
    _gone("none", "--checkpoint-hist", "int", "a run keeps best.pt, and of its last saves as many as keep says"),
    _gone("none", "--eval-metric", "str", "the best epoch is that of the best Acc@1", "top1"),
    _gone("none", "--tta", "int", "no augmentation of evaluation images", 0),
    _gone("none", "--save-images", "switch", "batches are not written as pictures"),
    _gone("none", "-c --config", "str", "give its values as flags; with 8 cards it crashed there"),
    # Evaluation
    _home("--checkpoint", "str", None, "ckpt", "evaluate"),
    _home("--use-ema", "switch", False, "ema", "evaluate"),
    _gone("none", "--log-freq", "int", "evaluation tells its result at the end", 10, "evaluate"),
    _gone("none", "--class-map", "str", "classes are told by their folders' names", "", "evaluate"),
    _gone("none", "--real-labels", "str", "no ReaL labels", "", "evaluate"),
    _gone("none", "--valid-labels", "str", "no subset of the labels", "", "evaluate"),
    _gone("none", "--results-file", "str", "the result is the last line printed, as JSON", "", "evaluate"),
    _gone("none", "--legacy-jit", "switch", "no TorchScript", of="evaluate"),
    _gone("none", "--tf-preprocessing", "switch", "no preprocessing of TensorFlow", of="evaluate"),
    _gone("nothing", "--no-test-pool", "switch", "it is for larger images than the model was made for", of="evaluate"),
)

OPTIMIZERS = {
    "npufusedsgd": "fused_sgd", "sgd": "sgd", "nesterov": "sgd", "momentum": "sgd",
    "adamw": "adamw", "rmsprop": "rmsprop",
}  # fmt: skip
"""--opt -> optim group; sgd and nesterov: with optim.nesterov=true."""
OWN_OF = {
    "fused_sgd": ("lr", "momentum", "weight_decay", "nesterov"),
    "sgd": ("lr", "momentum", "weight_decay", "nesterov"),
    "rmsprop": ("lr", "momentum", "weight_decay", "eps"),
    "adamw": ("lr", "weight_decay", "eps", "betas"),
}
"""The keys of each optimizer that the reference's flags set."""
SCRIPTS = {
    "train_full_1p.sh": (1, {"--epochs": 40}, "full_1p"),
    "train_performance_1p.sh": (1, {"--epochs": 2, "--cooldown-epochs": 0}, "performance_1p"),
    "train_full_8p.sh": (8, {"--epochs": 400}, "full_8p"),
    "train_performance_8p.sh": (8, {"--epochs": 2, "--cooldown-epochs": 0}, "performance_8p"),
}
"""Its scripts: cards, the flags in which they differ, the experiment here."""
EVALUATE = "train_eval_1p.sh"


@dataclass(frozen=True)
class Version:
    """What one version of the reference has of its own."""

    results: str
    """Those it was published with, and when."""
    cooldown: int
    """The default of --cooldown-epochs."""
    loss_scale: float | str
    """Of its O2."""
    environment: str
    """The file that its training scripts read variables from; in a line it tells the version.

    The name of the interpreter does not: users type either, whichever version they have.
    """

    def default(self, flag: Flag) -> Any:  # noqa: ANN401 (of any kind)
        """The value of a flag that is not given."""
        return self.cooldown if flag.name == "--cooldown-epochs" else flag.default


VERSIONS = {
    "1.5": Version("73.3796 % at 4,329 img/s on 8 cards, March 2022", 10, 128.0, "env.sh"),
    "1.8": Version("73.129 % at 9,559 img/s on 8 cards, August 2022", 2, "dynamic", "env_npu.sh"),
}
ASSUMED = "1.8"
"""The later version, whose results are the targets of the experiments here."""
RECIPE: dict[str, Any] = {
    "--opt": "npufusedsgd", "--weight-decay": 4e-5, "--momentum": 0.9, "--sched": "cosine", "--warmup-lr": 1e-6,
    "--warmup-epochs": 4, "--drop": 0.2, "--clip-grad": 2.0, "-b": 1024, "--amp": True,
}  # fmt: skip
"""The flags that all training scripts give."""


def flags(program: str) -> dict[str, Flag]:
    """All spellings of the flags of train or evaluate."""
    return {name: flag for flag in FLAGS if flag.of in ("both", program) for name in flag.names}
