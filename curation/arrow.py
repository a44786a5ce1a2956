"""pyarrow, by the shorter ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.lean import kept_out


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file, all its columns or those named, in their order.

    As `pyarrow.parquet.read_table` does, which imports pandas for it and takes twice as long.

    Raises:
        OSError, pa.ArrowException: it cannot be read.  KeyError: it has no such column.
    """
    with pq.ParquetFile(path) as file:
        return read_columns(file, columns)


def read_columns(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Return all columns of an open Parquet file, or those named, in their order."""
    if columns is None:
        return file.read()
    # The reader takes a name for that of a group too: "json.a" brings "json.a.b" along.
    return file.read(columns=list(columns)).select(list(columns))


def keep_pandas_out() -> None:
    """Let pyarrow find no pandas in this process, unless it is imported already.

    pyarrow looks for it once, at the first array made of numpy's, and importing it takes a second
    and 50 MB. For processes of ours only: pyarrow then takes a pandas Series for a list.
    """
    with kept_out("pandas"):
        pa.array(np.zeros(1), mask=np.zeros(1, np.bool_))
