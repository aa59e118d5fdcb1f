"""While something is chosen, no images but those of training can be opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from etf_zoo.errors import EtfZooError

__all__ = ["choosing", "refuse_test"]

_choosing: ContextVar[bool] = ContextVar("choosing", default=False)


@contextmanager
def choosing() -> Iterator[None]:
    """Seal every split but that of training for the length of a block, in which rates, strengths or epochs are chosen.

    Example:
        >>> with choosing():
        ...     refuse_test("test", "train")
        Traceback (most recent call last):
        ...
        etf_zoo.errors.EtfZooError: ...
    """
    token = _choosing.set(True)
    try:
        yield
    finally:
        _choosing.reset(token)


def refuse_test(split: str, train_split: str) -> None:
    """Raise EtfZooError if `choosing`, and the split is not that of training."""
    if _choosing.get() and split != train_split:
        raise EtfZooError(
            f"Split {split!r} was asked for while something is chosen: choose by held-out images of {train_split!r}."
        )
