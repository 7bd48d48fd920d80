"""CSV that a spreadsheet shows as it is: no cell of it is a formula."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.visible import visible

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
"""What makes a spreadsheet compute a cell that begins with it (OWASP, CSV injection)."""


def csv_cell(value: Any) -> Any:
    """The value; text without control characters, and with `'` before what a spreadsheet would
    compute. Numbers stay."""
    if not isinstance(value, str):
        return value
    shown = visible(value)
    if not value.startswith(_FORMULA):
        return shown
    try:
        float(value)
    except ValueError:
        return f"'{shown}"
    return f"'{shown}" if value[0] in "\t\r\n" else value


def write_csv(table: pd.DataFrame, file: Path, *, header: bool = True, mode: str = "w") -> None:
    """Write the columns of a table, cells and names as `csv_cell` makes them; no index."""
    import pandas as pd

    safe = {
        csv_cell(name): column
        if pd.api.types.is_numeric_dtype(column.dtype)
        else column.map({value: csv_cell(value) for value in column.unique()})
        for name, column in table.items()
    }
    pd.DataFrame(safe).to_csv(file, index=False, header=header, mode=mode)
