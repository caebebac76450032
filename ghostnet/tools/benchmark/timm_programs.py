"""What timm's train.py and validate.py do, which its wheel lacks, by its public API: their order, their defaults."""

import contextlib
import time
from pathlib import Path
from typing import Any

from ghostnet.tools.benchmark.child import device_of, window
from ghostnet.tools.benchmark.subject import Metrics

NAMES = {0.5: "ghostnet_050", 1.0: "ghostnet_100", 1.3: "ghostnet_130"}
WORKERS = 4
"""The default of timm's train.py."""


class Precision:
    """timm's native amp as near to ours as it comes."""

    def __init__(self, cfg: dict[str, Any], device: Any) -> None:  # noqa: ANN401 (a torch.device)
        import torch
        from timm.utils import NativeScaler

        name = cfg["amp"]["_target_"].rpartition(".")[2]
        half = {"Amp": None, "Bf16": torch.bfloat16}.get(name, torch.float16)
        self.dtype = torch.bfloat16 if half and device.type == "cpu" else half
        self.device = device
        self.scaler = NativeScaler(device=device.type) if self.dtype == torch.float16 else None

    def __call__(self) -> Any:  # noqa: ANN401 (a context manager)
        """Where the forward pass runs."""
        import torch

        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def update(self, loss: Any, optimizer: Any, model: Any) -> None:  # noqa: ANN401 (tensors and what holds them)
        """Backward and optimizer."""
        if self.scaler:
            self.scaler(loss, optimizer, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()


class Training:
    """A training as timm's train.py sets it up by default: model, optimizer, schedule, loss."""

    def __init__(self, cfg: dict[str, Any], num_classes: int) -> None:
        import timm
        from timm.loss import LabelSmoothingCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2

        self.cfg, self.device = cfg, device_of(cfg, tuned=False)
        self.model = timm.create_model(NAMES[cfg["model"]["width"]], num_classes=num_classes, drop_rate=0.0)
        self.model.to(self.device)
        lr = 0.1 * cfg["data"]["batch_size"] / 256
        self.optimizer = create_optimizer_v2(self.model, opt="sgd", lr=lr, weight_decay=2e-5, momentum=0.9)
        self.schedule, _ = create_scheduler_v2(self.optimizer, num_epochs=300, warmup_epochs=5, warmup_lr=1e-5)
        self.loss = LabelSmoothingCrossEntropy(0.1).to(self.device)
        self.precision, self.done = Precision(cfg, self.device), 0

    def step(self, images: Any, labels: Any) -> float:  # noqa: ANN401 (tensors)
        """One update -> its loss, read as train.py reads it every time."""
        with self.precision():
            loss = self.loss(self.model(images), labels)
        self.precision.update(loss, self.optimizer, self.model)
        return float(loss.item())

    def loaders(self, root: str) -> list[Any]:
        """Of both splits, with train.py's defaults, and our size of images and batches."""
        from timm.data import create_dataset, create_loader

        data = self.cfg["data"]
        read_all_formats()
        shape, preprocessing = (3, data["image_size"], data["image_size"]), data["preprocessing"]
        train, val = (create_dataset("", root, split, is_training=split == "train") for split in ("train", "val"))
        same = {"mean": preprocessing["mean"], "std": preprocessing["std"], "device": self.device}
        same |= {"num_workers": WORKERS, "batch_size": data["batch_size"], "pin_memory": False}
        return [
            create_loader(train, shape, is_training=True, interpolation="random", color_jitter=0.4, **same),
            create_loader(
                val, shape, interpolation=preprocessing["interpolation"], crop_pct=preprocessing["crop"], **same
            ),
        ]


def read_all_formats() -> None:
    """Have timm take the files that our ImageFolder takes."""
    from timm.data.readers import set_img_extensions

    from ghostnet.data.index import EXTENSIONS

    set_img_extensions(EXTENSIONS)


def step(spec: dict[str, Any]) -> Metrics:
    """Steps of train.py's loop over one batch that is on the device already."""
    import torch

    cfg, data = spec["cfg"], spec["cfg"]["data"]
    classes = cfg["model"]["num_classes"] or data["dataset"].get("num_classes", 1000)
    training = Training(cfg, classes)
    side, size = data["image_size"], data["batch_size"]
    images = torch.randn(size, 3, side, side, device=training.device)
    labels = torch.randint(classes, (size,), device=training.device)
    training.model.train()
    return window(iter(lambda: training.step(images, labels), None), size, spec["seconds"], training.device, 5)


def train(spec: dict[str, Any]) -> Metrics:
    """One epoch and its evaluation and checkpoint."""
    from timm.utils import CheckpointSaver, random_seed

    random_seed(42)
    training = Training(spec["cfg"], spec["num_classes"])
    train_loader, val_loader = training.loaders(spec["root"])
    place = Path(spec["folder"]) / "output"
    place.mkdir()
    saver = CheckpointSaver(training.model, training.optimizer, checkpoint_dir=str(place), recovery_dir=str(place))
    training.model.train()
    start = time.perf_counter()
    for number, (images, labels) in enumerate(train_loader, 1):
        training.step(images, labels)
        training.schedule.step_update(number)
        if number == 1 and spec["first_step_only"]:
            (place / "first_step").touch()
            time.sleep(60)
    loop = number * spec["cfg"]["data"]["batch_size"] / (time.perf_counter() - start)
    found = validate(training.model, val_loader, training.precision)
    training.schedule.step(1, found["top1"])
    saver.save_checkpoint(0, metric=found["top1"])
    return {"loop": loop}


def evaluate(spec: dict[str, Any]) -> Metrics:
    """validate.py, with as many workers as there are CPUs, over val with the weights and preprocessing of ours."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config

    from ghostnet.device import cpu_count

    cfg, data, device = spec["cfg"], spec["cfg"]["data"], device_of(spec["cfg"], tuned=False)
    model = timm.create_model(NAMES[cfg["model"]["width"]], num_classes=spec["num_classes"])
    model.load_state_dict(torch.load(spec["weights"], weights_only=True))
    shape, ours = (3, data["image_size"], data["image_size"]), data["preprocessing"]
    wanted = {"input_size": shape, "crop_pct": ours["crop"], "mean": ours["mean"], "std": ours["std"]}
    config = resolve_data_config(wanted | {"interpolation": ours["interpolation"]}, model=model)
    model.to(device)
    read_all_formats()
    dataset = create_dataset("", root=spec["root"], split="val")
    loader = create_loader(
        dataset,
        config["input_size"],
        data["eval_batch_size"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=cpu_count(),
        device=device,
    )
    return validate(model, loader, Precision(cfg, device), spec["labels"])


def validate(model: Any, loader: Any, precision: Precision, known: list[int] | None = None) -> Metrics:  # noqa: ANN401
    """Acc@1, Acc@5 in per cent, loss, images a second. known: the model's class of each class of the folder."""
    import torch
    from timm.utils import accuracy

    model.eval()
    classes = None if known is None else torch.tensor(known, device=precision.device)
    hits, loss, count, start = [0, 0], 0.0, 0, time.perf_counter()
    with torch.inference_mode():
        for images, labels in loader:
            labels = labels if classes is None else classes[labels]
            with precision():
                output = model(images)
                mean = torch.nn.functional.cross_entropy(output, labels)
            shares = accuracy(output, labels, topk=(1, 5))
            hits = [hit + round(len(labels) * float(share) / 100) for hit, share in zip(hits, shares, strict=True)]
            loss, count = loss + float(mean) * len(labels), count + len(labels)
    passed = time.perf_counter() - start
    top1, top5 = (100 * hit / count for hit in hits)
    return {"top1": top1, "top5": top5, "loss": loss / count, "loop": count / passed}
