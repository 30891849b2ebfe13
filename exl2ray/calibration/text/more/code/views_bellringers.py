from datetime import timedelta

from django.contrib import messages
from django.contrib.auth.decorators import login_required, permission_required
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.db.models import Count, F, Prefetch, Q
from django.http import HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import ngettext
from django.views.decorators.http import require_GET, require_POST

from .forms import OccasionForm
from .models import Occasion, Placement, Ringer, Tower


@require_GET
def calendar(request, tower_slug):
    """Everything the band of a tower is asked to ring for in the next eight weeks."""
    tower = get_object_or_404(Tower.objects.select_related("captain"), slug=tower_slug)
    now = timezone.now()
    occasions = (
        tower.occasions.filter(starts__gte=now, starts__lt=now + timedelta(weeks=8))
        .annotate(
            coming=Count("placements", filter=Q(placements__answer=Placement.YES)),
            silent=Count("placements", filter=Q(placements__answer=Placement.UNKNOWN)),
        )
        .annotate(short=F("bells_wanted") - F("coming"))
        .order_by("starts")
    )
    return render(request, "ringing/calendar.html", {"tower": tower, "occasions": occasions})


@login_required
@require_GET
def occasion_detail(request, pk):
    placements = Placement.objects.select_related("ringer").order_by("bell", "ringer__surname")
    occasion = get_object_or_404(
        Occasion.objects.select_related("tower").prefetch_related(Prefetch("placements", queryset=placements)),
        pk=pk,
    )
    mine = next((p for p in occasion.placements.all() if p.ringer.user_id == request.user.id), None)
    return render(request, "ringing/occasion.html", {"occasion": occasion, "mine": mine})


@login_required
@require_POST
def answer(request, pk):
    """A ringer says yes, no or perhaps. Called by the buttons (htmx) and by the links in the e-mail."""
    occasion = get_object_or_404(Occasion, pk=pk)
    ringer = get_object_or_404(Ringer, user=request.user)
    choice = request.POST.get("answer")
    if choice not in Placement.ANSWERS:
        return HttpResponse(_("Please answer yes, no or perhaps."), status=422)
    if occasion.starts <= timezone.now():
        return HttpResponse(_("That has already been rung."), status=409)

    with transaction.atomic():
        placement, __ = Placement.objects.select_for_update().get_or_create(occasion=occasion, ringer=ringer)
        withdrew = placement.answer == Placement.YES and choice != Placement.YES and placement.bell is not None
        placement.answer = choice
        if withdrew:
            freed, placement.bell = placement.bell, None
        placement.save(update_fields=["answer", "bell"])
        if withdrew:
            # Only tell the captain once the row is really there, not from inside a transaction that may
            # still roll back.
            transaction.on_commit(lambda: occasion.notify_captain_of_gap(freed, ringer))

    if request.headers.get("HX-Request"):
        return render(request, "ringing/_answer_buttons.html", {"occasion": occasion, "mine": placement})
    return redirect(occasion)


@login_required
@require_POST
def assign_bells(request, pk):
    """Put the ringers who are coming on bells: heaviest bell to whoever has rung it most often.

    Greedy from the tenor upwards. A learner is never given the treble or the tenor unless nobody else is left.
    """
    occasion = get_object_or_404(Occasion.objects.select_related("tower"), pk=pk)
    if occasion.tower.captain_id != request.user.id:
        raise PermissionDenied

    with transaction.atomic():
        coming = list(
            occasion.placements.select_for_update(of=("self",))
            .filter(answer=Placement.YES)
            .select_related("ringer")
        )
        if len(coming) < occasion.bells_wanted:
            missing = occasion.bells_wanted - len(coming)
            messages.warning(
                request,
                ngettext("One more ringer is needed.", "%(n)d more ringers are needed.", missing) % {"n": missing},
            )
            return redirect(occasion)

        experience = Placement.experience_table([p.ringer_id for p in coming], occasion.tower)
        waiting = set(coming)
        tenor = occasion.bells_wanted
        for placement in coming:
            placement.bell = None
        for bell in range(tenor, 0, -1):
            pool = waiting
            if bell in (1, tenor):
                pool = {p for p in waiting if not p.ringer.is_learner} or waiting
            best = max(pool, key=lambda p: (experience.get((p.ringer_id, bell), 0), -p.ringer_id))
            best.bell = bell
            waiting.remove(best)
        Placement.objects.bulk_update(coming, ["bell"])

    messages.success(request, _("Bells assigned; %(n)d in reserve.") % {"n": len(waiting)})
    return redirect(occasion)


@permission_required("ringing.add_occasion", raise_exception=True)
def occasion_new(request, tower_slug):
    tower = get_object_or_404(Tower, slug=tower_slug)
    form = OccasionForm(request.POST or None, initial={"bells_wanted": tower.bells})
    form.instance.tower = tower
    if request.method == "POST" and form.is_valid():
        occasion = form.save()
        band = Ringer.objects.filter(towers=tower, active=True)
        Placement.objects.bulk_create(Placement(occasion=occasion, ringer=r) for r in band)
        return redirect(occasion)
    return render(request, "ringing/occasion_form.html", {"form": form, "tower": tower}, status=422 if form.errors else 200)


@require_GET
def next_ringing(request, tower_slug):
    """Tiny JSON feed for the notice board on the church door."""
    tower = get_object_or_404(Tower, slug=tower_slug)
    nxt = tower.occasions.filter(starts__gte=timezone.now()).order_by("starts").first()
    body = {"tower": tower.name, "next": nxt and {"starts": nxt.starts.isoformat(), "what": nxt.title}}
    response = JsonResponse(body)
    response["Cache-Control"] = "public, max-age=300"
    return response
