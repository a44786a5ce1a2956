"""More than 500 damaged inputs, each kind 20 times and more; for each the exact reason is known.

PAIRMILL_TEST_SEED draws others.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.index import index_path, read_index
from curation.job import curate
from curation.scan import InputShard, ScanTask, scan_shard

TIMES = 20
SEED = int(os.environ.get("PAIRMILL_TEST_SEED") or random.randrange(10**6))
_FILES: dict[tuple[str, int], bytes] = {}


def picture(format: str, shade: int) -> bytes:
    if (format, shade) not in _FILES:
        file = io.BytesIO()
        Image.effect_noise((48, 40), 40 + shade).convert("RGB").save(file, format)
        _FILES[format, shade] = file.getvalue()
    return _FILES[format, shade]


def bomb(rng) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", rng.randint(20_000, 2**31 - 1), 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body
    return start + struct.pack(">I", zlib.crc32(body)) + rng.randbytes(60)


def good(rng, key):
    ext, format = rng.choice([("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
    return [(f"{key}.{ext}", picture(format, rng.randrange(5))), (f"{key}.txt", b"a good caption")]


def link(kind, name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "../../etc/passwd"
    return info


# Each makes the members of one damaged sample, and says what becomes of it: (members, reason).
def no_image(rng, key):
    return [(f"{key}.txt", b"alone")], "no image"


def no_caption(rng, key):
    return good(rng, key)[:1], "no caption"


def empty_image(rng, key):
    return [(f"{key}.jpg", b""), (f"{key}.txt", b"t")], "empty image"


def bad_header(rng, key):
    data = rng.choice([rng.randbytes(300), b"<html>404</html>", b"\xff\xd8\xff", b"\x89PNG\r\n"])
    return [(f"{key}.jpg", data), (f"{key}.txt", b"t")], "bad image header"


def undecodable(rng, key):
    data = picture("JPEG", rng.randrange(5))
    cut = data[: rng.randint(data.index(b"\xff\xda") + 40, len(data) - 60)]
    return [(f"{key}.jpg", cut), (f"{key}.txt", b"t")], "decodable/cannot be decoded"


def pixel_bomb(rng, key):
    return [(f"{key}.png", bomb(rng)), (f"{key}.txt", b"t")], "too many pixels"


def bad_json(rng, key):
    text = rng.choice([b"{", b"", b"[1]", b'"text"', b"\xff\xfe", b'{"caption": "x"', b"[" * 9000])
    return [*good(rng, key)[:1], (f"{key}.json", text)], "bad json"


def bad_text(rng, key):
    text = rng.choice([b"caf\xe9", b"\xff\xfeh\0i\0", b"a\xc3", b"\xed\xa0\x80"])
    return [*good(rng, key)[:1], (f"{key}.txt", text)], "caption not utf-8"


def long_text(rng, key):
    return [*good(rng, key)[:1], (f"{key}.txt", b"x" * ((1 << 20) + 1))], "caption too long"


def fault_of_json_beside_text(rng, key):
    return [*good(rng, key), (f"{key}.json", b"{")], None


SAMPLES = [
    no_image, no_caption, empty_image, bad_header, undecodable, pixel_bomb, bad_json, bad_text,
    long_text, fault_of_json_beside_text,
]  # fmt: skip
# Members that belong to no sample: (member, why it is ignored).
STRANGERS = [
    lambda rng: ((f"/{rng.random()}.jpg", b"x"), "absolute path"),
    lambda rng: ((f"a/../../{rng.random()}.jpg", b"x"), "path with .."),
    lambda rng: (link(tarfile.SYMTYPE, "s.jpg"), "symbolic link"),
    lambda rng: (link(tarfile.LNKTYPE, "h.jpg"), "hard link"),
    lambda rng: (link(tarfile.CHRTYPE, "c.jpg"), "device"),
    lambda rng: (link(tarfile.FIFOTYPE, "f.jpg"), "fifo"),
    lambda rng: ((".hidden", b"x"), "name without key or extension"),
]


@dataclass
class Expected:
    reasons: list[tuple[str, str | None]] = field(default_factory=list)  # of the samples in order
    ignored: Counter = field(default_factory=Counter)
    damage: str | None = None
    quarantined: bool = False
    num_faults: Counter = field(default_factory=Counter)


def write(path: Path, members, format=tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def damaged_samples(rng, path: Path, number: int) -> Expected:
    """One sample of each kind, in any order among good ones; strangers; keys that come again."""
    first = f"g{number:03d}"  # at least one good sample, whatever the draws below say
    expected, parts = Expected(), [(good(rng, first), (first, None))]
    kinds = rng.sample(SAMPLES, len(SAMPLES))
    for at, make in enumerate(kinds):
        key = f"{number:03d}{at:02d}"
        if rng.random() < 0.5:
            parts.append((good(rng, f"g{key}"), (f"g{key}", None)))
        members, reason = make(rng, key)
        parts.append((members, (key, reason)))
        expected.num_faults[make.__name__] += 1
    # Not the last one: right behind it, another kind of picture would be one of its members.
    again = rng.choice([p for p in parts[:-1] if p[1][1] is None])[1][0]
    parts.append((good(rng, again), (again, None)))  # a key within the shard
    parts.append((good(rng, "everywhere"), ("everywhere", None)))  # a key across shards
    expected.num_faults.update(["key within a shard", "key across shards"])
    members = []
    for of_sample, reason in parts:
        members += of_sample
        expected.reasons.append(reason)
        if rng.random() < 0.3:
            member, why = rng.choice(STRANGERS)(rng)
            members.append(member)
            expected.ignored[why] += 1
    for make in STRANGERS:
        member, why = make(rng)
        members.append(member)
        expected.ignored[why] += 1
        expected.num_faults[why] += 1
    write(path, members, rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]))
    return expected


def unordered(rng, path: Path, number: int) -> Expected:
    """All members of one extension, then all of the next, each in another order."""
    keys = [f"u{number:03d}{i}" for i in range(rng.randint(2, 5))]
    texts = rng.sample(keys, len(keys))
    pictures = [(f"{key}.png", picture("PNG", i)) for i, key in enumerate(keys)]
    write(path, [*pictures, *((f"{key}.txt", key.encode()) for key in texts)])
    return Expected([(key, None) for key in keys], num_faults=Counter(["unordered"]))


def truncated(rng, path: Path, number: int) -> Expected:
    """Cut inside a member: samples before it are whole, its own is lost, and no more is there."""
    keys = [f"t{number:03d}{i}" for i in range(rng.randint(2, 5))]
    write(path, [member for key in keys for member in good(rng, key)])
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    which = rng.randrange(len(members))
    cut = members[which].offset_data + rng.randrange(members[which].size)
    os.truncate(path, cut)
    expected = Expected([(key, None) for key in keys[: which // 2]], num_faults=Counter(["cut"]))
    expected.reasons.append((keys[which // 2], "truncated"))
    expected.damage = f"truncated at byte {cut}, inside member {members[which].name!r}"
    return expected


def corrupt_header(rng, path: Path, number: int) -> Expected:
    keys = [f"c{number:03d}{i}" for i in range(rng.randint(2, 5))]
    write(path, [member for key in keys for member in good(rng, key)])
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    at = 2 * rng.randrange(1, len(keys))
    data = bytearray(path.read_bytes())
    data[members[at].offset + rng.randrange(100)] ^= 1 << rng.randrange(7)
    path.write_bytes(data)
    damage = f"corrupt header (its checksum does not match) at byte {members[at].offset}"
    reasons = [(key, None) for key in keys[: at // 2]]
    return Expected(reasons, damage=damage, num_faults=Counter(["corrupt header"]))


def no_end(rng, path: Path, number: int) -> Expected:
    key = f"e{number:03d}"
    write(path, good(rng, key))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    os.truncate(path, last.offset_data + 512)
    end = last.offset_data + 512
    damage = f"ends at byte {end} without an end-of-archive block"
    return Expected([(key, None)], damage=damage, num_faults=Counter(["no end"]))


def no_tar(rng, path: Path, number: int) -> Expected:
    path.write_bytes(rng.choice([b"<html>gone</html>" * 90, rng.randbytes(3000), b"x" * 700]))
    return Expected(damage="not a tar file", quarantined=True, num_faults=Counter(["no tar"]))


def lost(rng, path: Path, number: int) -> Expected:
    path.symlink_to("nowhere.tar")
    return Expected(damage="No such file", quarantined=True, num_faults=Counter(["lost"]))


def cut_gzip(rng, path: Path, number: int) -> Expected:
    write(path, good(rng, f"z{number:03d}"))
    packed = zlib.compress(path.read_bytes(), wbits=31)
    # Within the headers of the first picture: nothing can be salvaged.
    path.write_bytes(packed[: rng.randint(12, 20)])
    return Expected(damage="the gzip is damaged", num_faults=Counter(["cut gzip"]))


TARS = [
    damaged_samples, unordered, truncated, corrupt_header, no_end, no_tar, lost, cut_gzip,
]  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A folder of damaged tars, and what is expected of each."""
    print(f"PAIRMILL_TEST_SEED={SEED}")
    rng, folder = random.Random(SEED), tmp_path_factory.mktemp("fuzzed")
    expected = {}
    for number in range(TIMES):
        for make in TARS:
            path = folder / f"{make.__name__}-{number:03d}.tar"
            expected[path.name] = make(rng, path, number)
    faults = sum((e.num_faults for e in expected.values()), Counter())
    assert min(faults.values()) >= 20, faults
    assert faults.total() >= 500
    return folder, expected


def test_every_damaged_input_gets_its_very_reason(fuzzed, tmp_path):
    folder, expected = fuzzed
    for name, want in expected.items():
        path = folder / name
        index = tmp_path / index_path(name)
        shard = InputShard(source="s", shard=name, path=str(path), index=index)
        scanned = scan_shard(ScanTask(input=shard, columns=("decodable",)))
        assert (scanned.quarantined is not None) == want.quarantined, name
        info = scanned.info
        assert (info.damage is None) == (want.damage is None), (name, info.damage)
        assert (want.damage or "") in (info.damage or ""), name
        assert info.ignored == dict(want.ignored), name
        if want.quarantined:
            assert info.num_samples == 0
            continue
        rows = pq.read_table(index).to_pylist()
        found = [(row["key"], row["problem"]) for row in rows]
        decode = {"decodable/cannot be decoded": None}
        assert found == [(key, decode.get(r, r)) for key, r in want.reasons], name
        broken = [row["key"] for row in rows if row["decodable"] is False]
        assert broken == [key for key, r in want.reasons if r in decode], name
        assert len({row["uid"] for row in rows}) == len(rows)
        assert sum(info.unreadable.values()) == sum(row["problem"] is not None for row in rows)
        if name.startswith("unordered"):
            assert all(row["caption"] == row["key"] for row in rows)


@pytest.mark.ray
def test_a_job_over_all_of_them_loses_nothing(fuzzed, configure, ray_session, tmp_path):
    folder, expected = fuzzed
    config = configure(
        tmp_path,
        sources=[{"name": "in", "shards": str(folder)}],
        rules=[{"name": "decodable"}],
        write={"samples_per_shard": 37, "shards_per_block": 16},
    )
    report = curate(config).content
    reasons = Counter(r for want in expected.values() for _, r in want.reasons)
    kept = reasons.pop(None)
    dropped = {r: n for r, n in reasons.items() if "/" in r}
    assert report["num_kept"] == kept
    assert report["dropped"] == dropped
    assert report["unreadable"] == {r: n for r, n in reasons.items() if "/" not in r}
    assert report["num_read"] == kept + report["num_dropped"] + report["num_unreadable"]
    shards = report["shards"]
    assert shards["num_quarantined"] == sum(want.quarantined for want in expected.values())
    is_salvaged = [want.damage and not want.quarantined for want in expected.values()]
    assert shards["num_damaged"] == sum(map(bool, is_salvaged))
    assert Counter(shards["ignored"]) == sum((e.ignored for e in expected.values()), Counter())
    assert shards["repeated_keys"] == TIMES
    rows = [r for p in sorted(Path(config.output).glob("*.tar")) for r in read_index(p).to_pylist()]
    assert len(rows) == kept == len({row["key"] for row in rows})
    names = []
    for path in Path(config.output).glob("*.tar"):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert not [name for name in names if name.startswith("/") or ".." in name]
    assert len(names) == len(set(names)) == sum(len(row["member_ext"]) for row in rows)
    for path in config.work_dir.rglob("decisions/**/*.parquet"):
        table = pq.read_table(path, columns=["key", "reason"]).to_pylist()
        want = expected[f"{path.stem}.tar"]
        assert [(row["key"], row["reason"]) for row in table] == want.reasons
    json.dumps(report)
