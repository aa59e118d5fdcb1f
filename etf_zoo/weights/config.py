"""A model's `config.json`: every error names file and field; it describes a model, and is followed nowhere else."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from ..errors import LoadError

__all__ = ["CONFIG_NAME", "DIGEST", "config_digest", "read_config", "without_sources"]

CONFIG_NAME = "config.json"
DIGEST = "config_sha256"
# Entries of a pretrained cfg that say where weights come from, or how they are read.
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of what a config says, whatever the order and the spacing; its own entry for the digest is left out.

    Example:
        >>> config_digest({"a": 1, "b": 2}) == config_digest({"b": 2, "a": 1})
        True
    """
    said = {key: value for key, value in config.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_config(file: Path) -> dict[str, Any]:
    """Read and check a config.

    Args:
        file: `config.json` in timm's format.

    Raises:
        LoadError: If it is missing, no JSON, not what was written, or a field has a value that it cannot have.

    Example:
        >>> config = read_config(Path("model_cards/mobilenetv3_small_100_etf.e27_tiny/config.json"))
        >>> config["architecture"]
        'mobilenetv3_small_100_etf'
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of JSON, of UTF-8
        raise LoadError(f"{file} cannot be read ({error}). Download, export or install the model again.") from None
    except RecursionError:
        raise LoadError(f"{file} is no config of a model: it is nested too deeply.") from None
    if not isinstance(config, dict):
        raise LoadError(f"{file} is no config of a model: it holds a {type(config).__name__}, not an object.")
    if DIGEST in config and config[DIGEST] != config_digest(config):
        raise LoadError(
            f"{file} is not what was written: its {DIGEST} differs. If you changed it yourself, remove that entry; "
            f"else download, export or install the model again."
        )
    _check_fields(file, "", config, _CONFIG)
    cfg = config.get("pretrained_cfg", {})
    unknown = [key for key in cfg if key not in {field.name for field in fields(PretrainedCfg)}]
    if unknown:
        raise LoadError(f"{file}: pretrained_cfg has unknown entries ({', '.join(map(str, unknown))}).")
    _check_fields(file, "pretrained_cfg.", cfg, _PRETRAINED_CFG)
    names, num_classes = config.get("label_names"), config.get("num_classes")
    if names is not None and num_classes is not None and len(names) != num_classes:
        raise LoadError(f"{file}: label_names has {len(names)} names for {num_classes} classes.")
    return config


def without_sources(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The pretrained cfg of a repository or folder, as timm has read it, without what points elsewhere.

    timm adds where it was read from: `hf_hub_id` for a repository, `file` for a folder. These stay.

    Args:
        cfg: As `timm.create_model("hf-hub:...")` hands it to an architecture's function.

    Warns:
        UserWarning: If there was something that pointed elsewhere.

    Example:
        >>> without_sources({"source": "hf-hub", "hf_hub_id": "org/a", "mean": [0, 0, 0]})
        {'source': 'hf-hub', 'hf_hub_id': 'org/a', 'mean': [0, 0, 0]}
    """
    own = {"hf-hub": ("hf_hub_id", "source"), "local-dir": ("file", "source")}.get(cfg.get("source") or "")
    if own is None:
        return dict(cfg)
    foreign = [key for key in _SOURCES if cfg.get(key) and key not in own]
    if foreign:
        warnings.warn(
            f"{CONFIG_NAME} of {cfg[own[0]]} says where else to take weights from ({', '.join(foreign)}); this is not "
            f"followed, its weights are its own.",
            stacklevel=2,
        )
    return {key: value for key, value in cfg.items() if key not in foreign}


# -------------------------------------------------------------------------------------------------------- the fields

_Rule = tuple[Callable[[Any], bool], str]  # whether a value can be right, and what it has to be


def _check_fields(file: Path, prefix: str, values: Mapping[str, Any], rules: Mapping[str, _Rule]) -> None:
    for key, (is_right, wanted) in rules.items():
        value = values.get(key)
        if value is not None and not is_right(value):
            raise LoadError(f"{file}: {prefix}{key} must be {wanted}, it is {str(value)[:60]!r}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**7


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_count(n) and 0 < n <= 10**5 for n in value)


def _list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


_CONFIG: dict[str, _Rule] = {
    "architecture": (_is_text, "a name"),
    "num_classes": (_is_count, "a whole number"),
    "num_features": (_is_count, "a whole number"),
    "label_names": (_list_of(_is_text), "a list of names"),
    "label_descriptions": (_is_texts, "texts by name"),
    "model_args": (lambda value: isinstance(value, dict), "an object"),
    "pretrained_cfg": (lambda value: isinstance(value, dict), "an object"),
    "weights_sha256": (lambda value: _is_text(value) and len(value) == 64, "64 hexadecimal digits"),
}
_PRETRAINED_CFG: dict[str, _Rule] = {
    "input_size": (_is_size, "channels, height and width"),
    "test_input_size": (_is_size, "channels, height and width"),
    "mean": (_list_of(_is_number), "a list of numbers"),
    "std": (_list_of(lambda value: _is_number(value) and value > 0), "a list of positive numbers"),
    "crop_pct": (lambda value: _is_number(value) and 0 < value <= 2, "a share"),
    "interpolation": (_is_text, "a name"),
    "classifier": (lambda value: _is_text(value) or _list_of(_is_text)(value), "a name or a list of names"),
    "license": (lambda value: isinstance(value, str), "a text"),
    "description": (lambda value: isinstance(value, str), "a text"),
}
