from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.grouping import SampleGrouper, split_name
from curation.shards import TarDamageError, read_members
from curation.spans import open_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read_all(path):
    members, damage = [], None
    with open_tar(path) as reader:
        try:
            for member in read_members(reader):
                members.append(member)
        except TarDamageError as error:
            damage = str(error)
    return members, damage


def check_within(path):
    """Whatever the bytes are, a member lies inside the file or is said to be truncated."""
    members, _ = read_all(path)
    for member in members:
        assert 0 <= member.start < member.offset
        ends_inside = member.offset + member.size <= path.stat().st_size
        assert member.is_truncated is not ends_inside


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_reader_finds_what_tarfile_finds(tars, tmp_path, format):
    names = ["a.jpg", "folder/b.txt", "long" * 20 + ".json", "dir/" * 20 + "x.png"]
    if format != tarfile.USTAR_FORMAT:
        names += ["n" * 300 + ".txt", "ünï/ködé.txt"]
    path = tars.write(
        tmp_path / "a.tar", [(n, n.encode() * (i * 97)) for i, n in enumerate(names)], format
    )
    members, damage = read_all(path)
    assert damage is None
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar.getmembers()]
    assert [(m.name, m.start, m.offset, m.size) for m in members] == expected


@given(sizes=st.lists(st.integers(0, 20_000), max_size=8), window=st.booleans())
def test_reader_finds_every_member_whatever_its_size(tmp_path_factory, tars, sizes, window):
    path = tmp_path_factory.mktemp("t") / "a.tar"
    tars.write(path, [(f"{i}.bin", bytes([i]) * size) for i, size in enumerate(sizes)])
    members, damage = read_all(path)
    assert damage is None or not sizes
    assert [m.size for m in members] == sizes
    with open_tar(path) as reader:
        for i, member in enumerate(members):
            assert reader.read(member.offset, member.size) == bytes([i]) * sizes[i]


def test_base_256_size_is_read(tmp_path):
    info = tarfile.TarInfo("big.bin")
    info.size = 9 << 30
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    (member,), damage = read_all(path)
    assert member.size == 9 << 30
    assert member.is_truncated
    assert "truncated" in damage


def test_pax_size_and_path_override_the_header(tmp_path):
    info = tarfile.TarInfo("short.txt")
    info.size = 3
    info.pax_headers = {"path": "real name.txt", "size": "5"}
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + b"hello".ljust(512, b"\0") + bytes(1024))
    (member,), damage = read_all(path)
    assert (member.name, member.size, damage) == ("real name.txt", 5, None)


def test_pax_records_of_a_wrong_length_are_damage_and_never_read_for_ever(tmp_path):
    info = tarfile.TarInfo("ä" * 60 + ".txt")
    content = info.tobuf(tarfile.PAX_FORMAT)
    right = content.index(b"134 path=")
    path = tmp_path / "a.tar"
    path.write_bytes(content[:right] + b"0" + content[right + 1 :] + bytes(1024))
    members, damage = read_all(path)
    assert members == []
    assert "corrupt PAX header" in damage


def test_truncated_tar_is_read_up_to_the_cut(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", [(f"{i}.txt", b"x" * 600) for i in range(5)])
    path.write_bytes(path.read_bytes()[: 3 * 1536 + 700])
    members, damage = read_all(path)
    assert [m.is_truncated for m in members] == [False, False, False, True]
    assert "truncated at byte 5308" in damage


def test_corrupt_header_ends_the_reading_and_is_named(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", [(f"{i}.txt", b"x" * 600) for i in range(5)])
    data = bytearray(path.read_bytes())
    data[2 * 1536 + 10] ^= 1
    path.write_bytes(data)
    members, damage = read_all(path)
    assert len(members) == 2
    assert "byte 3072" in damage


def test_data_behind_the_end_of_archive_is_not_lost_unseen(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", [("a.txt", b"a")])
    path.write_bytes(path.read_bytes()[:2048] + b"more")
    assert "data after" in read_all(path)[1]


@given(st.binary(max_size=3000))
def test_any_bytes_end_in_members_or_damage(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("t") / "a.tar"
    path.write_bytes(data)
    check_within(path)


@given(st.data())
def test_a_flipped_byte_never_crashes_the_reader(tmp_path_factory, data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("ä" * 120 + ".txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"y" * 700))
    content = bytearray(file.getvalue())
    for _ in range(3):
        content[data.draw(st.integers(0, 5000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("t") / "a.tar"
    path.write_bytes(content)
    check_within(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/x1.seg.PNG", ("a/b.c/x1", "seg.png")),
        ("0001.jpg", ("0001", "jpg")),
        ("./a.txt", ("./a", "txt")),
        ("no_extension", None),
        (".hidden", None),
        ("/etc/passwd.txt", None),
        ("../up.txt", None),
        ("a/../../up.txt", None),
        ("a..b/c.txt", ("a..b/c", "txt")),
        ("a\0b.txt", None),
    ],
)
def test_names_split_at_the_first_dot_of_the_last_component(name, expected):
    assert split_name(name) == expected


def test_members_of_a_key_need_not_be_adjacent_and_a_repeated_key_is_a_new_sample(tars, tmp_path):
    names = ["a.jpg", "b.jpg", "a.txt", "b.txt", "a.jpg", "a.txt"]
    path = tars.write(tmp_path / "a.tar", [(name, b"1") for name in names])
    grouper = SampleGrouper()
    for member in read_all(path)[0]:
        grouper.add(member)
    found = [(s.key, s.occurrence, [ext for ext, _ in s.members]) for s in grouper.finish()]
    assert found == [("a", 0, ["jpg", "txt"]), ("b", 0, ["jpg", "txt"]), ("a", 1, ["jpg", "txt"])]


def group(tars, path, *names):
    tars.write(path, [(name, b"1") for name in names])
    grouper = SampleGrouper()
    for member in read_all(path)[0]:
        grouper.add(member)
    return [f"{s.key}{s.occurrence} {' '.join(e for e, _ in s.members)}" for s in grouper.finish()]


@pytest.mark.parametrize(
    ("names", "samples"),
    [
        ("a.jpg b.jpg a.txt b.txt a.json b.json", ["a0 jpg txt json", "b0 jpg txt json"]),
        ("a.jpg b.jpg a.json b.json a.txt b.txt", ["a0 jpg json txt", "b0 jpg json txt"]),
        ("a.txt a.json z.txt a.png a.txt", ["a0 txt json", "z0 txt", "a1 png txt"]),
        ("a.txt z.txt a.png a.json", ["a0 txt", "z0 txt", "a1 png json"]),
        ("a.png z.txt a.webp z.png a.txt", ["a0 png", "z0 txt png", "a1 webp", "a2 txt"]),
        # Whose caption is the fifth? Nobody can say, so it is nobody's.
        ("a.png z.txt a.png z.png a.txt", ["a0 png", "z0 txt png", "a1 png", "a2 txt"]),
        ("a.png a.txt a.png a.txt z.png a.json", ["a0 png txt", "a1 png txt", "z0 png", "a2 json"]),
    ],
)
def test_a_later_run_of_a_key_joins_only_where_it_can_mix_no_two_samples(
    tars, tmp_path, names, samples
):
    assert group(tars, tmp_path / "a.tar", *names.split()) == samples


def test_a_pax_header_is_read_in_one_pass_and_limited(tmp_path):
    path = tmp_path / "a.tar"

    def write(num_bytes: int) -> None:
        records = b"6 a=b\n" * (num_bytes // 6) + b"15 path=ok.txt\n"
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, len(records)
        blocks = header.tobuf() + records.ljust(-(-len(records) // 512) * 512, b"\0")
        path.write_bytes(blocks + tarfile.TarInfo("x.txt").tobuf() + bytes(1024))

    write(60_000)
    (member,), damage = read_all(path)
    assert (member.name, damage) == ("ok.txt", None)
    write(70_000)
    members, damage = read_all(path)
    assert members == []
    assert "extended header of 70" in damage
