"""Weights & Biases: the rows of a run, by a process beside it; training goes on whatever becomes of that."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import OmegaConf

from ghostnet.errors import ConfigError
from ghostnet.loggers import Row, RunInfo, say
from ghostnet.schema import Positive
from ghostnet.watchdog import LONG, waiting
from ghostnet.wandb.process import Recorder
from ghostnet.wandb.recorder import Request

ID_FILE = "wandb_id"
FORBIDDEN = set("/\\#?%:")
"""Characters that a project's name can't have."""
Mode = Literal["online", "offline", "disabled"]
ENVIRONMENT = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "name": "WANDB_NAME",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
}
"""Which of wandb's variables gives an option that the config leaves null."""
DEFAULTS: dict[str, Any] = {"project": "ghostnet", "job_type": "train", "tags": []}
"""Of options that neither gives."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a logger group says of Weights & Biases; conf/logger/wandb.yaml explains each."""

    project: str | None
    mode: Mode | None
    entity: str | None
    group: str | None
    name: str | None
    job_type: str | None
    tags: list[str] | None
    notes: str | None
    artifact: bool
    timeout: float


class Wandb:
    """Weights & Biases: nested config, rows over `step`, the best accuracy and FPS as summary.

    A resumed run goes on under the same id. Without a login or a network it records offline and says how to sync. Where
    it fails later, that is said once, and how to send the rest at the end.
    """

    def __init__(
        self,
        project: str | None,
        mode: Mode | None,
        entity: str | None,
        group: str | None,
        name: str | None,
        job_type: str | None,
        tags: list[str] | None,
        notes: str | None,
        artifact: bool,
        timeout: Positive,
    ) -> None:
        self.options = completed(Options(project, mode, entity, group, name, job_type, tags, notes, artifact, timeout))
        self.mode = in_force(mode)
        self.recorder: Recorder | None = None
        self.failed = self.ending = False
        check(self.options.project, self.mode)

    def start(self, run: RunInfo) -> None:
        """Start the process that records, or goes on with, the run."""
        self.folder, self.step, self.prefix = run.folder, run.step, run.prefix
        if self.mode == "disabled":
            if self.options.mode is None:
                self._say("Weights & Biases records nothing: WANDB_DISABLED or WANDB_MODE says so.")
            return
        wanted = request(run.folder, run.config, self.options, online=self.mode == "online", live=True)
        try:
            (run.folder / ID_FILE).write_text(wanted.id + "\n", encoding="utf-8")
            self.recorder = Recorder(wanted)
        except OSError as error:
            what = "its process can't be started" if error.filename is None else f"{error.filename} can't be written"
            self._fail(f"{what}: {error.strerror}")

    def log(self, row: Row) -> None:
        """The row is on its way by metrics.jsonl; what there is to say of earlier ones is said."""
        self.step = row["step"]
        if self.recorder is not None:
            self._hear(self.recorder.news())

    def back(self, step: int, evaluated: int) -> None:
        """Its process sees that metrics.jsonl is another file."""

    def finish(self, result: Row | None) -> None:
        """Bring the result and wait for the end, for so long as the time limit says; say what was recorded where."""
        self.ending = True
        if self.recorder is not None:
            self.recorder.end(result)
            with waiting("Weights & Biases", LONG + self.options.timeout):  # it has a limit of its own
                self._hear(self.recorder.rest(self.options.timeout))
        if self.failed:
            self._say(
                "What Weights & Biases lacks is in metrics.jsonl. To send it:\n"
                f"  python -m ghostnet.tools.wandb_sync {os.path.relpath(self.folder)}"
            )

    def _hear(self, messages: Iterator[dict[str, Any]]) -> None:
        for message in messages:
            event = message["event"]
            if event == "started" and message["url"]:
                self._say(f"wandb   {message['url']}")
            elif event == "offline":
                self._say(f"{message['why'][:1].upper()}{message['why'][1:]}: recording offline.")
            elif event == "waiting":
                self._say(f"Weights & Biases takes the rest; that is waited for at most {self.options.timeout:.0f} s.")
            elif event == "stop":
                # As Ctrl-C: the training ends before a step and saves.
                self._say("Weights & Biases asks the run to stop.")
                os.kill(os.getpid(), signal.SIGINT)
            elif event == "done" and not message["online"]:
                self._say(f"Weights & Biases recorded offline. To upload it: wandb sync {message['where']}")
            elif event == "done" and message["artifact"]:
                self._say(f"The best checkpoint is wandb://{message['artifact']}")
            elif event == "failed":
                self._fail(message["why"])

    def _say(self, text: str) -> None:
        say(self.prefix + text)

    def _fail(self, why: str) -> None:
        """Say it, once, and be done with Weights & Biases."""
        goes_on = "" if self.ending else " Training goes on without it."
        self._say(f"Weights & Biases failed at step {self.step}: {why}.{goes_on}")
        if self.recorder is not None:
            self.recorder.kill()
        self.recorder, self.failed = None, True


def in_force(mode: str | None) -> str:
    """Return the mode that a config gives, else what WANDB_DISABLED and WANDB_MODE say, else online.

    ConfigError if WANDB_MODE is no mode.
    """
    if mode is not None:
        return mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    said = os.environ.get("WANDB_MODE") or "online"
    known = {"dryrun": "offline", "run": "online", "shared": "online"}.get(said, said)
    if known not in get_args(Mode):
        raise ConfigError(f"WANDB_MODE={said}: must be one of {', '.join(get_args(Mode))}.")
    return known


def completed(options: Options) -> Options:
    """Return the options with the environment's, else the defaults, in the places of those that are null."""
    left = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) is None]
    said = {key: os.environ[name] for key, name in ENVIRONMENT.items() if key in left and os.environ.get(name)}
    values: dict[str, Any] = {key: value for key, value in DEFAULTS.items() if key in left} | said
    if "tags" in said:
        values["tags"] = [tag.strip() for tag in said["tags"].split(",") if tag.strip()]
    return dataclasses.replace(options, **values)


def check(project: str | None, mode: str) -> None:
    """Raise ConfigError if wandb would refuse the project's name, or isn't installed."""
    if bad := FORBIDDEN & set(project or ""):
        name = "WANDB_PROJECT" if project == os.environ.get("WANDB_PROJECT") else "logger.wandb.project"
        raise ConfigError(f"{name}={project}: a project's name can't have {' '.join(bad)}.")
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logger=wandb: wandb is not installed: pip install wandb, or leave logger=wandb out.")


def request(folder: Path, config: dict[str, Any], options: Options, *, online: bool, live: bool) -> Request:
    """What a recorder is to be told of the run in a folder.

    A job of a sweep: the group is the sweep's, the name says what differs, unless the options say otherwise. Under an
    agent of a Weights & Biases sweep the run's id and place are the agent's. The id of another new run is WANDB_RUN_ID,
    if that is given for it alone and not for the jobs of a sweep.
    """
    id_file = folder / ID_FILE
    agent = bool(os.environ.get("WANDB_SWEEP_ID")) and live
    sweep, differs, record = described(folder)
    given = os.environ.get("WANDB_RUN_ID") if live and not sweep else None
    known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else given or uuid.uuid4().hex[:8]
    if agent and sweep:
        raise ConfigError("logger=wandb: an agent of a W&B sweep runs one job at a time: leave out -m.")
    wanted = {
        "group": options.group or sweep,
        "name": options.name or differs,
        "job_type": options.job_type,
        "tags": options.tags,
        "notes": options.notes,
        "config": config | ({"run": record} if record else {}),
    }
    run_id = os.environ.get("WANDB_RUN_ID", known) if agent else known
    if not agent:  # wandb refuses them there, with a warning
        wanted |= {"id": run_id, "project": options.project, "entity": options.entity}
    return Request(str(folder), run_id, online, wanted, options.artifact, options.timeout, live, os.getpid())


def described(folder: Path) -> tuple[str | None, str | None, dict[str, Any]]:
    """(the sweep's name, what differs within it, what run.json tells) of a run; None for a single run.

    Runs of before run.json are known by what Hydra wrote.
    """
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return sweep_name(record["sweep"]), record["name"], record
    with contextlib.suppress(OSError):
        hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra
        if str(hydra.mode).endswith("MULTIRUN"):
            whole = OmegaConf.load(Path(hydra.sweep.dir) / "multirun.yaml").hydra.overrides.task
            return sweep_name(hydra.sweep.dir), ",".join(w for w in hydra.overrides.task if w not in whole), {}
    return None, None, {}


def sweep_name(folder: str | None) -> str | None:
    """The name of a sweep by its folder: what stands behind multirun/, such as a name or date/time, else the last."""
    if folder is None:
        return None
    parts = Path(folder).parts
    behind = parts[len(parts) - parts[::-1].index("multirun") :] if "multirun" in parts else ()
    return "/".join(behind or parts[-1:])
