"""Methods that one argument switches on, by True or by the method's own arguments: `moving`, `whitening`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import EtfZooError

__all__ = ["read_switch"]


def read_switch(name: str, value: Any, known: Iterable[str]) -> bool | dict[str, Any]:
    """What a switch says: False, True (all defaults) or the method's arguments, of which there is at least one.

    Args:
        name: The switch.
        value: True, False, None (off), or a mapping of arguments; an empty one switches the method on, as True does.
        known: The method's arguments.

    Raises:
        ValueError: On another type, or an argument that the method does not take.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    takes = ", ".join(known)
    if not isinstance(value, Mapping):
        raise EtfZooError(f"{name} is True, False or a mapping with any of {takes}; got {value!r}.")
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        raise EtfZooError(f"{name} takes {takes}; not {', '.join(unknown)}.")
    return dict(value) or True
