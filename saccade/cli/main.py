"""`saccade`: finds the command, prints what it found, and turns mistakes into one clear line.

A command is a module with HELP, `arguments(parser)` and `run(args) -> Result`. It prints nothing on stdout itself, so
that `--json` gives one JSON document and nothing else; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from saccade.core.errors import SaccadeError

COMMANDS = ("demo", "list", "show", "run", "eval", "lm-eval", "cab", "report", "doctor", "plan", "bench")
MISTAKE, INTERRUPTED = 2, 130


class Result(NamedTuple):
    """What a command found: data for --json, text for people, and its exit code."""

    data: Any
    text: str
    code: int = 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def parser() -> Parser:
    """All commands and their arguments. Nothing heavy is imported for it."""
    from saccade import __version__

    top = Parser(prog="saccade", description="Content-based attention for long-context transformers.")
    top.add_argument("--version", action="version", version=f"saccade {__version__}")
    verbs = top.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        module = import_module(f"saccade.cli.{name.replace('-', '_')}")
        sub = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        sub.add_argument("--json", action="store_true", help="print one JSON document, progress goes to stderr")
        module.arguments(sub)
        sub.set_defaults(command=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a mistake, 130 after Ctrl-C."""
    try:
        args = parser().parse_args(argv)
        args.command_line = "saccade " + " ".join(sys.argv[1:] if argv is None else argv)
        result = args.command(args)
        print(json.dumps(result.data, indent=1, allow_nan=False) if args.json else result.text, flush=True)
        return int(result.code)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # the reader of our output has gone; there is nobody to tell, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SaccadeError as error:
        return _fail(str(error), MISTAKE)
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _fail(named, MISTAKE)


def _fail(message: str, code: int) -> int:
    print(f"saccade: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
