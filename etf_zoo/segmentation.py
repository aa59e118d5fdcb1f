"""Segmentation: a timm backbone, a decoder of segmentation-models-pytorch, and a pixel classifier, learned or a frame.

Needs the extra `segment`: `pip install 'etf-zoo[segment]'`.
"""

from __future__ import annotations

import colorsys
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import EtfZooError, LoadError, MissingPackageError
from .models.head_config import HeadConfig
from .sharing.folder import storage_state_dict
from .weights.native import CONFIG_NAME, WEIGHTS_NAME, sha256

__all__ = [
    "DECODERS",
    "Segmenter",
    "load_segmenter",
    "overlay",
    "palette",
    "save_segmenter",
    "segment",
    "with_legend",
]

DECODERS = ("fpn", "deeplabv3plus", "linknet", "unet")
FORMAT = "etf-zoo segmentation 1"
STRIDE = 32  # of the backbone's last maps: images are padded to a multiple


class Segmenter(nn.Module):
    """Backbone, decoder, pixel classifier; logits at the image's resolution.

    Args:
        backbone: A timm name, twin or not, with `features_only`; with its tag's weights if `pretrained`.
        num_classes: Number of classes K.
        decoder: One of `DECODERS`.
        head: `"frame"` (`FrameClassifier` on each pixel) or `"learned"` (a 1x1 convolution).
        head_args: Arguments of the frame, see `HeadConfig`.
        pretrained: Whether the backbone starts from weights.

    Shape:
        `(B, 3, H, W)`, normalized by `normalize`, to `(B, K, H, W)`.

    Raises:
        MissingPackageError: Without segmentation-models-pytorch.
        EtfZooError: On an unknown decoder or head, or a backbone that does not fit.

    Example:
        >>> model = Segmenter("test_resnet", 5)  # doctest: +SKIP
        >>> model(torch.randn(1, 3, 48, 64)).shape  # doctest: +SKIP
        torch.Size([1, 5, 48, 64])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        decoder: str = "fpn",
        head: str = "frame",
        head_args: Mapping[str, Any] | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        if decoder not in DECODERS:
            raise EtfZooError(f"Unknown decoder {decoder!r}. Choose one of {', '.join(DECODERS)}.")
        if head not in ("frame", "learned"):
            raise EtfZooError(f"The head of pixels is 'frame' or 'learned', got {head!r}.")
        if head == "learned" and head_args:
            raise EtfZooError(f"A learned head takes no {', '.join(head_args)}: leave them out, or use head='frame'.")
        body = _body(backbone, decoder, pretrained)
        self.encoder, self.decoder = body.encoder, body.decoder
        cfg = body.encoder.model.pretrained_cfg
        self.register_buffer("mean", _per_channel(cfg["mean"]), persistent=False)
        self.register_buffer("std", _per_channel(cfg["std"]), persistent=False)
        self.features = int(body.segmentation_head[0].in_channels)
        self.num_classes = num_classes
        if head == "frame":
            config = HeadConfig(**dict(head_args or {}))
            self.classifier: nn.Module = config.build(self.features, num_classes, channels_first=True)
        else:
            self.classifier = nn.Conv2d(self.features, num_classes, 1)
        self.built_from = {
            "backbone": backbone,
            "num_classes": num_classes,
            "decoder": decoder,
            "head": head,
            "head_args": dict(head_args or {}),
        }

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels `(B, 3, H, W)` from 0 to 255, centered and scaled as the backbone's weights were trained."""
        return (images.float() - self.mean) / self.std

    def decode(self, images: Tensor) -> Tensor:
        """What the pixel classifier gets: `(B, features, H / s, W / s)` of the padded image."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        return self.decoder(self.encoder(padded))

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        logits = self.classifier(self.decode(images)).float()
        size = (height + -height % STRIDE, width + -width % STRIDE)
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


def _per_channel(values: Sequence[float]) -> Tensor:
    return 255 * torch.tensor(values)[:, None, None]


def _body(backbone: str, decoder: str, pretrained: bool) -> Any:
    try:
        import segmentation_models_pytorch as smp  # slow to import, and an extra
    except ImportError:
        raise MissingPackageError(
            "Segmentation needs segmentation-models-pytorch: pip install 'etf-zoo[segment]'."
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own arguments and timm's, which are right
            weights: Any = True if pretrained else None  # its annotation knows names alone, its warning asks for this
            return smp.create_model(decoder, f"tu-{backbone}", encoder_weights=weights)
    except (AttributeError, RuntimeError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, EtfZooError):
            raise
        raise EtfZooError(f"{backbone} cannot be the backbone of a {decoder}: {error}.") from error


# -------------------------------------------------------------------------------------------------------------- folder


def save_segmenter(
    model: Segmenter, folder: str | Path, *, label_names: Sequence[str], image_size: Sequence[int], half: bool = True
) -> Path:
    """Write a model folder: `model.safetensors` and `config.json`, which `load_segmenter` reads.

    Args:
        model: The model.
        folder: Where to; made if need be. Each file is written beside its final name and then renamed.
        label_names: Names of the classes, in order.
        image_size: Height and width that it was trained at.
        half: Whether to store weights in float16; frames and statistics stay in float32.

    Returns:
        The folder.

    Raises:
        EtfZooError: If the names are not as many as the classes.
    """
    if len(label_names) != model.num_classes:
        raise EtfZooError(f"{len(label_names)} label names for {model.num_classes} classes.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    new = weights.with_suffix(".new")
    safetensors.torch.save_file(storage_state_dict(model, half=half), new, metadata={"format": "pt"})
    new.chmod(0o644)
    content = {
        "format": FORMAT,
        **model.built_from,
        "label_names": list(label_names),
        "image_size": [int(side) for side in image_size],
        "weights_sha256": sha256(new),
    }
    new_config = config.with_suffix(".new")
    new_config.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, weights)
    os.replace(new_config, config)
    return folder


def load_segmenter(folder: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """A model from its folder, for evaluation, and its configuration (`label_names`, `image_size`).

    Raises:
        LoadError: If the folder holds no such model, or its weights are not those of its configuration.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder} is no folder of a segmentation model: {CONFIG_NAME} cannot be read.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise LoadError(f"{folder} is no folder of a segmentation model. For classification: etf-zoo predict.")
    try:
        if sha256(folder / WEIGHTS_NAME) != config["weights_sha256"]:
            raise LoadError(f"{folder / WEIGHTS_NAME} is not the file that {CONFIG_NAME} names: it was changed.")
        args = {key: config[key] for key in ("backbone", "num_classes", "decoder", "head", "head_args")}
        model = Segmenter(args.pop("backbone"), args.pop("num_classes"), **args)
        weights = safetensors.torch.load_file(folder / WEIGHTS_NAME)
        model.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
        )
        if len(config["label_names"]) != model.num_classes or len(config["image_size"]) != 2:
            raise LoadError(f"{folder / CONFIG_NAME} does not fit the model: its names or its image size are wrong.")
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{folder} holds no complete segmentation model: {error}.") from error
    return model.eval(), config


# ---------------------------------------------------------------------------------------------------------- prediction


@torch.inference_mode()
def segment(model: Segmenter, image: Image.Image, image_size: Sequence[int]) -> np.ndarray:
    """Class of each pixel of an image.

    Args:
        model: In evaluation mode.
        image: Any size; it is shown to the model at `image_size`.
        image_size: Height and width.

    Returns:
        `(H, W)` int64, at the image's own size.
    """
    height, width = image_size
    shown = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    device = next(model.parameters()).device
    logits = model(model.normalize(torch.tensor(shown, device=device).permute(2, 0, 1)[None]))
    logits = F.interpolate(logits, size=(image.height, image.width), mode="bilinear", align_corners=False)
    return logits.argmax(1)[0].cpu().numpy()


def palette(num_classes: int) -> np.ndarray:
    """A color for each class, `(K, 3)` uint8: hues a golden angle apart, light and dark by turns.

    Example:
        >>> palette(3).shape
        (3, 3)
    """
    hues = [(k * 0.61803398875 % 1, (0.95, 0.65)[k % 2], (0.75, 0.95)[k // 2 % 2]) for k in range(num_classes)]
    return np.array([[round(255 * part) for part in colorsys.hsv_to_rgb(h, s, v)] for h, v, s in hues], np.uint8)


def overlay(image: np.ndarray, classes: np.ndarray, num_classes: int, opacity: float = 0.55) -> np.ndarray:
    """An image with its classes painted over it; pixels of no class (255) stay as they are.

    Args:
        image: `(H, W, 3)` uint8.
        classes: `(H, W)` class numbers.
        num_classes: K.
        opacity: Of the paint.

    Returns:
        `(H, W, 3)` uint8.
    """
    known = (classes >= 0) & (classes < num_classes)
    colors = palette(num_classes)[np.where(known, classes, 0)]
    mixed = (1 - opacity) * image + opacity * colors
    return np.where(known[..., None], mixed.round(), image).astype(np.uint8)


def with_legend(picture: Image.Image, entries: Sequence[tuple[str, Sequence[int]]]) -> Image.Image:
    """A picture with a legend on its right: a square of each color, and its name.

    Args:
        picture: Any size; it stays as it is, on white where the legend is higher.
        entries: Names and their colors, red, green and blue in 0..255, from top to bottom.

    Example:
        >>> with_legend(Image.new("RGB", (64, 48)), [("sky", (0, 0, 255)), ("road", (90, 90, 90))]).height
        48
    """
    font, side, gap = ImageFont.load_default(12), 12, 6
    width = max((round(font.getlength(name)) for name, _ in entries), default=0)
    size = (picture.width + side + width + 3 * gap, max(picture.height, gap + len(entries) * (side + gap)))
    sheet = Image.new("RGB", size, "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for row, (name, color) in enumerate(entries):
        x, y = picture.width + gap, gap + row * (side + gap)
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=tuple(color))
        draw.text((x + side + gap, y + side // 2), name, fill="black", font=font, anchor="lm")
    return sheet
