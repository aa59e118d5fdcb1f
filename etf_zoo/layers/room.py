"""Room for classes to come in a frame: what may be asked for, and the ways on where there is none."""

import math

from ..errors import EtfZooError

__all__ = ["NO_RESERVE", "check_reserve", "check_room_for"]

NO_RESERVE = (
    "A frame that is not stored, or that converts a classifier, has no room for more classes: leave reserve out, or "
    "take frame='code'."
)


def check_reserve(reserve: int) -> int:
    """The number, if it is one of classes to come; else EtfZooError."""
    if not isinstance(reserve, int) or isinstance(reserve, bool) or reserve < 0:
        raise EtfZooError(f"reserve is a number of classes to come, 0 for none; got {reserve!r}.")
    return reserve


def check_room_for(count: int, reserve: int, num_classes: int, dim: int) -> None:
    """Raise EtfZooError, naming the ways on and what they change, unless a frame has room for more classes.

    Args:
        count: Classes to add.
        reserve: Prototypes that are left.
        num_classes: Classes that there are.
        dim: Width of the frame.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise EtfZooError(f"The number of classes to add is at least 1, got {count!r}.")
    if count <= reserve:
        return
    total = num_classes + count
    now = -1 / max(num_classes + reserve - 1, 1)
    text = f"There is no room for {count} more classes: the frame has {num_classes}, and {reserve} in reserve. "
    if total <= dim + 1:
        text += (
            f"Train again with reserve={total - num_classes} or more. Up to {dim + 1} classes a simplex fits {dim} "
            f"dimensions; with {total} the cosine between two prototypes is {-1 / (total - 1):.4f}, with the present "
            f"number {now:.4f}."
        )
    else:
        bound = math.sqrt((total - dim) / (dim * (total - 1)))
        text += (
            f"No simplex of {total} fits {dim} dimensions. Train again with reserve={total - num_classes} and "
            f"frame='code', whose prototypes have cosines of about {bound:.3f} (Welch's bound) in the place of "
            f"{now:.4f}; or with neck='mlp' too, which widens the features to {total - 1}."
        )
    raise EtfZooError(text)
