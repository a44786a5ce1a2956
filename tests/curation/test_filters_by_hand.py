"""Each filter on examples worked out by hand."""

from __future__ import annotations

import gzip
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from configs.errors import ConfigError, UsageError
from curation.columns import colors, compute_columns, decode_image, dhash, phash
from curation.filters import filters
from curation.filters.base import needs_of
from curation.filters.file_name import why_file_name
from curation.filters.url import split_url
from curation.scan import InputShard, ScanTask, scan_shard
from curation.spans import LocalReader


def reasons(judge, **columns):
    return judge(pa.table(columns)).reasons.to_pylist()


@pytest.mark.parametrize(
    ("caption", "why"),
    [
        ("IMG_1234.jpg", "camera file name"),
        ("img 4081", "camera file name"),
        ("_DSC5876", "camera file name"),
        ("P1010981", "camera file name"),
        ("IMG_9610 - 2014-0419 苗栗鯉魚潭水庫旁", "camera file name"),
        ("Untitled", "placeholder"),
        ("untitled (12).png", "placeholder"),
        ("Без названия", "placeholder"),
        ("無題", "placeholder"),
        ("   ", "placeholder"),
        ("2014-10-04 14.30.36", "number or date"),
        ("2012-11-16T08-49-25", "number or date"),
        ("٢٠١٤", "number or date"),
        ("d41d8cd98f00b204e9800998ecf8427e", "hash"),
        ("16712040371_15f8d5c5ea_o.jpg", "hash"),
        ("20130921_075259_Trần Đại Nghĩa", "numbered or dated name"),
        ("2013 수학여행_3582", "numbered or dated name"),
        ("2014. 12. 18 코드포서울 최종공유회", "numbered or dated name"),
        ("106 Alpacas Lake Titicaca Peru 3254", "numbered or dated name"),
        ("3 chinchillas", "numbered or dated name"),
        ("4 kg laks tatt ved laksehyttene i Marnardal", None),
        ("2014 Porsche Cayenne Turbo S Rear", None),
        ("3 dogs, 2 cats", None),
        ("Sam n the City", None),
        ("P365x52-164: Flowers", None),
        ("a photo of a dog", None),
        ("士林夜市", None),
        ("decade", None),
        ("IMAG0815", None),
        ("web_japan08_398.jpg", None),
    ],
)
def test_file_names_are_told_from_titles(caption, why):
    assert why_file_name(caption) == why


def test_broad_file_names_and_numbered_titles_are_choices():
    assert why_file_name("IMAG0815", broad=True) == "stem and number"
    assert why_file_name("WP_20150804_21_34_43_Rich", broad=True) == "stem and number"
    assert why_file_name("web_japan08_398.jpg", broad=True) == "file extension"
    assert why_file_name("Fiat 500", broad=True) is None
    assert why_file_name("3 chinchillas", max_numbered_words=0) is None


def test_digits_are_a_share_of_the_characters_but_blanks():
    judge = filters["digits"](max_share=0.5)
    values, why = judge(pa.table({"caption": ["ab 12", "a 123", "", "١٢٣ a", "no"]}))
    assert values["share"].to_pylist() == [0.5, 0.75, 0.0, 0.75, 0.0]
    assert why.to_pylist() == [None, "too many digits", None, "too many digits", None]


def test_script_counts_letters_and_leaves_digits_and_marks_aside():
    judge = filters["script"](keep=("Latin",), min_share=0.5)
    captions = ["Schöne Grüße, 2014!", "дом", "ab дом", "abc дом", "12 :-)", "日本 nihon"]
    values, why = judge(pa.table({"caption": captions}))
    assert values["share"].to_pylist() == [1.0, 0.0, 0.4, 0.5, None, 5 / 7]
    assert why.to_pylist() == [None, "other script", "other script", None, "no letters", None]
    hindi = filters["script"](keep=("Devanagari",), min_share=1.0)
    assert reasons(hindi, caption=["शीर्षक हीन"]) == [None]
    with pytest.raises(ConfigError, match="no script 'Latn1'"):
        filters["script"](keep=("Latn1",))


def test_regex_drops_what_is_found_and_keeps_only_what_is_found():
    judge = filters["regex"](
        drop=(r"^stock photo", r"\bpromo\b"), keep=("[a-z]",), ignore_case=True
    )
    captions = ["Stock photo of", "a PROMO here", "promotion", "12", None]
    assert reasons(judge, caption=pa.array(captions)) == [
        "pattern found",
        "pattern found",
        None,
        "no pattern found",
        "no pattern found",
    ]
    with pytest.raises(ConfigError, match="no pattern of RE2"):
        filters["regex"](drop=(r"(?<=a)b",))
    with pytest.raises(ConfigError, match="give patterns"):
        filters["regex"]()
    assert needs_of([filters["regex"](drop=("a",), column="json.title")]).columns == ("json.title",)


def test_score_is_a_threshold_on_any_number():
    judge = filters["score"](column="clip", min=0.3, max=0.9)
    scores = pa.array([0.3, 0.29, None, float("nan"), 0.95], pa.float32())
    # 0.3 as a float32 is 0.30000001, so it stays.
    assert reasons(judge, clip=scores) == [
        None,
        "score too low",
        "no score",
        "no score",
        "score too high",
    ]
    of_json = filters["score"](column="json.similarity", min=0.3)
    assert needs_of([of_json]).columns == ("json.similarity",)
    texts = pa.array(["0.31", "1e-3", "high", None, "true"])
    assert reasons(of_json, **{"json.similarity": texts}) == [
        None,
        "score too low",
        "no score",
        "no score",
        "no score",
    ]
    with pytest.raises(UsageError, match="no column is called 'clipp', did you mean 'clip'"):
        filters["score"](column="clipp", min=0)(pa.table({"clip": [1.0]}))
    with pytest.raises(ConfigError, match="give `min` or `max`"):
        filters["score"](column="clip")


def test_url_lists_hold_domains_with_all_below_and_urls_with_all_behind(tmp_path):
    assert split_url("https://user@WWW.Example.com.:443/a/b?c=1#d") == ("example.com", "/a/b?c=1")
    assert split_url("example.com") == ("example.com", "")
    assert split_url("http://[bad") is None
    path = tmp_path / "bad.txt.gz"
    path.write_bytes(gzip.compress(b"# ads\nads.net\n\nphotos.org/private/  # family\n"))
    judge = filters["url"](block=("spam.com",), block_file=path)
    urls = ["http://a.spam.com/1.jpg", "http://notspam.com/1.jpg", "https://ads.net", None]
    urls += ["http://photos.org/private/x.jpg", "http://photos.org/public/x.jpg"]
    assert reasons(judge, **{"json.url": pa.array(urls)}) == [
        "blocked domain",
        None,
        "blocked domain",
        None,
        "blocked url",
        None,
    ]
    only = filters["url"](allow=("example.com",))
    urls = pa.array(["http://x.example.com/", "http://example.org/", None])
    assert reasons(only, **{"json.url": urls}) == [None, "not an allowed url", "no url"]
    digest = judge.digest
    path.write_bytes(gzip.compress(b"other.net\n"))
    assert filters["url"](block=("spam.com",), block_file=path).digest != digest
    with pytest.raises(UsageError, match="cannot be read"):
        filters["url"](block_file=tmp_path / "missing")


def test_language_knows_the_captions_language_and_its_own_limits(tmp_path):
    judge = filters["language"](keep=("en", "de"), min_confidence=0.3)
    captions = [
        "a dog runs over the green meadow",
        "ein Hund läuft über die grüne Wiese",
        "un chien court\ndans le pré vert",
        "собака бежит по зелёному лугу",
        "",
    ]
    values, why = judge(pa.table({"caption": captions}))
    assert values["code"].to_pylist()[:4] == ["en", "de", "fr", "ru"]
    assert why.to_pylist()[:4] == [None, None, "other language", "other language"]
    assert why.to_pylist()[4] is not None
    label = filters["language"]()(pa.table({"caption": captions}))
    assert label.values["code"].equals(values["code"])
    assert label.reasons.null_count == len(captions)
    strict = filters["language"](keep=("en",), min_confidence=1.0)
    assert reasons(strict, caption=["dog"]) == ["uncertain language"]
    with pytest.raises(ConfigError, match="knows no language 'english'"):
        filters["language"](keep=("english",))
    (tmp_path / "lid.bin").write_bytes(b"no model")
    with pytest.raises(UsageError, match="is no fastText model"):
        filters["language"](keep=("en",), model=tmp_path / "lid.bin")
    with pytest.raises(UsageError, match="cannot be read"):
        filters["language"](keep=("en",), model=tmp_path / "missing.bin")


def test_image_size_also_bounds_the_bytes():
    judge = filters["image_size"](min_bytes=100, max_bytes=200)
    side = pa.array([10, 10, 10], pa.int32())
    sizes = pa.array([99, 100, 201], pa.int64())
    assert reasons(judge, width=side, height=side, image_size=sizes) == [
        "too few bytes",
        None,
        "too many bytes",
    ]


def photo(seed: int = 0, side: int = 64, kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    image, draw = Image.new("RGB", (240, 240), "white"), random.Random(seed)
    for _ in range(12):
        box = sorted(draw.choices(range(240), k=2)) + sorted(draw.choices(range(240), k=2))
        shade = (draw.randrange(256),) * 3
        ImageDraw.Draw(image).rectangle((box[0], box[2], box[1], box[3]), fill=shade)
    image.resize((side, side)).convert(mode).save(file, kind)
    return file.getvalue()


def test_hashes_of_pixels_survive_a_change_of_size_and_format():
    for function in (dhash, phash):
        large, small = (decode_image(photo(1, side, "JPEG")) for side in (256, 96))
        other = decode_image(photo(3, 256))
        assert (function(large) ^ function(small)).bit_count() <= 4
        assert (function(large) ^ function(other)).bit_count() > 12


def test_hashes_of_pixels_are_the_bits_that_their_definition_gives():
    # A gray ramp to the right: every pixel is brighter than its left one.
    ramp = Image.linear_gradient("L").rotate(90)
    assert dhash(ramp) in (0, 2**64 - 1)
    assert dhash(ramp) ^ dhash(ramp.rotate(180)) == 2**64 - 1
    # A flat image has one frequency, the zeroth, whatever its shade; no noise decides a bit.
    assert {phash(Image.new("L", (50, 40), shade)) for shade in (1, 77, 254)} == {1 << 63}


def test_transparent_parts_are_white():
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    file = io.BytesIO()
    clear.save(file, "PNG")
    assert decode_image(file.getvalue()).getextrema() == ((255, 255),) * 3


def test_colours_are_the_means_of_the_sixteen_parts():
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    image.putpixel((0, 0), (50, 20, 30))  # one of four pixels of the first part
    assert list(colors(image)) == [20, 20, 30] + [10, 20, 30] * 15


@pytest.fixture
def mixed_shard(tmp_path, tars):
    whole = photo(1)
    members = [
        *tars.sample("a", "whole"),
        ("b.png", whole),
        ("b.txt", b"copy"),
        ("c.png", whole[:-200]),  # the header is good, the pixels end early
        ("c.txt", b"broken"),
        ("d.png", whole),
        ("d.txt", b"copy"),
        ("d.json", b'{"url": "http://x.org/1", "sizes": {"w": 3}, "n": [1, "\\ud800"]}'),
        ("e.png", b""),
        ("e.txt", b"empty"),
        ("f.png", whole),
        ("f.txt", b"bad json"),
        ("f.json", b"{"),
    ]
    path = tars.write(tmp_path / "00000.tar", members)
    return InputShard(source="s", shard="00000.tar", path=str(path), index=tmp_path / "i.parquet")


def test_the_scan_computes_the_columns_that_rules_need(mixed_shard):
    names = ("decodable", "image_hash", "json.n", "json.sizes.w", "json.url", "phash")
    scan_shard(ScanTask(input=mixed_shard, columns=names))
    table = pq.read_table(mixed_shard.index)
    assert table["key"].to_pylist() == list("abcdef")
    assert table["decodable"].to_pylist() == [True, True, False, True, None, True]
    hashes = table["image_hash"].to_pylist()
    assert hashes[1] == hashes[3] == hashes[5] != hashes[2]
    assert hashes[4] is None
    assert [value is None for value in table["phash"].to_pylist()] == [
        False, False, True, False, True, False,
    ]  # fmt: skip
    assert table["json.url"].to_pylist() == [None, None, None, "http://x.org/1", None, None]
    assert table["json.sizes.w"].to_pylist()[3] == "3"
    assert table["json.n"].to_pylist()[3] == '[1, "?"]'
    judge = filters["decodable"]()
    readable = table.filter(table["problem"].is_null())
    assert judge(readable).reasons.to_pylist() == [None, None, "cannot be decoded", None, None]


def test_a_job_that_needs_more_columns_changes_nothing_of_what_another_knows(mixed_shard):
    plain = scan_shard(ScanTask(input=mixed_shard))
    some = scan_shard(ScanTask(input=mixed_shard, columns=("image_hash",)))
    more = scan_shard(ScanTask(input=mixed_shard, columns=("phash",)))
    written = mixed_shard.index.read_bytes()
    assert scan_shard(ScanTask(input=mixed_shard)).index_digest == plain.index_digest
    again = scan_shard(ScanTask(input=mixed_shard, columns=("image_hash",)))
    assert again.index_digest == some.index_digest
    both = scan_shard(ScanTask(input=mixed_shard, columns=("image_hash", "phash")))
    assert both.index_digest.split()[0] == plain.index_digest
    assert more.index_digest.split()[1] in both.index_digest.split()
    assert mixed_shard.index.read_bytes() == written


def test_an_index_with_columns_added_later_equals_one_made_at_once(mixed_shard):
    scan_shard(ScanTask(input=mixed_shard))
    scan_shard(ScanTask(input=mixed_shard, columns=("dhash", "json.url")))
    later = mixed_shard.index.read_bytes()
    mixed_shard.index.unlink()
    scan_shard(ScanTask(input=mixed_shard, columns=("dhash", "json.url")))
    assert mixed_shard.index.read_bytes() == later


def test_no_scan_makes_a_column_that_nobody_knows(mixed_shard):
    with LocalReader(mixed_shard.path) as reader, pytest.raises(UsageError, match="'phash'"):
        compute_columns(reader, pa.table({}), ["phahs"])
