"""cave: reduce compass-and-tape surveys from the command line."""
import math
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np


@dataclass(frozen=True)
class Shot:
    a: str
    b: str
    tape: float
    compass: float
    clino: float
    where: str = ""

    @property
    def vector(self):
        h = self.tape * math.cos(math.radians(self.clino))
        return np.array([
            h * math.sin(math.radians(self.compass)),
            h * math.cos(math.radians(self.compass)),
            self.tape * math.sin(math.radians(self.clino)),
        ])

    @property
    def variance(self):
        # 2 cm on the tape and one degree on either instrument
        return 0.02**2 + (self.tape * math.radians(1.0)) ** 2


class SurveyFile(click.ParamType):
    """Lines of  FROM TO TAPE COMPASS CLINO, with directives for prefix and declination."""

    name = "survey file"

    def convert(self, value, param, ctx):
        path = Path(value)
        shots, prefix, declination = [], "", 0.0
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as e:
            self.fail(f"{path}: {e.strerror}", param, ctx)
        for n, line in enumerate(lines, 1):
            words = line.split(";")[0].split()
            try:
                match words:
                    case []:
                        pass
                    case ["*prefix", p]:
                        prefix = p + "."
                    case ["*declination", d]:
                        declination = float(d)
                    case [a, b, tape, compass, clino]:
                        up = {"up": 90.0, "down": -90.0, "level": 0.0}
                        angle = up[clino] if clino in up else float(clino)
                        bearing = 0.0 if compass == "-" else float(compass) + declination
                        if compass == "-" and abs(angle) != 90:
                            raise ValueError("bearing may be left out on plumbed shots only")
                        shots.append(Shot(prefix + a, prefix + b, float(tape), bearing, angle, f"{path.name}:{n}"))
                    case _:
                        raise ValueError(f"cannot make sense of {line!r}")
            except ValueError as e:
                self.fail(f"{path}:{n}: {e}", param, ctx)
        return shots


def components(shots):
    neighbours = defaultdict(set)
    for s in shots:
        neighbours[s.a].add(s.b)
        neighbours[s.b].add(s.a)
    left = set(neighbours)
    while left:
        seed = min(left)
        seen, todo = {seed}, deque([seed])
        while todo:
            for n in neighbours[todo.popleft()] - seen:
                seen.add(n)
                todo.append(n)
        left -= seen
        yield seen


def adjust(shots, origin):
    """Least squares over all loops at once. Returns positions and residuals in standard deviations."""
    names = sorted({n for s in shots for n in (s.a, s.b)} - {origin})
    index = {n: i for i, n in enumerate(names)}
    M = np.zeros((len(shots), len(names)))
    y = np.zeros((len(shots), 3))
    for r, s in enumerate(shots):
        w = 1.0 / math.sqrt(s.variance)
        if s.b in index:
            M[r, index[s.b]] = w
        if s.a in index:
            M[r, index[s.a]] = -w
        y[r] = s.vector * w
    xyz, *_ = np.linalg.lstsq(M, y, rcond=None)
    positions = {origin: np.zeros(3), **{n: xyz[i] for n, i in index.items()}}
    return positions, np.linalg.norm(M @ xyz - y, axis=1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option("0.9.2")
def cli():
    """Reduce cave surveys: lengths, depths, loop closures, plots."""


@cli.command()
@click.argument("files", nargs=-1, required=True, type=SurveyFile())
@click.option("--origin", help="Station at 0,0,0. Default: the first one in the first file.")
def summary(files, origin):
    """Length and depth."""
    shots = [s for f in files for s in f]
    parts = list(components(shots))
    if len(parts) > 1:
        loose = min(parts, key=len)
        raise click.ClickException(f"{len(parts)} pieces are not connected; the smallest holds {min(loose)}")
    positions, _ = adjust(shots, origin or shots[0].a)
    z = [p[2] for p in positions.values()]
    click.echo(f"{len(shots)} shots, {sum(s.tape for s in shots):.1f} m surveyed, {max(z) - min(z):.1f} m deep")


@cli.command()
@click.argument("files", nargs=-1, required=True, type=SurveyFile())
@click.option("--sigma", default=3.0, show_default=True, help="Report shots worse than this.")
@click.option("--try-blunders/--no-try-blunders", default=True)
def blunders(files, sigma, try_blunders):
    """Shots that do not fit into their loops, and what might have gone wrong.

    Typical mistakes are tried one by one: bearing read from the wrong end, clino
    with the wrong sign, ten metres lost on the tape.
    """
    shots = [s for f in files for s in f]
    origin = shots[0].a
    _, residuals = adjust(shots, origin)
    before = float(np.sum(residuals**2))
    suspects = [i for i in np.argsort(residuals)[::-1] if residuals[i] > sigma]
    if not suspects:
        click.secho("nothing stands out", fg="green")
        return
    fixes = {
        "bearing reversed": lambda s: replace(s, compass=(s.compass + 180) % 360),
        "clino sign": lambda s: replace(s, clino=-s.clino),
        "tape short by 10 m": lambda s: replace(s, tape=s.tape + 10),
        "tape long by 10 m": lambda s: replace(s, tape=s.tape - 10),
    }
    for i in suspects:
        s = shots[i]
        click.echo(f"{s.where}  {s.a} - {s.b}  {residuals[i]:.1f} sigma")
        if not try_blunders:
            continue
        for label, fix in fixes.items():
            changed = shots[:i] + [fix(s)] + shots[i + 1:]
            after = float(np.sum(adjust(changed, origin)[1] ** 2))
            if after < 0.2 * before:
                click.secho(f"    {label}? misfit {before:.0f} -> {after:.0f}", fg="yellow")


if __name__ == "__main__":
    cli()
