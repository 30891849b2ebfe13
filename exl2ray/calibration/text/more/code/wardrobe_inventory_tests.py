"""SQLAlchemy against a costume store's lending rules, with a real SQLite file in memory and a frozen day."""
import datetime as dt
from decimal import Decimal

import pytest
from sqlalchemy import CheckConstraint, ForeignKey, String, create_engine, event, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload, validates


class Base(DeclarativeBase):
    pass


class Garment(Base):
    __tablename__ = "garment"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "garment"}

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(12))
    label: Mapped[str] = mapped_column(unique=True)
    era: Mapped[int | None]
    worth: Mapped[Decimal] = mapped_column(default=Decimal("40"))
    loans: Mapped[list["Loan"]] = relationship(back_populates="garment", order_by="Loan.out", cascade="all, delete-orphan")

    @hybrid_property
    def is_out(self) -> bool:
        return any(loan.back is None for loan in self.loans)

    @is_out.inplace.expression
    @classmethod
    def _is_out_expression(cls):
        return select(Loan.id).where(Loan.garment_id == cls.id, Loan.back.is_(None)).exists()

    @validates("era")
    def not_tomorrow(self, _key, year):
        if year is not None and year > dt.date.today().year:
            raise ValueError(f"a costume from {year}?")
        return year


class Shoe(Garment):
    __mapper_args__ = {"polymorphic_identity": "shoe"}
    size: Mapped[int | None]
    left_foot_only: Mapped[bool | None]


class Loan(Base):
    __tablename__ = "loan"
    __table_args__ = (CheckConstraint("back IS NULL OR back >= out", name="back_after_out"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    garment_id: Mapped[int] = mapped_column(ForeignKey("garment.id"))
    company: Mapped[str]
    out: Mapped[dt.date]
    back: Mapped[dt.date | None]
    garment: Mapped[Garment] = relationship(back_populates="loans")


@pytest.fixture
def db():
    engine = create_engine("sqlite://")

    @event.listens_for(engine, "connect")
    def foreign_keys(connection, _record):
        connection.execute("PRAGMA foreign_keys = ON")

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([
            Garment(label="C-0110", era=1890, loans=[Loan(company="Parish players", out=dt.date(2024, 2, 1), back=dt.date(2024, 3, 9))]),
            Garment(label="C-0111", era=1925, worth=Decimal("310.50"), loans=[Loan(company="Opera studio", out=dt.date(2024, 5, 2))]),
            Shoe(label="S-0007", era=1780, size=38, left_foot_only=True),
        ])
        session.commit()
        yield session
    engine.dispose()


def test_out_means_the_same_in_python_and_in_sql(db):
    by_sql = set(db.scalars(select(Garment.label).where(Garment.is_out)))
    by_python = {g.label for g in db.scalars(select(Garment)) if g.is_out}
    assert by_sql == by_python == {"C-0111"}


def test_back_before_out_is_refused_by_the_database(db):
    garment = db.scalars(select(Garment).filter_by(label="C-0110")).one()
    garment.loans.append(Loan(company="School", out=dt.date(2024, 6, 3), back=dt.date(2024, 6, 1)))
    with pytest.raises(IntegrityError, match="back_after_out"):
        db.flush()


def test_throwing_a_garment_away_takes_its_loans_along(db):
    db.delete(db.scalars(select(Garment).filter_by(label="C-0111")).one())
    db.flush()
    assert db.scalar(select(func.count()).select_from(Loan)) == 1


def test_shoes_come_back_as_shoes(db):
    shoe = db.scalars(select(Garment).where(Garment.label.startswith("S-"))).one()
    assert type(shoe) is Shoe and shoe.left_foot_only


def test_list_of_the_store_needs_two_queries_not_one_per_garment(db):
    statements = []
    event.listen(db.get_bind(), "before_cursor_execute", lambda *a: statements.append(a[2]))
    db.expire_all()
    for g in db.scalars(select(Garment).options(selectinload(Garment.loans))):
        _ = len(g.loans)
    assert len(statements) == 2, statements


@pytest.mark.parametrize("year, ok", [(1700, True), (None, True), (3001, False)])
def test_era(year, ok):
    if ok:
        assert Garment(label="x", era=year).era == year
    else:
        with pytest.raises(ValueError, match="3001"):
            Garment(label="x", era=year)


def test_worth_of_all_that_is_out(db):
    worth = db.scalar(select(func.sum(Garment.worth)).where(Garment.is_out))
    assert worth == Decimal("310.50")
