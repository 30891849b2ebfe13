#!/usr/bin/env python
"""Figure 4 of the dune report: how the foredune at Kesterby moved between 1996 and 2024.

    python dune_profile_plots.py profiles/ --transect 12 --out fig4.pdf

Left: cross-shore profiles of all surveys, coloured by year. Right: position of the dune foot (3 m above datum) and the
volume above it. Storms are marked; the nourishment of 2011 is the jump nobody believes.
"""
import argparse
from pathlib import Path

import matplotlib as mpl
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.ticker import FuncFormatter, MultipleLocator

STORMS = {"1999-12-03": "Anatol", "2013-12-05": "Xaver", "2017-10-29": "Herwart", "2022-02-19": ""}
FOOT = 3.0

mpl.rcParams.update({
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,           # the publisher's checker rejects type 3 fonts
})


def read_profile(path):
    """Distance from the reference pole (m) and height above datum (m). Before 2003 the rod readings are in decimetres."""
    d, z = np.loadtxt(path, unpack=True, comments=("#", "%"), delimiter=None)
    if path.stem < "2003":
        z = z / 10
    order = np.argsort(d)
    return d[order], z[order]


def foot_position(d, z, level=FOOT):
    """Seawardmost crossing of the level, by linear interpolation; nan if the beach never gets that high."""
    above = z >= level
    i = np.flatnonzero(above[:-1] & ~above[1:])
    if i.size == 0:
        return np.nan
    i = i[-1]
    return d[i] + (level - z[i]) * (d[i + 1] - d[i]) / (z[i + 1] - z[i])


def volume(d, z, landward, level=FOOT):
    foot = foot_position(d, z, level)
    if np.isnan(foot):
        return np.nan
    grid = np.linspace(landward, foot, 400)
    return np.trapezoid(np.clip(np.interp(grid, d, z) - level, 0, None), grid)


def coloured_lines(ax, profiles, years, cmap="cividis"):
    norm = mpl.colors.Normalize(years.min(), years.max())
    lines = LineCollection([np.column_stack(p) for p in profiles], cmap=cmap, norm=norm, linewidths=0.6, alpha=0.8)
    lines.set_array(years)
    ax.add_collection(lines)
    # the first and the last survey once more, thick and on top, with their years written at the crest
    for k, va in ((0, "bottom"), (-1, "top")):
        d, z = profiles[k]
        ax.plot(d, z, color=lines.cmap(norm(years[k])), lw=1.8)
        crest = np.argmax(z)
        ax.annotate(f"{years[k]:.0f}", (d[crest], z[crest]), xytext=(-4, 4 if va == "bottom" else -4), textcoords="offset points",
                    ha="right", va=va, fontweight="bold")
    ax.autoscale_view()
    return lines


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--transect", type=int, default=12)
    p.add_argument("--out", type=Path)
    args = p.parse_args()

    paths = sorted(args.folder.glob(f"*_t{args.transect:02d}.xyz"))
    if len(paths) < 3:
        p.error(f"only {len(paths)} surveys of transect {args.transect}")
    when = np.array([np.datetime64(f"{s[:4]}-{s[4:6]}-{s[6:8]}") for s in (q.stem for q in paths)])
    profiles = [read_profile(q) for q in paths]
    years = 1970 + when.astype("datetime64[D]").astype(int) / 365.2425
    landward = max(d[0] for d, _ in profiles)

    fig = plt.figure(figsize=(7.1, 3.0))
    left, right = fig.subfigures(1, 2, width_ratios=[3, 2])

    ax = left.subplots()
    lines = coloured_lines(ax, profiles, years)
    ax.axhline(FOOT, color="0.6", lw=0.5, ls=(0, (6, 3)))
    ax.set(xlabel="distance from pole (m)", ylabel="height above datum (m)")
    ax.xaxis.set_minor_locator(MultipleLocator(10))
    ax.text(0.98, 0.95, "vertical exaggeration 8×", transform=ax.transAxes, ha="right", va="top", style="italic")
    ax.set_aspect(8)
    left.colorbar(lines, ax=ax, orientation="horizontal", shrink=0.6, pad=0.02, format=FuncFormatter(lambda v, _: f"{v:.0f}"))

    top, bottom = right.subplots(2, 1, sharex=True)
    feet = np.array([foot_position(*q) for q in profiles])
    top.plot(when, feet, "o-", ms=2.5, lw=0.8, color="#8a5a00")
    top.invert_yaxis()
    top.set_ylabel("dune foot (m)")
    bottom.fill_between(when, [volume(*q, landward) for q in profiles], step="mid", alpha=0.35, color="#8a5a00", lw=0)
    bottom.set_ylabel("volume (m³/m)")
    bottom.set_ylim(bottom=0)
    for a in (top, bottom):
        for day, name in STORMS.items():
            a.axvline(np.datetime64(day), color="tab:blue", lw=0.7, zorder=0)
            if a is top and name:
                a.annotate(name, (np.datetime64(day), 1), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top", fontsize=6)
    bottom.xaxis.set_major_formatter(mdates.ConciseDateFormatter(bottom.xaxis.get_major_locator()))
    right.align_ylabels()

    if args.out:
        fig.savefig(args.out, metadata={"CreationDate": None})
    else:
        plt.show()


if __name__ == "__main__":
    main()
