"""CONFIG STOP_AT: train, asked to stop after STOP_AT steps (0: to the end)."""

import sys

from configs.load import load_config
from pretrain.config import PretrainConfig
from pretrain.train import pretrain

if __name__ == "__main__":
    config_file, stop_at = sys.argv[1], int(sys.argv[2])
    config = load_config(config_file, PretrainConfig)
    outcome = pretrain(config, stop=lambda step: 0 < stop_at == step)
    assert outcome.finished == (stop_at == 0)
