"""A-CLIP's attentive masking: by hand, against torch's own attention, and in the trainer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError
from pretrain.data.augment import Box, ImageTransform
from pretrain.model.attentive import MeanTower, attention_scores, kept_patches, view_scores
from pretrain.model.clip import ClipModel
from pretrain.model.features import Features
from pretrain.model.geometries import Cosine
from pretrain.objectives.aclip import byol_loss, clip_views_loss
from pretrain.objectives.clip import clip_loss
from pretrain.objectives.group import Solo
from pretrain.reduction.image import AttentivePatches
from pretrain.state_files import StateReader
from tests.pretrain.conftest import TINY_MODEL, make_config
from tests.pretrain.test_train import equal, rows, train, weights

ACLIP = {
    "objective": [
        {"name": "clip_views"}, {"name": "simclr"}, {"name": "byol", "weight": 2.0},
    ],
    "reduction": {"name": "attentive", "mask_ratio": 0.5, "momentum": 0.9},
    "augmentation": {"crop": "enclosing"},
    "view_head_width": 16,
}  # fmt: skip
VIEW = {"crop": "random", "scale": [0.5, 1.0], "flip": True}


def test_the_blocks_with_the_highest_mean_score_stay():
    """Means of the 2 x 2 blocks: 4, 1, 1, 9 (a single high patch counts a quarter). Two stay."""
    score = torch.tensor([
        [4, 4, 0, 0],
        [4, 4, 4, 0],
        [1, 1, 9, 9],
        [1, 1, 9, 9.0],
    ])  # fmt: skip
    assert kept_patches(score.view(1, 16), 4, 2, 2).tolist() == [[0, 1, 4, 5, 10, 11, 14, 15]]
    # Of the equal ones the first: blocks 0, 1 and 3.
    three = kept_patches(score.view(1, 16), 4, 2, 3)[0].tolist()
    assert three == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 14, 15]
    paper = AttentivePatches(0.5, 2, 0.996)
    assert (paper.num_blocks(14), paper.num_kept(14)) == (25, 100)
    with pytest.raises(ConfigError, match="7 x 7 patches do not divide into windows of 2 x 2"):
        paper.num_kept(7)


def test_the_scores_of_a_view_are_read_at_the_places_of_its_patches():
    """A map of 2 x 2 scores. The whole crop gives it back, mirrored its mirror image; the view of
    the middle half reads at 3/8 and 5/8 of it, where bilinear weights are 3/4 and 1/4.
    """
    score = torch.tensor([[0.0, 8.0, 16.0, 32.0]])
    corners = torch.tensor([[[0, 0, 1, 1], [1, 0, 0, 1], [0.25, 0.25, 0.75, 0.75]]])
    whole, mirrored, middle = view_scores(score, corners, 2)[0]
    assert whole.tolist() == [0, 8, 16, 32]
    assert mirrored.tolist() == [8, 0, 32, 16]
    # 9/16 * 0 + 3/16 * 8 + 3/16 * 16 + 1/16 * 32, and so on from each corner
    assert middle.tolist() == pytest.approx([6.5, 11.5, 15.5, 22.5])


def test_the_mean_teacher_moves_slower_and_slower():
    reduction = AttentivePatches(0.5, 2, 0.9)
    assert reduction.momentum_at(0) == pytest.approx(0.9)
    assert reduction.momentum_at(0.5) == pytest.approx(0.95)
    assert reduction.momentum_at(1) == 1


def tiny(side: int = 16) -> ClipModel:
    torch.manual_seed(0)
    vision = {**TINY_MODEL["vision_cfg"], "image_size": side}
    text = {**TINY_MODEL["text_cfg"], "vocab_size": 20}
    return ClipModel({**TINY_MODEL, "vision_cfg": vision, "text_cfg": text})


def test_scores_are_what_torchs_attention_says_of_the_class_token():
    model = tiny()
    visual, pixels = model.clip.visual, torch.randn(3, 3, 16, 16)
    score, pooled = attention_scores(visual, pixels)
    x, expected = visual._embeds(pixels), []
    for block in visual.transformer.resblocks:
        y = block.ln_1(x)
        _, attention = block.attn(y, y, y, need_weights=True, average_attn_weights=True)
        expected.append(attention[:, 0, 1:])
        x = block(x)
    torch.testing.assert_close(score, torch.stack(expected).mean(0))
    image = pooled @ visual.proj
    torch.testing.assert_close(image, model.clip.encode_image(pixels))


def test_the_average_is_that_of_the_weights_and_starts_at_them():
    model = tiny()
    mean = MeanTower(model, AttentivePatches(0.5, 2, 0.75), "fp32")
    first = {name: average.clone() for name, average in mean.named_averages().items()}
    sources = mean.sources(model)
    assert all(torch.equal(a, w) for a, w in zip(first.values(), sources, strict=True))
    moved = [weight + 4.0 for weight in sources]
    mean.update(moved, 0.0)
    for name, average in mean.named_averages().items():
        torch.testing.assert_close(average, first[name] + 1.0)
    mean.update(moved, 1.0)  # at the end of the run it stands still
    for name, average in mean.named_averages().items():
        torch.testing.assert_close(average, first[name] + 1.0)
    with pytest.raises(ConfigError, match="5 x 5 patches do not divide"):
        MeanTower(tiny(20), AttentivePatches(0.5, 2, 0.9), "fp32")


def test_byol_and_the_two_views_by_hand():
    """Cosines of 1 and 0 with the target: 2 - 2 * 1/2 = 1."""
    eye = torch.eye(2, dtype=torch.float64)
    views = {"online_a_bP": eye, "online_b_bP": eye.flip(0), "mean_target_bP": 5 * eye}
    features = Features(eye, eye, torch.tensor([3.0]), second_image_bD=eye.flip(0), **views)
    given = {"similarity": Cosine(), "group": Solo()}
    assert byol_loss(features, **given).item() == pytest.approx(1.0)
    first = clip_loss(features, **given)
    second = clip_loss(features._replace(image_bD=eye.flip(0)), **given)
    assert second > first
    assert clip_views_loss(features, **given).item() == pytest.approx((first + second).item() / 2)


boxes = st.tuples(*[st.integers(0, 900)] * 2, *[st.integers(1, 1000)] * 2)


@given(
    st.lists(boxes, min_size=1, max_size=3),
    st.integers(8, 400),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
)
def test_the_crop_around_views_holds_them_all_on_the_grid_of_scaled_decoding(drawn, size, edges):
    """The released code takes a wrong corner and may leave out a part of the second view."""
    width = height = 1000
    views = [Box(x, y, min(w, width - x), min(h, height - y)) for x, y, w, h in drawn]
    transform = ImageTransform(image_size=size, crop="enclosing", max_image_pixels=10**7)
    outer, scale = transform.around(views, width, height, np.array(edges))
    assert (outer.left % scale, outer.top % scale) == (0, 0)
    assert min(outer.left, outer.top) >= 0
    assert max(outer.left + outer.width, outer.top + outer.height) <= 1000
    for view in views:
        assert outer.left <= view.left
        assert outer.top <= view.top
        assert outer.left + outer.width >= view.left + view.width
        assert outer.top + outer.height >= view.top + view.height
    least, _ = transform.around(views, width, height, np.array([1 - 1e-12] * 2 + [0.0] * 2))
    assert least.left > min(view.left for view in views) - 8
    assert least.left + least.width < max(view.left + view.width for view in views) + 8


def config_of(dataset, model_file, folder, views=2, **changes):
    data = {"manifest": str(dataset.folder), "num_workers": 0, "window_shards": 2,
            "views": [VIEW] * views}  # fmt: skip
    return make_config(dataset, model_file, folder, **{**ACLIP, "data": data, **changes})


def test_what_does_not_go_with_attentive_masking_is_refused(dataset, model_file, tmp_path):
    for changes, said in (
        ({"reduction": {"name": "random"}}, "set reduction: {name: attentive}"),
        ({"augmentation": {"crop": "random"}}, "go together"),
        ({"augmentation": {"crop": "enclosing", "flip": True}}, "is not flipped"),
        ({"views": 1, "objective": {"name": "clip_views"}}, "masks two data.views"),
    ):
        with pytest.raises(ConfigError, match=said):
            config_of(dataset, model_file, tmp_path, **changes)
    config_of(dataset, model_file, tmp_path, views=1, objective={"name": "clip"})


def means_of(run) -> dict[str, torch.Tensor]:
    newest = (run / "checkpoints/latest").read_text().strip()
    reader = StateReader(run / "checkpoints" / newest / "engine")
    return {name: reader.whole("mean", name) for name in reader.names("mean")}


@pytest.mark.distributed
@pytest.mark.slow
def test_an_attentively_masked_run_is_the_same_after_a_restart_on_two_ranks_and_in_parts(
    dataset, model_file, tmp_path
):
    def config(name, stage, **changes):
        engine = {"zero_stage": stage, "num_threads": 1}
        changes = {"engine": engine, "samples": 96, **changes}
        return config_of(dataset, model_file, tmp_path / name, **changes)

    one = train(config("one", 0))
    parts = train(config("parts", 0, micro_batch_size=6))
    for stage in (2, 3):
        whole = train(config(f"whole{stage}", stage), 2)
        again = train(config(f"again{stage}", stage), 2, stops=(3, 0))
        assert rows(again) == rows(whole)
        assert equal(weights(again), weights(whole))
        assert equal(means_of(again), means_of(whole))
        for other in (whole, parts):
            assert rows(other)[0]["loss"] == pytest.approx(rows(one)[0]["loss"], rel=1e-5)
            for name, mean in means_of(one).items():  # Adam magnifies rounding
                torch.testing.assert_close(means_of(other)[name], mean, atol=3e-3, rtol=0)
    row = rows(one)[-1]
    sides = row["loss/clip_views"] + row["loss/simclr"] + 2 * row["loss/byol"]
    assert row["loss"] == pytest.approx(sides, rel=1e-5)
    assert rows(one)[-1]["loss"] < rows(one)[0]["loss"]
    names = set(means_of(one))
    assert "heads.mean_projector.0.weight" in names
    assert {n for n in names if n.startswith("clip.")} == {n for n in names if "visual" in n}
    moved = means_of(one)["clip.visual.proj"] - weights(one)["visual.proj"]
    assert 0 < float(moved.abs().max()) < 0.1
    assert row["loss/byol"] > 0
