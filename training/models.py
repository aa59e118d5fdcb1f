"""Where a recipe's `model` is: a timm name, a `hf-hub:` id, a model folder, or the folder of a finished run."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, load_model_config_from_hf
from timm.models._hub import load_model_config_from_path

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.pretrained import CONFIG_NAME

__all__ = ["Source", "find_model"]


@dataclass(frozen=True)
class Source:
    """A model that timm can create.

    Attributes:
        name: For `timm.create_model`.
        architecture: timm's name of the architecture, without a tag.
        input_size: Side in pixels that its weights were trained for, or its architecture is meant for.
        weights_digest: Of a folder's weights file, so that features of other weights under its name are not mixed up.
    """

    name: str
    architecture: str
    input_size: int
    weights_digest: str = ""

    @property
    def is_twin(self) -> bool:
        """Whether its classifier is a fixed frame already."""
        return self.architecture.endswith("_etf")


def find_model(model: str, pretrained: bool = True) -> Source:
    """Look a model up without building it.

    Args:
        model: timm name with or without a tag, `hf-hub:` id, model folder, or the folder of a finished run.
        pretrained: Whether its weights are wanted; a twin's default tag may have another size than its base.

    Raises:
        ValueError: If there is no such model.
    """
    folder = Path(model.removeprefix("local-dir:"))
    if folder.is_dir():
        found = next((path for path in (folder, folder / "model") if (path / CONFIG_NAME).is_file()), None)
        if found is None:
            raise ValueError(f"{folder} holds no model: neither it nor its folder model/ has a {CONFIG_NAME}.")
        cfg, architecture, args = load_model_config_from_path(found)
        digest = json.loads((found / CONFIG_NAME).read_text(encoding="utf-8")).get("weights_sha256", "")
        return Source(f"local-dir:{found}", args.get("base", architecture), cfg["input_size"][-1], digest)
    if model.startswith("hf-hub:"):
        cfg, architecture, args = load_model_config_from_hf(model.removeprefix("hf-hub:"))
        return Source(model, args.get("base", architecture), cfg["input_size"][-1])
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"There is no model or folder {model!r}.{hint}")
    name = model
    if pretrained and not tag and architecture.endswith("_etf"):  # with weights, the first tag that has some
        name = next(iter(timm.list_pretrained(f"{architecture}.*")), model)
    try:
        cfg: Any = get_pretrained_cfg(name)
    except RuntimeError:
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "no tag"
        raise ValueError(f"{architecture} has no tag {tag!r}; there is {known}.") from None
    return Source(model, architecture, cfg.input_size[-1])
