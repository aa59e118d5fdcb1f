"""The loop: train, evaluate, save, resume. What it is made of stands beside it: steps, states, checkpoints, the log."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn

from etf_zoo.errors import DivergedError, EtfZooError

from ..data.augment import colors_of
from ..data.batches import AnySplit, frame_tree, limited, load_split, train_batches
from ..data.long_tail import long_tail_indices
from ..recipe.config import Recipe, changes, entries, final_size, save_recipe, size_at
from . import checkpoint
from .checkpoint import CHECKPOINTS
from .earlier_stage import without_stage_head
from .identity import data_differences, data_identity
from .interrupt import note_interrupts
from .launching import checkout_commit, make_accelerator
from .locks import acquire
from .log import Log
from .loop import Loop
from .measure import measure_split
from .model import make_model
from .state_file import read_state
from .states import WholeModel, collect_states, collect_weights, restore_states, restore_weights
from .stepper import Stepper, prepare
from .summary import summarize
from .watch import BEST, BestEpoch

__all__ = ["Run"]


class Run:
    """A training run in a folder: `checkpoints/`, `metrics.jsonl`, `recipe.yaml`, `tensorboard/`.

    Making one reads (data, and with `recipe.resume` the last checkpoint); `fit` alone writes, and locks the folder
    before it does.

    Args:
        recipe: What to do.
        train: Training images, all of which are used; loaded, and thinned to a long tail, by the recipe if not given.
        val: Images to evaluate on after epochs; likewise.
        model: The model, on the CPU; made by the recipe if not given.
        distances: LCA heights of the classes `(K, K)`, where mistakes are to be weighed by them.
        best: Keeps the best epoch on `val`, and may stop the run; by default the last epoch is the result.

    Raises:
        EtfZooError: If the recipe does not fit the data or the processes; if the folder holds a run and is not to be
            resumed; if it is, and there is no sound checkpoint, or it is of another model or other data.

    Example:
        >>> run = Run(Recipe(output="runs/digits", data=Data("digits", val_split="test")))  # doctest: +SKIP
        >>> run.fit() and run.evaluate()["top1"]  # doctest: +SKIP
    """

    def __init__(
        self,
        recipe: Recipe,
        train: AnySplit | None = None,
        val: AnySplit | None = None,
        model: nn.Module | None = None,
        distances: Tensor | None = None,
        best: BestEpoch | None = None,
    ):
        self.began = time.monotonic()
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.accelerator = make_accelerator(recipe.precision)
        with self.accelerator.local_main_process_first():  # one process decodes, its neighbors find the array
            self.train_split = train or load_split(recipe.data, recipe.data.train_split)
            self.val_split = val or load_split(recipe.data, recipe.data.val_split)
        if recipe.data.long_tail and train is None:
            kept = long_tail_indices(self.train_split.labels, recipe.data.long_tail, recipe.seed)
            self.train_split = self.train_split.subset(kept)
        self.train_images = min(len(self.train_split), recipe.data.limit or len(self.train_split))
        self.steps_per_epoch = self.train_images // recipe.batch_size
        self._check_batch()
        self._make_stepper(model)
        self.distances = distances
        self.best = best
        self.step = 0  # optimizer steps done
        self.sums = self.stepper.zeros()  # loss, right, images of the present epoch, of this process
        self.records: list[dict[str, Any]] = []  # lines of `metrics.jsonl`
        self.saved = (0, time.monotonic())  # step and time of the last checkpoint
        self.seconds_before = 0.0  # trained by earlier sessions of this run
        self.ended: float | None = None  # when this session's training ended
        self.commit = checkout_commit()
        # of all images: a digest takes a moment, so the main process alone asks for it
        self.data = data_identity(self.train_split, self.val_split) if self.accelerator.is_main_process else {}
        self.checkpoints = checkpoint.names(self.folder / CHECKPOINTS)
        if recipe.resume:
            self._resume()
        elif self.checkpoints:
            raise EtfZooError(
                f"{self.folder} holds a run already. Continue it with --resume, or choose another --output."
            )

    def _check_batch(self) -> None:
        recipe, processes = self.recipe, self.accelerator.num_processes
        if not self.steps_per_epoch:
            raise EtfZooError(f"{self.train_images} training images do not fill one batch of {recipe.batch_size}.")
        if recipe.batch_size % (processes * recipe.accumulate):
            raise EtfZooError(
                f"batch_size {recipe.batch_size} does not divide by {processes} processes"
                f"{f' times accumulate {recipe.accumulate}' if recipe.accumulate > 1 else ''}."
            )

    def _make_stepper(self, model: nn.Module | None) -> None:
        """The model as the processes train it, its optimizer, and what takes steps with them."""
        recipe = self.recipe
        if model is None:
            model = self.make_model()
        self.colors = colors_of(model)
        set_seed(recipe.seed, device_specific=True)  # what is drawn in training, such as dropout, differs by process
        self.whole = WholeModel(self.accelerator, model)
        self.model, self.optimizer = prepare(recipe, self.accelerator, model)
        self.stepper = Stepper(
            recipe,
            self.accelerator,
            self.model,
            self.optimizer,
            steps_per_epoch=self.steps_per_epoch,
            class_counts=self.class_counts(),
            objective=self.make_objective(),
        )

    def make_model(self) -> nn.Module:
        """The recipe's model, on the CPU."""
        names = self.train_split.label_names
        return make_model(self.recipe, len(names), frame_tree(self.recipe, names), self.class_counts())

    def make_objective(self) -> Any:
        """What a step minimizes; None for what the recipe's loss says."""
        return None

    def headline(self, figures: dict[str, float]) -> str:
        """The figure that is shown after an evaluation."""
        return f"top-1 {figures['top1']:.2f} %"

    def class_counts(self) -> list[int]:
        """Training images of each class; empty if not known."""
        return limited(self.train_split, self.recipe.data.limit, self.recipe.seed).class_counts()

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved[0] == self.step:
            return
        self.check_finite(self.sums.tolist()[0])
        state = {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "sums": self.sum_over_processes(self.sums).tolist(),
            "seconds": self.seconds(),
            "commit": self.commit,
            "processes": self.accelerator.num_processes,
            "recipe": entries(self.record()),
            "data": self.data,
            "records": self.records,
            "best": self.best.state_dict() if self.best else None,
        }
        files = collect_states(self.accelerator, self.model, self.optimizer, self.stepper.ema)
        if self.best and self.best.weights is not None and self.accelerator.is_main_process:
            files[BEST] = self.best.weights
        folder = self.folder / CHECKPOINTS
        path = checkpoint.save(folder, self.accelerator, state, self.recipe.keep_checkpoints, files)
        if self.best and self.best.score and self.best.keeps:
            self.best.weights = path / BEST
        self.saved = (self.step, time.monotonic())
        self.checkpoints = checkpoint.names(folder)

    def _resume(self) -> None:
        path, state = checkpoint.newest(self.folder / CHECKPOINTS, self.accelerator)
        self._check_resumable(path, state)
        chosen = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        restore_states(path, self.accelerator, self.model, self.optimizer, self.stepper.ema)
        for group, settings in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(settings)  # the recipe's, not those of the checkpoint
        self.step, self.seconds_before, self.commit = state["step"], state["seconds"], state["commit"]  # of the start
        self.records = state["records"]
        if self.best and state["best"]:  # else a session kept none, and the best counts from here on
            self.best.load_state_dict(state["best"])
            self.best.weights = path / BEST if self.best.keeps else None
        self.saved = (self.step, time.monotonic())
        if self.accelerator.is_main_process:  # sums over all processes
            self.sums += self.sums.new_tensor(state["sums"])

    def _check_resumable(self, path: Path, state: dict[str, Any]) -> None:
        """Name what differs from the recipe that the run was started with; refuse another model or other data."""
        changed = changes(state["recipe"], self.record())
        if any(name.startswith(("model", "head", "optim.name", "ema.decay")) for name in changed):
            raise EtfZooError(
                f"{self.folder} holds a run of another model, optimizer or average ({'; '.join(changed.values())}). "
                f"Resume with its recipe.yaml, or choose another --output."
            )
        if (state["processes"] > 1) != (self.accelerator.num_processes > 1):
            raise EtfZooError(
                f"{path} is of {state['processes']} process(es): resume with one if it was one, else with several."
            )
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise EtfZooError(
                f"{path} has {state['steps_per_epoch']} steps in an epoch, this recipe {self.steps_per_epoch}. Resume "
                f"with the data and the batch_size of {self.folder / 'recipe.yaml'}."
            )
        (different,) = broadcast_object_list([data_differences(state["data"], self.data)])  # the main process's counts
        if different:
            raise EtfZooError(
                f"{self.folder} was trained on other data: {'; '.join(different)}. Resume with the data that it began "
                f"with, or choose another --output."
            )
        if changed:
            self.accelerator.print(f"Resuming with another recipe than before: {'; '.join(changed.values())}.")

    def fit(self) -> bool:
        """Train to the end, to the time budget, or until the best epoch is old enough to stop; then take the best.

        Returns:
            Whether the end was reached; if not, a checkpoint is written.

        Raises:
            EtfZooError: If another process trains in the folder.
            SystemExit: After SIGTERM (143) or Ctrl-C (130), once a checkpoint is written. With several processes that
                is at the next look at the loss, each `log_every` steps.
        """
        with ExitStack() as stack:
            self._lock(stack)
            if self.accelerator.is_main_process:
                save_recipe(self.record(), self.folder / "recipe.yaml")
            log = Log(self.folder, self.accelerator.is_main_process, self.recipe.tensorboard, self.step, self.records)
            stack.callback(log.close)
            was_over = self.is_over()
            if not was_over and not Loop(self, log, stack.enter_context(note_interrupts())).train():
                return False
            self.ended = self.began if was_over else time.monotonic()
            self._take_best()
            self.plain_model()  # gathered while all processes are here
        return True

    def _lock(self, stack: ExitStack) -> None:
        """Have the folder for this run alone, before anything is written into it."""
        alone = not self.accelerator.is_main_process or stack.enter_context(acquire(self.folder / ".lock"))
        alone = alone and checkpoint.names(self.folder / CHECKPOINTS) == self.checkpoints
        if not all(broadcast_object_list([alone])):
            raise EtfZooError(f"Another process trains in {self.folder}: choose another --output.")

    def is_over(self) -> bool:
        """Whether all epochs are done, or the best one is old enough to stop."""
        finished = self.step >= self.recipe.epochs * self.steps_per_epoch
        return finished or (self.best is not None and self.step % self.steps_per_epoch == 0 and self.best.is_exhausted)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor | list[Tensor], Tensor]]:
        """This process's share of an epoch's batches, from a step on."""
        return train_batches(
            self.train_split,
            self.recipe.augment,
            size=size_at(self.recipe, epoch),
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=epoch,
            start=first,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            limit=self.recipe.data.limit,
            colors=self.colors,
            device=self.accelerator.device,
        )

    def check_finite(self, loss: float) -> None:
        """Raise DivergedError on a loss that is no number."""
        if not math.isfinite(loss):
            raise DivergedError(
                f"The loss is {loss} at step {self.step}; the last checkpoint in {self.folder} is intact. "
                f"Try a lower --optim.lr, more --optim.warmup_epochs or --optim.clip_grad 1."
            )

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Every process has to call it."""
        return cast(Tensor, self.accelerator.reduce(tensor, reduction="sum"))

    def evaluate(self, split: AnySplit | None = None) -> dict[str, float]:
        """Figures on the validation images or on others, see `measure_split`; of the averaged weights, if any."""
        return measure_split(
            without_stage_head(self.trained_model() if self.stepper.ema is None else self.stepper.ema.module),
            self.val_split if split is None else split,
            size=final_size(self.recipe),
            batch_size=self.eval_batch_size,
            colors=self.colors,
            accelerator=self.accelerator,
            distances=self.distances,
            fast=True,
        )

    @property
    def eval_batch_size(self) -> int:
        """Images per step and process: as many as a piece of training, which keeps far more of each."""
        return max(self.recipe.batch_size // (self.accelerator.num_processes * self.recipe.accumulate), 16)

    def trained_model(self) -> Any:
        """The model in training, without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model)

    def plain_model(self) -> nn.Module:
        """The model to export, in one piece: with the averaged weights where there is an average.

        Under FSDP the main process alone gets one. Every process has to call it then, except after `fit` to the end.
        """
        if self.stepper.ema is not None:
            return without_stage_head(self.stepper.ema.module)
        return without_stage_head(self.whole.gather(self.model, self.step))

    def copy_weights(self) -> dict[str, Tensor]:
        """Those of the model to export, on the CPU; under FSDP every process has to call it."""
        average = self.stepper.ema
        weights = average.module.state_dict() if average else collect_weights(self.accelerator, self.model)
        return {name: torch.empty_like(value, device="cpu").copy_(value) for name, value in weights.items()}

    def _take_best(self) -> None:
        """Put the weights of the best epoch in the place of the last ones."""
        weights = self.best.weights if self.best else None
        if self.best is None or weights is None:  # none if the run had ended before it kept any
            return
        if isinstance(weights, Path):
            weights = read_state(weights)
        if self.stepper.ema is not None:
            self.stepper.ema.module.load_state_dict(weights)
        else:
            restore_weights(self.accelerator, self.model, weights)
            self.whole.forget()
        self.accelerator.print(self.best.describe())

    def seconds(self) -> float:
        """Wall-clock seconds that training took so far, over all sessions; what comes after the end is not counted."""
        return self.seconds_before + (self.ended or time.monotonic()) - self.began

    def record(self) -> Recipe:
        """The recipe that would train the same model from the start."""
        return dataclasses.replace(self.recipe, resume=False, time_budget="")

    def summary(self) -> dict[str, Any]:
        """What `metrics.json` says of how the model was trained."""
        best = self.best.score if self.best and self.best.keeps else None
        return summarize(
            self.record(),
            self.train_split,
            self.accelerator,
            images=self.train_images,
            steps=self.step,
            seconds=self.seconds(),
            commit=self.commit,
            best=best,
        )
