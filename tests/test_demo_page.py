"""The demo's page in a browser: it fits its window, wide or narrow, all media play, and the console stays silent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from films import noise

from walt.demo.curves import write_curves
from walt.demo.report import Report, command, paragraph, picture, table
from walt.errors import WaltError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
addEventListener("load", () => setInterval(() => {
  const videos = [...document.querySelectorAll("video")];
  document.body.dataset.probe = JSON.stringify({
    width: document.documentElement.scrollWidth, window: innerWidth,
    playing: videos.map(v => v.error === null && v.videoWidth > 0 && !v.paused && v.readyState >= 3),
    pictures: [...document.images].map(i => i.complete && i.naturalWidth > 0),
    broad: [...videos, ...document.images].map(e => e.getBoundingClientRect().right <= innerWidth),
  });
}, 200));
</script>"""


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """A page with a section of each kind, for which the videos are as the demo's."""
    pytest.importorskip("av", reason="PyAV is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report = Report(tmp_path, "A <demo>", "What it is.", ["Videos", "Curves", "Broken", "Waiting"])
    with report.section("Videos"):
        clips = np.stack([noise(9, seed, 64, 64) for seed in range(8)])
        report.show("Videos", report.video("eight", clips, 4, 17.5, "clips"), report.video("one", clips[:1], 1, 8, "x"))
    with report.section("Curves"):
        rows = [{"step": step, "loss": 1 / step, "psnr": 20.0 + step} for step in range(1, 30)]
        write_curves(report.media("curves.svg"), rows, rows)
        wide = ["causal_conv3d", "cpu", "onednn: mostly slower than cpu on a processor without AMX" * 4]
        blocks = (
            table(["op", "ran on", "and not on"], [wide]),
            command("walt sample --class basic --out basic.mp4 " * 4),
        )
        report.show("Curves", picture(report.media("curves.svg"), "curves"), *blocks)
    with report.section("Broken"):
        report.show("Broken", paragraph("half of it"))
        raise WaltError("no such <thing>")
    return report


def test_a_section_that_fails_says_why_and_the_others_stay(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    text = (report.out / "report.html").read_text()
    assert "half of it" in text
    assert "This failed: no such &lt;thing&gt;" in text
    assert "<h1>A &lt;demo&gt;</h1>" in text
    assert report.failed() == ["Broken: no such <thing>"]
    assert text.count("Waits for the sections before it.") == 1
    assert text.count("<video") == 2


def test_it_refreshes_itself_until_it_is_finished(report: Report) -> None:
    assert '<meta http-equiv="refresh"' in (report.out / "report.html").read_text()
    report.finish()
    assert "http-equiv" not in (report.out / "report.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [500, 1280])  # the least that a headless window can have, and a desk's
def test_in_a_browser(report: Report, width: int) -> None:
    report.finish()
    page = report.out / "probed.html"
    page.write_text((report.out / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    picture = report.out / f"{width}.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--enable-logging=stderr"]
    options += ["--autoplay-policy=no-user-gesture-required", f"--user-data-dir={report.out / 'profile'}"]

    def browse(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(CHROMIUM), *options, *more, page.as_uri()], capture_output=True, text=True, timeout=100
        )

    for budget in (20_000, 100_000, 500_000):  # the browser's clock runs ahead while a busy machine decodes videos
        done = browse(f"--virtual-time-budget={budget}", "--dump-dom")
        assert not re.findall(r".*CONSOLE.*", done.stderr)
        probe = json.loads(re.findall(r'data-probe="([^"]*)"', done.stdout)[0].replace("&quot;", '"'))
        if all(probe["playing"]):
            break
    assert probe["playing"] == [True, True]
    assert probe["pictures"] == [True]
    assert probe["broad"] == [True] * 3
    assert probe["width"] <= probe["window"]
    browse(f"--screenshot={picture}")
    assert picture.stat().st_size > 10_000
