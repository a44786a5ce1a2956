"""CONFIG STOP_AT [CONFIG STOP_AT ...]: train, asked to stop after STOP_AT steps (0: to the end)."""

import sys

from configs.load import load_config
from pretrain.config import PretrainConfig
from pretrain.train import pretrain

if __name__ == "__main__":
    for config_file, stop_at in zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True):
        config = load_config(config_file, PretrainConfig)
        outcome = pretrain(config, stop=lambda step, at=stop_at: 0 < at == step)
        assert outcome.finished == (stop_at == 0)
