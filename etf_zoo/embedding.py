r"""One embedding space for all models that share a frame.

A simplex ETF is :math:`W = \sqrt{K/(K-1)}\, H R^\top` with an orthonormal R that turns it into the features' space, see
`etf_zoo.frames.simplex_etf`. :math:`H^\top W x` undoes that turn: K - 1 numbers that mean the same for every model of
the same classes, whatever its width and orientation. So a gallery that one model has indexed can be searched by
another, as with the stationary classifiers of 2405.02581 and 2606.12488: at a loss, where the two were trained apart,
see the figures in `docs/later_classes.md`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import EtfZooError
from .frames.numerics import unit
from .frames.simplex import helmert_coordinates
from .layers.classifier import FrameClassifier
from .models.names import frame_heads

__all__ = ["Index", "Space", "embed", "frame_coordinates", "read_index", "space_of", "write_index"]

_FORMAT = "etf-zoo index 1"


@dataclass(frozen=True)
class Space:
    """What embeddings mean: two models can be compared if these agree.

    Attributes:
        frame: Hash: of the number of prototypes where they are a simplex, whose turn does not matter; else of all
            their numbers.
        classes: Names of the classes seen so far, in the order of the prototypes.
    """

    frame: str
    classes: list[str] = field(default_factory=list)

    def check(self, other: Space, what: str = "the model") -> None:
        """Raise EtfZooError unless embeddings of another space mean the same; classes may have been added to one."""
        if self.frame != other.frame:
            raise EtfZooError(
                f"The index was made with another frame than that of {what}: it takes models trained with the same "
                f"kind of frame for as many classes. Make it again with: etf-zoo embed FOLDER --model MODEL."
            )
        for ours, theirs in zip(self.classes, other.classes, strict=False):
            if ours != theirs:
                raise EtfZooError(
                    f"The index was made for other classes than those of {what}: {ours!r} has the place of {theirs!r}. "
                    f"Make it again with: etf-zoo embed FOLDER --model MODEL."
                )


def frame_coordinates(embeddings: Tensor, frame: Tensor) -> Tensor:
    """Unit vectors along H^T W x.

    Args:
        embeddings: x, `(N, dim)`.
        frame: W, `(K, dim)`.

    Returns:
        Float32 `(N, K - 1)`, on the CPU; a row of zeros for an embedding without a part in the frame's span.

    Raises:
        EtfZooError: If the widths differ.

    Example:
        >>> a, b = simplex_etf(5, 8, seed=0), simplex_etf(5, 16, seed=1)
        >>> torch.allclose(frame_coordinates(a, a), frame_coordinates(b, b), atol=1e-6)
        True
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != frame.shape[1]:
        raise EtfZooError(f"Embeddings {tuple(embeddings.shape)} do not fit a frame {tuple(frame.shape)}.")
    products = embeddings.detach().double().cpu() @ frame.detach().double().cpu().T
    return unit(helmert_coordinates(products.T).T).float()


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Unit embeddings of images in the frame's own coordinates.

    Args:
        model: A model with one fixed-frame head, in evaluation mode.
        images: `(N, 3, H, W)`, prepared as the model wants them.

    Returns:
        Float32 `(N, K - 1)`, on the CPU. K counts the prototypes, those in reserve too. Products of embeddings are
        cosines.

    Raises:
        EtfZooError: If the model has no frame, several, or one that is not stored; is training; or has a map of
            embeddings for each image.

    Example:
        >>> model = timm.create_model("mobilenetv3_small_100_etf", pretrained=True).eval()
        >>> embed(model, torch.randn(2, 3, 96, 96)).shape
        torch.Size([2, 199])
    """
    head = _head_of(model)
    if model.training:
        raise EtfZooError("The model is training, where an image's embedding depends on its batch: call model.eval().")
    seen: list[Tensor] = []
    with head.register_embedding_hook(lambda features, embeddings: seen.append(embeddings)):
        model(images)
    embeddings = seen[0].flatten(1, -2) if seen[0].ndim > 2 else seen[0]
    if embeddings.ndim > 2:
        if embeddings.shape[1] != 1:
            raise EtfZooError(f"The model has {embeddings.shape[1]} embeddings an image, not one.")
        embeddings = embeddings[:, 0]
    return frame_coordinates(embeddings, head.weight)


def space_of(model: nn.Module) -> Space:
    """What embeddings of a model mean.

    Raises:
        EtfZooError: See `embed`.
    """
    head = _head_of(model)
    frame = head.weight.detach().float().cpu()
    gram, k = frame.double() @ frame.double().T, len(frame)
    off = gram[~torch.eye(k, dtype=torch.bool)]
    if bool((off + 1 / (k - 1)).abs().max() < 1e-3):
        text = f"simplex of {k}".encode()
    else:
        text = repr(tuple(frame.shape)).encode() + frame.contiguous().numpy().tobytes()
    num_classes, names = head.num_classes, getattr(model, "pretrained_cfg", {}).get("label_names") or []
    if len(names) != num_classes:
        names = range(num_classes)
    return Space(hashlib.sha256(text).hexdigest(), [str(name) for name in names])


def _head_of(model: nn.Module) -> FrameClassifier:
    heads = list(frame_heads(model).values())
    if len(heads) != 1:
        raise EtfZooError(
            f"Embeddings take a model with one fixed-frame head; {type(model).__name__} has {len(heads) or 'none'}. "
            f"etf_zoo.attach_frame puts one on a model, etf-zoo finetune trains it."
        )
    if heads[0].implicit:
        raise EtfZooError("The frame is computed and not stored, for so many classes that it has no coordinates here.")
    return heads[0]


# --------------------------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class Index:
    """Embedded images.

    Attributes:
        embeddings: Unit rows `(N, K - 1)`.
        images: Their paths, or other names.
        space: What the embeddings mean.
        model: Name of the model that made them, for people.
    """

    embeddings: Tensor
    images: list[str]
    space: Space
    model: str = ""

    def search(self, queries: Tensor, top: int = 10) -> tuple[Tensor, Tensor]:
        """The images most like some queries.

        Args:
            queries: Unit rows `(Q, K - 1)`, of any model of the same space.
            top: How many images; all of a smaller index.

        Returns:
            Cosines, falling, and row numbers, both `(Q, top)`.
        """
        found = (queries @ self.embeddings.T).topk(min(top, len(self.images)), dim=1)
        return found.values, found.indices


def write_index(index: Index, file: str | Path) -> None:
    """Write an index as one safetensors file.

    Raises:
        EtfZooError: If there is nothing to write, or it cannot be written.
    """
    if not index.images:
        raise EtfZooError("There is no image to put into an index.")
    about = {
        "format": _FORMAT,
        "frame": index.space.frame,
        "classes": json.dumps(index.space.classes),
        "images": json.dumps(index.images),
        "model": index.model,
    }
    try:
        safetensors.torch.save_file({"embeddings": index.embeddings.contiguous()}, file, metadata=about)
    except (OSError, SafetensorError) as error:
        raise EtfZooError(f"The index {file} cannot be written: {error}.") from None


def read_index(file: str | Path) -> Index:
    """Read what `write_index` wrote.

    Raises:
        EtfZooError: If it is no index.
    """
    if not Path(file).is_file():
        raise EtfZooError(
            f"There is no index {file}. Make one with: etf-zoo embed FOLDER --model MODEL --output {file}."
        )
    try:
        with safe_open(file, "pt") as content:
            about = content.metadata() or {}
            if about.get("format") != _FORMAT:
                raise EtfZooError(f"{file} is no index of etf-zoo embed.")
            embeddings = content.get_tensor("embeddings")
        images, classes = _names(about["images"]), _names(about["classes"])
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, EtfZooError):
            raise
        raise EtfZooError(f"{file} cannot be read as an index: {error}.") from None
    if embeddings.ndim != 2 or len(embeddings) != len(images):
        raise EtfZooError(f"{file} is damaged: {len(images)} names for embeddings {tuple(embeddings.shape)}.")
    return Index(embeddings, images, Space(about["frame"], classes), about.get("model", ""))


def _names(text: str) -> list[str]:
    found: Sequence[object] = json.loads(text)
    return [str(name) for name in found]
