"""The similarities by hand, safe in every precision, and carried by checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.errors import CheckpointError
from configs.load import validate
from evaluation.encoder import load_encoder
from evaluation.ranking import FeatureScores
from pretrain.checkpoint import export_model
from pretrain.config import PretrainConfig
from pretrain.model.clip import ClipModel
from pretrain.model.features import Features
from pretrain.model.logits import Logits
from pretrain.model.similarity import load_similarity, similarities
from pretrain.model.tokenizer import Tokenizer
from pretrain.objectives.group import Solo
from pretrain.run_tokenizer import with_tokenizer
from tests.pretrain.conftest import TINY_MODEL
from tests.pretrain.objective_rows import IDS, ROWS, TEACHER_DIM, total_of

SCORES = ("distance", "squared", "inner")
GEOMETRIES = [
    {"name": "cosine"},
    {"name": "elliptic"},
    *({"name": "euclidean", "score": score} for score in SCORES),
    *({"name": "lorentz", "score": score, "curvature": 0.7} for score in SCORES),
]


def similarity_from(section):
    keywords = dict(section)
    return similarities[keywords.pop("name")](**keywords)


def scores(section, image, text):
    similarity = similarity_from(section)
    image, text = (torch.tensor(rows, dtype=torch.float64) for rows in (image, text))
    found = similarity.scores(similarity.embed_image(image), similarity.embed_text(text))
    return found.detach().numpy()


def test_angles_distances_and_products_worked_by_hand():
    """D = 4, so the towers' outputs are halved: (6, 8) becomes (3, 4)."""
    image, text = [[6.0, 8.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0], [6.0, 0.0, 0.0, 0.0]]
    assert scores({"name": "euclidean", "score": "distance"}, image, text)[0] == pytest.approx(
        [-5, -4]
    )
    assert scores({"name": "euclidean"}, image, text)[0] == pytest.approx([-25, -16])
    assert scores({"name": "euclidean", "score": "inner"}, image, text)[0] == pytest.approx([0, 9])
    assert scores({"name": "elliptic"}, image, text)[0, 1] == pytest.approx(-math.acos(0.6))


def test_from_the_origin_the_hyperbolic_distance_is_the_tangents_length():
    """The exponential map keeps lengths from the origin, at any curvature: d(0, exp(v)) = |v|."""
    for curvature in (0.3, 1.0, 4.0):
        section = {"name": "lorentz", "curvature": curvature}
        found = scores(section, [[0.0] * 4], [[1.2, 1.6, 0.0, 0.0]])
        assert found[0, 0] == pytest.approx(-1.0, abs=1e-7)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([0.3, 1.0, 3.0]))
def test_hyperbolic_distances_obey_the_triangle_and_the_maps_are_inverse(seed, curvature):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    similarity = similarity_from({"name": "lorentz", "curvature": curvature})
    points = similarity.embed_image(raw)
    d = -similarity.scores(points, points).detach().numpy()
    assert d[0, 2] <= d[0, 1] + d[1, 2] + 1e-9
    assert np.allclose(d, d.T)
    assert torch.allclose(similarity.to_tangent(points), raw * 6**-0.5, atol=1e-12)


def test_for_unit_vectors_the_squared_distance_is_the_cosine():
    unit = torch.nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=-1)
    similarity = similarity_from({"name": "euclidean"})
    assert torch.allclose(similarity.scores(unit, unit), 2 * unit @ unit.T - 2, atol=1e-12)


def test_a_class_is_the_mean_of_its_prompts_as_each_geometry_takes_it():
    prompts = torch.tensor([[[4.0, 0, 0, 0], [0, 2.0, 0, 0]]])  # lengths 4 and 2
    mean = torch.tensor([[2.0, 1.0, 0, 0]])
    cosine = similarity_from({"name": "cosine"})
    assert torch.allclose(cosine.class_vectors(prompts)[0, :2], torch.tensor([0.5, 0.5]).sqrt())
    assert torch.equal(similarity_from({"name": "euclidean"}).class_vectors(prompts), mean / 2)
    lorentz = similarity_from({"name": "lorentz"})
    assert torch.equal(lorentz.class_vectors(prompts), lorentz.embed_text(mean))


def test_cones_open_towards_the_images_that_a_text_entails():
    similarity = similarity_from({"name": "euclidean"})
    text = torch.tensor([[1.0, 0.0]]).expand(3, -1)
    image = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    angles = similarity.exterior_angle(text, image)
    assert angles.tolist() == pytest.approx([0.0, math.pi / 2, math.pi], abs=1e-3)
    apertures = similarity.half_aperture(torch.tensor([[0.2, 0.0], [0.05, 0.0]]), 0.1)
    assert apertures.tolist() == pytest.approx([math.asin(0.5), math.pi / 2])


def extreme_rows(dtype):
    """Coincident, zero, opposite, tiny and huge rows: [rows, 32]."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 32, generator=generator)
    sizes = [1, 1, 1, 0, 0, -1, 1e-30, 1e-6, 1e4, 1e4, 1e18, -1e30, 1e38]
    return torch.cat([base.clamp(-1, 1) * size for size in sizes]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("objective", "similarity"), ROWS, ids=IDS)
def test_no_objective_gives_nan_for_coincident_zero_tiny_or_huge_features(
    objective, similarity, dtype
):
    total, geometry = total_of(objective), similarity_from(similarity)
    rows = extreme_rows(dtype)
    students = ("student_image_bE", "student_text_bE")
    leaves = {
        name: rows[:, : TEACHER_DIM if name in students else None].clone().requires_grad_()
        for name in Features._fields
        if name.endswith(("_bD", "_bP")) or name in students
    }
    teacher = torch.nn.functional.normalize(rows[:, :TEACHER_DIM].float().clamp(-1e3, 1e3), dim=-1)
    for start in (0.01, 100.0):
        scale = torch.tensor([start]).requires_grad_()
        features = Features(
            **leaves,
            logit_scale=scale,
            logit_bias=torch.tensor([-10.0]),
            teacher_image_bE=teacher,
            teacher_text_bE=teacher,
            teacher_scale=torch.tensor([100.0]),
            cross_scale=torch.tensor([100.0]),
            progress=0.5,
        )
        loss = total(features, similarity=geometry, group=Solo()).loss
        loss.backward()
        inputs = [*leaves.values(), scale, *geometry.parameters()]
        assert math.isfinite(loss.item())
        for tensor in inputs:
            assert tensor.grad is None or bool(torch.isfinite(tensor.grad).all())
            tensor.grad = None


def test_features_that_are_not_finite_are_not_hidden():
    for section in GEOMETRIES:
        raw = torch.tensor([[1.0, math.inf, 0.0, 0.0]])
        assert similarity_from(section).embed_image(raw).isnan().any(), section


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_words(["a red square", "a blue one"], vocab_size=40, context_length=8)


@pytest.mark.parametrize("section", GEOMETRIES, ids=str)
def test_a_checkpoint_of_each_geometry_evaluates_to_the_same_numbers(section, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = {**with_tokenizer(TINY_MODEL, tokenizer), "final_norm": section["name"] != "euclidean"}
    model = ClipModel(config, similarity_from(section), logits=Logits(3.0, -1.0)).eval()
    for parameter in model.similarity.parameters():
        parameter.data += 0.123
    folder = tmp_path / "model"
    folder.mkdir()
    model.save(folder, dict(model.named_parameters()))
    tokenizer.save(folder)
    assert all(not p.requires_grad for p in load_similarity(folder).parameters())

    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    texts = ["a red square", "a blue one", "red"]
    with torch.no_grad():
        image = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        got = model(image, tokenizer([*texts, "a", "one"]))
        s = model.similarity
        expected = s.scores(s.embed_image(got.image_bD), s.embed_text(got.text_bD))[:, :3]
    encoder = load_encoder(str(folder), device="cpu")
    batch = torch.stack([encoder.transform(Image.fromarray(p)) for p in pixels])
    classes = encoder.similarity.class_vectors(encoder.encode_texts(texts)[:, None])
    image = encoder.similarity.embed_image(encoder.encode_images(batch))
    scored = FeatureScores(image, classes, encoder.similarity)
    assert torch.allclose(scored.image_rows(0, 5), expected, atol=1e-5)
    assert scored.image_rows(0, 5).argmax(1).equal(expected.argmax(1))
    assert encoder.model.logit_bias.item() == -1.0

    if section["name"] == "cosine":
        again = load_encoder(str(export_model(folder, tmp_path / "exported")), device="cpu")
        assert torch.equal(again.encode_images(batch), encoder.encode_images(batch))
        return
    with pytest.raises(CheckpointError, match=f"geometry {section['name']}"):
        export_model(folder, tmp_path / "exported")
    import open_clip

    with pytest.raises(TypeError, match=r"needs_pairmill|final_norm"):
        open_clip.create_model(f"local-dir:{folder}")


def test_the_learned_geometry_is_written_with_its_values(tokenizer, tmp_path):
    similarity = similarity_from({"name": "lorentz", "curvature": 0.5, "image_scale": 2.0})
    model = ClipModel(with_tokenizer(TINY_MODEL, tokenizer), similarity)
    model.save(tmp_path, dict(model.named_parameters()))
    stored = json.loads((tmp_path / "open_clip_config.json").read_text())["pairmill"]["similarity"]
    assert stored["curvature"] == pytest.approx(0.5)
    assert stored["image_scale"] == pytest.approx(2.0)
    assert stored["score"] == "distance"


def test_a_run_starts_scale_and_bias_where_its_papers_do():
    def logits(similarity="cosine", **changes):
        tree = {
            "name": "t",
            "output": "o",
            "data": {"manifest": "m"},
            "model": "glyph-vit-s",
            "global_batch_size": 8,
            "samples": 8,
            "objective": {"name": "clip"},
            "similarity": {"name": similarity},
            **changes,
        }
        config = validate(tree, PretrainConfig, label="t")
        return config.logits(config.similarity.build().initial_logit_scale)

    assert logits() == Logits(1 / 0.07)
    assert logits("euclidean") == Logits(1.0)
    assert logits(objective={"name": "siglip"}) == Logits(10.0, -10.0)
    assert logits(objective={"name": "cloob"}) == Logits(30.0, None, learnable=False)
    assert logits(objective={"name": "siglip"}, logit={"bias": -5.0}) == Logits(10.0, -5.0)
