"""Several processes by accelerate's launcher, which ends with what one of them said rather than with its traceback."""

from __future__ import annotations

import logging
import subprocess
import sys

__all__ = ["launch"]


def launch(arguments: list[str]) -> int:
    """Do what `accelerate launch` does with these arguments, in this process.

    A process that fails says why in one line, see `run_script`; the launcher's traceback, which repeats the command and
    where accelerate's own code stands, is left out. SIGTERM and Ctrl-C reach all processes, which save then.

    Returns:
        Exit code: that of the first process that failed, 128 and the signal's number after a signal.

    Raises:
        SystemExit: On arguments that the launcher does not know.

    Example:
        >>> launch(["--num_processes", "2", "training/pretrain.py", "--config", "recipe.yaml"])  # doctest: +SKIP
        0
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic", "torch.distributed.run"):  # they repeat what a process said
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
