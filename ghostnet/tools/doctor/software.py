"""Checks of the software: Python, packages, torch, torchvision, CANN, apex."""

from __future__ import annotations  # so that an old Python comes as far as being told so

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

from ghostnet.tools.doctor.finding import (
    FAIL,
    OK,
    WARN,
    Case,
    Finding,
    Findings,
    first_line,
    fresh_python,
    installed,
    needed,
)

REQUIREMENTS = Path(__file__).parents[3] / "requirements.txt"
PYTHON = (3, 11)
OPTIONAL = ("torchvision", "wandb")
"""Packages that only some configs need: checks of their own judge them."""
CANN_HOMES = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")
SET_ENV = (
    "its set_env.sh (/usr/local/Ascend/cann/set_env.sh, of older versions /usr/local/Ascend/ascend-toolkit/set_env.sh)"
)
CANN_FOR = {"2.12.0": "9.1"}
"""torch_npu -> the CANN that Ascend recommends with it."""


def python() -> Findings:
    """The interpreter's version."""
    text = f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}"
    if sys.version_info[:2] < PYTHON:
        yield Finding(FAIL, text, "Python 3.11 or newer, in a virtual environment of its own")
    else:
        yield Finding(OK, text)


def packages() -> Findings:
    """Those of requirements.txt: there, and within its bounds."""
    missing, other = [], []
    for line in filter(
        None, (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    ):
        name = re.split(r"[<>=~!]", line)[0].strip()
        version = installed(name)
        if version is None:
            missing += [name] if name not in OPTIONAL else []
            continue
        with contextlib.suppress(ImportError):
            from packaging.requirements import Requirement

            if not Requirement(line).specifier.contains(version, prereleases=True):
                other.append(f"{line} is wanted, {version} is there")
    if missing:
        yield Finding(FAIL, f"not installed: {', '.join(missing)}", "pip install -r requirements.txt")
    elif other:
        yield Finding(WARN, "; ".join(other), "pip install -r requirements.txt (requirements-npu.txt on Ascend)")
    else:
        yield Finding(OK, "all that requirements.txt names, within its bounds")


def torch(case: Case) -> Findings:
    """Torch, and whether it is the build that torch_npu wants."""
    from torch import __version__, version

    if version.cuda and installed("torch_npu"):
        way_out = "pip install -r requirements-npu.txt in a new environment: it takes the CPU build"
        yield Finding(WARN, f"{__version__}, a CUDA build, beside torch_npu", way_out)
    else:
        yield Finding(OK, f"{__version__}, {f'built for CUDA {version.cuda}' if version.cuda else 'CPU build'}")


def torchvision(case: Case) -> Findings:
    """Whether it loads with this torch; RandAugment needs it."""
    status, version = needed(case.cfg["data"]["augment"]["randaugment"] > 0), installed("torchvision")
    try:
        importlib.import_module("torchvision")
        yield Finding(OK, f"{version}, loads with this torch")
    except Exception as error:  # such as RuntimeError: operator torchvision::nms does not exist
        way_out = "pip install -r requirements.txt: the one that goes with torch; RandAugment alone needs it"
        yield Finding(status, f"{version or 'not installed'}: {first_line(error)}", way_out)


def cann(case: Case) -> Findings:
    """CANN: found, of the version that goes with torch_npu, sourced."""
    version = installed("torch_npu")
    if version is None:
        return
    home, there = find_cann()
    if home is None:
        looked = ", ".join(["$ASCEND_HOME_PATH", "$ASCEND_TOOLKIT_HOME", *CANN_HOMES])
        yield Finding(WARN, f"none found for torch_npu {version} in {looked}", f"install CANN, then source {SET_ENV}")
        return
    together = f"torch_npu {version}, CANN {there or 'of unknown version'}"
    wanted = next((wanted for known, wanted in CANN_FOR.items() if version.startswith(known)), None)
    if wanted is None or there is None:
        yield Finding(OK, f"{together}; whether they go together can't be judged here")
    elif there.startswith(wanted):
        yield Finding(OK, f"{together}: they go together")
    else:
        yield Finding(WARN, f"{together}: Ascend recommends CANN {wanted} with it", f"install CANN {wanted}")
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    homes = (str(home), str(home.resolve()))
    if "ASCEND_HOME_PATH" not in os.environ or not any(path.startswith(homes) for path in paths):
        script = next((p / "set_env.sh" for p in (home, home.parent) if (p / "set_env.sh").exists()), SET_ENV)
        yield Finding(WARN, f"{home} is not sourced: its libraries are not in LD_LIBRARY_PATH", f"source {script}")


def find_cann() -> tuple[Path | None, str | None]:
    """CANN's folder and version, None where they are not found."""
    places = [os.environ.get("ASCEND_HOME_PATH"), os.environ.get("ASCEND_TOOLKIT_HOME"), *CANN_HOMES]
    home = next((Path(place) for place in places if place and Path(place).is_dir()), None)
    for pattern in ("*/ascend_*_install.info", "ascend_*_install.info", "version.cfg"):
        for file in sorted(home.glob(pattern)) if home else ():
            # version=9.1.0 in the first two, toolkit_running_version=[9.1.0.1.2:9.1.0] in the last
            if match := re.search(
                r"version=(?:\[[^:\]]*:)?([\w.]+)", file.read_text(errors="replace", encoding="utf-8")
            ):
                return home, match[1]
    return home, None


def autoload(case: Case) -> Findings:
    """Whether a plain `import torch`, which loads what registered itself as a backend, works for other programs."""
    backends = [entry.name for entry in importlib.metadata.entry_points(group="torch.backends")]
    if not backends or started_with("TORCH_DEVICE_BACKEND_AUTOLOAD=0"):
        return
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    if fault := fresh_python("import torch", 60, environment):
        way_out = "export TORCH_DEVICE_BACKEND_AUTOLOAD=0, or mend torch_npu and CANN"
        yield Finding(WARN, f"plain `import torch` fails in other programs, though not in training: {fault}", way_out)
    else:
        yield Finding(OK, f"plain `import torch` works, and loads {', '.join(backends)}")


def apex(case: Case) -> Findings:
    """Whether the apex that is installed is one; amp=apex needs it."""
    asked, spec = case.cfg["amp"]["_target_"].endswith(".Apex"), importlib.util.find_spec("apex")
    if spec and any((Path(place) / "amp").is_dir() for place in spec.submodule_search_locations or []):
        from ghostnet.config import build

        if asked:
            build(case.cfg["amp"])  # UserError where it can't be imported
        yield Finding(OK, f"{installed('apex') or 'of unknown version'}, it has apex.amp")
    elif spec:
        what = f"the apex {installed('apex') or ''} here has no apex.amp: it is another package of that name"
        yield Finding(needed(asked), what, f"pip uninstall apex{'; amp=o2 does the same without it' * asked}")
    elif asked:
        way_out = "amp=o2 does the same without it; Ascend's is built from source, github.com/Ascend/apex"
        yield Finding(FAIL, "not installed, and amp=apex needs it", way_out)


def started_with(setting: str) -> bool:
    """Whether the shell had it, such as NAME=1: the package sets variables of its own."""
    with contextlib.suppress(OSError):
        return setting.encode() in Path("/proc/self/environ").read_bytes().split(b"\0")
    return False
