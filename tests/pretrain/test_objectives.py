"""InfoNCE by hand, against open_clip's numbers, and equal at any number of ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.model.clip import Features
from pretrain.model.geometries import Cosine
from pretrain.objectives import objectives
from pretrain.objectives.clip import clip_loss
from pretrain.objectives.group import Solo
from tests.pretrain.conftest import run_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "objectives"


def loss_of(image, text, scale):
    features = Features(image, text, torch.as_tensor([scale], dtype=image.dtype))
    return clip_loss(features, similarity=Cosine(), group=Solo())


def test_the_loss_of_a_two_by_two_case_worked_by_hand():
    """I = T = identity, s = ln 3: each row's softmax is (3, 1) / 4, so the loss is -ln(3/4)."""
    eye = torch.eye(2, dtype=torch.float64)
    got = loss_of(eye, eye, math.log(3.0))
    assert math.isclose(got.loss.item(), -math.log(0.75), rel_tol=1e-12)
    assert got.accuracy_i2t.item() == got.accuracy_t2i.item() == 1.0


def test_loss_and_gradients_equal_open_clips():
    inputs, golden = np.load(GOLDEN / "inputs.npz"), np.load(GOLDEN / "clip_infonce.npz")
    cases = sorted({key.rsplit("/", 1)[0] for key in golden.files})
    assert len(cases) == 8
    for case in cases:
        shape, scale_name = case.split("/")
        image = torch.tensor(inputs[f"{shape}/img_raw"], requires_grad=True)
        text = torch.tensor(inputs[f"{shape}/txt_raw"], requires_grad=True)
        log_scale = torch.tensor(
            [math.log(100 if "100" in scale_name else 1 / 0.07)], dtype=torch.float64
        )
        log_scale.requires_grad_()
        unit = Cosine().embed
        got = clip_loss(
            Features(unit(image), unit(text), log_scale.exp()), similarity=Cosine(), group=Solo()
        )
        got.loss.backward()
        for mine, name in (
            (got.loss, "loss"), (image.grad, "grad_img_raw"), (text.grad, "grad_txt_raw"),
            (log_scale.grad, "grad_log_scale"),
        ):  # fmt: skip
            np.testing.assert_allclose(
                mine.detach().numpy().reshape(golden[f"{case}/{name}"].shape),
                golden[f"{case}/{name}"], atol=1e-9, rtol=0, err_msg=f"{case}/{name}",
            )  # fmt: skip


@given(st.integers(2, 9), st.integers(0, 1000))
def test_the_order_of_the_pairs_and_a_rotation_do_not_change_the_loss(n, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    image, text = Cosine().embed(draw(n, 4)), Cosine().embed(draw(n, 4))
    order = torch.randperm(n, generator=generator)
    rotation = torch.linalg.qr(draw(4, 4)).Q
    base = loss_of(image, text, 10.0).loss
    assert torch.allclose(base, loss_of(image[order], text[order], 10.0).loss, atol=1e-12)
    assert torch.allclose(base, loss_of(image @ rotation, text @ rotation, 10.0).loss, atol=1e-12)
    assert torch.allclose(base, loss_of(text, image, 10.0).loss, atol=1e-12)


def test_half_precision_features_are_compared_in_single_precision():
    image = Cosine().embed(torch.randn(4, 8)).bfloat16()
    assert loss_of(image, image, 100.0).loss.dtype == torch.float32


def test_every_objective_is_documented_with_its_paper():
    for name in objectives:
        assert "arXiv" in (objectives[name].__doc__ or ""), name


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2])
def test_loss_and_gradients_of_the_model_do_not_depend_on_the_number_of_ranks(world_size):
    run_ranks("objective_gradients", world_size)
