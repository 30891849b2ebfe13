import bisect
import os
import re
import warnings
from collections import OrderedDict, namedtuple

import numpy as np

__all__ = ["FastaIndex", "complement", "sliding_gc"]

IndexEntry = namedtuple("IndexEntry", "name length offset linebases linewidth")

_COMPLEMENT = bytes.maketrans(
    b"ACGTUMRWSYKVHDBNacgtumrwsykvhdbn",
    b"TGCAAKYWSRMBDHVNtgcaakywsrmbdhvn",
)


def complement(seq, reverse=True):
    """
    Complement a nucleotide sequence, ambiguity codes included.

    Parameters
    ----------
    seq : bytes
        Sequence in upper, lower or mixed case. Case is kept.
    reverse : bool, optional
        Whether to return the reverse complement (default) or the plain one.

    Returns
    -------
    bytes

    Examples
    --------
    >>> complement(b"GATTACA")
    b'TGTAATC'
    >>> complement(b"RYN", reverse=False)
    b'YRN'
    """
    out = seq.translate(_COMPLEMENT)
    return out[::-1] if reverse else out


def sliding_gc(seq, window=1000, step=None):
    """
    GC fraction in windows along a sequence.

    Parameters
    ----------
    seq : bytes
        Nucleotides; everything other than A, C, G, T counts as unknown.
    window : int
        Window length in bases.
    step : int, optional
        Distance between window starts. Windows do not overlap by default.

    Returns
    -------
    starts : ndarray of int, shape (n,)
    gc : ndarray of float, shape (n,)
        NaN where more than half of a window is unknown.

    Notes
    -----
    Cumulative sums make the cost independent of `window`. A trailing window
    shorter than `window` is dropped.
    """
    step = step or window
    codes = np.frombuffer(seq.upper(), dtype="S1")
    is_gc = np.isin(codes, [b"G", b"C"])
    known = is_gc | np.isin(codes, [b"A", b"T"])

    cum_gc = np.concatenate(([0], np.cumsum(is_gc)))
    cum_known = np.concatenate(([0], np.cumsum(known)))
    starts = np.arange(0, len(codes) - window + 1, step)
    n_gc = cum_gc[starts + window] - cum_gc[starts]
    n_known = cum_known[starts + window] - cum_known[starts]

    with np.errstate(invalid="ignore", divide="ignore"):
        gc = n_gc / n_known
    gc[n_known * 2 < window] = np.nan
    return starts, gc


class FastaIndex:
    """
    Random access to the records of an uncompressed FASTA file.

    The index lies beside the file with ``.fai`` appended and has five columns
    separated by tabs: name, length in bases, offset of the first base, bases
    per line, bytes per line. It is built on first use and rebuilt when it is
    older than the file.

    Parameters
    ----------
    path : str or path-like
    rebuild : bool, optional
        Build the index even if a fresh one exists.

    Raises
    ------
    ValueError
        If a record has lines of differing lengths other than its last one,
        since then positions cannot be computed.
    """

    def __init__(self, path, rebuild=False):
        self.path = os.fspath(path)
        self._fai = self.path + ".fai"
        if rebuild or not self._fresh():
            self._build()
        self.entries = self._load()
        self._handle = open(self.path, "rb")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._handle.close()

    def _fresh(self):
        try:
            return os.path.getmtime(self._fai) >= os.path.getmtime(self.path)
        except OSError:
            return False

    def _build(self):
        rows, current, short_line = [], None, False
        with open(self.path, "rb") as handle:
            offset = 0
            for line in handle:
                offset += len(line)
                if line.startswith(b">"):
                    if current:
                        rows.append(current)
                    name = re.split(rb"\s", line[1:], maxsplit=1)[0].decode()
                    current, short_line = [name, 0, offset, 0, 0], False
                    continue
                bases = len(line.rstrip(b"\r\n"))
                if not bases or current is None:
                    continue
                if short_line:
                    raise ValueError(f"{self.path}: ragged lines in record {current[0]!r}")
                if not current[3]:
                    current[3:] = [bases, len(line)]
                elif bases > current[3]:
                    raise ValueError(f"{self.path}: ragged lines in record {current[0]!r}")
                short_line = bases < current[3]
                current[1] += bases
        if current:
            rows.append(current)
        try:
            with open(self._fai, "w") as out:
                for row in rows:
                    print(*row, sep="\t", file=out)
        except PermissionError:
            warnings.warn(f"cannot write {self._fai}; the index is kept in memory only")
            self._rows = rows

    def _load(self):
        rows = getattr(self, "_rows", None)
        if rows is None:
            with open(self._fai) as handle:
                rows = [line.rstrip("\n").split("\t") for line in handle]
        return OrderedDict((r[0], IndexEntry(r[0], *map(int, r[1:]))) for r in rows)

    def fetch(self, name, start=0, stop=None):
        """Bases ``start`` up to, not including, ``stop``; counted from zero."""
        entry = self.entries[name]
        stop = entry.length if stop is None else min(stop, entry.length)
        if not 0 <= start <= stop:
            raise IndexError(f"{name}:{start}-{stop} outside 0-{entry.length}")
        first = entry.offset + start // entry.linebases * entry.linewidth + start % entry.linebases
        last = entry.offset + stop // entry.linebases * entry.linewidth + stop % entry.linebases
        self._handle.seek(first)
        return self._handle.read(last - first).translate(None, b"\r\n")
