"""A folder with a dataset, a run and results, small and hostile: what tests make pages of."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

HOSTILE = (
    "</figcaption><script>alert(1)</script><img src=http://evil/x.png onerror=a> {c} %s \u202e"
)


def png(color=0, size=(20, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def make_folder(tmp_path: Path) -> Path:
    """A dataset of six samples, a run of three steps, results of a model and the baseline."""
    picture = png(7)
    (tmp_path / "00000.tar").write_bytes(b"x" * 100 + picture)
    sample = {"shard": str(tmp_path / "00000.tar"), "uid": "00", "key": "0", "image_ext": "png"}
    sample |= {"image_offset": 100, "image_size": len(picture), "width": 20, "height": 20}
    nowhere = sample | {"image_offset": None, "image_size": None, "key": "9"}
    words = {"num_words": 9, "num_distinct": 3, "top": [["a", 5], [HOSTILE, 3]]}
    words["curve"] = [[1, 5], [2, 3], [3, 1]]
    report = {
        "version": 1,
        "name": "tiny",
        "seed": 0,
        "config_digest": "ab",
        "created_by": "pairmill 0",
        "num_read": 6,
        "num_kept": 3,
        "num_dropped": 2,
        "num_unreadable": 1,
        "dropped": {"caption_length/too few words": 2},
        "unreadable": {"no image": 1},
        "funnel": [
            {"rule": "read", "remaining": 5, "dropped": {"no image": 1}},
            {"rule": "caption_length", "remaining": 3, "dropped": {"too few words": 2}},
        ],
        "sources": {
            HOSTILE: {
                "num_read": 6,
                "num_kept": 3,
                "num_unreadable": 1,
                "dropped": {"caption_length": 2},
                "weight": 0.5,
                "cap": 9,
            }
        },
        "words": {"before": words, "after": words},
        "entries": None,
        "histograms": {
            "caption_words": {"edges": [0, 1, 2], "before": [0, 2, 4], "after": [0, 1, 3]},
            "image_aspect": {"edges": [0, 0.5, 1], "before": [0, 1, 5], "after": [0, 0, 3]},
        },
        "solutions": {"m4": {"warnings": [HOSTILE]}, "clusters": {"num_clusters": 3}},
        "languages": {
            "min_confidence": 0.5,
            "before": {"en": 4, "de": 1},
            "after": {"en": 3, "de": 0},
        },
        "caption_sample": [
            [HOSTILE, "kept", "en"],
            ["a red square", "kept", "en"],
            ["Ein rotes Haus", "caption_length/too few words", "de"],
        ],
        "samples": {
            "kept": [sample | {"caption": HOSTILE}],
            "caption_length/too few words": [sample | {"caption": "short", "key": "2"}],
            "no image": [nowhere | {"caption": None}],
        },
        "duplicates": {
            "dedup": {
                "num_dropped": 12,
                "groups": [
                    {
                        "best": sample | {"caption": HOSTILE, "outcome": HOSTILE},
                        "num_dropped": 11,
                        "dropped": [sample | {"caption": HOSTILE, "key": "3"}],
                    }
                ],
            }
        },
        "outliers": {
            "poison.score": {
                "end": "highest",
                "samples": [
                    sample | {"caption": HOSTILE, "value": 12.3456, "outcome": HOSTILE},
                    nowhere | {"caption": None, "value": 2.0, "outcome": "kept"},
                ],
            }
        },
        "captions": {
            "caption_count": [{"caption": HOSTILE, "count": 7, "outcomes": {HOSTILE: 4, "kept": 3}}]
        },
        "shards": {"num_read": 1, "num_bytes": 1, "damaged": [], "quarantined": []},
    }
    report["shards"]["damaged"] = [{"shard": "1.tar", "why": "short block"}]
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/report.json").write_text(json.dumps(report))
    (tmp_path / "pretrain").mkdir()
    steps = [
        {"step": n, "samples_seen": 100 * n, "loss": 3.0 / n, "samples_per_second": 50 + n}
        for n in (1, 2, 3)
    ]
    steps[1]["loss"] = float("nan")
    lines = [json.dumps(step | {"seconds": 2.0}) for step in steps]
    (tmp_path / "pretrain/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "sam')
    write_results(tmp_path / "results", picture)
    return tmp_path


def write_results(folder: Path, picture: bytes) -> None:
    folder.mkdir()
    row = {
        "checkpoint": "runs/x",
        "checkpoint_digest": "cc",
        "samples_seen": 300,
        "dataset": "letters",
        "method": "zero_shot",
        "metric": "top1",
        "value": 0.59,
        "interval": [0.55, 0.63],
        "chance": 0.02,
        "n": 364,
        "seed": 0,
        "metric_definition": "share of images",
        "prompt_digest": "p",
        "data_digest": "d",
        "config_digest": "e",
        "version": "0",
        "seconds": 1.0,
    }
    baseline = row | {"checkpoint": "pixel-1nn", "value": 0.175, "interval": [0.15, 0.2]}
    (folder / "results.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(baseline) + "\n")
    image = {"key": "1", "png": base64.b64encode(picture).decode()}
    broken = {"key": "2", "png": 'not base64 "><script>'}
    found = [{**image, "score": 0.9, "right": True}, {**broken, "score": 0.5, "right": False}]
    answers = [{"text": HOSTILE, "score": 0.8, "right": True}]
    example = {"checkpoint": "runs/x", "dataset": "unseen", "task": "retrieval"}
    example["text_to_image"] = [{"text": HOSTILE, "images": found}]
    example["image_to_text"] = [{"image": image, "own_texts": [HOSTILE], "texts": answers}]
    (folder / "examples.json").write_text(json.dumps([example]))


def make_long_run(folder: Path, num_rows: int) -> Path:
    """A run with a row a step: one spike, skipped steps, a restart, two stages, and a probe set."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, num_rows)
    with open(folder / "metrics.jsonl", "w") as file:
        for n in range(num_rows):
            row = {
                "stage": int(2 * n >= num_rows), "samples_seen": 256 * (n + 1),
                "loss": 2.0 + noise[n] + (n == num_rows // 3) * 7.0, 
                "samples_per_second": 900.0, "gradient_norm": 1.0,
                "clip_rate": float(n % 100 == 0), "skipped_steps": int(n > num_rows // 4),
                "logit_scale": 14.0, "learning_rate": 1e-3, "peak_memory_bytes": 2**30,
                "seconds": 0.3,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
        judged = {"samples_seen": 256 * num_rows, "evaluation/letters/top1": 0.4}
        file.write(json.dumps(judged | {"evaluation_seconds": 1.0}) + "\n")
    starts = [("start", 0), ("resume", 128 * num_rows), ("went back", 192 * num_rows)]
    lines = [
        json.dumps({"samples_seen": at, "reason": why, "ranks": 2, "time": "2026-01-01T00:00:00"})
        for why, at in starts
    ]
    (folder / "starts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(f"seed: 0\noutput: {folder}\nsamples: {num_rows}\n")
    probe = folder / "probe/letters"
    probe.mkdir(parents=True)
    labels = [HOSTILE if i % 2 else "b" for i in range(40)]
    (probe / "images.json").write_text(json.dumps({"keys": labels, "labels": labels}))
    for samples in range(10):
        moved = rng.normal(size=(40, 8)) + np.array([[samples * (i % 2)] * 8 for i in range(40)])
        np.save(probe / f"samples-{samples:012d}.npy", moved.astype(np.float32))
    return folder
