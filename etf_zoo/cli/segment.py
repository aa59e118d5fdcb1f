"""`etf-zoo segment`: the share of each class among an image's pixels, and a picture of where they are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import EtfZooError, StorageError
from ..images import read_image
from ..segmentation import load_segmenter, overlay, palette, segment, with_legend
from ..text import printable

__all__ = ["segment_image"]


def segment_image(args: argparse.Namespace) -> int:
    """Print the share of the pixels of each class, the largest first; with `--output`, an overlay and legend."""
    output = Path(args.output) if args.output else None
    if output and output.suffix.lower() != ".png":
        raise EtfZooError(f"--output is a picture, FILE.png; got {output.name}.")
    model, config = load_segmenter(args.model)
    image = read_image(Path(args.image))
    classes = segment(model, image, config["image_size"])
    names = config["label_names"]
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    order = [int(k) for k in np.argsort(-shares, kind="stable") if shares[k] > 0]
    colors = palette(len(names))
    if args.json:
        print(json.dumps([{"class": names[k], "share": float(shares[k]), "color": colors[k].tolist()} for k in order]))
    else:
        for k in order:
            print(f"{100 * shares[k]:6.2f} %  {printable(names[k])}")
    if output:
        try:
            painted = Image.fromarray(overlay(np.asarray(image), classes, len(names)))
            with_legend(painted, [(printable(names[k]), colors[k].tolist()) for k in order]).save(output)
        except OSError as error:
            raise StorageError(f"Cannot write {output}: {error.strerror or error}.") from error
    return 0
