"""The figures of docs/performance.md: bars as SVG, legible on a light and a dark background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.requests.cases import CASES
from benchmarks.requests.rounds import Results, Spread
from benchmarks.requests.servers import OURS, ROOT, TITLES

FIGURES = ROOT / "docs/figures"
WIDTH, LABEL, NUMBER, ROW, BAR = 720, 190, 70, 30, 18
TEXT, OUR_COLOUR, THEIR_COLOUR = "#7d8590", "#2f81f7", "#9aa4af"


def write(results: Results, directory: Path = FIGURES) -> list[Path]:
    """Write a figure for each case and number of clients: the CPU per request of each server."""
    directory.mkdir(parents=True, exist_ok=True)
    return [
        _written(results, case, clients, directory / f"cpu-{case}-{clients}.svg")
        for case in results.plan.cases
        for clients in results.plan.clients
    ]


def _written(results: Results, case: str, clients: int, path: Path) -> Path:
    bars = [
        (name, results.spread(case, clients, name, lambda window: window.server_micros))
        for name in results.plan.servers
    ]
    title = f"{case}: {CASES[case].says}; CPU of the server a request in µs, {clients} clients"
    path.write_text("\n".join(drawing(title, bars)) + "\n")
    return path


def drawing(title: str, bars: Sequence[tuple[str, Spread]]) -> Iterator[str]:
    """A bar for each median, and a line from its least to its most."""
    height = ROW * (len(bars) + 1)
    per_micro = (WIDTH - LABEL - NUMBER) / max(spread.most for _, spread in bars)
    font = f'font-family="sans-serif" font-size="13" fill="{TEXT}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {font}>'
    yield f"<title>{escape(title)}</title>"
    yield f'<text x="0" y="16">{escape(title)}</text>'
    for y, (name, spread) in zip(count(ROW, ROW), bars, strict=False):
        yield from bar(y, name, spread, per_micro)
    yield "</svg>"


def bar(y: int, name: str, spread: Spread, per_micro: float) -> Iterator[str]:
    colour, middle = OUR_COLOUR if name == OURS else THEIR_COLOUR, y + BAR / 2
    least, median, most = (LABEL + each * per_micro for each in (spread.least, spread.median, spread.most))
    yield f'<text x="{LABEL - 8}" y="{middle + 5}" text-anchor="end">{escape(TITLES[name])}</text>'
    yield f'<rect x="{LABEL}" y="{y}" width="{median - LABEL:.1f}" height="{BAR}" fill="{colour}"/>'
    yield f'<path d="M{least:.1f} {middle}H{most:.1f}" stroke="{TEXT}" stroke-width="2"/>'
    yield f'<text x="{most + 6:.1f}" y="{middle + 5}">{spread.median:.0f}</text>'
