"""The loop: train, evaluate, checkpoint, resume. One class per run, everything else in small functions."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

from etf_zoo import attach_frame, frame_heads
from etf_zoo.evaluation import measure
from etf_zoo.necks import build_neck
from etf_zoo.variants import HEAD_ARGS, base_name, split_head
from etf_zoo.whitening import whiten_last_norm

from .config import Recipe, final_size, save_recipe, seconds, size_at
from .data import Split, eval_batches, load_hierarchy, load_split, train_batches
from .longtail import long_tail_indices
from .models import Source, find_model
from .objective import Objective

__all__ = ["Run", "make_model"]

STATE = "state.json"


def make_model(recipe: Recipe, num_classes: int, hierarchy: Tensor | None = None) -> nn.Module:
    """The recipe's model and head; the seed gives a twin and its controls the same backbone.

    Args:
        recipe: The recipe.
        num_classes: Number of classes K.
        hierarchy: Distances between the classes `(K, K)`, for `frame: hierarchy`.
    """
    set_seed(recipe.seed)
    source = find_model(recipe.model, recipe.pretrained)
    args: dict[str, Any] = {"pretrained": recipe.pretrained, "num_classes": num_classes, **recipe.model_args}
    if args.get("frame") == "hierarchy":
        args["hierarchy"] = hierarchy
    if recipe.head == "random":
        args = {**{k: v for k, v in args.items() if k not in ("orientation", "hierarchy", "gamma")}, "frame": "random"}
    if recipe.head != "learned":
        if source.is_twin:
            return timm.create_model(source.name, **args)
        head_args = {key: args.pop(key) for key in HEAD_ARGS if key in args}
        return attach_frame(timm.create_model(source.name, **args), **head_args)
    neck, whitening = args.get("neck"), args.pop("whitening", False)
    args = {key: value for key, value in args.items() if key not in HEAD_ARGS}
    plain = _plain_model(source, recipe.pretrained, args)
    if whitening:
        whiten_last_norm(plain, **(whitening if isinstance(whitening, dict) else {}))
    if neck:
        _put_neck(plain, neck)
    return plain


def _plain_model(source: Source, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    """The backbone with timm's own learned classifier."""
    if not source.is_twin:
        return timm.create_model(source.name, **args)
    base = base_name(source.architecture)
    plain: Any = timm.create_model(base, **{**args, "pretrained": False})
    if pretrained:
        twin: Any = timm.create_model(source.name, **args)
        names = list(frame_heads(twin))
        missing, unexpected = plain.load_state_dict(split_head(twin.state_dict(), names)[0], strict=False)
        if unexpected or any(not key.startswith(tuple(f"{name}." for name in names)) for key in missing):
            raise RuntimeError(f"{source.architecture} and {base} differ in more than the head: {missing}.")
        plain.pretrained_cfg = {**twin.pretrained_cfg, "architecture": base}
    return plain


def _put_neck(model: nn.Module, neck: str) -> None:
    """Put a neck in front of a learned linear classifier, in place: the control of a frame behind the same neck."""
    name = model.pretrained_cfg.get("classifier")  # type: ignore[union-attr]
    leaf = model.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(leaf, nn.Linear):
        raise ValueError(f"A learned head behind a neck needs a model with one linear classifier, not {name}.")
    module, width = build_neck(neck, leaf.in_features, leaf.out_features)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Sequential(module, nn.Linear(width, leaf.out_features)))


class Run:
    """A training run in a folder: `checkpoint/`, `metrics.jsonl`, `recipe.yaml`.

    Args:
        recipe: What to do.
        train: Training images, all of which are used; loaded, and thinned to a long tail, by the recipe if not given.
        val: Images to report on; likewise.
        model: The model, on the CPU; made by the recipe if not given. What has no `requires_grad` stays as it is.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: Split | None = None,
        val: Split | None = None,
        model: nn.Module | None = None,
    ):
        self.began = time.monotonic()
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.accelerator = Accelerator(mixed_precision=recipe.precision)
        with self.accelerator.main_process_first():  # one process decodes, the others find the array
            self.train_split = train or load_split(recipe.data, recipe.data.train_split)
            self.val_split = val or load_split(recipe.data, recipe.data.val_split)
        if recipe.data.long_tail and train is None:
            kept = long_tail_indices(self.train_split.labels, recipe.data.long_tail, recipe.seed)
            self.train_split = self.train_split.subset(kept)
        self.train_images = min(len(self.train_split), recipe.data.limit or len(self.train_split))
        self.steps_per_epoch = self.train_images // recipe.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"{self.train_images} training images do not fill one batch of {recipe.batch_size}.")
        if recipe.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"batch_size {recipe.batch_size} does not divide by {self.accelerator.num_processes} processes."
            )

        if model is None:
            names = self.train_split.label_names
            tree = load_hierarchy(recipe.data, names) if recipe.model_args.get("frame") == "hierarchy" else None
            model = make_model(recipe, len(names), tree)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # DDP would send these buffers to every process at every step; they never change
        model._ddp_params_and_buffers_to_ignore = [f"{name}.weight" for name in frame_heads(model)]  # type: ignore
        o = recipe.optim
        extra = {"betas": tuple(o.betas)} if o.betas else {}
        optimizer = create_optimizer_v2(
            model,
            opt=o.name,
            lr=o.lr,
            weight_decay=o.weight_decay,
            momentum=o.momentum,
            **extra,  # type: ignore
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        counts = np.bincount(self.train_split.labels, minlength=len(self.train_split.label_names)).tolist()
        self.objective = Objective(recipe.loss, self.plain_model(), counts, recipe.label_smoothing)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=recipe.epochs * self.steps_per_epoch,
            warmup_t=round(o.warmup_epochs * self.steps_per_epoch),
            warmup_prefix=False,
            t_in_epochs=False,
        )
        self.step = 0  # optimiser steps done
        self.spent = 0.0  # seconds trained by earlier sessions of this run
        self.ended: float | None = None  # when this session's training ended
        self.commit = _commit()
        if recipe.resume:
            self._resume()
        elif self.accelerator.is_main_process:
            self._start_folder()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _start_folder(self) -> None:
        if (self.folder / "checkpoint").exists():
            raise ValueError(
                f"{self.folder} holds a run already. Continue it with --resume, or choose another --output."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        save_recipe(self.record(), self.folder / "recipe.yaml")
        self._keep_metrics()

    def _keep_metrics(self) -> None:
        """Drop the records of epochs that a kill undid, so that each epoch stands in `metrics.jsonl` once."""
        file = self.folder / "metrics.jsonl"
        if file.is_file():
            records = [json.loads(line) for line in file.read_text().splitlines()]
            done = [r for r in records if r["epoch"] * self.steps_per_epoch <= self.step]
            file.write_text("".join(json.dumps(r) + "\n" for r in done))

    def save(self) -> None:
        """Write a checkpoint beside the old one, then take its place."""
        new, kept = self.folder / "checkpoint.new", self.folder / "checkpoint"
        if self.accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {"step": self.step, "seconds": self.seconds(), "commit": self.commit}
            (new / STATE).write_text(json.dumps(state))
            old = self.folder / "checkpoint.old"
            if kept.exists():
                os.replace(kept, old)
            os.replace(new, kept)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        # killed between the two renames, only the old one is left
        found = next(
            (p for p in (self.folder / "checkpoint", self.folder / "checkpoint.old") if (p / STATE).is_file()), None
        )
        if found is None:
            raise ValueError(f"There is no checkpoint in {self.folder} to resume from. Start without --resume.")
        self.accelerator.load_state(str(found))
        state = json.loads((found / STATE).read_text())
        self.step, self.spent, self.commit = state["step"], state["seconds"], state["commit"]  # of the start
        if self.accelerator.is_main_process:
            self._keep_metrics()

    # --------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> bool:
        """Train to the end or the time budget.

        Returns:
            Whether the end was reached; if not, a checkpoint is written.
        """
        recipe, total = self.recipe, self.recipe.epochs * self.steps_per_epoch
        deadline = self.began + seconds(recipe.time_budget)
        if self.step == total:  # was finished when this session began
            self.ended = self.began
            return True
        bar = tqdm(
            total=total, initial=self.step, disable=not self.accelerator.is_main_process, unit="step", mininterval=5
        )
        self.model.train()
        while self.step < total and not self.enough():
            epoch, first = divmod(self.step, self.steps_per_epoch)
            began, sums = time.monotonic(), torch.zeros(3, dtype=torch.float64)
            for images, labels in self._batches(epoch, first):
                sums += self._step(images, labels)
                bar.update()
                if time.monotonic() > deadline:
                    bar.close()
                    self.save()
                    self.accelerator.print(
                        f"Time budget of {recipe.time_budget} is used up at step {self.step} of {total}; saved. "
                        f"Go on with the same command and --resume."
                    )
                    return False
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()  # type: ignore
            record = {
                "epoch": epoch + 1,
                "size": size_at(recipe, epoch),
                "lr": self.optimizer.param_groups[0]["lr"],
                "train_loss": sums[0].item() / sums[2].item(),
                "train_top1": 100 * sums[1].item() / sums[2].item(),
                "images_per_second": sums[2].item() / (time.monotonic() - began),
            }
            if (epoch + 1) % recipe.eval_every == 0 or self.step == total:
                record |= {f"val_{k}": v for k, v in self.evaluate().items() if not k.startswith("images")}
            record["seconds"] = self.seconds()
            self._log(record)
            bar.set_postfix(loss=f"{record['train_loss']:.3f}", top1=f"{record.get('val_top1', float('nan')):.1f}")
            if (epoch + 1) % recipe.save_every == 0 or self.step == total:
                self.save()
        bar.close()
        self.ended = time.monotonic()
        return True

    def enough(self) -> bool:
        """Whether to end after an epoch, before the last; for subclasses."""
        return False

    def _batches(self, epoch: int, first: int):
        a = self.accelerator
        return train_batches(
            self.train_split,
            self.recipe.augment,
            size=size_at(self.recipe, epoch),
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=epoch,
            start=first,
            rank=a.process_index,
            world=a.num_processes,
            limit=self.recipe.data.limit,
            device=a.device,
        )

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.schedule.step_update(self.step)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            logits, loss = self.objective(self.model, images, labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.step}; the last checkpoint in {self.folder} is intact. "
                f"Try a lower --optim.lr, more --optim.warmup_epochs or --optim.clip_grad 1."
            )
        self.accelerator.backward(loss)
        if self.recipe.optim.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step()
        self.step += 1
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        count = torch.tensor(len(labels), device=loss.device)
        return torch.stack([loss.detach() * count, correct, count]).double().cpu()

    def evaluate(self) -> dict[str, float]:
        """Figures on the validation split, see `etf_zoo.evaluation.evaluate`."""
        a = self.accelerator
        batches = eval_batches(
            self.val_split,
            size=final_size(self.recipe),
            batch_size=self.recipe.batch_size,
            rank=a.process_index,
            world=a.num_processes,
            device=a.device,
        )
        return measure(self.plain_model(), batches, processes=a, autocast=a.autocast).figures

    def figures_on(self, split: Split) -> dict[str, float]:
        """Figures on any images."""
        watched, self.val_split = self.val_split, split
        try:
            return Run.evaluate(self)
        finally:
            self.val_split = watched

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def plain_model(self) -> nn.Module:
        """The trained model without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model)

    def seconds(self) -> float:
        """Wall-clock seconds that training took so far, over all sessions; what comes after the end is not counted."""
        return self.spent + (self.ended or time.monotonic()) - self.began

    def record(self) -> Recipe:
        """The recipe that would train the same model from the start."""
        return dataclasses.replace(self.recipe, resume=False, time_budget="")

    def summary(self) -> dict[str, Any]:
        """What `metrics.json` says of how the model was trained."""
        return {
            "recipe": dataclasses.asdict(self.record()),
            "data_source": Path(self.train_split.source).name,
            "train_images": self.train_images,
            "steps": self.step,
            "hours": round(self.seconds() / 3600, 2),
            "device": torch.cuda.get_device_name()
            if self.accelerator.device.type == "cuda"
            else f"CPU, {os.cpu_count()} cores",
            "processes": self.accelerator.num_processes,
            "commit": self.commit,
        }


def _commit() -> str:
    """Commit of the checkout that trains; empty outside one."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip()
