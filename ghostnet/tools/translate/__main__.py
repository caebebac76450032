"""The reference's command as ours: python -m ghostnet.tools.translate 'bash ./test/train_full_8p.sh --data_path=D'.

Takes a line of Ascend ModelZoo's GhostNet for PyTorch, in quotes or word by word: a script of test/ with its flags, or
a Python program with its flags, with what goes before it in a shell (nohup, taskset, a loop over cards). The first line
printed is our command; below it which version of the reference it was taken for and why, which flags did nothing
there, which have no home here and why, which are unknown. --version=1.5 or --version=1.8 says which version it is.
"""

import shlex

from ghostnet.errors import UserError
from ghostnet.tools import entry
from ghostnet.tools.translate.command import ITSELF, NONE, NOTE, NOTHING, VERSION, WARNING, Command, translate
from ghostnet.tools.translate.shell import FORM, parse


def page(command: Command) -> str:
    """The command, then the remarks under their headings."""
    lines = [shlex.join(["python", f"{command.program}.py", *command.words])]
    for heading in (VERSION, WARNING, NOTHING, NONE, ITSELF, NOTE):
        remarks = [(text, why) for kind, text, why in command.remarks if kind == heading]
        width = max((len(text) for text, _ in remarks), default=0)
        lines += ["", f"{heading}:"] if remarks else []
        lines += [f"  {text:<{width}}{'  ' if width else ''}{why}" for text, why in remarks]
    return "\n".join(lines)


def run(words: list[str]) -> None:
    """Print the page."""
    if not words:
        raise UserError(f"which command? {FORM}")
    ours = [word for word in words if word.startswith("--version")]
    theirs = [word for word in words if word not in ours]
    line = theirs[0] if len(theirs) == 1 else shlex.join(theirs)
    print(page(translate(parse(" ".join([*ours, line])))))


def main(typed: list[str]) -> int:
    """The exit code."""
    return entry.ended(run, __doc__, typed)


if __name__ == "__main__":
    entry.start(main)
