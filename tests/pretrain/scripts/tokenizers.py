"""CONFIG...: make or reuse the run's tokenizer under each config; print the vocabulary sizes."""

import sys

from configs.load import load_config
from pretrain.build import read_data
from pretrain.config import PretrainConfig
from pretrain.engine import start_processes
from pretrain.run_tokenizer import run_tokenizer

if __name__ == "__main__":
    start_processes(1)
    sizes = []
    for name in sys.argv[1:]:
        config = load_config(name, PretrainConfig)
        sizes.append(run_tokenizer(config, read_data(config), 8).vocab_size)
    print("sizes", *sizes)
