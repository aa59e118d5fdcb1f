"""FrameClassifier: the one module that turns features into logits against a fixed frame."""

from collections import OrderedDict  # no `from __future__ import annotations`: TorchScript cannot read the class's so
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import EtfZooError
from ..frames.build import CUSTOM, HELMERT, build_frame, check_frame
from ..frames.kerdock import kerdock_capacity, kerdock_core, kerdock_width
from ..frames.numerics import at_least_float32, unit
from ..frames.report import FrameReport, frame_report, kerdock_report, simplex_report
from ..frames.simplex import check_sizes
from .guarded import GuardedFrame
from .implicit import helmert_product, highest_classes, into_core
from .necks import LastDimBatchNorm, build_neck, check_conversion
from .products import kerdock_logits, scaled_product
from .room import NO_RESERVE, check_reserve, check_room_for

__all__ = [
    "AUTO_KERDOCK_CLASSES",
    "FEATURE_NORMS",
    "HELMERT_MATRIX_CLASSES",
    "KERDOCK_MATRIX_CLASSES",
    "FrameClassifier",
]

FEATURE_NORMS = ("l2", "batch", "none")
HELMERT_MATRIX_CLASSES = 4096  # above, the Helmert frame is a transform in O(K) without a matrix of 67 MB and more
KERDOCK_MATRIX_CLASSES = 4096  # above, a Kerdock frame is computed from its sign bits
# Above, frame="auto" is a Kerdock frame: see training/benchmarks/kerdock_code_cpu.json and kerdock_auto_cpu.json.
AUTO_KERDOCK_CLASSES = 16384
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 tells no difference


# Leaves for torch.fx: their branches on dtype and autocast are not for a tracer to follow.
torch.fx.wrap("at_least_float32")
torch.fx.wrap("unit")
torch.fx.wrap("scaled_product")
torch.fx.wrap("helmert_product")
torch.fx.wrap("kerdock_logits")


class FrameClassifier(GuardedFrame):
    r"""Classifier with a fixed frame: features -> [neck] -> [norm] -> logit_scale * x W^T.

    The frame is the persistent float32 buffer `weight`: in the state dict, never trained, left in float32 by
    `.half()` and `.bfloat16()`. The product runs in float32 under autocast too, so the logits are float32.

    Shape: `(..., in_features)` to `(..., num_classes)`; with `channels_first`, `(B, in_features, ...)` to
    `(B, num_classes, ...)`, as a 1x1 convolution does.

    Args:
        in_features: Width of the features.
        num_classes: Number of classes K.
        frame: `"auto"` (the best known arrangement: the simplex ETF where it fits), `"simplex"`, `"random"` (the
            control), `"code"`, `"kerdock"`, `"hierarchy"` (2303.05689, with `hierarchy`), or a tensor `(K, dim)` with
            unit rows. The attribute `frame` then reads `"custom"`, which is accepted here on the meta device only,
            where a checkpoint will bring the frame. `"helmert"`, with neck `"linear"` and norm `"none"`, is a converted
            classifier, see `etf_zoo.models.convert`. Above 4,096 classes it and a Kerdock frame are computed, not
            stored: `weight` is `(K, 0)` and `implicit` is true. `"auto"` is a Kerdock frame above 16,384 classes; see
            `losses.FrameCrossEntropy` for its training.
        neck: None, `"mlp"` (`"mlp2"`, `"mlp3"`: of so many hidden layers), `"projector"` (an MLP for pretraining: a
            model for other classes leaves it out), `"residual"`, or a module whose output is `dim` wide (then pass the
            frame as a tensor or let its `out_features` say the width). See `etf_zoo.layers.necks` for why none is
            linear; `"linear"` and `"center"` are for converted classifiers.
        neck_features: Width of a named neck's output. By default that of the features, or what the frame needs where
            that is more: K - 1, or for a Kerdock frame the power of four that has K vectors.
        feature_norm: `"l2"` (unit features: logits are scaled cosines), `"batch"` (batch norm without affine part,
            then unit: centers nonnegative features; 2203.09081's code has an affine one and no unit features) or
            `"none"`.
        logit_scale: A number; `"auto"` solves for the scale at which a feature on its prototype has probability
            0.999 (1 with `feature_norm="none"`); `"learnable"` starts there and is trained.
        orientation: `"auto"`, `"random"` or `"blocks"`, see `simplex_etf`.
        seed: Seed of the frame.
        channels_first: Whether features are `(B, in_features, ...)`.
        hierarchy: Distances between classes `(K, K)`, for `frame="hierarchy"`: `Hierarchy.distances`.
        gamma: How fast the hierarchy frame's cosines fall with the distance, see `hierarchy_frame`.
        reserve: Prototypes for classes to come: the frame has `num_classes + reserve` rows, logits are those of the
            first `num_classes`. See `add_classes`.
        lengths: Lengths of the prototypes `(K,)`, which multiply the logits; the frame stays one of unit rows, and a
            scale that is solved for knows no lengths. See `frames.imbalanced_frame`. True, on the meta device, for
            those of a checkpoint.
        device: Where to put it. On the meta device nothing is computed.

    Raises:
        EtfZooError: On an unknown name or a frame that does not fit.

    A frame has no parameter, so timm's tools that take the last parameters for the head meet the backbone's last layer:
    `model_parameters(exclude_head=True)` leaves that out, and layer-wise learning rates give it the full rate, which a
    learned head has elsewhere. Multiply the rate by the layer decay to have the base's rates in the backbone.

    Example:
        >>> head = FrameClassifier(512, 100)
        >>> head(torch.randn(4, 512)).shape
        torch.Size([4, 100])
        >>> bool((head.weight.norm(dim=1) - 1).abs().max() < 1e-6)
        True
    """

    weight: Tensor
    signs: Tensor
    rotation: Tensor
    logit_scale: Tensor
    lengths: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        frame: str | Tensor = "auto",
        neck: str | nn.Module | None = None,
        neck_features: int | None = None,
        feature_norm: str = "l2",
        logit_scale: float | str = "auto",
        orientation: str = "auto",
        seed: int = 0,
        channels_first: bool = False,
        hierarchy: Tensor | None = None,
        gamma: float = 2.0,
        reserve: int = 0,
        lengths: Tensor | bool | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.stops_at_embeddings = False
        self._embedding_hooks = OrderedDict()  # unannotated: TorchScript warns of annotations here
        if feature_norm not in FEATURE_NORMS:
            raise EtfZooError(f"Unknown feature_norm {feature_norm!r}. Choose one of {', '.join(FEATURE_NORMS)}.")
        device = torch.empty(0, device=device).device  # None means the default device, `with torch.device(...)` too
        check_sizes(num_classes, in_features)
        self.in_features = in_features
        self.num_classes = num_classes
        self.reserve = check_reserve(reserve)
        rows = num_classes + reserve
        self.feature_norm = feature_norm
        self.channels_first = channels_first
        self.frame = frame if isinstance(frame, str) else CUSTOM
        check_conversion(self.frame, neck, feature_norm)
        if neck_features is not None and not (isinstance(neck, str) and neck != "linear"):
            raise EtfZooError("neck_features is the width of a neck='mlp' or neck='residual': name one, or drop it.")

        if isinstance(neck, str):
            if neck_features is None and neck != "linear" and _may_be_kerdock(self.frame, rows):
                neck_features = max(kerdock_core(max(in_features, 4)), kerdock_width(rows))
            self.neck, self.dim = build_neck(neck, in_features, rows, neck_features, device=device)
        elif neck is not None:
            self.neck, self.dim = neck, int(getattr(neck, "out_features", _frame_width(frame, in_features)))
        else:
            self.neck, self.dim = None, in_features
        self.norm = LastDimBatchNorm(self.dim, affine=False, device=device) if feature_norm == "batch" else None

        self.auto = self.frame == "auto"
        if self.auto and _auto_is_kerdock(rows, self.dim):
            self.frame = frame = "kerdock"
        self.implicit = rows > {HELMERT: HELMERT_MATRIX_CLASSES, "kerdock": KERDOCK_MATRIX_CLASSES}.get(
            self.frame, rows
        )
        if reserve and (self.implicit or self.frame == HELMERT):
            raise EtfZooError(NO_RESERVE)
        built_from = {"orientation": orientation, "hierarchy": hierarchy, "gamma": gamma}
        if device.type == "meta" or self.implicit:
            check_frame(frame, rows, self.dim, **built_from)
            width = 0 if self.implicit else self.dim
            weight = torch.empty(rows, width, dtype=torch.float32, device=device)
        else:
            weight = build_frame(frame, rows, self.dim, seed=seed, **built_from).to(device)
        self.register_buffer("weight", weight)
        self.register_kerdock(seed, device)
        self.register_lengths(lengths, device)
        self.remember({**built_from, "seed": seed}, logit_scale)
        scale = torch.tensor(self.initial_scale(), dtype=torch.float32, device=device)
        if logit_scale == "learnable":
            self.logit_scale = nn.Parameter(scale)
        else:
            self.register_buffer("logit_scale", scale)

    @torch.jit.unused
    @torch.no_grad()
    def build_again(self) -> None:
        if self.implicit:
            self.register_kerdock(self.built_from["seed"], self.weight.device)
        else:
            self.weight.copy_(build_frame(self.frame, len(self.weight), self.dim, **self.built_from))
            self.fill_lengths()

    @torch.jit.unused
    def store_frame(self) -> None:
        """Become a head whose frame is a matrix, still to be filled, in the place of a Kerdock frame that is computed.

        For a model that `frame="auto"` gave a Kerdock frame, about to be filled from a file with a stored frame.
        """
        self.frame, self.implicit = CUSTOM, False
        self.weight = torch.empty(self.num_classes, self.dim, device=self.weight.device)
        self.register_kerdock(0, self.weight.device)

    @property
    def seen_weight(self) -> Tensor:
        """Prototypes of the classes that the head answers with, `(num_classes, dim)`: all but those in reserve."""
        return self.weight[: self.num_classes] if self.reserve > 0 else self.weight

    @torch.jit.unused
    def add_classes(self, count: int) -> None:
        """Answer with more classes: the next prototypes in reserve become theirs. The frame and its scale stay.

        For a whole model, whose number of classes and names follow, there is `etf_zoo.models.grow.add_classes`.

        Args:
            count: How many.

        Raises:
            EtfZooError: If there is no room for so many; the head is then as it was.

        Example:
            >>> head = FrameClassifier(64, 17, reserve=3)
            >>> head.add_classes(2)
            >>> head(torch.randn(1, 64)).shape, head.reserve
            (torch.Size([1, 19]), 1)
        """
        check_room_for(count, self.reserve, self.num_classes, self.dim)
        self.num_classes += count
        self.reserve -= count

    @property
    def out_features(self) -> int:
        """Number of classes, under the name `nn.Linear` has for it."""
        return self.num_classes

    def embed(self, x: Tensor) -> Tensor:
        """Features on the frame's side of the neck and the norm, what losses on cosines take together with `weight`.

        Args:
            x: `(..., in_features)`.

        Returns:
            `(..., dim)`; unit rows in float32 (float64 for float64 input) unless `feature_norm="none"`. A feature too
            short to have a direction gives a row of zeros, see `etf_zoo.frames.numerics`.
        """
        if self.neck is not None:
            x = self.neck(x)
        if self.norm is not None:
            x = self.norm(at_least_float32(x))
        if self.feature_norm != "none":
            return unit(x)
        return at_least_float32(x)

    def scale(self) -> Tensor:
        """The logit scale. A learnable one counts as 0.01 where training took it below, and can grow again."""
        own = self.logit_scale
        return own + (own.clamp(min=0.01) - own).detach()

    def project(self, x: Tensor) -> Tensor:
        """Logits of what `embed` gives: `(..., dim)` to `(..., num_classes)`."""
        if self.implicit:
            if self.frame == "kerdock":
                return kerdock_logits(x, self.rotation, self.signs, self.scale(), self.num_classes)
            return helmert_product(x, self.scale())
        logits = scaled_product(x, self.seen_weight, self.scale())
        return logits * self.lengths.to(logits.dtype) if self.has_lengths else logits

    @torch.jit.unused
    @torch.no_grad()
    def top_k(self, x: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
        """The k classes with the largest logits, in blocks of classes: the `(B, K)` logits are never held.

        Args:
            x: `(..., in_features)`; with `channels_first` too, the features come last.
            k: How many, at most K.

        Returns:
            Logits, falling, and class numbers, both `(..., k)`.

        Raises:
            ValueError: On a k out of range, or a converted classifier whose frame is not stored.
        """
        if not 1 <= k <= self.num_classes:
            raise EtfZooError(f"k lies between 1 and {self.num_classes}, the number of classes, got {k}.")
        if self.implicit and self.frame == HELMERT:
            raise EtfZooError("A converted classifier of so many classes has no blocks: use head(x).topk(k).")
        embeddings = self.embed(x)
        if _is_exporting() or not embeddings.numel():  # a graph has no loop; one image's logits are no burden
            return self.project(embeddings).topk(k)
        with torch.autocast(x.device.type, enabled=False):
            rows = into_core(embeddings * self.scale(), self.rotation).flatten(0, -2)
            weight = self.seen_weight * self.lengths[:, None] if self.has_lengths else self.seen_weight
            logits, classes = highest_classes(rows, weight, self.signs, self.num_classes, k)
        return logits.view(*x.shape[:-1], k), classes.view(*x.shape[:-1], k)

    @torch.jit.unused
    def frame_report(self) -> FrameReport:
        """How good the frame is, see `etf_zoo.frames.frame_report`; of one that is not stored in closed form."""
        if not self.implicit:
            return frame_report(self.weight)
        return (kerdock_report if self.frame == "kerdock" else simplex_report)(self.num_classes, self.dim)

    @contextmanager
    def without_logits(self) -> Iterator[None]:
        """Have the forward pass give the embeddings, for `losses.FrameCrossEntropy` and the like to go on from.

        A model's own forward can then run, with all the wrappers it has, where its `(B, K)` logits would not fit.
        """
        self.stops_at_embeddings = True
        try:
            yield
        finally:
            self.stops_at_embeddings = False

    @torch.jit.unused
    def register_embedding_hook(self, hook: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
        """Have every forward pass hand over what it computes on the way, for losses and penalties on embeddings.

        The tensors are those of the pass, with their gradient. Copies of the classifier (deepcopy, pickle) have no
        hooks; scripted ones call none.

        Args:
            hook: Called as `hook(features, embeddings)` with `(..., in_features)` and `(..., dim)`, see `embed`;
                the classes' dimension is last, with `channels_first` too.

        Returns:
            A handle: `handle.remove()` ends it, as leaving `with handle:` does.

        Example:
            >>> head = FrameClassifier(8, 3)
            >>> seen = []
            >>> with head.register_embedding_hook(lambda features, embeddings: seen.append(embeddings)):
            ...     logits = head(torch.randn(2, 8))
            >>> seen[0].shape
            torch.Size([2, 8])
        """
        handle = RemovableHandle(self._embedding_hooks)
        self._embedding_hooks[handle.id] = hook
        return handle

    def __getstate__(self):
        return {**self.__dict__, "_embedding_hooks": OrderedDict()}

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self.check_intact(x)
        if self.channels_first:
            x = x.movedim(1, -1)
        embeddings = self.embed(x)
        if not torch.jit.is_scripting():
            for hook in self._embedding_hooks.values():
                hook(x, embeddings)
        logits = embeddings if self.stops_at_embeddings else self.project(embeddings)
        return logits.movedim(-1, 1) if self.channels_first else logits

    def _apply(self, fn, recurse=True):
        # .half() and .bfloat16() move and cast; the frame, the scale and the feature norm's statistics only move.
        kept = {name: buffer for name, buffer in self.named_buffers() if not name.startswith("neck.")}
        kept["logit_scale"] = self.logit_scale.detach()  # a learnable scale is cast in place
        super()._apply(fn, recurse)
        for name, old in kept.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            new = getattr(module, leaf)
            if new.dtype in (torch.float16, torch.bfloat16):
                wide = old.float().to(new.device)
                if isinstance(new, nn.Parameter):
                    new.data = wide
                else:
                    setattr(module, leaf, wide)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        if self.auto and self.implicit and weight is not None and weight.shape == (self.num_classes, self.dim):
            self.store_frame()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.num_classes}, frame={self.frame!r}, dim={self.dim}, "
            f"feature_norm={self.feature_norm!r}" + (f", reserve={self.reserve}" if self.reserve else "")
        )


def _may_be_kerdock(frame: str, num_classes: int) -> bool:
    return frame == "kerdock" or (frame == "auto" and num_classes > AUTO_KERDOCK_CLASSES)


def _auto_is_kerdock(num_classes: int, dim: int) -> bool:
    return max(AUTO_KERDOCK_CLASSES, 2 * dim) < num_classes <= kerdock_capacity(dim)


def _frame_width(frame: str | Tensor, in_features: int) -> int:
    return frame.shape[1] if isinstance(frame, Tensor) else in_features
