"""InfoNCE by hand, against open_clip's numbers, and equal at any number of ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.load import to_yaml
from pretrain.model.features import Features
from pretrain.model.geometries import Cosine
from pretrain.model.similarity import similarities
from pretrain.objectives import objectives
from pretrain.objectives.accuracy import batch_accuracy
from pretrain.objectives.clip import clip_loss
from pretrain.objectives.entailment import entailment_loss
from pretrain.objectives.group import Solo
from pretrain.objectives.infoloob import infoloob_loss
from pretrain.objectives.siglip import siglip_loss
from tests.pretrain.conftest import make_config, run_ranks
from tests.pretrain.objective_rows import ROWS, total_of
from tools.benchmark.objectives import COUNTED, peak_mib
from tools.conformance.__main__ import main as conformance

GOLDEN = Path(__file__).parents[1] / "golden" / "objectives"


def loss_of(image, text, scale):
    features = Features(image, text, torch.as_tensor([scale], dtype=image.dtype))
    return clip_loss(features, similarity=Cosine(), group=Solo())


def test_the_loss_of_a_two_by_two_case_worked_by_hand():
    """I = T = identity, s = ln 3: each row's softmax is (3, 1) / 4, so the loss is -ln(3/4)."""
    eye = torch.eye(2, dtype=torch.float64)
    got = loss_of(eye, eye, math.log(3.0))
    assert math.isclose(got.item(), -math.log(0.75), rel_tol=1e-12)


def test_the_accuracy_counts_own_pairs_that_are_nearest():
    image, text = torch.eye(3), torch.eye(3)[[0, 2, 2]]
    features = Features(image, text, torch.ones(1))
    i2t, t2i = batch_accuracy(features, similarity=Cosine(), group=Solo())
    assert (i2t.item(), t2i.item()) == pytest.approx((1 / 3, 2 / 3))


def test_golden_losses_and_gradients_are_met_and_a_wrong_one_is_seen(tmp_path, capsys):
    assert conformance(["objectives", str(GOLDEN)]) == 0
    assert "75 pass, 0 fail, 0 not built" in capsys.readouterr().out
    golden = dict(np.load(GOLDEN / "clip_infonce.npz"))
    wrong = {k: v + 2e-9 if k == "s0_b8_d16/scale100.0000/loss" else v for k, v in golden.items()}
    np.savez(tmp_path / "clip_infonce.npz", **wrong)  # alone: its inputs are drawn from the seed
    np.savez(tmp_path / "rankclip.npz", a=np.zeros(1))
    assert conformance(["objectives", str(tmp_path)]) == 1
    assert "47 pass, 1 fail, 1 not built" in capsys.readouterr().out


def test_siglip_worked_by_hand():
    """Two orthogonal pairs, s = 2, bias = -1: own logits 1, others -1; each gives log(1 + e^-1)."""
    eye = torch.eye(2, dtype=torch.float64)
    features = Features(eye, eye, torch.tensor([2.0]), torch.tensor([-1.0]))
    for exchange in ("ring", "gather"):
        loss = siglip_loss(features, similarity=Cosine(), group=Solo(), exchange=exchange)
        assert math.isclose(loss.item(), 2 * math.log1p(math.exp(-1)), rel_tol=1e-12)


def test_infoloob_leaves_the_own_pair_out():
    """I = T = identity, lam = 3: -1 + (log e^0) / 3 for each row, both directions added."""
    eye = torch.eye(2, dtype=torch.float64)
    loss = infoloob_loss(Features(eye, eye, torch.tensor([3.0])), similarity=Cosine(), group=Solo())
    assert math.isclose(loss.item(), -2.0, rel_tol=1e-12)


def test_weights_and_prefixes_add_up():
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 5, 8, generator=draw, dtype=torch.float64)
    features = Features(image, text, torch.tensor([5.0]))

    def loss(objective):
        return total_of(objective)(features, similarity=Cosine(), group=Solo())

    whole, part = loss({"name": "clip"}).loss, loss_of(image[:, :4], text[:, :4], 5.0)
    both = loss([{"name": "clip", "weight": 0.5, "matryoshka": [4, 8]}, {"name": "clip"}])
    assert math.isclose(both.loss.item(), (0.5 * (whole + part) + whole).item(), rel_tol=1e-12)
    assert set(both.terms) == {"clip", "clip_2"}


def test_chunks_change_nothing_but_rounding():
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 7, 8, generator=draw, dtype=torch.float64).requires_grad_()
    features = Features(image, text, torch.tensor([5.0]), torch.tensor([-2.0]))
    for name in ("clip", "siglip", "infoloob", "cloob"):
        found = []
        for chunk in (2, 100):
            loss = objectives[name](chunk_rows=chunk).loss(
                features, similarity=Cosine(), group=Solo()
            )
            found.append(
                torch.stack([loss.expand(7, 8), *torch.autograd.grad(loss, [image, text])])
            )
        assert torch.allclose(*found, atol=1e-13), name


@pytest.mark.parametrize(
    ("name", "keywords", "geometry"),
    [
        ("clip", {"label_smoothing": 0.1}, {"name": "cosine"}),
        ("clip", {}, {"name": "lorentz", "score": "squared"}),
        ("siglip", {}, {"name": "euclidean", "score": "distance"}),
    ],
)
def test_slopes_in_closed_form_are_those_of_differences(name, keywords, geometry):
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64)
    scalars = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    inputs = [tensor.clone().requires_grad_() for tensor in (image, text, *scalars)]
    similarity = similarities[geometry.pop("name")](**geometry).double()
    objective = objectives[name](chunk_rows=2, **keywords)

    def loss(*given):
        return objective.loss(Features(*given), similarity=similarity, group=Solo())

    used = inputs if name == "siglip" else inputs[:3]
    torch.autograd.gradcheck(loss, used, atol=1e-7)
    for parameter in similarity.parameters():
        (slope,) = torch.autograd.grad(loss(*inputs), [parameter])
        ends = []
        for step in (1e-5, -1e-5):
            parameter.data += step
            ends.append(loss(*inputs).item())
            parameter.data -= step
        assert slope.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_siglip_keeps_the_small_slope_of_a_pair_that_it_is_sure_of():
    """z = 60 for the one pair: the loss is exp(-60), and so is minus its slope by the bias."""
    one, bias = torch.ones(1, 1), torch.zeros(1, requires_grad=True)
    loss = siglip_loss(
        Features(one, one, torch.tensor([60.0]), bias), similarity=Cosine(), group=Solo()
    )
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(-60), rel=1e-5)
    assert bias.grad.item() == pytest.approx(-math.exp(-60), rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_chunked_takes_a_quarter_of_the_memory_at_most(name):
    """Counted at b = 4096, B = 32768, D = 512: every tensor that is alive, on the meta device."""
    ours = peak_mib("chunked", name, COUNTED, 512)
    assert ours <= 0.25 * peak_mib("plain", name, COUNTED, 512)
    assert ours > 4 * 32768 * 512 / 2**20  # the gathered texts and their gradient are in it


def test_the_entailment_radius_follows_its_schedule():
    features = Features(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))
    similarity = similarities["euclidean"]()

    def at(progress, **radii):
        features_then = features._replace(image_bD=-torch.ones(1, 2), progress=progress)
        return entailment_loss(features_then, similarity=similarity, group=Solo(), **radii).item()

    scheduled = at(0.25, min_radius=0.1, final_min_radius=0.5)
    assert scheduled == pytest.approx(at(0.9, min_radius=0.2))


@given(st.integers(2, 9), st.integers(0, 1000))
def test_the_order_of_the_pairs_and_a_rotation_do_not_change_the_loss(n, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    image, text = Cosine().embed(draw(n, 4)), Cosine().embed(draw(n, 4))
    order = torch.randperm(n, generator=generator)
    rotation = torch.linalg.qr(draw(4, 4)).Q
    base = loss_of(image, text, 10.0)
    assert torch.allclose(base, loss_of(image[order], text[order], 10.0), atol=1e-12)
    assert torch.allclose(base, loss_of(image @ rotation, text @ rotation, 10.0), atol=1e-12)
    assert torch.allclose(base, loss_of(text, image, 10.0), atol=1e-12)


def test_half_precision_features_are_compared_in_single_precision():
    image = Cosine().embed(torch.randn(4, 8)).bfloat16()
    assert loss_of(image, image, 100.0).dtype == torch.float32


def test_every_objective_is_documented_with_its_paper():
    for name in objectives:
        assert "arXiv" in (objectives[name].__doc__ or ""), name


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradients_of_every_objective_do_not_depend_on_the_number_of_ranks(world_size):
    run_ranks("objective_gradients", world_size)


@pytest.mark.distributed
def test_gradients_through_deepspeed_do_not_depend_on_the_number_of_ranks(
    dataset, model_file, tmp_path
):
    config = make_config(dataset, model_file, tmp_path / "run", global_batch_size=8, samples=8)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    for size in (1, 2):
        run_ranks("objective_engine", size, str(path), str(tmp_path / f"{size}.pt"))
    found = [torch.load(tmp_path / f"{size}.pt", weights_only=True) for size in (1, 2)]
    assert len(found[0]) == len(ROWS)
    for row, one, two in zip(ROWS, *found, strict=True):
        assert one.keys() == two.keys()
        norm = torch.cat([gradient.flatten() for gradient in one.values()]).norm()
        difference = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm()
        assert difference / norm <= 2e-6, row
