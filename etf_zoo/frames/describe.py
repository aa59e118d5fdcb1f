"""A frame in words: what geometry a name stands for at so many classes and dimensions."""

from __future__ import annotations

from .build import CUSTOM, HELMERT, SUBSPACES

__all__ = ["describe_frame"]


def describe_frame(frame: str, num_classes: int, dim: int, *, orientation: str = "auto") -> str:
    """What a named frame is, in words.

    Args:
        frame: See `build_frame`; `"custom"` for one given as a matrix.
        num_classes: K.
        dim: Width of the features that meet the frame.
        orientation: See `simplex_etf`; mentioned where it is `"blocks"`.

    Returns:
        A phrase without an article and a full stop.

    Example:
        >>> describe_frame("auto", 200, 2048)
        'simplex ETF of 200 classes in 2048 dimensions'
    """
    size = f"{num_classes} classes in {dim} dimensions"
    simplex = num_classes <= dim + 1
    if frame in ("simplex", HELMERT) or (frame == "auto" and simplex):
        text = f"simplex ETF of {size}" + (", in Helmert coordinates" if frame == HELMERT else "")
    elif frame == "auto" and num_classes <= 2 * dim:
        text = f"{num_classes - dim} mutually orthogonal simplices of {size}, the most separated there are"
    elif frame in ("auto", "code"):
        text = f"spherical code of {size}"
    elif frame == "kerdock":
        text = f"Kerdock frame of {size}, cosines 0 and 1/sqrt(d) of either sign"
    elif frame == "random":
        text = f"independent random directions for {size}, the control for the geometry"
    elif frame == "hierarchy":
        text = f"frame of {size} whose cosines follow the class tree"
    elif frame == SUBSPACES:
        text = f"subspaces of a class tree for {size}, scored by the length of the feature's projection"
    elif frame == CUSTOM:
        text = f"frame of {size}, given as a matrix"
    else:
        text = f"{frame} frame of {size}"
    return text + (", one block of coordinates for each class" if orientation == "blocks" and frame != HELMERT else "")
