"""On PYTHONPATH: a process of train.py announces the moment that TORTURE_AIM names, and waits there to be killed.

TORTURE_AIM, as JSON: `event`, an audit event of Python ("open", "os.rename" …) with a file whose name matches `name`,
or "call" of the function file:name; the `count`th of them in a process whose rank is `rank`; `mark`, the file that
announces it; `hold`, the seconds for which the process waits there, at most, as long as that file is there.
"""

import fnmatch
import json
import os
import sys
import time

AIM = json.loads(os.environ.get("TORTURE_AIM", "null"))


def reached():
    """Announce the moment, the given time it comes."""
    if os.environ.get("RANK", "0") != AIM["rank"]:
        return
    AIM["count"] -= 1
    if AIM["count"]:
        return
    until = time.monotonic() + AIM["hold"]
    with open(AIM["mark"], "w") as mark:  # noqa: PTH123 (pathlib would be an import in every process)
        mark.write(str(os.getpid()))
    while os.path.exists(AIM["mark"]) and time.monotonic() < until:  # noqa: PTH110
        time.sleep(0.001)


def audit(event, args):
    """For events that come with files, in any thread."""
    if event == AIM["event"]:
        names = [os.path.basename(os.fspath(word)) for word in args if isinstance(word, str | os.PathLike)]  # noqa: PTH119
        if any(fnmatch.fnmatchcase(name, AIM["name"]) for name in names):
            reached()


def watch_calls(event, args):
    """Once the loop's module is imported, have the calls of its thread looked at: before, that would cost seconds."""
    if event == "exec" and getattr(args[0], "co_filename", "").endswith("ghostnet/engine.py"):
        file, _, function = AIM["name"].partition(":")

        def called(frame, what, value):
            code = frame.f_code
            if what == "call" and code.co_name == function and code.co_filename.endswith(file):
                reached()

        sys.setprofile(called)


if AIM:
    sys.addaudithook(watch_calls if AIM["event"] == "call" else audit)
