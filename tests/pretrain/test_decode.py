import io
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pretrain.data.augment import ImageTransform
from pretrain.data.decode import UndecodableImageError, open_image, scale_for

PHOTOS = Path(__file__).resolve().parents[3] / "shared/data/photos-flickr/train.tar"


def transform(**changes) -> ImageTransform:
    options = {
        "image_size": 16,
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "max_image_pixels": 10_000,
    }
    return ImageTransform(**{**options, **changes})


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes, position: int = 0, **changes) -> np.ndarray:
    made = transform(**changes)
    return made(data, made.draw(0, np.asarray([position]))[0]).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, ((a.astype(float) - b.astype(float)) ** 2).mean()))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with detail at every scale: random blocks of 2 to 64 pixels, one on another."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for block in (2, 8, 32, 64):
        small = rng.normal(0, 10 * block**0.4, (-(-height // block), -(-width // block), 3))
        total += np.kron(small, np.ones((block, block, 1)))[:height, :width]
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (decoded(encoded(image, "PNG")) == 255).all()


def test_a_palette_with_a_transparent_colour_becomes_white():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30] * 256)
    assert (decoded(encoded(image, "PNG", transparency=0)) == 255).all()


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_half_transparent_pixels_are_composed_on_white(mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    if mode == "PA":
        data = encoded(image, "WEBP", lossless=True)
    else:
        data = encoded(image.convert(mode), "PNG")
    assert abs(int(decoded(data)[0, 8, 8]) - 127) <= 1


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGB"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_other_modes_become_rgb(mode, form):
    if (mode, form) == ("CMYK", "PNG"):
        form = "TIFF"
    dark = (0, 0, 0, 255) if mode == "CMYK" else 0
    got = decoded(encoded(Image.new(mode, (16, 16), dark), form))
    assert got.shape == (3, 16, 16)
    assert got.max() <= 2


def test_a_cmyk_jpeg_has_the_colours_that_pillow_gives_it():
    image = noise(64, 48).convert("CMYK")
    data = encoded(image, "JPEG", quality=95)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(open_image(data, max_image_pixels=10**6).pixels(), want)


def test_sixteen_bit_gray_is_scaled_and_not_cut():
    for level in (32768, 100):  # a nearly black one stays nearly black
        wide = Image.fromarray(np.full((16, 16), level, dtype=np.uint16))
        assert abs(int(decoded(encoded(wide, "PNG"))[0, 0, 0]) - level // 257) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_applied_as_pillow_applies_it(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(96, 64), form, exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    opened = open_image(data, max_image_pixels=10**6)
    assert (opened.height, opened.width) == want.shape[:2]
    assert np.abs(opened.pixels().astype(int) - want).max() <= 3
    made = transform(image_size=8, max_image_pixels=10**6)
    small = made(data, made.draw(0, np.asarray([0]))[0]).numpy()
    left = (want.shape[1] - 64) // 2
    top = (want.shape[0] - 64) // 2
    square = Image.fromarray(want[top : top + 64, left : left + 64])
    assert psnr(small.transpose(1, 2, 0), np.asarray(square.resize((8, 8), 3))) > 25


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    got = decoded(data)
    assert got[0].min() > 200
    assert got[2].max() < 60


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_pixel_bomb_is_refused_from_its_header(form):
    data = encoded(Image.new("L", (200, 200)), form)
    with pytest.raises(
        UndecodableImageError, match="200 x 200 pixels are more than 10,000"
    ) as found:
        decoded(data)
    assert found.value.kind == "too many pixels"


def test_a_bomb_of_gigapixels_costs_its_header_only():
    header = b"IHDR" + (60_000).to_bytes(4) + (60_000).to_bytes(4) + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4)
    body = b"IDAT" + zlib.compress(bytes(10**6))
    data += (len(body) - 4).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)
    with pytest.raises(UndecodableImageError, match="3600000000 pixels") as found:
        decoded(data, max_image_pixels=10**8)
    assert found.value.kind == "too many pixels"


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_named(data):
    with pytest.raises(UndecodableImageError) as found:
        decoded(data)
    assert found.value.kind == "undecodable image"


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


def test_bytes_after_the_end_of_a_jpeg_do_no_harm():
    data = encoded(noise(64, 64), "JPEG")
    assert np.array_equal(decoded(data), decoded(data + b"\0" * 1000 + b"junk"))


@pytest.mark.parametrize(
    ("size", "pixels", "scale"),
    [((500, 375), 224, 1), ((500, 375), 126, 1), ((500, 375), 112, 2), ((2000, 1500), 224, 4),
     ((2000, 1500), 112, 8), ((601, 399), 20, 8)],
)  # fmt: skip
def test_scaled_decoding_stays_near_the_resized_whole_picture(size, pixels, scale):
    data = encoded(noise(*size), "JPEG", quality=90)
    opened = open_image(data, max_image_pixels=10**8)
    side = min(size)
    assert scale_for(side, pixels) == scale
    assert opened.pixels(scale).shape == (-(-size[1] // scale), -(-size[0] // scale), 3)
    got = decoded(data, image_size=pixels, max_image_pixels=10**8, crop="center")
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    box = transform(image_size=pixels, crop="center").box(*size, np.zeros(48))
    assert abs(box.width - side) <= scale
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    want = whole.resize((pixels, pixels), 3, box=corners)
    assert psnr(got.transpose(1, 2, 0), np.asarray(want)) >= 30


@pytest.mark.skipif(not PHOTOS.is_file(), reason=f"{PHOTOS} is not here")
@pytest.mark.parametrize("pixels", [32, 64, 112, 224])
def test_photographs_are_within_35_db_of_pillows_bicubic(pixels):
    """Random crops as drawn, the box given to Pillow on the whole picture."""
    made = transform(
        image_size=pixels, scale=(0.4, 1.0), ratio=(0.75, 4 / 3), max_image_pixels=10**8
    )
    found = []
    with tarfile.open(PHOTOS) as tar:
        for member in tar:
            if not member.name.endswith(".jpg") or zlib.crc32(member.name.encode()) % 12:
                continue
            data = tar.extractfile(member).read()
            drawn = made.draw(0, np.asarray([len(found)]))[0]
            whole = Image.open(io.BytesIO(data)).convert("RGB")
            box = made.box(*whole.size, drawn)
            corners = (box.left, box.top, box.left + box.width, box.top + box.height)
            want = np.asarray(whole.resize((pixels, pixels), 3, box=corners))
            found.append(psnr(made(data, drawn).numpy().transpose(1, 2, 0), want))
    assert len(found) > 200
    assert np.mean(found) >= 35
    if pixels >= 64:  # no scaled decoding at this size
        assert min(found) >= 45


@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**50),
    st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
    st.sampled_from(["random", "center", "squash"]),
)  # fmt: skip
def test_a_crop_lies_inside_the_picture(width, height, position, scale, crop):
    made = transform(scale=tuple(scale), ratio=(0.75, 4 / 3), crop=crop)
    box = made.box(width, height, made.draw(1, np.asarray([position]))[0])
    assert 0 <= box.left < box.left + box.width <= width
    assert 0 <= box.top < box.top + box.height <= height


def test_crops_have_the_areas_and_aspects_asked_for():
    made = transform(image_size=224, scale=(0.3, 0.6), ratio=(0.75, 4 / 3))
    drawn = made.draw(0, np.arange(500))
    boxes = [made.box(400, 300, row) for row in drawn]
    areas = np.asarray([b.width * b.height / 120_000 for b in boxes])
    assert 0.29 < areas.min() < 0.33
    assert 0.57 < areas.max() < 0.61
    aspects = np.asarray([b.width / b.height for b in boxes])
    assert 0.74 < aspects.min() < 0.8
    assert 1.26 < aspects.max() < 1.35


def test_squash_takes_all_of_the_picture():
    image = Image.new("RGB", (64, 16))
    image.paste((255, 255, 255), (0, 0, 8, 16))
    assert decoded(encoded(image, "PNG"), crop="squash")[0, 8, 0] == 255
    assert decoded(encoded(image, "PNG"), crop="center")[0, 8, 0] == 0


def test_half_of_the_positions_are_flipped_when_asked():
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    data = encoded(Image.fromarray(pixels), "PNG")
    made = transform(flip=True)
    drawn = made.draw(0, np.arange(400))
    flipped = sum(int(made(data, drawn[i])[0, 0, 0] == 0) for i in range(400))
    assert 150 < flipped < 250


def test_jitter_and_gray_come_as_often_as_asked_and_only_then():
    data = encoded(Image.new("RGB", (16, 16), (200, 100, 50)), "PNG")
    plain = decoded(data)
    made = transform(jitter=(0.3, 0.3, 0.3, 0.05), jitter_probability=0.8, gray_probability=0.2)
    drawn = made.draw(0, np.arange(300))
    got = [made(data, row).numpy() for row in drawn]
    gray = sum(bool((x[0] == x[1]).all() and (x[1] == x[2]).all()) for x in got)
    untouched = sum(np.array_equal(x, plain) for x in got)
    assert 35 < gray < 90
    assert 25 < untouched < 75
    again = made(data, made.draw(0, np.arange(300))[7]).numpy()
    assert np.array_equal(again, got[7])


def changed_colours() -> list[int]:
    changes = {"jitter_probability": 1.0, "gray_probability": 0.5, "blur_probability": 0.5}
    pictures = [
        decoded(encoded(noise(16, 16), "PNG"), position, jitter=(0.4, 0.4, 0.4, 0.1), **changes)
        for position in range(8)
    ]
    return [int(picture.sum()) for picture in pictures]


def test_colours_change_in_a_process_that_imported_nothing_but_this():
    """As a loader worker: beside CPU torch the import of torchvision must be prepared first."""
    code = "from tests.pretrain.test_decode import changed_colours\nprint(changed_colours())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{changed_colours()}\n", done.stderr[-2000:]


def test_each_strength_of_jitter_is_torchvisions():
    from torchvision.transforms.v2 import functional as colour

    data = encoded(noise(16, 16), "PNG")
    plain = torch.from_numpy(decoded(data))
    for kind, name in enumerate(["brightness", "contrast", "saturation", "hue"]):
        jitter = tuple(0.4 if i == kind else 0.0 for i in range(4))
        made = transform(jitter=jitter, jitter_probability=1.0)
        drawn = made.draw(0, np.asarray([5]))[0]
        factor = (0.0 if kind == 3 else 1.0) - 0.4 + 0.8 * drawn[43 + kind]
        want = getattr(colour, f"adjust_{name}")(plain, factor)
        assert torch.equal(made(data, drawn), want)
        assert not torch.equal(want, plain)


def test_blur_comes_as_often_as_asked_with_sigmas_over_the_whole_range():
    point = np.zeros((33, 33, 3), dtype=np.uint8)
    point[16, 16] = 255
    made = transform(image_size=33, blur_probability=0.5, blur_sigma=(0.5, 2.0))
    data = encoded(Image.fromarray(point), "PNG")
    got = [made(data, row)[0].numpy() for row in made.draw(0, np.arange(300), 1)]
    middles = np.asarray([int(x[16, 16]) for x in got])
    assert 115 < (middles < 255).sum() < 185
    # The middle of a sampled Gaussian: the square of 1 / sum of exp(-k^2 / (2 sigma^2)).
    at = [255 / np.exp(-(np.arange(-9, 10) ** 2) / (2 * s * s)).sum() ** 2 for s in (0.5, 2.0)]
    blurred = middles[middles < 255]
    assert at[1] - 1 <= blurred.min() < at[1] + 2
    assert at[0] - 20 < blurred.max() <= at[0] + 1
    assert all(np.abs(x.astype(float) - x.T).max() <= 1 for x in got)
    assert all(225 < x.sum() < 290 for x in got)  # blurring keeps the sum, to the rounding


@pytest.mark.parametrize("side", [1, 2, 5])
def test_blur_wider_than_the_picture_is_cut_to_it(side):
    made = transform(image_size=side, blur_probability=1.0, blur_sigma=(4.0, 4.0))
    data = encoded(Image.new("RGB", (side, side), (200, 100, 50)), "PNG")
    x = made(data, made.draw(0, np.asarray([3]))[0])
    assert x[:, 0, 0].tolist() == [200, 100, 50]


def test_views_of_one_position_are_drawn_apart():
    made = transform()
    one, two = (made.draw(0, np.arange(5), view) for view in (0, 1))
    assert (one != two).all()


def test_evaluation_preprocessing_is_open_clips_to_the_bit():
    """Evaluation runs open_clip's own transform; what it shares with training is the model's
    normalization.
    """
    from open_clip.transform import image_transform

    from evaluation.encoder import PreprocessCfg, image_transform_v2

    image = noise(300, 200)
    ours = image_transform_v2(PreprocessCfg(size=224), is_train=False)(image)
    assert torch.equal(ours, image_transform(224, is_train=False)(image))
