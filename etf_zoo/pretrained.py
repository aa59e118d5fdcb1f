"""Native pretrained weights: the tags, where their files lie, and how they are read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg
from timm.models._hub import load_state_dict_from_hf
from torch import Tensor

__all__ = ["cards_folder", "native_tags", "read_weights", "read_file", "sha256"]

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def cards_folder() -> Path:
    """Folder of the embedded models: inside the package in a wheel, beside it in a clone."""
    inside = Path(__file__).parent / "model_cards"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "model_cards"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def native_tags(folder: Path | None = None) -> dict[str, tuple[PretrainedCfg, dict[str, Any]]]:
    """Embedded models: `"<arch>_etf.<tag>"` -> (pretrained cfg, saved model arguments).

    Args:
        folder: Folder of model folders, each with `config.json` (timm's format) and `model.safetensors`;
            the package's own by default.

    Returns:
        Only models whose weights file is there.
    """
    tags = {}
    for config_file in sorted((folder or cards_folder()).glob(f"*_etf.*/{CONFIG_NAME}")):
        weights = config_file.with_name(WEIGHTS_NAME)
        if not weights.is_file():
            continue
        config = json.loads(config_file.read_text(encoding="utf-8"))
        name = config_file.parent.name
        cfg = PretrainedCfg(
            **{
                **config["pretrained_cfg"],
                "architecture": config["architecture"],
                "tag": name.partition(".")[2],
                "num_classes": config["num_classes"],
                "label_names": config.get("label_names"),
                "label_descriptions": config.get("label_descriptions"),
                "file": str(weights),
            }
        )
        tags[name] = (cfg, config.get("model_args", {}))
    return tags


def read_weights(cfg: Mapping[str, Any], cache_dir: Any = None) -> dict[str, Tensor]:
    """State dict that a pretrained cfg points to: in memory, a file, a folder or a Hub repository.

    Args:
        cfg: Pretrained cfg as a dict.
        cache_dir: Cache folder for downloads.

    Returns:
        Name -> tensor, as stored (float16 backbone, float32 frame).

    Raises:
        RuntimeError: If there are no weights, or the file is missing, altered or not a safetensors file.
    """
    if cfg.get("state_dict"):
        return dict(cfg["state_dict"])
    if cfg.get("file"):
        path = Path(cfg["file"])
        return read_file(path / WEIGHTS_NAME if path.is_dir() else path)
    if cfg.get("hf_hub_id"):
        return load_state_dict_from_hf(cfg["hf_hub_id"], WEIGHTS_NAME, cache_dir=cache_dir)
    name = cfg.get("architecture", "this model")
    base = name.removesuffix("_etf")
    raise RuntimeError(
        f"There are no pretrained weights for {name} yet, native or converted; `etf-zoo list --pretrained` shows what "
        f"has some. Use pretrained=False, or put a frame on timm's own backbone: "
        f"etf_zoo.attach_frame(timm.create_model({base!r}, pretrained=True, num_classes=K))."
    )


def read_file(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, after checking it against the sha256 in the `config.json` beside it, if there is one.

    Raises:
        RuntimeError: If the file is missing, altered or not a safetensors file.
    """
    if not path.is_file():
        raise RuntimeError(f"There is no weights file {path}.")
    if path.suffix != ".safetensors":
        raise RuntimeError(f"{path} is not a .safetensors file; nothing else is read, for safety.")
    config_file = path.with_name(CONFIG_NAME)
    if config_file.is_file():
        wanted = json.loads(config_file.read_text(encoding="utf-8")).get("weights_sha256")
        if wanted and sha256(path) != wanted:
            raise RuntimeError(
                f"{path} is truncated or altered: its sha256 is not the one in {config_file.name}. "
                f"Reinstall the package, or download or export the model again."
            )
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise RuntimeError(
            f"{path} is not a readable safetensors file ({error}). Download or export it again."
        ) from None
