"""Make the pool: scan the fonts, split the characters, write training tars and evaluation datasets.

    OUT/train/00000.tar ...          raw pairs, img2dataset's layout, 2,000 a shard
    OUT/eval/serif                   zero-shot over the characters of DejaVu Serif
    OUT/eval/serif-letters-digits    the same over a-z, A-Z, 0-9
    OUT/eval/unseen                  retrieval over the held-out characters
    OUT/metadata.txt                 words of all Unicode names: the entries for balancing
    OUT/pool.json                    options and counts

The folder is written under a temporary name and renamed: OUT is whole, or is not there.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from configs import draws
from configs.errors import DataError, UsageError
from configs.progress import progress
from configs.publish import published_folder
from tools.glyph_pool.captions import TEMPLATES, describe, name_words
from tools.glyph_pool.fonts import FACES, SERIF_FACES, TRAINING_FACES, font_path, scan
from tools.glyph_pool.split import SEED, Split, UnseenCharacter, split_glyphs
from tools.glyph_pool.tars import TarJob, captions_of, write_tar

VERSION = 2
SAMPLES_PER_SHARD = 2000

Item = TypeVar("Item")
Result = TypeVar("Result")
Map = Callable[[Callable[[Item], Result], Sequence[Item]], Iterator[Result]]


def make_pool(
    out: Path, *, limit: int | None = None, shuffle_captions: bool = False, num_workers: int = 2
) -> dict[str, Any]:
    """Make the pool in the folder `out` and return its pool.json; do nothing where it is there.

    `limit` bounds the training pairs (letters and digits first, then characters by hash);
    `shuffle_captions` permutes the training captions: the control that must not learn. The bytes
    depend on these two and on the versions of matplotlib, Pillow and Python only, not on
    `num_workers`.
    Raises UsageError where `out` holds anything else, DataError where the fonts are missing.
    """
    out = Path(out)
    options = {"limit": limit, "shuffle_captions": shuffle_captions}
    if limit is not None and limit < 1:
        raise UsageError(
            f"limit: got {limit}, expected at least 1 pair. Leave it out for the whole pool."
        )
    existing = _existing_pool(out, options)
    if existing is not None:
        print(f"{out} already holds this pool: nothing to do.", file=sys.stderr)
        return existing
    for leftover in out.parent.glob(f".{out.name}.tmp-*"):
        shutil.rmtree(leftover)
    for face in FACES:
        font_path(face)
    with published_folder(out) as folder, _workers(num_workers) as run:
        with progress("scan fonts", total=len(FACES), unit="fonts") as bar:
            drawings = {}
            for face, found in zip(FACES, run(scan, FACES), strict=True):
                drawings[face.stem] = found
                bar.advance(1, samples=len(found))
        split = split_glyphs(drawings, limit)
        jobs = training_jobs(folder, split, shuffle_captions) + _evaluation_jobs(folder, split)
        written = {}
        with progress("draw pictures", total=len(jobs), unit="tars") as bar:
            for job, (num_samples, num_bytes) in zip(jobs, run(write_tar, jobs), strict=True):
                written[job.path] = num_bytes
                bar.advance(1, samples=num_samples)
        words = name_words()
        (folder / "metadata.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        counts = _counts(split, len(words), sum(written.values()))
        pool = {"version": VERSION, "options": options, "software": _software(), **counts}
        (folder / "pool.json").write_text(json.dumps(pool, indent=2) + "\n", encoding="utf-8")
    return pool


def _existing_pool(out: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        pool = json.loads((out / "pool.json").read_text(encoding="utf-8"))
        found = {"version": pool["version"], **pool["options"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{out} is there and is not a glyph pool (it has no pool.json that can be read). Give "
            "a folder that does not exist, or an empty one."
        ) from None
    wanted = {"version": VERSION, **options}
    if found != wanted:
        raise UsageError(
            f"{out} holds another glyph pool: it was made with {found}, wanted is {wanted}. Give "
            "another folder, or remove that one first."
        )
    if pool.get("software") != _software():
        raise UsageError(
            f"{out} holds this pool as other versions drew it: made with {pool.get('software')}, "
            f"here are {_software()}, and its bytes depend on them. Remove it to make it again, or "
            "give another folder."
        )
    return dict(pool)


@contextmanager
def _workers(num_workers: int) -> Iterator[Map[Any, Any]]:
    if num_workers <= 1:
        yield lambda function, items: iter(map(function, items))
        return
    # Spawned, not forked: the caller may hold threads (Ray, torch) that a fork would break.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as executor:
        yield lambda function, items: executor.map(function, items)


def training_jobs(folder: Path, split: Split, shuffle_captions: bool) -> list[TarJob]:
    """Return the training tars to be written below `folder`, in an order of samples by hash."""
    (folder / "train").mkdir()
    order = draws.permutation(len(split.training), SEED, "glyph_pool/order")
    glyphs = [split.training[position] for position in order]
    captions = captions_of(glyphs, may_be_codes=True)
    if shuffle_captions:
        shuffled = draws.permutation(len(captions), SEED, "glyph_pool/shuffle_captions")
        captions = [captions[position] for position in shuffled]
    return [
        TarJob(
            folder / "train" / f"{shard:05d}.tar",
            "train",
            tuple(glyphs[start : start + SAMPLES_PER_SHARD]),
            tuple(captions[start : start + SAMPLES_PER_SHARD]),
        )
        for shard, start in enumerate(range(0, len(glyphs), SAMPLES_PER_SHARD))
    ]


def _evaluation_jobs(folder: Path, split: Split) -> list[TarJob]:
    names = split.class_names()
    jobs = _classification(folder / "eval/serif", split, list(range(len(names))), names)
    labels = split.letters_and_digits()
    jobs += _classification(folder / "eval/serif-letters-digits", split, labels, names)
    return jobs + _retrieval(folder / "eval/unseen", split.unseen)


def _classification(
    folder: Path, split: Split, labels: list[int], names: list[str]
) -> list[TarJob]:
    new_label = {label: number for number, label in enumerate(labels)}
    chosen = [(glyph, new_label[label]) for glyph, label in split.serif if label in new_label]
    files = {
        "classnames.txt": [names[label] for label in labels],
        "zeroshot_classification_templates.txt": list(TEMPLATES),
    }
    texts = [str(label) for _, label in chosen]
    return _dataset(folder, "class", [glyph for glyph, _ in chosen], texts, files)


def _retrieval(folder: Path, unseen: tuple[UnseenCharacter, ...]) -> list[TarJob]:
    glyphs = [character.glyph for character in unseen]
    texts = []
    for character, first in zip(unseen, captions_of(glyphs, may_be_codes=False), strict=True):
        others = [describe(codepoint, "", 0.0) for codepoint in character.codepoints[1:]]
        texts.append("\n".join([first, *others]))
    return _dataset(folder, "retrieval", glyphs, texts, {"dataset_type.txt": ["retrieval"]})


def _dataset(
    folder: Path, kind: str, glyphs: list[Any], texts: list[str], files: dict[str, list[str]]
) -> list[TarJob]:
    if not glyphs:
        raise DataError(
            f"the evaluation dataset {folder.name} would be empty: the pool is too small. "
            "Give a larger limit."
        )
    (folder / "test").mkdir(parents=True)
    starts = range(0, len(glyphs), SAMPLES_PER_SHARD)
    files = {**files, "test/nshards.txt": [str(len(starts))]}
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        TarJob(
            folder / f"test/{number}.tar",
            kind,
            tuple(glyphs[start : start + SAMPLES_PER_SHARD]),
            tuple(texts[start : start + SAMPLES_PER_SHARD]),
            first=start,
        )
        for number, start in enumerate(starts)
    ]


def _counts(split: Split, num_words: int, num_bytes: int) -> dict[str, Any]:
    labels = set(split.letters_and_digits())
    return {
        "num_training_pairs": len(split.training),
        "num_training_characters": len({codepoint for _, codepoint in split.training}),
        "num_training_fonts": len(TRAINING_FACES),
        "num_serif_fonts": len(SERIF_FACES),
        "num_metadata_words": num_words,
        "num_bytes": num_bytes,
        "evaluation": {
            "serif": {"num_pictures": len(split.serif), "num_classes": len(split.class_codepoints)},
            "serif-letters-digits": {
                "num_pictures": sum(label in labels for _, label in split.serif),
                "num_classes": len(labels),
            },
            "unseen": {
                "num_pictures": len(split.unseen),
                "num_captions": sum(len(character.codepoints) for character in split.unseen),
            },
        },
    }


def _software() -> dict[str, str]:
    import matplotlib
    import PIL
    from PIL import features

    return {
        "matplotlib": str(matplotlib.__version__),
        "pillow": PIL.__version__,
        "freetype": str(features.version("freetype2")),
        "unicode": unicodedata.unidata_version,
    }
