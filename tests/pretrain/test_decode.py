import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pretrain.data.decode import ImageTransform, UndecodableImageError


def transform(**changes) -> ImageTransform:
    options = {
        "image_size": 16, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": False,
        "max_image_pixels": 10_000,
    }  # fmt: skip
    return ImageTransform(**{**options, **changes})


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes, **changes) -> np.ndarray:
    made = transform(**changes)
    return made(data, made.draw(0, np.asarray([0]))[0])


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (decoded(encoded(image, "PNG")) == 255).all()


def test_a_palette_with_a_transparent_colour_becomes_white():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30] * 256)
    assert (decoded(encoded(image, "PNG", transparency=0)) == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGB"])
def test_other_modes_become_rgb(mode):
    image = Image.new(mode, (16, 16), 0 if mode != "CMYK" else (0, 0, 0, 255))
    form = "JPEG" if mode == "CMYK" else "PNG"
    got = decoded(encoded(image, form))
    assert got.shape == (3, 16, 16)
    assert got.max() <= 2


def test_sixteen_bit_gray_is_scaled_and_not_cut():
    wide = Image.fromarray(np.full((16, 16), 32768, dtype=np.uint16))
    assert abs(int(decoded(encoded(wide, "PNG"))[0, 0, 0]) - 127) <= 1


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 32, 16))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    got = decoded(encoded(image, "JPEG", exif=exif, quality=95))
    assert got[:, :6].max() < 60
    assert got[:, 10:].min() > 195


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    got = decoded(data)
    assert got[0].min() > 200
    assert got[2].max() < 60


def test_a_pixel_bomb_is_refused_from_its_header():
    data = encoded(Image.new("L", (200, 200)), "PNG")
    with pytest.raises(UndecodableImageError, match="200 x 200 pixels are more than 10,000"):
        decoded(data)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named(data):
    with pytest.raises(UndecodableImageError):
        decoded(data)


def test_postscript_never_reaches_an_interpreter(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("gs was run"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UndecodableImageError):
        decoded(eps)


def test_a_truncated_jpeg_is_refused():
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    with pytest.raises(UndecodableImageError, match="truncated"):
        decoded(data[: len(data) // 2])


def test_scaled_decoding_stays_near_the_full_picture():
    gradient = np.linspace(0, 255, 512)[None, :, None].repeat(512, 0).repeat(3, 2).astype(np.uint8)
    image = Image.fromarray(gradient)
    got = decoded(encoded(image, "JPEG", quality=95), max_image_pixels=10**6).transpose(1, 2, 0)
    want = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 3


@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**50),
    st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
)  # fmt: skip
def test_a_crop_lies_inside_the_picture_with_the_area_asked_for(width, height, position, scale):
    made = transform(scale=tuple(scale), ratio=(0.75, 4 / 3))
    left, top, right, bottom = made._crop(width, height, made.draw(1, np.asarray([position]))[0])
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9


def test_half_of_the_positions_are_flipped_when_asked():
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    data = encoded(Image.fromarray(pixels), "PNG")
    made = transform(flip=True)
    drawn = made.draw(0, np.arange(400))
    flipped = sum(int(made(data, drawn[i])[0, 0, 0] == 0) for i in range(400))
    assert 150 < flipped < 250
