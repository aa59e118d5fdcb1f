"""Which model folders a build holds: those of twins that have weights, or a record of where these are published.

Adding an embedded model is adding its folder to model_cards/. Nothing lists the models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCES = ("model.safetensors", "hub.json")  # either says where the weights are
_LEFT_OUT = (".png", ".jsonl")  # of wheels: curves, and the log of the training


def embedded_folders(cards: Path) -> list[Path]:
    """Folders of `model_cards/` that installed copies have, as `etf_zoo.weights.native.native_tags` finds them."""
    folders = (config.parent for config in sorted(cards.glob("*_etf.*/config.json")))
    return [folder for folder in folders if any((folder / name).is_file() for name in _SOURCES)]


class EmbeddedModels(BuildHookInterface):
    """Puts the embedded models into wheels, as `etf_zoo/model_cards`, and into source archives, where they lie."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # finds them in the clone
            return
        wheel = self.target_name == "wheel"
        for folder in embedded_folders(Path(self.root, "model_cards")):
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                if not (wheel and file.suffix in _LEFT_OUT):
                    path = file.relative_to(self.root).as_posix()
                    build_data["force_include"][str(file)] = f"etf_zoo/{path}" if wheel else path
