"""Make the rows of an index from the members of a tar, column by column, while it is read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.captions import TOO_LONG, CaptionFinder
from curation.columns import HASH_ALONE, columns_of, find_values, needs_image, needs_json
from curation.contents import Contents, Size
from curation.grouping import SampleGrouper, SampleMembers, is_image
from curation.names import Extensions, NameGroups, Names, decode_names, split_names
from curation.row_columns import Rows
from curation.shards import Batch
from curation.spans import LocalReader, SpanReader

# Of all captions of a shard, in characters.
MAX_SHARD_CAPTIONS = 256 << 20

Ints = npt.NDArray[np.int64]
_NO_INTS = np.zeros(0, np.int64)


class _Part(NamedTuple):
    """A batch of members of the usual kind, and of those that are no files."""

    names: Names
    rows: Ints  # in the batch
    strangers: dict[int, tuple[str, str]]  # row -> name, kind


class RowBuilder:
    """Takes the members of one tar and returns its samples as a table (index.SCHEMA)."""

    def __init__(
        self,
        reader: SpanReader,
        *,
        source: str,
        shard: str,
        places: Sequence[str],
        max_pixels: int,
        columns: Sequence[str] = (),
    ) -> None:
        self.grouper = SampleGrouper()
        self.unreadable: Counter[str] = Counter()
        self.num_repeated_keys = 0
        self._reader = reader
        self._uid = hashlib.blake2b(f"{source}\0{shard}\0".encode(), digest_size=16)
        self._finder = CaptionFinder(places)
        self._columns = tuple(sorted(columns))
        self._of_json = tuple(name for name in self._columns if needs_json(name))
        self._kept_extensions = self._finder.extensions | ({"json"} if self._of_json else set())
        self._contents = Contents(reader, max_pixels, filter(needs_image, self._columns))
        self._captions_left = MAX_SHARD_CAPTIONS
        self._extensions = Extensions()
        # By number of the extension; the last is for -1, a member of no sample.
        self._is_kept = np.zeros(1, np.bool_)
        self._is_image = np.zeros(1, np.bool_)
        # Names of members, as long as all are of the usual kind; None from then on.
        self._usual: list[_Part] | None = []
        # Their samples, if the table can be made of these.
        is_simple = self._finder.simple is not None and not self._of_json
        self._groups = NameGroups() if is_simple else None
        self._uids: list[bytes] = []
        self._spans: list[tuple[Ints, Ints, Ints]] = []  # starts, offsets, sizes of members
        self._num_members = 0
        self._offsets: list[int] = []  # once all are known
        self._sizes: list[int] = []
        self._truncated: int | None = None  # the number of the member that was cut
        self._images: dict[int, Size] = {}

    def add(self, batch: Batch) -> None:
        """Add members, and read what the index needs of them."""
        codes = self._codes(batch)
        self._spans.append((batch.starts, batch.offsets, batch.sizes))
        first, self._num_members = self._num_members, self._num_members + len(codes)
        if batch.is_last_truncated:
            self._truncated = self._num_members - 1
            codes[-1] = -1
        contents, kept = self._contents, np.flatnonzero(self._is_kept[codes])
        is_caption = codes[kept] == self._extensions.known(self._finder.simple)
        contents.keep(contents.captions, batch, kept[is_caption], first)
        # A JSON is for samples without a text. If they are few, a disk gives it again.
        is_rare = isinstance(self._reader, LocalReader) and 2 * is_caption.sum() >= len(kept)
        if self._of_json or not is_rare:
            contents.keep(contents.others, batch, kept[~is_caption], first)
        contents.add_images(batch, np.flatnonzero(self._is_image[codes]), first)

    def _codes(self, batch: Batch) -> Ints:
        """Return the number of each member's extension; -1 where it is of no sample."""
        part = None if self._usual is None else self._usual_part(batch)
        if part is None or self._usual is None or not self._group(part):
            self._give_to_grouper()
            found = self.grouper.add_batch(batch)
            codes = np.array([-1 if e is None else self._extensions.code(e) for e in found])
        else:
            self._usual.append(part)
            codes = np.full(len(batch.starts), -1)
            codes[part.rows] = part.names.codes
        new = self._extensions.names[len(self._is_kept) - 1 :]
        is_kept = [name in self._kept_extensions for name in new]
        is_picture = [is_image(name) and name not in self._kept_extensions for name in new]
        self._is_kept = np.array([*self._is_kept[:-1], *is_kept, False])
        self._is_image = np.array([*self._is_image[:-1], *is_picture, False])
        return codes

    def _usual_part(self, batch: Batch) -> _Part | None:
        """Return the names of a batch if none is long; links, folders and such do not matter."""
        if batch.long_names.keys() != batch.kinds.keys() or batch.is_last_truncated:
            return None
        strangers = {row: (batch.long_names[row], kind) for row, kind in batch.kinds.items()}
        rows, texts = np.arange(len(batch.starts)), batch.raw_names
        if strangers:
            rows = np.delete(rows, list(strangers))
            texts = texts[rows]
        names = split_names(texts, self._extensions)
        return None if names is None else _Part(names, rows, strangers)

    def _group(self, part: _Part) -> bool:
        """Group names to samples, now and not at the end: the next are being read meanwhile.

        False: a key came before, or an extension of its sample.
        """
        keys = [] if self._groups is None else self._groups.add(part.names)
        if keys is None:
            return False
        uid, rest = self._uid, b"\x000"
        for key in keys:
            hasher = uid.copy()
            hasher.update(key + rest)
            self._uids.append(hasher.digest())
        return True

    def _give_to_grouper(self) -> None:
        """Let the one that can do all of them do the usual ones too."""
        for names, rows, strangers in self._usual or ():
            num = len(rows) + len(strangers)
            texts = [strangers.get(row, ("", ""))[0] for row in range(num)]
            for row, text in zip(rows.tolist(), decode_names(names.texts, {}), strict=True):
                texts[row] = text
            self.grouper.add_names(texts, {row: kind for row, (_, kind) in strangers.items()})
        self._usual = None

    def _content(self, number: int, num_bytes: int) -> bytes:
        return self._contents.content(number, self._offsets[number], num_bytes)

    def table(self) -> pa.Table:
        """Return the samples of all members added."""
        spans = zip(*self._spans, strict=True) if self._spans else [[_NO_INTS]] * 3
        starts, offsets, sizes = (np.concatenate(column) for column in spans)
        self._offsets, self._sizes = offsets.tolist(), sizes.tolist()
        rows = self._usual_rows()
        if rows is None:
            self._give_to_grouper()
            rows = self._rows_of(self.grouper.finish())
        self.unreadable.update(filter(None, rows.problems))
        numbers = np.array(rows.numbers, np.int64)
        starts, offsets, sizes = starts[numbers], offsets[numbers], sizes[numbers]
        if self._truncated is not None:
            sizes = np.minimum(sizes, self._reader.end() - offsets)
        table = rows.table(starts, offsets, sizes)
        if rows.image_hashes is None:
            columns = columns_of(rows.values, self._columns)
        else:
            columns = {"image_hash": pa.array(rows.image_hashes, pa.binary(16))}
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    def _usual_rows(self) -> Rows | None:
        """Return the rows if every key comes once, its members side by side; None: they do not."""
        parts, groups = self._usual, self._groups
        if not parts or groups is None:
            return None
        keys, ends = groups.keys, groups.bounds()
        codes = np.concatenate([part.names.codes for part in parts])
        shifts = np.cumsum([0, *(len(p.rows) + len(p.strangers) for p in parts)])
        numbers = np.concatenate([p.rows + at for p, at in zip(parts, shifts, strict=False)])
        owners = np.repeat(np.arange(len(keys)), np.diff(ends))
        rows = Rows()
        if not self._usual_captions(rows, codes, numbers, owners, ends):
            return None
        rows.keys, rows.ends, rows.numbers, rows.uids = keys, ends[1:], numbers, self._uids
        self._usual_images(rows, codes, numbers, owners)
        for part in parts:
            for name, kind in part.strangers.values():
                self.grouper.ignore(name, kind)
        return rows

    def _usual_captions(
        self, rows: Rows, codes: Ints, numbers: Ints, owners: Ints, ends: Ints
    ) -> bool:
        """Fill in the captions, and as `problems` those of captions; False: they are too many."""
        num, texts = len(ends) - 1, self._contents.captions
        found_at = np.full(num, -1)  # where in `texts` the caption of a sample is
        found_at[owners[np.searchsorted(numbers, texts.numbers)]] = np.arange(len(texts.numbers))
        captions = texts.array()
        rows.all_captions, rows.problems = [None] * num, [None] * num
        if captions.nbytes > MAX_SHARD_CAPTIONS:
            return False
        captions = captions.take(pa.array(found_at, mask=found_at < 0))
        lacking = np.flatnonzero(found_at < 0).tolist()
        rows.captions = captions.view(pa.string())
        try:
            rows.captions.validate(full=True)  # each is UTF-8
        except pa.ArrowInvalid:
            lacking = list(range(num))
        if not lacking:
            return True
        listed: list[Any] = [None] * num if len(lacking) == num else rows.captions.to_pylist()
        extensions, num_characters = self._extensions.names, captions.nbytes
        for owner in lacking:
            span = slice(ends[owner], ends[owner + 1])
            named = [extensions[code] for code in codes[span].tolist()]
            members = list(zip(named, numbers[span].tolist(), strict=True))
            found, rows.problems[owner] = self._finder.find(members, self._sizes, self._content)
            listed[owner] = found[0] if found else None
            rows.all_captions[owner] = found if len(found) > 1 else None
            num_characters += sum(map(len, found))
        rows.captions = listed
        return bool(num_characters <= MAX_SHARD_CAPTIONS)

    def _usual_images(self, rows: Rows, codes: Ints, numbers: Ints, owners: Ints) -> None:
        """Fill in the images, and their problems before those of captions."""
        extensions, num = pa.array(self._extensions.names, pa.string()), len(rows.keys)
        image_numbers, sizes = self._contents.image_sizes()
        at = np.searchsorted(numbers, image_numbers)
        is_first = np.diff(owners[at], prepend=-1) > 0  # of its sample
        at, image_numbers, sizes = at[is_first], image_numbers[is_first], sizes[is_first]
        owner_of = owners[at]
        rows.image_at = image_at = np.full(num, -1)
        image_at[owner_of] = at
        rows.pixels = pixels = np.zeros((num, 2), np.int64)
        pixels[owner_of] = sizes
        for owner in np.flatnonzero(image_at < 0).tolist():
            rows.problems[owner] = "no image"
        if self._contents.odd_images:
            for owner, number in zip(owner_of.tolist(), image_numbers.tolist(), strict=True):
                if number in self._contents.odd_images:
                    rows.problems[owner] = self._contents.odd_images[number][1]
        rows.extensions = extensions.take(pa.array(codes))
        rows.image_extensions = rows.extensions.take(pa.array(image_at, mask=image_at < 0))
        if self._columns:
            number_of = np.full(num, -1)
            number_of[owner_of] = image_numbers
            self._usual_values(rows, number_of)

    def _usual_values(self, rows: Rows, number_of: Ints) -> None:
        """Fill in what the columns of the job are of the images, by number; -1: none."""
        if self._columns == HASH_ALONE:
            hashes = self._contents.image_hashes(number_of)
            for row, problem in enumerate(rows.problems):
                if problem is not None:
                    hashes[row] = None
            rows.image_hashes = hashes
            return
        self._contents.settle()
        values, pairs = self._contents.values, zip(number_of.tolist(), rows.problems, strict=True)
        rows.values = [values.get(n, {}) if problem is None else {} for n, problem in pairs]

    def _rows_of(self, samples: Sequence[SampleMembers]) -> Rows:
        self.num_repeated_keys = sum(sample.occurrence > 0 for sample in samples)
        self._images = self._contents.images()
        self._contents.settle()
        rows = Rows()
        for sample in samples:
            self._add_row(rows, sample)
        return rows

    def _add_row(self, rows: Rows, sample: SampleMembers) -> None:
        whole, truncated = sample.members, None
        if self._truncated is not None:
            whole = [member for member in sample.members if member[1] != self._truncated]
            truncated = "truncated" if len(whole) < len(sample.members) else None
        hasher = self._uid.copy()
        hasher.update(f"{sample.key}\0{sample.occurrence}".encode())
        captions, caption_problem = self._finder.find(whole, self._sizes, self._content)
        if captions:
            self._captions_left -= sum(map(len, captions))
            if self._captions_left < 0:
                captions, caption_problem = [], TOO_LONG
        image_extension, image, size = None, None, None
        problem: str | None = "no image"
        images = self._images
        for extension, number in whole:
            if number in images:
                image_extension, image = extension, number
                size, problem = images[number]
                break
        problem = truncated or problem or caption_problem
        rows.uids.append(hasher.digest())
        rows.keys.append(sample.key)
        rows.captions.append(captions[0] if captions else None)
        rows.all_captions.append(captions if len(captions) > 1 else None)
        rows.image_extensions.append(image_extension)
        image_at = -1
        rows.pixels.append(size)
        rows.problems.append(problem)
        for extension, number in sample.members:
            if number == image:
                image_at = len(rows.numbers)
            rows.extensions.append(extension)
            rows.numbers.append(number)
        rows.image_at.append(image_at)
        rows.ends.append(len(rows.numbers))
        if self._columns:
            rows.values.append(self._row_values(whole, image) if problem is None else {})

    def _row_values(self, members: list[tuple[str, int]], image: int | None) -> dict[str, Any]:
        values = dict(self._contents.values.get(-1 if image is None else image, {}))
        if self._of_json:
            number = next((number for extension, number in members if extension == "json"), None)
            if number is not None:
                content = self._content(number, self._sizes[number])
                values |= find_values(content, self._of_json)
        return values
