"""The recipe of a segmentation: that of a pretraining, and what masks add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from etf_zoo.errors import EtfZooError
from etf_zoo.segmentation import DECODERS

from ..recipe.config import Augment, Data, Loss, Optim, Recipe
from ..recipe.fields import Count, Range, Rule
from ..recipe.rules import MAX_SIZE, Weight

__all__ = ["Segmentation"]

SIDES = Rule("[height, width] in pixels", lambda x: len(x) == 2 and all(1 <= side <= MAX_SIZE for side in x))


@dataclass
class Segmentation(Recipe):
    """A training for segmentation; of the fields of a pretraining recipe those that fit, and:

    Attributes:
        output: Folder of the run.
        model: A timm name, twin or not, whose layers are the backbone.
        head: The pixel classifier: `frame` or `learned`.
        model_args: Arguments of the frame, such as `logit_scale`.
        pretrained: Start the backbone from the tag's weights.
        decoder: `fpn`, `deeplabv3plus`, `linknet` or `unet`, of segmentation-models-pytorch.
        image_size: Height and width that images and masks are stored and trained at.
        class_names: Names of the classes, in the order of their numbers in the masks.
        ignore_index: Number of pixels that belong to no class.
        center_collapse: Weight of `losses.CenterCollapseLoss` on the features before the classifier, against a frame
            that training alone has; 0 for none.
        center_collapse_args: Arguments of that loss.
        data: `label_column` is the masks'; class numbers in 8 bits.
        augment: Of crops, flips and colors; what mixes, erases or bends images is not for masks.
        loss: Cross-entropy; `class_weights` and `logit_adjustment` go by pixels.
        optim: Optimizer and schedule.
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes.
        pictures: Images of the validation split in the picture of predictions; 0 for none.
    """

    heads: ClassVar[tuple[str, ...]] = ("frame", "learned")

    output: str = "runs/segment"
    model: str = "resnet18_etf"
    head: str = "learned"
    pretrained: bool = True
    decoder: Literal["fpn", "deeplabv3plus", "linknet", "unet"] = "fpn"
    image_size: Annotated[list[int], SIDES] = field(default_factory=lambda: [240, 320])
    class_names: list[str] = field(default_factory=list)
    ignore_index: Annotated[int, Range(0, 255)] = 255
    center_collapse: Weight = 0.0
    center_collapse_args: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=lambda: Data(label_column="mask"))
    augment: Augment = field(default_factory=lambda: Augment(crop_scale=[0.5, 1.0]))
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss)
    epochs: Count = 30
    batch_size: Count = 16
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
    pictures: Annotated[int, Range(0, 64, note="0 for none")] = 4

    def __post_init__(self):
        super().__post_init__()
        rules = [
            (len(self.class_names) < 2, "class_names has the names of all classes, at least two"),
            (len(set(self.class_names)) < len(self.class_names), "class_names are names that differ"),
            (self.loss.name != "cross_entropy", "loss.name is cross_entropy for pixels"),
            (self.loss.variance_covariance > 0, "loss.variance_covariance is for whole images: 0"),
            (self.augment.mixes, "augment.mixup and augment.cutmix are for whole images: 0"),
            (self.augment.erase > 0 or self.augment.randaug_ops > 0, "augment.erase and randaug_ops know no masks: 0"),
            (self.compile, "compile is for classifiers: false"),
            (self.optim.layer_decay < 1, "optim.layer_decay is for classifiers: 1"),
            (self.data.streaming, "data.streaming is false: masks are kept in memory"),
            (self.data.long_tail > 0, "data.long_tail is for classes of images: 0"),
            (self.decoder not in DECODERS, f"decoder is one of {', '.join(DECODERS)}"),
        ]
        for wrong, words in rules:
            if wrong:
                raise EtfZooError(f"In a segmentation {words}.")
