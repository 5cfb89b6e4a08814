"""Puts a ladder into the package: the top in the folder itself, the other checkpoints in folders beside it.

python -m recipes.desk.bundle build/desk-ladder src/stretto/desk
So the folder is a ladder to the server, and the top model to whatever wants one model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from msgspec import structs

from stretto.ladder import registry
from stretto.ladder.registry import Ladder
from stretto.models.source import LADDER

LIMIT = 40_000_000  # bytes
NAME, CARD = "desk", "card.json"
PARTS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def homes(ladder: Ladder) -> dict[str, str]:
    """The folder of each checkpoint in the package, by its folder in the ladder."""
    top = ladder.variant(ladder.top).path
    return {each.path: "." if each.path == top else each.path for each in ladder.variants}


def bundle(source: Path, target: Path) -> int:
    """Copy what the kept variants need; returns the bytes. The rest of the target goes, but not its card.

    Raises SystemExit when it is more than the limit, and CheckpointError for a damaged ladder.
    """
    ladder = registry.load(source)
    folders = homes(ladder)
    size = sum((source / folder / part).stat().st_size for folder in folders for part in PARTS)
    if size > LIMIT:
        raise SystemExit(f"{size} bytes are more than {LIMIT}: leave a variant out")
    card = (target / CARD).read_bytes() if (target / CARD).exists() else None
    shutil.rmtree(target, ignore_errors=True)
    for folder, home in folders.items():
        (target / home).mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            shutil.copyfile(source / folder / part, target / home / part)
    if card is not None:
        (target / CARD).write_bytes(card)
    variants = tuple(structs.replace(each, path=folders[each.path]) for each in ladder.variants)
    registry.save(structs.replace(ladder, model=NAME, variants=variants), target)
    registry.load(target)
    return size + (target / LADDER).stat().st_size


def table(ladder: Ladder) -> str:
    """The share of right answers by variant and level, in per cent, as a Markdown table."""
    levels = sorted(
        {level for cells in ladder.variants[0].tasks.values() for level in cells if level != "all"}
    )
    rows = [f"| variant | {' | '.join(f'level {level}' for level in levels)} | all |"]
    rows.append("| --- |" + " ---: |" * (len(levels) + 1))
    for each in ladder.variants:
        shares: list[float] = []
        for level in levels:
            cells = [cells[level] for cells in each.tasks.values() if level in cells]
            shares.append(sum(cell.mean * cell.count for cell in cells) / sum(cell.count for cell in cells))
        shown = " | ".join(f"{100 * share:.1f}" for share in (*shares, each.quality.mean))
        rows.append(f"| `{each.name}` | {shown} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    size = bundle(options.source, options.target)
    print(f"{size / 1e6:.1f} MB in {options.target}")
    print(table(registry.load(options.target)))
    dropped = json.loads((options.target / LADDER).read_text()).get("dropped", [])
    for each in dropped:
        print(f"left out: {each['name']}, because {each['why']}")


if __name__ == "__main__":
    main()
