"""What a step of a segmentation minimizes: cross-entropy of pixels, and center collapse of what they are told by."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from etf_zoo.errors import EtfZooError
from etf_zoo.frames import best_frame
from etf_zoo.losses import CenterCollapseLoss, logit_adjustment
from etf_zoo.segmentation import STRIDE, Segmenter

from ..run.objective import class_weights_of
from .recipe import Segmentation

__all__ = ["PixelObjective", "masks_at", "pixel_cross_entropy"]


def pixel_cross_entropy(
    logits: Tensor, masks: Tensor, weights: Tensor | None, *, ignore_index: int, label_smoothing: float = 0.0
) -> Tensor:
    """Mean over the pixels that have a class of their weighted cross-entropy; zero where none has one.

    The weights' mean over the training pixels is 1, so the sum is divided by the number of pixels, not by the weights
    of those that happen to be here.

    Args:
        logits: `(B, K, H, W)`.
        masks: `(B, H, W)` int64.
        weights: `(K,)`, or None.
        ignore_index: Number of pixels without a class.
        label_smoothing: In [0, 1).
    """
    each = F.cross_entropy(
        logits, masks, weights, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    return each / (masks != ignore_index).sum().clamp_min(1)


def masks_at(features: Tensor, masks: Tensor, ignore_index: int = 255) -> Tensor:
    """Masks at the middle of each feature's pixels; `ignore_index` where the image was padded.

    Cutting the padding off the features instead would give their gradient another memory format, which slows all that
    lies below.

    Args:
        features: `(B, C, h, w)`, of an image whose sides were padded to multiples of `STRIDE`.
        masks: `(B, H, W)` of the image.
        ignore_index: Number of pixels without a class.

    Returns:
        `(B, h, w)`.
    """
    stride = -(-masks.shape[-2] // STRIDE) * STRIDE // features.shape[-2]
    small = masks[:, stride // 2 :: stride, stride // 2 :: stride]
    below, beside = (features.shape[i] - small.shape[i - 1] for i in (2, 3))
    return F.pad(small, (0, beside, 0, below), value=ignore_index)


class PixelObjective:
    """Loss of a batch, by the recipe; the counterpart of the classifiers' `Objective`.

    Args:
        recipe: Says which.
        model: The model without wrappers.
        pixel_counts: Training pixels of each class.

    Raises:
        EtfZooError: On arguments that a loss does not take, or a class without pixels where the loss divides by them.
    """

    takes_shares = False

    def __init__(self, recipe: Segmentation, model: nn.Module, pixel_counts: list[int]):
        device = next(model.parameters()).device
        self.recipe, self.model = recipe, model
        self.weights = class_weights_of(pixel_counts, device) if recipe.loss.class_weights else None
        self.adjustment = None
        if recipe.loss.logit_adjustment:
            self.adjustment = logit_adjustment(pixel_counts, recipe.loss.logit_adjustment).to(device)[:, None, None]
        self.collapse: CenterCollapseLoss | None = None
        if recipe.center_collapse:
            if not isinstance(model, Segmenter):
                raise EtfZooError("Center collapse looks at a Segmenter's features.")
            try:
                args = {"ignore_index": recipe.ignore_index, **recipe.center_collapse_args}
                self.collapse = CenterCollapseLoss(**args)
            except TypeError as error:
                raise EtfZooError(f"center_collapse_args: {error}.") from error
            self.frame = best_frame(model.num_classes, model.features, seed=recipe.seed).to(device)
        elif recipe.center_collapse_args:
            raise EtfZooError("center_collapse_args are of the loss: set its weight, center_collapse.")

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Share of right pixels of each image, `(B,)`, and the loss; gradients flow through the wrapped `forward`."""
        if self.collapse is None:
            logits, features = forward(images), None
        else:
            seen: list[Tensor] = []
            classifier: nn.Module = self.model.get_submodule("classifier")
            with classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
                logits = forward(images)
            features = seen[0]
        valid = masks != self.recipe.ignore_index
        right = ((logits.detach().argmax(1) == masks) & valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)
        shown = logits if self.adjustment is None else logits + self.adjustment
        loss = pixel_cross_entropy(
            shown,
            masks,
            self.weights,
            ignore_index=self.recipe.ignore_index,
            label_smoothing=self.recipe.label_smoothing,
        )
        if self.collapse is not None and features is not None:
            small = masks_at(features, masks, self.recipe.ignore_index)
            loss = loss + self.recipe.center_collapse * self.collapse(features, small, self.frame)
        return right, loss

    def after_step(self) -> None:
        """Nothing moves."""
