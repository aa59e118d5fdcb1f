"""Classes that come later: a neck fitted to one mean of each class seen before and a few images of the new ones.

After 2302.03004 (NC-FSCIL): the frame has a prototype for every class from the start, the backbone stays as it is, and
a session fits the neck alone, by dot regression. What is kept of a class is its mean feature. The published neck is
another (three layers with layer norms), and its session trains by SGD; here batch norms keep their statistics, which a
batch of means would distort, and all numbers are chosen on base classes, see `training/incremental.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from etf_zoo.errors import EtfZooError
from etf_zoo.layers.classifier import FrameClassifier
from etf_zoo.losses import DotRegressionLoss
from etf_zoo.weights.native import MEMORY_NAME

__all__ = ["Memory", "fit_neck", "read_memory", "write_memory"]

_HELD = 1001  # features that are kept of more held-out images: enough for thresholds in steps of a thousandth
# The smallest of the rates that `training/incremental.py choose` found best for necks before a frame (up to 1e-2, see
# training/results/later/sessions_chosen.json): what forgets least. None was chosen for the neck that finetune builds.
STEPS, RATE = 100, 3e-4


@dataclass(frozen=True)
class Memory:
    """What is kept of classes whose images are gone.

    Attributes:
        means: Mean backbone feature of each class `(K, d)`, before any neck.
        classes: Names of the classes, in the model's order.
        held: Backbone features of images that were held out of training `(N, d)`, N possibly 0: thresholds of
            familiarity are fitted to them, again after each session.

    Example:
        >>> memory = Memory.of(torch.eye(4), torch.tensor([0, 0, 1, 1]), ["a", "b"])
        >>> memory.means[0].tolist()
        [0.5, 0.5, 0.0, 0.0]
    """

    means: Tensor
    classes: list[str]
    held: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor, classes: Sequence[str], held: Tensor | None = None) -> Memory:
        """The memory of some images.

        Args:
            features: `(N, d)`.
            labels: `(N,)`, places in `classes`.
            classes: Their names.
            held: See above; of more than 1,001 so many are kept, evenly over the rows.

        Raises:
            EtfZooError: If a class has no image.
        """
        counts = torch.bincount(labels, minlength=len(classes))
        if len(counts) > len(classes) or not bool(counts.all()):
            empty = [name for name, count in zip(classes, counts.tolist(), strict=False) if not count]
            raise EtfZooError(f"No image of {', '.join(empty[:3]) or 'some class'}: there is no class mean to keep.")
        sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64)
        means = sums.index_add_(0, labels, features.double()) / counts[:, None]
        held = features[:0] if held is None else held
        if len(held) > _HELD:
            held = held[torch.linspace(0, len(held) - 1, _HELD, dtype=torch.float64).long()]
        return Memory(means.float(), list(classes), held.float())

    def joined(self, other: Memory) -> Memory:
        """This memory and, behind it, that of classes which came later."""
        held = torch.cat([self.held, other.held])
        return Memory(torch.cat([self.means, other.means]), [*self.classes, *other.classes], held)


def write_memory(memory: Memory, folder: str | Path) -> Path:
    """Write a memory beside its model."""
    file = Path(folder) / MEMORY_NAME
    about = {"classes": json.dumps(memory.classes)}
    stored = {"means": memory.means.contiguous(), "held": memory.held.contiguous()}
    safetensors.torch.save_file(stored, file, metadata=about)
    return file


def read_memory(folder: str | Path, classes: Sequence[str]) -> Memory:
    """Read the memory of a model.

    Args:
        folder: Model folder.
        classes: Names of the model's classes, which the memory must have.

    Raises:
        EtfZooError: If there is none, it cannot be read, or it is another model's.
    """
    file = Path(folder) / MEMORY_NAME
    if not file.is_file():
        raise EtfZooError(
            f"{folder} has no {MEMORY_NAME}, the class means of what it was trained on: etf-zoo finetune --reserve N "
            f"writes it; for an earlier model name its training images, --base FOLDER."
        )
    try:
        with safe_open(file, "pt") as content:
            means, held = content.get_tensor("means"), content.get_tensor("held")
            names = json.loads((content.metadata() or {})["classes"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise EtfZooError(f"{file} cannot be read: {error}. Name the training images, --base FOLDER.") from None
    fits = means.ndim == held.ndim == 2 and len(means) == len(names) and means.shape[1] == held.shape[1]
    if list(names) != list(classes) or not fits:
        raise EtfZooError(f"{file} is the memory of another model: its classes are not the model's.")
    return Memory(means, list(names), held)


def fit_neck(
    head: FrameClassifier,
    means: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    steps: int = STEPS,
    rate: float = RATE,
) -> float:
    """Fit the neck of a head to old classes' means and new classes' features, in place; nothing else changes.

    Dot regression with prototypes of length sqrt(mean count / count) over the batch, which is all there is: a mean of
    an old class weighs as much as all images of a new one. AdamW, a cosine from `rate` to 0.

    Args:
        head: Its `num_classes` counts the new classes too.
        means: Mean features of the classes seen before `(K, d)`, the head's first K.
        features: Of the new images `(N, d)`.
        labels: `(N,)`, in [K, num_classes).
        steps: Steps over the whole batch.
        rate: Peak rate.

    Returns:
        The loss at the end.

    Raises:
        EtfZooError: If the head has no neck to fit, steps or rate are not positive, features are not finite, or a new
            class has no image.
    """
    if head.neck is None or not any(True for _ in head.neck.parameters()):
        raise EtfZooError(
            "Between a frozen backbone and a fixed frame there is nothing to fit. Train the model with a neck: "
            "etf-zoo finetune --reserve N (which takes an MLP), or --model_args.neck mlp."
        )
    if steps < 1 or not rate > 0:
        raise EtfZooError(f"A session takes at least one step at a positive rate, got {steps} and {rate}.")
    x = torch.cat([means, features]).float()
    y = torch.cat([torch.arange(len(means)), labels])
    counts = torch.bincount(y, minlength=head.num_classes)
    if len(counts) > head.num_classes or not bool(counts.all()) or bool((labels < len(means)).any()):
        raise EtfZooError(
            f"A session takes a mean of each of the {len(means)} classes seen before and images of each of the "
            f"{head.num_classes - len(means)} new ones; got counts {counts.tolist()}."
        )
    if not bool(x.isfinite().all()):
        raise EtfZooError("Features are not finite: these weights have diverged, or overflow in half precision.")
    loss_of, frame = DotRegressionLoss(class_counts=counts.tolist()), head.seen_weight.detach()
    parameters = list(head.neck.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trains = [(p, p.requires_grad) for p in parameters]
    was_training = head.training
    head.eval()  # batch norms keep their statistics
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            for _ in range(steps):
                optimizer.zero_grad()
                loss_of(head.embed(x), y, frame).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            return loss_of(head.embed(x), y, frame).item()
    finally:
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
            parameter.grad = None
        head.train(was_training)
