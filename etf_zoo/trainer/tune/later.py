"""Beside a model for later: how familiar held-out images look to it, and the means of its classes; adding to them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etf_zoo.errors import EtfZooError
from etf_zoo.layers.classifier import FrameClassifier
from etf_zoo.models.find import find_model, load_model
from etf_zoo.models.grow import add_classes
from etf_zoo.models.names import frame_heads
from etf_zoo.ood import familiarity, write_familiarity
from etf_zoo.sharing.card import METRICS_NAME, write_card
from etf_zoo.sharing.folder import save_folder
from etf_zoo.weights.native import CONFIG_NAME

from ..data.subsets import Images
from ..evaluate import Evaluation, ModelBatches, TestData, command_line, evaluate_model, open_split
from .incremental import RATE, STEPS, Memory, fit_neck, read_memory, write_memory

__all__ = ["Added", "add_folder", "features_as_stored", "store_familiarity", "store_memory"]


@torch.inference_mode()
def store_familiarity(folder: Path, held: Images | None, batch_size: int) -> None:
    """Write what `etf-zoo predict --reject` needs beside a stored model, in one process.

    Args:
        folder: Model folder.
        held: Training images that the model was not fitted on; nothing is written without.
        batch_size: Images at a time.
    """
    if held is None:
        return
    model = load_model(str(folder))
    batches = ModelBatches(model, held, batch_size=batch_size)
    write_familiarity(folder, torch.cat([familiarity(model(images)) for images, _ in batches]))


@torch.inference_mode()
def features_as_stored(model: Any, split: Any, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Backbone features `(N, d)` of images prepared as the model's config says, and the model's class numbers `(N,)`.

    Raises:
        EtfZooError: If the model does not know a class.
    """
    features, labels = [], []
    for images, numbers in ModelBatches(model, split, batch_size=batch_size):
        features.append(model.forward_head(model.forward_features(images), pre_logits=True).flatten(1).float().cpu())
        labels.append(numbers.cpu())
    return torch.cat(features), torch.cat(labels)


def store_memory(folder: Path, train: Images | None, held: Images | None, batch_size: int) -> None:
    """Write what `etf-zoo add-classes` needs beside a stored model, in one process: class means, held-out features.

    Without `train` nothing is written.
    """
    if train is None:
        return
    model = load_model(str(folder))
    features, labels = features_as_stored(model, train, batch_size)
    other = features_as_stored(model, held, batch_size)[0] if held is not None else None
    write_memory(Memory.of(features, labels, model.pretrained_cfg["label_names"], other), folder)


@dataclass(frozen=True)
class Added:
    """What `add_folder` did.

    Attributes:
        classes: Names of the new classes.
        images: How many images of them there were.
        room: Classes that can still come.
        rejects: Whether the new model has thresholds for `--reject`, fitted to held-out images of the classes that
            were there.
        before: Top-1 (%) on test images of the classes that were there, without the new ones; None without a test.
        old: The same with the new ones.
        new: On test images of the new classes.
    """

    classes: list[str]
    images: int
    room: int
    rejects: bool
    before: float | None = None
    old: float | None = None
    new: float | None = None


def add_folder(
    name: str,
    source: str,
    output: str | Path,
    *,
    base: str = "",
    test: str = "",
    steps: int = STEPS,
    rate: float = RATE,
) -> Added:
    """Add the classes of a folder of images to a model and write it as another folder, with card, figures and memory.

    Thresholds of familiarity are fitted again, to the features of held-out images that the memory keeps.

    Args:
        name: The model, by any of its names; a folder on this machine.
        source: Folder of class folders, two images a class or more; of a folder of splits the one for training.
        output: Where to.
        base: Images that the model was trained on, where no memory lies beside it.
        test: Test images, of classes that the model knows then.
        steps: See `fit_neck`, as the next.
        rate: Peak rate.

    Raises:
        EtfZooError: If there is no room, memory or neck, a class is there already, or `output`
            holds a model. Nothing is written then.
    """
    if (Path(output) / CONFIG_NAME).is_file():
        raise EtfZooError(f"{output} holds a model already: choose another --output.")
    folder, model = find_model(name).folder, load_model(name)
    names = model.pretrained_cfg.get("label_names") or []
    heads = list(frame_heads(model).values())
    if folder is None or len(heads) != 1 or len(names) != model.num_classes:
        raise EtfZooError(
            f"Classes are added to a model folder with one fixed frame and names of its classes, which {name} is not: "
            f"etf-zoo finetune --head frame --reserve N writes one."
        )
    if base:
        memory = Memory.of(*features_as_stored(model, open_split(_data(base, "train"), 0)), names)
    else:
        memory = read_memory(folder, names)
    images = open_split(_data(source, "train"), 0)
    add_classes(model, images.label_names)
    head, known = heads[0], len(names)
    features, labels = features_as_stored(model, images)
    tested = features_as_stored(model, open_split(_data(test), 0)) if test else None
    before = _top1(head, tested, 0, known, classes=known)
    fit_neck(head, memory.means, features, labels, steps=steps, rate=rate)
    added = Added(
        list(images.label_names),
        len(labels),
        head.reserve,
        len(memory.held) > 0,
        before,
        _top1(head, tested, 0, known, classes=head.num_classes),
        _top1(head, tested, known, head.num_classes, classes=head.num_classes),
    )
    cfg = model.pretrained_cfg
    described = cfg.get("label_descriptions")
    note = f"{len(added.classes)} classes added from {added.images} images"
    description = "; ".join(filter(None, (cfg.get("description"), note)))
    save_folder(
        model,
        output,
        pretrained_cfg={"description": description},
        label_names=cfg["label_names"],
        label_descriptions=described,
    )
    write_memory(memory.joined(Memory.of(features, labels - known, added.classes)), output)
    if added.rejects:
        with torch.inference_mode():
            write_familiarity(output, familiarity(head(memory.held)))
    session = {**dataclasses.asdict(added), "steps": steps, "rate": rate}
    _write_metrics(folder, Path(output), test, session)
    write_card(output)
    return added


def _write_metrics(old: Path, new: Path, test: str, session: dict[str, Any]) -> None:
    """`metrics.json` of a grown model: its figures, if there are test images, and how it came about."""
    file = old / METRICS_NAME
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    metrics: dict[str, Any] = {"references": []}
    if test:
        evaluation = Evaluation(model=str(new), data=_data(test))
        record = evaluate_model(evaluation).record
        del record["images_per_second"]  # says more of the machine's other work than of the model
        metrics |= {**record, "command": command_line(evaluation, record["dataset"]["split"])}
    if "training" in kept:
        tested = {key: kept[key] for key in ("results", "dataset") if key in kept}
        metrics |= {"training": kept["training"], "base": kept.get("base", tested)}
    metrics["added"] = [*kept.get("added", []), session]
    (new / METRICS_NAME).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def _data(source: str, split: str = "") -> TestData:
    return TestData(source, val_split=split)


@torch.inference_mode()
def _top1(
    head: FrameClassifier, tested: tuple[Tensor, Tensor] | None, first: int, end: int, *, classes: int
) -> float | None:
    """Top-1 (%) among a model's first `classes`, on the test images of classes `first` to `end`; None without any."""
    if tested is None:
        return None
    features, labels = tested
    rows = (labels >= first) & (labels < end)
    if not bool(rows.any()):
        return None
    logits = head.eval()(features[rows])[:, :classes]
    return 100 * (logits.argmax(1) == labels[rows]).float().mean().item()
