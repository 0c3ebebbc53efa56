"""python -m python_models SYSTEM COMMAND: the complete models of this folder."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each has a module `commands` with `add_commands(parser)`, which sets `run` for every command.
SYSTEMS = {"vqa": "visual question answering: which module joins picture and question best?"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_models", description=__doc__)
    systems = parser.add_subparsers(dest="system", required=True)
    for name, text in SYSTEMS.items():
        commands = importlib.import_module(f"python_models.{name}.commands")
        commands.add_commands(systems.add_parser(name, help=text, description=text))
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
