"""Behavior mixed into the class of a module in hand, in a way that copies can follow."""

from __future__ import annotations

import functools

from torch import nn

__all__ = ["become"]


def become(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Mix a class into a module's own, in place; pickle and deepcopy find the new class again.

    Example:
        >>> class Loud(nn.Module):
        ...     def forward(self, x):
        ...         return 10 * super().forward(x)
        >>> layer = nn.ReLU()
        >>> become(layer, Loud)
        >>> layer(torch.ones(1))
        tensor([10.])
    """
    if not isinstance(module, mixin):
        module.__class__ = _subclass(mixin, type(module))


@functools.cache
def _subclass(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    def reduce(self):  # pickle and deepcopy find the class again by its parts, as it stands in no module
        return _instance, (mixin, base), self.__dict__

    return type(
        base.__name__ + getattr(mixin, "name_suffix", ""),
        (mixin, base),
        {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "__reduce__": reduce,
            # properties that TorchScript must not compile
            "__jit_unused_properties__": [
                *getattr(base, "__jit_unused_properties__", ()),
                *getattr(mixin, "__jit_unused_properties__", ()),
            ],
        },
    )


def _instance(mixin: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    cls = _subclass(mixin, base)
    return cls.__new__(cls)
