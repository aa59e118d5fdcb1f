"""What fine-tuning changes: the head the model starts with, and which of its parameters train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from etf_zoo import add_skip, attach_frame, frame_heads
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import nearest_simplex_etf
from etf_zoo.models.head_config import split_head_args
from etf_zoo.models.mixing import become
from etf_zoo.models.names import timm_classifier_names

from .probes import class_means, copy_linear, fit_probe, linear_classifier

__all__ = [
    "METHODS",
    "blocks",
    "first_tuned",
    "fresh_neck",
    "has_neck",
    "pick_layer",
    "prepare",
    "tuned_share",
    "warm_frame",
    "warm_head",
    "warm_learned_head",
]

METHODS = ("full", "head", "layer", "scl")
LAYER_SHARE = 0.1  # the layer that is tuned by default has at most so much of the parameters


class _PartlyFrozen(nn.Module):
    """Mixed into a model's class: frozen modules stay in evaluation mode, with their batch statistics."""

    _frozen: tuple[str, ...]

    def train(self, mode: bool = True):
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self


def blocks(model: nn.Module) -> dict[str, float]:
    """Blocks of a backbone, from the image on: name -> share of the model's parameters.

    They are timm's own groups for layer-wise learning rates, as far as they are a module.
    """
    if not hasattr(model, "group_matcher"):
        return {}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total, heads, found = sum(sizes.values()), timm_classifier_names(model), {}
    for names in group_parameters(model, model.group_matcher(coarse=False)).values():  # type: ignore[operator]
        prefix = _common_module(names)
        if prefix and not _below(prefix, heads) and not _above(prefix, heads):
            found[prefix] = sum(size for name, size in sizes.items() if _below(name, (prefix,))) / total
    return found


def _common_module(parameters: list[str]) -> str:
    """The innermost module that holds all these parameters; empty for the model itself."""
    common = parameters[0].split(".")[:-1]
    while common and not _below_all(parameters, ".".join(common)):
        common.pop()
    return ".".join(common)


def _below_all(names: list[str], parent: str) -> bool:
    return all(_below(name, (parent,)) for name in names)


def pick_layer(model: nn.Module, layer: str = "") -> str:
    """Name of the layer to tune: the one asked for, or the last block with at most a tenth of the parameters.

    Raises:
        ValueError: If there is no such layer, or no such block.
    """
    known = blocks(model)
    if layer:
        if layer not in dict(model.named_modules()) or not any(True for _ in model.get_submodule(layer).parameters()):
            raise EtfZooError(
                f"{type(model).__name__} has no layer {layer!r} with parameters. Its blocks: {', '.join(known)}."
            )
        return layer
    small = [name for name, share in known.items() if share <= LAYER_SHARE]
    if not small:
        raise EtfZooError(
            f"{type(model).__name__} has no block with a tenth of the parameters or less: name a --layer."
        )
    return small[-1]


def first_tuned(model: nn.Module, method: str, layer: str = "") -> str:
    """Name of the first layer that a method tunes, see `prepare`; all before it is frozen."""
    return timm_classifier_names(model)[0] if method == "head" else pick_layer(model, layer)


def prepare(model: nn.Module, method: str, layer: str = "", freeze_bn: bool = False) -> nn.Module:
    """Make a model ready for a method, in place: skip connection, frozen parameters, frozen batch statistics.

    Args:
        model: A timm model with its new head.
        method: `full`: everything trains. `head`: the head alone. `layer`: one block and the head. `scl`: the same,
            with a skip connection from that block to the penultimate feature, see `etf_zoo.models.skip`.
        layer: Name of the block; by default see `pick_layer`.
        freeze_bn: Whether what trains keeps its batch statistics, too, but for a neck of the head.

    Returns:
        The same model.

    Raises:
        ValueError: On an unknown method or layer, or if nothing would train.
    """
    if method not in METHODS:
        raise EtfZooError(f"Unknown method {method!r}. Choose one of {', '.join(METHODS)}.")
    tuned = timm_classifier_names(model)
    norms = [n for n, m in model.named_modules() if freeze_bn and isinstance(m, _BatchNorm) and not _below(n, tuned)]
    if method == "full":
        return _freeze(model, norms) if norms else model
    if method != "head":
        layer = pick_layer(model, layer)
        tuned += (layer,)
        if method == "scl":
            add_skip(model, layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_below(name, tuned))
    if not any(p.requires_grad for p in model.parameters()):
        raise EtfZooError(
            "Nothing would train: a fixed frame on a frozen backbone has no parameter. Give the head a neck "
            "(--model_args.neck mlp), take --head learned, or another method (ncm, layer, scl, full)."
        )
    outside = [n for n, m in model.named_modules() if n and not _below(n, tuned) and not _above(n, tuned)]
    return _freeze(model, [*outside, *norms])


def _freeze(model: nn.Module, modules: Iterable[str]) -> nn.Module:
    become(model, _PartlyFrozen)
    model._frozen = tuple(modules)  # type: ignore[assignment]
    return model


def _below(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _above(name: str, children: Iterable[str]) -> bool:
    return any(child.startswith(f"{name}.") for child in children)


def tuned_share(model: nn.Module) -> tuple[int, int]:
    """Parameters that train, and all; the numbers of a fixed frame are none."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def has_neck(model: nn.Module) -> bool:
    """Whether a neck stands between a model's features and its frame.

    Example:
        >>> has_neck(timm.create_model("test_resnet_etf", neck="mlp"))
        True
    """
    return any(head.neck is not None for head in frame_heads(model).values())


def fresh_neck(model: Any, asked: bool) -> str:
    """A sentence on a neck that the weights brought and that is built anew, as it was for other classes; else empty.

    Args:
        model: As it was created for the classes at hand.
        asked: Whether the recipe names the neck.

    Example:
        >>> fresh_neck(timm.create_model("test_resnet_etf", num_classes=5), asked=False)
        ''
    """
    if asked or not has_neck(model) or model.pretrained_cfg.get("num_classes") == model.num_classes:
        return ""
    return (
        "The neck of the weights was for other classes: a fresh one stands before the frame. Its features were before "
        "the neck; --model_args.neck none leaves it out."
    )


def warm_frame(features: Tensor, labels: Tensor, names: list[str]) -> Tensor:
    """The simplex ETF nearest to the class means of unit features, `(K, d)`: a head that knows the classes at once.

    Means of features that are mostly positive have a large part in common, which would favor the classes whose
    prototypes happen to point along it. So the ETF is sought orthogonal to the global mean, where K <= d leaves room.

    Args:
        features: Of the frozen backbone, `(N, d)`.
        labels: `(N,)`.
        names: Of the K classes.

    Raises:
        ValueError: If a class has no image, or K > d + 1: no simplex fits.
    """
    means = class_means(F.normalize(features, dim=1), labels, names)
    common = F.normalize(means.mean(0), dim=0)
    means = means - means.mean(0)
    if len(names) <= features.shape[1]:
        means = means - (means @ common)[:, None] * common
    return nearest_simplex_etf(means)


def warm_head(model: nn.Module, features: Tensor, labels: Tensor, names: list[str], head_args: dict[str, Any]) -> None:
    """Put `warm_frame` on a model, in place.

    Raises:
        ValueError: As `warm_frame`, or if the head has a neck: behind it the class means say nothing.
    """
    if has_neck(model):
        raise EtfZooError("A warm frame meets the backbone's features themselves: take the neck out, or --head frame.")
    kept = {k: v for k, v in split_head_args(head_args)[0].items() if k not in ("frame", "orientation", "seed")}
    attach_frame(model, len(names), frame=warm_frame(features, labels, names), **kept)


def warm_learned_head(
    model: nn.Module, features: Tensor, labels: Tensor, names: list[str], *, seed: int = 0, strength: float = 0.0
) -> str:
    """Put the linear probe of the frozen features into a model's learned classifier, in place (LP-FT, 2202.10054).

    Args:
        model: A timm model.
        features: Of its frozen backbone, `(N, d)`.
        labels: `(N,)`.
        names: Of the K classes.
        seed: See `fit_probe`.
        strength: See `fit_probe`.

    Returns:
        What was chosen, for people.

    Raises:
        EtfZooError: As `fit_probe`, or if no single linear layer stands behind the features.
    """
    layer = linear_classifier(model)
    if layer is None:
        raise EtfZooError(
            f"{type(model).__name__} has more than one linear layer behind its features: a linear probe has no place "
            "in it. Take --head learned, or --head warm."
        )
    probe = fit_probe("linear_probe", features, labels, names, seed=seed, strength=strength)
    copy_linear(probe, layer)
    return probe.chosen
