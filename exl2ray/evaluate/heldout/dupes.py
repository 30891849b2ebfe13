#!/usr/bin/env python3
"""dupes - report files with identical content below one or more folders.

Most files can be told apart without reading them. The search therefore runs in three passes,
each looking only at what the previous one could not separate:

  1. size, from the directory entry;
  2. a digest of the first 16 KiB;
  3. a digest of everything.

Hard links to one inode are the same file, not duplicates, and are counted once.

Exit status: 0 no duplicates, 1 duplicates found, 2 something could not be read.
"""

import argparse
import hashlib
import os
import sys
from collections import defaultdict
from pathlib import Path

HEAD = 16 * 1024
UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_size(text):
    """'300' -> 300, '20k' -> 20480. Used as an argparse type, so ValueError becomes a usage error."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    if unit and unit not in UNITS:
        raise ValueError(unit)
    return int(number) * UNITS.get(unit, 1)


def human(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024


class Finder:
    def __init__(self, minimum, follow_links):
        self.minimum = minimum
        self.follow_links = follow_links
        self.errors = 0

    def complain(self, error):
        self.errors += 1
        print(f"dupes: {error.filename}: {error.strerror}", file=sys.stderr)

    def walk(self, roots):
        """Yield (size, path) of regular files, one path for each inode."""
        seen = set()
        for root in roots:
            for folder, _, names in os.walk(root, onerror=self.complain, followlinks=self.follow_links):
                for name in names:
                    path = Path(folder, name)
                    try:
                        info = path.stat() if self.follow_links else path.lstat()
                    except OSError as error:  # vanished, or a dangling link
                        self.complain(error)
                        continue
                    identity = (info.st_dev, info.st_ino)
                    regular = (info.st_mode & 0o170000) == 0o100000
                    if regular and info.st_size >= self.minimum and identity not in seen:
                        seen.add(identity)
                        yield info.st_size, path

    def digest(self, path, limit=None):
        hasher = hashlib.blake2b(digest_size=20)
        with path.open("rb") as stream:
            if limit is not None:
                hasher.update(stream.read(limit))
            else:
                while chunk := stream.read(1 << 20):
                    hasher.update(chunk)
        return hasher.digest()

    def split(self, paths, limit=None):
        """Group paths by digest and drop the groups that turned out to be singletons."""
        groups = defaultdict(list)
        for path in paths:
            try:
                groups[self.digest(path, limit)].append(path)
            except OSError as error:
                self.complain(error)
        return [group for group in groups.values() if len(group) > 1]

    def groups(self, roots):
        by_size = defaultdict(list)
        for size, path in self.walk(roots):
            by_size[size].append(path)
        # Largest first: whoever presses Ctrl-C has already seen where the space went.
        for size in sorted(by_size, reverse=True):
            if len(by_size[size]) < 2:
                continue
            for candidates in self.split(by_size[size], HEAD):
                confirmed = [candidates] if size <= HEAD else self.split(candidates)
                for group in confirmed:
                    yield size, sorted(group)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="dupes", description=__doc__.split("\n\n")[0])
    parser.add_argument("roots", nargs="+", metavar="FOLDER", type=Path)
    parser.add_argument("-m", "--min-size", type=parse_size, default=1, metavar="N[k|m|g]",
                        help="ignore smaller files (default: skip only empty ones)")
    parser.add_argument("-L", "--follow", action="store_true", help="follow symbolic links")
    parser.add_argument("-0", "--null", action="store_true",
                        help="print all but the first path of each group, separated by NUL, for xargs -0")
    args = parser.parse_args(argv)

    finder = Finder(args.min_size, args.follow)
    wasted = found = 0
    for size, group in finder.groups(args.roots):
        found += 1
        wasted += size * (len(group) - 1)
        if args.null:
            sys.stdout.write("".join(f"{path}\0" for path in group[1:]))
        else:
            print(f"{human(size)} x {len(group)}")
            for path in group:
                print(f"    {path}")
    if found and not args.null:
        print(f"{found} groups, {human(wasted)} could be freed")
    if finder.errors:
        return 2
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
