"""Checkpoints that lie at Weights & Biases: wandb://entity/project/artifact:alias becomes a file in the cache."""

import contextlib
import functools
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ghostnet.errors import ConfigError, UserError

SCHEME = "wandb://"
CHECKPOINTS = ("best.pt", "*.pt", "*.pth", "*.pth.tar", "*.safetensors")
"""Which file of an artifact is meant: the first of these of which it has exactly one."""
PATIENCE = 20
"""Seconds that the server may take to answer."""


def is_artifact(path: str | None) -> bool:
    """Whether a path names an artifact; ConfigError where it does so in a way that can't be one."""
    if path is None or not path.startswith(SCHEME):
        return False
    if not re.fullmatch(r"(\w[\w.-]*/){2}\w[\w.-]*(:\w[\w.-]*)?", path.removeprefix(SCHEME), re.ASCII):
        raise ConfigError(f"{path}: an artifact is given as {SCHEME}entity/project/artifact:alias.")
    return True


def located(path: str) -> str:
    """A path as it is, or the file in the cache that an artifact's address stands for."""
    return str(fetch(path)) if is_artifact(path) else path


@functools.cache
def fetch(path: str) -> Path:
    """The checkpoint of an artifact, downloaded unless the cache has this version -> its file there.

    The server is asked once in a process. UserError without a login, a network, an artifact of that name, or a
    checkpoint in it.
    """
    name = path.removeprefix(SCHEME)
    name = name if ":" in name else f"{name}:latest"
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(f"{path}: wandb is not installed: pip install wandb") from None
    try:
        return _downloaded(wandb.Api(timeout=PATIENCE).artifact(name), name)
    except (wandb.errors.Error, ValueError, TimeoutError) as error:
        raise UserError(f"{path}: {_explained(wandb, error)}") from None
    finally:
        with contextlib.suppress(Exception):  # what it was wanted for is there, or told
            wandb.teardown()


def _downloaded(artifact: Any, name: str) -> Path:  # noqa: ANN401 (wandb's artifact)
    """The checkpoint's file in the cache, written whole or not at all."""
    from ghostnet.data.index import cache_folder

    entries = {str(entry): artifact.manifest.entries[entry] for entry in artifact.manifest.entries}
    chosen = _checkpoint(list(entries), name)
    folder: Path = cache_folder() / "wandb" / Path(name.rpartition(":")[0]) / artifact.version
    file, size = folder / Path(chosen).name, entries[chosen].size
    if file.is_file() and file.stat().st_size == size:
        return file
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        artifact.download(root=str(temporary), path_prefix=chosen, skip_cache=True)
        if (temporary / chosen).stat().st_size != size:
            raise UserError(f"{SCHEME}{name}: {chosen} came incomplete; try again.")
        file.parent.mkdir(parents=True, exist_ok=True)
        (temporary / chosen).replace(file)
    except OSError as error:
        raise UserError(f"{SCHEME}{name}: {file} can't be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return file


def _checkpoint(files: list[str], name: str) -> str:
    for pattern in CHECKPOINTS:
        if len(found := [file for file in files if Path(file).match(pattern)]) == 1:
            return found[0]
    raise UserError(
        f"{SCHEME}{name} holds {', '.join(sorted(files)[:5]) or 'no file'}: one checkpoint is looked for, "
        f"{' or '.join(CHECKPOINTS)}."
    )


def _explained(wandb: Any, error: Exception) -> str:  # noqa: ANN401 (the module)
    """What is wrong and the way out, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, wandb.errors.UsageError) or "API key" in text:
        return f"no Weights & Biases login: wandb login, or export WANDB_API_KEY=… ({text[:200]})"
    if "not respond" in text or isinstance(error, TimeoutError):
        return f"Weights & Biases can't be reached within {PATIENCE} s. Is there a network? ({text[:200]})"
    return text[:300]
