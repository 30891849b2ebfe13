import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchtools.diffstat import FileStat, histogram, parse, main

DATA = Path(__file__).parent / "data"


@pytest.fixture
def patch(tmp_path):
    def make(text, name="x.patch"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8", newline="\n")
        return path

    return make


UNIFIED = """\
--- a/bilge/pump.c
+++ b/bilge/pump.c
@@ -10,4 +10,5 @@ prime(struct pump *p)
 \tif (p->dry)
-\t\treturn;
+\t\treturn -1;
+\tp->strokes = 0;
 \topen_cock(p);
 \treturn;
"""


def test_counts_insertions_and_deletions():
    assert parse(UNIFIED.splitlines()) == [FileStat("bilge/pump.c", added=2, removed=1)]


def test_removed_line_that_looks_like_a_header():
    # "-- signature" deleted shows up as "--- signature"
    text = "--- a/sig\n+++ b/sig\n@@ -1,2 +1 @@\n Ann\n--- signature\n"
    (stat,) = parse(text.splitlines())
    assert (stat.added, stat.removed) == (0, 1)


@pytest.mark.parametrize(
    "header, name",
    [
        ("--- /dev/null\n+++ b/new.h", "new.h"),
        ("--- a/old.h\n+++ /dev/null", "old.h"),
        ("--- pump.c.orig\t2003-11-02 10:14:00\n+++ pump.c\t2003-11-02 10:20:31", "pump.c"),
        ('--- "a/na\\303\\257ve.txt"\n+++ "b/na\\303\\257ve.txt"', "naïve.txt"),
        ("--- a/with space.txt\t\n+++ b/with space.txt\t", "with space.txt"),
    ],
    ids=["created", "deleted", "timestamps", "quoted", "space"],
)
def test_file_name(header, name):
    stats = parse((header + "\n@@ -1 +1 @@\n-a\n+b\n").splitlines())
    assert [s.name for s in stats] == [name]


def test_binary_files_are_listed_without_numbers():
    stats = parse(["Binary files a/logo.png and b/logo.png differ"])
    assert stats == [FileStat("logo.png", binary=True)]
    assert "Bin" in histogram(stats, width=80)


class TestHistogram:
    def test_is_not_stretched_when_it_fits(self):
        assert histogram([FileStat("f", 3, 2)], width=80).splitlines()[0] == " f | 5 +++--"

    def test_scaled_bars_keep_at_least_one_mark(self):
        out = histogram([FileStat("big", 1000, 1000), FileStat("small", 1, 0)], width=40)
        assert out.splitlines()[1].endswith("1 +")

    def test_long_names_are_shortened_at_a_slash(self):
        out = histogram([FileStat("deep/" * 20 + "leaf.c", 1, 1)], width=50)
        first = out.splitlines()[0]
        assert first.startswith(" .../deep/")
        assert len(first) <= 50

    @pytest.mark.parametrize(
        "stats, line",
        [
            ([FileStat("a", 1, 0)], " 1 file changed, 1 insertion(+)"),
            ([FileStat("a", 0, 2)], " 1 file changed, 2 deletions(-)"),
            ([FileStat("a", 1, 1), FileStat("b", 4, 0)],
             " 2 files changed, 5 insertions(+), 1 deletion(-)"),
            ([], " 0 files changed"),
        ],
    )
    def test_summary(self, stats, line):
        assert histogram(stats, width=80).splitlines()[-1] == line


def test_main_reads_several_files(patch, capsys):
    one = patch(UNIFIED, "one.patch")
    two = patch(UNIFIED.replace("bilge/pump.c", "bilge/hose.c"), "two.patch")
    assert main([str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "bilge/hose.c | 3 ++-" in out
    assert "2 files changed" in out


def test_missing_file(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere.patch")]) == 1
    assert "nowhere.patch: No such file" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pipe")
def test_closed_pipe_is_not_a_traceback(patch):
    many = patch("".join(UNIFIED.replace("pump", f"pump{i}") for i in range(3000)))
    proc = subprocess.run(
        f"{sys.executable} -m patchtools.diffstat {many} | head -n 1",
        shell=True, capture_output=True, text=True,
    )
    assert proc.stderr == ""


@pytest.mark.xfail(strict=True, reason="combined diffs are not understood yet, see #88")
def test_combined_diff():
    stats = parse((DATA / "merge.cc.diff").read_text().splitlines())
    assert len(stats) == 2
