"""Pages as a browser shows them: where things are, and in which colours."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
DARK = "--blink-settings=preferredColorScheme=0"
# Prints where things are, as soon as the page is laid out. It is put into a copy of the page alone.
_MEASURE = """<pre id="measured"></pre><script>
const box = element => {const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]};
const boxes = selector => [...document.querySelectorAll(selector)].map(box);
const all = [...document.body.querySelectorAll('*:not(script)')].filter(e => e.id != 'measured');
const wide = document.documentElement.clientWidth;
const leaves = ([left, top, right, bottom]) => right > wide + 0.5 || left < -0.5;
const scrolls = e => e.parentElement.closest('.box') !== null;
document.getElementById('measured').textContent = JSON.stringify({
  width: wide, page: document.documentElement.scrollWidth,
  outside: all.filter(e => !scrolls(e) && leaves(box(e))).map(e => e.outerHTML.slice(0, 80)),
  title: box(document.querySelector('h1')), MORE
})</script></body>"""


def browser(*names: str) -> str:
    """The first of the browsers that there is, and that starts; skips the test where there is none."""
    for name in names:
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0:
            return path
    return pytest.skip(
        f"no browser to look at the page with: install Debian's {names[0]}; looked for {', '.join(names)}"
    )


def chromium(page: Path, width: int, *arguments: str) -> str:
    command = [browser(*CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},1600", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(page: Path, width: int, more: str = "") -> dict:
    """Where things are in a window of a width, in pixels, and what `more` has, as entries of a JavaScript object."""
    copy = page.with_name("measured.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy.write_text(text.replace("</body>", _MEASURE.replace("MORE", more)), encoding="utf-8")
    told = re.search(r'<pre id="measured">(.*?)</pre>', chromium(copy, width, "--dump-dom"), re.S)
    return json.loads(unescape(told[1]))


def picture(page: Path, width: int, *arguments: str) -> np.ndarray:
    """What the window shows, (height, width, 3) from 0 to 255."""
    target = page.with_suffix(".png")
    chromium(page, width, f"--screenshot={target}", *arguments)
    return pixels_of(target)


def pixels_of(path: Path) -> np.ndarray:
    """A picture, (height, width, 3) from 0 to 255."""
    return np.round(255 * matplotlib.image.imread(path)[..., :3]).astype(int)


def near(pixels: np.ndarray, colour: str, distance: int = 40) -> np.ndarray:
    """Which pixels have about a colour, (height, width) bool."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return np.abs(pixels - parts).max(axis=-1) <= distance


def inside(values: np.ndarray, box: list[float], room: int = 2) -> np.ndarray:
    left, top, right, bottom = (round(edge) for edge in box)
    return values[max(0, top - room) : bottom + room, max(0, left - room) : right + room]
