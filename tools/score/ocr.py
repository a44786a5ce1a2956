"""Text in pictures: where it is and what it says, by RapidOCR (PP-OCR models in its wheel; ONNX).

`pip install 'pairmill[ocr]'`; nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from evaluation.images import UndecodableImageError

PACKAGES = ("rapidocr", "onnxruntime")
MIN_SIDE_PIXELS = 16  # smaller pictures hold no text that could be read
# Its detector scales the shorter side up to 736: 16 x 1600 pixels would take 7 GB and minutes.
# RapidOCR itself widens what is wider than this; what is taller is padded here.
_MAX_ASPECT = 8
_MARGIN = 0.25  # of the height of a box: how far "what surrounds it" reaches


class Region(NamedTuple):
    """A piece of text: its corners (x, y) in pixels, clockwise, and what it says."""

    corners: tuple[tuple[float, float], ...]
    text: str
    confidence: float


def why_absent() -> str | None:
    """Say what is not installed; None where all is there."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    are = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {are} not installed: pip install 'pairmill[ocr]'"


def description() -> dict[str, str]:
    """Return the versions that what is read depends on."""
    return {name: version(name) for name in PACKAGES}


class Ocr:
    """Reads text; one engine a thread, which computes in one thread itself."""

    def __init__(self) -> None:
        self._local = threading.local()

    def _engine(self) -> Any:
        if not hasattr(self._local, "engine"):
            from rapidocr import RapidOCR

            one = "EngineConfig.onnxruntime"
            parameters = {
                "Global.log_level": "error",
                f"{one}.intra_op_num_threads": 1,
                f"{one}.inter_op_num_threads": 1,
            }
            self._local.engine = RapidOCR(params=parameters)
        return self._local.engine

    def regions(self, image: Image.Image) -> list[Region]:
        """Return the text in an RGB picture, from top to bottom.

        Raises UndecodableImageError where the library fails on it.
        """
        width, height = image.size
        if min(width, height) < MIN_SIDE_PIXELS:
            return []
        bgr_HW3 = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
        padding = max(0, -(-height // _MAX_ASPECT) - width)
        bgr_HW3 = np.pad(bgr_HW3, ((0, 0), (0, padding), (0, 0)))
        engine = self._engine()
        try:
            found = engine(bgr_HW3, use_det=True, use_cls=False, use_rec=True)
        except Exception as error:  # whatever its stages raise on a picture
            raise UndecodableImageError(f"its text cannot be read ({error})") from None
        if found.boxes is None or found.txts is None:
            return []
        regions = []
        for box, text, confidence in zip(found.boxes, found.txts, found.scores, strict=True):
            corners = tuple((min(float(x), width - 1.0), float(y)) for x, y in np.asarray(box))
            if min(x for x, _ in corners) < width - 1:  # not in the padding
                regions.append(Region(corners, str(text), float(confidence)))
        return regions


def _mask(size: tuple[int, int], regions: Sequence[Region]) -> npt.NDArray[np.bool_]:
    drawn = Image.new("1", size)
    draw = ImageDraw.Draw(drawn)
    for region in regions:
        draw.polygon(region.corners, fill=1)
    return np.array(drawn)


def area_share(size: tuple[int, int], regions: Sequence[Region]) -> float:
    """Return the share of a picture (width, height) that the boxes take, overlaps once."""
    return float(_mask(size, regions).mean()) if regions else 0.0


def paint_over(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """Return a copy with every region filled by the mean colour of what surrounds it.

    That is the pixels within a quarter of the box's height around it that belong to no region;
    where there are none, of all such pixels of the picture; and gray 128 where text is all.
    """
    is_text_HW = _mask(image.size, regions)
    pixels_HW3 = np.array(image)
    outside = pixels_HW3[~is_text_HW]
    everywhere = outside.mean(axis=0) if len(outside) else np.full(3, 128.0)
    painted_HW3 = pixels_HW3.copy()
    for region in regions:
        x, y = (np.array(axis) for axis in zip(*region.corners, strict=True))
        margin = max(2.0, _MARGIN * float(y.max() - y.min()))
        rows = slice(max(0, int(y.min() - margin)), int(y.max() + margin) + 1)
        columns = slice(max(0, int(x.min() - margin)), int(x.max() + margin) + 1)
        around = pixels_HW3[rows, columns][~is_text_HW[rows, columns]]
        color = around.mean(axis=0) if len(around) else everywhere
        painted_HW3[_mask(image.size, [region])] = np.round(color).astype(np.uint8)
    return Image.fromarray(painted_HW3)
