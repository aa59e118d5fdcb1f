"""From a parsed command to the function that does it, and from its errors to one line."""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib import import_module

import etf_zoo  # noqa: F401  registers the twins

from ..text import printable

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Do what a command line asks for.

    Args:
        args: From `etf_zoo_cli.build_parser`; `run` says what function of which module here.

    Returns:
        Exit status: 0, or 1 after a message on standard error; a training's own.
    """
    module, _, function = args.run.partition(":")
    warnings.filterwarnings("ignore", module=r"PIL\..*")  # on large images and odd metadata that it reads all the same
    try:
        return getattr(import_module(f"etf_zoo.cli.{module}"), function)(args) or 0
    except BrokenPipeError:  # `etf-zoo list | head`
        return 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # of the trainer, whose scripts end so
        if isinstance(end.code, str):
            return _say(end.code.removeprefix("error: "))
        return end.code or 0
    except (ValueError, RuntimeError, OSError) as error:
        return _say(str(error))


def _say(message: str) -> int:
    print(f"etf-zoo: {' '.join(printable(line) for line in message.splitlines())}", file=sys.stderr)
    return 1
