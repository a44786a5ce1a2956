"""CONFIG...: make or reuse the run's tokenizer under each config; print the vocabulary sizes."""

import sys
from pathlib import Path

from configs.load import load_config
from curation.manifest import read_manifest
from pretrain.build import run_tokenizer
from pretrain.config import PretrainConfig
from pretrain.engine import start_processes

if __name__ == "__main__":
    start_processes(1)
    sizes = []
    for name in sys.argv[1:]:
        config = load_config(name, PretrainConfig)
        manifest = read_manifest(Path(config.data.manifest))
        sizes.append(run_tokenizer(config, manifest, 8).vocab_size)
    print("sizes", *sizes)
