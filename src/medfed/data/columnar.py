"""Columns that have types already: parquet files and what a database answers.

Numbers, truths and texts stay what they are; whole numbers with gaps stay whole; decimals and dates
become the texts that a csv would hold. Times, durations, lists, bytes and structs are no features:
a column of them is refused by its name.
"""

from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from medfed.core.checks import DataError
from medfed.data import numerals
from medfed.data.layout import names_of
from medfed.study import Data

_NO_FEATURES = {
    "times of day": pa.types.is_time,
    "durations": pa.types.is_duration,
    "intervals": pa.types.is_interval,
    "lists": lambda kind: (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ),
    "structs": pa.types.is_struct,
    "maps": pa.types.is_map,
    "bytes": lambda kind: (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    ),
}
_NULLABLE = {
    f"{sign}int{bits}": f"{sign.upper()}Int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def names(path: Path, data: Data) -> list[str]:
    """Return the columns of a parquet file, of which no row is read: see `read`."""
    schema = pq.read_schema(path)
    chosen = [name for name in schema.names if name in _chosen(schema, data)]
    return names_of(chosen, f"data.table={str(path)!r}")


def read(path: Path, data: Data, where: str) -> pd.DataFrame:
    """Read a parquet file, rows numbered from 2. Its pandas index counts where the study names it.

    Raises DataError for columns of a kind that is no feature, all by name, unless the study has no
    use for them.
    """
    file = pq.ParquetFile(path)
    return to_frame(file.read(_chosen(file.schema_arrow, data)), data, where)


def _chosen(schema: pa.Schema, data: Data) -> list[str]:
    """Return all columns but those that pandas takes for its index and the study does not name."""
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    named = (data.target, data.site, data.patient, data.test, *data.features)
    return [name for name in schema.names if name not in index or normalize("NFC", name) in named]


def to_frame(table: pa.Table, data: Data, where: str) -> pd.DataFrame:
    """Return a table's columns as pandas has them, rows numbered from 2."""
    table = table.rename_columns(names_of(table.column_names, where))
    odd = dict(_no_features(table.schema, data))
    unused = {name for name in odd if data.features and name not in data.features}
    refused = [f"{name!r} ({kind})" for name, kind in odd.items() if name not in unused]
    if refused:
        raise DataError(
            f"{where}: no numbers and no texts in column {', '.join(refused)}; write them as "
            "numbers (seconds, days, one column an entry) or take them out"
        )
    columns = {
        name: _series(column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    frame = pd.DataFrame({name: column for name, column in columns.items() if name not in unused})
    return frame.set_axis(pd.RangeIndex(2, len(table) + 2), axis=0)


def _no_features(schema: pa.Schema, data: Data) -> Iterator[tuple[str, str]]:
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        what = next((what for what, holds in _NO_FEATURES.items() if holds(kind)), "")
        if what and not (what == "bytes" and field.name == data.patient):
            yield field.name, what


def _series(column: pa.ChunkedArray) -> pd.Series:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    if pa.types.is_decimal(kind) or pa.types.is_date(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.string())
        kind = pa.string()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = numerals.one_form(column)
    if pa.types.is_integer(kind) and column.null_count:
        return pd.Series(column.to_pylist(), dtype=_NULLABLE[str(kind)])
    series: pd.Series = column.to_pandas()
    return series
