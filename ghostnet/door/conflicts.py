"""Choices that contradict each other, found before torch is loaded: what two keys of a config can't be at once."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from ghostnet.door.drivers import card_without_bf16
from ghostnet.schema import Fault, show

Values = dict[str, Any]
"""A resolved config, flat: dotted key -> value. Values of a wrong type are told elsewhere, and pass here."""


def conflicts(values: Values) -> list[Fault]:
    """Those that hold on any machine, each with its way out."""
    return [fault for find in FINDERS for fault in find(values)]


def lacks(values: Values) -> list[Fault]:
    """What this machine hasn't, as far as can be told without torch; jobs that run elsewhere may find it there."""
    return [*apex(values), *bf16(values)]


def _number(values: Values, key: str) -> float | None:
    """A value that is a number, else None."""
    value = values.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is(values: Values, group: str, name: str) -> bool:
    """Whether a group's constructor has that name."""
    return str(values.get(f"{group}._target_")).rpartition(".")[2] == name


def image_size(values: Values) -> Iterator[Fault]:
    """One size of the input, for the loader and for the model."""
    size, same = values.get("data.image_size"), values.get("data.preprocessing.image_size")
    if size != same:
        text = f"data.preprocessing.image_size={show(same)}: must equal data.image_size={show(size)}; set that alone."
        yield Fault(("data.preprocessing.image_size", "data.image_size"), text)


def cards(values: Values) -> Iterator[Fault]:
    """As many cards as are counted, each once."""
    ids, count = values.get("device.ids"), values.get("device.count")
    if isinstance(ids, list) and len(ids) != count:
        text = f"device.ids={ids}: names {len(ids)} cards, but device.count is {count}."
        yield Fault(("device.ids", "device.count"), text)
    elif isinstance(ids, list) and len(set(map(str, ids))) < len(ids):
        yield Fault(("device.ids",), f"device.ids={ids}: names a card twice.")


def decay(values: Values) -> Iterator[Fault]:
    """A schedule of steps takes one."""
    first, epochs = _number(values, "schedule.decay_epochs"), _number(values, "epochs")
    if first is not None and epochs is not None and first >= epochs >= 1 and values.get("schedule.decay_rate") != 1:
        yield Fault(
            ("schedule.decay_epochs", "epochs"),
            f"schedule.decay_epochs={first:g}: the training ends before the first decay, epochs={epochs:g}. Give fewer "
            "schedule.decay_epochs, or schedule.decay_rate=1 for a rate that stays.",
        )


def momentum(values: Values) -> Iterator[Fault]:
    """Nesterov's step looks ahead by the momentum."""
    if values.get("optim.nesterov") is True and values.get("optim.momentum") == 0:
        text = "optim.nesterov=true: needs a momentum, but optim.momentum is 0. Give one, or optim.nesterov=false."
        yield Fault(("optim.nesterov", "optim.momentum"), text)


def compiled(values: Values) -> Iterator[Fault]:
    """What apex does to a model can't be compiled."""
    if values.get("compile.backend") and _is(values, "amp", "Apex"):
        text = "compile=true: apex changes the model in a way that can't be compiled. Give amp=o2, which is alike."
        yield Fault(("compile.backend", "amp"), text)


def synchronized(values: Values) -> Iterator[Fault]:
    """BatchNorm over the global batch is made for cards."""
    if values.get("sync_bn") is True and values.get("device.kind") == "cpu":
        text = "sync_bn=true: torch's SyncBatchNorm needs cards. Give sync_bn=false, or a device with cards."
        yield Fault(("sync_bn", "device.kind"), text)


def apex(values: Values) -> Iterator[Fault]:
    """Apex is no part of torch."""
    if _is(values, "amp", "Apex") and importlib.util.find_spec("apex") is None:
        text = "amp=apex: Ascend's apex is not installed (github.com/Ascend/apex). amp=o2 does the same without it."
        yield Fault(("amp",), text)


def bf16(values: Values) -> Iterator[Fault]:
    """Bfloat16 on a card that has it; where the driver can't tell, torch does, before data are read."""
    kind, ids, count = values.get("device.kind"), values.get("device.ids"), values.get("device.count")
    if not _is(values, "amp", "Bf16") or not isinstance(count, int) or not isinstance(ids, list | None):
        return
    if name := card_without_bf16(str(kind), ids or list(range(count))):
        text = f"amp=bf16: {name} has no bfloat16. Give amp=fp16 or amp=o2, or another device."
        yield Fault(("amp", "device.kind"), text)


def batch(values: Values) -> Iterator[Fault]:
    """BatchNorm takes the spread of several values, and a step takes a batch."""
    size, side = _number(values, "data.batch_size"), _number(values, "data.image_size")
    if size == 1 and side is not None and side <= LAST_STRIDE and "epochs" in values:
        yield Fault(
            ("data.batch_size", "data.image_size"),
            f"data.batch_size=1: at data.image_size={side:g} the last BatchNorm sees a single value of each channel. "
            "Give a data.batch_size of 2 or more.",
        )
    images = _number(values, "data.dataset.num_train")
    factors = [_number(values, key) for key in ("data.batch_size", "device.count", "accumulate")]
    if images is None or None in factors:
        return
    step = factors[0] * factors[1] * factors[2]  # type: ignore[operator]
    if step > images:
        yield Fault(
            ("data.batch_size", "data.dataset.num_train"),
            f"data.batch_size={factors[0]:g}: a step takes {step:g} images, data.batch_size × device.count × "
            f"accumulate, but there are {images:g} to train on. Give a smaller data.batch_size.",
        )


def classes(values: Values) -> Iterator[Fault]:
    """No fewer classes than the data have."""
    told, there = _number(values, "model.num_classes"), _number(values, "data.dataset.num_classes")
    if told is not None and there is not None and told < there:
        text = f"model.num_classes={told:g}: the data have {there:g} classes. Give as many, or null for their number."
        yield Fault(("model.num_classes", "data.dataset.num_classes"), text)


LAST_STRIDE = 32
"""Pixels of the input to one of the last stage."""


def skipping(values: Values) -> Iterator[Fault]:
    """Apex alone decides which steps it skips."""
    if values.get("on_nan") == "skip" and _is(values, "amp", "Apex"):
        text = (
            "on_nan=skip: apex does not let others skip its steps. Give amp=o2, which does the same without it, or "
            "on_nan=rewind."
        )
        yield Fault(("on_nan", "amp._target_"), text)


FINDERS: tuple[Callable[[Values], Iterator[Fault]], ...] = (
    *(image_size, cards, decay, momentum, compiled, synchronized, batch, classes, skipping),
)
