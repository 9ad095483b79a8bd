"""The report as a browser shows it: the page counts its broken images and says that its script has run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from rlmm.report import write_report
from tests.synthetic_run import build_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_run(tmp_path_factory.mktemp("runs") / "quickstart"))


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Opens a page headless with a profile of its own; the page may use ten seconds of virtual time."""
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking"
    quiet += " disable-component-update disable-sync"
    command = [str(BROWSER), "--headless", "--no-sandbox", *(f"--{name}" for name in quiet.split())]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--enable-logging=stderr"]
    return subprocess.run(
        [*command, *options, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


def seen(page: Path, profile: Path, *options: str) -> dict[str, str]:
    """The data attributes that the page's script left on <html>."""
    dom = browse(page, profile, "--dump-dom", *options).stdout
    opening = re.search(r"<html[^>]*>", dom)
    assert opening is not None, f"the browser gave no document: {dom[:200]!r}"
    return dict(re.findall(r'data-([a-z-]+)="([^"]*)"', opening.group()))


def test_browser_shows_every_image_and_runs_the_script(report: Path, tmp_path: Path) -> None:
    n_images = report.read_text().count("<img ")
    expected = {"ready": "true", "broken-images": "0", "images": str(n_images), "overflow": "0"}
    assert seen(report, tmp_path) == expected
    assert n_images > 100


def test_a_missing_image_is_noticed(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text(report.read_text().replace("data:image/png;base64,iVBOR", "data:image/png;base64,xxxxx", 1))
    assert seen(page, tmp_path / "profile")["broken-images"] == "1"


def test_a_changed_script_does_not_run(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "changed.html"
    page.write_text(report.read_text().replace('"use strict";', '"use strict" ;', 1))
    assert "ready" not in seen(page, tmp_path / "profile")


def test_browser_complains_about_nothing(report: Path, tmp_path: Path) -> None:
    said = browse(report, tmp_path, "--dump-dom").stderr
    assert not [line for line in said.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_of_the_page(report: Path, tmp_path: Path, width: int) -> None:
    assert seen(report, tmp_path, f"--window-size={width},1600")["overflow"] == "0"


@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_drawn_at_phone_and_desk_width(report: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "shot.png"
    browse(report, tmp_path / "profile", f"--screenshot={shot}", f"--window-size={width},1600")
    with Image.open(shot) as image:
        assert image.size[1] == 1600
        colours = image.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colours is not None and len(colours) > 200
