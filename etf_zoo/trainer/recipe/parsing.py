"""A typed dataclass from a YAML file and the command line; a mistake gets one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

import yaml
from jsonargparse import ArgumentParser, auto_cli

__all__ = ["merged", "parse", "parse_entries"]

T = TypeVar("T")


def parse(kind: type[T], args: list[str] | None = None) -> T:
    """Read a recipe from `--config FILE` and overrides such as `--optim.lr 1e-3`; a mistake ends the program.

    A name may be spelled with dashes or underscores. A flag may stand alone: `--resume` is `--resume true`. Short for
    `--data.source NAME` is `--data NAME`.

    Raises:
        SystemExit: On an unknown field, with the nearest name, or a value that does not fit, after one line about it.
    """
    fields = _fields(kind)
    args = [_spelled(arg) for arg in (sys.argv[1:] if args is None else args)]
    if "data.source" in fields:
        args = [re.sub(r"^--data(=|$)", r"--data.source\1", arg) for arg in args]
    for i in reversed(range(len(args))):
        is_flag = args[i].startswith("--") and fields.get(args[i][2:]) is bool
        if is_flag and (i + 1 == len(args) or args[i + 1].startswith("--")):
            args.insert(i + 1, "true")
    for arg in args:
        if arg.startswith("--"):
            _check_name(arg[2:].partition("=")[0], fields, "on the command line")
    for file in _config_files(args):
        _check_file(file, fields)
    try:
        return cast(T, auto_cli(kind, args=args, as_positional=False, parser_class=_Parser))
    except ValueError as error:  # from a recipe's own checks
        _stop(str(error))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A nested dictionary with some of its entries changed."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = merged(base[key], value) if both else value
    return out


class _Parser(ArgumentParser):
    """jsonargparse's, with a message in the place of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _stop(re.sub(r'Parser key "(.*?)":\s*', r"\1: ", re.sub(r"<class '(\w+)'>", r"\1", message)))


def parse_entries(kind: type[T], entries: dict[str, Any]) -> T:
    """A recipe from a dictionary, read and checked as a file with the same content would be."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(entries))
        return parse(kind, ["--config", str(file)])


def _stop(message: str) -> NoReturn:
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def _spelled(arg: str) -> str:
    """`--time-budget=9m` as `--time_budget=9m`."""
    name, equals, value = arg.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if arg.startswith("--") else arg


def _fields(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all fields of nested dataclasses, and their types."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        hint = found[prefix + name] = hints[name]
        if dataclasses.is_dataclass(hint):
            found |= _fields(cast(type, hint), f"{prefix}{name}.")
    return found


def _check_name(name: str, fields: dict[str, Any], where: str) -> None:
    owner = next(
        (known for known, hint in fields.items() if name.startswith(f"{known}.") and "dict" in str(hint)), None
    )
    if name in fields or owner or name in ("config", "help", "print_config"):
        return
    # a field may be right and only its group missing: lr for optim.lr
    inner = [known for known in fields if known.rpartition(".")[2] == name.rpartition(".")[2]]
    near = inner or difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(f for f in fields if '.' not in f)}."
    _stop(f"There is no field {name!r} ({where}). {hint}")


def _config_files(args: list[str]) -> list[str]:
    following = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "--config"]
    return following + [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]


def _check_file(file: str, fields: dict[str, Any]) -> None:
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        _stop(f"Cannot read the recipe {file}: {error.strerror}.")
    except yaml.YAMLError as error:
        _stop(f"The recipe {file} is not YAML: {error}.")
    if not isinstance(content or {}, dict):
        _stop(f"The recipe {file} has to be fields and values, `name: value` a line.")

    def check(values: dict, prefix: str) -> None:
        for key, value in values.items():
            _check_name(f"{prefix}{key}", fields, f"in {file}")
            if isinstance(value, dict) and dataclasses.is_dataclass(fields.get(f"{prefix}{key}")):
                check(value, f"{prefix}{key}.")

    check(content or {}, "")
