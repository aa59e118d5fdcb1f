"""Group-wise whitening by Newton iterations (IterNorm, 1904.03441): a control for fixed frames."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import norm as timm_norm
from timm.layers import norm_act as timm_norm_act
from torch import Tensor, nn

from ..errors import EtfZooError
from ..timm_compat import update_model_args
from .classifier import FrameClassifier

__all__ = ["WHITENING_ARGS", "Whitening", "newton_whitening", "whiten_last_norm"]

# Arguments of `whiten_last_norm`: which norm, and what stands in its place.
WHITENING_ARGS = ("name", "group_size", "iterations", "eps", "momentum", "affine")


def newton_whitening(covariance: Tensor, iterations: int) -> Tensor:
    r"""Inverse square root of covariance matrices by Newton iterations.

    From :math:`P_0 = I`, :math:`P_{k+1} = \tfrac12 (3 P_k - P_k^3 \Sigma / \mathrm{tr}\,\Sigma)`, scaled back by
    :math:`1/\sqrt{\mathrm{tr}\,\Sigma}`. Converges for every positive definite matrix; few iterations leave the
    directions of small variance short of unit variance, which is what makes it stable in training.

    Args:
        covariance: `(..., g, g)`, symmetric positive definite.
        iterations: How many.

    Returns:
        `(..., g, g)`, symmetric.

    Example:
        >>> newton_whitening(4 * torch.eye(2), iterations=10)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    normalized = covariance / trace
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    # Two coupled sequences, p to the inverse root and root to the root, give the same P_k; the one above amplifies
    # rounding errors and diverges after some 20 steps.
    p, root = identity.expand_as(covariance), normalized
    for _ in range(iterations):
        step = 1.5 * identity - 0.5 * p @ root
        p, root = step @ p, root @ step
    return p / trace.sqrt()


class Whitening(nn.Module):
    """Whitening of groups of channels, in the place of a batch norm (IterNorm, 1904.03441).

    In training each group is whitened by its batch's covariance, and running averages of the mean and of the whitening
    matrix are kept; evaluation uses those alone. Computed in float32, autocast or not; the output has the input's type.
    Statistics are those of this process's batch.

    Args:
        num_features: Channels C.
        group_size: Channels whitened together; the last group takes the rest. 64 is the paper's for ResNets: a batch
            of B images gives B x H x W samples for a 64 x 64 covariance.
        iterations: Newton iterations. The paper's 5 leave 64 correlated channels far from white, with variances of 0.45
            and less; 20 whiten all that `eps` does not hold back.
        eps: Added to the variances; batch norm's default, whose place this takes.
        momentum: Share of the new statistics in the running ones; batch norm's default too.
        affine: Whether to learn a scale and a shift for each channel.
        channels_last: Whether channels are the last dimension (in the place of a LayerNorm) or dimension 1.

    Shape:
        `(B, C, ...)`, or `(..., C)` with `channels_last`, to the same.

    Raises:
        ValueError: On sizes that are not positive, or (in forward) another number of channels, or fewer than two
            samples in training.

    Example:
        >>> Whitening(8, group_size=4)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    running_mean: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        group_size: int = 64,
        iterations: int = 20,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        channels_last: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if min(num_features, group_size, iterations) < 1:
            raise EtfZooError(
                f"num_features, group_size and iterations must be positive, got {num_features}, {group_size}, "
                f"{iterations}."
            )
        self.num_features, self.group_size, self.iterations = num_features, group_size, iterations
        self.eps, self.momentum, self.channels_last = eps, momentum, channels_last
        self.register_buffer("running_mean", torch.zeros(num_features, device=device))
        # one buffer for the groups of full size and one for the rest, so that all full groups go in one batched product
        self._groups = [(num_features // group_size, group_size), (1, num_features % group_size)]
        self._groups = [(count, size) for count, size in self._groups if count * size]
        for i, (count, size) in enumerate(self._groups):
            self.register_buffer(f"running_whitening_{i}", torch.eye(size, device=device).repeat(count, 1, 1))
        self.weight = nn.Parameter(torch.ones(num_features, device=device)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, device=device)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1 if self.channels_last else 1] != self.num_features:
            raise EtfZooError(f"Expected {self.num_features} channels, got a tensor of shape {tuple(x.shape)}.")
        rows = x if self.channels_last else x.movedim(1, -1)
        with torch.autocast(x.device.type, enabled=False):
            flat = rows.reshape(-1, self.num_features)
            y = self._whiten(flat if flat.dtype == torch.float64 else flat.float())
            if self.weight is not None and self.bias is not None:
                y = y * self.weight.to(y.dtype) + self.bias.to(y.dtype)
        y = y.to(x.dtype).view(rows.shape)
        return y if self.channels_last else y.movedim(-1, 1)

    def _whiten(self, x: Tensor) -> Tensor:
        """`(N, C)` to `(N, C)`."""
        if self.training:
            if len(x) < 2:
                raise EtfZooError("Whitening needs at least two samples in training; make the batch larger.")
            mean = x.mean(dim=0)
            self._average(self.running_mean, mean)
        else:
            mean = self.running_mean.to(x.dtype)
        parts = (x - mean).split([count * size for count, size in self._groups], dim=1)
        return torch.cat([self._whiten_groups(i, part) for i, part in enumerate(parts)], dim=1)

    def _whiten_groups(self, i: int, x: Tensor) -> Tensor:
        """Centered `(N, count * size)` to the same, whitened in each group."""
        count, size = self._groups[i]
        running = self.get_buffer(f"running_whitening_{i}")
        grouped = x.view(len(x), count, size).transpose(0, 1)  # (count, N, size)
        if self.training:
            covariance = grouped.transpose(1, 2) @ grouped / len(x)
            covariance = covariance + self.eps * torch.eye(size, dtype=x.dtype, device=x.device)
            whitening = newton_whitening(covariance, self.iterations)
            self._average(running, whitening)
        else:
            whitening = running.to(x.dtype)
        return (grouped @ whitening).transpose(0, 1).reshape(len(x), count * size)

    def _average(self, running: Tensor, new: Tensor) -> None:
        running.lerp_(new.detach().to(running.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.num_features}, group_size={self.group_size}, iterations={self.iterations}, eps={self.eps}"


# Norms with a `normalized_shape`, most on the last dimension; nn.LayerNorm is the base of these too.
_CHANNELS_FIRST = (
    timm_norm.LayerNorm2d,
    timm_norm.LayerNorm2dFp32,
    timm_norm.LayerNormExp2d,
    timm_norm_act.LayerNormAct2d,
    timm_norm_act.LayerNormAct2dFp32,
    timm_norm.RmsNorm2d,
    timm_norm.RmsNorm2dFp32,
    timm_norm.SimpleNorm2d,
    timm_norm.SimpleNorm2dFp32,
)
_CHANNELS_LAST = (
    nn.LayerNorm,
    nn.RMSNorm,
    timm_norm.RmsNorm,
    timm_norm.RmsNormFp32,
    timm_norm.SimpleNorm,
    timm_norm.SimpleNormFp32,
)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, Whitening),
    *_CHANNELS_FIRST,
    *_CHANNELS_LAST,
)


def whiten_last_norm(model: nn.Module, *, name: str = "", **kwargs) -> str:
    """Put `Whitening` in the place of a backbone's last normalization, in place.

    A timm model remembers it, so that what is saved builds it again, once the model has a fixed-frame head.

    The last in the order of registration, norms of shortcuts and those inside a fixed-frame head apart. An activation
    that timm fuses into the norm stays behind it. The affine part starts as the old one.

    Args:
        model: Any timm model, twin or not, or any module.
        name: Name of the norm to replace, where the last one is not the one meant.
        **kwargs: For `Whitening`: `group_size`, `iterations`, `eps`, `momentum`, `affine`.

    Returns:
        Name of the norm that was replaced.

    Raises:
        ValueError: If there is no such norm, or on an argument that `Whitening` does not take.

    Example:
        >>> whiten_last_norm(timm.create_model("test_resnet"), group_size=16)
        'layer4.0.bn2'
    """
    if unknown := kwargs.keys() - set(WHITENING_ARGS):
        raise EtfZooError(f"whitening takes {', '.join(WHITENING_ARGS)}; not {', '.join(sorted(unknown))}.")
    asked = {"name": name, **kwargs} if name else kwargs
    norms = {key: module for key, module in model.named_modules() if isinstance(module, _NORMS)}
    heads = [key for key, module in model.named_modules() if isinstance(module, FrameClassifier)]
    if not name:
        last = [
            key
            for key in norms
            if not any(key.startswith(f"{head}.") for head in heads)
            and not any(part in ("downsample", "shortcut") for part in key.split("."))
        ]
        if not last:
            raise EtfZooError("The model has no normalization layer to replace; put a Whitening into it.")
        name = last[-1]
    elif name not in norms:
        raise EtfZooError(f"{name!r} is no normalization layer of the model. It has {', '.join(list(norms)[-5:])}.")
    old = norms[name]
    weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
    reference = weight if weight is not None else next(model.parameters())
    num_features = _channels(old)
    channels_last = isinstance(old, _CHANNELS_LAST) and not isinstance(old, _CHANNELS_FIRST)
    new = Whitening(num_features, channels_last=channels_last, device=reference.device, **kwargs).to(reference.dtype)
    with torch.no_grad():
        if new.weight is not None and weight is not None:
            new.weight.copy_(weight)
        if new.bias is not None and bias is not None:
            new.bias.copy_(bias)
    tail = [module for key in ("drop", "act") if isinstance(module := getattr(old, key, None), nn.Module)]
    replacement = nn.Sequential(new, *tail) if tail else new
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, replacement.train(old.training))
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        update_model_args(model, whitening=asked or True)
    return name


def _channels(norm: Any) -> int:
    if isinstance(norm, _CHANNELS_FIRST + _CHANNELS_LAST):
        return norm.normalized_shape[-1]
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
