r"""Kerdock frames: up to d(d + 2) unit vectors in d = 4^s dimensions, and nothing stored but d^2 / 2 bits.

With m = log2 d, a coordinate is a pair (x, x0) of a field element x of GF(2^(m-1)) and a bit x0. Each a of the field
has a quadratic form :math:`Q_a(x, x_0) = \sum_{i=1}^{(m-2)/2} \mathrm{Tr}\,(ax)^{2^i+1} + x_0\,\mathrm{Tr}(ax)`, and
the sum of any two of them has full rank. So with H the Hadamard matrix :math:`H\,\mathrm{diag}((-1)^{Q_a})/\sqrt d` and
the identity are d/2 + 1 orthonormal bases, and vectors of two of them have cosine exactly :math:`\pm 1/\sqrt d`: the
smallest coherence that so many lines can have (Levenshtein's bound).

Sources: A. M. Kerdock, A class of low-rate nonlinear binary codes, Information and Control 20 (1972), pages 182 to 187;
A. R. Calderbank, P. J. Cameron, W. M. Kantor, J. J. Seidel, Z4-Kerdock codes, orthogonal spreads, and extremal
Euclidean line-sets, Proceedings of the London Mathematical Society 75 (1997), pages 436 to 480.
"""

import math  # no `from __future__ import annotations` here: TorchScript cannot read the functions' as strings

import torch
from torch import Tensor

from ..errors import EtfZooError
from .numerics import seeded
from .simplex import check_sizes, haar_columns

__all__ = [
    "check_kerdock_fits",
    "hadamard",
    "kerdock_capacity",
    "kerdock_core",
    "kerdock_frame",
    "kerdock_rotation",
    "kerdock_signs",
    "kerdock_width",
    "unpack_signs",
]

# Primitive polynomials of GF(2^n), bit i the coefficient of x^i.
_POLYNOMIALS = {1: 0b11, 3: 0b1011, 5: 0b100101, 7: 0b10000011, 9: 0b1000010001, 11: 0b100000000101}
_LARGEST = 4096  # 16.8 million vectors, 1 MB of bits


def kerdock_capacity(dim: int) -> int:
    """How many vectors a Kerdock frame has in `dim` dimensions: d(d + 2) for the largest d = 4^s <= dim, 0 below 4."""
    if dim < 4:
        return 0
    core = kerdock_core(dim)
    return core * (core + 2)


def kerdock_core(dim: int) -> int:
    """Largest power of four up to `dim` and 4,096: the dimensions that a Kerdock frame fills.

    Raises:
        ValueError: If dim < 4.
    """
    if dim < 4:
        raise EtfZooError(f"A Kerdock frame needs at least 4 dimensions, got {dim}. Use frame='auto'.")
    return min(4 ** ((dim.bit_length() - 1) // 2), _LARGEST)


def kerdock_width(num_classes: int) -> int:
    """Smallest power of four whose Kerdock frame has `num_classes` vectors.

    Raises:
        ValueError: If none has.
    """
    core = 4
    while kerdock_capacity(core) < num_classes:
        if core == _LARGEST:
            raise EtfZooError(
                f"Kerdock frames end at {kerdock_capacity(core):,} classes, got {num_classes:,}. "
                f"Merge classes, or split them over several heads."
            )
        core *= 4
    return core


def check_kerdock_fits(num_classes: int, dim: int) -> None:
    """Raise ValueError, naming the neck that helps, unless a Kerdock frame of `num_classes` fits `dim` dimensions."""
    check_sizes(num_classes, dim)
    if num_classes > kerdock_capacity(dim):
        core, needed = kerdock_core(max(dim, 4)), kerdock_width(num_classes)
        room = f"{kerdock_capacity(dim):,} in {core}" if dim >= 4 else "none in fewer than 4"
        raise EtfZooError(
            f"A Kerdock frame of {num_classes:,} classes needs {needed} dimensions, got {dim}: it has d(d + 2) vectors "
            f"in d = 4, 16, 64, 256, 1024 or 4096 dimensions, {room}. Use neck='mlp' or neck='residual', which widen "
            f"the features to {needed}, or fewer classes."
        )


def kerdock_signs(dim: int, *, seed: int = 0) -> Tensor:
    """Sign bits of the d/2 bases beside the identity, packed.

    Seeded signs of the coordinates, the same in every basis, are part of them: the frame is mirrored at random, all
    cosines stay, and no vector points along the all-ones vector, where ReLU features lie.

    Args:
        dim: d, a power of four from 4 to 4,096.
        seed: Seed of the coordinates' signs.

    Returns:
        uint8 `(d/2, ceil(d/8))`: bit j of byte i is 1 where coordinate 8 i + j is negative. Row 0 is the coordinates'
        signs, those of the identity too.

    Raises:
        ValueError: If dim is no such power of four.
    """
    if dim < 4 or dim != kerdock_core(dim):
        raise EtfZooError(f"Kerdock sets exist for dim = 4, 16, 64, 256, 1024 and 4096 here, got {dim}.")
    degree = dim.bit_length() - 2
    forms = torch.zeros(dim // 2, 2, dim // 2, dtype=torch.uint8, device="cpu")  # a, x0, x
    powers, trace = _field(degree)
    order = len(powers)
    logs = torch.arange(order, device="cpu")
    linear = trace[powers]  # Tr(y) by the logarithm of y
    quadratic = torch.zeros_like(linear)
    for i in range(1, (degree - 1) // 2 + 1):
        quadratic ^= trace[powers[logs * (2**i + 1) % order]]
    product = (logs[:, None] + logs) % order  # logarithm of a x
    forms[1:, 0, powers] = quadratic[product]
    forms[1:, 1, powers] = (quadratic ^ linear)[product]
    generator = seeded(seed)
    flips = torch.randint(2, (dim,), generator=generator, dtype=torch.uint8, device="cpu")
    bits = forms.flatten(1) ^ flips
    bits = torch.nn.functional.pad(bits, (0, -dim % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(dim=2, dtype=torch.uint8)


def _field(degree: int) -> tuple[Tensor, Tensor]:
    """Powers of a generator of GF(2^degree) `(2^degree - 1,)` int64, and the trace of each element, uint8."""
    size, polynomial = 2**degree, _POLYNOMIALS[degree]
    powers = [1]
    while len(powers) < size - 1:
        nxt = powers[-1] << 1
        powers.append(nxt ^ polynomial if nxt >= size else nxt)
    table = torch.tensor(powers, device="cpu")
    logs = torch.arange(size - 1, device="cpu")
    trace = torch.zeros(size, dtype=torch.int64, device="cpu")
    for i in range(degree):
        trace[table] ^= table[logs * 2**i % (size - 1)]
    return table, trace.to(torch.uint8)


def unpack_signs(packed: Tensor, dim: int, like: Tensor) -> Tensor:
    """Rows of `kerdock_signs` as numbers of another tensor's kind: `(n, ceil(dim/8))` to `(n, dim)` of 1 and -1."""
    masks = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) & masks).flatten(-2)[..., :dim] > 0
    return 1 - 2 * bits.to(like.dtype)


def hadamard(size: int, like: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix `(size, size)` of 1 and -1, of another tensor's kind; size is a power of two."""
    matrix = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def kerdock_rotation(dim: int, *, seed: int = 0) -> Tensor | None:
    """Orthonormal rows `(core, dim)` that carry features of a width that is no power of four into one; else None."""
    core = kerdock_core(dim)
    return None if core == dim else haar_columns(dim, core, seed).T.float().contiguous()


def kerdock_frame(num_classes: int, dim: int, *, seed: int = 0) -> Tensor:
    r"""The first `num_classes` vectors of a Kerdock frame as a matrix: for tests and few classes.

    Class k belongs to basis k // 2d: its d vectors come first, then their negatives; the identity is the last basis.
    Any two vectors of different bases have cosine :math:`\pm 1/\sqrt d`, others 0 or -1. Up to 2d classes it is an
    orthoplex (or a part), largest cosine 0. In a width that is no power of four it lies in a seeded subspace of the
    largest one that fits.

    Args:
        num_classes: K, at most `kerdock_capacity(dim)`.
        dim: Feature dimension, at least 4.
        seed: Seed of the mirroring (see `kerdock_signs`) and of the subspace.

    Returns:
        Float32 `(num_classes, dim)`, unit rows.

    Raises:
        ValueError: If the frame does not fit; the message names the neck that helps.

    Example:
        >>> from etf_zoo.frames import frame_report, kerdock_frame
        >>> frame_report(kerdock_frame(288, 16)).largest_cosine
        0.25
    """
    check_kerdock_fits(num_classes, dim)
    core = kerdock_core(dim)
    one = torch.ones(1, device="cpu")
    signs = unpack_signs(kerdock_signs(core, seed=seed), core, one)
    bases = math.ceil(num_classes / (2 * core))
    frame = hadamard(core, one) * signs[:bases, None] / math.sqrt(core)
    if bases > len(signs):
        frame = torch.cat([frame, torch.diag(signs[0])[None]])
    frame = torch.stack([frame, -frame], dim=1).flatten(0, 2)[:num_classes]
    rotation = kerdock_rotation(dim, seed=seed)
    return frame if rotation is None else (frame.double() @ rotation.double()).float()
