"""The command `argen`: finds a command by its name and runs it."""

import argparse
import atexit
import gc
import sys

from argen import __version__
from argen.command import (
    HelpFormatter,
    Parser,
    check_numbers,
    explained,
    flush_output,
    guarded,
    open_streams,
    printable,
)
from argen.garbage import uncollected
from argen.registry import commands


def parser(argv: list[str]) -> Parser:
    """Create the parser; only the command that `argv` names is imported, or all of them for `argen --help`."""
    top = Parser(prog="argen", description="Autoregressive image generation: images from words, offline.")
    top.add_argument("--version", action="version", version=f"argen {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in [argv[0]] if argv and argv[0] in commands else commands:
        module = commands[name]
        description, text = getattr(module, "DESCRIPTION", None), module.HELP.replace("%", "%%")
        add = subparsers.add_parser(name, help=text, description=description, formatter_class=HelpFormatter)
        if argv and name == argv[0]:
            module.add_arguments(add)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input is one line on stderr and the exit code 2."""
    open_streams()
    help_text = None
    try:
        code = run(argv)
    except BrokenPipeError:  # of a help text: Python 3.11.2 does not pass over it
        code = 141
    except SystemExit as end:  # after a help text
        code, help_text = end.code, end
    failure = flush_output()  # or Python says at its end that it is not
    if failure is not None and not code:
        return explained("argen", failure)
    if help_text is not None:
        raise help_text
    return code


def run(argv: list[str] | None) -> int:
    """See `main`."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    atexit.register(gc.freeze)  # or Python, when it ends, searches all that was imported for garbage several times
    with uncollected():
        try:
            args = parser(argv).parse_args(argv)
        except (ValueError, ImportError) as error:  # a command of a package that cannot be imported
            print(f"argen: error: {printable(str(error))}", file=sys.stderr)
            return 2

    def run_command(args: argparse.Namespace) -> None:
        if args.command != "train":  # its steps are those of a schedule
            check_numbers(args)
        commands[args.command].run(args)

    return guarded(f"argen {args.command}", run_command, args)
