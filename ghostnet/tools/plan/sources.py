"""What a config has other than the defaults, and which word or file of conf/ says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ghostnet.config import Config, flat, resolved, unresolved
from ghostnet.door.groups import CONF


@dataclass(frozen=True)
class Difference:
    """One value that is not the default."""

    key: str
    value: Any
    default: Any
    source: str
    """The word of the command, or the file."""


def composed(words: Sequence[str]) -> Config:
    """The config of one job as it is written, with its interpolations: what a checkpoint of it keeps."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return unresolved(compose("train", overrides=list(words)))


def differences(config: Config, choices: dict[str, Any], words: Sequence[str]) -> list[Difference]:
    """What differs from `python train.py` of a fresh clone, in the config's order. choices: of each group."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        # What this machine's own conf/local says is no default.
        own = ["~local"] if (CONF / "local" / "default.yaml").exists() else []
        plain = compose("train", overrides=own, return_hydra_config=True)
        raw = unresolved(compose("train", overrides=list(words)))
    words = [word for word in words if not word.startswith("hydra")]
    usual = dict(plain.hydra.runtime.choices)
    bare = unresolved(plain)
    bare.pop("hydra")
    defaults = dict(flat(resolved(OmegaConf.create(bare))))
    files = _Files(choices, usual, OverridesParser.create().parse_overrides(list(words)), dict(flat(raw)))
    return [
        Difference(key, value, defaults.get(key, "–"), files.source(key))
        for key, value in flat(config)
        if key not in defaults or defaults[key] != value
    ]


class _Files:
    """Where the values of a config come from."""

    def __init__(
        self, choices: dict[str, Any], usual: dict[str, Any], words: list[Override], raw: dict[str, Any]
    ) -> None:
        self.choices, self.usual, self.words, self.raw = choices, usual, words, raw
        self.experiment = f"experiment/{choices['experiment']}.yaml" if choices.get("experiment") else None

    def source(self, key: str) -> str:
        """The last one that says it: the command, the experiment, this machine's file, the chosen option."""
        for word in reversed(self.words):
            if key == word.key_or_group or (key.startswith(f"{word.key_or_group}.") and "." in word.key_or_group):
                return str(word.input_line)
        for file in (self.experiment, "local/default.yaml"):
            if file and _holds(file, key):
                return f"conf/{file}"
        group = key.partition(".")[0]
        if str(self.raw.get(key)).startswith("${"):
            return f"follows {str(self.raw[key])[2:-1]}"
        if self.choices.get(group) != self.usual.get(group):
            return f"conf/{group}/{self.choices[group]}.yaml, chosen by {self._chooser(group)}"
        return "conf/train.yaml"

    def _chooser(self, group: str) -> str:
        for word in reversed(self.words):
            if word.key_or_group == group:
                return str(word.input_line)
        device = f"device/{self.choices.get('device')}.yaml"
        files = [file for file in (self.experiment, "local/default.yaml", device) if file and _overrides(file, group)]
        return f"conf/{files[0]}" if files else "conf/train.yaml"


def _load(file: str) -> DictConfig | None:
    path: Path = CONF / file
    loaded = OmegaConf.load(path) if path.exists() else None
    return loaded if isinstance(loaded, DictConfig) else None


def _holds(file: str, key: str) -> bool:
    """Whether a file of conf/ that is merged at the top gives a key."""
    node: Any = _load(file)
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in list(node.keys()):
            return False
        node = node._get_node(part)
    return True


def _overrides(file: str, group: str) -> bool:
    """Whether a file's defaults list chooses an option of a group."""
    node = _load(file)
    entries = node.get("defaults", []) if node is not None else []
    keys = [str(key) for entry in entries if isinstance(entry, DictConfig) for key in entry]
    return any(key.removeprefix("override ").strip("/").partition("@")[0] == group for key in keys)
