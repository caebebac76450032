"""The schema read from the source against what Python itself says of the imported object; faults, a line each."""

import dataclasses
import importlib
import inspect
import math
import re
import sys
import typing
from typing import Any, Literal

import numpy as np
import pytest
from omegaconf import OmegaConf

from ghostnet import schema
from ghostnet.errors import ConfigError
from ghostnet.schema import (
    REQUIRED,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Parameter,
    Positive,
    PositiveInt,
    Probability,
    Share,
    describe,
    did_you_mean,
    faults,
    fields,
    signature,
)
from tests.conftest import REPOSITORY


def targets_in(node):
    if isinstance(node, dict):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for value in node.values():
            yield from targets_in(value)


TARGETS = sorted(
    {
        target
        for path in (REPOSITORY / "conf").rglob("*.yaml")
        for target in targets_in(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        if not target.startswith("hydra_plugins.")
    }
)


def imported(target):
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def reference(thing):
    """What inspect says of a function or class: name -> (type, default), without positional-only parameters."""
    hints = typing.get_type_hints(thing.__init__ if isinstance(thing, type) else thing, include_extras=True)
    return {
        name: (hints.get(name, Any), REQUIRED if p.default is inspect.Parameter.empty else p.default)
        for name, p in inspect.signature(thing).parameters.items()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }


def test_the_configs_name_targets():
    assert len(TARGETS) > 15


@pytest.mark.parametrize("target", TARGETS)
def test_signature_agrees_with_the_imported_object(target):
    ours = signature(target)
    assert {name: (p.type, p.default) for name, p in ours.items()} == reference(imported(target))


def test_every_config_holds_exactly_the_parameters_of_its_target():
    nodes = [
        node
        for group in ("data", "optim", "schedule", "amp")
        for path in (REPOSITORY / "conf" / group).glob("*.yaml")
        for config in [OmegaConf.to_container(OmegaConf.load(path), resolve=False)]
        for node in (config.values() if group == "data" else [config])
        if isinstance(node, dict)
    ]
    for node in nodes:
        assert set(node) - {"_target_"} == set(reference(imported(node["_target_"]))), node["_target_"]
    assert len(nodes) >= 25


SOURCE = '''
"""Cases that the project itself does not have yet; é in the source."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ghostnet.data.datasets import ImageFolder
from ghostnet.data.transforms import Mix
from ghostnet.schema import PositiveInt, Probability

Kind = Literal["a", "b"]


def everything(first, second="x", /, third: int = 3, *rest: int, fourth: Kind, fifth: str | None = None, **more):
    """Parameters of every sort."""


def bare(one, two=2, *, three=None):
    """No annotations."""


@dataclass
class Base:
    size: PositiveInt
    share: Probability = 0.5


@dataclass
class Child(Base):
    share: Probability = 0.25
    kind: Kind = "a"


class Constructed(Base):
    def __init__(self, split: str, /, only: float) -> None:
        pass


class Inherits(Constructed):
    pass


class Flowers(ImageFolder):
    pass


@dataclass(frozen=True)
class Mixer(Mix):
    extra: bool = False
'''


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A module beside the project's own, as a user adds it: ghostnet.extra."""
    import ghostnet

    package = tmp_path / "ghostnet"
    (package / "data").mkdir(parents=True)
    (package / "extra.py").write_text(SOURCE, encoding="utf-8")
    for name in ("schema.py", "data/datasets.py", "data/transforms.py"):
        (package / name).write_bytes((REPOSITORY / "ghostnet" / name).read_bytes())
    monkeypatch.setattr(schema, "__file__", str(package / "schema.py"))
    monkeypatch.setattr(ghostnet, "__path__", [*ghostnet.__path__, str(package)])
    signature.cache_clear()
    yield importlib.import_module("ghostnet.extra")
    signature.cache_clear()
    del sys.modules["ghostnet.extra"], ghostnet.extra


@pytest.mark.parametrize("name", ["everything", "bare", "Base", "Child", "Constructed", "Inherits", "Flowers", "Mixer"])
def test_signature_agrees_with_whatever_a_user_may_add(name, written):
    ours = signature(f"ghostnet.extra.{name}")
    assert {key: (p.type, p.default) for key, p in ours.items()} == reference(getattr(written, name))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.optim.SGD", "torch.optim.SGD is not in a module of this project"),
        ("os.system", "os.system is not in a module"),
        ("ghostnet.nowhere.X", "ghostnet.nowhere.X is not in a module"),
        ("ghostnet", "ghostnet is not in a module"),
        ("", " is not in a module"),
        ("ghostnet.data.datasets.ImageFoldr", r"has no ImageFoldr. Did you mean ImageFolder\?"),
        ("ghostnet.data.datasets.np", "has no np"),
    ],
)
def test_a_target_that_is_not_there_is_told(target, message):
    with pytest.raises(ConfigError, match=message):
        signature(target)


def test_reading_a_signature_imports_nothing_of_the_module():
    before = set(sys.modules)
    signature.cache_clear()
    signature("ghostnet.wandb.logger.Wandb")
    assert "wandb" not in set(sys.modules) - before


@dataclasses.dataclass
class Example:
    number: Positive
    names: list[str]
    maybe: PositiveInt | None = None
    group: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_fields_agree_with_dataclasses_fields():
    ours = fields(Example)
    assert list(ours) == [f.name for f in dataclasses.fields(Example)]
    assert ours["number"] == Parameter(Positive, REQUIRED)
    assert ours["maybe"] == Parameter(PositiveInt | None, None)


RIGHT = [
    (float, 1.5), (float, 2), (float, -3), (float, 0), (int, 2), (int, -2), (bool, True), (str, ""), (str, "1"),
    (Positive, 1e-9), (Positive, 3), (NonNegative, 0), (PositiveInt, 1), (NonNegativeInt, 0),
    (Probability, 0), (Probability, 1), (Share, 1), (Share, 0.01), (Fraction, 0), (Fraction, 0.99),
    (str | None, None), (str | None, "x"), (PositiveInt | None, 4), (Positive | Literal["dynamic"], "dynamic"),
    (Positive | Literal["dynamic"], 128), (Literal["a", "b"], "b"), (list[float], []), (list[float], [1, 2.5]),
    (list[int], [1]), (dict[str, Any], {"a": 1}), (Any, ...), (None, None),
]  # fmt: skip
WRONG = [
    (float, True, "a number"), (float, "1", "a number"), (float, math.inf, "a number"), (float, math.nan, "a number"),
    (float, 10**400, "a number"), (float, None, "a number"), (float, [1.0], "a number"),
    (int, True, "a whole number"), (int, 1.0, "a whole number"), (int, "1", "a whole number"),
    (bool, 1, "true or false"), (bool, "true", "true or false"), (str, 1, "text"), (str, None, "text"),
    (Positive, 0, "a number > 0"), (Positive, -1, "a number > 0"), (Positive, False, "a number > 0"),
    (NonNegative, -1e-9, "a number >= 0"), (PositiveInt, 0, "a whole number >= 1"),
    (PositiveInt, 1.5, "a whole number >= 1"), (PositiveInt, True, "a whole number >= 1"),
    (NonNegativeInt, -1, "a whole number >= 0"), (Probability, 1.01, r"a number in \[0, 1\]"),
    (Probability, -0.01, r"a number in \[0, 1\]"), (Share, 0, r"a number in \(0, 1\]"),
    (Share, 1.01, r"a number in \(0, 1\]"), (Fraction, 1, r"a number in \[0, 1\)"),
    (str | None, 1, "text or null"), (PositiveInt | None, 0, "a whole number >= 1 or null"),
    (Positive | Literal["dynamic"], "fixed", "a number > 0 or dynamic"), (Literal["a", "b"], "c", "one of a, b"),
    (Literal["bilinear", "bicubic"], "bicubik", r"one of bilinear, bicubic \(Did you mean bicubic\?\)"),
    (Literal["a"], None, "a"), (list[float], 1.0, "a list, each a number"),
    (list[float], [1.0, "x"], "a list, each a number"), (list[int], [1.5], "a list, each a whole number"),
    (dict[str, Any], 1, "a group of keys"), (dict[str, Any], [], "a group of keys"), (None, 0, "null"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), RIGHT, ids=str)
def test_a_value_of_the_kind_passes(kind, value):
    assert faults({"key": value}, {"key": Parameter(kind)}, "") == []


@pytest.mark.parametrize(("kind", "value", "words"), WRONG, ids=str)
def test_a_value_of_another_kind_is_told_with_what_it_must_be(kind, value, words):
    line = str(*faults({"key": value}, {"key": Parameter(kind)}, "group."))
    quotes = ", not text. Leave the quotes out" if value in ("1", "true") else ""
    assert re.fullmatch(rf"group\.key=.*: must be {words}{quotes}\.", line)


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "null"), (True, "true"), (False, "false"), ("x y", "x y"), ([1], "[1]")]
)
def test_a_faulty_value_is_shown_as_it_is_written_on_the_command_line(value, shown):
    line = str(*faults({"key": value}, {"key": Parameter(PositiveInt)}, ""))
    assert line == f"key={shown}: must be a whole number >= 1."


def test_all_faults_of_a_node_are_told_a_line_each():
    parameters = {"width": Parameter(Positive), "dropout": Parameter(Fraction, 0.2), "num_classes": Parameter(int)}
    node = {"_target_": "x", "widht": 1.0, "dropout": 2.0, "q": 1}
    assert list(map(str, faults(node, parameters, "model."))) == [
        "model.widht: no such key. Did you mean model.width? Known here: width, dropout, num_classes.",
        "model.dropout=2.0: must be a number in [0, 1).",
        "model.q: no such key. Known here: width, dropout, num_classes.",
        "model.width: missing. It must be a number > 0.",
        "model.num_classes: missing. It must be a whole number.",
    ]


def test_a_node_without_parameters_knows_no_key():
    assert list(map(str, faults({"x": 1}, {}, "amp."))) == ["amp.x: no such key. Known here: none."]


def test_the_nearest_word_is_meant_or_none():
    assert did_you_mean("imagefoler", ["samples", "imagefolder"]) == " Did you mean imagefolder?"
    assert did_you_mean("xyz", ["samples", "imagefolder"]) == ""
    assert did_you_mean("x", []) == ""


def test_every_range_is_kept_and_put_into_words():
    for kind, low, high in (
        (Positive, math.ulp(0), None),
        (NonNegative, 0, None),
        (PositiveInt, 1, None),
        (Probability, 0, 1),
        (Share, math.ulp(0), 1),
        (Fraction, 0, math.nextafter(1, 0)),
    ):
        inside = [low, *([high] if high is not None else [10**6])]
        outside = [low - 1, math.nextafter(low, -1), *([math.nextafter(high, 2)] if high is not None else [])]
        assert [faults({"k": v}, {"k": Parameter(kind)}, "") for v in inside] == [[], []]
        assert all(faults({"k": v}, {"k": Parameter(kind)}, "") for v in outside)
        assert describe(kind).split()[-1][0] in "0123456789"


def test_a_numpy_number_is_none_of_a_config():
    assert faults({"k": np.int64(1)}, {"k": Parameter(int)}, "")
