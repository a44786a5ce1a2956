"""What is trained on and what is held out.

Characters whose drawings are equal in any training face (Latin A, Greek Alpha, Cyrillic A) are
linked into *groups*; a group is trained on or held out as a whole, so that no held-out drawing is
met in training under another name. The held-out tenth is the retrieval set `unseen`. The DejaVu
Serif family is held out for the classification set `serif`, over the characters that training shows
in >= MIN_TRAINING_FACES faces and without the drawings that a training face shares. Equal means
every pixel at CANONICAL_SIZE_PIXELS: drawings that differ by a hair (some twenty pairs of classes,
such as e with diaeresis and Cyrillic io) stay two.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from configs import draws
from tools.glyph_pool.captions import character_name
from tools.glyph_pool.fonts import SERIF_FACES, TRAINING_FACES

SEED = 0
HELD_OUT_FRACTION = 0.1
MIN_TRAINING_FACES = 5
LETTERS_AND_DIGITS = frozenset(map(ord, string.ascii_letters + string.digits))

# stem of the face -> code point -> digest of the drawing
Drawings = Mapping[str, Mapping[int, bytes]]
Glyph = tuple[str, int]  # stem, code point


@dataclass(frozen=True)
class UnseenCharacter:
    """One picture of a held-out group, and every code point that this drawing stands for."""

    glyph: Glyph
    codepoints: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """The glyphs of each part of the pool.

    `serif` pairs a glyph with its label; `class_codepoints[label]` are the characters merged into
    that class, lowest first, which names it.
    """

    training: tuple[Glyph, ...]
    unseen: tuple[UnseenCharacter, ...]
    serif: tuple[tuple[Glyph, int], ...]
    class_codepoints: tuple[tuple[int, ...], ...]

    def class_names(self) -> list[str]:
        """Return the name of each class: that of its lowest code point."""
        return [character_name(members[0]) for members in self.class_codepoints]

    def letters_and_digits(self) -> list[int]:
        """Return the labels whose class is named after one of a-z, A-Z, 0-9."""
        members = self.class_codepoints
        return [label for label in range(len(members)) if members[label][0] in LETTERS_AND_DIGITS]


def link_equal_drawings(drawings: Iterable[Mapping[int, bytes]]) -> list[tuple[int, ...]]:
    """Return the groups of characters linked by equal drawings, sorted by lowest code point."""
    parent: dict[int, int] = {}

    def root(codepoint: int) -> int:
        while parent[codepoint] != codepoint:
            parent[codepoint] = parent[parent[codepoint]]
            codepoint = parent[codepoint]
        return codepoint

    first_with: dict[bytes, int] = {}
    for face in drawings:
        for codepoint, digest in face.items():
            parent.setdefault(codepoint, codepoint)
            a, b = root(codepoint), root(first_with.setdefault(digest, codepoint))
            parent[max(a, b)] = min(a, b)
    groups = defaultdict(list)
    for codepoint in sorted(parent):
        groups[root(codepoint)].append(codepoint)
    return [tuple(groups[lowest]) for lowest in sorted(groups)]


def _is_held_out(group: tuple[int, ...]) -> bool:
    return float(draws.uniform(SEED, "glyph_pool/held_out", group[0])) < HELD_OUT_FRACTION


def split_glyphs(drawings: Drawings, limit: int | None = None) -> Split:
    """Split all glyphs; `limit` bounds those of training.

    A limited split takes letters and digits first, or its smaller evaluation would be empty, then
    characters by hash of their group; what is held out is held out under every limit.
    """
    groups = link_equal_drawings(drawings[face.stem] for face in TRAINING_FACES)
    group_of = {codepoint: group for group in groups for codepoint in group}

    def order(codepoint: int) -> tuple[bool, int, int]:
        by_hash = int(draws.bits(SEED, "glyph_pool/limit", group_of[codepoint][0]))
        return codepoint not in LETTERS_AND_DIGITS, by_hash, codepoint

    training: list[Glyph] = []
    held_out = set()
    for codepoint in sorted(group_of, key=order):
        if limit is not None and len(training) >= limit:
            break
        group = group_of[codepoint]
        if _is_held_out(group):
            held_out.add(group)
            continue
        faces = [face for face in TRAINING_FACES if codepoint in drawings[face.stem]]
        training += [(face.stem, codepoint) for face in faces]
    training = training[:limit]
    unseen = tuple(_unseen(group, drawings) for group in sorted(held_out))
    serif, class_codepoints = _serif_classes(training, drawings)
    return Split(tuple(training), unseen, serif, class_codepoints)


def _unseen(group: tuple[int, ...], drawings: Drawings) -> UnseenCharacter:
    codepoint = group[0]
    stems = [face.stem for face in TRAINING_FACES if codepoint in drawings[face.stem]]
    draw = float(draws.uniform(SEED, "glyph_pool/unseen_face", codepoint))
    face = drawings[stems[int(draw * len(stems))]]
    same = tuple(other for other in group if face.get(other) == face[codepoint])
    return UnseenCharacter((stems[int(draw * len(stems))], codepoint), same)


def _serif_classes(
    training: list[Glyph], drawings: Drawings
) -> tuple[tuple[tuple[Glyph, int], ...], tuple[tuple[int, ...], ...]]:
    """Merge the characters that DejaVu Serif's regular face draws alike into one class.

    Left out are drawings that training shows in another family (box drawing, circles, arrows: no
    style there to be unseen), drawings that two classes share (italic Cyrillic te and Latin m:
    nobody could label them), all but the first of a class's equal drawings (its pictures are the
    bootstrap's independent units), and classes of which no picture remains.
    """
    trained = {drawings[stem][codepoint] for stem, codepoint in training}
    num_faces = Counter(codepoint for _, codepoint in training)
    regular = drawings[SERIF_FACES[0].stem]
    seen = {c: d for c, d in regular.items() if num_faces[c] >= MIN_TRAINING_FACES}
    class_of = {
        codepoint: members for members in link_equal_drawings([seen]) for codepoint in members
    }
    classes_of_drawing: dict[bytes, set[tuple[int, ...]]] = defaultdict(set)
    first_glyph: dict[bytes, Glyph] = {}
    for face in SERIF_FACES:
        for codepoint, drawing in drawings[face.stem].items():
            if codepoint in class_of and drawing not in trained:
                classes_of_drawing[drawing].add(class_of[codepoint])
                first_glyph.setdefault(drawing, (face.stem, codepoint))
    glyphs = [first_glyph[d] for d, classes in classes_of_drawing.items() if len(classes) == 1]
    classes = sorted({class_of[codepoint] for _, codepoint in glyphs})
    label_of = {members: label for label, members in enumerate(classes)}
    pictures = tuple((glyph, label_of[class_of[glyph[1]]]) for glyph in glyphs)
    return pictures, tuple(classes)
