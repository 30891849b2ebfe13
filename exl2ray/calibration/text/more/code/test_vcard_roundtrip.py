# -*- coding: utf-8 -*-
from __future__ import unicode_literals

import datetime
import textwrap
import unittest

from rolodex import vcard
from rolodex.vcard import ParseError, VCard


def card(body, version="3.0"):
    text = "BEGIN:VCARD\nVERSION:%s\n%s\nEND:VCARD\n" % (version, textwrap.dedent(body).strip("\n"))
    return text.replace("\n", "\r\n").encode("utf-8")


class FoldingTest(unittest.TestCase):
    def test_continuation_line_loses_exactly_one_blank(self):
        parsed = vcard.loads(card("NOTE:The quay side\n  door sticks"))
        self.assertEqual(parsed.note, "The quay side door sticks")

    def test_continuation_by_tab(self):
        parsed = vcard.loads(card("NOTE:Ring tw\n\tice"))
        self.assertEqual(parsed.note, "Ring twice")

    def test_output_is_folded_at_75_octets_not_characters(self):
        c = VCard(fn="Þórunn")
        c.note = "ð" * 60
        for line in vcard.dumps(c).split(b"\r\n"):
            self.assertLessEqual(len(line), 75)

    def test_fold_never_splits_a_character(self):
        c = VCard(fn="x")
        for pad in range(8):
            c.note = "a" * pad + "€" * 50
            for line in vcard.dumps(c).split(b"\r\n"):
                line.decode("utf-8")  # must not raise


class EscapeTest(unittest.TestCase):
    CASES = [
        ("a;b", r"a\;b"),
        ("a,b", r"a\,b"),
        ("back\\slash", r"back\\slash"),
        ("two\nlines", r"two\nlines"),
        ("colon: fine", "colon: fine"),
    ]

    def test_escape(self):
        for plain, quoted in self.CASES:
            self.assertEqual(vcard.escape(plain), quoted, plain)

    def test_unescape(self):
        for plain, quoted in self.CASES:
            self.assertEqual(vcard.unescape(quoted), plain, quoted)

    def test_capital_n_is_a_newline_too(self):
        self.assertEqual(vcard.unescape(r"one\Ntwo"), "one\ntwo")

    def test_lone_backslash_at_end_is_kept(self):
        # Seen in exports from a 2004 telephone
        self.assertEqual(vcard.unescape("C:\\"), "C:\\")


class NameTest(unittest.TestCase):
    def test_five_parts(self):
        c = vcard.loads(card("""
            N:Ó Briain;Caoimhe;Máire,Áine;Dr;MRCVS
            FN:Dr Caoimhe Ó Briain
        """))
        self.assertEqual(c.n.family, ["Ó Briain"])
        self.assertEqual(c.n.additional, ["Máire", "Áine"])
        self.assertEqual(c.n.suffixes, ["MRCVS"])

    def test_missing_parts_are_empty_lists(self):
        c = vcard.loads(card("N:Tadgell\nFN:Tadgell"))
        self.assertEqual(c.n.given, [])
        self.assertEqual(c.n.prefixes, [])

    def test_fn_is_made_up_from_n_if_absent(self):
        c = vcard.loads(card("N:Varga;Ilka;;;"))
        self.assertEqual(c.fn, "Ilka Varga")


class VersionTest(unittest.TestCase):
    def test_21_quoted_printable(self):
        c = vcard.loads(card("""
            N;CHARSET=ISO-8859-1;ENCODING=QUOTED-PRINTABLE:J=F8rgensen;Bj=F8rn
            TEL;HOME;VOICE:555 0134
        """, version="2.1"))
        self.assertEqual(c.n.family, ["Jørgensen"])
        self.assertEqual(c.tel[0].types, {"home", "voice"})

    def test_21_soft_line_break(self):
        c = vcard.loads(card(
            "NOTE;ENCODING=QUOTED-PRINTABLE:first half=\nsecond half", version="2.1"))
        self.assertEqual(c.note, "first halfsecond half")

    def test_40_requires_fn(self):
        with self.assertRaises(ParseError) as cm:
            vcard.loads(card("N:Varga;Ilka;;;", version="4.0"), strict=True)
        self.assertEqual(cm.exception.line, 1)
        self.assertIn("FN", str(cm.exception))

    def test_unknown_version(self):
        with self.assertRaises(ParseError):
            vcard.loads(card("FN:x", version="5.1"))


class BirthdayTest(unittest.TestCase):
    def check(self, text, expected):
        self.assertEqual(vcard.loads(card("FN:x\nBDAY:" + text)).bday, expected)

    def test_basic_and_extended(self):
        self.check("19710309", datetime.date(1971, 3, 9))
        self.check("1971-03-09", datetime.date(1971, 3, 9))

    def test_without_year(self):
        self.check("--0309", vcard.PartialDate(month=3, day=9))

    def test_29_february_without_year_is_valid(self):
        self.check("--0229", vcard.PartialDate(month=2, day=29))

    def test_rubbish_is_kept_as_text(self):
        self.check("early spring", "early spring")


class RoundTripTest(unittest.TestCase):
    def test_unknown_properties_survive_in_place(self):
        raw = card("""
            FN:Wharf Office
            X-BERTH;X-SIDE=port:14
            TEL:555 0177
        """)
        self.assertEqual(vcard.dumps(vcard.loads(raw)), raw)

    def test_groups_survive(self):
        raw = card("FN:x\nitem1.TEL:555 0119\nitem1.X-LABEL:boathouse")
        self.assertEqual(vcard.dumps(vcard.loads(raw)), raw)


if __name__ == "__main__":
    unittest.main()
