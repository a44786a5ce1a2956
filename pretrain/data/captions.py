"""Which caption of a sample is trained on: drawn by position, put into a template.

A sample may have several captions: the original and its rewrites (LaCLIP, Fan et al.,
arXiv:2305.20088). A *place* says where one is: `txt` is the member KEY.txt, `json:rewrites` a field
of KEY.json (text, or a list of texts, one of which is drawn), `txt|json:caption` the first of
several that is there. Without places, the index's own captions are used, each as likely as another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from configs import draws

NUM_DRAWS = 3  # place, text of the place, template
Member = Callable[[str], bytes | None]  # extension -> its bytes


def draw(seed: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the draws [b, 3] of the samples at `positions` [b]."""
    return draws.uniform(seed, "caption", positions[:, None], np.arange(NUM_DRAWS)[None, :])


@dataclass(frozen=True, kw_only=True)
class CaptionChoice:
    """Chooses and frames one caption of a sample; `{caption}` in a template is replaced by it."""

    places: tuple[tuple[str, float], ...] = ()  # place -> weight
    templates: tuple[str, ...] = ("{caption}",)

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that the places read."""
        alternatives = [part for place, _ in self.places for part in place.split("|")]
        return tuple(dict.fromkeys(part.partition(":")[0] for part in alternatives))

    def __call__(
        self, indexed: Sequence[str], member: Member, drawn: npt.NDArray[np.float64]
    ) -> str | None:
        """Return the caption that one row of `draw` chooses; None where the sample has none.

        `indexed` are the captions in the index; `member` reads the places. A place without a text
        leaves its weight to the others.
        """
        which_place, which_text, which_template = drawn.tolist()
        groups = [(list(indexed), 1.0)] if not self.places else self._groups(member)
        groups = [(texts, weight) for texts, weight in groups if texts]
        if not groups:
            return None
        target = which_place * sum(weight for _, weight in groups)
        chosen = groups[-1][0]
        for texts, weight in groups:
            target -= weight
            if target < 0:
                chosen = texts
                break
        caption = chosen[int(which_text * len(chosen))]
        template = self.templates[int(which_template * len(self.templates))]
        return template.replace("{caption}", caption)

    def _groups(self, member: Member) -> list[tuple[list[str], float]]:
        parsed: dict[str, Any] = {}
        return [(texts_at(place, member, parsed), weight) for place, weight in self.places]


def texts_at(place: str, member: Member, parsed: dict[str, Any]) -> list[str]:
    """Return the texts at a place of one sample; `parsed` keeps its JSON members for other places.

    What is not UTF-8, not JSON or not text counts as not there.
    """
    for alternative in place.split("|"):
        extension, _, field = alternative.partition(":")
        try:
            if not field:
                data = member(extension)
                found: Any = None if data is None else data.decode("utf-8")
            else:
                if extension not in parsed:
                    parsed[extension] = json.loads(member(extension) or b"{}")
                found = parsed[extension].get(field)
        except (ValueError, AttributeError, RecursionError):
            parsed.setdefault(extension, {})
            continue
        listed = found if isinstance(found, list) else [found]
        texts = [text for text in listed if isinstance(text, str) and text.strip()]
        if texts:
            return texts
    return []
