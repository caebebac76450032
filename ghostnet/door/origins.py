"""Which file, and which line of it, gave a key of a composed config its value."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ghostnet.door.groups import content, lines, shown

COMMAND = "the command"


@dataclass(frozen=True)
class Source:
    """A file that was composed, and the node it fills; the whole config where that is empty."""

    path: Path
    package: str


class Origins:
    """Of one job's config."""

    def __init__(self, sources: Sequence[Source], choices: Iterable[str], keys: Iterable[str]) -> None:
        """sources: in the order of composition. choices, keys: the groups and the keys that the command names."""
        self.sources, self.choices, self.keys = list(sources), set(choices), set(keys)

    def told(self, keys: Sequence[str]) -> str:
        """' Set by conf/experiment/mine.yaml, line 3, and the command.'; '' where that can't be told."""
        places = list(dict.fromkeys(place for key in keys if (place := self.place(key))))
        return f" Set by {' and '.join(places)}." if places else ""

    def place(self, key: str) -> str:
        """The command, or a file with its line; '' for none."""
        return next(self._places(key, {key}), "")

    def _places(self, key: str, seen: set[str]) -> Iterator[str]:
        if key in self.choices or any(f"{key}.".startswith(f"{given}.") for given in self.keys):
            yield COMMAND
        for source in reversed(self.sources):
            prefix = f"{source.package}." if source.package else ""
            line = lines(source.path).get(key.removeprefix(prefix)) if key.startswith(prefix) else None
            if line is None:
                continue
            # Of a reference the place of what it refers to: that is where to change it.
            other = re.fullmatch(r"\$\{([\w.]+)\}", (line.value or "").strip("\"'"))
            if other and other[1] not in seen:
                yield from self._places(other[1], seen | {other[1]})
            yield f"{shown(source.path)}, line {line.number}"
        yield from self._chosen(key)
        # A key that is missing: the file of the node that lacks it.
        if parent := key.rpartition(".")[0]:
            yield from (shown(source.path) for source in reversed(self.sources) if source.package == parent)
            yield from self._places(parent, seen | {parent})

    def _chosen(self, group: str) -> Iterator[str]:
        """The files that choose an option of a group in their defaults."""
        choice = re.compile(rf"\s*-\s+(override\s+)?/?{re.escape(group)}(@\S+)?:")
        for source in reversed(self.sources):
            for number, text in enumerate(content(source.path).splitlines(), 1):
                if choice.match(text):
                    yield f"{shown(source.path)}, line {number}"
