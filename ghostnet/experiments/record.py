"""What reproduces a run, in its folder: run.json, code.diff; what became of it; the lock of who trains in it."""

import contextlib
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ghostnet
from ghostnet import secrets
from ghostnet.disk import refused, writing
from ghostnet.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent.parent
FILE, DIFF, LOCK = "run.json", "code.diff", ".lock"
PACKAGES = ("torch", "torchvision", "torch_npu", "numpy", "pillow", "simplejpeg", "hydra-core", "omegaconf", "wandb")
LARGEST = 1 << 20
"""Bytes of a file that is not in git yet, up to which its content is kept too."""


def write(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json with what is given and what this machine and code are; code.diff where the code was changed.

    A run that goes on keeps the time at which it was started first.
    """
    commit, diff, _ = code()
    run = run | {"host": platform.node(), "commit": commit, "dirty": bool(diff)}
    run |= {"versions": versions(), "hardware": hardware()}
    with contextlib.suppress(OSError, ValueError, KeyError):
        run["started"] = json.loads((folder / FILE).read_text(encoding="utf-8"))["started"]
    write_json(folder / FILE, run)
    if diff:
        with writing(folder / DIFF):
            (folder / DIFF).write_text(diff, encoding="utf-8")
    else:
        (folder / DIFF).unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any]:
    """run.json; empty where there is none, or none that can be read."""
    try:
        return dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def result(folder: Path) -> dict[str, Any]:
    """result.json; empty where there is none, or none that can be read."""
    try:
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def is_done(folder: Path) -> bool:
    """Whether a run came to its end, by itself or by being pruned."""
    return result(folder).get("status") in ("completed", "pruned")


def status(folder: Path) -> str:
    """completed, pruned or failed, as the run told; else running, where a process trains in it, or cut off."""
    return "running" if is_locked(folder) else str(result(folder).get("status", "cut off"))


@functools.cache
def code() -> tuple[str | None, str, str]:
    """Return the commit of the code that runs, what differs from it, as a diff, and why there is none of it.

    Outside of git, and where git refuses or is not installed, the commit is None and the diff empty.

    Secrets of the environment are struck out of it, and files that hold keys are no part of it.

    It is asked once: what is edited later is not what this process runs.
    """

    def git(*words: str) -> bytes:
        # In a container the checkout is often another user's, which git refuses lest it run what the configuration
        # there names; but whoever runs this file trusts its folder.
        command = ["git", "-c", f"safe.directory={REPOSITORY.resolve()}", "-C", str(REPOSITORY), *words]
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        except subprocess.TimeoutExpired:
            raise OSError(errno.ETIMEDOUT, "it does not answer") from None
        if done.returncode not in ((0, 1) if "--no-index" in words else (0,)):
            raise OSError(errno.EIO, done.stderr.decode(errors="replace").strip().partition("\n")[0])
        return done.stdout

    if not (REPOSITORY / ".git").exists():
        return None, "", ""

    try:
        commit, diff = git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD")
        for name in filter(None, os.fsdecode(git("ls-files", "--others", "--exclude-standard", "-z")).split("\0")):
            if (REPOSITORY / name).stat().st_size <= LARGEST and not secrets.is_file(name):
                diff += git("diff", "--no-index", "--", "/dev/null", name)
        return commit, secrets.without(diff.decode(errors="replace")), ""
    except OSError as error:
        return None, "", error.strerror or str(error)


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, this project and the packages that decide what a run computes, as far as they are installed."""
    found = {"python": platform.python_version(), "ghostnet": ghostnet.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def hardware() -> dict[str, Any]:
    """The CPU by name, how many of them, and the machine's memory in bytes; result.json names the cards."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": name, "cpus": os.cpu_count(), "memory": memory}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """This process alone trains in a folder; ConfigError where another does. The kernel ends it with the process."""
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.2)  # somebody may just be looking whether it is taken
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{folder}: another process is at work here ({file.read().strip() or 'unknown'})."
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        with writing(folder / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process trains in a folder."""
    try:
        with (folder / LOCK).open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; StorageError where it can't be."""
    from ghostnet.loggers import jsonable

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise refused(path, error) from None
