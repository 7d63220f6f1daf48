"""Rows of a Parquet file, a few thousand in memory at a time. What reads them, pyarrow, is an optional part."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from liaoyuan.errors import LiaoyuanError

ROWS_AT_ONCE = 1000


def read_parquet(path: Path, at: Callable[[int], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, row) of a Parquet file.

    A column has the fields of all its rows, null where a row lacks one: so what is null is left out, however deep.

    at: told before each row how many bytes of the file have been read, about.

    Raises:
        LiaoyuanError: pyarrow is not installed, or the file is missing, torn or no Parquet.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise LiaoyuanError(
            f"{path}: Parquet is read by pyarrow, which is not installed. Install it "
            "(pip install 'liaoyuan[parquet]'), or write the file as JSON lines first, one object a line."
        ) from None
    try:
        with ParquetFile(path) as file:
            size, total, number = path.stat().st_size, max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    if at:
                        at(size * number // total)
                    yield number, _without_nulls(row)
    except FileNotFoundError:
        raise LiaoyuanError(f"The file {path} does not exist.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise LiaoyuanError(f"The file {path} is torn or no Parquet: {error}.") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
