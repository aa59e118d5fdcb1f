"""What etf_zoo takes from timm's private modules, in one place: when timm moves something, this is what breaks.

Everything else comes from `timm`, `timm.data`, `timm.layers`, `timm.models` and `timm.optim` as they export it.
"""

from __future__ import annotations

from timm.models._hub import hf_split, load_model_config_from_path, save_config_for_hf
from timm.models._input import update_model_args

__all__ = ["hf_split", "load_model_config_from_path", "save_config_for_hf", "update_model_args"]
