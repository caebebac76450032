"""Keys and tokens of the environment: never written to a run folder or a log."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = re.compile(r"(^|_)(API_?)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(_|$)", re.IGNORECASE)
FILE = re.compile(r"(^|/)(\.env[^/]*|\.?netrc|id_[a-z0-9]+|credentials[^/]*|[^/]*\.(pem|key|p12|pfx))$", re.IGNORECASE)
SHORTEST = 8
"""Characters: what is shorter, such as TOKEN=1, is no secret, and would be found everywhere."""


def values(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The secrets in the environment, by the name of their variable; paths to them aside."""
    return {
        name: value
        for name, value in environment.items()
        if NAME.search(name) and len(value) >= SHORTEST and not _is_path(value)
    }


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long for one
        return False


def without(text: str) -> str:
    """A text with *** in the place of each secret of the environment."""
    for secret in sorted(values().values(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def found_in(texts: Iterable[str]) -> list[str]:
    """The names of the secrets that stand in any of the texts."""
    joined = "\n".join(texts)
    return [name for name, value in values().items() if value in joined]


def is_file(path: str) -> bool:
    """Whether files of such a name hold secrets: .env, .netrc, private keys."""
    return bool(FILE.search(path))
