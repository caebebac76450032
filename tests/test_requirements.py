"""requirements-npu.txt as pip reads it, offline: small wheels of the same names stand in for an index."""

import re
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

NPU = REPOSITORY / "requirements-npu.txt"
LINES = NPU.read_text().splitlines()
INDEX = next(line for line in LINES if line.startswith("--"))
REQUIRED = [Requirement(line.partition("#")[0]) for line in LINES if line and line[0] not in "#-"]
PINNED = {need.name: next((each.version for each in need.specifier), "1") for need in REQUIRED}
CUDA_BUILDS = {"torch": "2.12.0", "torchvision": "0.27.0"}
"""As the Python package index has them."""


def index(folder, versions):
    folder.mkdir()
    for name, version in versions.items():
        stem = f"{name.replace('-', '_')}-{version}"
        requires = f"Requires-Dist: torch=={CUDA_BUILDS['torch']}\n" if name == "torch-npu" else ""
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            about = f"{stem}.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    return folder


@pytest.fixture
def pip(tmp_path):
    """Resolve a requirements file in an environment without packages, and say what would be installed."""

    def dry_run(*words):
        command = [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--ignore-installed"]
        command += ["--disable-pip-version-check", "--timeout", "10", "--retries", "1", *map(str, words)]
        env = {"HOME": str(tmp_path), "PATH": "", "PIP_CONFIG_FILE": "/dev/null"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout + done.stderr

    return dry_run


def test_the_wheels_of_an_offline_folder_are_enough(pip, tmp_path):
    wheels = index(tmp_path / "wheels", PINNED)
    code, said = pip("--no-index", "--find-links", wheels, "-r", NPU)
    assert code == 0, said
    assert "Retrying" not in said
    for name, version in PINNED.items():
        assert re.search(rf"Would install .*\b{name}-{re.escape(version)}(\s|$)", said)


def test_a_mirror_takes_the_place_of_the_index(pip, tmp_path):
    wheels = index(tmp_path / "wheels", PINNED)
    here = tmp_path / "here.txt"
    here.write_text(re.sub(r"(?m)^--extra-index-url.*", f"--find-links {wheels}", NPU.read_text()))
    code, said = pip("--index-url", (tmp_path / "none").as_uri(), "-r", here)
    assert code == 0, said


def test_the_cuda_build_of_torch_is_never_taken_and_without_the_index_torch_is_the_first_that_is_missed(pip, tmp_path):
    wheels = index(tmp_path / "wheels", PINNED | CUDA_BUILDS)
    code, said = pip("--no-index", "--find-links", wheels, "-r", NPU)
    assert code == 1
    assert "No matching distribution found for torch==2.12.0+cpu" in said
    index(tmp_path / "more", PINNED)
    code, said = pip("--no-index", "--find-links", wheels, "--find-links", tmp_path / "more", "-r", NPU)
    assert code == 0, said
    assert "torch-2.12.0+cpu" in said


def test_torch_comes_first_so_that_an_index_that_can_not_be_reached_is_asked_once():
    assert INDEX == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert [need.name for need in REQUIRED][:2] == ["torch", "torchvision"]
    assert all(PINNED[name].endswith("+cpu") for name in CUDA_BUILDS)


@pytest.mark.parametrize("command", re.findall(r"pip install .*requirements-npu\.txt.*", NPU.read_text()))
def test_the_documented_command_bounds_the_wait(command):
    assert "--timeout 10 --retries 1" in command
