"""`etf-zoo embed` and `etf-zoo search`: an index of images, and the images in it that look like others."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..embedding import Index, embed, read_index, space_of, write_index
from ..errors import EtfZooError
from ..images import UnreadableImageError
from ..models.find import load_model
from ..text import printable
from .predict import answered, check_output, image_files, on_device, progress, said

__all__ = ["embed_images", "search_images"]


def embed_images(args: argparse.Namespace) -> int:
    """Write an index of images.

    Returns:
        0; 1 if an image could not be read. The others are in the index all the same.
    """
    check_output(args.output)
    model = on_device(load_model(args.model))
    space = space_of(model)
    found, bad = _embedded(model, args.images, args.batch_size, args.output)
    if not found:
        raise EtfZooError(f"There is no image that can be read in {', '.join(args.images)}.")
    write_index(Index(torch.stack(list(found.values())), list(found), space, args.model), args.output)
    print(f"{len(found)} images: {args.output}")
    return _report(bad, len(found))


def search_images(args: argparse.Namespace) -> int:
    """Print the images of an index that are most like each of some images.

    Returns:
        0; 1 if an image could not be read.
    """
    index = read_index(args.index)
    name = args.model or index.model
    model = on_device(load_model(name))
    index.space.check(space_of(model), name)
    found, bad = _embedded(model, args.images, args.batch_size, None)
    if found:
        cosines, rows = index.search(torch.stack(list(found.values())), args.top)
        answers = [
            {"image": file, "found": [{"image": index.images[i], "cosine": c} for c, i in zip(*row, strict=True)]}
            for file, *row in zip(found, cosines.tolist(), rows.tolist(), strict=True)
        ]
        if args.json:
            print(json.dumps(answers, indent=1))
        else:
            _print(answers)
    return _report(bad, len(found))


def _print(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        print(printable(answer["image"]))
        for one in answer["found"]:
            print(f"  {one['cosine']:6.3f}  {printable(one['image'])}")


def _embedded(
    model: Any, names: list[str], batch_size: int, output: str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Embeddings by file, and what is wrong with the other files."""
    files = image_files(names)
    found: dict[str, Tensor] = {}
    bad: dict[str, str] = {}
    for file, answer in tqdm(answered(model, files, batch_size, lambda x: embed(model, x)), **progress(output)):
        if isinstance(answer, UnreadableImageError):
            bad[file] = str(answer)
        else:
            found[file] = answer
    return found, bad


def _report(bad: dict[str, str], good: int) -> int:
    if bad:
        print("etf-zoo:", said(bad, good + len(bad)), file=sys.stderr)
    return 1 if bad else 0
