"""Drop samples by lists of domains and URLs."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import xxhash

from configs.errors import UsageError
from curation.filters.base import Filter, Judgement, filters, needing


def split_url(url: str) -> tuple[str, str] | None:
    """Return a URL's host and what follows it, or None where it has none.

    The host is in lower case, without user, port, a last dot or a first `www.`; scheme and
    fragment do not count.
    """
    text = url.strip()
    try:
        parts = urlsplit(text if "//" in text[:16] else f"//{text}")
        host = (parts.hostname or "").rstrip(".").removeprefix("www.")
    except ValueError:  # "http://[bad"
        return None
    rest = parts.path + (f"?{parts.query}" if parts.query else "")
    return (host, "" if rest == "/" else rest) if host else None


class UrlList:
    """Domains and URLs; a domain stands for all below it, a path for all that starts with it."""

    def __init__(self, entries: Iterator[str]) -> None:
        self._domains: set[str] = set()
        self._urls: dict[str, list[str]] = {}
        for entry in entries:
            parts = split_url(entry)
            if parts is None:
                raise UsageError(f"url: {entry!r} is no domain and no URL.")
            host, rest = parts
            if rest:
                self._urls.setdefault(host, []).append(rest)
            else:
                self._domains.add(host)

    def find(self, url: tuple[str, str]) -> str | None:
        """Return "domain" or "url" for what of the list covers a URL, None for nothing."""
        host, rest = url
        labels = host.split(".")
        if any(".".join(labels[i:]) in self._domains for i in range(len(labels))):
            return "domain"
        return "url" if any(map(rest.startswith, self._urls.get(host, ()))) else None


@filters.register("url")
def url(
    *,
    block: tuple[str, ...] = (),
    block_file: Path | None = None,
    allow: tuple[str, ...] = (),
    allow_file: Path | None = None,
    column: str = "json.url",
) -> Filter:
    """Drop samples whose URL is on a block list, or is not on the allow list.

    An entry is a domain (`example.com`, with all below it) or a URL (`example.com/ads/`, with all
    that starts with it; the scheme and `www.` do not count). Files have one entry a line, `#`
    starts a comment, .gz is read. `column` is where the URL stands: a field of the sample's
    `.json`. A sample without a URL passes a block list, but not an allow list.
    """
    digests: list[str] = []
    blocked = UrlList(_entries(block, block_file, digests))
    allowed = UrlList(_entries(allow, allow_file, digests)) if allow or allow_file else None

    def why(text: str | None) -> str | None:
        parts = None if text is None else split_url(text)
        if parts is None:
            return "no url" if allowed else None
        found = blocked.find(parts)
        if found:
            return f"blocked {found}"
        return "not an allowed url" if allowed and not allowed.find(parts) else None

    def judge(samples: pa.Table) -> Judgement:
        reasons = pa.array(map(why, samples[column].to_pylist()), pa.string())
        return Judgement({}, reasons)

    return needing({column}, judge, digest=" ".join(digests))


def _entries(entries: tuple[str, ...], file: Path | None, digests: list[str]) -> Iterator[str]:
    yield from entries
    if file is None:
        return
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(
            f"url: the list {file} cannot be read ({error}). Expected UTF-8 text, one domain or "
            "URL a line, also with .gz behind."
        ) from None
    digests.append(xxhash.xxh3_128_hexdigest(data))
    for line in text.splitlines():
        entry = line.split("#", 1)[0].strip()
        if entry:
            yield entry
