"""The page in a browser: headless Chromium draws it, and says what does not fit, overlaps, fails or goes out for more."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

# Appended to a copy of the page, whose policy is opened for it; the page itself runs no scripts.
EXAMINE = """
<script>
const failures = [];
addEventListener("error", e => failures.push("error: " + e.message));
addEventListener("securitypolicyviolation", e => failures.push("refused: " + e.blockedURI));
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const wide = [...document.querySelectorAll("html, main, section, figure, svg, .table, p, h1, h2, h3, code")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0).map(e => e.tagName + " " + e.className);
  const boxes = svg => [...svg.querySelectorAll("g")].filter(g => /-text_\\d+$/.test(g.id))
    .map(g => g.getBoundingClientRect()).filter(b => b.width > 0);
  const overlaps = [], outside = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const frame = svg.getBoundingClientRect(), all = boxes(svg), name = svg.closest("figure").ariaLabel;
    if (!all.length) outside.push(name + ": no text");
    all.forEach((a, i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        outside.push(name + " " + i);
      all.slice(i + 1).forEach((b, j) => {
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (x > 1 && y > 1) overlaps.push(name + " " + i + " " + (i + 1 + j));
      });
    });
  }
  const loaded = performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:"));
  const figures = document.querySelectorAll("figure svg").length;
  const size = Math.min(...[...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect().height));
  document.title = "RESULT" + JSON.stringify({failures, wide, overlaps, outside, loaded, figures, size});
});
</script>
"""


def chromium(page: Path, *flags: str) -> tuple[str, str]:
    """(standard output, what the page wrote to the console)"""
    command = [
        CHROMIUM or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--no-first-run", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri(),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium did not answer within a minute: this machine is too busy for it")
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def examined(text: str, folder: Path, width: int) -> dict[str, Any]:
    assert text.count("default-src 'none';") == 1
    copy = folder / "examined.html"
    opened = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    copy.write_text(opened.replace("<head>", "<head>" + EXAMINE, 1), encoding="utf-8")
    dom, console = chromium(copy, f"--window-size={width},900", "--dump-dom")
    assert console == ""
    found = re.search(r"<title>RESULT(.*?)</title>", dom, re.DOTALL)
    assert found is not None, dom[:2000]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.mark.parametrize(("page", "width", "figures"), [("deep_html", 1150, 7), ("moe_html", 600, 9)])
def test_everything_fits_and_nothing_is_fetched(
    request: pytest.FixtureRequest, tmp_path: Path, page: str, width: int, figures: int
) -> None:
    found = examined(request.getfixturevalue(page), tmp_path, width)
    assert found.pop("figures") == figures
    assert found.pop("size") > 60
    assert found == {"failures": [], "wide": [], "overlaps": [], "outside": [], "loaded": []}


@pytest.mark.parametrize(("scheme", "background"), [("1", (255, 255, 255)), ("0", (21, 24, 28))], ids=["light", "dark"])
def test_screenshot(small_html: str, tmp_path: Path, scheme: str, background: tuple[int, ...]) -> None:
    page, png = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(small_html, encoding="utf-8")
    flags = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1150,3200", f"--screenshot={png}")
    _, console = chromium(page, *flags)
    assert console == ""
    picture = (imread(png)[..., :3] * 255).round().astype(int)
    assert picture.shape == (3200, 1150, 3)
    assert tuple(picture[5, 5]) == background
    contrast = abs(picture - picture[5, 5]).max(axis=2)
    assert 0.15 < (contrast > 20).mean() < 0.6  # five figures, the rest text
    assert (contrast > 180).mean() > 0.005  # text and axes stand out
