"""Group the members of a tar to samples: names become keys and extensions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from curation.shards import Batch, Member

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "image"}
)
CAPTION_EXTENSIONS = frozenset({"txt", "json"})
_USUAL_EXTENSIONS = IMAGE_EXTENSIONS | CAPTION_EXTENSIONS | {"cls", "npy", "npz"}


@dataclass(slots=True)
class SampleMembers:
    """The members of one sample, in tar order: (extension, number of the member in its tar)."""

    key: str
    occurrence: int = 0  # how often the key came before in this shard
    members: list[tuple[str, int]] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)

    def extend(self, members: Iterable[tuple[str, int]]) -> None:
        """Add members."""
        for extension, member in members:
            self.members.append((extension, member))
            self.extensions.add(extension)


def is_image(extension: str) -> bool:
    """Tell whether members of an extension are pictures: "jpg", and "input.jpg" as well."""
    return extension in IMAGE_EXTENSIONS or extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into its sample's key and its lower-cased extension.

    None for what is no part of a sample, or would leave a folder when unpacked: no extension, a
    hidden file, an absolute path, a path with `..`, a NUL.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or "\0" in name:
        return None
    if name.startswith("/") or ".." in folder.split("/"):
        return None
    return folder + slash + stem, extension.lower()


class SampleGrouper:
    """Group members to samples: a run of members that share a key, until an extension repeats.

    A tar may be ordered by extension, so a later run joins the sample of its key; but only where it
    cannot put one sample's picture beside another's caption: the key has one sample so far, which
    has neither an image where the run has one nor any of the run's extensions, and the run is not a
    sample by itself (an image with a caption). Every other run is a new sample.
    """

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()  # why -> members that belong to no sample
        self.num_members = 0
        self._samples: list[SampleMembers] = []
        self._first: dict[str, SampleMembers] = {}
        self._num_of_key: dict[str, int] = {}
        self._run = SampleMembers("")
        self._prefix = ""  # of the names of the run's members

    def add(self, member: Member) -> str | None:
        """Add the next member; return its extension, or None where it belongs to no sample."""
        return self._add(member.name, member.kind)

    def add_batch(self, batch: Batch) -> list[str | None]:
        """Add the next members; return the extension of each, None where it is of no sample."""
        return self.add_names(batch.names, batch.kinds)

    def add_names(self, names: Iterable[str], kinds: Mapping[int, str]) -> list[str | None]:
        """Add the next members by name; `kinds` has, by position, those that are no files."""
        found: list[str | None] = []
        add, number = found.append, self.num_members
        prefix, run = self._prefix, self._run
        for row, name in enumerate(names):
            # The members of a sample mostly stand together, with names like those before.
            if prefix and name.startswith(prefix):
                extension = name[len(prefix) :]
                if (
                    extension in _USUAL_EXTENSIONS
                    and extension not in run.extensions
                    and row not in kinds
                ):
                    run.members.append((extension, number))
                    run.extensions.add(extension)
                    number += 1
                    add(extension)
                    continue
            self.num_members = number
            add(self._add(name, kinds.get(row, "file")))
            number += 1
            prefix, run = self._prefix, self._run
        self.num_members = number
        return found

    def _add(self, name: str, kind: str) -> str | None:
        number = self.num_members
        self.num_members += 1
        parts = split_name(name) if kind == "file" else None
        if parts is None:
            self.ignore(name, kind)
            return None
        key, extension = parts
        run = self._run
        if not run.members or run.key != key or extension in run.extensions:
            self._end_run()
            run = self._run = SampleMembers(key)
            self._prefix = key + "."
        run.members.append((extension, number))
        run.extensions.add(extension)
        return extension

    def ignore(self, name: str, kind: str) -> None:
        """Count a member that belongs to no sample."""
        if kind == "folder" or (kind == "file" and name.endswith("/")):
            return  # not a thing that could be lost
        if kind != "file":
            self.ignored[kind] += 1
        elif name.startswith("/"):
            self.ignored["absolute path"] += 1
        elif ".." in name.split("/"):
            self.ignored["path with .."] += 1
        else:
            self.ignored["name without key or extension"] += 1

    def finish(self) -> list[SampleMembers]:
        """Return the samples of all members added, in the order of their first members."""
        self._end_run()
        return self._samples

    def _end_run(self) -> None:
        run = self._run
        if not run.members:
            return
        self._run, self._prefix = SampleMembers(""), ""
        occurrence = self._num_of_key.get(run.key, 0)
        if occurrence == 1 and _belongs(run, self._first[run.key]):
            self._first[run.key].extend(run.members)
            return
        run.occurrence = occurrence
        self._num_of_key[run.key] = occurrence + 1
        self._first.setdefault(run.key, run)
        self._samples.append(run)


def _belongs(run: SampleMembers, sample: SampleMembers) -> bool:
    has_image = not IMAGE_EXTENSIONS.isdisjoint(run.extensions)
    is_sample = has_image and not CAPTION_EXTENSIONS.isdisjoint(run.extensions)
    has_both = has_image and not IMAGE_EXTENSIONS.isdisjoint(sample.extensions)
    return not is_sample and not has_both and run.extensions.isdisjoint(sample.extensions)
