import os
import subprocess
import sys
import textwrap

import pytest

from configs.publish import publish_text, published_file, published_folder, remove_leftovers


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with published_file(path, "w") as file:
        file.write("half")
        assert not path.exists()
    assert path.read_text() == "half"


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.txt"
    publish_text(path, "old")
    with pytest.raises(UnicodeEncodeError), published_file(path, "w") as file:
        file.write("new \ud800")  # half a surrogate pair has no UTF-8
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with published_folder(tmp_path / "f") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "x").read_text() == "1"
    with pytest.raises(RuntimeError), published_folder(tmp_path / "g"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["f"]


def test_a_killed_writer_leaves_a_leftover_that_is_told_apart_and_removed(tmp_path):
    code = textwrap.dedent(
        f"""
        import os
        from configs.publish import published_file
        with published_file({str(tmp_path / "a.txt")!r}, "w") as file:
            file.write("half"); file.flush()
            os._exit(9)
        """
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert not (tmp_path / "a.txt").exists()
    assert len(remove_leftovers(tmp_path)) == 1
    assert os.listdir(tmp_path) == []
