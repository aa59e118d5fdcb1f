"""`HeadConfig`: what a fixed-frame head is built from, and what becomes of it when the number of classes changes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames.build import CUSTOM, HELMERT, SUBSPACES
from ..frames.orientation import resolve_orientation
from ..frames.subspaces import subspace_axes
from ..layers.classifier import FrameClassifier
from ..layers.moving import MOVING_ARGS, MovingFrameClassifier
from ..layers.necks import PROJECTOR
from ..layers.subspaces import SubspaceClassifier

__all__ = ["HEAD_ARGS", "HeadConfig", "read_switch", "same_value", "split_head_args"]

_OLD_NAMES = {"frame_seed": "seed"}  # as model folders written before have it
_STRUCTURE = (
    "neck",
    "neck_features",
    "feature_norm",
    "moving",
    "reserve",
    "subspaces",
    "lengths",
)  # arguments that say which tensors a head has


def read_switch(name: str, value: Any, known: Iterable[str]) -> bool | dict[str, Any]:
    """Read an argument that switches a method on by True or by the method's own arguments.

    Args:
        name: The argument, such as `moving`.
        value: True, False, None (off), or a mapping of arguments; an empty one switches the method on, as True does.
        known: The method's arguments.

    Returns:
        False, True (all defaults), or the method's arguments, of which there is at least one.

    Raises:
        EtfZooError: On another type, or an argument that the method does not take.

    Example:
        >>> read_switch("moving", {"momentum": 0.5}, ("momentum", "delta"))
        {'momentum': 0.5}
        >>> read_switch("moving", {}, ("momentum", "delta"))
        True
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    takes = ", ".join(known)
    if not isinstance(value, Mapping):
        raise EtfZooError(f"{name} is True, False or a mapping with any of {takes}; got {value!r}.")
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        raise EtfZooError(f"{name} takes {takes}; not {', '.join(unknown)}.")
    return dict(value) or True


@dataclass(frozen=True, eq=False)
class HeadConfig:
    """How a model's fixed-frame heads are built; the arguments of `FrameClassifier` and `moving`.

    Attributes:
        frame: See `FrameClassifier`, as the next eight. A tensor serves its own number of classes.
        neck: Here `"none"` means None, so that a call can take a neck away from what weights were saved with.
        neck_features: See `FrameClassifier`.
        feature_norm: See `FrameClassifier`.
        logit_scale: See `FrameClassifier`.
        orientation: See `FrameClassifier`.
        seed: Seed of the frame. Several heads of a model share it, so their frames agree.
        hierarchy: See `FrameClassifier`; like a frame given as a tensor, it serves its own number of classes.
        gamma: See `FrameClassifier`.
        reserve: See `FrameClassifier`.
        moving: Whether the frame follows the class means, or the arguments of `MovingFrameClassifier`.
        subspaces: Whether the head is a `SubspaceClassifier`, as it is for `frame="subspaces"`.
        lengths: See `FrameClassifier`; like a frame given as a tensor, they serve their own number of classes. True for
            those that only the weights hold.

    Example:
        >>> config = HeadConfig(frame="random", seed=3)
        >>> config.for_classes(7).frame
        'random'
        >>> HeadConfig(frame=simplex_etf(5, 8)).for_classes(7).frame
        'auto'
    """

    frame: str | Tensor = "auto"
    neck: str | nn.Module | None = None
    neck_features: int | None = None
    feature_norm: str = "l2"
    logit_scale: float | str = "auto"
    orientation: str = "auto"
    seed: int = 0
    hierarchy: Tensor | None = None
    gamma: float = 2.0
    reserve: int = 0
    moving: bool | Mapping[str, Any] = False
    subspaces: bool = False
    lengths: Tensor | bool | None = None

    def __post_init__(self):
        if isinstance(self.neck, str) and self.neck == "none":
            object.__setattr__(self, "neck", None)
        if same_value(self.frame, SUBSPACES):
            object.__setattr__(self, "subspaces", True)
            if isinstance(self.neck, str) and self.neck_features is None and self.hierarchy is not None:
                object.__setattr__(self, "neck_features", subspace_axes(self.hierarchy))
        if self.subspaces and (self.moving or not isinstance(self.subspaces, bool)):
            raise EtfZooError("subspaces is True or False, and the axes of a tree do not move: leave moving out.")
        object.__setattr__(self, "moving", read_switch("moving", self.moving, MOVING_ARGS))

    @property
    def is_conversion(self) -> bool:
        """Whether this is a softmax-preserving conversion, which serves one classifier only."""
        return same_value(self.frame, HELMERT)

    @property
    def is_custom(self) -> bool:
        """Whether only the weights hold the frame."""
        return same_value(self.frame, CUSTOM)

    def for_classes(self, num_classes: int) -> HeadConfig:
        """What a reset to a number of classes builds: a conversion and a frame of other classes give way to `auto`."""
        if self.is_conversion:
            return HeadConfig()
        rows = num_classes + self.reserve
        given = (self.frame, self.hierarchy, self.lengths)
        if any(isinstance(matrix, Tensor) and len(matrix) != rows for matrix in given):
            return self._plain()
        return self

    def without_projector(self, asked: Collection[str] = ()) -> HeadConfig:
        """Without the projector of a pretraining, and without the frame for its width, unless the user named them."""
        if not same_value(self.neck, PROJECTOR) or "neck" in asked:
            return self
        config = replace(self, neck=None, neck_features=self.neck_features if "neck_features" in asked else None)
        return config if "frame" in asked or same_value(config.frame, "random") else config._plain()

    def _plain(self) -> HeadConfig:
        """With `auto` in the place of a frame of other classes, and without what belongs to that."""
        if not self.subspaces:
            return replace(self, frame="auto", hierarchy=None, lengths=None)
        return replace(self, frame="auto", hierarchy=None, lengths=None, subspaces=False, neck_features=None)

    def refitted(self, num_classes: int, width: int, asked: Collection[str]) -> HeadConfig:
        """What the config of weights becomes for a fresh head on their backbone: what need not fit is dropped.

        Args:
            num_classes: Of the fresh head.
            width: Of the narrowest features that meet it.
            asked: Arguments that the user named; they stay.
        """
        config = self
        if "frame" not in asked and config.is_conversion:
            config = HeadConfig(**{key: getattr(self, key) for key in HEAD_ARGS if key in asked})
        if "frame" not in asked and config.is_custom:
            config = config._plain()
        config = config.without_projector(asked)
        if config.neck is None and "neck_features" not in asked:  # taken away with the neck
            config = replace(config, neck_features=None)
        if "lengths" not in asked:  # they were for other classes
            config = replace(config, lengths=None)
        if "orientation" not in asked and num_classes + config.reserve > width:
            config = replace(config, orientation="auto")
        return config

    def contradicts(
        self, stored: HeadConfig, asked: Iterable[str], *, described: bool, shape: tuple[int, int]
    ) -> list[str]:
        """Arguments of a call that ask for another head than the one its weights bring.

        Args:
            stored: What the weights were saved with.
            asked: Arguments that the call names.
            described: Whether `stored` belongs to these weights. If not, the call says how their head is built.
            shape: Of the stored frame, `(K, dim)`.
        """

        def differs(key: str) -> bool:
            own, saved = getattr(self, key), getattr(stored, key)
            if key == "moving":  # how it moves on is no part of the weights
                return bool(own) != bool(saved)
            if key == "lengths":
                return isinstance(own, Tensor) or bool(own) != bool(saved)
            if key == "orientation" and own != saved:
                return resolve_orientation(own, *shape) != resolve_orientation(saved, *shape)
            if key == "logit_scale" and own == "learnable":  # trains the stored scale on
                return False
            return not same_value(own, saved)

        return [key for key in HEAD_ARGS if key in asked and (described or key not in _STRUCTURE) and differs(key)]

    def saved(self) -> dict[str, Any]:
        """Arguments that build the same head around its weights, which hold a frame given as a tensor.

        All can be written as JSON, except a neck that is a module.
        """
        args = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.hierarchy is None:
            del args["gamma"]
        elif same_value(self.frame, "hierarchy") or self.subspaces:
            args["frame"] = CUSTOM
        if isinstance(self.frame, Tensor):
            args["frame"] = CUSTOM
        del args["hierarchy"]
        args["lengths"] = self.lengths is not None and self.lengths is not False
        unused = [key for key in ("moving", "reserve", "subspaces", "lengths") if not args[key]]
        return {key: value for key, value in args.items() if value is not None and key not in unused}

    def build(
        self,
        in_features: int,
        num_classes: int,
        *,
        channels_first: bool = False,
        device: torch.device | str | None = None,
    ) -> FrameClassifier:
        """The head itself. A neck that is a module is copied, so that each head has its own.

        Raises:
            EtfZooError: See `FrameClassifier` and `MovingFrameClassifier`.
        """
        moving = self.moving if isinstance(self.moving, Mapping) else {}
        kind = MovingFrameClassifier if self.moving else SubspaceClassifier if self.subspaces else FrameClassifier
        return kind(
            in_features,
            num_classes,
            frame=self.frame,
            neck=copy.deepcopy(self.neck) if isinstance(self.neck, nn.Module) else self.neck,
            neck_features=self.neck_features,
            feature_norm=self.feature_norm,
            logit_scale=self.logit_scale,
            orientation=self.orientation,
            seed=self.seed,
            hierarchy=self.hierarchy,
            gamma=self.gamma,
            reserve=self.reserve,
            lengths=self.lengths,
            channels_first=channels_first,
            device=device,
            **moving,
        )


HEAD_ARGS = tuple(field.name for field in fields(HeadConfig))


def split_head_args(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those of `HeadConfig`, by their present names, and all others.

    Example:
        >>> split_head_args({"frame": "random", "frame_seed": 3, "drop_rate": 0.1})
        ({'frame': 'random', 'seed': 3}, {'drop_rate': 0.1})
    """
    head, others = {}, {}
    for key, value in kwargs.items():
        key = _OLD_NAMES.get(key, key)
        (head if key in HEAD_ARGS else others)[key] = value
    return head, others


def same_value(a: Any, b: Any) -> bool:
    """Whether two arguments are the same; tensors are if they are one."""
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
