"""What is wrong with a file of data, on its way from the child process to the user."""

from __future__ import annotations

HOW_TO_MAKE_ONE = (
    "a file that is taken, in two lines: import pyarrow as pa, pyarrow.parquet as pq; "
    "pq.write_table(pa.table({'text': LIST_OF_STRINGS}), 'data.parquet')"
)
CALLED_TXT = "plain text is read from a file called *.txt: ln -s FILE NAME.txt"


class DataError(Exception):
    """``usage``: the command line is wrong, not the data."""

    def __init__(self, message: str, hint: str = "", usage: bool = False) -> None:
        super().__init__(message)
        self.message, self.hint, self.usage = message, hint, usage
