"""Calibration text of the user's own (``-c``): Parquet, Arrow, CSV, JSON lines, JSON, plain text, folders of them.

    sources.py     what a -c names: files, and the column
    columns.py     which columns of a file are text, and how the others are treated
    stream.py      the tokens of a source, as many as are asked for; rows of them
    taken.py       what rows were made of, as it is told
    child.py       in a child process with limits on memory and time, since data come from strangers: serves pieces of text
    parquet.py, arrow.py (types: arrow_types.py), csv_text.py, json_text.py, plain.py   in the child: one kind of file each
"""
