"""HTTP interface of a privately owned toll bridge: passes, crossings, and the height bar that closes in a gale."""
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated
from uuid import UUID, uuid4

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, HTTPException, Query, status
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import ForeignKey, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

engine = create_async_engine("sqlite+aiosqlite:///bridge.db")
new_session = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class VehicleClass(StrEnum):
    bicycle = "bicycle"
    car = "car"
    trailer = "trailer"
    lorry = "lorry"
    livestock = "livestock"      # per head, and the drover walks free: clause 9 of the act of 1831


TOLLS = {
    VehicleClass.bicycle: Decimal("0.20"),
    VehicleClass.car: Decimal("1.00"),
    VehicleClass.trailer: Decimal("1.60"),
    VehicleClass.lorry: Decimal("3.40"),
    VehicleClass.livestock: Decimal("0.05"),
}


class Pass(Base):
    __tablename__ = "pass"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    plate: Mapped[str] = mapped_column(unique=True)
    balance: Mapped[Decimal] = mapped_column(default=Decimal(0))
    crossings: Mapped[list["Crossing"]] = relationship(back_populates="holder", order_by="Crossing.at")


class Crossing(Base):
    __tablename__ = "crossing"
    id: Mapped[int] = mapped_column(primary_key=True)
    pass_id: Mapped[UUID] = mapped_column(ForeignKey("pass.id"), index=True)
    at: Mapped[datetime]
    kind: Mapped[VehicleClass]
    toll: Mapped[Decimal]
    holder: Mapped[Pass] = relationship(back_populates="crossings")


class PassIn(BaseModel):
    plate: Annotated[str, Field(min_length=2, max_length=10, examples=["KT 481 B"])]
    top_up: Annotated[Decimal, Field(ge=5, le=200, decimal_places=2)]

    @field_validator("plate")
    @classmethod
    def squeeze(cls, v: str) -> str:
        plate = "".join(v.upper().split())
        if not plate.isalnum():
            raise ValueError("letters and digits only")
        return plate


class PassOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: UUID
    plate: str
    balance: Decimal


class CrossingIn(BaseModel):
    plate: str
    kind: VehicleClass
    heads: Annotated[int, Field(ge=1, le=400)] = 1


async def session() -> AsyncIterator[AsyncSession]:
    async with new_session() as s, s.begin():
        yield s


def booth(x_booth_key: Annotated[str | None, Header()] = None) -> str:
    booths = {"north-7fa1": "north", "south-c220": "south"}
    if x_booth_key not in booths:
        raise HTTPException(status.HTTP_401_UNAUTHORIZED, "unknown booth")
    return booths[x_booth_key]


Session = Annotated[AsyncSession, Depends(session)]
Booth = Annotated[str, Depends(booth)]
router = APIRouter(prefix="/v1")


@router.post("/passes", status_code=201, response_model=PassOut)
async def open_pass(body: PassIn, db: Session) -> Pass:
    p = Pass(plate=body.plate, balance=body.top_up)
    db.add(p)
    try:
        await db.flush()
    except IntegrityError:
        raise HTTPException(409, f"{body.plate} already has a pass") from None
    return p


@router.post("/crossings", status_code=201)
async def cross(body: CrossingIn, db: Session, where: Booth, later: BackgroundTasks) -> dict[str, str]:
    plate = "".join(body.plate.upper().split())
    holder = await db.scalar(select(Pass).where(Pass.plate == plate).with_for_update())
    if holder is None:
        raise HTTPException(402, "no pass, pay in coins")
    now = datetime.now(UTC)
    # There and back on one day costs one toll.
    paid_today = await db.scalar(
        select(func.count()).select_from(Crossing)
        .where(Crossing.pass_id == holder.id, Crossing.at >= now - timedelta(hours=16), Crossing.toll > 0))
    toll = Decimal(0) if paid_today and body.kind is VehicleClass.car else TOLLS[body.kind] * body.heads
    if holder.balance < toll:
        raise HTTPException(402, f"balance {holder.balance}, toll {toll}")
    holder.balance -= toll
    db.add(Crossing(pass_id=holder.id, at=now, kind=body.kind, toll=toll))
    if holder.balance < 5:
        later.add_task(print, f"letter to the keeper of {plate}: {holder.balance} left")
    return {"gate": where, "toll": str(toll), "balance": str(holder.balance)}


@router.get("/passes/{pass_id}/crossings")
async def history(pass_id: UUID, db: Session, limit: Annotated[int, Query(le=500)] = 50) -> list[dict]:
    rows = await db.scalars(
        select(Crossing).where(Crossing.pass_id == pass_id).order_by(Crossing.at.desc()).limit(limit))
    return [{"at": c.at.isoformat(), "kind": c.kind, "toll": str(c.toll)} for c in rows]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as conn:
        await conn.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(title="Whitstone Bridge", lifespan=lifespan)
app.include_router(router)
