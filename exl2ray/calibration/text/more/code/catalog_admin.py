from django import forms
from django.contrib import admin, messages
from django.db.models import Count, OuterRef, Subquery
from django.http import StreamingHttpResponse
from django.template.defaultfilters import filesizeformat
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _, ngettext

from .exporters import stream_marcxml
from .models import Copy, Loan, Work
from .tasks import reindex_works


class ShelfMarkFilter(admin.SimpleListFilter):
    title = _("shelf")
    parameter_name = "shelf"

    def lookups(self, request, model_admin):
        prefixes = (
            Copy.objects.exclude(shelf_mark="")
            .values_list("shelf_mark__prefix", flat=True).distinct().order_by()
        )
        return [(p, p) for p in sorted(prefixes)] + [("-", _("not shelved"))]

    def queryset(self, request, queryset):
        if self.value() == "-":
            return queryset.filter(copies__shelf_mark="")
        if self.value():
            return queryset.filter(copies__shelf_mark__startswith=self.value() + " ").distinct()
        return queryset


class CopyInline(admin.TabularInline):
    model = Copy
    extra = 0
    fields = ["barcode", "shelf_mark", "condition", "on_loan"]
    readonly_fields = ["on_loan"]

    def get_queryset(self, request):
        current = Loan.objects.filter(copy=OuterRef("pk"), returned=None).values("due")[:1]
        return super().get_queryset(request).annotate(due=Subquery(current))

    @admin.display(description=_("on loan until"), empty_value="–")
    def on_loan(self, copy):
        return copy.due

    def has_delete_permission(self, request, obj=None):
        # Copies are withdrawn, so that the old loans keep something to point at.
        return False


class WorkForm(forms.ModelForm):
    class Meta:
        model = Work
        fields = "__all__"
        widgets = {"summary": forms.Textarea(attrs={"rows": 6, "lang": "und"})}

    def clean_isbn(self):
        isbn = self.cleaned_data["isbn"].replace("-", "").replace(" ", "").upper()
        if not isbn:
            return None
        if len(isbn) == 10:
            digits = [10 if c == "X" else int(c) for c in isbn if c.isdigit() or c == "X"]
            if len(digits) != 10 or sum(w * d for w, d in zip(range(10, 0, -1), digits)) % 11:
                raise forms.ValidationError(_("The check digit of this ISBN is wrong."))
        elif len(isbn) == 13 and isbn.isdigit():
            if sum(int(c) * (3 if i % 2 else 1) for i, c in enumerate(isbn)) % 10:
                raise forms.ValidationError(_("The check digit of this ISBN is wrong."))
        else:
            raise forms.ValidationError(_("An ISBN has 10 or 13 digits."))
        return isbn


@admin.register(Work)
class WorkAdmin(admin.ModelAdmin):
    form = WorkForm
    inlines = [CopyInline]
    list_display = ["title", "author_list", "year", "n_copies", "cover_thumb"]
    list_filter = [ShelfMarkFilter, "language", ("year", admin.AllValuesFieldListFilter)]
    search_fields = ["title", "authors__sort_name", "=isbn", "copies__barcode__startswith"]
    autocomplete_fields = ["authors", "subjects"]
    list_select_related = ["publisher"]
    date_hierarchy = "acquired"
    actions = ["export_marcxml", "reindex"]
    fieldsets = [
        (None, {"fields": ["title", "subtitle", "authors", "isbn"]}),
        (_("Publication"), {"fields": [("publisher", "year"), "language", "edition"]}),
        (_("Contents"), {"fields": ["subjects", "summary", "cover"], "classes": ["collapse"]}),
    ]

    def get_queryset(self, request):
        return (
            super().get_queryset(request)
            .prefetch_related("authors")
            .annotate(_n_copies=Count("copies", distinct=True))
        )

    @admin.display(description=_("authors"))
    def author_list(self, work):
        names = [a.sort_name for a in work.authors.all()]
        return "; ".join(names[:3]) + (" …" if len(names) > 3 else "")

    @admin.display(description=_("copies"), ordering="_n_copies")
    def n_copies(self, work):
        return work._n_copies

    @admin.display(description=_("cover"))
    def cover_thumb(self, work):
        if not work.cover:
            return ""
        return format_html(
            '<img src="{}" height="40" alt="" title="{}">',
            work.cover_thumbnail.url, filesizeformat(work.cover.size),
        )

    @admin.action(description=_("Export selected works as MARCXML"), permissions=["view"])
    def export_marcxml(self, request, queryset):
        response = StreamingHttpResponse(
            stream_marcxml(queryset.iterator(chunk_size=200)), content_type="application/marcxml+xml",
        )
        response["Content-Disposition"] = 'attachment; filename="works.xml"'
        return response

    @admin.action(description=_("Rebuild search entries"), permissions=["change"])
    def reindex(self, request, queryset):
        ids = list(queryset.values_list("pk", flat=True))
        reindex_works.delay(ids)
        self.message_user(
            request,
            ngettext("%d work will be indexed shortly.", "%d works will be indexed shortly.", len(ids))
            % len(ids),
            messages.SUCCESS,
        )
