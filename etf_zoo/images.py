"""Pixels of an image file as a model wants them: RGB, 8 bits, upright, whatever the file holds.

Training and `etf-zoo predict` both read images through here. Pillow's own `convert("RGB")` clips what has more than
8 bits, which turns most of it white, and drops an alpha channel together with what it hides.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import EtfZooError

__all__ = ["UnreadableImageError", "image_extensions", "read_image", "to_rgb"]

# What Pillow's decoders are seen to raise on damaged files.
_DAMAGED = (OSError, RuntimeError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)
_WHITE_16 = 65_535
_LONGEST = 64  # times the short side


class UnreadableImageError(EtfZooError):
    """A file that is no image, is damaged, or holds pixels that have no 8-bit form."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB, upright by its EXIF tag.

    Images with 16 bits are scaled from 0..65535, floating-point ones from 0..1. What is transparent shows white, as
    in most viewers. CMYK, palettes and gray are converted by Pillow. Of an animation, the first frame is taken.

    Args:
        image: An image that Pillow has opened.

    Returns:
        A new image of mode `RGB`.

    Raises:
        UnreadableImageError: If the pixels are 32-bit integers, or floating-point numbers outside 0..1: no scale
            would be right for all such files.

    Example:
        >>> from PIL import Image
        >>> import numpy as np
        >>> to_rgb(Image.fromarray(np.full((1, 1), 65535, np.uint16))).getpixel((0, 0))
        (255, 255, 255)
    """
    # Pillow may open 16-bit PNG and PGM files as 32-bit integers; a copy no longer knows its format
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        pixels = np.asarray(image).astype(np.uint32).clip(0, _WHITE_16)
        return Image.fromarray(((pixels * 255 + _WHITE_16 // 2) // _WHITE_16).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_float(np.asarray(image))
    if image.mode == "I":
        raise UnreadableImageError("its pixels are 32-bit integers, without a common scale: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_float(pixels: np.ndarray) -> Image.Image:
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise UnreadableImageError("its pixels are floating-point numbers outside 0 to 1: save it with 8 or 16 bits")
    return Image.fromarray((pixels * 255).round().astype(np.uint8)).convert("RGB")


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a strip, all that a model's square crop shows of one.

    Brought to a model's size by its short side, an image of one pixel by 20,000 would take gigabytes.
    """
    most = _LONGEST * min(image.size)
    if max(image.size) <= most:
        return image
    width, height = (min(side, most) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_image(file: str | Path | bytes) -> Image.Image:
    """An image file as 8-bit RGB, see `to_rgb`; of one more than 64 times as long as wide, the middle.

    Args:
        file: Path, or the bytes of a file.

    Raises:
        UnreadableImageError: If it is missing, no image, damaged, too large, or see `to_rgb`. The message says why,
            not which file.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return _middle(to_rgb(image))
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("it is no image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise UnreadableImageError(f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImageError(reason.partition(" <_io.")[0]) from error


# Pillow names these formats, but draws them with other programs, or not at all.
_NO_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def image_extensions() -> frozenset[str]:
    """Endings, in lower case with their dot, of the image files that Pillow reads; HEIC with the package pillow-heif.

    Example:
        >>> {".jpg", ".png", ".tiff"} <= image_extensions()
        True
    """
    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(end for end in known if Image.registered_extensions()[end] not in _NO_PHOTOS)


def _register_heif() -> None:
    try:
        import pillow_heif  # type: ignore[import-not-found]  # optional, for the photos of phones
    except ImportError:
        return
    pillow_heif.register_heif_opener()


_register_heif()
