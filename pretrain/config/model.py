"""What is trained: tokens, patches, logits and the teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from configs.registry import Config


class TokenizerConfig(Config):
    """How captions become ids.

    `words`: a word-level vocabulary, trained on the captions of the dataset. `clip`: CLIP's
    byte-pair encoding, open_clip's ids. `file`: any Hugging Face tokenizer.json.
    """

    name: Literal["words", "clip", "file"] = "words"
    vocab_size: PositiveInt = 8192  # words
    num_captions: PositiveInt = 10_000_000  # words: enough whole shards to reach this
    path: str | None = None  # file
    end_token: str | None = None  # file: where it does not end texts by itself
    pad_token: str | None = None  # file: where it does not pad

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        keys = {"words": ("vocab_size", "num_captions"), "clip": (),
                "file": ("path", "end_token", "pad_token")}  # fmt: skip
        given = {k for k in self.model_fields_set - {"name"} if getattr(self, k) is not None}
        defaults = {k for k in given if getattr(self, k) == type(self).model_fields[k].default}
        foreign = sorted(given - set(keys[self.name]) - defaults)
        if foreign:
            raise ValueError(f"tokenizer {self.name} takes no {', '.join(foreign)}")
        if self.name == "file" and self.path is None:
            raise ValueError("tokenizer file needs a path")
        return self


class LogitConfig(Config):
    """logit = scale * score + bias. null: as the papers of objective and similarity start it."""

    scale: PositiveFloat | None = None
    bias: float | None = None
    learnable: bool | None = None
    min_scale: NonNegativeFloat = 0.0  # open_clip holds it at 1 or more; EuCLIP may start below
    max_scale: PositiveFloat = 100.0


class TowerConfig(Config):
    """Where one tower starts and how it learns; null: as the rest of the run."""

    learning_rate: PositiveFloat | None = Field(
        default=None,
        description="where optimizer.learning_rate is the others'; a schedule moves both alike",
    )
    weight_decay: NonNegativeFloat | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the learning rate, a block
    lock: bool = False  # frozen (LiT), but for the last groups:
    # 1: the last norm and the projection, 2: also the last block, and so on
    unlocked_groups: NonNegativeInt = 0
    initial: str | None = Field(
        default=None,
        description="start from these weights: a run, checkpoint or model folder of pairmill or "
        "open_clip, open_clip:MODEL/TAG, or timm:MODEL (pretrain/model/initial.py)",
    )

    @model_validator(mode="after")
    def _groups_of_a_locked_tower(self) -> Self:
        if self.unlocked_groups and not self.lock:
            raise ValueError("unlocked_groups are those of a locked tower: set lock: true")
        return self


class TowersConfig(Config):
    """Both towers."""

    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()

    def of(self, tower: str) -> TowerConfig:
        """Return the section of `image` or `text`."""
        return self.image if tower == "image" else self.text

    @property
    def have_rates(self) -> bool:
        """Whether a tower has a learning rate of its own."""
        return any(tower.learning_rate is not None for tower in (self.image, self.text))


class TeacherConfig(Config):
    """The frozen teacher of the distillation objectives."""

    checkpoint: str = Field(description="a pairmill run, checkpoint or model folder; cosine")
