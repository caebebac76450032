"""A checksum at the end of a file of torch.save: its SHA-256 as the comment of the zip archive, which readers skip."""

import hashlib
import io
from pathlib import Path
from typing import IO, Any

MARK = b"ghostnet sha256 "
DIGITS = 2 * hashlib.sha256().digest_size
LENGTH = (len(MARK) + DIGITS).to_bytes(2, "little")
"""Of the comment: a zip archive ends with two bytes of it, and the comment."""
SIZE = len(LENGTH) + len(MARK) + DIGITS
CHUNK = 1 << 20


class Sealing(io.RawIOBase):
    """A file to write an archive to, whose checksum is appended by finish(). A failed write is raised there alone.

    torch's writer turns an OSError into an error of its own, so it must not meet one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha, self.held = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, content: Any) -> int:  # noqa: ANN401 (anything with a buffer)
        """Write all but the last two bytes so far, which are the length of the comment."""
        view = memoryview(content).cast("B")
        if len(view) < len(LENGTH):
            view = memoryview(self.held + view)
        else:
            self._put(self.held)
        self._put(view[: -len(LENGTH)])
        self.held = bytes(view[-len(LENGTH) :])
        return memoryview(content).nbytes

    def _put(self, content: bytes | memoryview) -> None:
        if self.error is None:
            self.sha.update(content)
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error

    def finish(self) -> None:
        """Write the checksum; OSError where anything could not be written."""
        assert self.held == bytes(len(LENGTH)), "an archive with a comment of its own"
        digest = self.sha.hexdigest().encode()
        self._put(LENGTH + MARK + digest)
        if self.error:
            raise self.error


def is_whole(path: Path) -> bool | None:
    """Whether a file's content has the checksum at its end; None where it has none there."""
    with path.open("rb") as file:
        rest = file.seek(0, io.SEEK_END) - SIZE
        if rest < 0:
            return None
        file.seek(rest)
        seal = file.read()
        if not seal.startswith(LENGTH + MARK):
            return None
        file.seek(0)
        sha = hashlib.sha256()
        while rest and (chunk := file.read(min(CHUNK, rest))):
            sha.update(chunk)
            rest -= len(chunk)
    return sha.hexdigest().encode() == seal[-DIGITS:]
