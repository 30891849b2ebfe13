"""Django: opening hours of a federation of small museums, and what their volunteers may change in the admin."""
from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db import models, transaction
from django.db.models import Count, Exists, F, OuterRef, Q
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _, ngettext


class MuseumQuerySet(models.QuerySet):
    def open_at(self, when):
        closed = Closure.objects.filter(museum=OuterRef("pk"), first__lte=when.date(), last__gte=when.date())
        return (self.filter(hours__weekday=when.isoweekday(), hours__opens__lte=when.time(), hours__closes__gt=when.time())
                .exclude(Exists(closed)).distinct())

    def for_user(self, user):
        return self if user.is_superuser else self.filter(volunteers=user)


class Museum(models.Model):
    name = models.CharField(max_length=120)
    slug = models.SlugField(unique=True)
    ring_bell = models.BooleanField(_("visitors must ring"), default=False)
    volunteers = models.ManyToManyField("auth.User", blank=True, related_name="museums")
    objects = MuseumQuerySet.as_manager()

    class Meta:
        ordering = ["name"]

    def __str__(self):
        return self.name


class Hours(models.Model):
    museum = models.ForeignKey(Museum, models.CASCADE, related_name="hours")
    weekday = models.PositiveSmallIntegerField(choices=enumerate(
        [_("Monday"), _("Tuesday"), _("Wednesday"), _("Thursday"), _("Friday"), _("Saturday"), _("Sunday")], 1))
    opens = models.TimeField()
    closes = models.TimeField()

    class Meta:
        ordering = ["weekday", "opens"]
        constraints = [
            models.CheckConstraint(condition=Q(closes__gt=F("opens")), name="hours_closes_after_opening"),
            models.UniqueConstraint(fields=["museum", "weekday", "opens"], name="hours_no_twins"),
        ]


class Closure(models.Model):
    museum = models.ForeignKey(Museum, models.CASCADE, related_name="closures")
    first = models.DateField()
    last = models.DateField()
    reason = models.CharField(max_length=200, help_text=_("Shown on the web page, so please no “staff ill”."))


class HoursFormSet(forms.BaseInlineFormSet):
    def clean(self):
        super().clean()
        by_day = {}
        for form in self.forms:
            data = getattr(form, "cleaned_data", None)
            if data and not data.get("DELETE"):
                by_day.setdefault(data["weekday"], []).append((data["opens"], data["closes"]))
        for spans in by_day.values():
            spans.sort()
            for (_a, end), (start, _b) in zip(spans, spans[1:]):
                if start < end:
                    raise ValidationError(_("Two spans of one day overlap: one ends at %(end)s, the next starts at %(start)s."),
                                          params={"end": end, "start": start})


class HoursInline(admin.TabularInline):
    model = Hours
    formset = HoursFormSet
    extra = 0


class ClosureInline(admin.StackedInline):
    model = Closure
    classes = ["collapse"]
    extra = 0


@admin.register(Museum)
class MuseumAdmin(admin.ModelAdmin):
    list_display = ["name", "days_open", "bell", "helpers"]
    list_filter = ["ring_bell"]
    search_fields = ["name", "volunteers__last_name"]
    prepopulated_fields = {"slug": ["name"]}
    filter_horizontal = ["volunteers"]
    inlines = [HoursInline, ClosureInline]
    actions = ["close_for_winter"]

    def get_queryset(self, request):
        return (super().get_queryset(request).for_user(request.user)
                .annotate(n_days=Count("hours__weekday", distinct=True), n_helpers=Count("volunteers", distinct=True)))

    def get_readonly_fields(self, request, obj=None):
        return [] if request.user.is_superuser else ["name", "slug", "volunteers"]

    def get_prepopulated_fields(self, request, obj=None):
        return super().get_prepopulated_fields(request, obj) if request.user.is_superuser else {}

    @admin.display(description=_("days a week"), ordering="n_days")
    def days_open(self, obj):
        if obj.n_days == 0:
            return format_html('<span style="color:#a40000">{}</span>', _("never"))
        return obj.n_days

    @admin.display(boolean=True, description=_("bell"))
    def bell(self, obj):
        return obj.ring_bell

    @admin.display(description=_("volunteers"), ordering="n_helpers")
    def helpers(self, obj):
        return obj.n_helpers

    @admin.action(description=_("Close from 1 November to 31 March"), permissions=["change"])
    def close_for_winter(self, request, queryset):
        from datetime import date
        year = date.today().year
        with transaction.atomic():
            made = Closure.objects.bulk_create(
                Closure(museum=m, first=date(year, 11, 1), last=date(year + 1, 3, 31), reason="Winter break")
                for m in queryset.exclude(closures__first=date(year, 11, 1)))
        self.message_user(request, ngettext("%d museum closed.", "%d museums closed.", len(made)) % len(made), messages.SUCCESS)
