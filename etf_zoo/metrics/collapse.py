"""Neural collapse measured while features stream by: NC1 to NC3 in one pass, NC4 in a second."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EtfZooError
from .distributed import sum_over_processes
from .geometry import (
    Gram,
    between_directions,
    bias_error,
    cdnv,
    cosine_figures,
    effective_rank,
    etf_distance,
    mean_cosine,
    nearest_distances,
    self_duality,
    total_figures,
)

__all__ = ["NeuralCollapse", "GLOBAL_MEANS"]

GLOBAL_MEANS = ("balanced", "weighted")
_CHUNK = 1024  # samples handled at once: a whole data set may be handed over and the float64 copies stay small
_BLOCK = 128  # columns of a block of the scatter; those on and above the diagonal are accumulated, half the work


class NeuralCollapse:
    r"""Statistics of features by class, and the figures of neural collapse made from them (2008.08186).

    One pass of `update` over the data collects counts, class means and the scatter about them in float64. Batches are
    merged by the formula of Chan, Golub & LeVeque (1983) in a form that subtracts nothing: with n_a samples of a class
    before, n_b in the batch, y_i a sample minus the mean before, the rows

    .. math:: z_i = y_i - (1 - \sqrt{n_a / (n_a + n_b)})\, \bar y

    satisfy :math:`\sum_i z_i z_i^\top` = what the scatter gains. Sums of squares would lose all digits where features
    have collapsed; this loses none, in any order and for any split into batches and processes.

    All is exact to about 1e-10; `FastNeuralCollapse` gives five digits much faster. Memory is O(K d + d^2), with
    `diagonal` O(K d). Covariances divide by the number of samples, not by one less.
    Classes without samples are left out and K is the number of those that have some. A class with a single sample
    has a mean but no spread: it counts in all means and adds nothing to the scatter, and is left out of CDNV.

    ```python
    collapse = NeuralCollapse(num_classes=100, dim=512)
    for images, labels in batches:
        collapse.update(features(images), labels)
    collapse.reduce(accelerator)  # with several processes
    for images, labels in batches:  # only for NC4
        collapse.update_agreement(features(images), weight, bias)
    collapse.reduce(accelerator)
    figures = collapse.compute(weight, bias)
    ```

    Args:
        num_classes: Number of classes K.
        dim: Width d of the features.
        diagonal: Keep only the diagonal of the within-class covariance, for features too wide for d^2 numbers.
            `nc1_pinv`, `vci` and `effective_rank` are then not given, `nc1_pinv_diagonal` is.
        device: Where the statistics live and the work is done. It has to know float64 (Apple's MPS does not).

    Raises:
        ValueError: On fewer than 2 classes or 1 dimension.
    """

    def __init__(
        self, num_classes: int, dim: int, *, diagonal: bool = False, device: torch.device | str | None = "cpu"
    ):
        if num_classes < 2 or dim < 1:
            raise EtfZooError(f"Collapse needs 2 classes and 1 dimension at least, got {num_classes} and {dim}.")
        self.num_classes, self.dim, self.diagonal = num_classes, dim, diagonal
        self.device = torch.empty(0, device=device).device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        zeros = {"dtype": torch.float64, "device": self.device}
        self.counts = torch.zeros(self.num_classes, **zeros)
        self.means = torch.zeros(self.num_classes, self.dim, **zeros)
        self._spread = torch.zeros(self.num_classes, **zeros)  # sum of squared distances to the class mean
        self._scatter = torch.zeros((self.dim,) if self.diagonal else (self.dim, self.dim), **zeros)
        self._agreement = torch.zeros(2, **zeros)  # samples that agree, samples asked
        self._reduced_agreement = torch.zeros(2, **zeros)
        self._reduced = False
        self._centers: tuple[Tensor, ...] | None = None

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            features: `(B, d)`, any floating dtype; B may be 0.
            labels: `(B,)`, class numbers.

        Raises:
            ValueError: On wrong shapes, labels outside of 0..K-1, features that are not finite, or after `reduce`.
        """
        self._check(features)
        if self._reduced:
            raise EtfZooError("These statistics are already summed over processes. Call reset() before new updates.")
        self._check_classes(labels, "labels", len(features))
        self._centers = None
        self._collect(features.detach(), labels)

    def _collect(self, features: Tensor, labels: Tensor) -> None:
        for x, y in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
            if len(y):
                self._merge(x.to(self.device, torch.float64), y.to(self.device, torch.int64))

    def settle(self) -> None:
        """Take in what waits, where anything does."""

    def _check(self, features: Tensor) -> None:
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise EtfZooError(f"Expected features of shape (batch, {self.dim}), got {tuple(features.shape)}.")
        if not (torch.isfinite(features.sum()) or torch.isfinite(features).all()):  # a sum is fast, but may overflow
            raise EtfZooError("Features have entries that are not finite: look at the model or its precision.")

    def _check_classes(self, classes: Tensor, what: str, batch: int) -> None:
        if classes.shape != (batch,) or classes.is_floating_point() or classes.dtype == torch.bool:
            raise EtfZooError(
                f"Expected {what} of shape ({batch},), class numbers; got {tuple(classes.shape)}, {classes.dtype}."
            )
        if batch and (classes.min() < 0 or classes.max() >= self.num_classes):
            raise EtfZooError(
                f"All {what} must lie in 0..{self.num_classes - 1}, "
                f"got {classes.min().item()} to {classes.max().item()}."
            )

    def _merge(self, x: Tensor, labels: Tensor) -> None:
        classes, group, in_batch = torch.unique(labels, return_inverse=True, return_counts=True)
        before, after = self.counts[classes], self.counts[classes] + in_batch
        z = x - self.means[labels]
        shift = z.new_zeros(len(classes), self.dim).index_add_(0, group, z) / in_batch[:, None]
        self.means[classes] += shift * (in_batch / after)[:, None]
        z -= (shift * (1 - (before / after).sqrt())[:, None])[group]
        self.counts[classes] = after
        self._spread.index_add_(0, labels, z.square().sum(1))
        self._add_scatter(z)

    def _add_scatter(self, z: Tensor) -> None:
        if self.diagonal:
            self._scatter += z.square().sum(0)
            return
        for i in range(0, self.dim, _BLOCK):
            self._scatter[i : i + _BLOCK, i:].addmm_(z[:, i : i + _BLOCK].mT, z[:, i:])

    def _along(self, directions: Tensor) -> Tensor:
        """Scatter along unit vectors `(d, b)`, `(b,)`; after `_full_scatter`."""
        return (
            directions * (self._scatter[:, None] * directions if self.diagonal else self._scatter @ directions)
        ).sum(0)

    def _full_scatter(self) -> Tensor:
        """N Sigma_W as `(d, d)`, its lower blocks copied from the upper ones; in diagonal mode `(d,)`."""
        if not self.diagonal:
            for i in range(_BLOCK, self.dim, _BLOCK):
                self._scatter[i:, i - _BLOCK : i] = self._scatter[i - _BLOCK : i, i:].mT
        return self._scatter

    @torch.no_grad()
    def reduce(self, processes: Any = None) -> None:
        """Merge the statistics of all processes; each then holds those of all the data, the same to the last bit.

        Call it on every process, once after the last `update` and, for NC4, once more after the last
        `update_agreement`. A process may have seen no sample. Three sums: the counts, the means weighted by them,
        and each process's scatter moved to the common means.

        Args:
            processes: accelerate's `Accelerator` or its like, a `torch.distributed` group, or None for the default
                group; see `sum_over_processes`.

        Raises:
            ValueError: If `processes` is none of these.
        """
        self.settle()
        if not self._reduced:
            own = self.counts
            self.counts = sum_over_processes(own, processes).clone()
            share = own / self.counts.clamp_min(1)
            means = sum_over_processes(self.means * share[:, None], processes)
            z = own.sqrt()[:, None] * (self.means - means)
            self._add_scatter(z)
            self._spread = sum_over_processes(self._spread + z.square().sum(1), processes)
            self._scatter = sum_over_processes(self._scatter, processes)
            self.means = means
            self._reduced = True
            self._centers = None
        self._reduced_agreement += sum_over_processes(self._agreement, processes)
        self._agreement = torch.zeros_like(self._agreement)

    # -------------------------------------------------------------------------------------------------------- NC4

    @torch.no_grad()
    def update_agreement(
        self,
        features: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        predictions: Tensor | None = None,
    ) -> None:
        """NC4: count samples whose nearest class mean is the class that the head predicts.

        To be called when the class means are final: after the last `update`, and after `reduce`.

        Args:
            features: `(B, d)`.
            weight: A linear head `(K, d)`; its product is taken in the wider of the two precisions, in float32 at
                least.
            bias: Of the head, `(K,)`.
            predictions: Instead of a head, the classes `(B,)` that the model predicts, whatever lies between.

        Raises:
            ValueError: On wrong shapes, if not exactly one of weight and predictions is given, or before any update.
        """
        self._check(features)
        if (weight is None) == (predictions is None):
            raise EtfZooError("Pass either the head's weight (and bias) or the predictions of the model.")
        if weight is not None:
            self._check_head(weight, bias)
        else:
            self._check_classes(predictions, "predictions", len(features))  # type: ignore[arg-type]
        self._ask(features.detach(), weight, bias, predictions)

    def _ask(self, features: Tensor, weight: Tensor | None, bias: Tensor | None, predictions: Tensor | None) -> None:
        for start in range(0, len(features), _CHUNK):
            x = features[start : start + _CHUNK].to(self.device)
            if predictions is None:
                predicted = _linear(x, weight, bias).argmax(1)  # type: ignore[arg-type]
            else:
                predicted = predictions[start : start + _CHUNK].to(self.device, torch.int64)
            self._agreement[0] += self._agrees(x.double(), predicted).sum()
            self._agreement[1] += len(x)

    @property
    def agreement_samples(self) -> int:
        """Samples that NC4 was asked about so far."""
        self.settle()
        return int(self._agreement[1] + self._reduced_agreement[1])

    def _agrees(self, x: Tensor, predicted: Tensor) -> Tensor:
        """Whether the nearest class mean is the predicted class, `(B,)`, as float64 would have it.

        Within half the distance from the predicted class mean to the next there is no question. The others are
        compared with all means in float32, and those too close to call again in float64.
        """
        if self._centers is None:
            present, centered, center, _ = self._centered("balanced")
            position = torch.full((self.num_classes,), -1, device=self.device)
            position[present] = torch.arange(len(present), device=self.device)
            safe = nearest_distances(Gram(centered, centered)) / 4 * (1 - 1e-9)
            self._centers = position, centered, centered.float(), center, safe
        position, centered, rounded, center, safe = self._centers
        x, present, wanted = x - center, position[predicted] >= 0, position[predicted].clamp_min(0)
        agrees = (x - centered[wanted]).square().sum(1) < safe[wanted]
        rest = (~agrees).nonzero()[:, 0]
        if len(rest):
            gap = _gap(x[rest].float(), rounded, wanted[rest])
            agrees[rest] = gap > 0
            longest = rounded.norm(dim=1).max()
            rounding = torch.finfo(torch.float32).eps * (self.dim + 8)  # of a sum of dim products, at worst
            rest = rest[gap.abs() <= 4 * rounding * longest * (x[rest].norm(dim=1) + longest)]
        if len(rest):
            agrees[rest] = _gap(x[rest], centered, wanted[rest]) > 0
        return agrees & present

    # -------------------------------------------------------------------------------------------------- computing

    def _centered(self, global_mean: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Present classes (K,), their centered means (K, d), the global mean (d,), the weights of the classes (K,)."""
        if global_mean not in GLOBAL_MEANS:
            raise EtfZooError(f"Unknown global_mean {global_mean!r}. Choose one of {', '.join(GLOBAL_MEANS)}.")
        present = self.counts.nonzero()[:, 0]
        if len(present) < 2:
            raise EtfZooError(f"Collapse needs samples of at least two classes, there are samples of {len(present)}.")
        weights = self.counts[present] if global_mean == "weighted" else torch.ones_like(self.counts[present])
        weights = weights / weights.sum()
        means = self.means if len(present) == self.num_classes else self.means[present]
        center = weights @ means
        centered = means - center
        correction = weights @ centered  # the rounding of the first subtraction, which would lift the rank to K
        return present, centered.sub_(correction), center + correction, weights

    def _check_head(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.shape != (self.num_classes, self.dim):
            raise EtfZooError(
                f"The head's weight has shape {tuple(weight.shape)}, the features need ({self.num_classes}, "
                f"{self.dim}). Behind a neck, collapse has to be measured on the neck's output."
            )
        if bias is not None and bias.shape != (self.num_classes,):
            raise EtfZooError(f"Expected a bias of shape ({self.num_classes},), got {tuple(bias.shape)}.")

    @torch.no_grad()
    def compute(
        self,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        global_mean: str = "balanced",
        spectra: bool = True,
    ) -> dict[str, float]:
        r"""The figures, of what was taken in so far.

        | name | meaning | collapsed |
        |---|---|---|
        | `samples`, `classes`, `single_sample_classes` | counts: samples, classes with some, classes with one | |
        | `nc1_pinv` | tr(Sigma_W pinv(Sigma_B)) / K (2008.08186) | 0 |
        | `nc1_pinv_diagonal` | the same with the diagonal of Sigma_W, in `diagonal` mode; changes with rotation | 0 |
        | `nc1_quotient` | tr(Sigma_W) / tr(Sigma_B) | 0 |
        | `nc1_cdnv` | class-distance normalized variance (2112.15121), mean over pairs of classes | 0 |
        | `nc2_equinorm` | standard deviation / mean of the norms of the centered class means | 0 |
        | `nc2_equiangularity` | standard deviation of their cosines | 0 |
        | `nc2_maximal_angle` | mean of abs(cosine + 1/(K-1)) | 0 |
        | `nc2_etf_distance` | Frobenius distance of their scaled Gram matrix from the ETF's (2105.02375) | 0 |
        | `nc3_self_duality` | squared distance of head and centered class means, each scaled to norm 1 | 0 |
        | `nc3_etf_distance` | as NC2's, of head times centered class means | 0 |
        | `nc3_cosine` | mean cosine of class mean and the head's row (its prototype) | 1 |
        | `nc3_bias` | norm of W m_G + b, if a bias is given | 0 |
        | `nc4_agreement` | share of samples whose nearest class mean is the predicted class | 1 |
        | `vci` | variability collapse index, 1 - tr(pinv(Sigma_T) Sigma_B) / rank(Sigma_B) (2306.03440) | 0 |
        | `effective_rank` | of Sigma_T = Sigma_W + Sigma_B: exp of the entropy of its singular values | K - 1 |
        | `effective_rank_means` | of the centered class means | K - 1 |

        Args:
            weight: The head or frame `(K, d)`, for NC3, on the same side of any neck as the features.
            bias: `(K,)`.
            global_mean: `"balanced"`: every class counts the same in the global mean and in Sigma_B; `"weighted"`:
                by its samples, so that Sigma_T is the covariance of the features. Sigma_W is over samples in both.
            spectra: Whether to give `vci` and `effective_rank`, which decompose a d x d matrix.

        Returns:
            Name -> figure; what cannot be measured is left out (NC3 without a head, NC4 without a second pass).
            CDNV is infinite if two classes share their mean and NaN if fewer than two have two samples; where all
            class means coincide NC1 is infinite and NC2 undefined (NaN).

        Raises:
            ValueError: On an unknown `global_mean`, a head of another shape, or samples of fewer than two classes.
        """
        self.settle()
        self._centers = None  # what NC4 keeps is as large as the means
        present, centered, center, weights = self._centered(global_mean)
        counts = self.counts[present]
        figures = {
            "samples": counts.sum().item(),
            "classes": float(len(present)),
            "single_sample_classes": (counts == 1).sum().item(),
        }
        gram, scatter, samples = Gram(centered, centered), self._full_scatter(), counts.sum()
        pinv, spectrum = 0.0, []
        for values, directions in between_directions(centered, weights, gram):
            pinv += (self._along(directions) / values).sum().item()
            spectrum.append(values)
        rank = sum(map(len, spectrum))
        pinv = pinv / samples.item() / len(present) if rank else math.inf
        figures["nc1_pinv_diagonal" if self.diagonal else "nc1_pinv"] = pinv
        between = (weights * centered.norm(dim=1).square()).sum()
        figures["nc1_quotient"] = (self._spread.sum() / samples / between).item()
        figures["nc1_cdnv"] = cdnv(gram, self._spread[present] / counts, counts > 1)
        norms = centered.norm(dim=1)
        figures["nc2_equinorm"] = (norms.std(correction=0) / norms.mean()).item()
        figures["nc2_equiangularity"], figures["nc2_maximal_angle"] = cosine_figures(gram)
        figures["nc2_etf_distance"] = etf_distance(gram)
        del gram  # the head's is as large
        if weight is not None:
            self._check_head(weight, bias)
            head = weight.detach().to(self.device, torch.float64)[present]
            figures["nc3_self_duality"] = self_duality(head, centered)
            figures["nc3_etf_distance"] = etf_distance(Gram(head, centered))
            figures["nc3_cosine"] = mean_cosine(head, centered)
            if bias is not None:
                figures["nc3_bias"] = bias_error(head, bias.detach().to(self.device, torch.float64)[present], center)
        agree, asked = (self._agreement + self._reduced_agreement).tolist()
        if asked:
            figures["nc4_agreement"] = agree / asked
        if spectra and not self.diagonal:
            figures["vci"], figures["effective_rank"] = total_figures(scatter / samples, centered, weights, rank)
        figures["effective_rank_means"] = effective_rank(torch.cat(spectrum)) if rank else 0.0
        return figures


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    bias = None if bias is None else bias.to(x.device, dtype)
    return F.linear(x.to(dtype), weight.to(x.device, dtype), bias)


def _gap(x: Tensor, means: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance to the nearest other mean minus that to the wanted one, `(B,)`."""
    scores = torch.addmm(means.square().sum(1), x, means.mT, alpha=-2)  # squared distances minus |x|^2
    own = scores.gather(1, wanted[:, None])
    return (scores.scatter_(1, wanted[:, None], math.inf).amin(1, keepdim=True) - own)[:, 0]
