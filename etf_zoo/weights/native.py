"""Native pretrained weights: the tags, where their files lie, and how they are read and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg
from torch import Tensor

from ..errors import LoadError
from ..timm_compat import hf_split
from .config import CONFIG_NAME, read_config
from .download import download, sha256

__all__ = [
    "cards_folder",
    "chosen_source",
    "hub_location",
    "native_tags",
    "read_weights",
    "read_file",
    "recorded_location",
    "sha256",
]

WEIGHTS_NAME = "model.safetensors"
RECORD_NAME = "hub.json"  # where a model folder was published
MEMORY_NAME = "memory.safetensors"  # class means beside a model, for classes that come later
SOURCES = ("auto", "embedded", "package", "hub")


def cards_folder() -> Path:
    """Folder of the embedded models: inside the package in a wheel, beside it in a clone."""
    package = Path(__file__).parent.parent
    inside = package / "model_cards"
    return inside if inside.is_dir() else package.parent / "model_cards"


def hub_location(folder: Path) -> tuple[str, str | None] | None:
    """Where a native model lies on the Hub: (repository id, revision), or None if it is not published.

    The environment variable `ETF_ZOO_HUB_ORG`, if set, names an organization to load every native model from, at its
    main branch, instead of the repositories that publishing recorded; the sha256 stays the recorded one.

    Args:
        folder: Model folder.

    Raises:
        RuntimeError: If the record cannot be read.
    """
    if org := os.environ.get("ETF_ZOO_HUB_ORG"):
        return f"{org}/{folder.name}", None
    return recorded_location(folder)


def recorded_location(folder: Path) -> tuple[str, str] | None:
    """Repository id and commit under which a model folder was published, if it was; see `hub_location`."""
    record = folder / RECORD_NAME
    if not record.is_file():
        return None
    try:
        place = json.loads(record.read_text(encoding="utf-8"))
        return place["repo_id"], place["revision"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{record} is not readable ({error}). Publish the model again, or remove it.") from None


def native_tags(folder: Path | None = None) -> dict[str, tuple[PretrainedCfg, dict[str, Any]]]:
    """Native models: `"<arch>_etf.<tag>"` -> (pretrained cfg, saved model arguments).

    Args:
        folder: Folder of model folders, each with `config.json` (timm's format) and `model.safetensors`;
            the package's own by default.

    Returns:
        Only models whose weights file is there, or can be downloaded; the former first, as the first tag of an
        architecture is its default.

    Raises:
        LoadError: If a config cannot be read; it names file and field.

    Example:
        >>> cfg, args = native_tags()["mobilenetv3_small_100_etf.e27_tiny"]
        >>> cfg.num_classes, args["feature_norm"]
        (200, 'l2')
    """
    tags = {}
    files = (folder or cards_folder()).glob(f"*_etf.*/{CONFIG_NAME}")
    for config_file in sorted(files, key=lambda path: (not path.with_name(WEIGHTS_NAME).is_file(), path)):
        weights = config_file.with_name(WEIGHTS_NAME)
        if weights.is_file():
            source = {"file": str(weights)}
        elif place := hub_location(config_file.parent):
            source = {"hf_hub_id": "@".join(filter(None, place))}
        else:
            continue
        config, name = read_config(config_file), config_file.parent.name
        missing = [key for key in ("architecture", "num_classes", "pretrained_cfg") if key not in config]
        if missing:
            raise LoadError(f"{config_file} has no {' and no '.join(missing)}. Install or export the model again.")
        own = {
            "architecture": config["architecture"],
            "tag": name.partition(".")[2],
            "num_classes": config["num_classes"],
            "label_names": config.get("label_names"),
            "label_descriptions": config.get("label_descriptions"),
            **source,
        }
        tags[name] = (PretrainedCfg(**{**config["pretrained_cfg"], **own}), config.get("model_args", {}))
    return tags


def read_weights(cfg: Mapping[str, Any], cache_dir: Any = None) -> dict[str, Tensor]:
    """State dict that a pretrained cfg points to: in memory, a file, a folder or a Hub repository.

    Native weights come from the package if they are in it, else from the Hub. The environment variable
    `ETF_ZOO_SOURCE` says otherwise: `embedded` never downloads them, `hub` always takes the published ones. (`package`
    is for timm's own weights, see `etf_zoo.weights.packages`.)

    Args:
        cfg: Pretrained cfg as a dict.
        cache_dir: Cache folder for downloads.

    Returns:
        Name -> tensor, as stored (float16 backbone, float32 frame).

    Raises:
        RuntimeError: If there are no weights, or the file is missing, altered or not a safetensors file, or cannot be
            downloaded.

    Example:
        >>> cfg = timm.models.get_pretrained_cfg("mobilenetv3_small_100_etf.e27_tiny").to_dict()
        >>> read_weights(cfg)["classifier.weight"].shape
        torch.Size([200, 1024])
    """
    if cfg.get("state_dict"):
        return dict(cfg["state_dict"])
    native = _native_folder(cfg)
    if native and (chosen_source() == "hub" or not cfg.get("file")):
        return _read_published(native, cache_dir)
    if cfg.get("file"):
        path = Path(cfg["file"])
        return read_file(path / WEIGHTS_NAME if path.is_dir() else path)
    if cfg.get("hf_hub_id"):
        return _read_repository(cfg["hf_hub_id"], cache_dir)
    name = cfg.get("architecture", "this model")
    base = name.removesuffix("_etf")
    raise LoadError(
        f"There are no pretrained weights for {name} yet, native or converted; `etf-zoo list --pretrained` shows what "
        f"has some. Use pretrained=False, or put a frame on timm's own backbone: "
        f"etf_zoo.attach_frame(timm.create_model({base!r}, pretrained=True, num_classes=K))."
    )


def chosen_source() -> str:
    """What `ETF_ZOO_SOURCE` says of where weights come from; `"auto"` if it says nothing.

    Raises:
        LoadError: If it names something else.
    """
    source = os.environ.get("ETF_ZOO_SOURCE") or "auto"
    if source not in SOURCES:
        raise LoadError(f"ETF_ZOO_SOURCE is {source!r}; set it to one of {', '.join(SOURCES)}, or unset it.")
    return source


def _native_folder(cfg: Mapping[str, Any]) -> Path | None:
    """Folder of the native tag that a cfg is of; None for files, folders and repositories that a user named."""
    folder = cards_folder() / f"{cfg.get('architecture')}.{cfg.get('tag')}"
    own = cfg["file"] == str(folder / WEIGHTS_NAME) if cfg.get("file") else cfg.get("hf_hub_id")
    return folder if own and not cfg.get("source") and (folder / CONFIG_NAME).is_file() else None


def _read_published(folder: Path, cache_dir: Any) -> dict[str, Tensor]:
    """Weights of a native model from the Hub: whatever the revision, they are those of this package's `config.json`."""
    if chosen_source() == "embedded":
        raise LoadError(f"{folder.name} is not in the package. Unset ETF_ZOO_SOURCE to download it.")
    place = hub_location(folder)
    if place is None:
        raise LoadError(
            f"{folder.name} is not published: there is no {RECORD_NAME} in {folder}. Unset ETF_ZOO_SOURCE to take the "
            f"embedded weights, or set ETF_ZOO_HUB_ORG to an organization that has {folder.name}."
        )
    repo_id, revision = place
    expected = _recorded_sha256(folder / CONFIG_NAME)
    path = download(repo_id, WEIGHTS_NAME, revision=revision, expected=expected, cache_dir=cache_dir)
    return _load(path)


def _read_repository(model_id: str, cache_dir: Any) -> dict[str, Tensor]:
    """Weights of a Hub repository, of the same commit as its `config.json` and checked against the sha256 in that."""
    repo_id, revision = hf_split(model_id)
    # timm has built the model from this config.json already: one that was damaged must not be mended behind its back
    config_file = download(repo_id, CONFIG_NAME, revision=revision, cache_dir=cache_dir, again=False)
    expected = _recorded_sha256(config_file)
    commit = config_file.parent.name
    return _load(download(repo_id, WEIGHTS_NAME, revision=commit, expected=expected, cache_dir=cache_dir))


def read_file(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, after checking it against the sha256 in the `config.json` beside it, if there is one.

    Raises:
        RuntimeError: If the file is missing, altered or not a safetensors file.

    Example:
        >>> weights = read_file(cards_folder() / "mobilenetv3_small_100_etf.e27_tiny" / "model.safetensors")
        >>> weights["classifier.weight"].dtype
        torch.float32
    """
    if not path.is_file():
        others = sorted(file.name for file in path.parent.glob("*") if file.suffix in (".bin", ".pth", ".pt", ".ckpt"))
        if others:
            raise LoadError(
                f"{path.parent} has {others[0]} and no {path.name}: pickles can run code and are not read. Save the "
                f"model with save_for_hf(..., safe_serialization=True), or with etf_zoo.sharing.folder.save_folder."
            )
        raise LoadError(f"There is no weights file {path}.")
    if path.suffix != ".safetensors":
        raise LoadError(f"{path} is not a .safetensors file; nothing else is read, for safety.")
    config_file = path.with_name(CONFIG_NAME)
    if config_file.is_file():
        wanted = _recorded_sha256(config_file)
        if wanted and sha256(path) != wanted:
            raise LoadError(
                f"{path} is truncated or altered: its sha256 is not the one in {config_file.name}. "
                f"Reinstall the package, or download or export the model again."
            )
    return _load(path)


def _recorded_sha256(config_file: Path) -> str | None:
    return read_config(config_file).get("weights_sha256")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise LoadError(f"{path} is not a readable safetensors file ({error}). Download or export it again.") from None
