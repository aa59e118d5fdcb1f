"""Fixed-frame (simplex ETF) twins of every timm architecture. Importing this registers them."""

from . import frames, vit  # noqa: F401  vit is in timm's registry before the twins are made
from .attach import attach_frame
from .classifier import FrameClassifier
from .convert import convert_classifier
from .heads import frame_heads
from .pretrained import native_tags, read_weights
from .skip import add_skip
from .variants import register_variants

__version__ = "0.1.0"
__all__ = ["FrameClassifier", "add_skip", "attach_frame", "convert_classifier", "frame_heads", "frames", "register"]


def register() -> list[str]:
    """Register `<arch>_etf` for every timm architecture that has none yet; done once by `import etf_zoo`.

    Returns:
        Names registered now, empty if all were there.
    """
    return register_variants(native_tags(), read_weights)


register()
