"""Errors for what a user can mend. The command line prints their one sentence and no traceback."""

from __future__ import annotations

__all__ = ["DivergedError", "EtfZooError", "ExportError", "LoadError", "MissingPackageError", "StorageError"]


class EtfZooError(ValueError):
    """Something that was asked for cannot be done; the message names the fix.

    Example:
        >>> from etf_zoo.frames import simplex_etf
        >>> try:
        ...     simplex_etf(100, 8)
        ... except EtfZooError as error:
        ...     print(type(error).__name__)
        EtfZooError
    """


class ExportError(EtfZooError, RuntimeError):
    """A model cannot be written in the form that was asked for."""


class LoadError(EtfZooError, RuntimeError):
    """Weights cannot be found, read or fetched, or belong to another model."""


class MissingPackageError(EtfZooError, ImportError):
    """A package of an optional extra is not installed."""


class StorageError(EtfZooError, OSError):
    """A file cannot be written or read, such as on a full disk."""


class DivergedError(EtfZooError, FloatingPointError):
    """Training gave a number that is not finite."""
