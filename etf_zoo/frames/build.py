"""Frames by the names that heads, recipes and saved models know them by."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..errors import EtfZooError
from .codes import best_frame, quick_code, random_frame
from .hierarchy import check_gamma, check_hierarchy_fits, check_matrix, hierarchy_frame
from .kerdock import check_kerdock_fits, kerdock_frame
from .orientation import resolve_orientation, turn_to_blocks
from .simplex import check_simplex_fits, check_sizes, helmert_basis, simplex_etf
from .subspaces import check_subspaces_fit, hierarchical_subspaces

__all__ = [
    "BUILDERS",
    "CUSTOM",
    "FRAMES",
    "HELMERT",
    "OF_A_TREE",
    "SUBSPACES",
    "build_frame",
    "check_frame",
    "check_unit_rows",
]

# Functions (num_classes, dim, *, seed) -> frame, by name; they are turned to blocks, or not, as the others are.
BUILDERS: dict[str, Callable[..., Tensor]] = {"random": random_frame, "code": quick_code, "kerdock": kerdock_frame}
# What such a frame raises where it does not fit, without computing.
_CHECKS: dict[str, Callable[[int, int], None]] = {"simplex": check_simplex_fits, "kerdock": check_kerdock_fits}
SUBSPACES = "subspaces"  # of a tree's nodes, scored by projections: `layers.subspaces`
OF_A_TREE = ("hierarchy", SUBSPACES)
FRAMES = ("auto", "simplex", *BUILDERS, *OF_A_TREE)
CUSTOM = "custom"  # name of a frame that was given as a tensor
# Simplex ETF in the Helmert basis, K - 1 wide: what softmax-preserving conversion puts behind its linear neck.
HELMERT = "helmert"


def check_frame(
    frame: str | Tensor,
    num_classes: int,
    dim: int,
    *,
    orientation: str = "auto",
    hierarchy: Tensor | None = None,
    gamma: float = 2.0,
) -> None:
    """Raise the errors of `build_frame` that show without computing; whether distances allow a frame does not.

    Args:
        frame: See `build_frame`; here `"custom"` passes too, as the frame of a checkpoint that is about to be loaded.
        num_classes: K.
        dim: Width of the features that meet the frame.
        orientation: See `build_frame`.
        hierarchy: See `build_frame`.
        gamma: See `build_frame`.

    Raises:
        ValueError: On an unknown name, a frame that does not fit, or a tensor of wrong shape or without unit rows.
    """
    check_sizes(num_classes, dim)
    if (hierarchy is not None) != (isinstance(frame, str) and frame in OF_A_TREE):
        name = frame if isinstance(frame, str) and frame in OF_A_TREE else "hierarchy"
        raise EtfZooError(
            f"frame={name!r} and hierarchy=D, the distances between classes (K, K), go together: "
            "D = etf_zoo.frames.Hierarchy.from_json(path).distances(class_names)."
        )
    if hierarchy is not None:
        check_matrix(hierarchy)
        if len(hierarchy) != num_classes:
            raise EtfZooError(f"hierarchy has shape {tuple(hierarchy.shape)} for {num_classes} classes.")
        if frame == SUBSPACES:
            check_subspaces_fit(hierarchy, dim)
        else:
            check_hierarchy_fits(num_classes, dim)
            check_gamma(gamma)
    if isinstance(frame, Tensor):
        if frame.shape != (num_classes, dim):
            raise EtfZooError(f"The frame has shape {tuple(frame.shape)}, the head needs ({num_classes}, {dim}).")
        if not frame.is_meta:
            check_unit_rows(frame)
    elif frame == HELMERT:
        if dim != num_classes - 1:
            raise EtfZooError(
                f"frame={HELMERT!r} is {num_classes - 1} wide, the features are {dim}: use neck='linear'."
            )
    elif not isinstance(frame, str) or frame not in (*FRAMES, CUSTOM):
        raise EtfZooError(f"Unknown frame {frame!r}. Choose one of {', '.join(FRAMES)}, or pass a tensor (K, dim).")
    elif frame != CUSTOM:
        if frame in _CHECKS:
            _CHECKS[frame](num_classes, dim)
        resolve_orientation(orientation, num_classes, dim)


def build_frame(
    frame: str | Tensor,
    num_classes: int,
    dim: int,
    *,
    orientation: str = "auto",
    seed: int = 0,
    hierarchy: Tensor | None = None,
    gamma: float = 2.0,
) -> Tensor:
    """Frame by name, or a checked copy of the one given.

    Args:
        frame: `"auto"`, `"simplex"`, `"random"`, `"code"`, `"kerdock"`, `"hierarchy"`, `"subspaces"`, or a tensor
            `(num_classes, dim)` with unit rows.
        num_classes: K.
        dim: Width of the features that meet the frame.
        orientation: See `simplex_etf`; the other frames are turned alike, see `turn_to_blocks`.
        seed: Seed of the frame.
        hierarchy: Distances between classes `(K, K)`; for `"hierarchy"` (see `hierarchy_frame`) and `"subspaces"` (see
            `hierarchical_subspaces`), and only for them.
        gamma: Of `hierarchy_frame`.

    Returns:
        Float32 `(num_classes, dim)`, unit rows.

    Raises:
        ValueError: On an unknown name, a frame that does not fit, or a tensor of wrong shape or without unit rows.
    """
    check_frame(frame, num_classes, dim, orientation=orientation, hierarchy=hierarchy, gamma=gamma)
    if isinstance(frame, Tensor):
        return frame.detach().clone().float()
    if frame == CUSTOM:
        raise EtfZooError(
            f"frame={CUSTOM!r} names a frame that was given as a tensor and that only its weights hold: load them "
            f"(pretrained=True), pass the tensor itself, or choose one of {', '.join(FRAMES)}."
        )
    if frame == HELMERT:
        return (math.sqrt(num_classes / (num_classes - 1)) * helmert_basis(num_classes)).float()
    if frame == "auto":
        return best_frame(num_classes, dim, orientation=orientation, seed=seed)
    if frame == "simplex":
        return simplex_etf(num_classes, dim, orientation=orientation, seed=seed)
    if hierarchy is not None and frame == SUBSPACES:
        return hierarchical_subspaces(hierarchy, dim)  # its coordinates are the nodes, so it is not turned
    if hierarchy is not None:
        found = hierarchy_frame(hierarchy, dim, gamma=gamma, seed=seed)
    else:
        found = BUILDERS[str(frame)](num_classes, dim, seed=seed)
    return turn_to_blocks(found) if resolve_orientation(orientation, num_classes, dim) == "blocks" else found


def check_unit_rows(frame: Tensor, tolerance: float = 5e-3) -> None:  # bfloat16 rounds by up to 4e-3
    """Raise ValueError unless all rows of a frame have length 1."""
    norms = frame.detach().float().norm(dim=1)
    if not bool((norms - 1).abs().le(tolerance).all()):
        raise EtfZooError(
            f"A frame has unit rows, this matrix has row norms from {norms.min():.4g} to {norms.max():.4g}. It looks "
            f"like a learned classifier: use etf_zoo.frames.nearest_simplex_etf(matrix), or normalize its rows."
        )
