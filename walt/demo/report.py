"""The demo's report: a page of sections, written anew when one of them changes, that refreshes itself until the end.

It needs no network and no server: videos and pictures lie beside it in `media`, as wide as the page.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from walt.atomic import atomic_write
from walt.data.video import tile, write_mp4
from walt.errors import one_line, say

REFRESH = 10  # seconds
SCALE = 3  # of small frames in a video, so that its halved colour resolution does not show
PLAYS = "autoplay loop muted playsinline controls"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 0 auto; padding: 1rem; color: #222; }
video, img { display: block; width: 100%; height: auto; image-rendering: pixelated; margin: .5rem 0; }
.table { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.note { color: #555; font-size: 14px; } .failed { color: #a00; }
"""


@dataclass
class Section:
    title: str
    body: str = ""  # HTML
    state: str = "waiting"  # "running", "done" or "failed"
    error: str = ""  # why it failed


class Report:
    """The page at `out`/report.html; `sections` are all titles in their order."""

    def __init__(self, out: Path, title: str, intro: str, sections: Sequence[str]) -> None:
        self.out, self.title, self.intro = out, title, intro
        self.sections = {name: Section(name) for name in sections}
        self.finished = False

    @contextlib.contextmanager
    def section(self, title: str) -> Iterator[None]:
        """Work on a section. One that fails says why on the page, and the work goes on behind it."""
        section = self.sections[title]
        section.state = "running"
        self.write()
        try:
            yield
            section.state = "done"
        except Exception as error:  # of whatever kind
            section.state, section.error = "failed", one_line(error) or type(error).__name__
            say(f"{title}: {section.error}")
        self.write()

    def show(self, title: str, *blocks: str) -> None:
        """What a section shows from now on."""
        self.sections[title].body = "\n".join(blocks)
        self.write()

    def failed(self) -> list[str]:
        """What failed, and why."""
        return [f"{section.title}: {section.error}" for section in self.sections.values() if section.error]

    def finish(self) -> None:
        """The page as it stays."""
        self.finished = True
        self.write()

    def write(self) -> None:
        refresh = "" if self.finished else f'<meta http-equiv="refresh" content="{REFRESH}">'
        body = "\n".join(_section(section, self.finished) for section in self.sections.values())
        page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(self.title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>{html.escape(self.title)}</h1>
<p>{self.intro}</p>
{body}
</body></html>
"""
        with atomic_write(self.out / "report.html") as temporary:
            temporary.write_text(page, encoding="utf-8")

    def video(self, name: str, videos: np.ndarray, columns: int, fps: float, text: str, scale: int = SCALE) -> str:
        """Write clips uint8 [N, T, H, W, 3] side by side to media/<name>.mp4; the block that plays it."""
        path = self.media(f"{name}.mp4")
        write_mp4(path, tile(videos, columns, scale=scale), fps)
        return f'<video src="{_source(path)}" aria-label="{html.escape(text)}" {PLAYS}></video>'

    def media(self, name: str) -> Path:
        """Where a file that the page shows is."""
        return self.out / "media" / name


def picture(path: Path, text: str) -> str:
    return f'<img src="{_source(path)}" alt="{html.escape(text)}">'


def _source(path: Path) -> str:
    """The file's time makes a browser load anew what was written anew."""
    return f"media/{path.name}?{path.stat().st_mtime_ns}"


def _section(section: Section, finished: bool) -> str:
    notes = {
        "waiting": paragraph("Was not reached." if finished else "Waits for the sections before it.", "note"),
        "running": paragraph("Was interrupted." if finished else "At work.", "note"),
        "failed": paragraph(f"This failed: {section.error}", "failed"),
    }
    return f"<section><h2>{html.escape(section.title)}</h2>\n{section.body}\n{notes.get(section.state, '')}</section>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def command(text: str) -> str:
    return f"<p><code>{html.escape(text)}</code></p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells after a row's first are numbers if they begin like one."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="table"><table><tr>{top}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    number = text[:1].isdigit()
    return f"<td{' class=n' if number else ''}>{html.escape(text)}</td>"
