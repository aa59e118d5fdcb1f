"""Necks: small modules between the backbone's features and the frame.

A *linear* neck of width at least K - 1 in front of a frame can absorb any classifier: neck and frame together are
then a learned classifier by another name. So none is offered for training; `"linear"` is what softmax-preserving
conversion (`etf_zoo.models.convert`) writes, and `FrameClassifier` takes it with that conversion's frame only.
Features for transfer are always the backbone's, before any neck.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import EtfZooError
from ..frames.build import HELMERT

__all__ = [
    "LastDimBatchNorm",
    "mlp_neck",
    "ResidualNeck",
    "Center",
    "build_neck",
    "check_conversion",
    "NECKS",
    "PROJECTOR",
]

PROJECTOR = "projector"  # an MLP for pretraining: a model for other classes leaves it out
MLP_LAYERS = {"mlp": 1, "mlp2": 2, "mlp3": 3, PROJECTOR: 1}  # hidden layers
NECKS = (*MLP_LAYERS, "residual")


class LastDimBatchNorm(nn.Module):
    """Batch normalization over the last dimension of `(..., dim)`, statistics over all others.

    Args:
        dim: Number of features.
        affine: Whether to learn a scale and a shift.

    Example:
        >>> LastDimBatchNorm(8)(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
    """

    def __init__(self, dim: int, *, affine: bool = True, device=None):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim, affine=affine, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.flatten(0, -2)).view_as(x)


class _LastDimPReLU(nn.PReLU):
    """PReLU with a slope for each feature of `(..., dim)`; torch's own takes dimension 1 for the features."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2)).view_as(input)


def mlp_neck(
    in_features: int, out_features: int, *, hidden_features: int = 2048, layers: int = 1, device=None
) -> nn.Module:
    """Projector (Linear - BN - ReLU) - Linear, as 2112.00496 puts it before the classifier of supervised pretraining.

    With more hidden layers it moves the compromise between the source and other data, toward the latter (2206.15369).

    The neck of 2302.03004, also in front of a fixed frame, is another: three layers with layer norms and leaky ReLUs.

    Args:
        in_features: Width of the backbone's features.
        out_features: Width of the frame.
        hidden_features: Width between.
        layers: How often Linear - BN - ReLU comes before the last Linear.

    Returns:
        Module mapping `(..., in_features)` to `(..., out_features)`.

    Example:
        >>> mlp_neck(8, 16)(torch.randn(4, 8)).shape
        torch.Size([4, 16])
    """
    parts: list[nn.Module] = []
    for layer in range(layers):
        parts += [
            nn.Linear(hidden_features if layer else in_features, hidden_features, bias=False, device=device),
            LastDimBatchNorm(hidden_features, device=device),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*parts, nn.Linear(hidden_features, out_features, device=device))


class ResidualNeck(nn.Module):
    """Transformation head of 2303.05689: a linear change of width with batch norm, then two residual layers.

    A residual layer adds twice Linear - BN - PReLU, with a PReLU slope for each channel. In the published code the
    change of width is a 1x1 convolution before average pooling, which is the same map, and the width is K.

    Maps `(..., in_features)` to `(..., out_features)`; its output takes both signs, as a frame needs.

    Args:
        in_features: Width of the backbone's features.
        out_features: Width of the frame.

    Example:
        >>> ResidualNeck(8, 16)(torch.randn(4, 8)).shape
        torch.Size([4, 16])
    """

    def __init__(self, in_features: int, out_features: int, *, device=None):
        super().__init__()

        def linear_norm(width: int) -> list[nn.Module]:
            linear = nn.Linear(width, out_features, bias=False, device=device)
            return [linear, LastDimBatchNorm(out_features, device=device)]

        def layer() -> nn.Sequential:
            parts = [[*linear_norm(out_features), _LastDimPReLU(out_features, device=device)] for _ in range(2)]
            return nn.Sequential(*parts[0], *parts[1])

        self.stem = nn.Sequential(*linear_norm(in_features))
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Center(nn.Module):
    """Subtracts a stored mean from features `(..., dim)`; not trained, kept in float32 in files.

    Args:
        dim: Number of features.

    Example:
        >>> Center(2)(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    running_mean: Tensor

    def __init__(self, dim: int, *, device=None):
        super().__init__()
        self.out_features = dim
        self.register_buffer("running_mean", torch.zeros(dim, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean


def build_neck(
    name: str, in_features: int, num_classes: int, out_features: int | None = None, *, device=None
) -> tuple[nn.Module, int]:
    """Build the neck called `name`; its output is as wide as the features, or K - 1 where they are narrower.

    Beside `NECKS` there are `"linear"` (always K - 1 wide) and `"center"`, which conversion writes.

    Returns:
        The module and its output width.

    Raises:
        ValueError: On an unknown name.

    Example:
        >>> neck, width = build_neck("residual", 8, 20)
        >>> width
        19
    """
    out_features = max(in_features, num_classes - 1) if out_features is None else out_features
    if out_features < 1:
        raise EtfZooError(f"A neck's output has at least one feature, got {out_features}.")
    if name in MLP_LAYERS:
        return mlp_neck(in_features, out_features, layers=MLP_LAYERS[name], device=device), out_features
    if name == "residual":
        return ResidualNeck(in_features, out_features, device=device), out_features
    if name == "linear":
        return nn.Linear(in_features, num_classes - 1, device=device), num_classes - 1
    if name == "center":
        return Center(in_features, device=device), in_features
    raise EtfZooError(f"Unknown neck {name!r}. Choose one of {', '.join(NECKS)}, or None.")


def check_conversion(frame: str, neck: str | nn.Module | None, feature_norm: str) -> None:
    """Raise EtfZooError unless the Helmert frame and the linear neck come together, as conversion writes them."""
    linear = isinstance(neck, str) and neck == "linear"
    if linear and frame != HELMERT:
        raise EtfZooError(
            "A linear neck in front of a fixed frame is a learned classifier by another name. It is there for "
            f"converted classifiers only (frame={HELMERT!r}); use neck='mlp' or neck='residual'."
        )
    if frame == HELMERT and not (linear and feature_norm == "none"):
        raise EtfZooError(
            f"frame={HELMERT!r} is for converted classifiers and needs neck='linear' and feature_norm='none'. "
            f"To train with a simplex use frame='simplex' or 'auto'."
        )
