"""One pass over a dataset's images and texts. Every method runs on what comes out of here.

Features are float32, on the CPU, and not normalized (some methods need the length); a method
embeds them through the model's similarity.

Legend: n images, m captions, C classes, T templates, D embedding width, b a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from configs.errors import DataError, PairmillError
from configs.progress import Bar, progress
from evaluation.dataset import AnyDataset, ClassificationDataset, ImageSample, RetrievalDataset
from evaluation.encoder import Encoder
from evaluation.images import UndecodableImageError, read_image
from pretrain.model.similarity import Similarity

NUM_NAMED = 5  # undecodable images that a message names


@dataclass(frozen=True)
class Features:
    """The features of one dataset under one model, and the model's similarity."""

    image_nD: Tensor
    text_CD: Tensor  # class vectors (zero-shot) or caption features (retrieval)
    similarity: Similarity


@dataclass(frozen=True)
class EncodeOptions:
    """How to run over the images; none of it changes what is computed."""

    batch_size: int = 256
    num_workers: int = 0
    max_undecodable: int = 0


# Preprocessed pixels, why an image cannot be decoded, or what ends the run.
_Item = Tensor | str | PairmillError | OSError


class _Batch:
    """Preprocessed pixels of the images that could be decoded, and the reasons of the others.

    Errors are values here: one raised in a worker process would arrive with its traceback as text.
    """

    def __init__(self, items: Sequence[tuple[int, _Item]]) -> None:
        self.pixels = [item for _, item in items if isinstance(item, Tensor)]
        self.undecodable = {position: item for position, item in items if isinstance(item, str)}
        self.errors = [item for _, item in items if isinstance(item, PairmillError | OSError)]
        self.num_samples = len(items)


class _Pictures(torch.utils.data.Dataset[tuple[int, _Item]]):
    def __init__(
        self, samples: Sequence[ImageSample], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[int, _Item]:
        try:
            return position, self.transform(read_image(self.samples[position].image))
        except UndecodableImageError as error:
            return position, str(error)
        except (PairmillError, OSError) as error:
            return position, error


def keep_decodable(dataset: AnyDataset, undecodable: dict[int, str], limit: int) -> AnyDataset:
    """Return the dataset without its undecodable images, if they are at most `limit`.

    They are counted and named on stderr. Raises DataError where they are more, or nothing is left.
    """
    if not undecodable:
        return dataset
    named = [
        f"{dataset.samples[position].key} in {dataset.samples[position].image.tar.name} ({reason})"
        for position, reason in sorted(undecodable.items())[:NUM_NAMED]
    ]
    more = len(undecodable) - len(named)
    text = (
        f"{dataset.name}: {len(undecodable)} of {len(dataset.samples):,} images cannot be decoded: "
        f"{', '.join(named)}{f' and {more} more' if more else ''}"
    )
    if len(undecodable) > limit or len(undecodable) == len(dataset.samples):
        raise DataError(
            f"{text}. Expected at most max_undecodable={limit}. Mend the dataset; or raise "
            "max_undecodable, and the result will stand on fewer images (n in its row)."
        )
    print(f"warning: {text}; left out", file=sys.stderr)
    return dataset.without(list(undecodable))


def encode_dataset(
    encoder: Encoder, dataset: AnyDataset, options: EncodeOptions
) -> tuple[Features, AnyDataset]:
    """Encode every image and text once; return the features and the dataset that they belong to.

    The dataset is the one given, less the images that cannot be decoded (see keep_decodable).
    """
    num_texts = (
        len(dataset.class_names)
        if isinstance(dataset, ClassificationDataset)
        else len(dataset.captions)
    )
    total = len(dataset.samples) + num_texts
    with progress(f"encode {dataset.name}", total=total, unit="images and texts") as bar:
        image_nD, undecodable = _encode_images(encoder, dataset, options, bar)
        dataset = keep_decodable(dataset, undecodable, options.max_undecodable)
        if isinstance(dataset, RetrievalDataset):
            text_CD = _encode_unique(
                dataset.captions, options.batch_size, encoder.encode_texts, bar
            )
        else:
            text_CD = class_vectors(encoder, dataset, options.batch_size, bar)
    return Features(image_nD, text_CD, encoder.similarity), dataset


def _encode_images(
    encoder: Encoder, dataset: AnyDataset, options: EncodeOptions, bar: Bar
) -> tuple[Tensor, dict[int, str]]:
    loader = DataLoader(
        _Pictures(dataset.samples, encoder.transform),
        batch_size=options.batch_size,
        num_workers=min(options.num_workers, -(-len(dataset.samples) // options.batch_size)),
        collate_fn=_Batch,
    )
    features: list[Tensor] = []
    undecodable: dict[int, str] = {}
    for batch in loader:
        if batch.errors:
            raise batch.errors[0]
        if batch.pixels:
            features.append(encoder.encode_images(torch.stack(batch.pixels)))
        undecodable |= batch.undecodable
        bar.advance(batch.num_samples, samples=batch.num_samples)
    return torch.cat(features) if features else torch.empty(0, 0), undecodable


def class_vectors(
    encoder: Encoder, dataset: ClassificationDataset, batch_size: int, bar: Bar
) -> Tensor:
    """Return one vector a class [C, D]: the model's similarity combines the prompts of a class.

    For cosine: normalize, mean over templates, normalize (reference: OpenAI's notebook).
    """
    num_templates = len(dataset.templates)

    def encode(class_names: Sequence[str]) -> Tensor:
        prompts = [prompt for name in class_names for prompt in dataset.prompts(name)]
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        feature_pD = torch.cat([encoder.encode_texts(batch) for batch in batches])
        return encoder.similarity.class_vectors(
            feature_pD.reshape(len(class_names), num_templates, -1)
        )

    num_classes_at_once = max(1, batch_size // num_templates)
    return _encode_unique(dataset.class_names, num_classes_at_once, encode, bar)


def _encode_unique(
    texts: Sequence[str], batch_size: int, encode: Callable[[Sequence[str]], Tensor], bar: Bar
) -> Tensor:
    """Encode each distinct text once, so that equal texts have equal features and tie exactly."""
    position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    unique = list(position)
    features = []
    for start in range(0, len(unique), batch_size):
        batch = unique[start : start + batch_size]
        features.append(encode(batch))
        bar.advance(len(batch))
    bar.advance(len(texts) - len(unique))
    return torch.cat(features)[torch.tensor([position[text] for text in texts])]
