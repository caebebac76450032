"""Typed signatures as the schema of the config, read without importing the modules that hold them (torch is slow)."""

import ast
import contextlib
import dataclasses
import difflib
import functools
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ghostnet.errors import ConfigError

Positive = Annotated[float, "> 0"]
NonNegative = Annotated[float, ">= 0"]
PositiveInt = Annotated[int, ">= 1"]
NonNegativeInt = Annotated[int, ">= 0"]
Quality = Annotated[int, "in [1, 100]"]
Probability = Annotated[float, "in [0, 1]"]
Share = Annotated[float, "in (0, 1]"]
Magnitude = Annotated[float, "in [0, 30]"]
Fraction = Annotated[float, "in [0, 1)"]
ShareRange = Annotated[list[Share], "as [least, most]"]
PositiveRange = Annotated[list[Positive], "as [least, most]"]
ProbabilityColour = Annotated[list[Probability], "as [red, green, blue]"]
PositiveColour = Annotated[list[Positive], "as [red, green, blue]"]
FractionPair = Annotated[list[Fraction], "as [first, second]"]
LossScale = Positive | Literal["dynamic"]

_RANGES: dict[str, Callable[[Any], bool]] = {
    "> 0": lambda v: v > 0,
    ">= 0": lambda v: v >= 0,
    ">= 1": lambda v: v >= 1,
    "in [1, 100]": lambda v: 1 <= v <= 100,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
    "in [0, 30]": lambda v: 0 <= v <= 30,
    "in [0, 1)": lambda v: 0 <= v < 1,
    "as [least, most]": lambda v: len(v) == 2 and v[0] <= v[1],
    "as [red, green, blue]": lambda v: len(v) == 3,
    "as [first, second]": lambda v: len(v) == 2,
}
_NAMES: dict[str, Any] = {
    **{name: getattr(typing, name) for name in ("Any", "Annotated", "Literal")},
    **{name: value for name, value in list(globals().items()) if typing.get_origin(value) is Annotated},
    **{kind.__name__: kind for kind in (int, float, bool, str, list, dict, tuple)},
    "LossScale": LossScale,
    "None": None,
}
REQUIRED = object()
"""The default of a parameter that has none."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a constructor: its type (Any where ours can't be told) and its default or REQUIRED."""

    type: Any
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a command or a config."""

    keys: tuple[str, ...]
    """The dotted keys that it is about; several contradict each other."""
    text: str
    """One sentence or more: the key with its value, what is allowed, the way out."""
    has_place: bool = True
    """Whether some file or command set what is wrong; nobody did where a value is still to be given."""

    def __str__(self) -> str:
        return self.text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean x?' for the nearest known word, '' where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


@functools.cache
def signature(target: str) -> dict[str, Parameter]:
    """The parameters of a function, class or dataclass of this package, by its dotted name, read from its source.

    Raises ConfigError where there is no such module or name. Positional-only parameters belong to the caller, not to
    the config, and are left out. A class without a constructor has those of its bases.
    """
    module_name, _, name = target.rpartition(".")
    path = Path(__file__).parent.parent.joinpath(*module_name.split(".")).with_suffix(".py")
    if not module_name.startswith("ghostnet") or not path.is_file():
        raise ConfigError(f"_target_: {target} is not in a module of this project.")
    tree = ast.parse(path.read_bytes())
    names = dict(_NAMES)
    definitions: dict[str, ast.ClassDef | ast.FunctionDef] = {}
    targets: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _evaluate(node.value, names)
            if value is not Any:
                names[node.targets[0].id] = value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ghostnet"):
            targets |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
            targets[node.name] = f"{module_name}.{node.name}"
    if name not in definitions:
        raise ConfigError(f"_target_: {module_name} has no {name}.{did_you_mean(name, definitions)}")
    definition = definitions[name]
    if isinstance(definition, ast.FunctionDef):
        return _parameters(definition, names)
    for item in definition.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _parameters(item, names)
    bases = [targets[b.id] for b in definition.bases if isinstance(b, ast.Name) and b.id in targets]
    inherited = {key: value for base in reversed(bases) for key, value in signature(base).items()}
    return inherited | {
        item.target.id: _parameter(item.annotation, item.value, names)
        for item in definition.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _parameters(function: ast.FunctionDef, names: dict[str, Any]) -> dict[str, Parameter]:
    given = function.args
    positional = [a for a in given.args if a.arg != "self"]
    # Those of positional-only parameters come first and drop out.
    defaults = [*[None] * len(positional), *given.defaults][len(given.defaults) :] + given.kw_defaults
    return {
        a.arg: _parameter(a.annotation, default, names)
        for a, default in zip([*positional, *given.kwonlyargs], defaults, strict=True)
    }


def _parameter(annotation: ast.expr | None, default: ast.expr | None, names: dict[str, Any]) -> Parameter:
    return Parameter(
        _evaluate(annotation, names) if annotation else Any, _evaluate(default, names) if default else REQUIRED
    )


def _evaluate(node: ast.expr, names: dict[str, Any]) -> Any:  # noqa: ANN401 (any annotation or default)
    """The value of an annotation or default that uses only the names above; Any where it uses others."""
    try:
        return eval(compile(ast.Expression(node), "<signature>", "eval"), {"__builtins__": {}}, names)
    except (NameError, AttributeError, TypeError):
        return Any


@functools.cache
def fields(schema: type) -> dict[str, Parameter]:
    """The fields of a dataclass, as signature() gives those of a constructor."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {
        f.name: Parameter(hints[f.name], REQUIRED if f.default is dataclasses.MISSING else f.default)
        for f in dataclasses.fields(schema)
    }


def faults(node: Mapping[str, Any], parameters: Mapping[str, Parameter], prefix: str) -> list[Fault]:
    """What is wrong with a config node: unknown keys, missing keys, wrong types, values out of range."""
    found = []
    for key, value in node.items():
        name = f"{prefix}{key}"
        if key == "_target_":
            continue
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            near = did_you_mean(str(key), parameters).replace("mean ", f"mean {prefix}")
            found.append(Fault((name,), f"{name}: no such key.{near} Known here: {known}."))
        elif (fault := _fault(value, parameters[key].type)) is not None:
            said = f"{name}={show(value)}: {fault}."
            if isinstance(value, str) and _fault(value_of(value), parameters[key].type) is None:
                said = f"{name}='{value}': {fault}, not text. Leave the quotes out."
            found.append(Fault((name,), said))
    for key, parameter in parameters.items():
        if key not in node and parameter.default is REQUIRED:
            allowed = "" if parameter.type is Any else f" It must be {describe(parameter.type)}."
            found.append(Fault((f"{prefix}{key}",), f"{prefix}{key}: missing.{allowed}"))
    return found


def _fault(value: Any, kind: Any) -> str | None:  # noqa: ANN401 (values of any config)
    """Why a value is not of a kind, None if it is."""
    if kind is Any:
        return None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        if _fault(value, arguments[0]) is not None:
            return f"must be {describe(kind)}"
        return None if _RANGES[arguments[1]](value) else f"must be {describe(kind)}"
    if origin is types.UnionType or origin is typing.Union:
        return None if any(_fault(value, a) is None for a in arguments) else f"must be {describe(kind)}"
    if origin is Literal:
        if value in arguments:
            return None
        near = did_you_mean(str(value), map(str, arguments)).strip()
        return f"must be {describe(kind)}{f' ({near})' if near else ''}"
    if origin is list:
        good = isinstance(value, list) and all(_fault(item, arguments[0]) is None for item in value)
        return None if good else f"must be {describe(kind)}"
    if origin is dict:
        return None if isinstance(value, dict) else f"must be {describe(kind)}"
    if kind is None or kind is type(None):
        return None if value is None else "must be null"
    if kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    else:
        good = not isinstance(kind, type) or isinstance(value, kind)
    return None if good else f"must be {describe(kind)}"


def value_of(text: str) -> Any:  # noqa: ANN401 (values of any config)
    """Return what a text stands for without quotes: a number, true, false, null, or itself."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def whole(value: Any, kind: Any) -> Any:  # noqa: ANN401 (values of any config)
    """Return 30 for 30.0, in lists too, if a value of that kind must be whole; other values as they are."""
    if not isinstance(value, float | list):
        return value
    if isinstance(value, list):
        made: Any = [int(item) if isinstance(item, float) and item.is_integer() else item for item in value]
    else:
        made = int(value) if isinstance(value, float) and value.is_integer() else value
    return made if _fault(value, kind) is not None and _fault(made, kind) is None else value


def describe(kind: Any) -> str:  # noqa: ANN401 (any annotation)
    """A kind in words: 'a number > 0', 'true or false', 'one of a, b'."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1]}"
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join(describe(a) for a in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is list:
        return f"a list, each {describe(arguments[0])}"
    if origin is dict:
        return "a group of keys"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "null" if kind in (None, type(None)) else words.get(kind, str(kind))


def show(value: Any) -> str:  # noqa: ANN401 (values of any config)
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
