#!/usr/bin/env python3
"""Complain about translations that would crash or confuse the program.

Checks each PO file given for

* format directives that differ between msgid and msgstr,
* a different number of plural forms than the header promises,
* access keys (``_`` before a letter) that got lost or are used twice in a menu,
* a missing colon, ellipsis or line break at the end.

Exit status 1 if any error was found, 0 if there were only warnings.
"""

import argparse
import collections
import re
import sys

import polib_mini as polib

DIRECTIVE = re.compile(
    r"""%(?:(?P<pos>\d+)\$)?
         (?P<flags>[-+ #0']*)
         (?P<width>\*|\d+)?
         (?:\.(?P<prec>\*|\d+))?
         (?P<length>hh|h|ll|l|j|z|t|L|PRI\w+)?
         (?P<conv>[diouxXeEfFgGaAcspn%m])""",
    re.VERBOSE,
)
BRACE = re.compile(r"\{(\w*)(?:![rsa])?(?::[^{}]*)?\}")
ACCEL = re.compile(r"_(\w)")

ENDINGS = [":", "…", "...", "\n", "?"]
# Colon and question mark take a space in French; Japanese and Chinese have wide ones.
EQUIVALENT = {
    "fr": {":": ("\u00a0:", " :"), "?": ("\u202f?", "\u00a0?", " ?")},
    "ja": {":": ("：",), "?": ("？",), "...": ("…",)},
    "zh": {":": ("：",), "?": ("？",), "...": ("…", "……")},
    "el": {"?": (";", "\u037e")},
}

Problem = collections.namedtuple("Problem", "severity line text")


def c_directives(text):
    """Argument types by position; ``*`` takes an int of its own."""
    types, auto = {}, 1
    for m in DIRECTIVE.finditer(text):
        if m["conv"] in "%m":
            continue
        for star in (m["width"], m["prec"]):
            if star == "*":
                types[auto] = "int"
                auto += 1
        pos = int(m["pos"]) if m["pos"] else auto
        if not m["pos"]:
            auto += 1
        conv = "d" if m["conv"] in "di" else m["conv"]
        types[pos] = (m["length"] or "") + conv
    return types


def brace_directives(text):
    return collections.Counter(BRACE.findall(text.replace("{{", "").replace("}}", "")))


class Checker:
    def __init__(self, po):
        self.po = po
        self.lang = po.metadata.get("Language", "").split("_")[0]
        m = re.search(r"nplurals\s*=\s*(\d+)", po.metadata.get("Plural-Forms", ""))
        self.nplurals = int(m[1]) if m else None
        self.problems = []
        self.accels = collections.defaultdict(dict)

    def error(self, entry, text, *args):
        self.problems.append(Problem("error", entry.linenum, text % args))

    def warn(self, entry, text, *args):
        self.problems.append(Problem("warning", entry.linenum, text % args))

    def run(self):
        for entry in self.po:
            if entry.obsolete or "fuzzy" in entry.flags or not entry.translated():
                continue
            if entry.msgid_plural:
                self.check_plural(entry)
            else:
                self.check_format(entry, entry.msgid, entry.msgstr)
                self.check_ending(entry)
                self.check_accel(entry)
        return sorted(self.problems, key=lambda p: p.line)

    def check_plural(self, entry):
        if self.nplurals is None:
            self.error(entry, "plural form used, but no Plural-Forms in the header")
            return
        if len(entry.msgstr_plural) != self.nplurals:
            self.error(entry, "%d plural forms, the header says %d",
                       len(entry.msgstr_plural), self.nplurals)
        for index, text in sorted(entry.msgstr_plural.items()):
            # "one file" need not mention the number
            lenient = index == 0 or self.nplurals == 1
            self.check_format(entry, entry.msgid_plural, text, may_omit=lenient)

    def check_format(self, entry, source, target, may_omit=False):
        if "c-format" in entry.flags:
            want, got = c_directives(source), c_directives(target)
            extra = {k: v for k, v in got.items() if want.get(k) != v}
            if extra:
                self.error(entry, "argument %d is %%%s here, %%%s in the original",
                           *next((k, v, want.get(k, "(none)")) for k, v in extra.items()))
            elif len(got) < len(want) and not may_omit:
                self.error(entry, "%d of %d arguments are used", len(got), len(want))
        elif "python-brace-format" in entry.flags:
            want, got = brace_directives(source), brace_directives(target)
            for name in sorted(set(got) - set(want)):
                self.error(entry, "unknown placeholder {%s}", name)
            for name in sorted(set(want) - set(got)):
                if not may_omit:
                    self.warn(entry, "placeholder {%s} is not used", name)

    def check_ending(self, entry):
        for end in ENDINGS:
            if not entry.msgid.endswith(end):
                continue
            allowed = (end,) + EQUIVALENT.get(self.lang, {}).get(end, ())
            if not entry.msgstr.endswith(allowed):
                self.warn(entry, "should end in %r like the original", end)
            return

    def check_accel(self, entry):
        if not ACCEL.search(entry.msgid) or " " in entry.msgid and "menu" not in (entry.msgctxt or ""):
            return
        m = ACCEL.search(entry.msgstr)
        if not m:
            self.warn(entry, "access key of %r is missing", entry.msgid)
            return
        menu = self.accels[entry.msgctxt or ""]
        other = menu.setdefault(m[1].lower(), entry)
        if other is not entry:
            self.warn(entry, "access key %s is used in line %d too", m[1].upper(), other.linenum)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE.po")
    parser.add_argument("-q", "--quiet", action="store_true", help="errors only")
    args = parser.parse_args(argv)

    failed = False
    for name in args.files:
        for problem in Checker(polib.pofile(name)).run():
            failed |= problem.severity == "error"
            if problem.severity == "error" or not args.quiet:
                print(f"{name}:{problem.line}: {problem.severity}: {problem.text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
