"""What keeps a head's frame a frame: nothing overwrites it unnoticed, nothing loads its scale without it."""

import math  # no `from __future__ import annotations` here: TorchScript cannot read the class's as strings
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from ..errors import EtfZooError
from ..frames.build import CUSTOM, check_unit_rows
from ..frames.kerdock import kerdock_core, kerdock_rotation, kerdock_signs
from .logit_scale import kerdock_logit_scale, solve_logit_scale

__all__ = ["GuardedFrame", "check_lengths"]


def check_lengths(lengths: Tensor, num_classes: int) -> Tensor:
    """Lengths of prototypes as float32 on the CPU; EtfZooError unless there is a positive one for each class."""
    found = lengths.detach().float().cpu()
    if found.shape != (num_classes,) or not bool((torch.isfinite(found) & (found > 0)).all()):
        raise EtfZooError(
            f"lengths has one positive number for each of the {num_classes} classes; got {tuple(lengths.shape)}, from "
            f"{found.min().item() if found.numel() else 0:.4g}. Frames with a zero row have no direction there."
        )
    return found


class GuardedFrame(nn.Module):
    """Base of `FrameClassifier`: building its frame and scale again, and noticing where that is needed.

    Attributes:
        built_from: Arguments of `build_frame` beside the name, which is `frame`.
        scale_asked: `logit_scale` as the constructor had it.
        probability: Of its class for a feature on its prototype, at the scale that is solved for. Less than 0.999 under
            label smoothing, see `smoothed_probability`; then call `reset_scale`.
    """

    UNSENT = ("weight", "lengths", "signs", "rotation")  # buffers that are fixed, or that a moving frame sends itself

    weight: Tensor
    signs: Tensor
    rotation: Tensor
    logit_scale: Tensor
    lengths: Tensor
    _lengths_asked = None  # by the constructor
    if TYPE_CHECKING:  # of the classifier; annotations that exist are TorchScript's to read
        frame: str
        implicit: bool
        feature_norm: str
        num_classes: int
        dim: int

    @torch.jit.unused
    def remember(self, built_from: dict[str, Any], scale_asked: float | str) -> None:
        """Keep what frame and scale are built from; called by the constructor once there is a `weight`."""
        self.built_from, self.scale_asked, self.probability = built_from, scale_asked, 0.999
        self._checked = (0, 0)  # the frame that `check_intact` saw last: its id and version
        self._unfilled = self.weight.is_meta

    @torch.jit.unused
    def register_kerdock(self, seed: int, device: torch.device) -> None:
        """Buffers of a Kerdock frame that is not stored; empty, and in no state dict, with any other."""
        signs, rotation = torch.empty(0, dtype=torch.uint8), None
        if kerdock := self.implicit and self.frame == "kerdock":
            core = kerdock_core(self.dim)
            if device.type == "meta":
                signs = torch.empty(core // 2, math.ceil(core / 8), dtype=torch.uint8, device=device)
                rotation = None if core == self.dim else torch.empty(core, self.dim, device=device)
            else:
                signs, rotation = kerdock_signs(core, seed=seed), kerdock_rotation(self.dim, seed=seed)
        self.register_buffer("signs", signs.to(device), persistent=kerdock)
        empty = torch.empty(0, device=device)
        self.register_buffer(
            "rotation", empty if rotation is None else rotation.to(device), persistent=rotation is not None
        )

    @torch.jit.unused
    def register_lengths(self, lengths: Tensor | bool | None, device: torch.device) -> None:
        """Buffer of the prototypes' lengths; empty, and in no state dict, without any."""
        self.has_lengths = lengths is not None and lengths is not False
        if not self.has_lengths:
            self.register_buffer("lengths", torch.empty(0, device=device), persistent=False)
            return
        if len(self.weight) > self.num_classes or self.implicit:
            raise EtfZooError("lengths are of prototypes that are stored, and of all of them: leave reserve out.")
        if isinstance(lengths, Tensor):
            self._lengths_asked = check_lengths(lengths, self.num_classes)
        elif lengths is not True or device.type != "meta":
            raise EtfZooError(f"lengths are a tensor ({self.num_classes},) of positive numbers, got {lengths!r}.")
        self.register_buffer("lengths", torch.empty(self.num_classes, dtype=torch.float32, device=device))
        if device.type != "meta":
            self.fill_lengths()

    @torch.jit.unused
    @torch.no_grad()
    def fill_lengths(self) -> None:
        """Put the lengths that the constructor had into their buffer, if it had any."""
        if self._lengths_asked is not None:
            self.lengths.copy_(self._lengths_asked)

    @torch.jit.unused
    def build_again(self) -> None:
        """Build the frame into its buffers; of the classifier."""
        raise NotImplementedError

    @torch.jit.unused
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Build the frame and its scale again as the constructor did, in place; a neck is left as it is.

        Libraries that create models without memory and then fill what a checkpoint lacks call this.

        Raises:
            EtfZooError: If the frame was given as a tensor: nothing can build that again.

        Example:
            >>> head = FrameClassifier(8, 3)
            >>> _ = torch.nn.init.trunc_normal_(head.weight, std=2e-5)  # what is right for a learned head only
            >>> head.reset_parameters()
            >>> torch.equal(head.weight, FrameClassifier(8, 3).weight)
            True
        """
        if not self.weight.is_meta:
            self.build_again()
        self.reset_scale()

    @torch.jit.unused
    @torch.no_grad()
    def reset_scale(self) -> None:
        """Solve the scale for the present frame, or set it to the number that was asked for; in place."""
        if not self.logit_scale.is_meta:
            self.logit_scale.fill_(self.initial_scale())

    @torch.jit.unused
    def initial_scale(self) -> float:
        """The scale that was asked for: a number, or solved for the present frame.

        Raises:
            EtfZooError: If it is neither positive and finite nor a known name.
        """
        asked = self.scale_asked
        if isinstance(asked, str):
            if asked not in ("auto", "learnable"):
                raise EtfZooError(f"Unknown logit_scale {asked!r}. Give a number, 'auto' or 'learnable'.")
            if self.feature_norm == "none" or self.weight.is_meta:
                return 1.0
            if self.implicit:
                return kerdock_logit_scale(self.num_classes, self.dim, probability=self.probability)
            return solve_logit_scale(self.weight, probability=self.probability)
        if not isinstance(asked, int | float) or not (math.isfinite(asked) and asked > 0):
            raise EtfZooError(f"logit_scale must be positive and finite, got {asked!r}.")
        return float(asked)

    @torch.jit.unused
    def init_non_persistent_buffers(self) -> None:
        """Build what a checkpoint lacked: transformers' wrapper calls this on every module, loaded tensors marked."""
        stored = (self.weight, self.signs, self.rotation) if self.implicit else (self.weight,)
        frame = all(_is_loaded(value) for value in stored if value.numel())
        scale = _is_loaded(self.logit_scale)
        if (scale and not frame) or not self.holds_frame():
            self.reset_parameters()
        elif frame and not scale:
            self.reset_scale()

    def train(self, mode: bool = True):
        self._checked = (0, 0)
        if self._unfilled and not self.weight.is_meta:  # memory that has just replaced the meta device's, or weights
            self._unfilled = False
            if self.frame != CUSTOM and not self.holds_frame():
                self.reset_parameters()
        return super().train(mode)

    @torch.jit.unused
    @torch.no_grad()
    def holds_frame(self) -> bool:
        """Whether all rows have length 1, as far as can be seen: not on the meta device, nor under vmap."""
        if self.weight.is_meta or self.implicit:
            return True
        try:
            return bool((self.weight.norm(dim=1) - 1).abs().amax() < 0.01)  # False for NaN
        except RuntimeError:  # under vmap a tensor has no one value
            return True

    @torch.jit.unused
    def check_intact(self, x: Tensor) -> None:
        """Raise EtfZooError in training if something has written over the frame since it was looked at last.

        A frame is looked at when it is new or was changed in place, and once after each call of `train`, for what
        changes `weight.data` leaves no trace. Compiled and traced models do not look.

        Args:
            x: What the forward pass is given, to tell a tracer's from a tensor.
        """
        if not self.training or torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, Proxy):
            return
        if self.weight.is_inference():
            return
        # DDP that broadcasts buffers changes them at every step, and to look is to wait for the device
        distributed = dist.is_available() and dist.is_initialized()
        state = (id(self.weight), 0 if distributed else self.weight._version)
        if state == self._checked:
            return
        if not self.holds_frame():
            norms = self.weight.norm(dim=1)
            raise EtfZooError(
                f"The frame was overwritten: its rows have lengths from {norms.min():.3g} to {norms.max():.3g}, not 1. "
                f"A fixed frame is not to be initialized as a linear head is. Take `weight` out of what does that, and "
                f"call reset_parameters() of this FrameClassifier to have the frame back."
            )
        self._checked = state

    def __getattr__(self, name: str):
        if name == "bias":
            raise AttributeError(
                "A fixed frame has no bias: its logits are scaled cosines with unit rows. What needs one "
                "(timm's --head-init-bias, --test-pool) is for learned linear heads: leave it out."
            )
        return super().__getattr__(name)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.shape != self.weight.shape:
            errors.append(
                f"the frame {prefix}weight has shape {tuple(weight.shape)} in the checkpoint and "
                f"{tuple(self.weight.shape)} in the model: create the model with num_classes={weight.shape[0]}, "
                f"or load the checkpoint without its keys below {prefix!r} to keep the fresh frame."
            )
            return
        if weight is not None and not weight.is_meta and not self.implicit:
            try:
                check_unit_rows(weight)
            except EtfZooError as error:
                errors.append(f"{prefix}weight in the checkpoint is not a frame. {error}")
                return
        lengths = state_dict.get(prefix + "lengths")
        if lengths is not None and not lengths.is_meta and self.has_lengths:
            try:
                check_lengths(lengths, self.num_classes)
            except EtfZooError as error:
                errors.append(f"{prefix}lengths in the checkpoint: {error}")
                return
        # Scale and lengths are right for their frame only: without it they stay the model's own, reported as missing.
        scale = prefix + "logit_scale"
        own = (scale, prefix + "lengths")
        alone = weight is None and any(key in state_dict for key in own)
        if alone and scale in state_dict and isinstance(self.logit_scale, nn.Parameter):
            warnings.warn(
                f"{scale} in the checkpoint was trained with a frame that the checkpoint lacks, so it is not loaded. "
                f"Save {prefix}weight beside it: the whole state_dict().",
                stacklevel=2,
            )
        given = {key: value for key, value in state_dict.items() if key not in own} if alone else state_dict
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing, unexpected, errors)
        if weight is not None and scale not in state_dict and not self.weight.is_meta:
            self.reset_scale()


def _is_loaded(value: Tensor) -> bool:
    return getattr(value, "_is_hf_initialized", False)
