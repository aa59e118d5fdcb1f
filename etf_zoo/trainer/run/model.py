"""The recipe's model and optimizer, and where its `model` is: a name, an id, or a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from etf_zoo import FrameClassifier, attach_frame, frame_heads
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import spherical_code
from etf_zoo.frames.build import OF_A_TREE
from etf_zoo.layers.cosine import LearnedCosineClassifier, learn_prototypes
from etf_zoo.layers.logit_scale import smoothed_probability
from etf_zoo.layers.necks import build_neck
from etf_zoo.models import find as models
from etf_zoo.models.create import create_plain, whiten
from etf_zoo.models.find import Source
from etf_zoo.models.head_config import split_head_args
from etf_zoo.models.names import SKIP_CONNECTION, base_name, leaf_of, split_head, timm_classifier_names

from ..recipe.config import Optim, Recipe
from .batched_muon import batch_muon
from .earlier_stage import add_stage_head
from .imbalance import COUNTED, DECAYS, attach_counted_frame

__all__ = ["LEARNED_HEADS", "Source", "find_model", "fit_scales", "make_model", "make_optimizer"]

LEARNED_HEADS = ("learned", "warm_learned")  # a linear layer of the backbone's own


def find_model(model: str, pretrained: bool = True) -> Source:
    """A model to start a training from, see `etf_zoo.models.find.find_model`.

    Raises:
        EtfZooError: If there is no such model, or it has a skip connection.
    """
    source = models.find_model(model, pretrained)
    if source.architecture == SKIP_CONNECTION:
        raise EtfZooError(
            f"{model} has a skip connection from an earlier tuning: start from the model that it came from."
        )
    return source


def make_model(
    recipe: Recipe, num_classes: int, hierarchy: Tensor | None = None, class_counts: Sequence[int] = ()
) -> nn.Module:
    """The recipe's model and head; the seed gives a twin and its controls the same backbone.

    Args:
        recipe: The recipe.
        num_classes: Number of classes K.
        hierarchy: Distances between the classes `(K, K)`, for `frame: hierarchy` and `frame: subspaces`.
        class_counts: Training images of each class, for `frame: imbalanced` and `frame: seli`; empty if not known.

    Raises:
        ValueError: If there is no such model, or it does not take its `model_args`.
    """
    try:
        model = _make_model(recipe, num_classes, hierarchy, class_counts)
        if recipe.loss.stage_weight:
            add_stage_head(model, recipe, num_classes)
        brought: Any = model.pretrained_cfg  # weights for these very classes bring the scale with the frame
        if not (recipe.pretrained and brought.get("num_classes") == num_classes and find_model(recipe.model).is_twin):
            fit_scales(model, recipe)
        return model
    except EtfZooError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not recipe.model_args or isinstance(error, torch.OutOfMemoryError):
            raise
        raise EtfZooError(f"{recipe.model} cannot be made with model_args {recipe.model_args}: {error}.") from error


def fit_scales(model: nn.Module, recipe: Recipe) -> None:
    """Solve the scales of heads that leave it open for what the recipe's label smoothing asks for, in place."""
    if recipe.loss.name != "cross_entropy":  # the others know no smoothing
        return
    for head in frame_heads(model).values():
        head.probability = smoothed_probability(head.num_classes, recipe.label_smoothing)
        head.reset_scale()


def _make_model(recipe: Recipe, num_classes: int, hierarchy: Tensor | None, class_counts: Sequence[int]) -> nn.Module:
    if recipe.head == "learned_cosine":
        args = {key: value for key, value in recipe.model_args.items() if key != "moving"}
        frame = dataclasses.replace(recipe, head="frame", model_args=args)
        return learn_prototypes(_make_model(frame, num_classes, hierarchy, class_counts))
    set_seed(recipe.seed)
    source = find_model(recipe.model, recipe.pretrained)
    if recipe.pretrained:
        models.check_weights(source)
    args: dict[str, Any] = {"pretrained": recipe.pretrained, "num_classes": num_classes, **recipe.model_args}
    if args.get("frame") in OF_A_TREE:
        args.setdefault("hierarchy", hierarchy)
    if recipe.head == "random":  # which knows no tree, and stays where it is; each seed draws another
        kept = {k: v for k, v in args.items() if k not in ("hierarchy", "gamma", "moving", "subspaces", "lengths")}
        head_args, args = split_head_args(kept)
        args |= {"seed": recipe.seed, **head_args, "frame": "random"}
    learned = recipe.head in LEARNED_HEADS
    if args.get("frame") == "spherical_code" and not learned:
        return _with_spherical_code(recipe, args)
    if args.get("frame") in COUNTED and not learned:
        return _with_counted_frame(recipe, args, class_counts)
    if not learned and source.is_twin:
        return timm.create_model(source.name, **args)
    whitening = args.pop("whitening", False)
    head_args, args = split_head_args(args)
    neck, width = head_args.get("neck"), head_args.get("neck_features")
    plain = _plain_model(source, args) if learned else create_plain(source.name, **args)
    whiten(plain, whitening)
    if not learned:
        return attach_frame(plain, **head_args)
    if neck not in (None, "none"):
        _put_neck(plain, neck, width)
    return plain


def _with_spherical_code(recipe: Recipe, args: dict[str, Any]) -> nn.Module:
    """The model with the frame that its quick code is a start for: only with the model is its width known."""
    quick = dataclasses.replace(recipe, model_args={**recipe.model_args, "frame": "code"})
    model = make_model(quick, args["num_classes"])
    shapes = {tuple(head.weight.shape) for head in frame_heads(model).values()}
    if len(shapes) > 1:
        raise EtfZooError(f"frame: spherical_code is for heads of one width; {quick.model} has several.")
    head_args = {key: value for key, value in split_head_args(args)[0].items() if key != "orientation"}
    code = spherical_code(*shapes.pop(), seed=head_args.get("seed", 0))
    return attach_frame(model, **{**head_args, "frame": code})


def _with_counted_frame(recipe: Recipe, args: dict[str, Any], class_counts: Sequence[int]) -> nn.Module:
    """The model with a frame that the class counts ask for: only with the model is its width known."""
    plain_args = {k: v for k, v in recipe.model_args.items() if k not in DECAYS}
    model = make_model(dataclasses.replace(recipe, model_args={**plain_args, "frame": "auto"}), args["num_classes"])
    return attach_counted_frame(model, args["frame"], class_counts, args, recipe.optim.weight_decay)


def _plain_model(source: Source, args: dict[str, Any]) -> nn.Module:
    """The backbone with timm's own learned classifier: zeros, unless pretrained weights bring one for these classes.

    timm's random ones are so large for some architectures that fine-tuning on few images ends where they began.
    """
    if not source.is_twin:
        model = create_plain(source.name, **args)
        if not args["pretrained"] or model.pretrained_cfg.get("num_classes") != args["num_classes"]:
            _zero_classifiers(model)
        return model
    base = base_name(source.architecture)
    plain: Any = timm.create_model(base, **{**args, "pretrained": False})
    if args["pretrained"]:
        twin: Any = timm.create_model(source.name, **args)
        names = list(frame_heads(twin))
        whiten(plain, getattr(twin, "_model_args", {}).get("whitening", False))
        missing, unexpected = plain.load_state_dict(split_head(twin.state_dict(), names)[0], strict=False)
        if unexpected or any(not key.startswith(tuple(f"{name}." for name in names)) for key in missing):
            raise RuntimeError(f"{source.architecture} and {base} differ in more than the head: {missing}.")
        plain.pretrained_cfg = {**twin.pretrained_cfg, "architecture": base}
    _zero_classifiers(plain)
    return plain


def _zero_classifiers(model: nn.Module) -> None:
    for name in timm_classifier_names(model):
        if (leaf := leaf_of(model, name)) is not None:
            _zero(leaf)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def make_optimizer(settings: Optim, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, by timm's factory; weight decay and layer decay by timm's groups.

    Muon leaves a learned output layer to its AdamW, as its author advises; else a model with a frame, which has none,
    would be compared with one trained in another way. The matrices of a neck are hidden ones, and Muon's.
    """
    extra: dict[str, Any] = {"betas": tuple(settings.betas)} if settings.betas else {}
    if "muon" in settings.name:
        extra["fallback_list"] = _output_layers(model)
    optimizer = create_optimizer_v2(
        model,
        opt=settings.name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        **extra,
    )
    return batch_muon(optimizer)


def _output_layers(model: nn.Module) -> list[str]:
    """Patterns of the parameters whose layers give the logits: the last layer of each classifier that is no frame."""
    patterns = []
    for name in timm_classifier_names(model):
        classifier = model.get_submodule(name)
        if isinstance(classifier, FrameClassifier):  # whose prototypes, where learned, are parameters of its own
            patterns += [f"{name}.prototypes"] if isinstance(classifier, LearnedCosineClassifier) else []
            continue
        inner = [n for n, m in classifier.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        patterns += [f"{name}.{inner[-1]}".rstrip(".") + ".*"] if inner else []
    return patterns


def _put_neck(model: nn.Module, neck: str, width: int | None) -> None:
    """Put a neck in front of a learned linear classifier, in place: the control of a frame behind the same neck."""
    name = model.pretrained_cfg.get("classifier")  # type: ignore[union-attr]
    leaf = model.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(leaf, nn.Linear):
        raise EtfZooError(f"A learned head behind a neck needs a model with one linear classifier, not {name}.")
    module, width = build_neck(neck, leaf.in_features, leaf.out_features, width)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Sequential(module, _zero(nn.Linear(width, leaf.out_features))))
