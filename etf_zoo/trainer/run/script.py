"""How a script ends: with one line for what a user can mend, with a traceback for a defect."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from etf_zoo.errors import EtfZooError
from etf_zoo.text import printable

__all__ = ["explain", "is_deliberate", "run_script"]

SYSTEM = (errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENOSPC, errno.ENOTDIR, errno.EROFS)  # a user's to mend
NETWORK = (
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "requests",
    "urllib3",
    "aiohttp",
)  # packages that raise its errors
INTERRUPTED = 130  # exit code of what Ctrl-C ends
PATIENCE = 10.0  # seconds


def is_deliberate(error: BaseException) -> bool:
    """Whether an error says what is wrong by itself: this project raised it on purpose, or the system refused."""
    return isinstance(error, EtfZooError) or getattr(error, "errno", None) in SYSTEM


def explain(error: BaseException) -> str | None:
    """One line for what a user can mend; None for a defect, whose traceback is wanted.

    Example:
        >>> explain(PermissionError(errno.EACCES, "Permission denied", "/runs"))
        '/runs: Permission denied. Give --output (or $ETF_ZOO_CACHE, or $HF_HOME) a folder that you can write to.'
    """
    if isinstance(error, EtfZooError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "The GPU's memory is full. --accumulate 2 (or 4, 8) takes each batch in so many pieces; "
            "training/launch/fsdp.yaml shares the weights among GPUs. Go on with --resume."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'The disk'}: {error.strerror}. Make room, then go on with --resume."
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return (
            f"{error.filename or 'A folder'}: {error.strerror}. Give --output (or $ETF_ZOO_CACHE, or $HF_HOME) a "
            f"folder that you can write to."
        )
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, and what was asked for is not in the cache. Fetch it once with a network."
        lost = isinstance(cause, ConnectionError | LocalEntryNotFoundError) and not isinstance(cause, BrokenPipeError)
        if lost or type(cause).__module__.partition(".")[0] in NETWORK:
            first = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
            return (
                f"No network, or the Hub does not answer ({first.rstrip('.')}). Folders, embedded weights and what is "
                f"in the cache need none."
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def run_script(main: Callable[[], None]) -> None:
    """Run a script. What a user can mend ends it with one line and exit code 1, Ctrl-C with one line and 130.

    Of several processes that fail, the first says why: the launcher ends the others.

    Raises:
        SystemExit: In these cases; a defect keeps its traceback.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each try without a network
    try:
        main()
    except KeyboardInterrupt:
        print(
            "Interrupted. If training has begun, the same command with --resume goes on from its last checkpoint.",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":  # the launcher ends this process once the first has said why
            time.sleep(PATIENCE)
        shown = "\n".join(printable(line) for line in message.splitlines())  # names in it are others' words
        raise SystemExit(f"error: {shown}") from None
