"""What is wrong with typed words whatever their program: dashes before a setting, line ends of another system."""

from collections.abc import Iterable, Sequence

from ghostnet.errors import ConfigError


def check_line_ends(words: Sequence[str]) -> None:
    r"""Raise ConfigError if a word ends in a carriage return: the script has Windows line ends.

    The words are not taken without it: a backslash at the end of such a line continues nothing, so that the shell would
    leave out all words of the next lines.
    """
    if any(word.endswith("\r") for word in words):
        raise ConfigError(
            "the script that runs this command has Windows line ends (CRLF). Convert it, dos2unix SCRIPT or "
            r"sed -i 's/\r$//' SCRIPT, and run it again."
        )


def without_dashes(word: str, known: Iterable[str]) -> str:
    """Return ' Settings are given without dashes: optim.lr=…' if a flag is a known setting, '' if it is none.

    known: dotted keys, of which --lr may also give the last part alone, and names of groups.
    """
    key, known = word.lstrip("-").partition("=")[0].replace("-", "_"), list(known)
    if key.startswith(("hydra.", "hydra/")):
        known.append(key)
    same = key if key in known else next((one for one in known if one.rpartition(".")[2] == key), None)
    return f" Settings are given without dashes: {same}=…" if key and same else ""
