from decimal import ROUND_HALF_EVEN, Decimal

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models, transaction
from django.db.models import F, Q, Sum
from django.db.models.functions import Coalesce
from django.urls import reverse
from django.utils import timezone
from django.utils.translation import gettext_lazy as _, pgettext_lazy

from .fields import MoneyField
from .signals import entry_posted

CENT = Decimal("0.01")


class AccountQuerySet(models.QuerySet):
    def open_on(self, day):
        return self.filter(opened__lte=day).filter(Q(closed__isnull=True) | Q(closed__gt=day))

    def with_balance(self, until=None):
        lines = Q(lines__entry__posted_at__isnull=False)
        if until is not None:
            lines &= Q(lines__entry__date__lte=until)
        return self.annotate(
            balance=Coalesce(Sum("lines__amount", filter=lines), Decimal(0)),
        )


class Account(models.Model):
    class Kind(models.TextChoices):
        ASSET = "A", _("Asset")
        LIABILITY = "L", _("Liability")
        EQUITY = "Q", pgettext_lazy("accounting", "Equity")
        INCOME = "I", _("Income")
        EXPENSE = "E", _("Expense")

    code = models.CharField(_("code"), max_length=12, unique=True)
    name = models.CharField(_("name"), max_length=120)
    kind = models.CharField(_("kind"), max_length=1, choices=Kind.choices)
    parent = models.ForeignKey(
        "self", models.PROTECT, null=True, blank=True, related_name="children",
    )
    opened = models.DateField(_("opened"), default=timezone.localdate)
    closed = models.DateField(_("closed"), null=True, blank=True)

    objects = AccountQuerySet.as_manager()

    class Meta:
        ordering = ["code"]
        verbose_name = _("account")
        verbose_name_plural = _("accounts")
        constraints = [
            models.CheckConstraint(
                check=Q(closed__isnull=True) | Q(closed__gte=F("opened")),
                name="account_closed_after_opened",
            ),
        ]

    def __str__(self):
        return f"{self.code} {self.name}"

    def clean(self):
        if self.parent and self.parent.kind != self.kind:
            raise ValidationError({
                "parent": _("An account must be of the same kind as the account above it."),
            })
        seen = {self.pk}
        above = self.parent
        while above is not None:
            if above.pk in seen:
                raise ValidationError({"parent": _("This would make a circle.")})
            seen.add(above.pk)
            above = above.parent

    def get_absolute_url(self):
        return reverse("ledger:account", args=[self.code])

    @property
    def debit_is_increase(self):
        return self.kind in {self.Kind.ASSET, self.Kind.EXPENSE}


class Period(models.Model):
    name = models.CharField(_("name"), max_length=40)
    start = models.DateField(_("first day"))
    end = models.DateField(_("last day"))
    locked_at = models.DateTimeField(_("locked"), null=True, editable=False)
    locked_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.PROTECT, null=True, editable=False, related_name="+",
    )

    class Meta:
        ordering = ["-start"]
        permissions = [("lock_period", _("Can lock a period"))]

    def __str__(self):
        return self.name

    @transaction.atomic
    def lock(self, user):
        drafts = Entry.objects.filter(date__range=(self.start, self.end), posted_at=None)
        if n := drafts.count():
            raise ValidationError(_("%(n)d entries of this period are still drafts."), params={"n": n})
        self.locked_at = timezone.now()
        self.locked_by = user
        self.save(update_fields=["locked_at", "locked_by"])


class Entry(models.Model):
    """A journal entry. Once posted it is never changed, only reversed."""

    number = models.PositiveIntegerField(_("number"), null=True, unique=True, editable=False)
    date = models.DateField(_("date"), default=timezone.localdate)
    text = models.CharField(_("text"), max_length=200)
    voucher = models.FileField(_("voucher"), upload_to="vouchers/%Y/%m/", blank=True)
    posted_at = models.DateTimeField(null=True, editable=False)
    reverses = models.OneToOneField(
        "self", models.PROTECT, null=True, editable=False, related_name="reversed_by",
    )

    class Meta:
        ordering = ["date", "number"]
        verbose_name = _("journal entry")
        verbose_name_plural = _("journal entries")

    def __str__(self):
        return f"#{self.number or '–'} {self.text}"

    @transaction.atomic
    def post(self):
        if self.posted_at:
            raise ValidationError(_("This entry has been posted already."))
        if Period.objects.filter(
            start__lte=self.date, end__gte=self.date, locked_at__isnull=False,
        ).exists():
            raise ValidationError({"date": _("The books for this date are closed.")})

        total = self.lines.aggregate(s=Sum("amount"))["s"]
        if total is None:
            raise ValidationError(_("An entry needs at least two lines."))
        if total != 0:
            raise ValidationError(
                _("Debit and credit differ by %(amount)s."), params={"amount": abs(total)},
            )

        # Numbers must have no gaps, hence no database sequence.
        last = (
            Entry.objects.select_for_update()
            .exclude(number=None).order_by("-number").values_list("number", flat=True).first()
        )
        self.number = (last or 0) + 1
        self.posted_at = timezone.now()
        self.save()
        transaction.on_commit(lambda: entry_posted.send(sender=Entry, entry=self))

    @transaction.atomic
    def reverse(self, date=None):
        if self.posted_at is None:
            raise ValidationError(_("A draft is deleted, not reversed."))
        mirror = Entry.objects.create(
            date=date or timezone.localdate(),
            text=_("Reversal of #%d") % self.number,
            reverses=self,
        )
        Line.objects.bulk_create(
            Line(entry=mirror, account_id=line.account_id, amount=-line.amount, memo=line.memo)
            for line in self.lines.all()
        )
        mirror.post()
        return mirror


class Line(models.Model):
    entry = models.ForeignKey(Entry, models.CASCADE, related_name="lines")
    account = models.ForeignKey(Account, models.PROTECT, related_name="lines")
    amount = MoneyField(_("amount"), help_text=_("Positive is debit, negative is credit."))
    memo = models.CharField(_("memo"), max_length=100, blank=True)

    class Meta:
        constraints = [
            models.CheckConstraint(check=~Q(amount=0), name="line_amount_not_zero"),
        ]

    def save(self, *args, **kwargs):
        self.amount = Decimal(self.amount).quantize(CENT, ROUND_HALF_EVEN)
        super().save(*args, **kwargs)
