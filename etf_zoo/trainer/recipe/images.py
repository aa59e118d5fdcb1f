"""The parts of a recipe that say which images there are and how they are augmented."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from etf_zoo.errors import EtfZooError

from .fields import Count, Fields, Probability, Range
from .rules import CROP_RATIO, CROP_SCALE, JITTER, MAX_SIZE, AllOr, Name, Weight

__all__ = ["Augment", "Data"]


@dataclass
class Data(Fields):
    """Where images and labels come from, see `etf_zoo.trainer.data.layouts`.

    Attributes:
        source: A folder of images (`train/CLASS/x.jpg`, `CLASS/x.jpg`, or `CLASS/train/x.jpg`) or of parquet files, a
            table of paths and labels (CSV, parquet, or a `metadata.csv` among the images), a zip file of these, a
            folder that `training/prepare.py` wrote, the name of one in $ETF_ZOO_DATA, a Hub name, or `digits`
            (scikit-learn's, no download).
        config: Configuration of a Hub data set that has several.
        train_split: Split to train on; class names that are texts are sorted, and those of this split.
        val_split: Split to report on.
        image_column: Column of images.
        label_column: Column of labels: class numbers or names.
        label: `class`; `teacher`: shares of the classes of `teacher` in the place of labels, with its classes, computed
            once from the whole images (1503.02531); or `instance`: each image is a class of its own, which needs no
            labels (instance discrimination, 1406.6909, 1805.01978). Then there is nothing to validate on but the
            training images themselves, whole and not augmented: `val_split` is `train_split`. See `frame: kerdock` for
            the head.
        teacher: Name of a classifier with weights, for `label: teacher`.
        teacher_size: Pixels of a side that the teacher sees images at.
        resident: Whether images are decoded once, into an array that is kept on disk, and augmented in batches on the
            device. `auto` does so up to a `size` of 128; above it where the images take at most a quarter of the
            machine's memory, and then crops are drawn from images of 1.15 times `size` and evaluation has timm's own
            pixels, see `etf_zoo.trainer.data.photos`. Else timm's transforms run in worker processes.
        size: Side in pixels that resident images are stored at, resized and center-cropped once; 0 for the largest that
            the run trains or evaluates at.
        limit: Use only the first so many training images of a fixed shuffle; 0 for all. Not for streams.
        long_tail: Thin the training classes out to an exponential long tail: size of the smallest class over the
            largest, such as 0.01; 0 for none.
        max_corrupt: Share of the images that may be unreadable. They are left out, counted and named; more is an error.
        crop_pct: Share of the short side that evaluation sees, where images are not stored at `size`.
        workers: Processes that decode images that are not resident.
        streaming: Read while training, without a copy on disk, sharded over processes.
        shuffle_buffer: Images that a stream is shuffled among, after its shards are.
        train_images: Images in an epoch of a stream; 0 for what the data set states.
        num_classes: Number of classes, where a stream's labels are numbers without names.
        test_split: Split that fine-tuning opens once, at the end, where `val_split` is another one to choose by. By
            default `test` where the data have both, else `val_split` is opened once and a share of the training images
            (`holdout`) is what to choose by.
        test_share: Share of each class to test on where the data have a training split alone; near-duplicates stay on
            one side. 0 for none; `auto` is 0.2 in a recipe.
        class_level: Which folder names the class, below that of the split: 1 for the first, -1 for the innermost; 0 for
            the first, and the run says which others there are.
        image_root: Folder that the paths in a table of labels lie below; by default that of the table.
    """

    group: ClassVar[str] = "data"

    source: str = ""
    config: str = ""
    train_split: Name = "train"
    val_split: Name = "validation"
    image_column: Name = "image"
    label_column: Name = "label"
    label: Literal["class", "teacher", "instance"] = "class"
    teacher: Name = "tf_efficientnet_lite0_etf"
    teacher_size: Annotated[int, Range(1, MAX_SIZE)] = 128
    resident: bool | Literal["auto"] = "auto"
    size: Annotated[int, Range(0, MAX_SIZE, note="0 for the largest of sizes and eval_size")] = 0
    limit: AllOr = 0
    long_tail: Annotated[float, Range(0, 1, note="0 for none")] = 0.0
    max_corrupt: Probability = 0.001
    crop_pct: Annotated[float, Range(0, 1, above=True)] = 1.0
    workers: Annotated[int, Range(0, 1024)] = 4
    streaming: bool = False
    shuffle_buffer: Count = 10_000
    train_images: AllOr = 0
    num_classes: AllOr = 0
    test_split: str = ""
    test_share: Annotated[float, Range(0, 1, below=True, note="0 for none")] | Literal["auto"] = "auto"
    class_level: Annotated[int, Range(-20, 20)] = 0
    image_root: str = ""

    @property
    def report_split(self) -> str:
        """Split that a finished model is measured on."""
        return self.test_split or self.val_split

    def __post_init__(self):
        super().__post_init__()
        if self.image_column == self.label_column:
            raise EtfZooError(f"data.image_column and data.label_column are one column, {self.image_column!r}.")
        if self.label == "instance" and (self.streaming or self.test_split or self.val_split != self.train_split):
            raise EtfZooError(
                f"With data.label instance the classes are the training images: set data.val_split to "
                f"{self.train_split}, no data.test_split, and data.streaming to false."
            )
        if self.label == "teacher" and (self.streaming or self.resident is False):
            raise EtfZooError("A teacher sees resident images: set data.streaming to false and data.resident to true.")
        if self.streaming and self.resident is True:
            raise EtfZooError("A stream is never resident: set data.streaming or data.resident to false.")
        if self.streaming and self.limit:
            raise EtfZooError("data.limit needs all rows at hand; shorten a stream's epoch by data.train_images.")


@dataclass
class Augment(Fields):
    """Augmentation of training batches; resident and other images get the same, up to interpolation.

    Attributes:
        crop_scale: Smallest and largest share of the area that a random resized crop keeps.
        crop_ratio: Smallest and largest aspect ratio of that crop.
        flip: Whether to mirror half of the images; off where left and right carry meaning.
        color_jitter: Strengths of brightness, contrast, saturation and hue, the last at most 0.5; empty for none.
        randaug_ops: Operations of RandAugment (1909.13719) drawn per image, each done with probability 0.5, as timm's
            `rand-n2-m9-mstd0.5-inc1` does; 0 for none.
        randaug_magnitude: Their mean magnitude, 0 to 10.
        randaug_std: Its standard deviation.
        erase: Probability that a rectangle of 2 to 33 % of the area is erased (1708.04896).
        mixup: Alpha of mixup (1710.09412); 0 for none.
        cutmix: Alpha of CutMix (1905.04899); 0 for none. With both, each image gets one of the two by a fair coin.
        mix_prob: Probability that an image is mixed at all.
        large_views: Crops of an image in a batch, each augmented anew; for resident images.
        small_views: Crops of half the side beside them (multi-crop, 2006.09882).
        small_scale: Smallest and largest share of the area that those keep.
    """

    group: ClassVar[str] = "augment"

    crop_scale: Annotated[list[float], CROP_SCALE] = field(default_factory=lambda: [0.35, 1.0])
    crop_ratio: Annotated[list[float], CROP_RATIO] = field(default_factory=lambda: [0.75, 1.3333])
    flip: bool = True
    color_jitter: Annotated[list[float], JITTER] = field(default_factory=list)
    randaug_ops: Annotated[int, Range(0, 20, note="0 for none")] = 0
    randaug_magnitude: Annotated[int, Range(0, 10)] = 9
    randaug_std: Annotated[float, Range(0, 10)] = 0.5
    erase: Probability = 0.0
    mixup: Weight = 0.0
    cutmix: Weight = 0.0
    mix_prob: Probability = 1.0
    large_views: Annotated[int, Range(1, 100)] = 1
    small_views: Annotated[int, Range(0, 100, note="0 for none")] = 0
    small_scale: Annotated[list[float], CROP_SCALE] = field(default_factory=lambda: [0.1, 0.35])

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that an image has more than one class."""
        return self.mix_prob > 0 and max(self.mixup, self.cutmix) > 0

    @property
    def views(self) -> float:
        """How many images' worth of pixels a batch has of each image."""
        return self.large_views + self.small_views / 4

    def __post_init__(self):
        super().__post_init__()
        if self.views > 1 and self.mixes:
            raise EtfZooError("Images of several views are not mixed: set augment.mixup and augment.cutmix to 0.")
        if self.randaug_ops and self.color_jitter:
            raise EtfZooError("augment.color_jitter is left out with randaug_ops, as in timm: it has its own. Set one.")
