"""Web handlers of the herbarium's loan desk (Flask)."""

from datetime import date, timedelta
from functools import wraps
from http import HTTPStatus

from flask import Blueprint, abort, current_app, flash, g, jsonify, redirect, render_template, request, url_for
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import selectinload

from .db import session
from .mail import enqueue
from .models import Institution, Loan, LoanItem, Sheet

bp = Blueprint("loans", __name__, url_prefix="/loans")

TYPE_SPECIMEN_DAYS = 90
ORDINARY_DAYS = 365
PER_PAGE = 40


def curator_only(view):
    """Visitors may look at everything; only a curator's account may move specimens."""

    @wraps(view)
    def guarded(*args, **kwargs):
        if g.user is None:
            return redirect(url_for("auth.login", next=request.full_path))
        if not g.user.is_curator:
            abort(HTTPStatus.FORBIDDEN)
        return view(*args, **kwargs)

    return guarded


@bp.get("/")
def index():
    page = request.args.get("page", default=1, type=int)
    query = select(Loan).options(selectinload(Loan.items), selectinload(Loan.borrower))
    match request.args.get("show", "open"):
        case "open":
            query = query.where(Loan.returned_on.is_(None))
        case "overdue":
            query = query.where(Loan.returned_on.is_(None), Loan.due_on < date.today())
        case "all":
            pass
        case other:
            abort(HTTPStatus.BAD_REQUEST, f"show={other!r}: use open, overdue or all")
    query = query.order_by(Loan.due_on, Loan.id)
    total = session.scalar(select(func.count()).select_from(query.subquery()))
    loans = session.scalars(query.limit(PER_PAGE).offset((page - 1) * PER_PAGE)).all()
    if page > 1 and not loans:
        abort(HTTPStatus.NOT_FOUND)
    return render_template("loans/index.html", loans=loans, total=total, page=page, per_page=PER_PAGE)


@bp.get("/<int:loan_id>")
def show(loan_id):
    loan = session.get(Loan, loan_id) or abort(HTTPStatus.NOT_FOUND)
    if request.accept_mimetypes.best == "application/json":
        return jsonify(
            id=loan.id,
            borrower=loan.borrower.code,
            due=loan.due_on.isoformat(),
            sheets=[{"barcode": item.sheet.barcode, "taxon": item.sheet.determination} for item in loan.items],
        )
    return render_template("loans/show.html", loan=loan)


@bp.route("/new", methods=["GET", "POST"])
@curator_only
def create():
    if request.method == "GET":
        return render_template("loans/form.html", form={}, errors={})

    form, errors = request.form, {}
    borrower = session.scalar(select(Institution).where(Institution.code == form.get("borrower", "").strip().upper()))
    if borrower is None:
        errors["borrower"] = "No institution with this code. Look it up in Index Herbariorum first."

    barcodes = form.get("barcodes", "").split()
    if len(set(barcodes)) != len(barcodes):
        errors["barcodes"] = "A barcode appears twice."
    sheets = session.scalars(select(Sheet).where(Sheet.barcode.in_(barcodes))).all()
    missing = set(barcodes) - {sheet.barcode for sheet in sheets}
    if missing:
        errors["barcodes"] = "Unknown: " + ", ".join(sorted(missing))
    elif not sheets:
        errors["barcodes"] = "A loan without specimens?"
    fragile = [sheet.barcode for sheet in sheets if sheet.condition == "do not travel"]
    if fragile:
        errors["barcodes"] = "Not allowed to travel: " + ", ".join(fragile)

    if errors:
        return render_template("loans/form.html", form=form, errors=errors), HTTPStatus.UNPROCESSABLE_ENTITY

    days = TYPE_SPECIMEN_DAYS if any(sheet.is_type for sheet in sheets) else ORDINARY_DAYS
    loan = Loan(borrower=borrower, due_on=date.today() + timedelta(days=days), issued_by=g.user)
    loan.items = [LoanItem(sheet=sheet) for sheet in sheets]
    session.add(loan)
    try:
        session.commit()
    except IntegrityError:
        # unique index on loan_item(sheet_id) where returned_on is null: someone was quicker
        session.rollback()
        errors["barcodes"] = "One of the sheets has just been lent to somebody else."
        return render_template("loans/form.html", form=form, errors=errors), HTTPStatus.CONFLICT

    enqueue("loan_issued", loan_id=loan.id)
    flash(f"Loan {loan.id} to {borrower.name}: {len(sheets)} sheets until {loan.due_on:%d %B %Y}.")
    return redirect(url_for(".show", loan_id=loan.id), HTTPStatus.SEE_OTHER)


@bp.post("/<int:loan_id>/extend")
@curator_only
def extend(loan_id):
    loan = session.get(Loan, loan_id, with_for_update=True) or abort(HTTPStatus.NOT_FOUND)
    if loan.returned_on:
        flash("That loan came back already.", "warning")
    elif loan.extensions >= current_app.config["MAX_EXTENSIONS"]:
        flash("No further extension; ask the keeper.", "warning")
    else:
        loan.extensions += 1
        loan.due_on = max(loan.due_on, date.today()) + timedelta(days=180)
        flash(f"Extended until {loan.due_on:%d %B %Y}.")
    session.commit()
    return redirect(url_for(".show", loan_id=loan_id), HTTPStatus.SEE_OTHER)


@bp.post("/scan")
@curator_only
def scan_return():
    """One barcode from the hand scanner; answers in a form that the scanner can beep about."""
    barcode = request.get_data(as_text=True).strip()
    item = session.scalar(
        select(LoanItem).join(Sheet).where(Sheet.barcode == barcode, LoanItem.returned_on.is_(None))
    )
    if item is None:
        return jsonify(ok=False, beep=3, text=f"{barcode}: not out on loan"), HTTPStatus.NOT_FOUND
    item.returned_on = date.today()
    left = sum(other.returned_on is None for other in item.loan.items)
    if left == 0:
        item.loan.returned_on = date.today()
    session.commit()
    return jsonify(ok=True, beep=1 if left else 2, text=f"loan {item.loan_id}: {left} to go")
