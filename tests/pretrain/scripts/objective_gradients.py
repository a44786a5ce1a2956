"""Loss and gradients of objective and model in float64: this world against one process."""

import torch
import torch.distributed as dist

from pretrain.model.clip import ClipModel
from pretrain.objectives.clip import clip_loss
from pretrain.objectives.group import Group, Solo, World
from tests.pretrain.conftest import TINY_MODEL

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
config = {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "vocab_size": 20}}
model = ClipModel(config)
image = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
token = torch.randint(0, 20, (16, 8))
kept = torch.rand(16, 16).argsort(1)[:, :8].sort(1).values


def gradients(rows: slice, group: Group) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    features = model(image[rows], token[rows], kept[rows])
    loss = clip_loss(features, similarity=model.similarity, group=group).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


whole_loss, whole = gradients(slice(None), Solo())
b = 16 // size
loss, part = gradients(slice(rank * b, (rank + 1) * b), World())
for tensor in [loss, *part.values()]:
    dist.all_reduce(tensor)
    tensor /= size
assert abs(loss - whole_loss) <= 1e-10, (loss, whole_loss)
assert set(part) == set(whole)
for name in whole:
    worst = (part[name] - whole[name]).abs().max().item()
    assert worst <= 1e-10, (name, worst)
assert whole["clip.logit_scale"].abs() > 1e-6, "the check is empty"
dist.destroy_process_group()
