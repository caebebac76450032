"""A run's checkpoints, written beside its loop, and the one that it goes on from."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ghostnet import checkpoint
from ghostnet.engine import TrainState
from ghostnet.errors import UserError
from ghostnet.watchdog import LONG, waiting

log = logging.getLogger("ghostnet")


class Saver:
    """Copies a run's state in the loop, and has one thread write it: one file after the other, in the order asked for.

    That takes the host's memory of one copy of the state: before the next is made, the write of the last is waited for.
    """

    def __init__(
        self, folder: Path, keep: int, facts: Callable[[], dict[str, Any]], saved: tuple[int, int] | None = None
    ) -> None:
        """keep: last.pt and those before it. facts: what a checkpoint holds beside the state.

        saved: the step, and that of the last evaluation, of the last.pt in the folder that the run goes on from.
        """
        self.folder, self.keep, self.facts, self.saved = folder, keep, facts, saved
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.writing: Future[None] | None = None

    def save(self, state: TrainState, *names: str) -> None:
        """Have the state as it is now written under these names; nothing where it was. All ranks call it.

        Waits for the write before. StorageError where that failed.
        """
        now = state.step, state.evaluated
        if now == self.saved:
            return
        began = time.monotonic()
        self._wait()
        waited = time.monotonic() - began
        with state.for_all_ranks() as content:
            if state.ranks.is_main:
                # The loop changes all tensors in place.
                copy = checkpoint.copied(content | self.facts())
                held = time.monotonic() - began - waited
                why = f"{held:.3f} s of the loop's time to copy it, {waited:.3f} s to wait for the write before"
                self.writing = self.thread.submit(self._write, copy, names, why)
        self.saved = now

    def _write(self, copy: dict[str, Any], names: tuple[str, ...], why: str) -> None:
        for name in names:
            began = time.monotonic()
            size = checkpoint.save(copy, self.folder / name, self.keep if name == checkpoint.LAST else 1)
            seconds = time.monotonic() - began
            log.info(
                "saved %s, step %s: %.1f MB in %.2f s beside the loop; %s", name, copy["step"], size / 1e6, seconds, why
            )

    def check(self) -> None:
        """StorageError where a write has failed; waits for nothing."""
        if self.writing and self.writing.done():
            self._wait()

    def _wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing:
            with waiting("a checkpoint to be written", LONG):
                writing.result()

    def flush(self, state: TrainState) -> None:
        """Wait until all is on the disk; StorageError where it can't be. All ranks call it."""
        self._wait()
        state.ranks.barrier()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with waiting("a checkpoint to be written", LONG):
            self.thread.shutdown()
        if error is None:
            self._wait()
        elif self.writing and (fault := self.writing.exception()):
            log.info("%s", fault)  # the run ends by another


def find(resume: str | None, folder: Path) -> tuple[checkpoint.Newest | None, list[str]]:
    """The checkpoint to go on from, None for a fresh start -> it, and what the user should know of it.

    What is damaged in the run's own folder is set aside, as last.pt.damaged, lest it be kept in place of a whole one.
    """
    if resume is None:
        return None, []
    if resume != "auto":
        path = checkpoint.find(resume, checkpoint.LAST)
        try:
            return checkpoint.Newest(path, checkpoint.load(path), {}), []
        except UserError as error:
            way_out = f" hydra.run.dir={path.parent} resume=auto goes on from the newest whole checkpoint there."
            others = len(list(path.parent.glob("*.pt"))) > 1
            raise UserError(f"resume: {str(error).rstrip('.')}.{way_out if others else ''}") from None
    found = checkpoint.newest(folder)
    if found is None:
        return None, []
    notes = []
    for path, why in found.damaged.items():
        aside = path.with_name(f"{path.name}.damaged")
        try:
            path.replace(aside)
        except OSError as error:
            raise UserError(f"{path} can't be renamed: {error.strerror}. {why}") from None
        notes.append(f"skipped {why.rstrip('.')}. It is now {aside.name}; the run goes on from {found.path.name}")
    return found, notes
