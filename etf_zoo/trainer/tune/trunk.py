"""What is frozen is computed once: the inputs of the first tuned layer, stored, in the place of images.

`head`, `layer` and `scl` leave most of a backbone as it is. `store_inputs` runs that part over a split and keeps what
the first tuned layer gets; `replayed` lets the model train on it. The layers before it then see a single blank image,
which costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etf_zoo.errors import EtfZooError

__all__ = ["layer_input", "replayed", "store_inputs"]


class _Reached(Exception):
    """Ends a forward pass where a layer is reached, with what it got."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


def _stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise _Reached(inputs[0])


@torch.no_grad()
def layer_input(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What a layer of a model gets for some images, without computing what comes after.

    Args:
        model: A model in evaluation mode, at least up to the layer.
        layer: Name of the layer.
        images: `(B, 3, H, W)`.

    Returns:
        `(B, ...)`.

    Raises:
        EtfZooError: If the layer gets no tensor with one row an image.
    """
    with model.get_submodule(layer).register_forward_pre_hook(_stop):
        try:
            model(images)
        except _Reached as reached:
            if isinstance(reached.value, Tensor) and len(reached.value) == len(images):
                return reached.value
    raise EtfZooError(f"The layer {layer!r} of {type(model).__name__} gets no tensor that could be stored: {_WAY_OUT}")


_WAY_OUT = "set --cache_views 0 to run the frozen layers in every step."


def store_inputs(model: nn.Module, layer: str, views: Iterable[Iterable[Tensor]], count: int, file: Path) -> np.memmap:
    """Store what a layer gets for every image of a split, once for each of its views.

    Args:
        model: As for `layer_input`.
        layer: Name of the layer.
        views: For each view, batches of images `(B, 3, H, W)` in the order of the split.
        count: Images of the split.
        file: Where to; the numbers go through memory that the system gives back as it needs.

    Returns:
        Float16 `(views, count, ...)`.

    Raises:
        EtfZooError: See `layer_input`; on a number too large for float16, or fewer images than stated.
    """
    views, stored = list(views), None
    for view, batches in enumerate(views):
        row = 0
        for images in batches:
            inputs = layer_input(model, layer, images).to(torch.float16).cpu()
            if not inputs.isfinite().all():
                raise EtfZooError(f"The inputs of {layer!r} do not fit float16: {_WAY_OUT}")
            if stored is None:
                shape = (len(views), count, *inputs.shape[1:])
                stored = np.lib.format.open_memmap(file, "w+", dtype=np.float16, shape=shape)
            stored[view, row : row + len(inputs)] = inputs.numpy()
            row += len(inputs)
        if row != count:
            raise EtfZooError(f"{count - row} of {count} images cannot be read: remove them, or {_WAY_OUT}")
    if stored is None:
        raise EtfZooError("There are no images to compute the frozen layers for.")
    return stored


class _Replay:
    """The two hooks of `replayed`, in a form that a copy of the model (an average of its weights) takes along."""

    def __init__(self, image_shape: tuple[int, int, int]):
        self.image_shape = image_shape
        self.inputs: Tensor | None = None

    def take(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.inputs = args[0]
        return (args[0].new_zeros(1, *self.image_shape), *args[1:])

    def put(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs, self.inputs = self.inputs, None
        if inputs is None:
            raise EtfZooError(
                f"{type(module).__name__} is called twice in one pass, so it cannot be replayed: {_WAY_OUT}"
            )
        return (inputs, *args[1:])


@contextmanager
def replayed(model: nn.Module, layer: str, images: Tensor) -> Iterator[None]:
    """While the context lasts, a model takes the stored inputs of one of its layers in the place of images.

    Args:
        model: The model; changed in place, and back.
        layer: Name of the layer.
        images: Some images `(B, 3, H, W)`, to check that the model gives the same either way.

    Raises:
        EtfZooError: If it does not: something else than the layer sees the images too.

    Example:
        >>> model = timm.create_model("resnet18", num_classes=5).eval()
        >>> images = torch.randn(2, 3, 64, 64)
        >>> stored = layer_input(model, "layer4", images)
        >>> with replayed(model, "layer4", images):
        ...     logits = model(stored)
        >>> torch.allclose(logits, model(images), atol=1e-5)
        True
    """
    replay = _Replay(tuple(images.shape[1:]))  # type: ignore[arg-type]  # a shape of four numbers, less the first
    training = model.training
    model.eval()
    with torch.no_grad():
        wanted, inputs = model(images), layer_input(model, layer, images)
    hooks = [
        model.register_forward_pre_hook(replay.take),
        model.get_submodule(layer).register_forward_pre_hook(replay.put),
    ]
    try:
        with torch.no_grad():
            found = model(inputs)
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * wanted.std().item()):
            raise EtfZooError(
                f"{type(model).__name__} uses its images in more than the layer {layer!r}, so what comes before it "
                f"cannot be stored: {_WAY_OUT}"
            )
        model.train(training)
        yield
    finally:
        for hook in hooks:
            hook.remove()
