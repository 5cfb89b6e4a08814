"""Writes the comparison with peers: results as JSON, a plot of each, and one page with tables.

The page is made from all results beside it, one for each shape, so that no figure is typed by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import msgspec
from msgspec import Struct

LESS = ("ready_s", "first_token_s", "ttft_512_s", "ttft_2048_s", "memory_gib")
TITLES = {
    "decode_1": "decode, one stream, tokens/s",
    "decode_8": "decode, eight streams, tokens/s in all",
    "decode_4000": "decode at 4,000 tokens of context, tokens/s",
    "ttft_512_s": "first token of 512, s",
    "ttft_2048_s": "first token of 2,048, s",
    "ready_s": "start to ready, s",
    "first_token_s": "start to first token, s",
    "memory_gib": "memory at 512 tokens, GiB",
}
PAGE = """# Compared with other engines

All engines run on one machine, from one checkpoint with random weights, with {threads} threads and without a
server. In every round each engine has one turn while the others are stopped. A figure is the median over the
rounds. Prompts are token ids drawn at random. Answers are greedy and have a fixed length. One command makes
this page: `python benchmarks/peers/run.py --home DIR --docs docs`

A ratio above 1 means that Stretto is better. The bold ratio is against the best engine that uses as many bits
per weight as Stretto, or fewer. If that engine uses fewer bits, a second ratio is against the best one with
as many.
"""


class Measured(Struct, frozen=True, kw_only=True):
    """The figures of one engine. Rates are tokens per second; `decode_8` is that of eight streams together.

    A figure is None when the model's context is too short for it.
    """

    name: str
    bits: int
    version: str
    ready_s: float
    first_token_s: float
    ttft_512_s: float
    ttft_2048_s: float | None
    decode_1: float
    decode_8: float
    decode_4000: float | None
    memory_gib: float

    @property
    def ours(self) -> bool:
        return self.name.startswith("stretto")


class Result(Struct, frozen=True, kw_only=True):
    """One run. `load`: the machine's load average over the last minute."""

    shape: str
    date: str
    cpu: str
    isa: list[str]
    threads: int
    rounds: int
    load: float
    engines: list[Measured]


def best_peer(ours: Measured, engines: Sequence[Measured], figure: str) -> Measured | None:
    """The best peer at a figure among those with as many bits as ours or fewer. None if there is none."""
    peers = [each for each in engines if not each.ours and each.bits <= ours.bits]
    if not ours.ours or not peers or getattr(ours, figure) is None:
        return None
    return (min if figure in LESS else max)(peers, key=lambda each: getattr(each, figure))


def ratio(ours: Measured, peer: Measured, figure: str) -> float:
    """How many times better ours is than the peer."""
    one, other = getattr(ours, figure), getattr(peer, figure)
    return other / one if figure in LESS else one / other


def write(result: Result, docs: Path) -> None:
    """Add a result to the page in `docs`."""
    folder = docs / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(result), indent=1)
    (folder / f"{result.shape}.json").write_bytes(data + b"\n")
    (folder / f"{result.shape}.svg").write_text(plot(result))
    results = [msgspec.json.decode(file.read_bytes(), type=Result) for file in sorted(folder.glob("*.json"))]
    sections = [section(each) for each in results]
    (docs / "peers.md").write_text("\n".join([PAGE.format(threads=result.threads), *sections]))


def section(result: Result) -> str:
    """The plot, table and ratios of a shape, as Markdown."""
    head = (
        f"## {result.shape}\n\n{result.date}, {result.cpu} ({', '.join(result.isa)}), {result.rounds} rounds,"
    )
    lines = [f"{head} load {result.load:.1f}.", "", f"![{result.shape}](peers/{result.shape}.svg)", ""]
    names = [each.name for each in result.engines]
    lines += [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for figure, title in TITLES.items():
        values = [_shown(getattr(each, figure)) for each in result.engines]
        lines.append(f"| {title} | {' | '.join(values)} |")
    ours = [each for each in result.engines if each.ours]
    lines += ["", f"| ratio | {' | '.join(each.name for each in ours)} |", f"| --- |{' --- |' * len(ours)}"]
    for figure, title in TITLES.items():
        cells = [_ratios(each, result.engines, figure) for each in ours]
        lines.append(f"| {title.rpartition(',')[0]} | {' | '.join(cells)} |")
    versions = sorted({each.version for each in result.engines})
    return "\n".join([*lines, "", f"Versions: {', '.join(versions)}.", ""])


def _ratios(ours: Measured, engines: Sequence[Measured], figure: str) -> str:
    peer = best_peer(ours, engines, figure)
    if peer is None:
        return "-"
    text = f"**{ratio(ours, peer, figure):.2f}x** ({peer.name})"
    alike = best_peer(ours, [each for each in engines if each.bits == ours.bits], figure)
    if alike is None or alike is peer:
        return text
    return f"{text}, {ratio(ours, alike, figure):.2f}x ({alike.name})"


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 } .title { font-weight: 600; fill: #111 }
.peer { fill: #b8bec7 } .ours { fill: #2f6fde }
@media (prefers-color-scheme: dark) { text { fill: #b8bec7 } .title { fill: #fff } .peer { fill: #565d68 }
.ours { fill: #6ea2ff } }
"""
WIDTH, ROW, LABEL, VALUE = 760, 20, 110, 48


def plot(result: Result) -> str:
    """Bars as an SVG image, two figures side by side. It follows the reader's light or dark theme."""
    figures = [
        (figure, title)
        for figure, title in TITLES.items()
        if all(getattr(each, figure) is not None for each in result.engines)
    ]
    tall = ROW * (len(result.engines) + 2)
    height = tall * ((len(figures) + 1) // 2)
    body = "\n".join(
        line
        for number, (figure, title) in enumerate(figures)
        for line in _panel(result, figure, title, (number % 2 * WIDTH // 2, number // 2 * tall))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _panel(result: Result, figure: str, title: str, at: tuple[int, int]) -> Iterator[str]:
    left, top = at
    less = ", lower is better" if figure in LESS else ""
    yield f'<text class="title" x="{left}" y="{top + 15}">{escape(title + less)}</text>'
    largest = max(getattr(each, figure) for each in result.engines)
    width = WIDTH // 2 - LABEL - VALUE - 10
    for number, each in enumerate(result.engines):
        value, y = getattr(each, figure), top + ROW * (number + 1) + 4
        long = max(value / largest * width, 1.0)
        kind = "ours" if each.ours else "peer"
        yield f'<text x="{left}" y="{y + 13}">{escape(each.name)}</text>'
        yield f'<rect class="{kind}" x="{left + LABEL}" y="{y + 2}" width="{long:.1f}" height="14" rx="2"/>'
        yield f'<text x="{left + LABEL + long + 6:.1f}" y="{y + 13}">{_shown(value)}</text>'
