"""The frame of the conformance tool: what passes, what fails, what it says."""

import math

import numpy as np
from rich.console import Console

from tools.conformance.__main__ import main
from tools.conformance.table import compare, equal, not_built, render


def test_equal_numbers_pass_and_the_largest_error_is_reported():
    row = compare("case", "loss", [1.0, 2.0], [1.0, 2.5], atol=0.6)
    assert (row.verdict, row.n, row.error) == ("pass", 2, 0.5)
    assert compare("case", "loss", [1.0, 2.0], [1.0, 2.5], atol=0.4).verdict == "FAIL"


def test_another_shape_or_a_nan_of_ours_fails():
    assert compare("case", "x", [1.0], [1.0, 1.0], atol=1).verdict == "FAIL"
    row = compare("case", "x", [math.nan, 1.0], [1.0, 1.0], atol=1)
    assert (row.verdict, row.error) == ("FAIL", math.inf)


def test_infinities_and_nans_in_the_same_places_are_equal():
    values = np.array([math.inf, -math.inf, math.nan, 0.0])
    assert compare("case", "x", values, values, atol=0).verdict == "pass"
    assert compare("case", "x", -values, values, atol=1e9).verdict == "FAIL"


def test_a_relative_tolerance_is_taken_off_before_the_absolute_one():
    assert compare("case", "x", [101.0], [100.0], atol=0.1, rtol=0.01).verdict == "pass"
    assert compare("case", "x", [102.0], [100.0], atol=0.1, rtol=0.01).verdict == "FAIL"


def test_the_table_names_what_is_not_built(capsys):
    render([not_built("tpt", "test-time tuning"), equal("m", "ids", 3, 1)], Console(width=120))
    printed = capsys.readouterr().out
    assert "not built" in printed
    assert "FAIL" in printed


def test_a_folder_that_is_absent_is_wrong_usage(tmp_path, capsys):
    import tools.conformance.__main__ as command

    parts = [p for p in command.PARTS if command.importlib.util.find_spec(f"tools.conformance.{p}")]
    for part in parts:
        assert main([part, str(tmp_path / "absent")]) == 2
        assert "is not a folder" in capsys.readouterr().err
        assert main([part, str(tmp_path)]) == 2
