"""Send runs to Weights & Biases: python -m ghostnet.tools.wandb_sync RUNS… [project=…] [mode=offline] [timeout=600].

RUNS are run folders, or folders that hold some, such as a sweep's. Their metrics.jsonl, config.yaml and result.json go
to the W&B run that their wandb_id names, rows that are there already aside; runs that W&B has whole are left alone.
Every key of conf/logger/wandb.yaml can be given; the others are the run's own. mode=offline writes what `wandb sync`
uploads. The exit code is 1 where a run failed; the others are sent all the same.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ghostnet import output
from ghostnet.door.typed import check_line_ends, without_dashes
from ghostnet.errors import ConfigError, UserError, explain
from ghostnet.experiments import record
from ghostnet.schema import faults, signature
from ghostnet.wandb.logger import ID_FILE, Options, check, completed, in_force, request
from ghostnet.wandb.process import Recorder
from ghostnet.wandb.recorder import state

CONF = Path(__file__).parent.parent.parent / "conf"
AT_ONCE = 4
"""Runs that are sent at a time: most of it is waiting for the server."""
TIMEOUT = 600.0
"""Seconds that a run may take without a word, unless the command says otherwise: no training waits for it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    folder: Path
    said: str
    failed: bool = False
    unreachable: bool = False
    """The server is not there: it would not be for other runs either."""


class Sender:
    """Sends runs one by one, from several threads."""

    def __init__(self, given: dict[str, Any], progress: Any) -> None:  # noqa: ANN401 (rich's)
        self.given, self.progress = given, progress
        self.mode = in_force(given.get("mode"))
        if self.mode == "disabled":
            raise ConfigError("nothing would be sent: WANDB_DISABLED or WANDB_MODE says so. Give mode=online.")
        self.recorders: list[Recorder] = []
        self.unreachable: str | None = None

    def send(self, folder: Path) -> Outcome:
        """Send one run; its faults are in the outcome."""
        if self.unreachable:
            return Outcome(folder, f"not tried: {self.unreachable}", failed=True)
        task = self.progress.add_task(str(folder), total=None)
        try:
            outcome = self._send(folder, task)
        except Exception as error:
            if (message := explain(error)) is None:
                message = f"{type(error).__name__}: {error}"
            outcome = Outcome(folder, message, failed=True)
        finally:
            self.progress.remove_task(task)
        if outcome.unreachable:
            self.unreachable = outcome.said
        return outcome

    def _send(self, folder: Path, task: Any) -> Outcome:  # noqa: ANN401 (a number of rich's)
        rows, result = count_rows(folder), result_of(folder)
        if reason := self._needless(folder, rows, result is not None):
            return Outcome(folder, f"skipped, {reason}")
        config = config_of(folder)
        options = self.options(folder, config)
        wanted = request(folder, config, options, online=self.mode == "online", live=False)
        (folder / ID_FILE).write_text(wanted.id + "\n", encoding="utf-8")
        recorder = Recorder(wanted)
        self.recorders.append(recorder)
        recorder.end(result)
        self.progress.update(task, total=rows)
        outcome = Outcome(folder, "its process said nothing.", failed=True)
        for message in recorder.rest(options.timeout):
            if message["event"] == "rows":
                self.progress.update(task, completed=message["count"])
            elif message["event"] == "failed":
                outcome = Outcome(folder, f"{message['why']}.", True, message.get("offline", False))
            elif message["event"] == "done":
                word = "sent to" if message["online"] else "recorded offline; to upload it: wandb sync"
                outcome = Outcome(folder, f"{message['sent']:,} of {message['rows']:,} rows {word} {message['where']}")
        return outcome

    def options(self, folder: Path, config: dict[str, Any]) -> Options:
        """What the command gives, else where the run is at the server, else the run's own config, the environment."""
        defaults = OmegaConf.to_container(OmegaConf.load(CONF / "logger" / "wandb.yaml"))
        assert isinstance(defaults, dict)
        own = (config.get("logger") or {}).get("wandb") or {}
        node = defaults["wandb"] | own | {"timeout": TIMEOUT}
        if path := state(folder).get("path"):
            node["entity"], node["project"], _ = path.split("/")
        node |= self.given | {"mode": self.mode}
        node.pop("_target_")
        if found := faults(node, signature("ghostnet.wandb.logger.Wandb"), ""):
            raise ConfigError("; ".join(fault.text for fault in found))
        options = completed(Options(**node))
        check(options.project, self.mode)
        return options

    def _needless(self, folder: Path, rows: int, result: bool) -> str | None:
        """Why a run need not be sent; None where it must."""
        known = state(folder)
        if record.is_locked(folder):
            return "it is running: its own logger sends it"
        if not rows:
            return "it has no rows"
        if (known.get("rows"), known.get("result")) != (rows, result):
            return None
        if self.mode == "online" and known["online"]:
            entity, project, _ = known["path"].split("/")
            same = self.given.get("entity") in (None, entity) and self.given.get("project") in (None, project)
            return f"{known['path']} has it" if same else None
        there = self.mode != "online" and not known["online"] and Path(known["where"]).exists()
        return f"it is recorded; to upload it: wandb sync {known['where']}" if there else None


def count_rows(folder: Path) -> int:
    """The whole lines of metrics.jsonl."""
    return (folder / "metrics.jsonl").read_bytes().count(b"\n")


def result_of(folder: Path) -> dict[str, Any] | None:
    """The result of a run that came to one."""
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return dict(result) if result["status"] in ("completed", "pruned") else None
    return None


def config_of(folder: Path) -> dict[str, Any]:
    """config.yaml; UserError where it can't be read."""
    try:
        config = OmegaConf.to_container(DictConfig(OmegaConf.load(folder / "config.yaml")), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"config.yaml can't be read: {str(error).splitlines()[0]}") from None
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def found(words: list[str]) -> Iterator[Path]:
    """The run folders at and below the given ones; ConfigError for what is none."""
    for word in words:
        root = Path(word).expanduser()
        if not root.is_dir():
            keys = " ".join(f"{key}=…" for key in signature("ghostnet.wandb.logger.Wandb"))
            raise ConfigError(f"{word}: no folder, and none of {keys}")
        runs = sorted(path.parent for path in root.rglob("metrics.jsonl"))
        if not runs:
            raise ConfigError(f"{word}: no run below it: none of its folders has a metrics.jsonl.")
        yield from runs


def given_options(words: list[str]) -> dict[str, Any]:
    """The options among the words; ConfigError for values that they can't have."""
    node = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    assert isinstance(node, dict)
    given = {str(key): value for key, value in node.items()}
    parameters = signature("ghostnet.wandb.logger.Wandb")
    if wrong := faults(given, {key: parameters[key] for key in given}, ""):
        raise ConfigError("\n       ".join(fault.text for fault in wrong))
    if given.get("mode") == "disabled":
        raise ConfigError("mode=disabled: nothing would be sent. Give mode=online or mode=offline.")
    return given


def sync(words: list[str]) -> int:
    """Send all runs -> how many failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    keys = signature("ghostnet.wandb.logger.Wandb")
    options = [word for word in words if word.partition("=")[0] in keys and "=" in word]
    given = given_options(options)
    runs = list(dict.fromkeys(found([word for word in words if word not in options])))
    if not runs:
        raise ConfigError("no run: give run folders, or folders that hold some. --help says more.")
    if given.get("name") and len(runs) > 1:
        raise ConfigError(f"name={given['name']}: these are {len(runs)} runs; give group=… to hold them together.")
    console = Console(soft_wrap=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    failed = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        whole = progress.add_task("runs", total=len(runs))
        sender, pool = Sender(given, progress), ThreadPoolExecutor(AT_ONCE)
        try:
            for future in as_completed([pool.submit(sender.send, folder) for folder in runs]):
                outcome = future.result()
                failed += outcome.failed
                progress.advance(whole)
                line, file = f"{outcome.folder}: {outcome.said}", sys.stderr if outcome.failed else sys.stdout
                print(f"{'error: ' if outcome.failed else ''}{line}", file=file, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for recorder in sender.recorders:
                recorder.kill()
            raise
    print(f"{len(runs) - failed} of {len(runs)} runs are {'recorded' if sender.mode != 'online' else 'there'}.")
    return failed


def main(words: list[str]) -> int:
    """Send the runs -> exit code."""
    if {"-h", "--help"} & set(words):
        settings = (CONF / "logger" / "wandb.yaml").read_text(encoding="utf-8").partition("\n")[2]
        print(f"{(__doc__ or '').strip()}\n\n{settings}")
        return 0
    try:
        check_line_ends(words)
        if flags := [word for word in words if word.startswith("-")]:
            keys = signature("ghostnet.wandb.logger.Wandb")
            hint = without_dashes(flags[0], keys) or " Settings are given as key=value."
            raise ConfigError(f"{flags[0]}: no such flag.{hint} --help lists them.")
        return 1 if sync(words) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped, as asked. The same command goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    (output.end_with_reader if {"-h", "--help"} & set(sys.argv) else output.outlast)()
    sys.exit(main(sys.argv[1:]))
