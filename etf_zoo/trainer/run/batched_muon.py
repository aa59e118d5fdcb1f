"""timm's Muon with the matrices of one shape orthogonalized together: a few large kernels in the place of many small.

Newton-Schulz takes some 20 products and about 35 kernels for a weight, so that a step of a ResNet-18 on a GPU waits for
the processor that launches them. A network has few shapes: ResNet-18's 20 convolutions have 11.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from timm.optim import Muon
from timm.optim import muon as timm_muon
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["BatchedMuon", "batch_muon"]


def batch_muon(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let timm's Muon update weights of one shape together, in place; any other optimizer stays as it is."""
    if type(optimizer) is Muon:
        optimizer.__class__ = BatchedMuon
    return optimizer


class BatchedMuon(Muon):
    """`timm.optim.Muon`, the same update and state, over all matrices of one shape at once.

    On a CPU, where a launch costs nothing, and for what it does not know (AdaMuon, convolutions by position, sharded
    weights), it is timm's own. Newton-Schulz runs in bf16, so that the two differ by the rounding of bf16.

    Example:
        >>> optimizer = batch_muon(create_optimizer_v2(model, "muon", lr=0.02))  # doctest: +SKIP
    """

    on_cpu = False  # whether to batch there too

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As any optimizer's."""
        if closure is not None:  # which computes the gradients
            return super().step(closure)
        taken: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            shapes: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            if group["algo"] == "muon" and group["conv_mode"] == "flatten":
                for weight in filter(lambda p: self._takes(p, group), group["params"]):
                    shapes[tuple(weight.shape), weight.dtype, weight.device].append(weight)
            for weights in shapes.values():
                taken += [(weight, weight.grad) for weight in weights]  # type: ignore[misc]  # those without are left out
                self._update(weights, group)
        for weight, _ in taken:  # timm's step leaves out what has no gradient
            weight.grad = None
        super().step()
        for weight, gradient in taken:
            weight.grad = gradient
        return None

    def _takes(self, weight: Tensor, group: dict[str, Any]) -> bool:
        if weight.grad is None or weight.grad.is_sparse or isinstance(weight, DTensor):
            return False
        if weight.device.type == "cpu" and not self.on_cpu:
            return False
        state = self.state[weight]
        if "use_muon" not in state:  # as timm decides at a first step
            suitable = timm_muon._is_suitable_for_muon(weight)
            state["use_muon"] = not group.get("use_fallback", False) and bool(group.get("use_muon", suitable))
        return state["use_muon"]

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients: list[Tensor] = [weight.grad for weight in weights]  # type: ignore[misc]
        momenta: list[Tensor] = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        matrices = torch.stack([update.reshape(len(update), -1) for update in updates])
        orthogonal = timm_muon.zeropower_via_newtonschulz(
            matrices,
            group["ns_steps"],
            timm_muon.resolve_ns_coefficients(group["ns_coefficients"], timm_muon._COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            scale_eps=group["scale_eps"],
        )
        scale = timm_muon.get_lr_scale(orthogonal.shape[1:], group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
        parts = [
            part.reshape(weight.shape) for part, weight in zip(orthogonal.to(weights[0].dtype), weights, strict=True)
        ]
        torch._foreach_add_(weights, parts, alpha=-group["lr"] * scale)
