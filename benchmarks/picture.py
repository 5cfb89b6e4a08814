"""Draws the README's picture: the longest gap between two tokens under load, `fcfs` beside `deadline`.

    stretto bench trace azure_2023_conv.csv.gz --virtual --load 0.7,1,1.5,2 --schedule fcfs,deadline \
        --requests 1000 --json > report.json
    python benchmarks/picture.py report.json

It writes the figures to docs/images/gap.json and draws docs/images/gap.svg, which follows the light or dark
theme. Without an argument it draws the stored figures again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

IMAGES = Path(__file__).parent.parent / "docs" / "images"
TIER = "priority"
SCHEDULES = ("fcfs", "deadline")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 300, 76, 64, 250
BAR, GAP = 52, 8
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #444 } .title { font-weight: 600; font-size: 15px; fill: #111 }
.fcfs { fill: #b8bec7 } .deadline { fill: #2f6fde } .line { stroke: #c0392b; stroke-dasharray: 5 4 }
.limit { fill: #c0392b } .axis { stroke: #999 }
@media (prefers-color-scheme: dark) { text { fill: #b8bec7 } .title { fill: #fff } .fcfs { fill: #6b7280 }
.deadline { fill: #6ea2ff } .line { stroke: #ff8a7a } .limit { fill: #ff8a7a } .axis { stroke: #666 } }
"""


def figures(reports: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """By load and schedule: the longest gap in ms of answers that were on time, and the share of these."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for report in reports:
        tier = report["tiers"][TIER]
        row = {"gap_ms": round(tier["longest_gap_ms"], 1), "on_time": round(tier["attainment"], 4)}
        found.setdefault(f"{report['load']:g}", {})[report["schedule"]] = row
    return found


def picture(data: dict) -> str:
    """The bars as SVG."""
    body = "\n".join(_parts(data["loads"], data["itl_objective_ms"]))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        'aria-label="Longest gap between two tokens by load: fcfs and deadline">'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _parts(by_load: dict[str, dict[str, dict[str, float]]], objective: float) -> Iterator[str]:
    scale = (BOTTOM - TOP) / max(one["gap_ms"] for row in by_load.values() for one in row.values())
    yield '<text class="title" x="8" y="20">Longest gap between tokens of answers that are on time, ms</text>'
    yield '<rect class="fcfs" x="8" y="32" width="12" height="12"/><text x="26" y="43">fcfs</text>'
    yield '<rect class="deadline" x="70" y="32" width="12" height="12"/><text x="88" y="43">deadline</text>'
    yield '<line class="line" x1="170" y1="38" x2="194" y2="38"/>'
    yield f'<text class="limit" x="200" y="43">objective: {objective:,.0f} ms</text>'
    yield f'<text x="8" y="{BOTTOM + 18}">on time</text>'
    pitch = (WIDTH - LEFT) // len(by_load)
    for number, (load, row) in enumerate(by_load.items()):
        left = LEFT + number * pitch
        for index, schedule in enumerate(SCHEDULES):
            gap, share = row[schedule]["gap_ms"], row[schedule]["on_time"]
            x, tall = left + index * (BAR + GAP), gap * scale
            top, middle = BOTTOM - tall, x + BAR / 2
            yield f'<rect class="{schedule}" x="{x}" y="{top:.1f}" width="{BAR}" height="{tall:.1f}"/>'
            yield f'<text x="{middle:g}" y="{top - 5:.1f}" text-anchor="middle">{gap:,.0f}</text>'
            yield f'<text x="{middle:g}" y="{BOTTOM + 18}" text-anchor="middle">{share:.0%}</text>'
        yield f'<text x="{left + BAR + GAP / 2:g}" y="{BOTTOM + 38}" text-anchor="middle">load {load}</text>'
    y = BOTTOM - objective * scale
    yield f'<line class="line" x1="{LEFT - 8}" y1="{y:.1f}" x2="{WIDTH - 8}" y2="{y:.1f}"/>'
    yield f'<line class="axis" x1="{LEFT - 8}" y1="{BOTTOM}" x2="{WIDTH - 8}" y2="{BOTTOM}"/>'


def main() -> None:
    file = IMAGES / "gap.json"
    if len(sys.argv) > 1:
        from_report = figures(json.loads(Path(sys.argv[1]).read_text()))
        data = {"tier": TIER, "itl_objective_ms": 208.775, "loads": from_report}
        IMAGES.mkdir(exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n")
    (IMAGES / "gap.svg").write_text(picture(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
