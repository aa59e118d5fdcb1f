"""Directions of feature vectors, computed in float32 at least."""

import math  # no `from __future__ import annotations` here: TorchScript cannot read the functions' as strings

import numpy as np
import torch
from torch import Tensor

from ..errors import EtfZooError

__all__ = ["at_least_float32", "check_finite_matrix", "derived_seed", "directed_lengths", "seeded", "unit"]


def seeded(seed: int) -> torch.Generator:
    """A generator of its own on the CPU.

    Raises:
        EtfZooError: If the seed is no whole number of 64 bits.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise EtfZooError(f"A seed is a whole number of 64 bits, got {seed!r}.")
    return torch.Generator(device="cpu").manual_seed(seed)


def derived_seed(seed: int, *parts: int) -> int:
    """Seed of a part, such as one of several starts: none that another seed has for its own parts, as `seed + i` would.

    Args:
        seed: The seed of the whole.
        parts: Numbers of the part, not negative.

    Raises:
        EtfZooError: If the seed is no whole number of 64 bits.

    Example:
        >>> derived_seed(0, 1) == derived_seed(1, 0)
        False
    """
    seeded(seed)
    state = np.random.SeedSequence((seed % 2**64, *parts)).generate_state(1, np.uint64)
    return int(state.view(np.int64)[0])


def check_finite_matrix(matrix: Tensor, what: str) -> None:
    """Raise EtfZooError unless `matrix` is a tensor (rows, columns) of finite numbers, neither empty nor whole.

    Args:
        matrix: What was given.
        what: Its name, for the message.
    """
    if not isinstance(matrix, Tensor):
        raise EtfZooError(f"{what} is a tensor (rows, columns), got a {type(matrix).__name__}: torch.as_tensor(...).")
    if matrix.ndim != 2 or not matrix.numel():
        raise EtfZooError(f"Expected a matrix (num_classes, dim), got shape {tuple(matrix.shape)}.")
    if not matrix.is_floating_point():
        raise EtfZooError(f"{what} holds floating point numbers, got {matrix.dtype}.")
    if not bool(torch.isfinite(matrix).all()):
        raise EtfZooError(f"{what} has entries that are not finite.")


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision up to float32, as sums over features overflow float16; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def directed_lengths(x: Tensor, source: Tensor | None = None) -> Tensor:
    """Lengths of rows, infinite for those too short to have a direction.

    The gradient of a direction grows as 1 / length. So below 1e-3 for features in float16 (whose numbers end at 65504,
    and which lose digits below 6e-5), and below 1e-6 otherwise, a row counts as zero.

    Args:
        x: `(..., d)`.
        source: What `x` was computed from, if its precision is another.

    Returns:
        `(..., 1)`, float32 at least. What is divided by it is zero, with zero gradient, where a row is too short.
    """
    shortest = 1e-3 if (x if source is None else source).dtype == torch.float16 else 1e-6
    lengths = torch.linalg.vector_norm(at_least_float32(x), dim=-1, keepdim=True)
    return lengths.masked_fill(lengths <= shortest, math.inf)


def unit(x: Tensor, source: Tensor | None = None) -> Tensor:
    """Rows of length one; zero, with zero gradient, for rows too short to have a direction, see `directed_lengths`.

    Args:
        x: `(..., d)`.
        source: What `x` was computed from, if its precision is another.

    Returns:
        `(..., d)`, float32 at least: half precision cannot hold the squared length of 2,048 features.
    """
    return at_least_float32(x) / directed_lengths(x, source)
