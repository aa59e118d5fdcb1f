"""Pixels of image files, by mode: against values worked out by hand, and as files that users have."""

import io
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from etf_zoo.errors import EtfZooError
from etf_zoo.images import UnreadableImageError, read_image, to_rgb

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 16-bit values whose 8-bit ones are 0 to 255


def _file(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_keeps_its_range(kind):
    got = np.asarray(read_image(_file(Image.fromarray(RAMP), kind)))
    assert got.shape == (16, 16, 3)
    assert (got == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all()


def test_big_endian_tiff_is_the_same():
    little, big = Image.fromarray(RAMP), Image.fromarray(RAMP.astype(">u2"))
    assert big.mode == "I;16B"
    assert (np.asarray(to_rgb(big)) == np.asarray(to_rgb(little))).all()


def test_values_between_are_rounded_to_the_nearest():
    values = np.array([[128, 129, 65406, 65407]], np.uint16)  # half of 257 is 128.5
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 254, 255]


def test_floating_point_from_zero_to_one():
    pixels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    got = np.asarray(read_image(_file(Image.fromarray(pixels), "TIFF")))
    assert (got[..., 0].ravel() == np.arange(256)).all()


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((4, 4), 70_000, np.int32),
        np.full((4, 4), 200.0, np.float32),
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), -0.1, np.float32),
    ],
)
def test_pixels_without_a_known_scale_are_refused(pixels):
    with pytest.raises(UnreadableImageError, match=r"save it with 8 or 16"):
        read_image(_file(Image.fromarray(pixels), "TIFF"))


def test_a_transparent_image_lies_on_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))  # black, but not to be seen
    for kind in ("PNG", "WEBP"):
        got = read_image(_file(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert [got.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).getpixel((0, 0)) == (204,) * 3  # a fifth of black


def test_palettes():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert [read_image(_file(image, "PNG")).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    see_through = read_image(_file(image, "PNG", transparency=bytes([255, 0])))
    assert [see_through.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize(
    ("mode", "color", "wanted"),
    [
        ("1", 1, (255,) * 3),
        ("L", 7, (7,) * 3),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (255, 128, 128), None),
    ],
)
def test_other_modes(mode, color, wanted):
    got = to_rgb(Image.new(mode, (2, 2), color))
    assert got.mode == "RGB"
    assert got.getpixel((0, 0)) == (wanted or (255,) * 3)


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_turned_upright_by_exif(mode):
    pixels = np.zeros((2, 3), np.uint8 if mode == "L" else np.uint16)
    pixels[0, 0] = np.iinfo(pixels.dtype).max
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right to see it upright
    got = read_image(_file(Image.fromarray(pixels), "PNG", exif=exif))
    assert got.size == (2, 3)
    assert [got.getpixel(at) for at in ((0, 0), (1, 0))] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_the_middle_of_a_strip(size):
    image = Image.new("L", size)
    middle = tuple(side // 2 for side in size)
    image.putpixel(middle, 255)
    got = read_image(_file(image, "PNG"))
    assert sorted(got.size) == [1, 64]
    assert got.getpixel(tuple(side // 2 for side in got.size)) == (255,) * 3
    for kept in ((1, 64), (1, 1), (300, 200)):
        assert read_image(_file(Image.new("L", kept), "PNG")).size == kept


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_damaged_files_say_why(tmp_path):
    whole = _file(Image.effect_noise((64, 64), 50), "JPEG")
    for data, reason in ((b"text", "no image"), (b"", "no image"), (whole[: len(whole) // 2], "truncated")):
        with pytest.raises(UnreadableImageError, match=reason) as caught:
            read_image(data)
        assert "0x" not in str(caught.value)
    with pytest.raises(UnreadableImageError, match="No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(EtfZooError):
        read_image(tmp_path)


def test_what_other_decoders_raise(monkeypatch):
    """Pillow's of AVIF raises RuntimeError, that of BLP NotImplementedError."""
    for error in (RuntimeError("Failed to decode image"), NotImplementedError("Unknown BLP")):
        monkeypatch.setattr(Image, "open", mock.Mock(side_effect=error))
        with pytest.raises(UnreadableImageError, match=str(error)):
            read_image(b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="more than 200 pixels"):
        read_image(_file(Image.new("L", (20, 20)), "PNG"))
    assert read_image(_file(Image.new("L", (12, 12)), "PNG")).size == (12, 12)  # Pillow only warns of these
