"""Tidy up the membership list of the allotment society before it goes to the printer's.

Input is whatever the secretary exports; columns are recognised by their heading,
in any order and with the spellings seen since 2016.
"""

import csv
import re
import sys
import unicodedata
from collections import defaultdict
from difflib import SequenceMatcher
from pathlib import Path

HEADINGS = {
    "name": ("name", "full name", "member", "Name of member"),
    "plot": ("plot", "plot no", "plot no.", "plot number", "#"),
    "street": ("street", "address", "address 1", "addr"),
    "town": ("town", "city", "address 2"),
    "postcode": ("postcode", "post code", "pc", "zip"),
    "phone": ("phone", "tel", "tel.", "telephone", "mobile"),
    "paid": ("paid", "paid?", "subs", "subs paid"),
}
_LOOKUP = {alias.casefold(): field for field, aliases in HEADINGS.items() for alias in aliases}

ABBREVIATIONS = [
    (re.compile(r"\bRd\b\.?", re.I), "Road"),
    (re.compile(r"\bAve?\b\.?", re.I), "Avenue"),
    (re.compile(r"\bCl\b\.?", re.I), "Close"),
    (re.compile(r"\bCres\b\.?", re.I), "Crescent"),
    (re.compile(r"(?<=\w )St\b\.?$", re.I), "Street"),     # only at the end: "St Mary's Lane" is a saint
    (re.compile(r"^Flat\s*(\w+)\s*[,/]?\s*", re.I), r"Flat \1, "),
]

YES = {"y", "yes", "paid", "x", "✓", "1", "true", "cash", "bacs"}
NO = {"", "n", "no", "-", "0", "false", "owes"}


def squash(text):
    """One kind of space, one kind of apostrophe, composed accents."""
    text = unicodedata.normalize("NFC", text or "")
    text = text.translate({0x2019: "'", 0x00A0: " ", 0x200B: None, 0xFEFF: None})
    return " ".join(text.split())


def tidy_name(text):
    text = squash(text)
    if "," in text:
        last, first = (part.strip() for part in text.split(",", 1))
        text = f"{first} {last}"
    if text.isupper() or text.islower():
        text = re.sub(r"[^\W\d_]+", lambda m: m[0].capitalize(), text)
        text = re.sub(r"\b(Mc|O')([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text


def tidy_street(text):
    text = squash(text).rstrip(",.")
    for pattern, full in ABBREVIATIONS:
        text = pattern.sub(full, text)
    return text


def tidy_phone(text):
    digits = re.sub(r"\D", "", text or "")
    if digits.startswith("0044"):
        digits = digits[2:]
    if digits.startswith("44"):
        digits = "0" + digits[2:].lstrip("0")
    if len(digits) == 10 and digits[0] == "7":
        digits = "0" + digits           # the spreadsheet ate the zero
    return f"{digits[:5]} {digits[5:]}" if len(digits) == 11 else ""


def tidy_paid(text):
    word = squash(text).casefold()
    if word in YES or re.match(r"£?\d+(\.\d\d)?$", word) and float(word.lstrip("£")) > 0:
        return True
    if word in NO:
        return False
    raise ValueError(f"cannot tell whether {text!r} means paid")


TIDY = {"name": tidy_name, "street": tidy_street, "town": tidy_name, "phone": tidy_phone,
        "plot": lambda t: squash(t).upper().lstrip("0"), "postcode": lambda t: squash(t).upper(),
        "paid": tidy_paid}


def read(path):
    with open(path, newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        columns = {h: _LOOKUP.get(squash(h).casefold()) for h in reader.fieldnames}
        unknown = [h for h, field in columns.items() if field is None]
        if unknown:
            print("ignoring columns:", ", ".join(map(repr, unknown)), file=sys.stderr)
        for row in reader:
            record = {"line": reader.line_num}
            for heading, field in columns.items():
                if field is None:
                    continue
                try:
                    record[field] = TIDY[field](row[heading])
                except ValueError as problem:
                    print(f"{path}:{reader.line_num}: {problem}", file=sys.stderr)
                    record[field] = None
            if record.get("name"):
                yield record


def likely_twins(records, threshold=0.86):
    """Pairs with nearly the same name at the same postcode: couples, or somebody entered twice."""
    by_postcode = defaultdict(list)
    for record in records:
        by_postcode[record.get("postcode")].append(record)
    for neighbours in by_postcode.values():
        for i, a in enumerate(neighbours):
            for b in neighbours[i + 1:]:
                ratio = SequenceMatcher(None, a["name"].casefold(), b["name"].casefold()).ratio()
                if ratio >= threshold:
                    yield ratio, a, b


if __name__ == "__main__":
    source = Path(sys.argv[1])
    members = list(read(source))
    for ratio, a, b in sorted(likely_twins(members), key=lambda t: -t[0]):
        print(f"lines {a['line']} and {b['line']}: {a['name']} / {b['name']} ({ratio:.0%})", file=sys.stderr)
    fields = list(HEADINGS)
    with source.with_suffix(".clean.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(members, key=lambda r: (len(r.get("plot", "")), r.get("plot", ""))))
