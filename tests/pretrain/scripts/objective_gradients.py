"""Loss and gradients of every objective in float64: this world against one process."""

import torch
import torch.distributed as dist

from pretrain.objectives import Total, objectives
from pretrain.objectives.group import Group, Solo, World
from tests.pretrain.objective_rows import ROWS, inputs_of, model_of, total_of

SIZE = 8


def gradients(model, total: Total, rows: slice, group: Group):
    model.zero_grad()
    features = model(**inputs_of(SIZE, total, rows, torch.float64))
    loss = total(features._replace(progress=0.5), similarity=model.similarity, group=group).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_default_dtype(torch.float64)
    b = SIZE // size
    seen = set()
    for objective, similarity in ROWS:
        total = total_of(objective)
        seen |= {term.name for term, _ in total.terms}
        model = model_of(similarity, total)
        whole_loss, whole = gradients(model, total, slice(None), Solo())
        part_model = model_of(similarity, total)
        loss, part = gradients(part_model, total, slice(rank * b, (rank + 1) * b), World())
        for tensor in [loss, *part.values()]:
            dist.all_reduce(tensor)
            tensor /= size
        row = (objective, similarity)
        limit = 1e-10 * max(1.0, abs(whole_loss.item()))
        assert abs(loss - whole_loss) <= limit, (row, loss, whole_loss)
        assert set(part) == set(whole), (row, set(part) ^ set(whole))
        for name in whole:
            worst = (part[name] - whole[name]).abs().max().item()
            assert worst <= limit, (row, name, worst)
        moved = {name for name, gradient in whole.items() if gradient.abs().max() > 1e-9}
        assert {"clip.visual.proj", "clip.text_projection"} <= moved, (row, "the check is empty")
        if similarity["name"] == "lorentz":
            assert "similarity.log_curvature" in moved, row
    assert seen == set(objectives), ("objectives without a test row", set(objectives) - seen)
    dist.destroy_process_group()
