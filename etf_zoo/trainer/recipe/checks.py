"""What only torch, timm and the losses can tell of a recipe: whether there is such an optimizer, whether a loss takes
its arguments. Imported when a recipe is made, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

from etf_zoo import losses
from etf_zoo.errors import EtfZooError

if TYPE_CHECKING:
    from .config import Loss, Optim

__all__ = ["check_loss", "check_optimizer"]

_REFUSALS = (AssertionError, AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)


def check_optimizer(settings: Optim) -> None:
    """Make the optimizer for one small parameter.

    Raises:
        EtfZooError: If timm has no such optimizer, it takes other betas, or it refuses its settings.
    """
    name = settings.name.lower().removeprefix("lookahead_")
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, [str(known) for known in list_optimizers()], n=3) or [
            "sgd",
            "adamw",
            "muon",
        ]
        raise EtfZooError(
            f"optim.name takes an optimizer of timm.optim.list_optimizers(), such as {', '.join(near)}, got "
            f"{settings.name!r}."
        )
    info = get_optimizer_info(name)
    if info.second_order:
        raise EtfZooError(f"optim.name takes an optimizer of first order, got {settings.name!r}.")
    wanted = (info.num_betas or 2) if info.has_betas else 0
    if settings.betas and len(settings.betas) != wanted:
        raise EtfZooError(
            f"optim.betas takes {wanted or 'no'} numbers for {settings.name}, or [] for its own, got {settings.betas}."
        )
    betas: dict[str, Any] = {"betas": tuple(settings.betas)} if settings.betas else {}
    try:
        create_optimizer_v2(
            [torch.nn.Parameter(torch.zeros(2, 2))],
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            **betas,
        )
    except _REFUSALS as error:
        raise EtfZooError(f"optim.name {settings.name} cannot be used with these settings: {error}.") from error


def check_loss(settings: Loss) -> None:
    """Make the loss and the penalty.

    Raises:
        EtfZooError: If there is no such loss, or it does not take its arguments.
    """
    if settings.name not in ("cross_entropy", *losses.LOSSES):
        raise EtfZooError(f"loss.name takes one of cross_entropy, {', '.join(losses.LOSSES)}, got {settings.name!r}.")
    made = [("args", losses.LOSSES.get(settings.name), settings.args)]
    made += [("penalty_args", losses.VarianceCovarianceLoss, settings.penalty_args)]
    for field, kind, args in made:
        try:
            if kind is not None:
                kind(**args)
        except EtfZooError as error:
            raise EtfZooError(f"loss.{field}: {error}") from error
        except _REFUSALS as error:
            raise EtfZooError(f"loss.{field} of {settings.name}: {error}.") from error
