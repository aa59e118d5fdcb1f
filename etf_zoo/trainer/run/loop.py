"""The loop of a run: steps, looks at the loss, evaluations, checkpoints, until the end or the time is up."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import torch

from ..recipe.config import seconds, size_at
from .interrupt import Interrupt
from .log import Log, progress

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Loop"]


class Loop:
    """Trains a run in this session.

    Args:
        run: Of which the steps are done.
        log: Where figures go.
        interrupt: Whether somebody has asked to stop.
    """

    def __init__(self, run: Run, log: Log, interrupt: Interrupt):
        self.run, self.recipe, self.log, self.interrupt = run, run.recipe, log, interrupt
        self.total = self.recipe.epochs * run.steps_per_epoch
        self.main = run.accelerator.is_main_process
        self.bar = progress(self.total, run.step, self.recipe.batch_size, self.main)

    def train(self) -> bool:
        """Train to the end of the run or of the time.

        Returns:
            Whether the run is over; if not, a checkpoint is written.

        Raises:
            SystemExit: After a signal, once a checkpoint is written.
        """
        run = self.run
        run.model.train()
        with self.bar:
            while not run.is_over():
                if self._epoch() and not run.is_over():
                    break
            else:
                return True
        if self.interrupt.number:
            run.accelerator.print(
                f"Stopped at step {run.step} of {self.total}; saved.\nGo on with the same command and --resume."
            )
            raise SystemExit(self.interrupt.exit_code)
        run.accelerator.print(
            f"Time budget of {self.recipe.time_budget} is used up at step {run.step} of {self.total}; saved. "
            f"Go on with the same command and --resume."
        )
        return False

    def _epoch(self) -> bool:
        """Train to the end of the epoch, evaluate, log; or to the end of the time.

        Returns:
            Whether to stop; a checkpoint is written then.
        """
        run, recipe = self.run, self.recipe
        epoch, first = divmod(run.step, run.steps_per_epoch)
        began, images_before, seen = time.monotonic(), run.sums[2].item(), run.sums.tolist()
        looked = began
        for images, labels in run.batches(epoch, first):
            run.sums += run.stepper.step(run.step, images, labels)
            run.step += 1
            self.bar.update(recipe.batch_size)
            inside = run.step % run.steps_per_epoch > 0  # the last step is saved after its evaluation
            look = run.step % recipe.log_every == 0
            if look or not inside:
                now, sums = time.monotonic(), run.sums.tolist()
                self._look([a - b for a, b in zip(sums, seen, strict=True)], now - looked)
                looked, seen = now, sums
            if inside:
                stop, save = self.clock(look)
                if stop or save or (recipe.save_steps and run.step % recipe.save_steps == 0):
                    run.save()
                if stop:
                    return True
        sums = run.sum_over_processes(run.sums).tolist()
        new_images = run.sum_over_processes(run.sums[2] - images_before).item()
        record = {
            "epoch": epoch + 1,
            "size": size_at(recipe, epoch),
            "lr": run.stepper.lr(),
            "train_loss": sums[0] / sums[2],
            "train_top1": 100 * sums[1] / sums[2],
            "images_per_second": new_images / (time.monotonic() - began),
        }
        run.sums.zero_()
        last = run.step == self.total
        if (epoch + 1) % recipe.eval_every == 0 or last:
            record |= self._evaluate(epoch + 1)
        record["seconds"] = run.seconds()
        self.log.epoch(record, run.step)
        stop, save = self.clock(True)
        if stop or save or run.is_over() or (epoch + 1) % recipe.save_every == 0:
            run.save()
        return stop

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """Figures for the log; the weights are kept if they are the best."""
        figures, best = self.run.evaluate(), self.run.best
        if best and best.observe(epoch, figures) and best.keeps:
            best.weights = self.run.copy_weights()
        if self.main:
            self.bar.write(f"epoch {epoch}: loss {figures['loss']:.4f}, {self.run.headline(figures)}")
        return {f"val_{name}": value for name, value in figures.items() if not name.startswith("images")}

    def _look(self, new: list[float], seconds: float) -> None:
        """Show how the steps since the last look went; with several processes, the main one's share of the images."""
        loss, right, images = new
        self.run.check_finite(loss)
        if not self.main or not images:
            return
        figures = {"loss": loss / images, "top1": 100 * right / images}
        self.bar.set_postfix(loss=f"{figures['loss']:.3f}", top1=f"{figures['top1']:.1f} %", refresh=False)
        rate = images * self.run.accelerator.num_processes / seconds
        self.log.step({**figures, "lr": self.run.stepper.lr(), "images_per_second": rate}, self.run.step)

    def clock(self, look: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether a checkpoint is due by the clock.

        With several processes they agree, at each look only: agreeing costs a message.
        """
        run = self.run
        several = run.accelerator.num_processes > 1
        if several and not look:
            return False, False
        now = time.monotonic()  # the main process's counts
        over = self.main and now > run.began + seconds(self.recipe.time_budget)
        due = self.main and now - run.saved[1] > 60 * self.recipe.save_minutes > 0
        number = self.interrupt.number
        if several:
            wishes = torch.tensor([over, due, number], device=run.accelerator.device)
            over, due, asked = run.sum_over_processes(wishes).tolist()
            self.interrupt.number = number or (signal.SIGTERM if asked else 0)  # of another process
        return bool(over or self.interrupt.number), bool(due)
