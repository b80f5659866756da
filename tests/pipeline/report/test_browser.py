from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline.report.html import write_report
from pipeline.report.pages import class_colour
from pipeline.report.runs import load_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")

pytestmark = pytest.mark.slow


@pytest.fixture
def browse(make_run, dataset, tmp_path: Path):
    """Opens a report with the flags given and returns what the browser wrote to its standard output."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    runs = [load_run(make_run("alone", ap=0.5)), load_run(make_run("distilled", ap=0.55, teacher="big"))]
    out = write_report(runs, tmp_path / "report.html", dataset=dataset, graph=None, pages=1)

    def browse(*flags: str) -> str:
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, out.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return browse


def test_a_browser_reads_the_page_as_it_was_meant(browse):
    dom = browse("--dump-dom")
    assert dom.count("<table") == 3 and "AP: alone 50.0, distilled 55.0." in dom
    assert dom.count("<img") == 3


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_page_with_its_pictures(browse, tmp_path: Path, scheme: int, width: int):
    shot = tmp_path / "shot.png"
    browse(f"--window-size={width},6000", f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
    image = Image.open(shot).convert("RGB")
    assert image.width == width
    # Only the regions drawn on a page have the colour of the third class: the charts show two runs.
    distance = np.abs(np.asarray(image, dtype=int) - ImageColor.getrgb(class_colour(2))).sum(axis=-1)
    assert (distance < 12).sum() > 100
    assert (image.getpixel((2, 2))[0] < 60) == (scheme == 0)
