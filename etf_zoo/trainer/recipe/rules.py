"""Rules that several fields of a recipe share, or that are long."""

from __future__ import annotations

from typing import Annotated

from .fields import MAX_COUNT, Range, Rule, Texts

MAX_SIZE = 10_000  # pixels
MAX_SEED = 2**32 - 1  # NumPy's
RESERVED = {  # arguments of timm.create_model that a recipe sets, or that name another source of weights
    *("num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("features_only", "scriptable", "exportable", "no_jit"),
}
TIME = r"(\d+(?:\.\d+)?)\s*([smh]?)"


def _is_span(values: list[float]) -> bool:
    return len(values) == 2 and 0 < values[0] <= values[1]


def _is_schedule(sizes: list[list[int]]) -> bool:
    if not sizes or any(len(pair) != 2 for pair in sizes):
        return False
    starts, pixels = zip(*sizes, strict=True)
    return starts[0] == 0 and list(starts) == sorted(set(starts)) and all(1 <= p <= MAX_SIZE for p in pixels)


CROP_SCALE = Rule("[smallest, largest], 0 < smallest <= largest <= 1", lambda x: _is_span(x) and x[1] <= 1)
CROP_RATIO = Rule("[smallest, largest], 0 < smallest <= largest", _is_span)
JITTER = Rule(
    "[brightness, contrast, saturation, hue], none negative, hue at most 0.5, or []",
    lambda x: not x or (len(x) == 4 and min(x) >= 0 and x[3] <= 0.5),
)
MODEL_ARGS = Rule(
    "arguments of the model, but none that the recipe sets (num_classes, pretrained) or that names other weights",
    lambda args: not RESERVED & args.keys(),
)
SIZES = Rule(
    f"a list of [first epoch, pixels] that begins at epoch 0, epochs rising, pixels in [1, {MAX_SIZE}]", _is_schedule
)
NoneOr = Annotated[int, Range(0, MAX_COUNT, note="0 for none")]
AllOr = Annotated[int, Range(0, MAX_COUNT, note="0 for all")]
Weight = Annotated[float, Range(0, 1_000_000, note="0 for none")]
Name = Annotated[str, Texts(r"(?s).{1,500}", "a text of 1 to 500 characters")]
