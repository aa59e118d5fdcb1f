"""What is frozen is computed once: the inputs of the first tuned layer, stored, in the place of images.

`head`, `layer` and `scl` leave most of a backbone as it is. `store_inputs` runs that part over a split and keeps what
the first tuned layer gets; `replayed` lets the model train on it. The layers before it then see a single blank image,
which costs next to nothing.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etf_zoo.errors import EtfZooError, StorageError

from ..data.augment import colors_of
from ..data.batches import view_batches
from ..data.places import cache_root
from ..data.stored import StoredInputs
from ..data.subsets import Images
from ..recipe.config import final_size
from ..run.launching import make_accelerator

__all__ = ["frozen_once", "layer_input", "replayed", "store_inputs"]


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
                _check_room(file, 2 * math.prod(shape))
                stored = np.lib.format.open_memmap(file, "w+", dtype=np.float16, shape=shape)
            stored[view, row : row + len(inputs)] = inputs.numpy()
            row += len(inputs)
        if row != count:
            raise EtfZooError(f"{count - row} of {count} images cannot be read: remove them, or {_WAY_OUT}")
    if stored is None:
        raise EtfZooError("There are no images to compute the frozen layers for.")
    return stored


def _check_room(file: Path, size: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if size > 0.9 * free:  # a full disk would end the process at some later write
        raise StorageError(
            f"The frozen layers' output takes {size / 1e9:.1f} GB, {file.parent} has {free / 1e9:.1f}. Lower "
            f"--cache_views, set ETF_ZOO_CACHE to a folder with room, or {_WAY_OUT}"
        )


@contextmanager
def frozen_once(settings: Any, model: nn.Module, layer: str, splits: Sequence[Images]) -> Iterator[list[StoredInputs]]:
    """Compute what comes before a layer once, and let the model train on that while the context lasts.

    Args:
        settings: A `Finetune` recipe: size, augmentation, batch size, seed, and `cache_views` of each image of the
            first split, the evaluation view among them; the other splits have that alone.
        model: The model, whose layers before `layer` are frozen.
        layer: Name of the first layer that is tuned.
        splits: The training images, then those to watch.

    Yields:
        The splits with stored inputs in the place of images; they are gone at the end.

    Raises:
        EtfZooError: See `store_inputs` and `replayed`.
    """
    size, colors, device = final_size(settings), colors_of(model), make_accelerator(settings.precision).device
    training = model.training
    model.to(device).eval()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=cache_root(), prefix="frozen-")))
        stored = []
        for number, split in enumerate(splits):
            read = partial(view_batches, split, settings.augment, size=size, batch_size=settings.batch_size)
            read = partial(read, seed=settings.seed, colors=colors, device=device)
            batches = [read(view=view) for view in range(1 if number else settings.cache_views)]
            inputs = store_inputs(model, layer, batches, len(split), folder / f"{number}.npy")
            stored.append(StoredInputs(split, inputs))
        some = next(read(view=0))  # of the last split, to check by
        stack.enter_context(replayed(model, layer, some[:8]))
        model.train(training)
        yield stored


class _Replay:
    """The two hooks of `replayed`, which copies of the model (an average of its weights) share."""

    def __init__(self, image_shape: torch.Size):
        self.image_shape = image_shape
        self.inputs: Tensor | None = None
        self.ended = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Replay:
        return self

    def take(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.ended:
            return args
        self.inputs = args[0]
        return (args[0].new_zeros(1, *self.image_shape), *args[1:])

    def put(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs, self.inputs = self.inputs, None
        return args if inputs is None else (inputs, *args[1:])


@contextmanager
def replayed(model: nn.Module, layer: str, images: Tensor) -> Iterator[None]:
    """While the context lasts, a model takes the stored inputs of one of its layers in the place of images.

    Args:
        model: The model; changed in place, and back.
        layer: Name of the layer.
        images: Some images `(B, 3, H, W)`, B at least 2, to check that the model gives the same either way.

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
    training = model.training
    model.eval()
    with torch.no_grad():
        wanted, inputs = model(images), layer_input(model, layer, images)
    replay = _Replay(images.shape[1:])
    hooks = [
        model.get_submodule(_first_module(model, images)).register_forward_pre_hook(replay.take),
        model.get_submodule(layer).register_forward_pre_hook(replay.put),
    ]
    try:
        try:
            with torch.no_grad():
                found = model(inputs)
            same = found.shape == wanted.shape and torch.allclose(
                found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std())
            )
        except RuntimeError:  # shapes that do not go together
            same = False
        if not same:
            raise EtfZooError(
                f"{type(model).__name__} uses its images in more than the layer {layer!r}, so what comes before it "
                f"cannot be stored: {_WAY_OUT}"
            )
        model.train(training)
        yield
    finally:
        replay.ended = True
        for hook in hooks:
            hook.remove()


def _first_module(model: nn.Module, images: Tensor) -> str:
    """Name of the first submodule that gets the images themselves."""

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and inputs[0] is images:
                raise _Reached(name)

        return hook

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    except _Reached as reached:
        return reached.value
    finally:
        for hook in hooks:
            hook.remove()
    raise EtfZooError(f"No layer of {type(model).__name__} gets the images as they are: {_WAY_OUT}")
