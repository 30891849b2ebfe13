import io
import unittest
from contextlib import redirect_stderr
from unittest import mock

from labpump import PumpBusy, PumpError, SyringePump, parse_volume


class FakeSerial:
    """Answers like the real thing: slowly, in pieces, and with a stray XOFF now and then."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.sent = []
        self._pending = b""

    def write(self, data):
        self.sent.append(data)
        self._pending += self.answers.pop(0) if self.answers else b""

    def read(self, n=1):
        piece, self._pending = self._pending[:n], self._pending[n:]
        return piece

    def flush(self):
        pass


class VolumeTests(unittest.TestCase):
    def test_units(self):
        for text, microlitres in [("5 ul", 5), ("5 µl", 5), ("0.25ml", 250), ("1 mL", 1000), ("12", 12)]:
            with self.subTest(text):
                self.assertAlmostEqual(parse_volume(text), microlitres)

    def test_decimal_comma_is_refused_not_guessed(self):
        with self.assertRaisesRegex(ValueError, "decimal point"):
            parse_volume("0,5 ml")

    def test_both_micro_signs(self):
        # U+00B5 comes from keyboards, U+03BC from word processors.
        self.assertEqual(parse_volume("7 \u00b5l"), parse_volume("7 \u03bcl"))


class PumpTests(unittest.TestCase):
    def pump(self, *answers, **kwargs):
        self.port = FakeSerial(*answers)
        return SyringePump(self.port, bore_mm=14.57, **kwargs)

    def test_steps_follow_from_the_bore(self):
        p = self.pump(b"/0@\x03", b"/0`\x03")
        p.dispense(100)
        # 100 ul in a bore of 14.57 mm is 0.5998 mm of travel, at 3149.6 steps a millimetre
        self.assertEqual(self.port.sent[0], b"/1D1889R\r")

    def test_backlash_is_taken_up_when_the_direction_changes(self):
        p = self.pump(*[b"/0`\x03"] * 6, backlash_steps=40)
        p.aspirate(100)
        p.dispense(50)
        p.dispense(50)
        moves = [s for s in self.port.sent if s[2:3] in b"PD"]
        self.assertEqual([int(m[3:-2]) for m in moves], [1889, 945 + 40, 944])

    def test_rounding_errors_do_not_pile_up(self):
        p = self.pump(*[b"/0`\x03"] * 2000)
        for _ in range(1000):
            p.dispense(0.03)
        total = sum(int(s[3:-2]) for s in self.port.sent if s[2:3] == b"D")
        self.assertAlmostEqual(total, 30 * 18.89, delta=1)

    def test_busy_is_polled_then_given_up(self):
        p = self.pump(*[b"/0@\x03"] * 50)
        with mock.patch("labpump.time.sleep") as sleep, mock.patch("labpump.time.monotonic", side_effect=range(0, 500, 5)):
            with self.assertRaises(PumpBusy):
                p.wait(timeout=60)
        self.assertGreaterEqual(sleep.call_count, 5)

    def test_plunger_overload_stops_everything(self):
        p = self.pump(b"/0i\x03")
        with self.assertRaises(PumpError) as caught:
            p.dispense(10)
        self.assertEqual(caught.exception.code, 9)
        self.assertEqual(self.port.sent[-1], b"/1T\r")

    def test_answer_in_pieces(self):
        p = self.pump(b"\x13/0`30", b"00\x03")
        self.port.write(b"")
        self.assertEqual(p.read_position(), 3000)

    def test_more_than_the_syringe_holds(self):
        p = self.pump(capacity_ul=1000)
        p.position_ul = 980
        with self.assertRaisesRegex(PumpError, r"20 µl of room"):
            p.aspirate(25)
        self.assertEqual(self.port.sent, [])


class CommandLineTests(unittest.TestCase):
    @mock.patch("labpump.serial_for_url")
    def test_no_port(self, opened):
        from labpump.__main__ import main

        opened.side_effect = OSError(2, "No such file or directory")
        err = io.StringIO()
        with redirect_stderr(err):
            self.assertEqual(main(["--port", "/dev/ttyUSB7", "status"]), 69)
        self.assertIn("is the pump switched on?", err.getvalue())

    @unittest.skipUnless(hasattr(io, "open_code"), "needs 3.8")
    def test_script_is_checked_before_the_first_drop(self):
        from labpump.script import compile_script

        with self.assertRaises(SyntaxError) as caught:
            compile_script("aspirate 100\nrepeat 3 {\ndispense 30\n")
        self.assertEqual(caught.exception.lineno, 2)
        self.assertIn("never closed", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
