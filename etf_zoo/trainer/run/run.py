"""The loop: train, evaluate, checkpoint, resume. One class per run, everything else in small functions."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from etf_zoo import frame_heads
from etf_zoo.errors import DivergedError, EtfZooError
from etf_zoo.evaluation.measure import measure

from ..data.augment import colors_of
from ..data.batches import AnySplit, eval_batches, frame_tree, limited, load_split, train_batches
from ..data.long_tail import long_tail_indices
from ..recipe.config import Recipe, changes, final_size, save_recipe, seconds, size_at
from ..run import checkpoint
from .launching import Repeatable, checkout_commit, gather_in, in_step, is_sharded, make_accelerator, sync_buffers
from .locks import acquire
from .log import Log, forget_after, progress
from .model import make_model, make_optimizer
from .small_maps import use_products
from .stepper import Stepper, channels_last

__all__ = ["Run"]

CHECKPOINTS = "checkpoints"


class Run:
    """A training run in a folder: `checkpoints/`, `metrics.jsonl`, `recipe.yaml`, `tensorboard/`.

    Args:
        recipe: What to do.
        train: Training images, all of which are used; loaded, and thinned to a long tail, by the recipe if not given.
        val: Images to report on; likewise.
        model: The model, on the CPU; made by the recipe if not given.
        distances: LCA heights of the classes `(K, K)`, where mistakes are to be weighed by them.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: AnySplit | None = None,
        val: AnySplit | None = None,
        model: nn.Module | None = None,
        distances: Tensor | None = None,
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

        if model is None:
            names = self.train_split.label_names
            model = make_model(recipe, len(names), frame_tree(recipe, names))
        self.colors = colors_of(model)
        set_seed(recipe.seed, device_specific=True)  # what is drawn in training, such as dropout, differs by process
        whole = is_sharded(self.accelerator) and self.accelerator.is_main_process
        self.whole_model = copy.deepcopy(model) if whole else None  # takes the weights of all processes in the end
        self.gathered: int | None = None  # step of the weights it has
        if channels_last(recipe, self.accelerator):
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.accelerator.device.type == "cpu":
            use_products(model)
        # DDP would send these buffers to every process at every step; they never change
        model._ddp_params_and_buffers_to_ignore = [f"{name}.weight" for name in frame_heads(model)]  # type: ignore
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(recipe.optim, model))
        self.stepper = Stepper(
            recipe,
            self.accelerator,
            self.model,
            self.optimizer,
            steps_per_epoch=self.steps_per_epoch,
            class_counts=limited(self.train_split, recipe.data.limit, recipe.seed).class_counts(),
        )
        if is_sharded(self.accelerator):
            gather_in(self.model)
        self.distances = distances
        self.step = 0  # optimizer steps done
        self.sums = self.stepper.zeros()  # loss, right, images of the present epoch, of this process
        self.saved = (0, time.monotonic())  # step and time of the last checkpoint
        self.spent = 0.0  # seconds trained by earlier sessions of this run
        self.ended: float | None = None  # when this session's training ended
        self.commit = checkout_commit()
        if recipe.resume:
            self._resume()
        else:
            self._start_folder()
        self.log = Log(self.folder, recipe.tensorboard and self.accelerator.is_main_process, self.step)

    def _check_batch(self) -> None:
        recipe, processes = self.recipe, self.accelerator.num_processes
        if not self.steps_per_epoch:
            raise EtfZooError(f"{self.train_images} training images do not fill one batch of {recipe.batch_size}.")
        if recipe.batch_size % (processes * recipe.accumulate):
            raise EtfZooError(
                f"batch_size {recipe.batch_size} does not divide by {processes} processes"
                f"{f' times accumulate {recipe.accumulate}' if recipe.accumulate > 1 else ''}."
            )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _start_folder(self) -> None:
        if checkpoint.exists(self.folder / CHECKPOINTS):
            raise EtfZooError(
                f"{self.folder} holds a run already. Continue it with --resume, or choose another --output."
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_recipe(self.record(), self.folder / "recipe.yaml")
            forget_after(self.folder, 0)

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved[0] == self.step:
            return
        self._check_finite(self.sums.tolist()[0])
        sums = self._over_processes(self.sums)
        state = {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "sums": sums.tolist(),
            "seconds": self.seconds(),
            "commit": self.commit,
            "processes": self.accelerator.num_processes,
        }
        checkpoint.save(self.folder / CHECKPOINTS, self.accelerator, state, self.recipe.keep_checkpoints)
        self.saved = (self.step, time.monotonic())

    def _resume(self) -> None:
        found = checkpoint.newest(self.folder / CHECKPOINTS, self.accelerator)
        if found is None:
            raise EtfZooError(f"There is no checkpoint in {self.folder} to resume from. Start without --resume.")
        path, state = found
        self._tell_changes()
        if (before := state.get("processes", 0)) and (before > 1) != (self.accelerator.num_processes > 1):
            raise EtfZooError(f"{path} is of {before} process(es): resume with one if it was one, else with several.")
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise EtfZooError(
                f"{path} has {state['steps_per_epoch']} steps in an epoch, this recipe {self.steps_per_epoch}. Resume "
                f"with the data and the batch_size of {self.folder / 'recipe.yaml'}."
            )
        chosen = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.accelerator.load_state(str(path))
        for group, settings in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(settings)  # the recipe's, not those of the checkpoint
        self.step, self.spent, self.commit = state["step"], state["seconds"], state["commit"]  # of the start
        self.saved = (self.step, time.monotonic())
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:  # sums over all processes
            self.sums += self.sums.new_tensor(state["sums"])
            save_recipe(self.record(), self.folder / "recipe.yaml")
            forget_after(self.folder, self.step // self.steps_per_epoch)
        self.accelerator.wait_for_everyone()

    def _tell_changes(self) -> None:
        """Name what differs from the recipe that the run was started with; refuse another model."""
        changed = changes(self.folder / "recipe.yaml", self.record())
        if any(name.startswith(("model", "head", "optim.name", "ema.decay")) for name in changed):
            raise EtfZooError(
                f"{self.folder} holds a run of another model, optimizer or average ({'; '.join(changed.values())}). "
                f"Resume with its recipe.yaml, or choose another --output."
            )
        if changed:
            self.accelerator.print(f"Resuming with another recipe than before: {'; '.join(changed.values())}.")

    # --------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> bool:
        """Train to the end or the time budget.

        Returns:
            Whether the end was reached; if not, a checkpoint is written.
        """
        recipe, total = self.recipe, self.recipe.epochs * self.steps_per_epoch
        if self.step >= total:  # was finished when this session began
            self.ended = self.began
            self.plain_model()
            return True
        main = self.accelerator.is_main_process
        alone = acquire(self.folder / ".lock") if main else nullcontext(True)
        with alone as free, progress(total, self.step, recipe.batch_size, main) as bar:
            if not free:
                raise EtfZooError(f"Another process trains in {self.folder}: choose another --output.")
            self.model.train()
            while self.step < total and not self.enough():
                stop = self._epoch(bar)
                if stop and self.step < total:
                    break
        self.log.close()
        if self.step < total and not self.enough():
            self.accelerator.print(
                f"Time budget of {recipe.time_budget} is used up at step {self.step} of {total}; saved. "
                f"Go on with the same command and --resume."
            )
            return False
        self.ended = time.monotonic()
        self.plain_model()  # gathered while all processes are here
        return True

    def enough(self) -> bool:
        """Whether to end after an epoch, before the last; for subclasses."""
        return False

    def _epoch(self, bar: tqdm) -> bool:
        """Train to the end of the epoch, evaluate, log; or to the end of the time.

        Returns:
            Whether the time is up; a checkpoint is written then.
        """
        recipe = self.recipe
        epoch, first = divmod(self.step, self.steps_per_epoch)
        began, images_before, seen = time.monotonic(), self.sums[2].item(), self.sums.tolist()
        looked = began
        for images, labels in self._batches(epoch, first):
            self.sums += self.stepper.step(self.step, images, labels)
            self.step += 1
            bar.update(recipe.batch_size)
            inside = self.step % self.steps_per_epoch > 0  # the last step is saved after its evaluation
            look = self.step % recipe.log_every == 0
            if look or not inside:
                now, sums = time.monotonic(), self.sums.tolist()
                self._look([a - b for a, b in zip(sums, seen, strict=True)], now - looked, bar)
                looked, seen = now, sums
            if inside:
                stop, save = self._clock(look)
                if stop or save or (recipe.save_steps and self.step % recipe.save_steps == 0):
                    self.save()
                if stop:
                    return True
        sums = self._over_processes(self.sums).tolist()
        new_images = self._over_processes(self.sums[2] - images_before).item()
        record = {
            "epoch": epoch + 1,
            "size": size_at(recipe, epoch),
            "lr": self.stepper.lr(),
            "train_loss": sums[0] / sums[2],
            "train_top1": 100 * sums[1] / sums[2],
            "images_per_second": new_images / (time.monotonic() - began),
        }
        self.sums.zero_()
        last = self.step == recipe.epochs * self.steps_per_epoch
        if (epoch + 1) % recipe.eval_every == 0 or last:
            figures = {f"val_{k}": v for k, v in self.evaluate().items() if not k.startswith("images")}
            if not bar.disable:
                bar.write(f"epoch {epoch + 1}: loss {figures['val_loss']:.4f}, top-1 {figures['val_top1']:.2f} %")
            record |= figures
        record["seconds"] = self.seconds()
        if self.accelerator.is_main_process:
            self.log.epoch(record, self.step)
        stop, save = self._clock(True)
        if stop or save or last or (epoch + 1) % recipe.save_every == 0:
            self.save()
        return stop

    def _look(self, new: list[float], seconds: float, bar: tqdm) -> None:
        """Show how the steps since the last look went; with several processes, the main one's share of the images."""
        loss, right, images = new
        self._check_finite(loss)
        if not self.accelerator.is_main_process or not images:
            return
        figures = {"loss": loss / images, "top1": 100 * right / images}
        bar.set_postfix(loss=f"{figures['loss']:.3f}", top1=f"{figures['top1']:.1f} %", refresh=False)
        rate = images * self.accelerator.num_processes / seconds
        self.log.step({**figures, "lr": self.stepper.lr(), "images_per_second": rate}, self.step)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"The loss is {loss} at step {self.step}; the last checkpoint in {self.folder} is intact. "
                f"Try a lower --optim.lr, more --optim.warmup_epochs or --optim.clip_grad 1."
            )

    def _clock(self, look: bool) -> tuple[bool, bool]:
        """Whether the time budget is used up, and whether a checkpoint is due by the clock.

        With several processes the main one decides for all, at each look only: agreeing costs a message.
        """
        if self.accelerator.num_processes > 1 and not look:
            return False, False
        now = time.monotonic()
        due = now - self.saved[1] > 60 * self.recipe.save_minutes > 0
        decision = [now > self.began + seconds(self.recipe.time_budget), due]
        stop, save = broadcast_object_list(decision)
        return stop, save

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
            colors=self.colors,
            device=a.device,
        )

    def _over_processes(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(tensor, reduction="sum"))

    # ------------------------------------------------------------------------------------------------- the result

    def evaluate(self) -> dict[str, float]:
        """Figures on the validation split, see `etf_zoo.evaluation.evaluate`."""
        a, size = self.accelerator, final_size(self.recipe)
        batches = partial(
            eval_batches,
            self.val_split,
            size=size,
            batch_size=self.eval_batch_size,
            rank=a.process_index,
            world=a.num_processes,
            colors=self.colors,
            device=a.device,
        )
        if is_sharded(a):
            batches = partial(in_step, batches, (0, 3, size, size), a)
        model = self.trained_model() if self.stepper.ema is None else self.stepper.ema.module
        if a.num_processes > 1:  # batch norm's statistics are each process's own: the main one's are what is saved
            sync_buffers(model)
        found = measure(model, Repeatable(batches), distances=self.distances, processes=a, autocast=a.autocast)
        return found.figures

    @property
    def eval_batch_size(self) -> int:
        """Images per step and process: as many as a piece of training, which keeps far more of each."""
        return max(self.recipe.batch_size // (self.accelerator.num_processes * self.recipe.accumulate), 16)

    def figures_on(self, split: AnySplit) -> dict[str, float]:
        """Figures on any images."""
        watched, self.val_split = self.val_split, split
        try:
            return Run.evaluate(self)
        finally:
            self.val_split = watched

    def trained_model(self) -> Any:
        """The model in training, without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model)

    def plain_model(self) -> nn.Module:
        """The model to export, in one piece: with the averaged weights where there is an average.

        Under FSDP the main process alone gets one. Every process has to call it then, except after `fit` to the end.
        """
        if self.stepper.ema is not None:
            return self.stepper.ema.module
        if not is_sharded(self.accelerator):
            return self.trained_model()
        if self.gathered != self.step:
            weights = self.accelerator.get_state_dict(self.model)
            if self.whole_model is not None:
                self.whole_model.load_state_dict(weights)
            self.gathered = self.step
        return self.trained_model() if self.whole_model is None else self.whole_model

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
