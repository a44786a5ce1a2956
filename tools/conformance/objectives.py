"""The objectives against numbers from the authors' own code, in float64 and at 1e-9.

`python -m tools.conformance objectives FOLDER`, with golden files as described in the README beside
them: NAME.npz of arrays `case/.../array`. Cases of any seed and size are read off their names;
where inputs.npz lacks a case, its features are drawn again from the seed. Files and quantities of
methods that are not objectives of ours are listed as not built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.model.features import Features
from pretrain.model.similarity import similarities
from pretrain.objectives import objectives
from pretrain.objectives.cloob import retrieve
from pretrain.objectives.group import Solo
from pretrain.objectives.infoloob import loob
from pretrain.objectives.rows import dot, unit
from tools.conformance.gradclip import check_gradclip
from tools.conformance.objective_ranks import on_ranks
from tools.conformance.table import Row, compare, not_built

ATOL = 1e-9
# "MERU clamps: matches the fork's entailment to 3.4e-8" (golden README); ours does not clamp.
MERU_ENTAILMENT_ATOL = 1e-7
CLIP_SCALE = 1 / 0.07
PUBLISHED = (CLIP_SCALE, 117.330765, -12.9324)  # SigLIP base/16: its deployments', the name's bias
TEACHER_SCALE = 50.0  # openclip_distill.json, clipkd.json


class Golden:
    """One file: its arrays by case, and the features that its cases share."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._folder = path.parent
        with np.load(path) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}

    def cases(self, pattern: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Yield the cases whose whole name matches, with what it says."""
        for case in sorted({key.rpartition("/")[0] for key in self.arrays}):
            match = re.fullmatch(pattern, case)
            if match:
                yield case, match

    def has(self, key: str) -> bool:
        """Whether there is such an array."""
        return key in self.arrays

    def leaf(self, key: str) -> Tensor:
        """Return an array of the file as an input that gradients are taken of."""
        return torch.tensor(self.arrays[key], dtype=torch.float64, requires_grad=True)

    def pair(self, case: str) -> tuple[Tensor, Tensor]:
        """Return the raw image and text features of a case `sSEED_bBATCH_dDIM/...`."""
        shape = case.split("/")[0]
        path = self._folder / "inputs.npz"
        if path.is_file():
            with np.load(path) as stored:
                if f"{shape}/img_raw" in stored.files and f"{shape}/txt_raw" in stored.files:
                    names = (f"{shape}/img_raw", f"{shape}/txt_raw")
                    image, text = (torch.tensor(stored[name]) for name in names)
                    return image.requires_grad_(), text.requires_grad_()
        seed, batch, dim = map(int, re.findall(r"\d+", shape)[:3])
        generator = torch.Generator().manual_seed(seed)
        image, noise = (
            torch.randn(batch, dim, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        text = 0.7 * image + 0.7 * noise
        return image.requires_grad_(), text.requires_grad_()

    def rows(self, case: str, ours: Mapping[str, Any], atol: float = ATOL) -> Iterator[Row]:
        """Compare those quantities that the file has for the case."""
        for quantity, value in ours.items():
            key = f"{case}/{quantity}"
            if key in self.arrays:
                mine = value.detach().numpy() if isinstance(value, Tensor) else value
                expected = self.arrays[key]
                yield compare(
                    f"{self.name} {case}",
                    quantity,
                    np.reshape(mine, expected.shape) if np.size(mine) == expected.size else mine,
                    expected,
                    atol=atol,
                )


class AsGiven:
    """A similarity whose features come embedded already: for gradients at that place."""

    def __init__(self, similarity: Any) -> None:
        self._similarity = similarity

    def embed_image(self, feature_nD: Tensor) -> Tensor:
        """Return the features themselves."""
        return feature_nD

    embed_text = embed_image

    def __getattr__(self, name: str) -> Any:
        return getattr(self._similarity, name)


def geometry(name: str, **keywords: Any) -> Any:
    """Return a similarity in float64."""
    similarity: Any = similarities[name](**keywords)
    for parameter, key in (("log_curvature", "curvature"),):
        if hasattr(similarity, parameter):  # the logarithm to 64 bits, not to the stored 32
            value = torch.tensor([keywords[key]], dtype=torch.float64).log()
            similarity.double()
            getattr(similarity, parameter).data = value
    return similarity


def scalar(value: float) -> Tensor:
    """Return a learned scalar."""
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def named(text: str) -> float:
    """Return a number from a case's name, which is rounded: 14.2857 stands for 1 / 0.07."""
    return next((value for value in PUBLISHED if text == f"{value:.4f}"), float(text))


def rounding(text: str) -> float:
    """Return how far a number may be from what a name says; names hold integers exactly."""
    is_known = named(text) in PUBLISHED or float(text).is_integer()
    return 0.0 if is_known else 0.5 * 10.0 ** -len(text.partition(".")[2])


def loss_of(name: str, features: Features, similarity: Any, **keywords: Any) -> Tensor:
    """Return the registered objective's loss in one process."""
    return objectives[name](**keywords).loss(features, similarity=similarity, group=Solo())


def slopes(loss: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the loss, named grad_NAME."""
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, retain_graph=True)
    return {
        f"grad_{name}": torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(inputs.items(), found, strict=True)
    }


def leaf(tensor: Tensor) -> Tensor:
    """Return an input with these values."""
    return tensor.detach().clone().requires_grad_()


def check_infonce(golden: Golden) -> Iterator[Row]:
    """clip_infonce: scales in the names of the cases."""
    for case, match in golden.cases(r"s\d+_b\d+_d\d+/scale([\d.]+)"):
        log_scale, cosine = scalar(np.log(named(match[1]))), geometry("cosine")
        image, text = golden.pair(case)
        loss = loss_of("clip", Features(image, text, log_scale.exp()), cosine)
        yield from golden.rows(
            case,
            {"loss": loss, **slopes(loss, img_raw=image, txt_raw=text, log_scale=log_scale)},
        )
        image, text = leaf(unit(image)), leaf(unit(text))
        loss = loss_of("clip", Features(image, text, log_scale.exp()), AsGiven(cosine))
        yield from golden.rows(case, slopes(loss, img_unit=image, txt_unit=text))


def check_siglip(golden: Golden) -> Iterator[Row]:
    """Siglip, ring and gather: allowed is what an unknown scale's or bias's rounding changes."""
    for case, match in golden.cases(r"s\d+_b\d+_d\d+/scale([\d.]+)_bias(-?[\d.]+)"):
        scale, bias = named(match[1]), named(match[2])
        for exchange in ("ring", "gather"):
            ours = siglip_quantities(golden.pair(case), scale, bias, exchange)
            ends = ((scale + rounding(match[1]), bias), (scale, bias + rounding(match[2])))
            moved = [siglip_quantities(golden.pair(case), *end, exchange) for end in ends]
            for key, value in ours.items():
                allowed = sum(float((other[key] - value).detach().abs().max()) for other in moved)
                yield from golden.rows(case, {key: value}, atol=ATOL + 1.01 * allowed)


def siglip_quantities(
    pair: tuple[Tensor, Tensor], scale: float, bias: float, exchange: str
) -> dict[str, Tensor]:
    """Return the loss and its gradients, by raw features and by those of length 1."""
    cosine = geometry("cosine")
    image, text = (leaf(raw) for raw in pair)
    log_scale, own_bias = scalar(np.log(scale)), scalar(bias)
    features = Features(image, text, log_scale.exp(), own_bias)
    loss = loss_of("siglip", features, cosine, exchange=exchange)
    inputs = {"img_raw": image, "txt_raw": text, "log_scale": log_scale, "bias": own_bias}
    found = {"loss": loss, **slopes(loss, **inputs)}
    image, text = leaf(unit(image)), leaf(unit(text))
    features = Features(image, text, log_scale.exp(), own_bias)
    loss = loss_of("siglip", features, AsGiven(cosine), exchange=exchange)
    return {**found, **slopes(loss, img_unit=image, txt_unit=text)}


def check_cloob(golden: Golden) -> Iterator[Row]:
    """CLOOB: retrievals, both terms, total, gradients, also of the inverse temperature."""
    for case, match in golden.cases(r"s\d+_b\d+_d\d+/invtau([\d.]+)_hop([\d.]+)"):
        beta, cosine = float(match[2]), geometry("cosine")
        image, text = golden.pair(case)
        inv_tau = scalar(float(match[1]))
        loss = loss_of("cloob", Features(image, text, inv_tau), cosine, beta=beta)
        inputs = {"img_raw": image, "txt_raw": text, "inv_tau": inv_tau}
        yield from golden.rows(case, {"loss": loss, **slopes(loss, **inputs)})
        x, y = leaf(unit(image)), leaf(unit(text))
        loss = loss_of("cloob", Features(x, y, inv_tau), AsGiven(cosine), beta=beta)
        yield from golden.rows(case, slopes(loss, img_unit=x, txt_unit=y))
        found = {
            "p_xx": retrieve(x, x, beta),
            "p_yy": retrieve(y, y, beta),
            "p_xy": retrieve(y, x, beta),
            "p_yx": retrieve(x, y, beta),
        }
        for name, a, c in (("loss_img", "p_xx", "p_xy"), ("loss_txt", "p_yy", "p_yx")):
            found[name] = loob(found[a], found[c], inv_tau, dot, Solo(), chunk_rows=512)
        yield from golden.rows(case, found)


def check_openclip_distill(golden: Golden) -> Iterator[Row]:
    """open_clip's distillation: the cross entropy to the teacher's softmax."""
    cosine = AsGiven(geometry("cosine"))
    for case, _ in golden.cases(r"s\d+_b\d+_d\d+"):
        image, text = (leaf(unit(raw)) for raw in golden.pair(case))
        features = Features(image, text, scalar(CLIP_SCALE))
        features = features._replace(**teacher_of(golden, case, image, text))
        contrastive = loss_of("clip", features, cosine)
        distill = loss_of("distill_relation", features, cosine, divergence="cross_entropy")
        yield from golden.rows(
            case,
            {
                "contrastive": contrastive,
                "distill": distill,
                **slopes(contrastive + distill, img_unit=image, txt_unit=text),
            },
        )


def teacher_of(golden: Golden, case: str, image: Tensor, text: Tensor) -> dict[str, Any]:
    """Return the fields that hold a case's teacher; students are projected where the file does."""
    teacher_image = unit(golden.leaf(f"{case}/teacher_img_raw").detach())
    teacher_text = unit(golden.leaf(f"{case}/teacher_txt_raw").detach())
    students = []
    for name, feature in (("visual", image), ("text", text)):
        key = f"{case}/param_{name}_proj"
        if golden.has(f"{key}_weight"):
            weight, bias = golden.leaf(f"{key}_weight"), golden.leaf(f"{key}_bias")
            feature = torch.nn.functional.linear(feature, weight, bias)
        students.append(feature)
    key = f"{case}/param_cross_logit_scale"
    cross = golden.arrays[key] if golden.has(key) else 1.0
    return {
        "teacher_image_bE": teacher_image,
        "teacher_text_bE": teacher_text,
        "teacher_scale": torch.tensor([TEACHER_SCALE], dtype=torch.float64),
        "student_image_bE": students[0],
        "student_text_bE": students[1],
        "cross_scale": torch.tensor([float(cross)], dtype=torch.float64),
    }


def check_clipkd(golden: Golden) -> Iterator[Row]:
    """CLIP-KD: its task, CRD, ICL and FD; the weights are multiplied in."""
    built: dict[str, tuple[str, float]] = {
        "task": ("clip", 1.0),
        "ckd": ("distill_relation", 1.0),
        "icl": ("distill_interaction", 1.0),
        "fd": ("distill_feature", 2000.0),
    }
    cosine = geometry("cosine")
    for case, _ in golden.cases(r"s\d+_b\d+_d\d+/tdim\d+"):
        image, text = golden.pair(case)
        features = Features(image, text, scalar(CLIP_SCALE))
        features = features._replace(**teacher_of(golden, case, image, text))
        for term, (name, weight) in built.items():
            loss = weight * loss_of(name, features, cosine)
            found = slopes(loss, img_raw=image, txt_raw=text)
            renamed = {f"{quantity}_{term}": value for quantity, value in found.items()}
            yield from golden.rows(case, {term: loss, **renamed})
        for term in ("cross_kd", "gd", "afd"):
            if golden.has(f"{case}/{term}"):
                yield not_built(f"{golden.name} {case}", term)


def check_tripletclip(golden: Golden) -> Iterator[Row]:
    """TripletCLIP and NegCLIP; the gradients are those of TripletCLIP."""
    cosine = geometry("cosine")
    for case, _ in golden.cases(r"s\d+_b\d+_d\d+"):
        image, text = golden.pair(case)
        negative_image = golden.leaf(f"{case}/neg_img_raw")
        negative_text = golden.leaf(f"{case}/neg_txt_raw")
        features = Features(
            image,
            text,
            scalar(CLIP_SCALE),
            negative_image_bD=negative_image,
            negative_text_bD=negative_text,
        )
        loss = loss_of("triplet", features, cosine)
        inputs = {
            "img_raw": image,
            "txt_raw": text,
            "neg_img_raw": negative_image,
            "neg_txt_raw": negative_text,
        }
        found = {"triplet": loss, "negclip": loss_of("negclip", features, cosine)}
        yield from golden.rows(case, {**found, **slopes(loss, **inputs)})


def check_longclip(golden: Golden) -> Iterator[Row]:
    """Long-CLIP's long-caption loss: InfoNCE with label smoothing 0.1."""
    cosine = geometry("cosine")
    for case, _ in golden.cases(r"s\d+_b\d+_d\d+/loss"):
        image, text = golden.pair(case)
        features = Features(image, text, scalar(CLIP_SCALE))
        loss = loss_of("clip", features, cosine, label_smoothing=0.1)
        found = slopes(loss, img_raw_long=image, txt_raw_long=text)
        yield from golden.rows(case, {"loss_long": loss, **found})
        yield not_built(f"{golden.name} {case}", "loss_short (PCA of the image features)")
    for case, _ in golden.cases(r"s\d+_L\d+_D\d+"):
        yield not_built(f"{golden.name} {case}", "stretched positions")


def check_distributed(golden: Golden) -> Iterator[Row]:
    """Several real gloo ranks, one launch for each world size; open_clip's exact settings."""
    worlds = {
        int(case[2:]): (golden.arrays[f"{case}/img_raw"], golden.arrays[f"{case}/txt_raw"])
        for case, _ in golden.cases(r"ws\d+")
    }
    for size, pair in sorted(worlds.items()):
        clip, *siglips = on_ranks(size, pair)
        found = {"clip_local1_gwg1": clip} | {
            f"siglip_{name}": siglips[name == "gather"]
            for name in ("bidir", "shift", "reduce", "gather")
        }
        for rank in range(size):
            for name, ours in found.items():
                yield from golden.rows(f"ws{size}/rank{rank}/{name}", ours[rank])
            # The whole loss on every rank: the mean over ranks of ours.
            whole: dict[str, Any] = {
                key: np.mean([ours[key] for ours in clip], axis=0)
                for key in ("loss", "grad_log_scale")
            }
            case = f"ws{size}/rank{rank}/clip_local0_gwg1"
            same = {key: clip[rank][key] for key in ("grad_img_raw", "grad_txt_raw")}
            yield from golden.rows(case, {**whole, **same})
        for name in ("clip_local0_gwg0", "clip_local1_gwg0"):
            if golden.has(f"ws{size}/rank0/{name}/loss"):
                yield not_built(f"{golden.name} ws{size}", f"{name}: inexact gradients")


def check(folder: Path) -> Iterator[Row]:
    """Yield one row a quantity for every file of a known name in the folder."""
    from tools.conformance.objective_geometries import check_euclip, check_meru
    from tools.conformance.objective_views import check_aclip, check_slip

    checks: dict[str, Callable[[Golden], Iterator[Row]]] = {
        "clip_infonce": check_infonce,
        "siglip": check_siglip,
        "openclip_distill": check_openclip_distill,
        "distributed": check_distributed,
        "cloob": check_cloob,
        "aclip": check_aclip,
        "euclip": check_euclip,
        "meru": check_meru,
        "clipkd": check_clipkd,
        "slip": check_slip,
        "tripletclip": check_tripletclip,
        "longclip": check_longclip,
    }
    for path in sorted(folder.glob("*.npz")):
        if path.stem in checks:
            yield from checks[path.stem](Golden(path))
        elif path.stem == "gradclip":
            yield from check_gradclip(path)
        elif path.stem != "inputs":
            yield not_built(path.stem, "the whole file")
