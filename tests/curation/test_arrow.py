from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.arrow import read_parquet


@pytest.fixture
def path(tmp_path):
    table = pa.table({"json.a": ["x"], "json.a.b": ["y"], "c": [[1, 2]]}, metadata={"k": "v"})
    pq.write_table(table, tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def test_columns_come_by_their_whole_names_in_the_order_asked_for(path):
    assert read_parquet(path, ["c", "json.a"]).to_pydict() == {"c": [[1, 2]], "json.a": ["x"]}
    whole = read_parquet(path)
    assert whole.column_names == ["json.a", "json.a.b", "c"]
    assert whole.schema.metadata == {b"k": b"v"}
    assert whole.equals(pq.read_table(path, partitioning=None))


def test_a_column_or_a_file_that_is_not_there_is_said(path):
    with pytest.raises(KeyError, match="other"):
        read_parquet(path, ["other"])
    with pytest.raises(FileNotFoundError):
        read_parquet(path.with_name("none.parquet"))


def test_a_worker_imports_no_pandas_but_who_asks_for_it_gets_it(path):
    code = f"""
import sys
from pathlib import Path
from curation.task import run_task
from curation.arrow import read_parquet
import numpy as np, pyarrow as pa
def work(path):
    pa.array(np.arange(3), mask=np.array([True, False, True]))
    return read_parquet(path)
table = run_task(work, Path({str(path)!r}))
print("pandas" in sys.modules, table.num_rows, type(table.to_pandas()).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False 1 DataFrame\n", done.stderr
