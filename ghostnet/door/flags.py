"""The flags of a command: Hydra's; of others one message, with what was meant."""

import argparse
import sys
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from ghostnet.door import manual
from ghostnet.door.typed import check_line_ends, without_dashes
from ghostnet.errors import ConfigError
from ghostnet.schema import did_you_mean


class Arguments(argparse.Namespace):
    """The flags of a command, and its words."""

    help: bool
    hydra_help: bool
    shell_completion: bool
    multirun: bool
    info: str | None
    cfg: str | None
    config_name: str | None
    config_dir: str | None
    config_path: str | None
    overrides: list[str]


def arguments(name: str) -> Arguments:
    """Parse Hydra's flags and the words; one message and exit code 1 if a flag is none of Hydra's.

    name: of the primary config.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False  # else --experiment=quickstart is taken for --experimental-rerun
    flags = [flag for action in parser._actions for flag in action.option_strings]

    def refuse_flag(message: str) -> NoReturn:
        wrong = message.partition("unrecognized arguments: ")[2].split()
        if wrong and not wrong[0].startswith("-"):
            message, wrong = f"{' '.join(wrong)}: words stand together, flags before or behind them", []
        # As other programs take them: --epochs 3, --epochs=3.
        hint = (without_dashes(wrong[0], manual.settings(name)) or did_you_mean(wrong[0], flags)) if wrong else ""
        said = f"{wrong[0]}: no such flag." if wrong else f"{message}."
        print(f"error: {said}{hint} --help tells what there is.", file=sys.stderr)
        raise SystemExit(1)

    parser.error = refuse_flag  # type: ignore[method-assign]
    try:
        check_line_ends(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    args = parser.parse_args(namespace=Arguments())
    if args.config_name or args.config_dir or args.config_path:
        flag = "--config-name" if args.config_name else "--config-dir" if args.config_dir else "--config-path"
        refuse_flag(
            f"{flag}: this program reads its own conf/. Settings that go together make an experiment there, "
            "conf/experiment/NAME.yaml, which experiment=NAME chooses"
        )
    if asked := [flag for flag in ("cfg", "info", "shell_completion") if args.multirun and getattr(args, flag)]:
        refuse_flag(f"-m: --{asked[0].replace('_', '-')} is of one job, leave -m out")
    return args
