"""More classes for a model whose frame has room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import EtfZooError
from ..layers.room import check_room_for
from .attach import FrameModel
from .names import frame_heads

__all__ = ["add_classes"]


def add_classes(model: nn.Module, names: Sequence[str] | int) -> nn.Module:
    """Let a model answer with more classes, in place: the next prototypes in reserve become theirs.

    Neither the frame nor any weight changes. What the model makes of the new classes is for training to improve, see
    `etf_zoo.trainer.tune.incremental`.

    Args:
        model: A timm model with frames that have room (`reserve`).
        names: Of the new classes, or how many, for a model whose classes have no names.

    Returns:
        The same model.

    Raises:
        EtfZooError: If there is no room, no frame, a name is given twice or known already, or names are missing. The
            model is then as it was.

    Example:
        >>> model = timm.create_model("resnet18_etf", num_classes=17, reserve=100)
        >>> add_classes(model, 3).num_classes
        20
    """
    heads = list(frame_heads(model).values())
    if not heads or not isinstance(model, FrameModel):
        raise EtfZooError(
            f"{type(model).__name__} is no timm model with a fixed frame: train one with room for more classes, "
            f"etf-zoo finetune --head frame --reserve 100."
        )
    cfg: Any = model.pretrained_cfg
    known = list(cfg.get("label_names") or [])
    if len(known) != model.num_classes:
        known = []
    count = names if isinstance(names, int) else len(names)
    given = [] if isinstance(names, int) else [str(name) for name in names]
    if clash := [name for i, name in enumerate(given) if name in known or name in given[:i]]:
        raise EtfZooError(f"The class {clash[0]!r} is there already: each class has a name of its own. Rename it.")
    for head in heads:
        check_room_for(count, head.reserve, head.num_classes, head.dim)
    if known and not given:
        raise EtfZooError(f"The model's classes have names, such as {known[0]!r}: give the names of the new ones.")
    for head in heads:
        head.add_classes(count)
    model.num_classes = heads[0].num_classes  # type: ignore[assignment]
    model.head_config = replace(model.head_config, reserve=heads[0].reserve)
    cfg["num_classes"] = model.num_classes
    if known:
        cfg["label_names"] = [*known, *given]
    return model
