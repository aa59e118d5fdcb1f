"""A vision transformer for images of 64 pixels, where timm's start at larger ones; registered in timm."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__ = ["vit_d256_patch8_gap_64"]

default_cfgs = generate_default_cfgs(
    {
        "vit_d256_patch8_gap_64": {
            "num_classes": 1000,
            "input_size": (3, 64, 64),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_d256_patch8_gap_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT of width 256, depth 9 and 4 heads on patches of 8 x 8 pixels, pooled by their mean.

    It has 7.2 million parameters before the head, layer scale and no class token. Wide enough for a simplex of 200
    classes, which the 192 of timm's tiny ViTs is not.

    Example:
        >>> model = timm.create_model("vit_d256_patch8_gap_64_etf", num_classes=10)
        >>> model(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    args = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 256,
        "depth": 9,
        "num_heads": 4,
        "class_token": False,
        "global_pool": "avg",
        "init_values": 1e-4,
    }
    return build_model_with_cfg(
        VisionTransformer,
        "vit_d256_patch8_gap_64",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # for images of another size
        **{**args, **kwargs},
    )
