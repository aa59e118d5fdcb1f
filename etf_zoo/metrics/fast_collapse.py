"""Neural collapse in float32, much faster than `NeuralCollapse`, to five digits: for a curve during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .collapse import NeuralCollapse
from .products import product, room

__all__ = ["FastNeuralCollapse"]

# Samples that products are taken over; smaller batches wait until there are so many.
_ROWS = 2048
# Rows of a block of the scatter matrix; only blocks on and above the diagonal are accumulated, half the work.
_BLOCK = 128
# Samples that tell whether the short cut of NC4 settles enough of the others, a half, to be worth its time.
_TRIED = 128


class FastNeuralCollapse(NeuralCollapse):
    """`NeuralCollapse` with its products in float32: the same figures to 1e-5, in a fraction of the time.

    What makes float32 enough: class means are kept in float64, and what is left of a sample once its class mean is
    subtracted goes into the products. The difference of two float32 numbers is rounded relative to itself, so nothing
    is lost however small the deviations are beside the means. Products over 2,048 samples at a time are added up in
    float64. Everything after that, on class means and the scatter, is in float64 as in `NeuralCollapse`.

    All figures agree with those of `NeuralCollapse` to a relative 1e-5 as long as the deviations within classes are
    at least a thousandth of the norms of the class means; `vci`, which is 1 minus a number near 1, to 1e-5 absolutely.
    `nc4_agreement` may differ by samples that lie as near to a second class mean as to the first, but for rounding.
    Below, features that are float32 themselves leave no more digits. Directions whose variance within classes is less
    than 1e-6 of the largest, as where a few samples lie far out, are lost to `vci` and `effective_rank`.

    Batches are copied until there are 2,048 samples. Attributes such as `means` and `counts` are therefore complete
    only after `reduce` or `compute`.

    Args:
        num_classes: Number of classes K.
        dim: Width d of the features.
        diagonal: See `NeuralCollapse`.
        device: Likewise.

    Raises:
        ValueError: On fewer than 2 classes or 1 dimension.

    Example:
        >>> collapse = FastNeuralCollapse(num_classes=100, dim=512)
        >>> collapse.update(features, labels)  # doctest: +SKIP
        >>> collapse.compute()["nc1_quotient"]  # doctest: +SKIP
    """

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._samples, self._questions = _Waiting(self._merge_rows), _Waiting(self._answer)
        self._room = torch.empty(0)

    def _collect(self, features: Tensor, labels: Tensor) -> None:
        self._samples.add(features.to(self.device), labels.to(self.device, torch.int64))

    def settle(self) -> None:
        self._samples.flush()
        self._questions.flush()

    def _merge_rows(self, x: Tensor, labels: Tensor) -> None:
        """The merge of `NeuralCollapse`, on differences from rounded means; `rest` is what rounding took from them.

        The samples are overwritten: a new page of memory costs more than what is computed on it.
        """
        classes, group, in_batch = torch.unique(labels, return_inverse=True, return_counts=True)
        before, means = self.counts[classes], self.means[classes]
        after, unseen = before + in_batch, before == 0
        if unseen.any():  # any sample of a new class is as near to its mean as the others
            places = torch.arange(len(labels), device=x.device)
            means[unseen] = x[torch.empty_like(classes).scatter_(0, group, places)[unseen]].double()
        rounded = means.float()
        rest = means.sub_(rounded)
        z = self._subtract(x, rounded, group).float()
        shift = z.new_zeros(len(classes), self.dim).index_add_(0, group, z).double().div_(in_batch[:, None]).sub_(rest)
        self.means[classes] = torch.addcmul(rest, shift, (in_batch / after)[:, None]).add_(rounded)
        z = self._subtract(z, torch.addcmul(rest, shift, (1 - (before / after).sqrt())[:, None]), group)
        self.counts[classes] = after
        self._spread.index_add_(0, labels, torch.linalg.vecdot(z, z).double())
        self._add_scatter(z)

    def _add_scatter(self, z: Tensor) -> None:
        if self.diagonal or z.dtype == torch.float64:  # the latter when processes meet
            super()._add_scatter(z)
            return
        z = self._scratch(self.dim, len(z)).copy_(z.mT)
        for i in range(0, self.dim, _BLOCK):
            self._scatter[i : i + _BLOCK, i:] += product(z[i : i + _BLOCK], z[i:])

    def _subtract(self, x: Tensor, rows: Tensor, group: Tensor) -> Tensor:
        """`x - rows[group]`, in place, in the precision of x."""
        if x.dtype != torch.float32:
            return x.sub_(rows.to(x.dtype)[group])
        return x.sub_(torch.index_select(rows.float(), 0, group, out=self._scratch(len(x), self.dim)))

    def _scratch(self, *shape: int) -> Tensor:
        """Float32 numbers of any content, valid until the next call."""
        count = shape[0] * shape[1]
        if self._room.numel() < count:
            self._room = room(max(count, _ROWS * self.dim), like=torch.empty(0, device=self.device))
        return self._room[:count].view(shape)

    def _along(self, directions: Tensor) -> Tensor:
        if self.diagonal:
            return super()._along(directions)
        directions = directions.mT.float().contiguous()
        return torch.linalg.vecdot(directions, product(directions, self._scatter.float())).double()

    def _ask(self, features: Tensor, weight: Tensor | None, bias: Tensor | None, predictions: Tensor | None) -> None:
        if self._centers is None:
            self._samples.flush()
            self._questions.take_room(self._samples)
            self._centers = self._find_centers()
        x = features.to(self.device)
        if predictions is None:
            self._questions.add(x, torch.empty(len(x), dtype=torch.int64, device=self.device), (weight, bias))
        else:
            self._questions.add(x, predictions.to(self.device, torch.int64))

    def _answer(self, x: Tensor, predicted: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        if weight is not None:
            logits = product(x.float(), weight.detach().to(self.device, torch.float32))
            predicted = (logits if bias is None else logits.add_(bias.detach().to(self.device))).argmax(1)
        self._agreement[0] += self._agrees(x, predicted).sum()
        self._agreement[1] += len(x)

    def _find_centers(self) -> tuple[Tensor, ...]:
        present, centered, center, _ = self._centered("balanced")
        position = torch.full((self.num_classes,), -1, device=self.device)
        position[present] = torch.arange(len(present), device=self.device)
        rounded = center.float()
        means = centered.add_(center - rounded).float()  # what rounding takes from both changes no distance
        squares = torch.linalg.vecdot(means, means)
        return position, means, squares, rounded, _nearest(means, squares)

    def _agrees(self, x: Tensor, predicted: Tensor) -> Tensor:
        position, means, squares, center, near = self._centers  # type: ignore[misc]  # made by `_ask`
        x, present, wanted = x.sub_(center).float(), position[predicted] >= 0, position[predicted].clamp_min(0)
        # within half the distance to the next class mean there is no question; the others are compared with all
        agrees = _squared(x[:_TRIED], means[wanted[:_TRIED]]) < near[wanted[:_TRIED]]
        if agrees.double().mean() > 0.5:
            agrees = _squared(x, means[wanted]) < near[wanted]
            rest = (~agrees).nonzero()[:, 0]
            if len(rest):
                agrees[rest] = _is_nearest(x[rest], means, squares, wanted[rest])
        else:
            agrees = _is_nearest(x, means, squares, wanted)
        return agrees & present


class _Waiting:
    """Rows that wait until there are enough of them for a product to be worth it.

    Args:
        take: Called with rows `(n, d)`, which it may overwrite, their numbers `(n,)`, and what they came with.
    """

    def __init__(self, take: Callable[..., None]):
        self.take = take
        self.count, self.extra = 0, ()
        self.kept: tuple[Any, ...] = ()  # the same as they were: the caller may change them in place
        self.versions: list[int] = []
        self.rows = self.numbers = torch.empty(0)

    def add(self, x: Tensor, numbers: Tensor, extra: tuple[Any, ...] = ()) -> None:
        """Copy rows, and hand them on each time that there are enough."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # float64 stays: what is subtracted may be large
        versions = [tensor._version for tensor in extra if tensor is not None]
        same = versions == self.versions and all(a is b for a, b in zip(extra, self.extra, strict=False))
        same = same and len(extra) == len(self.extra)
        if self.count and not (same and x.dtype == self.rows.dtype):
            self.flush()
        if not same:
            self.kept = tuple(None if tensor is None else tensor.detach().clone() for tensor in extra)
        self.extra, self.versions = extra, versions
        while len(x):
            if self.rows.shape[1:] != x.shape[1:] or self.rows.dtype != x.dtype:
                self.rows, self.numbers = room(_ROWS, x.shape[1], like=x), numbers.new_empty(_ROWS)
            taken = min(_ROWS - self.count, len(x))
            self.rows[self.count : self.count + taken] = x[:taken]
            self.numbers[self.count : self.count + taken] = numbers[:taken]
            self.count += taken
            x, numbers = x[taken:], numbers[taken:]
            if self.count == _ROWS:
                self.flush()

    def take_room(self, other: _Waiting) -> None:
        """Use the memory of another that holds no rows, where this one has none."""
        if not other.count and not len(self.rows):
            self.rows, self.numbers, other.rows, other.numbers = other.rows, other.numbers, self.rows, self.numbers

    def flush(self) -> None:
        """Hand on what waits."""
        count, self.count = self.count, 0
        if count:
            self.take(self.rows[:count], self.numbers[:count], *self.kept)


def _squared(x: Tensor, means: Tensor) -> Tensor:
    """Squared distances of rows from rows; the means are overwritten."""
    means = torch.sub(x, means, out=means)
    return torch.linalg.vecdot(means, means)


def _nearest(means: Tensor, squares: Tensor) -> Tensor:
    """A quarter of the squared distance of each class mean to the nearest other, `(K,)`, less what rounding may add."""
    longest = squares.max()
    found = [
        (squares[rows, None] + squares - 2 * product(means[rows], means)).scatter_(1, rows[:, None], math.inf).amin(1)
        for rows in torch.arange(len(means), device=means.device).split(_BLOCK)
    ]
    return (torch.cat(found) - 1e-5 * longest) / 4


def _is_nearest(x: Tensor, means: Tensor, squares: Tensor, wanted: Tensor) -> Tensor:
    """Whether the wanted class mean is nearer than all others, `(B,)`."""
    scores = torch.sub(squares, product(x, means), alpha=2)  # squared distances minus |x|^2
    own = scores.gather(1, wanted[:, None])
    return (scores.scatter_(1, wanted[:, None], math.inf).amin(1, keepdim=True) > own)[:, 0]
