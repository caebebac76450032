"""benchmark evaluate, train, start, sweep: whole commands of ours, and timm's for the same work, same pictures."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ghostnet.tools.benchmark import data
from ghostnet.tools.benchmark.peers import absent
from ghostnet.tools.benchmark.subject import Finished, Metrics, Subject, child, program
from ghostnet.tools.benchmark.timm_programs import NAMES

PART = ("epochs=1", "schedule.warmup_epochs=0", "schedule.cooldown_epochs=0")
"""One epoch, whatever the command's words say."""


def evaluate(
    cfg: dict[str, Any], words: list[str], ckpt: str | None, images: int | None, peers: bool, place: Path
) -> list[Subject]:
    """evaluate.py, and timm's validate.py with the same weights."""
    weights = _Weights(cfg, words, ckpt, place)
    root = data.folder(weights.cfg, images, place / "data")
    own = [*words, f"ckpt={weights.ckpt}", *([f"data.root={root}"] if images else []), *weights.words]
    count = sum(1 for path in (root / "val").glob("*/*") if not path.name.startswith("."))

    def read(finished: Finished) -> Metrics:
        found = json.loads(finished.text("stdout").splitlines()[-1])
        return _whole(finished, found["images"]) | {
            "top1": found["top1"],
            "top5": found["top5"],
            "loss": found["loss"],
            "loop": found["fps"],
        }

    spec = {"cfg": weights.cfg, "root": str(root), "weights": str(weights.plain), "num_classes": weights.num_classes}
    timm = _whole_child("timm", "timm_programs.evaluate", spec | {"labels": weights.labels(root)}, count)
    return [Subject("evaluate.py", lambda folder: program("evaluate.py", *own), read), *([timm] if peers else [])]


class _Weights:
    """Weights for both: the checkpoint's, or random ones whose BatchNorm has seen some pictures."""

    def __init__(self, cfg: dict[str, Any], words: list[str], ckpt: str | None, place: Path) -> None:
        """cfg: the command's. The state dict for timm is written to place."""
        import torch

        from ghostnet import checkpoint
        from ghostnet.models.weights import read_file, read_weights

        self.cfg, self.words, self.classes, self.plain = cfg, [], None, place / "weights.pt"
        place.mkdir(parents=True, exist_ok=True)
        if ckpt is None:
            self.ckpt, self.num_classes = self.plain, _random(cfg, self.plain)
            self.words = [f"model.num_classes={self.num_classes}"]
            return
        self.ckpt = checkpoint.find(ckpt, checkpoint.BEST)
        saved = read_file(self.ckpt)
        if checkpoint.is_own(saved):
            from omegaconf import OmegaConf

            from evaluate import with_saved

            self.cfg = with_saved(OmegaConf.create(cfg | {"ckpt": str(self.ckpt)}), saved["config"], words)
            self.classes = saved["classes"]
            state = saved["model"] if saved["ema"] is None or cfg["ema"] is False else saved["ema"]
        else:
            state = read_weights(self.ckpt)
        self.num_classes = len(state["classifier.bias"])
        torch.save(state, self.plain)

    def labels(self, root: Path) -> list[int] | None:
        """The model's class of each class folder, by name as evaluate.py has it; None: their order."""
        names = sorted(path.name for path in (root / "val").iterdir() if path.is_dir())
        if self.classes is None or not set(names) <= set(self.classes):
            return None
        return [self.classes.index(name) for name in names]


def _random(cfg: dict[str, Any], path: Path) -> int:
    """Write random weights whose BatchNorm has seen some of the pictures -> their number of classes."""
    import torch

    from ghostnet.config import build, build_model
    from ghostnet.seeding import seed_init

    dataset, preprocessing = build(cfg["data"]["dataset"], "val"), build(cfg["data"]["preprocessing"])
    count = cfg["model"]["num_classes"] or len(dataset.classes)
    seed_init(42)
    model = build_model(cfg["model"], count).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # this one batch's statistics
    chosen = [preprocessing(dataset.image(index * len(dataset) // 16)) for index in range(16)]
    pictures = [torch.from_numpy(array.copy()) for array in chosen]
    batch = torch.stack([p if p.ndim == 3 else p[:, :, None].expand(-1, -1, 3) for p in pictures])
    with torch.no_grad():
        model(preprocessing.normalize(batch))
    torch.save(model.state_dict(), path)
    return int(count)


def train(
    cfg: dict[str, Any], words: list[str], timm: Path | None, images: int | None, peers: bool, place: Path
) -> list[Subject]:
    """One epoch of train.py with its evaluation and checkpoints, and of timm's train.py."""
    root = data.folder(cfg, images, place / "data")
    counts = [sum(1 for _ in (root / split).glob("*/*")) for split in data.SPLITS]
    size = cfg["data"]["batch_size"]
    count, own = counts[0] // size * size, [*words, *PART, *([f"data.root={root}"] if images else [])]

    def command(folder: Path) -> list[str]:
        return program("train.py", *own, f"hydra.run.dir={folder / 'run'}")

    def read(finished: Finished) -> Metrics:
        result = json.loads(finished.text("run/result.json"))
        metrics = _whole(finished, count) | {"loop": result["fps"]}
        return metrics | ({"card_memory": max(result["memory"])} if result["device"] != "cpu" else {})

    ours = Subject("train.py", command, read)
    return [ours, *([_timm_train("timm", cfg, timm, root, count)] if peers else [])]


def _timm_train(
    name: str,
    cfg: dict[str, Any],
    timm: Path | None,
    root: Path,
    count: int,
    **more: Any,  # noqa: ANN401
) -> Subject:
    """The user's copy of timm's train.py, or what we have written like it."""
    first, num_classes = "until" in more, sum(1 for path in (root / "train").iterdir() if path.is_dir())
    if timm is not None:
        return Subject(
            f"{name}, {timm.name}",
            lambda folder: [sys.executable, str(timm), *_timm_words(cfg, root, num_classes, first), str(folder)],
            lambda finished: _whole(finished, count),
            peer="timm",
            **more,
        )
    spec = {"cfg": cfg, "root": str(root), "num_classes": num_classes, "first_step_only": first}

    return _whole_child(name, "timm_programs.train", spec, count, **more)


def _timm_words(cfg: dict[str, Any], root: Path, num_classes: int, first: bool) -> list[str]:
    """The command line of timm's train.py for our pictures, batch and size; all else is its default."""
    from ghostnet.tools.benchmark.child import device_of

    node, given = cfg["data"], cfg["data"]["preprocessing"]
    amp = cfg["amp"]["_target_"].rpartition(".")[2]
    device = device_of(cfg, tuned=False)
    words = ["--data-dir", str(root), "--train-split", "train", "--val-split", "val", "--device", str(device)]
    words += ["--model", NAMES[cfg["model"]["width"]], "--num-classes", str(num_classes), "-b", str(node["batch_size"])]
    words += ["--img-size", str(node["image_size"]), "--crop-pct", str(given["crop"])]
    words += ["--mean", *map(str, given["mean"]), "--std", *map(str, given["std"])]
    words += ["--epochs", "1", "--warmup-epochs", "0", *(["--log-interval", "1"] if first else [])]
    if amp != "Amp":
        words += ["--amp", "--amp-dtype", "bfloat16" if amp == "Bf16" or device.type == "cpu" else "float16"]
    return [*words, "--output"]


def start(cfg: dict[str, Any], words: list[str], timm: Path | None, peers: bool, place: Path) -> list[Subject]:
    """Seconds to help, to the config, to the messages about faults, and to the first optimizer step."""
    near = _command("train.py --help", ["--help"])
    subjects = [near, _command("train.py --cfg job", ["--cfg", "job", *words])]
    subjects += [_command("train.py with a typo", ["optim.lrr=1", *words], may_fail=True)]
    jobs = ["-m", *words, "optim.lr=range(0.1,1.1,0.1)", "seed=range(10)", "epochs=0"]
    subjects += [_command("train.py, 100 jobs with a fault", jobs, may_fail=True)]

    def command(folder: Path) -> list[str]:
        return program("train.py", *words, "log_every=1", f"hydra.run.dir={folder / 'run'}")

    first = "train.py to the first step"
    subjects.append(Subject(first, command, _seconds, until=_has_row))
    if not peers:
        return subjects
    root = data.folder(cfg, None, place / "data")
    if timm is not None:
        help_of = [sys.executable, str(timm), "--help"]
        subjects.append(Subject("timm's --help", lambda folder: help_of, _seconds, peer="timm", against=near.name))
    title = "timm to the first step"
    return [*subjects, _timm_train(title, cfg, timm, root, 0, against=first, until=_has_stepped)]


JOBS = 8
"""Of the sweeps that are measured."""
SMALL = [
    *("data=synthetic", "data.dataset.num_train=64", "data.dataset.num_val=64", "data.image_size=32"),
    *("data.batch_size=32", "data.eval_batch_size=64", "model.width=0.1", *PART),
]


def sweep(words: list[str]) -> list[Subject]:
    """What a job of a sweep costs beside its run: seconds of all less those of the runs, for each job."""

    def read(finished: Finished) -> Metrics:
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in finished.folder.glob("sweep/*/result.json")]
        at_once = 2 if (finished.folder / "sweep" / ".slots").exists() else 1
        beside = at_once * finished.seconds - sum(run["seconds"] for run in runs)
        return _seconds(finished) | {"seconds": beside / len(runs), "jobs": len(runs)}

    def command(folder: Path, *more: str) -> list[str]:
        all_words = [*SMALL, *words, f"seed=range({JOBS})", f"hydra.sweep.dir={folder / 'sweep'}", *more]
        return program("train.py", "-m", *all_words)

    subjects = [Subject("a job beside its run, one process", command, read)]
    if not absent("joblib"):
        two = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
        subjects.append(Subject("the same, two at a time (joblib)", lambda folder: command(folder, *two), read))
    alone = program("train.py", *SMALL, *words)
    return [
        *subjects,
        Subject("train.py, the whole", lambda folder: [*alone, f"hydra.run.dir={folder / 'run'}"], _seconds),
    ]


def _command(name: str, words: list[str], **more: Any) -> Subject:  # noqa: ANN401 (fields of Subject)
    return Subject(name, lambda folder: program("train.py", *words), _seconds, **more)


def _has_row(folder: Path) -> bool:
    """Whether our run has written the row of its first step."""
    rows = folder / "run" / "metrics.jsonl"
    return rows.exists() and '"train/loss"' in rows.read_text(encoding="utf-8")


def _has_stepped(folder: Path) -> bool:
    """Whether timm's has taken its first step."""
    return (folder / "output" / "first_step").exists() or "Train: 0 [   0/" in (folder / "stderr").read_text(
        encoding="utf-8"
    )


def _seconds(finished: Finished) -> Metrics:
    return {"seconds": finished.seconds, "cpu_seconds": finished.cpu_seconds, "memory": finished.memory}


def _whole(finished: Finished, images: int) -> Metrics:
    """A whole command that took so many images, its start and end included."""
    if not images:
        return _seconds(finished)
    metrics = {"speed": images / finished.seconds, "memory": finished.memory, "seconds": finished.seconds}
    return metrics | {"cpu_seconds": 1000 * finished.cpu_seconds / images}


def _child_whole(finished: Finished, images: int) -> Metrics:
    """The same of a function of this package, with what it says itself."""
    return _whole(finished, images) | (json.loads(finished.text("metrics.json")) if images else {})


def _whole_child(name: str, function: str, spec: Any, images: int, **more: Any) -> Subject:  # noqa: ANN401 (as child)
    made = child(name, function, spec, peer="timm", **more)
    return replace(made, read=lambda finished: _child_whole(finished, images))


def fits_timm(cfg: dict[str, Any]) -> str | None:
    """Why timm can't do this model, None where it can."""
    width = cfg["model"].get("width")
    known = ", ".join(f"{name}" for name in NAMES)
    return None if width in NAMES else f"it has GhostNets of widths {known}, not {width}"
