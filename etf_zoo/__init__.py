"""Fixed-frame (simplex ETF) twins of every timm architecture. Importing this registers them."""

from . import frames
from .embedding import embed
from .layers.classifier import FrameClassifier
from .models import vit  # noqa: F401  in timm's registry before the twins are made
from .models.attach import attach_frame
from .models.convert import convert_classifier
from .models.names import frame_heads
from .models.skip import add_skip
from .models.twins import register_twins
from .weights.native import native_tags, read_weights

__version__ = "0.1.0"
__all__ = [
    "FrameClassifier",
    "add_skip",
    "attach_frame",
    "convert_classifier",
    "embed",
    "frame_heads",
    "frames",
    "register",
]


def register() -> list[str]:
    """Register `<arch>_etf` for every timm architecture that has none yet; done once by `import etf_zoo`.

    Returns:
        Names registered now, empty if all were there.
    """
    return register_twins(native_tags(), read_weights)


register()
