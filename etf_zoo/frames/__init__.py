"""Frames: K unit vectors in dim dimensions, chosen by geometry. Pure functions, float64 inside, float32 out."""

from .bounds import levenshtein_bound
from .codes import best_frame, orthogonal_simplices, quick_code, random_frame
from .hierarchy import Hierarchy, hierarchy_cosines, hierarchy_frame
from .imbalanced import imbalanced_frame, seli_frame
from .kerdock import kerdock_frame
from .orientation import turn_to_blocks
from .polar import polar_factor
from .report import FrameReport, frame_report
from .simplex import nearest_simplex_etf, simplex_etf
from .spherical import spherical_code
from .subspaces import hierarchical_subspaces

__all__ = [
    "simplex_etf",
    "nearest_simplex_etf",
    "orthogonal_simplices",
    "random_frame",
    "quick_code",
    "best_frame",
    "spherical_code",
    "Hierarchy",
    "hierarchy_cosines",
    "hierarchy_frame",
    "hierarchical_subspaces",
    "kerdock_frame",
    "levenshtein_bound",
    "imbalanced_frame",
    "seli_frame",
    "turn_to_blocks",
    "polar_factor",
    "frame_report",
    "FrameReport",
]
