"""A rank that hangs ends the run: with the stack of every rank, the name of who hangs, and what the others wait for.

What the main thread waits for has a name, by waiting(). A thread looks whether it goes on, and tells the other ranks.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

log = logging.getLogger("ghostnet")

DUMP = signal.SIGRTMIN + 5
"""Has a rank write its stacks, in C: also where it holds Python's lock."""
LONG = 3600.0
"""Seconds for what may take long where nothing is wrong: the disk, a download, a compiler."""
ENDING = 10.0
"""Seconds after which a process that hangs ends, even where it can't tell what it should."""


@dataclass
class Doing:
    """What the main thread is at."""

    what: str
    since: float
    limit: float | None = None
    """Seconds; None: the watch's own."""
    others: bool = False
    """It waits for the other ranks."""


READY = "getting ready"
"""What it is at before the first batch."""
clock = [0.0]
"""Seconds that the watch has seen go by. One that was suspended, as by Ctrl-Z, has seen none meanwhile."""
_doing: list[Doing] = [Doing(READY, 0.0, LONG)]


@contextlib.contextmanager
def waiting(what: str, limit: float | None = None, others: bool = False) -> Iterator[None]:
    """Inside, the main thread waits for that, at most `limit` seconds where a watch is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _doing.append(Doing(what, clock[0], limit, others))
    try:
        yield
    finally:
        _doing.pop()
        _doing[-1].since = clock[0]


def is_ready() -> None:
    """From now on the main thread has no more than the watch's limit for what has no name."""
    _doing[0] = Doing("its own work", clock[0])


class Watch:
    """A thread that ends this process where its main thread does not go on, and all ranks where one of them doesn't.

    A wait for the others has no limit while each of them goes on: only who does not is waited for too long.
    """

    def __init__(
        self,
        limit: float,
        report: Callable[[str], None],
        rank: int = 0,
        world_size: int = 1,
        board: Any = None,  # noqa: ANN401 (torch's Store)
    ) -> None:
        """limit: seconds. report: tells the user why it ends. board: a store that all ranks have; None: one alone."""
        self.limit, self.report, self.rank, self.world_size, self.board = limit, report, rank, world_size, board
        self.interval = min(5.0, limit / 10)
        self.silence = max(3 * self.interval, min(limit / 2, 60.0))
        """Seconds after which a rank that tells nothing is taken for one that hangs."""
        self.beat, self.ended = 0, threading.Event()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self.seen: dict[int, tuple[int, float]] = {}
        """The last beat of each rank, and when it was new."""
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watch":
        faulthandler.register(DUMP, self.stacks, all_threads=True)
        _doing[:] = [Doing(READY, clock[0], LONG)]
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join(self.interval + ENDING)
        faulthandler.unregister(DUMP)
        self.stacks.close()

    # The thread

    def _run(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(self.interval):
            now = time.monotonic()
            clock[0] += min(now - last, 2 * self.interval)
            last = now
            doing = _doing[-1]
            age = clock[0] - doing.since
            try:
                message = self._told(doing, age)
                posts = self._posts() if message or age > self._limit(doing) else {}
            except Exception as error:  # RuntimeErrors of many kinds, of a store whose process is gone or hangs
                message, posts = None, {}
                if self.ended.is_set() or age <= self._limit(doing) + ENDING:
                    continue
                message = f"{self._overdue(doing, age)}, and the main rank's process doesn't answer ({error})"
            if message is None and age > self._limit(doing):
                message = self._verdict(posts) if self.board is not None else self._overdue(doing, age)
            if message is not None and not self.ended.is_set():
                self._end(message, posts)

    def _limit(self, doing: Doing) -> float:
        return max(self.limit, doing.limit or 0)

    def _told(self, doing: Doing, age: float) -> str | None:
        """Tell the others what this rank is at -> what one of them has found out, which ends all."""
        if self.board is None:
            return None
        self.beat += 1
        told = {"beat": self.beat, "what": doing.what, "age": age, "others": doing.others, "limit": self._limit(doing)}
        told |= {"host": socket.gethostname(), "pid": os.getpid(), "file": self.stacks.fileno()}
        self.board.set(f"rank {self.rank}", json.dumps(told))
        return str(json.loads(self.board.get("end"))[0]) if self.board.check(["end"]) else None

    def _posts(self) -> dict[int, dict[str, Any]]:
        """What each rank has told last; `silent`: for how long it has told nothing."""
        posts: dict[int, dict[str, Any]] = {}
        for rank in range(self.world_size) if self.board is not None else ():
            if not self.board.check([f"rank {rank}"]):
                continue
            post = json.loads(self.board.get(f"rank {rank}"))
            beat, since = self.seen.get(rank, (0, clock[0]))
            if post["beat"] != beat:
                since = clock[0]
            self.seen[rank] = post["beat"], since
            posts[rank] = post | {"silent": clock[0] - since}
        return posts

    def _is_frozen(self, post: dict[str, Any]) -> bool:
        return bool(post["silent"] > self.silence)

    def _verdict(self, posts: dict[int, dict[str, Any]]) -> str | None:
        """Who hangs, or None where all that is waited for goes on."""
        frozen = [rank for rank, post in posts.items() if self._is_frozen(post)]
        alive = {rank: post for rank, post in posts.items() if rank not in frozen}
        late = [rank for rank, post in alive.items() if not post["others"] and post["age"] > post["limit"]]
        at_work = [rank for rank, post in alive.items() if not post["others"] and rank not in late]
        faults = [f"rank {rank} hangs: its process doesn't answer" for rank in frozen]
        faults += [
            f"rank {rank} hangs: it has not gone on for {alive[rank]['age']:.0f} s, in {alive[rank]['what']}"
            for rank in late
        ]
        waits = [f"rank {rank} waits for {post['what']}" for rank, post in alive.items() if post["others"]]
        if faults:
            return f"{'; '.join(faults)}. {'; '.join(waits)}{'.' if waits else ''}".strip()
        if len(posts) < self.world_size:
            missing = [str(rank) for rank in range(self.world_size) if rank not in posts]
            return f"rank {', '.join(missing)} has not come for {self.limit:.0f} s. {'; '.join(waits)}."
        if at_work or min(post["age"] for post in posts.values()) <= self.limit:
            return None
        return f"all ranks wait for each other, for {self.limit:.0f} s: {'; '.join(waits)}."

    def _overdue(self, doing: Doing, age: float) -> str:
        return f"the run has not gone on for {age:.0f} s, in {doing.what}"

    def _end(self, message: str, posts: dict[int, dict[str, Any]]) -> NoReturn:
        """Show the stacks of this rank and of those of this machine that can't themselves, then end."""
        last = threading.Timer(ENDING, os._exit, (1,))  # what is written to may hang as well
        last.daemon = True
        last.start()
        frozen: list[int] = []
        shown = [(self.rank, os.getpid(), self.stacks.fileno())]
        mine = {rank: post for rank, post in posts.items() if post["host"] == socket.gethostname()}
        if self.board is not None:
            with contextlib.suppress(RuntimeError):
                if self.board.check([f"shown {self.rank}"]):
                    time.sleep(ENDING)  # another rank, which woke this one, speaks for it
                found = json.dumps([message, [rank for rank, post in posts.items() if self._is_frozen(post)]])
                message, frozen = json.loads(self.board.compare_set("end", "", found))
                for rank in frozen:
                    self.board.set(f"shown {rank}", "")
        speaks = self.rank == min([rank for rank in mine if rank not in frozen], default=self.rank)
        if speaks:
            shown += [(rank, mine[rank]["pid"], mine[rank]["file"]) for rank in frozen if rank in mine]
        for rank, pid, file in shown:
            text = f"Stacks of rank {rank}, process {pid}:\n{dumped(pid, file)}\n"
            os.write(2, text.encode())
        if speaks:
            self.report(
                f"{message.rstrip('.')}. The stacks are above; the limit is stall_timeout={self.limit:g} seconds."
            )
        for _, pid, _ in shown[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(2 * self.interval)  # every rank has its say before one that ended ends all
        os._exit(1)


def dumped(pid: int, file: int) -> str:
    """The stacks of a process of this machine, by what it has registered DUMP with; a stopped one is let go on."""
    try:
        with open(f"/proc/{pid}/fd/{file}", "rb") as stacks:  # noqa: PTH123 (a file that has no name any more)
            os.kill(pid, DUMP)
            os.kill(pid, signal.SIGCONT)
            size = -1
            for _ in range(20):
                time.sleep(0.1)
                if size == (size := os.fstat(stacks.fileno()).st_size) > 0:
                    break
            return stacks.read().decode(errors="replace").rstrip() or "(it does not answer: see where its disk hangs)"
    except OSError as error:
        return f"({error.strerror})"


def tell(message: str) -> None:
    """Say why this process ends, on stderr and in the log."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    log.error(message)
