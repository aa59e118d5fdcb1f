"""`etf-zoo add-classes`: classes that come later."""

from __future__ import annotations

import argparse
import dataclasses
import json

from ..text import printable
from .train import require_training

__all__ = ["add_classes"]


def add_classes(args: argparse.Namespace) -> None:
    """Add classes to a model that has room for them, from a few images, and write the result."""
    require_training("etf-zoo add-classes")
    from ..trainer.tune.later import add_folder

    added = add_folder(
        args.model, args.folder, args.output, base=args.base, test=args.test, steps=args.steps, rate=args.rate
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(added), indent=1))
        return
    print(f"{len(added.classes)} classes added from {added.images} images; room for {added.room} more.")
    if args.test:
        print(f"{'top-1 (%) on test images of':<32}{'before':>8}{'after':>8}")
        print(f"{'classes that were there':<32}{_shown(added.before)}{_shown(added.old)}")
        print(f"{'new classes':<32}{_shown(None)}{_shown(added.new)}")
    if added.rejects:
        print("Thresholds for --reject speak of the classes that were there: more photos of the new ones are refused.")
    else:
        print("No thresholds for etf-zoo predict --reject: there were no held-out images to fit them to.")
    print(f"Model: {printable(str(args.output))}")


def _shown(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>8}"
