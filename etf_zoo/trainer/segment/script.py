"""Train a segmentation model: `accelerate launch training/segment.py --config training/recipes/NAME.yaml`."""

from __future__ import annotations

import json

from ..recipe.config import parse
from .recipe import Segmentation
from .run import SegmentationRun, export


def main() -> None:
    run = SegmentationRun(parse(Segmentation))
    if run.fit():
        metrics = export(run)
        run.accelerator.print(json.dumps(metrics["results"], indent=1))
        run.accelerator.print(
            f"Model folder: {run.folder / 'model'}   (try: etf-zoo segment {run.folder / 'model'} IMAGE)"
        )
