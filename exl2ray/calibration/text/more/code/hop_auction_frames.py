"""Weekly report of the hop exchange: lots, alpha acids, and who is behind with deliveries."""
import sys
from pathlib import Path

import pandas as pd

GRADES = pd.CategoricalDtype(["reject", "III", "II", "I", "prima"], ordered=True)


def load(folder: Path) -> pd.DataFrame:
    parts = []
    for path in sorted(folder.glob("lots_*.csv")):
        part = pd.read_csv(
            path, sep=";", decimal=",", thousands=".", encoding="cp1252",
            dtype={"lot": "string", "grower": "string", "variety": "category", "grade": GRADES},
            parse_dates=["weighed"], date_format="%d.%m.%Y", na_values=["-", "n.b."],
        )
        parts.append(part.assign(source=path.stem))
    lots = pd.concat(parts, ignore_index=True)
    # concat turns categories that differ between files back into plain objects
    lots["variety"] = lots["variety"].astype("category")
    twice = lots.duplicated("lot", keep="last")
    if twice.any():
        print(f"{twice.sum()} lots were weighed again; the later weight counts", file=sys.stderr)
    return lots[~twice].set_index("lot", verify_integrity=True)


def dry_weight(lots: pd.DataFrame, standard: float = 10.0) -> pd.Series:
    """Kilograms at the standard moisture of ten per cent."""
    return lots["kg"] * (100 - lots["moisture"]) / (100 - standard)


def price_table(lots: pd.DataFrame) -> pd.DataFrame:
    lots = lots.assign(dry=dry_weight(lots), alpha_kg=lambda d: d["dry"] * d["alpha"] / 100)
    table = (
        lots[lots["grade"] > "reject"]
        .assign(value=lambda d: d["dry"] * d["eur_per_kg"])
        .pivot_table(index="variety", columns="grade", values=["value", "dry"], aggfunc="sum", observed=True)
    )
    # Mean weighted by mass: the mean of the lots' prices would let a 40 kg lot count like one of four tonnes.
    price = (table["value"] / table["dry"]).round(2)
    price["alpha %"] = (lots.groupby("variety", observed=True)["alpha_kg"].sum()
                        / lots.groupby("variety", observed=True)["dry"].sum() * 100).round(1)
    return price


def arrears(lots: pd.DataFrame, contracts: pd.DataFrame, today: pd.Timestamp) -> pd.DataFrame:
    """Contracts of which less has been delivered than the schedule says."""
    delivered = (
        lots.assign(dry=dry_weight(lots))
        .groupby(["grower", "variety"], observed=True)["dry"].sum()
        .rename("delivered").reset_index()
    )
    delivered["variety"] = delivered["variety"].astype("string")
    both = contracts.merge(delivered, on=["grower", "variety"], how="outer", indicator=True, validate="one_to_one")
    both["delivered"] = both["delivered"].fillna(0)
    span = (both["until"] - both["from"]).dt.days
    both["due"] = both["kg"] * ((today - both["from"]).dt.days / span).clip(0, 1)
    both["behind"] = (both["due"] - both["delivered"]).round()
    both.loc[both["_merge"] == "right_only", "note"] = "no contract for this variety"
    late = both[(both["behind"] > 0.1 * both["kg"]) | both["note"].notna()]
    return late.sort_values("behind", ascending=False)[["grower", "variety", "kg", "delivered", "behind", "note"]]


def drying_speed(kiln: pd.DataFrame) -> pd.Series:
    """Hours from 70 to 12 per cent moisture, for each kiln load. `kiln`: load, time, moisture every few minutes."""
    def one(load: pd.DataFrame) -> float:
        s = load.set_index("time")["moisture"].sort_index().resample("5min").mean().interpolate("time", limit=6)
        start, end = s[s <= 70].first_valid_index(), s[s <= 12].first_valid_index()
        if start is None or end is None:
            return float("nan")
        return (end - start).total_seconds() / 3600

    return kiln.groupby("load").apply(one, include_groups=False).rename("hours")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    lots = load(folder)
    contracts = pd.read_excel(folder / "contracts.xlsx", dtype={"grower": "string", "variety": "string"})
    contracts["note"] = pd.Series(pd.NA, index=contracts.index, dtype="string")
    with pd.option_context("display.max_rows", None, "display.width", 120):
        print(price_table(lots).to_string(na_rep="."), end="\n\n")
        print(arrears(lots, contracts, pd.Timestamp.now().normalize()).to_string(index=False, na_rep=""))
