"""What a field of a recipe takes, said once, in its type: `epochs: Annotated[int, Range(1)]`.

`check_value` compares a value with such a type. Recipes check themselves with it, and `--help` prints the same rules.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from etf_zoo.errors import EtfZooError

__all__ = [
    "Choice",
    "Count",
    "Fields",
    "Probability",
    "Range",
    "Rule",
    "Texts",
    "check_plain",
    "check_value",
    "describe",
    "describe_rules",
    "field_hints",
]

MAX_COUNT = 10**9
MAX_DEPTH = 20  # of lists and dictionaries within a free-form field


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included unless `above` or `below` says otherwise.

    Attributes:
        low: Smallest number.
        high: Largest number.
        above: Leave out `low` itself.
        below: Leave out `high` itself.
        note: What a special number means, such as "0 for none".

    Example:
        >>> str(Range(0, 1, above=True))
        'in (0, 1]'
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    note: str = ""

    def allows(self, value: float) -> bool:
        """Whether a number lies in the range; nan does not."""
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        if self.high in (math.inf, MAX_COUNT):  # of the latter only computers have to know
            text = f"above {self.low}" if self.above else f"at least {self.low}"
        else:
            text = f"in {'[('[self.above]}{self.low}, {self.high}{'])'[self.below]}"
        return f"{text} ({self.note})" if self.note else text


@dataclass(frozen=True)
class Choice:
    """One of several texts.

    Attributes:
        options: The texts.
        former: What recipes said before; still read, not shown.

    Example:
        >>> str(Choice(("fp32", "bf16")))
        'one of fp32, bf16'
    """

    options: Iterable[str]
    former: Iterable[str] = ()

    def allows(self, value: str) -> bool:
        """Whether a text is one of the options."""
        return value in self.options or value in self.former

    def __str__(self) -> str:
        return f"one of {', '.join(self.options)}"


@dataclass(frozen=True)
class Rule:
    """Any other condition, with its words."""

    says: str
    holds: Callable[[Any], bool]

    def allows(self, value: Any) -> bool:
        """Whether the condition holds."""
        return self.holds(value)

    def __str__(self) -> str:
        return self.says


@dataclass(frozen=True)
class Texts:
    """Texts that match a regular expression as a whole, with what it means in words."""

    pattern: str
    says: str

    def allows(self, value: str) -> bool:
        """Whether a text matches."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.says


Count = Annotated[int, Range(1, MAX_COUNT)]
Probability = Annotated[float, Range(0, 1)]
_RULES = (Range, Choice, Rule, Texts)


@dataclass
class Fields:
    """Base of recipes: a dataclass that checks its fields when it is made.

    Attributes:
        group: Name of the field that holds it in a recipe, for messages: `optim` makes `lr` into `optim.lr`.
    """

    group: ClassVar[str] = ""

    def __post_init__(self):
        prefix = f"{self.group}." if self.group else ""
        for name, hint in field_hints(type(self)).items():
            check_value(prefix + name, hint, getattr(self, name))


@functools.cache
def field_hints(kind: type) -> dict[str, Any]:
    """Name -> type, with its rules, of the fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def check_value(name: str, hint: Any, value: Any) -> None:
    """Compare a value with the type of a field.

    Args:
        name: Dotted name of the field, for the message.
        hint: Its type. Rules in `Annotated` are checked too.
        value: The value. A dictionary in the place of a dataclass is checked field by field.

    Raises:
        EtfZooError: On a value that does not fit. The message has the field, the value and what is allowed.
    """
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            for key, inner in value.items():
                check_value(f"{name}.{key}", field_hints(hint)[key], inner)  # type: ignore[arg-type]  # a class
        elif not isinstance(value, hint):  # type: ignore[arg-type]  # a class
            raise EtfZooError(f"{name} takes fields and values, got {_short(value)}.")
    elif not _fits(hint, value):
        raise EtfZooError(f"{name} takes {describe(hint)}, got {_short(value)}.")
    else:
        check_plain(name, value)


def check_plain(name: str, value: Any, depth: int = 0) -> None:
    """Refuse what a recipe file cannot hold: other types, endless nesting, numbers that are not finite.

    Raises:
        EtfZooError: With the name of the field.
    """
    if depth > MAX_DEPTH:
        raise EtfZooError(f"{name} is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise EtfZooError(f"{name} takes texts as keys, got {_short(key)}.")
            check_plain(f"{name}.{key}" if key else name, inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(name, inner, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise EtfZooError(f"{name} takes finite numbers, got {value}.")
    elif isinstance(value, str) and re.search(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", value):
        raise EtfZooError(f"{name} holds a character that cannot be printed, got {_short(value)}.")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise EtfZooError(f"{name} takes numbers, texts, lists and dictionaries, got a {type(value).__name__}.")


def describe(hint: Any) -> str:
    """What a type takes, in words: `a whole number, at least 1`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        words = describe(args[0])
        for rule in args[1:]:
            words = str(rule) if isinstance(rule, Choice | Rule | Texts) else f"{words} {rule}"
        return words
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is list:
        return f"a list, each item {describe(args[0])}"
    if origin is dict:
        return "names and values"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(hint, "a value")


def describe_rules(hint: Any) -> str:
    """The rules of a type in words, for `--help`; empty where there is none."""
    if get_origin(hint) is list:
        inner = describe_rules(get_args(hint)[0])
        return f"each {inner}" if inner else ""
    rules = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return ", ".join(str(rule) for rule in rules)


def _fits(hint: Any, value: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rules = [rule for rule in args[1:] if isinstance(rule, _RULES)]
        return _fits(args[0], value) and all(rule.allows(value) for rule in rules)
    if origin in (Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(args[0], item) for item in value)
    if origin is dict:
        # keys are checked with what lies below them
        return isinstance(value, dict) and all(_fits(args[1], item) for item in value.values())
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _short(value: Any) -> str:
    printer = reprlib.Repr()
    printer.maxstring = printer.maxother = printer.maxlong = 60
    try:
        return "nothing (null)" if value is None else printer.repr(value)
    except ValueError:  # Python does not print whole numbers of more than 4,300 digits
        return "a number of thousands of digits"
