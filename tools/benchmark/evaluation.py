"""Speed of the evaluation suite, as ratios in one run: `python -m tools.benchmark.evaluation`.

One checkpoint (`--model`, a published shape with random weights: speed does not depend on them) and
one dataset of pictures with labels and captions, made here.

- zero-shot and retrieval from one pass, against the two passes that CLIP_benchmark's two commands
  make: it encodes the images again for each task. The second side is our own encoder run twice, so
  that the ratio is of the design and not of somebody's data loader.
- a second run from the cache, against the first: every method again, and the same line again
- each further method on features, against the encoding of the test images and captions: of a
  few-shot learner one fit with 16 shots; a linear probe searches its C, and is excepted
- GDA, 16 shots, 1,000 classes, D = 1024, against 3 s
- memory of retrieval of 5,000 images x 25,000 captions, against all scores at once
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from configs.load import validate
from evaluation.config import EvaluateConfig
from evaluation.methods.gda import choose_alpha, fit_gaussians
from evaluation.methods.retrieval import recalls
from evaluation.ranking import FeatureScores
from evaluation.result import read_published
from evaluation.suite import evaluate
from pretrain.model.clip import open_clip
from pretrain.model.geometries import Cosine
from tools.benchmark.ratio import Ratio, seconds, seconds_and_cpu

SMALL: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 4},
    "text_cfg": {"context_length": 77, "width": 128, "heads": 2, "layers": 2, "vocab_size": 49408},
}
NUM_CLASSES = 20
SHOTS = 16
SPLITS = {"train": 2 * SHOTS * NUM_CLASSES, "val": 4 * NUM_CLASSES}
BOTH = {"labelled": None, "captioned": None}
LEARNERS = ("tip_adapter", "tip_adapter_f", "clip_adapter", "gda", "amu_tuning")
METHODS: tuple[dict[str, Any], ...] = (
    {"name": "calibration"},
    {"name": "selective"},
    {"name": "mano"},
    {"name": "geometry"},
    {"name": "worst_group", "attribute": "tone"},
    {"name": "clip_score"},
    {"name": "ood", "sets": ["captioned"]},
    {"name": "base_to_new", "seeds": 1},
    {"name": "linear_probe"},
    *(
        {
            "name": "few_shot",
            "shots": [SHOTS],
            "seeds": 1,
            "auxiliary": "pixels",
            "learners": [{"name": name}],
        }
        for name in LEARNERS
    ),
)


def make_model(folder: Path, name: str) -> Path:
    """Write an open_clip folder with random weights: `small`, or a shape that open_clip knows."""
    shape = SMALL if name == "small" else open_clip.get_model_config(name)
    if shape is None:
        raise SystemExit(f"--model: got {name!r}; expected small, or one of open_clip's models.")
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**shape).state_dict(), folder / "open_clip_model.safetensors")
    side = shape["vision_cfg"]["image_size"]
    description = {"model_cfg": shape, "preprocess_cfg": {"size": [side, side]}}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    return folder


def make_data(folder: Path, num_images: int) -> Path:
    """Write tars of JPEGs of 256 x 256 pixels and their two descriptions; return the folder."""
    folder.mkdir(parents=True)
    sizes = {**SPLITS, "images": num_images}
    for place, (name, size) in enumerate(sizes.items()):
        write_pictures(folder / f"{name}.tar", size, seed=place)
    shared = {"captions": ["txt"], "groups": {"tone": "json:tone"}}
    labelled = {**shared, "labels": "cls", "classes": [f"thing {i}" for i in range(NUM_CLASSES)]}
    labelled["splits"] = {**{name: [f"{name}.tar"] for name in SPLITS}, "test": ["images.tar"]}
    labelled["prompts"] = {"templates": ["a photo of {c}", "{c}"]}
    (folder / "labelled.yaml").write_text(json.dumps(labelled))
    captioned = {**shared, "task": "retrieval", "images": ["images.tar"]}
    (folder / "captioned.yaml").write_text(json.dumps(captioned))
    return folder


def write_pictures(path: Path, num_images: int, seed: int) -> None:
    """Write a tar of pictures with a class, a caption and an attribute each."""
    draw = np.random.default_rng(seed)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(num_images):
            small = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(small).resize((256, 256)).save(buffer, "JPEG", quality=85)
            fields = json.dumps({"tone": "ab"[i % 2]}).encode()
            members = {"jpg": buffer.getvalue(), "cls": b"%d" % (i % NUM_CLASSES), "json": fields}
            members["txt"] = f"a picture of thing {i}".encode()
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{i:06d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def config_of(
    data: Path, work: Path, methods: Mapping[str, Sequence[Mapping[str, Any]] | None]
) -> EvaluateConfig:
    """Return the configuration of a run below `work`: the methods of each dataset."""
    tree = {
        "name": "benchmark",
        "datasets": [
            {"path": str(data / f"{name}.yaml"), "name": name, "methods": own}
            for name, own in methods.items()
        ],
        "num_workers": 0,
        "output": str(work / "out"),
        "cache": str(work / "cache"),
    }
    return validate(tree, EvaluateConfig, label="benchmark")


def suite_lines(work: Path, num_images: int, name: str) -> list[str]:
    """Measure one pass against two, second runs, and each further method."""
    model, data = str(make_model(work / "model", name)), make_data(work / "data", num_images)
    few = make_data(work / "few", 64)
    evaluate(config_of(few, work / "warm", BOTH), [model])  # imports
    both = config_of(data, work / "one", BOTH)
    one, one_cpu = seconds_and_cpu(lambda: evaluate(both, [model]))
    two, two_cpu = 0.0, 0.0
    for part in BOTH:
        alone = config_of(data, work / f"two-{part}", {part: None})
        spent = seconds_and_cpu(lambda alone=alone: evaluate(alone, [model]))  # type: ignore[misc]
        two, two_cpu = two + spent[0], two_cpu + spent[1]
    shutil.rmtree(both.output_folder)
    again = seconds(lambda: evaluate(both, [model]))
    done = seconds(lambda: evaluate(both, [model]))
    lines = [
        f"{name}, {num_images:,} images and captions, {torch.get_num_threads()} threads",
        Ratio("zero-shot and retrieval: one pass, two passes", one, two, 0, two_cpu / one_cpu).line(
            1.8
        ),
        Ratio("both again from cached features", again, one, 0).line(50.0),
        Ratio("the same line again, all done", done, one, 0).line(50.0),
    ]
    return lines + share_lines(data, work / "one", model, one - again)


def share_lines(data: Path, work: Path, model: str, encoding: float) -> list[str]:
    """Measure what each method takes of the time of encoding."""
    methods = {"labelled": [{"name": "zero_shot"}, *METHODS], "captioned": [{"name": "retrieval"}]}
    every = config_of(data, work, methods)
    shutil.rmtree(every.output_folder)
    evaluate(every, [model])  # encodes what only some of the methods need
    shutil.rmtree(every.output_folder)
    evaluate(every, [model])
    lines = []
    rows = {row.method: row.seconds for row in read_published(every.output_folder)}
    for name, spent in sorted(rows.items()):
        share = spent / encoding
        verdict = "ok" if share <= 0.05 else "SHORT"
        if name == "linear_probe":
            verdict = "(searches C: excepted)"
        lines.append(f"{name:<52} {spent:>9.3f} s = {share:>6.1%} of encoding  {verdict}")
    return lines


def gda_line() -> str:
    """Measure GDA with 16 shots of 1,000 classes, D = 1024, its alpha search included."""
    torch.manual_seed(0)
    classes, width = 1000, 1024
    feature = torch.nn.functional.normalize(torch.randn(16 * classes, width), dim=1)
    label = torch.arange(16 * classes) % classes
    held_out, truth = feature[:4000], label[:4000]
    logits = 100 * held_out @ feature[:classes].T
    started, processor_started = time.perf_counter(), time.process_time()
    _, _, weight, bias = fit_gaussians(feature, label, classes)
    choose_alpha(logits, held_out @ weight.float() + bias.float(), truth)
    spent = time.perf_counter() - started
    processor = time.process_time() - processor_started
    threads = torch.get_num_threads()
    name = f"GDA, 16 x 1,000 shots, D = 1024, {threads} threads"
    line = Ratio(name, spent, 3.0, 0).line(1.0)
    return f"{line}; {processor:.2f} s of processor time, {processor / threads:.2f} s a thread"


def memory_line() -> str:
    """Measure what retrieval of 5,000 x 25,000 adds to the peak memory, in MiB."""
    cosine = Cosine()
    image = cosine.embed(torch.randn(5_000, 256))
    text = cosine.embed(torch.randn(25_000, 256))
    owner = np.repeat(np.arange(5_000), 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    recalls(FeatureScores(image, text, cosine), owner)
    spent = time.perf_counter() - started
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    whole = 5_000 * 25_000 * 4 / 2**20
    verdict = "ok" if added < whole / 2 else "SHORT"
    return (
        f"retrieval 5,000 x 25,000: {added:,.0f} MiB more at the peak; all scores at once would be "
        f"{whole:,.0f} MiB for the matrix alone; {spent:.1f} s  {verdict}"
    )


def main() -> int:
    """Run all, or the parts that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--model", default="ViT-S-32-alt", help="small, or a model of open_clip")
    parser.add_argument("parts", nargs="*", default=["memory", "gda", "suite"])
    options = parser.parse_args()
    if "memory" in options.parts:
        print(memory_line(), flush=True)
    if "gda" in options.parts:
        print(gda_line(), flush=True)
    if "suite" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(suite_lines(Path(folder), options.images, options.model)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
