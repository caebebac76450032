"""Imports go strictly down the floors, and one room alone knows the hardware."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FLOORS = [
    {"errors", "installed", "door.drivers", "secrets", "watchdog", "output", "interrupts"},
    {"schema", "disk", "starters", "door.groups", "door.typed"},
    {"door.conflicts", "door.origins"},
    {"device", "seeding", "seal"},
    {"distributed", "models", "optim", "ema"},
    {"loss_scale"},
    {"data", "amp", "metrics", "nonfinite", "checkpoint", "loggers", "signals", "elastic", "wandb.recorder"},
    {"wandb.process", "wandb.artifact"},
    {"engine", "wandb.logger"},
    {"config", "experiments.record", "saving"},
    {"rescue"},
    {"loop"},
    {"door.words", "experiments.workers", "experiments.grid"},
    {"door.composing", "door.manual", "experiments.search"},
    {"experiments.sweeps"},
    {"door.overrides", "door.flags"},
    {"experiments.folders"},
    {"door.presence", "experiments.rerun", "experiments.confidence", "experiments.runs"},
    {"experiments.results", "experiments.jobs"},
    {"experiments.launch"},
    {"train", "evaluate", "tools"},
]
FILES = [REPOSITORY / "train.py", REPOSITORY / "evaluate.py", *sorted((REPOSITORY / "ghostnet").rglob("*.py"))]
IDS = [str(path.relative_to(REPOSITORY)) for path in FILES]


def room(path: Path) -> str:
    """The program, module or folder that has a floor: whole folders have one, or each of their modules its own."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return home(".".join(parts[1:] if parts[0] == "ghostnet" else parts))


def home(name: str) -> str:
    """The room that a dotted name below the package is in; packages themselves hold only a docstring or the version."""
    parts = name.removesuffix("__init__").split(".")
    rooms = {name for rooms in FLOORS for name in rooms}
    return next(
        (room for room in (".".join(parts[:2]), parts[0]) if room in rooms), "errors" if parts[-1] == "" else name
    )


def floor(name: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS) if name in rooms]
    assert floors, f"{name} has no floor: give it one here"
    return floors[0]


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_strictly_down(path: Path) -> None:
    own = room(path)
    for name in imports(ast.parse(path.read_text())):
        if name.startswith("ghostnet."):
            target = home(name.removeprefix("ghostnet."))
            assert target == own or floor(target) < floor(own), f"{own} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_device_knows_npu_and_cuda(path: Path) -> None:
    if room(path) == "device":
        return
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"npu", "cuda"}, f"line {node.lineno} names torch.{node.attr}"
    assert not [name for name in imports(tree) if name.startswith(("torch_npu", "torch.npu", "torch.cuda"))]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_the_top_floor_sees_cfg(path: Path) -> None:
    if floor(room(path)) >= floor("config"):
        return
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
    assert "cfg" not in names


def test_the_door_does_not_load_torch() -> None:
    seen, queue = set(), ["train", "evaluate"]
    while queue:
        name = queue.pop()
        path = REPOSITORY / (f"{name}.py" if "." not in name else f"{name.replace('.', '/')}.py")
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text()).body:
            for imported in imports(ast.Module([node], [])) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                assert imported.split(".")[0] not in {"torch", "torchvision", "wandb"}, f"{name} imports {imported}"
                queue += [imported, imported.rpartition(".")[0]]
    assert "ghostnet.experiments.launch" in seen
    assert "ghostnet.schema" in seen
