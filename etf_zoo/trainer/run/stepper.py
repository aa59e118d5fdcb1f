"""One optimizer step: loss, gradients over pieces and processes, weights, and their average."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from etf_zoo import frame_heads
from etf_zoo.errors import EtfZooError
from etf_zoo.layers.logit_scale import target_cosine_scale
from etf_zoo.layers.moving import copy_moving_frames

from ..data.batches import batch_generator, mix
from ..recipe.config import Recipe
from .faster_layers import keep_freed_memory, use_faster_layers
from .launching import gather_in, is_sharded
from .model import make_optimizer
from .objective import Objective

__all__ = ["Stepper", "channels_last", "prepare"]


def channels_last(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether weights and images have their channels last; FSDP shards contiguous weights only."""
    return recipe.channels_last and not is_sharded(accelerator)


def prepare(recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, Any]:
    """A model and its optimizer as the processes train them, by accelerate.

    Args:
        recipe: Says how.
        accelerator: The processes.
        model: On the CPU; it is changed.
    """
    if channels_last(recipe, accelerator):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        use_faster_layers(model)
    # DDP would send these buffers to every process at every step
    fixed = [f"{name}.{own}" for name, head in frame_heads(model).items() for own in head.UNSENT]
    model._ddp_params_and_buffers_to_ignore = fixed  # type: ignore[assignment]
    return accelerator.prepare(model, make_optimizer(recipe.optim, model))


class Stepper:
    """Takes optimizer steps.

    Args:
        recipe: Says how.
        accelerator: The processes.
        model: As accelerate prepared it.
        optimizer: Likewise.
        steps_per_epoch: Of the schedule.
        class_counts: Training images of each class; empty if not known.
        objective: What a step minimizes; by default that of a classifier.

    Raises:
        ValueError: If the loss does not fit the head or the augmentation, or on an average under FSDP.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        *,
        steps_per_epoch: int,
        class_counts: list[int],
        objective: Any = None,
    ):
        self.recipe, self.accelerator, self.model, self.optimizer = recipe, accelerator, model, optimizer
        self.steps_per_epoch = steps_per_epoch
        self.plain: Any = accelerator.unwrap_model(model)
        self.ema = self._make_ema()
        self.objective = objective or Objective(recipe.loss, self.plain, class_counts, recipe.label_smoothing)
        if recipe.augment.mixes and not self.objective.takes_shares:
            raise EtfZooError(
                "augment.mixup and augment.cutmix give an image several classes, which only loss.name cross_entropy "
                "without a moving frame can use: set them to 0."
            )
        self.scales = [(head, head.initial_scale()) for head in frame_heads(self.plain).values()]
        if recipe.data.label == "teacher" and not self.objective.takes_shares:
            raise EtfZooError(
                "A teacher gives an image shares of classes, which only loss.name cross_entropy without a moving frame "
                "can use: take that, or set data.label to class."
            )
        if recipe.compile:  # what comes behind the features is cheap, and the objective looks into it
            self.plain.forward_features = torch.compile(self.plain.forward_features)
        if is_sharded(accelerator):
            gather_in(model)
        warmup = round(recipe.optim.warmup_epochs * steps_per_epoch)
        self.schedule = CosineLRScheduler(
            optimizer,
            t_initial=recipe.epochs * steps_per_epoch,
            lr_min=recipe.optim.min_lr,
            warmup_t=warmup,
            warmup_lr_init=recipe.optim.lr / (warmup + 1),  # a first step at rate 0 would be none
            warmup_prefix=False,
            t_in_epochs=False,
        )

    def _make_ema(self) -> ModelEmaV3 | None:
        settings = self.recipe.ema
        if not settings.decay:
            return None
        if is_sharded(self.accelerator):
            raise EtfZooError("An average of the weights is not available under FSDP: set --ema.decay 0.")
        return ModelEmaV3(self.plain, decay=settings.decay, use_warmup=settings.warmup)

    def step(self, number: int, images: Tensor | list[Tensor], labels: Tensor) -> Tensor:
        """One step.

        Args:
            number: Steps done before.
            images: `(B, 3, H, W)`, this process's share of the batch, or stored inputs of a layer `(B, ...)`; or groups
                of views of each image, `(B, V, 3, H, W)` each: their losses are averaged, and predictions count of the
                first group.
            labels: `(B,)`, or shares of the classes `(B, K)`.

        Returns:
            Sum of the losses, how many predictions are right, and how many images there were.
        """
        self.schedule.step_update(number)
        self.set_scale(number)
        if self.recipe.augment.mixes:
            images, labels = self._mixed(number, images, labels)  # type: ignore[arg-type]  # which views are not
        groups = [images[:, None]] if isinstance(images, Tensor) else images
        sums = self.zeros()
        chunks = [tensor.chunk(self.recipe.accumulate) for tensor in (*groups, labels)]
        pieces = list(zip(*chunks, strict=True))
        for i, (*views, classes) in enumerate(pieces):
            waits = i + 1 < len(pieces)  # gradients are summed over processes with the last piece
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                with self.accelerator.autocast():
                    right, loss = self._loss(views, classes)
                self.accelerator.backward(loss / len(pieces))
            hits, count = right.double().mean() * len(classes), len(classes)
            sums += torch.stack([loss.detach() * count, hits, torch.full_like(hits, count)]).to(sums.dtype)
        if self.recipe.optim.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step()
        if self.ema is not None:
            self.ema.update(self.plain, step=number + 1)
            copy_moving_frames(self.ema, self.plain)
        return sums

    def _loss(self, groups: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which predictions are right of the first group of views, and the mean loss of all views."""
        total, found = sum(views.shape[1] for views in groups), []
        for views in groups:
            images = views.flatten(0, 1)
            if images.ndim == 4 and channels_last(self.recipe, self.accelerator):
                images = images.contiguous(memory_format=torch.channels_last)
            right, loss = self.objective(self.model, images, labels.repeat_interleave(views.shape[1], 0))
            found.append((right, loss * (views.shape[1] / total)))
        return found[0][0], torch.stack([loss for _, loss in found]).sum()

    def set_scale(self, number: int) -> None:
        """Scale the frame's logits by the target cosine of a step, where the recipe has one."""
        if not (targets := self.recipe.target_cosine):
            return
        way = number / max(self.recipe.epochs * self.steps_per_epoch - 1, 1)
        cosine = targets[0] + (targets[-1] - targets[0]) * min(way, 1.0)
        for head, scale in self.scales:
            head.logit_scale.fill_(target_cosine_scale(scale, cosine))

    def _mixed(self, number: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return mix(
            images,
            labels,
            self.plain.num_classes,
            self.recipe.augment,
            batch_generator(self.recipe.seed, *divmod(number, self.steps_per_epoch), stream=4),
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def lr(self) -> float:
        """The present learning rate; the largest, where layers differ."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def zeros(self) -> Tensor:
        """Three sums to start from."""
        device = self.accelerator.device
        return torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
