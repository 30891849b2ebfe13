"""Find man-made shapes in side-scan sonar waterfalls.

Wrecks, anchors and lost containers throw acoustic shadows with straight edges;
sand ripples and rocks rarely do.  The pipeline is deliberately old-fashioned:
correct the geometry, even out the gain, pair highlights with shadows, score.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator, Protocol

import numpy as np
from scipy import ndimage as ndi

RECORD = struct.Struct("<4sIddffHH")   # magic, ping, lat, lon, heading, altitude, samples, flags
MAGIC = b"SSS1"


class BadFile(Exception):
    """The file breaks off or is not a sonar file at all."""


@dataclass(frozen=True)
class Ping:
    number: int
    lat: float
    lon: float
    heading: float
    altitude: float            # of the towfish above the seabed, metres
    port: np.ndarray
    starboard: np.ndarray


def read_pings(stream: BinaryIO) -> Iterator[Ping]:
    while head := stream.read(RECORD.size):
        if len(head) < RECORD.size:
            raise BadFile(f"{len(head)} bytes left over at the end")
        magic, number, lat, lon, heading, altitude, samples, flags = RECORD.unpack(head)
        if magic != MAGIC:
            raise BadFile(f"expected {MAGIC!r} and found {magic!r} before ping {number}")
        body = stream.read(4 * samples)
        if len(body) != 4 * samples:
            raise BadFile(f"ping {number} is cut short")
        both = np.frombuffer(body, "<u2").reshape(2, samples).astype(np.float32)
        if flags & 1:           # towfish was turning, the picture is smeared
            continue
        yield Ping(number, lat, lon, heading, altitude, both[0], both[1])


def slant_to_ground(row: np.ndarray, altitude: float, spacing: float, out_len: int) -> np.ndarray:
    """Resample one side from slant range to distance along the seabed.

    The first echo comes from straight below, at a slant range equal to the
    altitude; everything before it is water.
    """
    ground = (np.arange(out_len) + 0.5) * spacing
    slant = np.hypot(ground, altitude) / spacing
    return np.interp(slant, np.arange(row.size), row, right=np.nan)


class Gain(Protocol):
    def __call__(self, image: np.ndarray) -> np.ndarray: ...


def column_median_gain(image: np.ndarray, span: int = 301) -> np.ndarray:
    """Divide by what is usual at this range, in a window of pings."""
    usual = ndi.median_filter(np.nan_to_num(image), size=(min(span, image.shape[0]) | 1, 1), mode="nearest")
    usual = ndi.gaussian_filter1d(usual, 5, axis=1)
    return image / np.maximum(usual, 1.0)


@dataclass
class Contact:
    row: int
    col: int
    length: float
    height: float
    straightness: float

    @property
    def score(self) -> float:
        return self.straightness * np.log1p(self.length) * min(self.height, 3.0)


def shadow_height(altitude: float, near: float, far: float) -> float:
    """Height of an object from where its shadow begins and ends (similar triangles)."""
    return altitude * (far - near) / far if far > 0 else 0.0


def contacts(image: np.ndarray, altitude: np.ndarray, spacing: float, along: float) -> list[Contact]:
    bright = ndi.binary_opening(image > 2.5, iterations=1)
    dark = ndi.binary_opening(image < 0.35, iterations=2)
    # a shadow must lie just beyond a highlight: push the highlights outwards and intersect
    reach = np.zeros((1, 9), bool)
    reach[0, :5] = True
    touched = ndi.binary_dilation(bright, structure=reach[:, ::-1])
    labels, n = ndi.label(dark)
    found = []
    for k, window in enumerate(ndi.find_objects(labels), start=1):
        mask = labels[window] == k
        if not (mask & touched[window]).any():
            continue
        rows, cols = np.nonzero(mask)
        if np.ptp(rows) * along < 1.0:
            continue
        first = np.array([cols[rows == r].min() for r in np.unique(rows)])
        last = np.array([cols[rows == r].max() for r in np.unique(rows)])
        t = np.arange(first.size)
        if t.size < 4:
            continue
        rough = np.std(first - np.polyval(np.polyfit(t, first, 1), t))
        r0, c0 = window[0].start, window[1].start
        near = (c0 + np.median(first)) * spacing
        far = (c0 + np.median(last) + 1) * spacing
        found.append(Contact(
            row=r0 + int(rows.mean()),
            col=c0 + int(cols.mean()),
            length=float(np.ptp(rows) + 1) * along,
            height=shadow_height(float(altitude[r0:r0 + mask.shape[0]].mean()), near, far),
            straightness=float(1.0 / (1.0 + rough)),
        ))
    return sorted(found, key=lambda c: c.score, reverse=True)


def process(path: Path, spacing: float = 0.1, along: float = 0.25, gain: Gain = column_median_gain):
    with path.open("rb") as stream:
        pings = list(read_pings(stream))
    if not pings:
        return []
    width = max(p.port.size for p in pings)
    altitude = ndi.median_filter(np.array([p.altitude for p in pings]), 11)
    result = []
    for side in ("port", "starboard"):
        rows = [slant_to_ground(getattr(p, side), a, spacing, width) for p, a in zip(pings, altitude)]
        for contact in contacts(gain(np.vstack(rows)), altitude, spacing, along):
            result.append((pings[contact.row], side, contact))
    return result
