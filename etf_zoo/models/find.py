"""Which model a name means: every command and script takes a model by every name that it has."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, load_model_config_from_hf

from ..errors import EtfZooError
from ..timm_compat import load_model_config_from_path
from ..weights.config import read_config
from ..weights.download import hub_errors, pin
from ..weights.native import CONFIG_NAME, WEIGHTS_NAME, cards_folder, read_file
from .create import create_plain
from .tags import default_tag

__all__ = ["Source", "check_weights", "find_model", "load_model", "model_folder"]

_HUB = "hf-hub:"
_LOCAL = "local-dir:"


@dataclass(frozen=True)
class Source:
    """A model that timm can create.

    Attributes:
        name: For `timm.create_model`.
        architecture: timm's name of the architecture, without a tag.
        input_size: Side in pixels that its weights were trained for, or its architecture is meant for.
        identity: What its features depend on besides the architecture: tag, recorded sha256 of the weights, colors. So
            that what was measured on other weights of the same name is not taken for theirs.
        folder: Model folder that its files lie in; None if they are not on this machine as a folder.
        license: Of its weights, such as `apache-2.0`; empty where it is not stated.
        num_classes: That its weights know; 0 where it is not stated.
    """

    name: str
    architecture: str
    input_size: int
    identity: str = ""
    folder: Path | None = None
    license: str = ""
    num_classes: int = 0

    @property
    def is_twin(self) -> bool:
        """Whether its classifier is a fixed frame already."""
        return self.architecture.endswith("_etf")


def find_model(model: str, pretrained: bool = True) -> Source:
    """Look a model up without building it.

    Args:
        model: timm or twin name with or without a tag, `hf-hub:ORG/NAME`, a model folder, the folder of a finished run
            (whose model lies in `model/`), or the name of a folder in `model_cards/`.
        pretrained: Whether its weights are wanted; a twin's default tag may have another size than its base.

    Returns:
        Where it is. Only `hf-hub:` names need a network.

    Raises:
        EtfZooError: If there is no such model; the message names near ones.
        LoadError: If the Hub cannot be asked.

    Example:
        >>> import etf_zoo
        >>> find_model("mobilenetv3_small_100_etf").folder.name
        'mobilenetv3_small_100_etf.e27_tiny'
    """
    if not model:
        raise EtfZooError("Name a model: a timm name, a folder, a run, or hf-hub:ORG/NAME.")
    if folder := model_folder(model):
        if "architecture" not in read_config(folder / CONFIG_NAME):  # whose errors name file and field
            raise EtfZooError(
                f"{folder / CONFIG_NAME} names no architecture, so this is no classifier. A model of segment.py is for "
                f"etf-zoo segment."
            )
        cfg, architecture, _ = load_model_config_from_path(folder)
        found = f"{_LOCAL}{folder}", architecture, cfg["input_size"][-1], _identity(cfg, folder), folder
        return Source(*found, _license(cfg), cfg.get("num_classes", 0))
    if model.startswith(_HUB):
        with hub_errors(model.removeprefix(_HUB)):
            cfg, architecture, _ = load_model_config_from_hf(model.removeprefix(_HUB))
        found = model, architecture, cfg["input_size"][-1], _identity(cfg), None
        return Source(*found, _license(cfg), cfg.get("num_classes", 0))
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise EtfZooError(_unknown(model))
    name = model
    if pretrained and not tag and architecture.endswith("_etf") and (default := default_tag(architecture)):
        name = f"{architecture}.{default}"
    try:
        cfg: Any = get_pretrained_cfg(name)
    except RuntimeError:
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "no tag"
        raise EtfZooError(f"{architecture} has no tag {tag!r}; there is {known}.") from None
    embedded = cards_folder() / name
    folder = embedded if (embedded / CONFIG_NAME).is_file() else None
    entries = cfg.to_dict()
    found = model, architecture, cfg.input_size[-1], _identity(entries, folder), folder
    return Source(*found, _license(entries), cfg.num_classes)


def model_folder(model: str) -> Path | None:
    """Model folder that a path, the path of a run, or the name of a card that is no tag of timm's means; else None.

    Raises:
        EtfZooError: If there is such a folder without a model, and timm knows no model of the name either.

    Example:
        >>> model_folder("mobilenetv3_small_100_etf.e27_tiny") is None  # a tag of the registry's
        True
    """
    path = Path(model.removeprefix(_LOCAL))
    carded = cards_folder() / model if model and Path(model).name == model and not _is_timm(model) else path
    for folder in (path, path / "model", carded):
        if (folder / CONFIG_NAME).is_file():
            return folder
    if model.startswith(_LOCAL) or (path.is_dir() and not _is_timm(model)):
        raise EtfZooError(f"{path} holds no model: neither it nor its folder model/ has a {CONFIG_NAME}.")
    return None


def load_model(model: str, pretrained: bool = True, **kwargs: Any) -> Any:
    """Build a model by any of its names, in evaluation mode.

    Args:
        model: See `find_model`.
        pretrained: Whether with its weights.
        kwargs: For `timm.create_model`.

    Raises:
        EtfZooError: See `find_model`.
        LoadError: If the weights cannot be had.

    Example:
        >>> load_model("mobilenetv3_small_100_etf").num_classes
        200
    """
    source = find_model(model, pretrained)
    hub_id = source.name.removeprefix(_HUB)
    if pretrained:
        check_weights(source)
    with nullcontext() if source.folder else hub_errors(hub_id):
        built = create_plain(source.name, pretrained=pretrained, **kwargs).eval()
    if hub_id != source.name and not source.is_twin:  # twins say it themselves
        pin(hub_id, cache_dir=kwargs.get("cache_dir"))
    return built


def check_weights(source: Source) -> None:
    """Before timm reads a folder by itself: nothing but a whole safetensors file, as the `config.json` beside it says.

    A twin's weights are checked as they are read.

    Raises:
        LoadError: If they are missing, altered, damaged, or a pickle.
    """
    if source.name.startswith(_LOCAL) and not source.is_twin:
        read_file(Path(source.name.removeprefix(_LOCAL)) / WEIGHTS_NAME)


def _is_timm(model: str) -> bool:
    if ":" in model or not timm.is_model(model.partition(".")[0]):
        return False
    try:
        return get_pretrained_cfg(model) is not None
    except RuntimeError:  # no such tag
        return False


def _unknown(model: str) -> str:
    if model.count("/") == 1:
        return f"There is no model or folder {model!r}. On the Hub? Then {_HUB}{model}."
    near = difflib.get_close_matches(model, timm.list_models(), n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"There is no model or folder {model!r}.{hint} `etf-zoo list` shows the names."


def _license(cfg: Mapping[str, Any]) -> str:
    return str(cfg.get("license") or "")


def _identity(cfg: Mapping[str, Any], folder: Path | None = None) -> str:
    file = folder / CONFIG_NAME if folder else None
    recorded = json.loads(file.read_text(encoding="utf-8")).get("weights_sha256") if file else None
    return repr([cfg.get("tag"), recorded, list(cfg["mean"]), list(cfg["std"])])
