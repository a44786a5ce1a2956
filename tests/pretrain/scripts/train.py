"""CONFIG STOP_AT [CONFIG STOP_AT ...]: train, asked to stop after STOP_AT steps (0: to the end).

Each rank writes the keys of its batches, with the samples seen before, to OUTPUT/keys-RANK.jsonl.
"""

import json
import sys
from pathlib import Path

from configs.load import load_config
from pretrain.config import PretrainConfig
from pretrain.run import Run
from pretrain.train import pretrain


def note_keys(run: Run, batch) -> None:
    with open(Path(run.config.output) / f"keys-{run.parts.group.rank}.jsonl", "a") as file:
        file.write(json.dumps([run.samples_seen, batch.key]) + "\n")
    take_step(run, batch)


if __name__ == "__main__":
    take_step, Run.step = Run.step, note_keys
    for config_file, stop_at in zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True):
        config = load_config(config_file, PretrainConfig)
        outcome = pretrain(config, stop=lambda step, at=stop_at: 0 < at == step)
        assert outcome.finished == (stop_at == 0)
