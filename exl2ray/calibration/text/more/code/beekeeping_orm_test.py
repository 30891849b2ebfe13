import datetime
import unittest
from decimal import Decimal
from unittest import mock

from apiary import billing
from apiary.models import Colony, Jar, Order, OutOfSeason


class FrozenDate(datetime.date):
    @classmethod
    def today(cls):
        return cls(2019, 8, 17)


class OrderTestCase(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.heath = Colony(name=u"Heath 3", queen_year=2018)
        self.lime = Colony(name=u"Lime avenue", queen_year=2017)
        self.jars = [
            Jar(colony=self.heath, grams=500, price=Decimal("7.50"), stock=12),
            Jar(colony=self.heath, grams=250, price=Decimal("4.20"), stock=3),
            Jar(colony=self.lime, grams=500, price=Decimal("6.90"), stock=40),
        ]
        patcher = mock.patch("apiary.models.datetime.date", FrozenDate)
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_total_without_discount(self):
        order = Order(customer="Weber")
        order.add(self.jars[0], 2)
        order.add(self.jars[2], 1)
        self.assertEqual(order.total(), Decimal("21.90"))

    def test_dozen_counts_as_eleven(self):
        order = Order(customer="Weber")
        order.add(self.jars[2], 12)
        self.assertEqual(order.total(), 11 * Decimal("6.90"))
        # ... but only within one kind of jar
        order = Order(customer="Weber")
        order.add(self.jars[0], 6)
        order.add(self.jars[2], 6)
        self.assertEqual(order.total(), 6 * (Decimal("7.50") + Decimal("6.90")))

    def test_returned_jars_pay_deposit(self):
        order = Order(customer="Weber", empties=5)
        order.add(self.jars[1], 1)
        self.assertEqual(order.total(), Decimal("4.20") - 5 * Order.DEPOSIT)

    def test_empties_never_make_the_bill_negative(self):
        order = Order(customer="Weber", empties=300)
        order.add(self.jars[1], 1)
        self.assertEqual(order.total(), 0)
        self.assertGreater(order.credit_left(), 0)

    def test_cannot_sell_more_than_there_is(self):
        order = Order(customer="Weber")
        with self.assertRaisesRegex(ValueError, r"only 3 .*250 g"):
            order.add(self.jars[1], 4)
        self.assertEqual(order.lines, [])

    def test_comb_honey_in_season_only(self):
        comb = Jar(colony=self.lime, kind="comb", grams=200, price=Decimal("9.00"), stock=2)
        Order(customer="Weber").add(comb, 1)
        with mock.patch.object(FrozenDate, "today", return_value=datetime.date(2019, 12, 1)):
            self.assertRaises(OutOfSeason, Order(customer="Weber").add, comb, 1)

    def test_shipping_bands(self):
        for grams, expected in [
            (1000, "4.90"),
            (2000, "4.90"),
            (2001, "6.40"),
            (5000, "6.40"),
            (9999, "9.80"),
        ]:
            with self.subTest(grams=grams):
                self.assertEqual(billing.shipping(grams), Decimal(expected))

    def test_shipping_refuses_a_pallet(self):
        with self.assertRaises(billing.AskByPhone):
            billing.shipping(31501)

    @mock.patch("apiary.billing.smtplib.SMTP")
    def test_invoice_is_mailed_once(self, smtp):
        order = Order(customer="Weber", email="weber@example.org")
        order.add(self.jars[0], 1)
        billing.send_invoice(order)
        billing.send_invoice(order)
        server = smtp.return_value.__enter__.return_value
        self.assertEqual(server.send_message.call_count, 1)
        (message,), _ = server.send_message.call_args
        self.assertEqual(message["To"], "weber@example.org")
        self.assertIn("7,50", message.get_content())     # German customers, decimal comma

    @mock.patch("apiary.billing.smtplib.SMTP", side_effect=ConnectionRefusedError)
    def test_mail_failure_keeps_the_order_open(self, smtp):
        order = Order(customer="Weber", email="weber@example.org")
        order.add(self.jars[0], 1)
        with self.assertLogs("apiary.billing", level="ERROR") as logs:
            billing.send_invoice(order)
        self.assertFalse(order.invoiced)
        self.assertEqual(len(logs.records), 1)


if __name__ == "__main__":
    unittest.main()
