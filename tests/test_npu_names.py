"""What ghostnet.device takes from torch.npu and torch_npu is in the wheel of requirements-npu.txt, and in our stand-in.

The texts of both are read, none is imported: so this runs anywhere, and the stand-in can't drift from the truth.
"""

import ast
import configparser
import email
import functools
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ghostnet import device

REPOSITORY = Path(__file__).parent.parent
STAND_IN = REPOSITORY / "tests" / "emulated_npu"
DEVICE = Path(device.__file__).read_text()

pytestmark = pytest.mark.filterwarnings("ignore:.*invalid escape sequence")  # in the wheel's texts

DOWNLOAD = ["--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"]
DOWNLOAD += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2", "--timeout=20"]
LIMIT = 300  # seconds
UNREACHABLE = r"Retrying \(Retry|ConnectionError|Timeout(Error)?\b|ProtocolError|ProxyError|name resolution"
"""What pip says where it can't reach the index; of a version that isn't there it says none of this."""

FROM_CANN = {"HCCL_WHITELIST_DISABLE"}
"""Variables that CANN's libhccl.so alone reads; it's no part of the wheel, which names this one in an example only."""


# What device.py takes


def chain(node: ast.AST, known: dict[str, str]) -> str | None:
    """'torch.npu.a.b' of an expression; _module(…) is torch.npu, and an instance goes by the name of its class."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = chain(node.value, known)
        return owner and f"{owner}.{node.attr}"
    if isinstance(node, ast.Call):
        called = chain(node.func, known)
        return {"_module": "torch.npu"}.get(called, called if called and last(called)[0].isupper() else None)
    return None


def last(name: str) -> str:
    return name.rpartition(".")[2]


def taken(source: str) -> set[str]:
    """All names that a file takes from torch.npu and torch_npu."""
    names = set()
    for part in ast.parse(source).body:
        known = {name: name for name in ("torch", "torch_npu", "_module")}
        for node in ast.walk(part):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                known[node.targets[0].id] = chain(node.value, known)
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute):
                names.add(chain(node, known))
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return {name for name in names if name and name.startswith(("torch.npu.", "torch_npu."))}


TAKEN = sorted(taken(DEVICE))


def test_names_are_collected_however_device_takes_them():
    assert set(TAKEN) >= {
        "torch.npu.is_available",
        "torch.npu.set_compile_mode",
        "torch.npu.config.allow_internal_format",
        "torch_npu.npu.utils.is_support_inf_nan",
        "torch_npu.npu_get_float_status",
        # through _module()
        "torch.npu.device_count",
        "torch.npu.get_device_name",
        "torch.npu.synchronize",
        "torch.npu.max_memory_allocated",
        "torch.npu.is_bf16_supported",
        "torch.npu.Event",
        # through a variable
        "torch.npu.set_device",
        "torch.npu.Event.record",
    }


def test_an_import_from_torch_npu_counts_too_and_cuda_does_not():
    assert taken("from torch_npu.npu.utils import x") == {"torch_npu.npu.utils.x"}
    assert taken("import torch_npu.npu") == {"torch_npu.npu"}
    assert taken("torch.cuda.x(torch.y)") == set()


# Where a package defines a name


@dataclass(frozen=True)
class Thing:
    """A module, or what is defined in one."""

    module: str
    node: ast.AST


def statements(node):
    """Of a module: all that run when it is imported."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from statements(child)


class Package:
    """Python files by their paths, looked into without running them."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.parse = functools.cache(lambda path: ast.parse(texts[path]))

    def find(self, name: str) -> Thing | None:
        """What a dotted name stands for; torch.npu is the module torch_npu.npu."""
        first, *others = re.sub(r"^torch\.npu\b", "torch_npu.npu", name).split(".")
        thing = self.module(first)
        for other in others:
            thing = thing and self.attribute(thing, other)
        return thing

    def module(self, name: str) -> Thing | None:
        stem = name.replace(".", "/")
        path = next((path for path in (f"{stem}/__init__.py", f"{stem}.py") if path in self.texts), None)
        return path and Thing(name, self.parse(path))

    def attribute(self, owner: Thing, name: str) -> Thing | None:
        if isinstance(owner.node, ast.Module):
            return self.in_module(owner, name)
        return self.in_class(owner, name) if isinstance(owner.node, ast.ClassDef) else None

    def in_module(self, owner: Thing, name: str) -> Thing | None:
        for node in reversed(list(statements(owner.node))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return Thing(owner.module, node)
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                return self.value(owner, node.value)
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if (alias.asname or alias.name.split(".")[0]) == name:
                        return self.module(alias.name if alias.asname else name)
            if isinstance(node, ast.ImportFrom) and (source := self.source(owner.module, node)):
                if source.module == f"{owner.module}.{name}":
                    return source
                for alias in node.names:
                    if (alias.asname or alias.name) == name or (alias.name == "*" and name in self.public(source)):
                        wanted = name if alias.name == "*" else alias.name
                        return self.module(f"{source.module}.{wanted}") or self.attribute(source, wanted)
        # Operators of C++ are put into the package when it is imported, and have their documentation in one module.
        documented = self.texts.get(f"{owner.module}/_op_plugin_docs.py", "")
        if re.search(rf'_add_torch_npu_docstr\(\s*"{re.escape(name)}",', documented):
            return Thing(owner.module, owner.node)
        # A submodule is an attribute once anything has imported it.
        submodule = self.module(f"{owner.module}.{name}")
        return submodule if submodule and self.mentions(submodule.module, r"\b(from|import) +%s\b") else None

    def mentions(self, name: str, pattern: str) -> bool:
        """Whether a pattern, with the name in it, is anywhere in the package."""
        wanted = re.compile(pattern % re.escape(name))
        return any(name in text and wanted.search(text) for text in self.texts.values())

    def source(self, module: str, node: ast.ImportFrom) -> Thing | None:
        parents = module.split(".")
        if f"{module.replace('.', '/')}/__init__.py" not in self.texts:
            parents.pop()
        parents = parents[: len(parents) - node.level + 1] if node.level else []
        return self.module(".".join([*parents, *([node.module] if node.module else [])]))

    def public(self, module: Thing) -> set[str]:
        """What `from module import *` binds."""
        for node in module.node.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return set(ast.literal_eval(node.value))
        names = (getattr(node, "name", None) for node in module.node.body)
        return {name for name in names if name and not name.startswith("_")}

    def value(self, owner: Thing, node: ast.AST) -> Thing | None:
        """What an expression in a module gives: of a call, the class that is called."""
        if isinstance(node, ast.Name):
            return self.in_module(owner, node.id)
        if isinstance(node, ast.Attribute):
            left = self.value(owner, node.value)
            return left and self.attribute(left, node.attr)
        return self.value(owner, node.func) if isinstance(node, ast.Call) else Thing(owner.module, node)

    def in_class(self, owner: Thing, name: str) -> Thing | None:
        for node in ast.walk(owner.node):
            if isinstance(node, ast.FunctionDef):
                if node.name == name:
                    return Thing(owner.module, node)
                if node.name in {"__setattr__", "__getattr__"}:  # they compare the name with a literal
                    for inner in ast.walk(node):
                        if isinstance(inner, ast.Compare) and ast.unparse(inner.comparators[0]) == repr(name):
                            return Thing(owner.module, inner)
            if isinstance(node, ast.Assign) and {name, f"self.{name}"} & set(map(ast.unparse, node.targets)):
                return Thing(owner.module, node.value)
        return None


# The wheel and the stand-in


def required(name: str) -> Requirement:
    lines = (REPOSITORY / "requirements-npu.txt").read_text().splitlines()
    line = next(line for line in lines if re.match(rf"{name}\b(?!-)", line))
    return Requirement(line.partition("#")[0])


@pytest.fixture(scope="session")
def wheel(request):
    """Downloaded once into pytest's cache, and not installed."""
    wanted = required("torch-npu")
    version = str(wanted.specifier).removeprefix("==")
    folder = request.config.cache.mkdir("torch-npu")
    if not list(folder.glob(f"torch_npu-{version}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", str(wanted), *DOWNLOAD, "--dest", str(folder / "new")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            pytest.skip(f"the package index gave no {wanted} within {LIMIT} s")
        if done.returncode and (fault := re.search(f".*({UNREACHABLE}).*", done.stderr)):
            pytest.skip(f"the package index, which has {wanted}, can't be reached: {fault[0]}")
        assert not done.returncode, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        for path in (folder / "new").glob("torch_npu-*.whl"):
            path.replace(folder / path.name)
    with zipfile.ZipFile(next(folder.glob(f"torch_npu-{version}-*.whl"))) as archive:
        yield archive


@pytest.fixture(scope="session")
def real(wheel):
    return Package({name: wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")})


@pytest.fixture(scope="session")
def stand_in():
    return Package({str(path.relative_to(STAND_IN)): path.read_text() for path in STAND_IN.rglob("*.py")})


@pytest.fixture(params=["real", "stand_in"])
def package(request):
    return request.getfixturevalue(request.param)


def file_of(wheel, name: str) -> str:
    return wheel.read(next(path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))).decode()


@pytest.mark.parametrize("name", TAKEN)
def test_torch_npu_has_what_device_takes(real, name):
    assert real.find(name)


@pytest.mark.parametrize("name", TAKEN)
def test_the_stand_in_has_what_device_takes(stand_in, name):
    # Instances may be of another class, as its events are torch's own.
    assert stand_in.find(re.sub(r"(\.[A-Z]\w*)\..*", r"\1", name))


@pytest.mark.parametrize(
    "name",
    [
        "torch.npu.is_avail",
        "torch.npu.set_compile_modes",
        "torch.npu.config.allow_internal_formats",
        "torch.npu.configs.allow_internal_format",
        "torch.npu.max_memory",
        "torch.npu.amp.GradScalar",
        "torch.npu.Event.recorded",
        "torch_npu.npu.util.is_support_inf_nan",
        "torch_npu.npu.utils.is_support_inf",
        "torch_npus.npu",
    ],
)
def test_a_misspelt_name_is_not_found(package, name):
    assert package.find(name) is None


def test_it_registers_itself_as_torch_npu(real):
    assert real.module("torch_npu.npu")
    assert real.mentions("torch_npu.npu", r"\btorch\._register_device_module\(\s*['\"]npu['\"],\s*%s\s*\)")


def test_the_compile_mode_is_set_by_jit_compile(package):
    assert [arg.arg for arg in package.find("torch.npu.set_compile_mode").node.args.args] == ["jit_compile"]


def test_an_event_can_be_timed_recorded_and_waited_for(real):
    assert "enable_timing" in [arg.arg for arg in real.find("torch.npu.Event.__new__").node.args.args]
    for method, arguments in {"record": "stream", "elapsed_time": "end_event", "synchronize": ""}.items():
        assert arguments in ", ".join(arg.arg for arg in real.find(f"torch.npu.Event.{method}").node.args.args)


def test_the_grad_scaler_starts_halves_and_doubles_as_torchs_does_and_keeps_its_scale_where_torchs_does(package):
    arguments = package.find("torch.npu.amp.GradScaler.__init__").node.args
    defaults = map(ast.unparse, arguments.defaults)
    assert dict(zip((arg.arg for arg in arguments.args[1:]), defaults, strict=True)) == {
        "init_scale": "2.0 ** 16",
        "growth_factor": "2.0",
        "backoff_factor": "0.5",
        "growth_interval": "2000",
        "dynamic": "True",
        "enabled": "True",
    }
    for name in ("scale", "step", "update", "state_dict", "load_state_dict", "_scale"):
        assert package.find(f"torch.npu.amp.GradScaler.{name}")


def test_the_wheel_requires_the_torch_that_requirements_npu_installs(wheel):
    wanted = [
        Requirement(line) for line in email.message_from_string(file_of(wheel, "METADATA")).get_all("Requires-Dist")
    ]
    (torch,) = [need.specifier for need in wanted if need.name == "torch"]
    assert f"{torch}+cpu" == str(required("torch").specifier)


def test_import_torch_would_load_it_by_an_entry_point(wheel, real):
    points = configparser.ConfigParser()
    points.read_string(file_of(wheel, "entry_points.txt"))
    assert dict(points["torch.backends"]) == {"torch_npu": "torch_npu:_autoload"}
    assert real.find("torch_npu._autoload")


def test_it_registers_its_collectives(real):
    assert real.mentions(device.BACKENDS["npu"], r"\bBackend\.register_backend\(\s*['\"]%s['\"]")


def test_it_reads_the_environment_variables_that_device_sets_and_reads(wheel, real):
    names = {*device.ENVIRONMENT["npu"], "ASCEND_RT_VISIBLE_DEVICES", "CPU_AFFINITY_CONF"}
    libraries = [wheel.read(path) for path in wheel.namelist() if path.endswith(".so")]
    read = {name for name in names if any(name.encode() in library for library in libraries)}
    read |= {name for name in names if real.mentions(name, r"\b(getenv|environ\.get)\(\s*['\"]%s['\"]")}
    assert names - read == FROM_CANN
