"""A typed dataclass from a YAML file and the command line; a mistake gets one line."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from etf_zoo.errors import EtfZooError

from .fields import check_plain, check_value, describe_rules, field_hints

__all__ = ["merged", "parse", "parse_entries", "read_arguments", "read_yaml"]

T = TypeVar("T")
# What others call our fields, where no likeness of the letters would find them.
OTHER_WORDS = {
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "wd": "optim.weight_decay",
    "optimizer": "optim.name",
    "image_size": "sizes",
    "img_size": "sizes",
    "output_dir": "output",
    "data_dir": "data.source",
}


def parse(kind: type[T], args: list[str] | None = None) -> T:
    """Read a recipe as `read_arguments` does, for a program's main function.

    Raises:
        SystemExit: On a mistake, with exit code 2, after one line about it.
    """
    try:
        return read_arguments(kind, sys.argv[1:] if args is None else args)
    except EtfZooError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def parse_entries(kind: type[T], entries: dict[str, Any]) -> T:
    """A recipe from a dictionary, read and checked as a file with the same content would be.

    Raises:
        EtfZooError: As `read_arguments` does.
    """
    check_plain("The recipe", entries)
    _check_entries(entries, _dotted(kind), "in the recipe")
    return _built(kind, entries)


def read_arguments(kind: type[T], args: list[str]) -> T:
    """Read a recipe from `--config FILE` and overrides such as `--optim.lr 1e-3`.

    A name may be spelled with dashes or underscores. A flag may stand alone: `--resume` is `--resume true`. Short for
    `--data.source NAME` is `--data NAME`.

    Raises:
        EtfZooError: On an unknown field, with the nearest name, or on a value that does not fit.
        SystemExit: After `--help`.

    Example:
        >>> read_arguments(Recipe, ["--optim.lr", "0.1", "--epochs", "3"])
    """
    fields = _dotted(kind)
    args = [_spelled(arg) for arg in args]
    if "data.source" in fields:
        args = [re.sub(r"^--data(=|$)", r"--data.source\1", arg) for arg in args]
    for i in reversed(range(len(args))):
        is_flag = args[i].startswith("--") and fields.get(args[i][2:]) is bool
        if is_flag and (i + 1 == len(args) or args[i + 1].startswith("--")):
            args.insert(i + 1, "true")
    entries: dict[str, Any] = {}
    for name, value in _pairs(args):
        if name in ("help", "print_config"):
            _describe(kind, name)
        _check_name(name, fields, "on the command line")
        if name == "config":
            entries = _with(entries, _read_file(value, fields), fields)
            continue
        known = name in fields
        content = value if known and _is_text(fields[name]) else read_yaml(value, f"--{name}")
        if known:
            check_value(name, fields[name], content)
        else:  # a key of a free-form field, such as model_args.drop_rate
            check_plain(name, content)
        change: Any = content
        for part in reversed(name.split(".")):
            change = {part: change}
        entries = _with(entries, change, fields) if known else merged(entries, change)
    return _built(kind, entries)


def read_yaml(text: str, name: str) -> Any:
    """YAML as recipes are written in it: no key twice, nothing that holds itself, `1e-3` is a number.

    Args:
        text: The YAML.
        name: What it is, for messages.

    Raises:
        EtfZooError: If it is no such YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise EtfZooError(f"{name} is nested too deeply.") from None
    # PyYAML lets errors of int(), float() and the like through, for tags such as `!!int x`
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise EtfZooError(f"{name} is not YAML: {error}.") from None


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A nested dictionary with some of its entries changed."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = merged(base[key], value) if both else value
    return out


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses keys that come twice and nodes that hold themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in seen:
                        raise yaml.YAMLError(f"{key.value!r} comes twice, in line {key.start_mark.line + 1}")
                    seen.add(key.value)
        return node

    def compose_document(self) -> Any:
        root = super().compose_document()
        _refuse_cycles(root, [], set())
        return root


# As YAML 1.2 and jsonargparse have it, and YAML 1.1 has not: 1e-3 is a number; and dates are texts.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in entries if not tag.endswith((":timestamp", ":float"))]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?i:inf)$|\.(?i:nan)$"
    ),
    list("-+0123456789."),
)


def _refuse_cycles(node: Any, above: list[int], done: set[int]) -> None:
    if id(node) in above:
        raise yaml.YAMLError(f"the value in line {node.start_mark.line + 1} holds itself")
    if id(node) in done or not isinstance(node, yaml.CollectionNode):
        return
    above.append(id(node))
    for item in node.value:
        for inner in item if isinstance(item, tuple) else (item,):
            _refuse_cycles(inner, above, done)
    above.pop()
    done.add(id(node))


def _describe(kind: type, option: str) -> NoReturn:
    """Print `--help`, or with `print_config` all fields and their defaults as YAML; jsonargparse's, with our rules."""
    parser = ArgumentParser(description=(kind.__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="A recipe: a YAML file of fields and values.")
    parser.add_class_arguments(kind, as_group=False, sub_configs=False)
    rules = {name: describe_rules(hint) for name, hint in _dotted(kind).items()}
    for action in parser._actions:
        if rules.get(action.dest) and action.help:
            action.help = f"{action.help} Allowed: {rules[action.dest].replace('%', '%%')}."
    parser.parse_args([f"--{option}"])
    raise SystemExit(0)


def _spelled(arg: str) -> str:
    """`--time-budget=9m` as `--time_budget=9m`."""
    name, equals, value = arg.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if arg.startswith("--") else arg


def _dotted(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all fields of nested dataclasses, and their types."""
    found: dict[str, Any] = {}
    for name, hint in field_hints(kind).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found |= _dotted(hint, f"{prefix}{name}.")  # type: ignore[arg-type]  # a class, not an instance
    return found


def _pairs(args: list[str]) -> Iterator[tuple[str, str]]:
    """Name and value of every option."""
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if not arg.startswith("--"):
            if arg == "-h":
                name = "--help"
            else:
                raise EtfZooError(f"{arg!r} belongs to no option. Options are --name value.")
        if not equals and name not in ("--help", "--print_config"):
            following = next(rest, None)
            if following is None:
                raise EtfZooError(f"{name} takes a value.")
            value = following
        yield name[2:], value


def _with(entries: dict[str, Any], changes: dict[str, Any], fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries with some changed: groups field by field, others, such as `model_args`, as a whole."""
    out = dict(entries)
    for key, value in changes.items():
        is_group = dataclasses.is_dataclass(fields.get(prefix + key))
        out[key] = _with(out.get(key, {}), value, fields, f"{prefix}{key}.") if is_group else value
    return out


def _is_text(hint: Any) -> bool:
    return hint is str or (get_origin(hint) is not None and get_args(hint)[0] is str)


def _read_file(file: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What a recipe file says, checked."""
    name = f"The recipe {file}"
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise EtfZooError(f"Cannot read the recipe {file}: {error.strerror}.") from None
    except ValueError:  # bytes that are no text, or a path with a null character
        raise EtfZooError(f"{name} is not a text file in UTF-8.") from None
    content = read_yaml(text, name)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise EtfZooError(f"{name} has to be fields and values, `name: value` a line.")
    _check_entries(content, fields, f"in {file}")
    return content


def _check_entries(entries: dict[Any, Any], fields: dict[str, Any], where: str, prefix: str = "") -> None:
    for key, value in entries.items():
        if not isinstance(key, str):
            raise EtfZooError(f"Names of fields are texts, got {prefix}{key!r} ({where}).")
        name = prefix + key
        _check_name(name, fields, where)
        if isinstance(value, dict) and dataclasses.is_dataclass(fields.get(name)):
            _check_entries(value, fields, where, f"{name}.")
        elif name in fields:
            check_value(name, fields[name], value)


def _built(hint: Any, value: Any) -> Any:
    """A checked value as its type wants it: dataclasses from dictionaries, floats from whole numbers."""
    if get_origin(hint) is Annotated:
        return _built(get_args(hint)[0], value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = field_hints(hint)  # type: ignore[arg-type]  # a class, not an instance
        return hint(**{name: _built(hints[name], inner) for name, inner in value.items()})  # type: ignore[operator]
    if get_origin(hint) is list:
        return [_built(get_args(hint)[0], item) for item in value]
    return float(value) if hint is float else copy.deepcopy(value)


def _check_name(name: str, fields: dict[str, Any], where: str) -> None:
    owner = next(
        (known for known, hint in fields.items() if name.startswith(f"{known}.") and "dict" in str(hint)), None
    )
    if name in fields or owner or name in ("config", "help", "print_config"):
        return
    # a field may be right and only its group missing: lr for optim.lr
    inner = [known for known in fields if known.rpartition(".")[2] == name.rpartition(".")[2]]
    inner = inner or [known for known in [OTHER_WORDS.get(name)] if known in fields]
    near = inner or difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(f for f in fields if '.' not in f)}."
    raise EtfZooError(f"There is no field {name!r} ({where}). {hint}")
