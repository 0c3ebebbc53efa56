"""The command ``velm``. A command is a module of this package with HELP, add_arguments(parser) and run(args);
one with PASSES_ON finds arguments that it did not add in args.others."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from velm_kernels._version import __version__

COMMANDS = ("info", "check", "profile", "bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``velm`` with ``arguments`` (default: those of the process) and return its exit status."""
    parser = argparse.ArgumentParser(prog="velm", description="Fused kernels for vision-language models.")
    parser.add_argument("--version", action="version", version=f"velm_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        module = importlib.import_module(f"velm_kernels.cli.{name}")
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, passes_on=getattr(module, "PASSES_ON", False))
    args, others = parser.parse_known_args(arguments)
    if others and not args.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.others = others
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
