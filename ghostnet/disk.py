"""What can't be written ends in one message: the file, the reason, the space that is left, what stays whole."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ghostnet.errors import StorageError

TRIAL = bytes(64 << 10)
"""What a run writes into its folder before its first row takes less."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the file system refuses within is a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from None


def refused(path: Path, error: OSError, kept: str = "", needed: int | None = None) -> StorageError:
    """What to tell of a file that can't be written. kept: a sentence on what stays; needed: its bytes."""
    parts = [f"{path} can't be written: {_reason(path, error, needed)}", kept, _way_out(error)]
    return StorageError(" ".join(filter(None, parts)))


def _reason(path: Path, error: OSError, needed: int | None) -> str:
    why = error.strerror or type(error).__name__
    if not path.parent.is_dir():
        return f"{why}: {path.parent} is not there any more; it was removed or moved while the run was at work."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        wants = f"it takes {needed / 1e6:,.1f} MB, " if needed else ""
        with contextlib.suppress(OSError):
            return f"{why}: {wants}{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there."
    return f"{why}."


def _way_out(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space there, or choose another folder with hydra.run.dir=…"
    if error.errno == errno.EFBIG:
        return "Raise the limit on the size of files (ulimit -f)."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Make the folder writable, or choose another with hydra.run.dir=…"
    return ""


def check_writable(folder: Path) -> None:
    """StorageError where nothing can be written into a folder that is there."""
    with writing(folder / "train.log"), tempfile.TemporaryFile(dir=folder) as file:
        file.write(TRIAL)
        file.flush()
