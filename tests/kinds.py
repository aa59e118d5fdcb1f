"""One small member of each kind of classification head in timm, for the tests of the twins."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch import Tensor, nn

import etf_zoo  # noqa: F401  registers the twins

CLASSES = 7
needs_onnx_exporter = pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="torch's older exporters know no named dimension and no batch norm"
)
# kind of head -> (architecture, arguments that keep it small, image size)
KINDS = {
    "linear": ("resnet18", {}, 64),
    "efficientnet": ("mobilenetv3_small_050", {}, 64),
    "conv": ("dla46_c", {}, 64),
    "pair": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 3}, 64),
    "norm_linear_pair": ("levit_128s", {"img_size": 64}, 64),
    "list": ("crossvit_9_240", {}, 240),
    "list_by_stage": ("efficientvim_m1", {}, 64),
    "mlp": ("caformer_s18", {}, 64),
    "repvit": ("repvit_m0_9", {}, 64),
    "norm_linear": ("shvit_s1", {}, 64),
    "aux": ("volo_d1_224", {"img_size": 64}, 64),
    "no_default_conv": (
        "samvit_base_patch16",
        {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 2, "global_attn_indexes": (1,)},
        64,
    ),
    "no_default": ("vit_small_patch14_dinov2", {"img_size": 56, "depth": 3}, 56),
    "pruned": ("efficientnet_b1_pruned", {}, 64),
}


@functools.cache
def shared(kind: str, *, twin: bool = True, **kwargs) -> nn.Module:
    """Model in eval mode, the same for every test that does not change it; a twin and its base share their backbone."""
    name, small, _ = KINDS[kind]
    torch.manual_seed(0)
    name = name + "_etf" if twin else name
    return timm.create_model(name, **{"num_classes": CLASSES, **small, **kwargs}).eval()


def build(kind: str, **kwargs) -> nn.Module:
    """The same model for one test to change; a copy, as initializing takes far longer."""
    with torch.no_grad():
        return copy.deepcopy(shared(kind, **kwargs))


def images(kind: str, batch: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    size = KINDS[kind][2]
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier leaves that timm's cfg names, where the model has them."""
    names = model.pretrained_cfg["classifier"]
    modules = dict(model.named_modules())
    return {name: modules[name] for name in ((names,) if isinstance(names, str) else names) if name in modules}
