"""CONFIG MODE [CONFIG MODE ...]: train on images that are NaN at two positions, or without them.

`poisoned`: a sample in each of two batches, both of the second of two ranks. `left_out`: the
positions from the checkpoint before them are left out from the start.
"""

import sys

import torch

from configs.load import load_config
from pretrain.config import PretrainConfig
from pretrain.data.loader import BatchDataset
from pretrain.stability import Stability
from pretrain.train import pretrain

POISONED = {60, 75}
LEFT_OUT = (32, 80)

clean_batch, clean_start = BatchDataset.batch, Stability.__init__


def poisoned_batch(self, consumed):
    batch = clean_batch(self, consumed)
    if POISONED.isdisjoint(self.plan.positions(consumed).tolist()):
        return batch
    return batch._replace(image_b3HW=torch.full(batch.image_b3HW.shape, torch.nan))


def start_later(self, section):
    clean_start(self, section)
    self.skipped_ranges = [LEFT_OUT]


if __name__ == "__main__":
    for config_file, mode in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        BatchDataset.batch = poisoned_batch if mode == "poisoned" else clean_batch
        Stability.__init__ = start_later if mode == "left_out" else clean_start
        assert pretrain(load_config(config_file, PretrainConfig)).finished
