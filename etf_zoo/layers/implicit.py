"""Frames that are computed and not stored: products with the Helmert and the Kerdock frame, whole or by blocks.

A Kerdock frame is bases :math:`H \\mathrm{diag}(s) / \\sqrt d`, so the logits of 2d classes are one fast Walsh-Hadamard
transform of the feature times signs: with d = 4^s two products with a matrix as wide as sqrt(d), at the speed of the
matrix library. Beyond the logits nothing is formed but the d^2/2 sign bits.
"""

import math  # no `from __future__ import annotations` here: TorchScript cannot read the functions' as strings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..frames.kerdock import hadamard, unpack_signs

__all__ = [
    "Block",
    "frame_blocks",
    "helmert_product",
    "highest_classes",
    "into_core",
    "kerdock_product",
    "kerdock_sum",
    "kerdock_vectors",
]

# Logits that are held at once. On a CPU 1 MB in float32: as fast as any larger block, and a step stays below 15 MB.
# On an accelerator 64 MB, so that a step starts few kernels; not measured.
CPU_BLOCK_LOGITS, ACCELERATOR_BLOCK_LOGITS = 2**18, 2**24


def helmert_product(x: Tensor, scale: Tensor) -> Tensor:
    """scale * x W^T for the Helmert frame of K classes and x `(..., K-1)`, in O(K) and without the frame's matrix."""
    k = x.shape[-1] + 1
    j = torch.arange(1, k, device=x.device, dtype=x.dtype)
    x = x * (scale * math.sqrt(k / (k - 1)) / torch.sqrt(j * (j + 1)))
    sums = x.flip(-1).cumsum(-1).flip(-1)  # row i of the basis: 1 for each later column, -j in the one before
    return F.pad(sums, (0, 1)) - F.pad(j * x, (1, 0))


def into_core(x: Tensor, rotation: Tensor) -> Tensor:
    """Features `(..., dim)` in the power of four of dimensions that a Kerdock frame fills, `(..., d)`.

    Args:
        x: `(..., dim)`.
        rotation: Orthonormal rows `(d, dim)`; empty where the two are one.
    """
    return F.linear(x, rotation.to(x.dtype)) if rotation.numel() > 0 else x


def kerdock_product(x: Tensor, signs: Tensor, num_classes: int) -> Tensor:
    """x W^T for the Kerdock frame: all logits at once, `(..., d)` to `(..., num_classes)`.

    Args:
        x: `(..., d)`, d the power of four of the signs.
        signs: Of `kerdock_signs`.
        num_classes: K.
    """
    dim = x.shape[-1]
    side = int(math.sqrt(dim))
    bases = (num_classes + 2 * dim - 1) // (2 * dim)
    square = hadamard(side, x)
    turned = x.unsqueeze(-2) * (unpack_signs(signs[:bases], dim, x) / math.sqrt(dim))
    turned = torch.matmul(torch.matmul(square, turned.unflatten(-1, [side, side])), square).flatten(-2)
    if bases > signs.shape[0]:
        turned = torch.cat([turned, x.unsqueeze(-2) * unpack_signs(signs[:1], dim, x)], dim=-2)
    return torch.stack([turned, -turned], dim=-2).flatten(-3)[..., :num_classes]


def kerdock_vectors(classes: Tensor, signs: Tensor, like: Tensor) -> Tensor:
    """Rows of the Kerdock frame: class numbers `(B,)` to `(B, d)`, in the kind and width of `like` `(..., d)`."""
    dim = like.shape[-1]
    side = int(math.sqrt(dim))
    basis, row = classes // (2 * dim), classes % dim
    square = hadamard(side, like)
    vectors = (square[row // side].unsqueeze(2) * square[row % side].unsqueeze(1)).flatten(1) / math.sqrt(dim)
    identity = basis >= len(signs)
    vectors = torch.where(identity[:, None], F.one_hot(row, dim).to(like.dtype), vectors)
    vectors = vectors * unpack_signs(signs[torch.where(identity, 0, basis)], dim, like)
    return torch.where((classes % (2 * dim) >= dim)[:, None], -vectors, vectors)


def kerdock_sum(num_classes: int, signs: Tensor, like: Tensor) -> Tensor:
    """Sum of the frame's rows `(d,)`: whole bases cancel, vector by negative, so it is that of the last one's rest."""
    dim = like.shape[-1]
    rest = num_classes % (2 * dim)
    first, last = (0, rest) if rest <= dim else (rest - dim, dim)
    classes = torch.arange(first, last, device=signs.device) + num_classes - rest
    return kerdock_vectors(classes, signs, like).sum(dim=0)


@dataclass
class Block:
    """Logits of some classes, a class a row; each row may stand for a vector and its negative.

    Row `h * bases + j` is vector h of basis j: class `first + j * stride + h`, its negative `vectors` later.

    Attributes:
        logits: `(bases * vectors, B)`, of the vectors; of their negatives they are the negative.
        pull: Numbers, one for each logit, to the sum of the vectors times them, `(d, B)`.
        first: Class of the first row.
        bases: How many bases the rows belong to.
        vectors: How many vectors each basis has.
        mirrored: Whether the negatives are classes.
        count: How many classes there are; those beyond it are to be left out.
    """

    logits: Tensor
    pull: Callable[[Tensor], Tensor]
    first: int
    bases: int
    vectors: int
    mirrored: bool
    count: int

    @property
    def stride(self) -> int:
        """Classes of a basis."""
        return 2 * self.vectors if self.mirrored else self.vectors

    def leave_out(self, signed: list[Tensor], labels: Tensor | None, value: float) -> None:
        """Put a value, in place, where a class does not exist or is the label `(B,)` of its column.

        Args:
            signed: Figures `(bases * vectors, B)` of the vectors and, if mirrored, of their negatives.
            labels: Classes to leave out, one a column; none if None.
            value: What to put there.
        """
        if self.count < self.bases * self.stride:  # which only a block of one basis has
            for i, figures in enumerate(signed):
                figures[max(self.count - i * self.vectors, 0) :] = value
        if labels is None:
            return
        offset = labels - self.first
        inside = (offset >= 0) & (offset < self.bases * self.stride)
        within = offset % self.stride
        row = within % self.vectors * self.bases + (offset // self.stride).clamp(0, self.bases - 1)
        column = torch.arange(len(labels), device=labels.device)
        for i, figures in enumerate(signed):
            own = inside & (within // self.vectors == i)
            figures[row, column] = torch.where(own, value, figures[row, column])

    def classes(self) -> Tensor:
        """Class of each row, then of each row's negative if mirrored: `(rows,)` or `(2 * rows,)`."""
        row = torch.arange(self.bases * self.vectors, device=self.logits.device)
        own = self.first + row % self.bases * self.stride + row // self.bases
        return torch.cat([own, own + self.vectors]) if self.mirrored else own


def frame_blocks(
    x: Tensor, weight: Tensor, signs: Tensor, num_classes: int, block_logits: int | None = None
) -> Iterator[Block]:
    """All logits of a frame, a block at a time.

    Args:
        x: Embeddings `(B, d)`, already scaled.
        weight: The frame `(K, d)`, or `(K, 0)` for a Kerdock frame that is not stored.
        signs: Of `kerdock_signs`; not looked at where there is a matrix.
        num_classes: K.
        block_logits: How many logits a block may hold, by default what suits the device; it has at least one class, or
            one basis.

    Yields:
        Blocks in the order of their classes. What is done to one's logits in place disturbs no other.
    """
    if block_logits is None:
        block_logits = CPU_BLOCK_LOGITS if x.device.type == "cpu" else ACCELERATOR_BLOCK_LOGITS
    columns = x.T.contiguous()
    if weight.shape[1]:
        yield from _matrix_blocks(columns, weight, max(1, block_logits // len(x)))
    else:
        yield from _kerdock_blocks(columns, signs, num_classes, max(1, block_logits // x.numel()))


def _matrix_blocks(columns: Tensor, weight: Tensor, rows: int) -> Iterator[Block]:
    first = 0
    for part in weight.split(rows):
        part = part.to(columns.dtype)

        def pull(figures: Tensor, part: Tensor = part) -> Tensor:
            return part.T @ figures

        yield Block(part @ columns, pull, first, 1, len(part), False, len(part))
        first += len(part)


def _kerdock_blocks(columns: Tensor, signs: Tensor, num_classes: int, bases: int) -> Iterator[Block]:
    dim, batch = columns.shape
    square = hadamard(math.isqrt(dim), columns)

    def transform(figures: Tensor) -> Tensor:
        """Walsh-Hadamard transform of `(d, ...)`: H is the Kronecker product of the square with itself."""
        shape, side = figures.shape, len(square)
        figures = square @ figures.view(side, -1)
        return torch.bmm(square.expand(side, -1, -1), figures.view(side, side, -1)).view(shape)

    whole = min(num_classes // (2 * dim), len(signs))
    starts = [(start, min(bases, whole - start)) for start in range(0, whole, bases)]
    if num_classes > 2 * dim * whole:
        starts.append((whole, 1))  # a basis of which not all classes exist, or the identity
    for start, n in starts:
        first = 2 * dim * start
        count = min(2 * dim * n, num_classes - first)
        if start == len(signs):
            own = unpack_signs(signs[:1], dim, columns).T

            def pull(figures: Tensor, own: Tensor = own) -> Tensor:
                return figures.mul_(own)

            yield Block(columns * own, pull, first, 1, dim, True, count)
            continue
        own = unpack_signs(signs[start : start + n], dim, columns).div_(math.sqrt(dim)).T.contiguous()

        def pull(figures: Tensor, own: Tensor = own) -> Tensor:
            return transform(figures.view(dim, -1, batch)).mul_(own[:, :, None]).sum(dim=1)

        logits = transform(columns[:, None] * own[:, :, None]).view(-1, batch)
        yield Block(logits, pull, first, n, dim, True, count)


def highest_classes(x: Tensor, weight: Tensor, signs: Tensor, num_classes: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their classes, both `(B, k)`; see `frame_blocks` for the arguments."""
    logits, classes = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for block in frame_blocks(x, weight, signs, num_classes):
        signed = [block.logits, -block.logits] if block.mirrored else [block.logits]
        block.leave_out(signed, None, -math.inf)
        found, rows = torch.cat(signed).T.topk(min(k, len(signed) * len(block.logits)), dim=1)
        logits, classes = torch.cat([logits, found], dim=1), torch.cat([classes, block.classes()[rows]], dim=1)
        logits, kept = logits.topk(min(k, logits.shape[1]), dim=1)
        classes = classes.gather(1, kept)
    return logits, classes
