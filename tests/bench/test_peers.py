"""The page that compares Stretto with other engines: its ratios, tables and figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

PEERS = Path(__file__).parent.parent.parent / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """Import the script. `benchmarks/` is not a package, so its folder is put on the import path."""
    sys.path.insert(0, str(PEERS))
    try:
        yield __import__("page")
    finally:
        sys.path.remove(str(PEERS))


def engine(page: Any, name: str, bits: int, **figures: float) -> Any:
    same = dict.fromkeys(("ready_s", "first_token_s", "ttft_512_s", "ttft_2048_s", "memory_gib"), 2.0)
    same |= dict.fromkeys(("decode_1", "decode_8", "decode_4000"), 10.0)
    return page.Measured(name=name, bits=bits, version="1", **(same | figures))


@pytest.fixture
def result(page: Any) -> Any:
    return page.Result(
        shape="tiny",
        date="2026-01-01",
        cpu="a CPU & more",
        isa=["avx2"],
        threads=2,
        rounds=5,
        load=0.1,
        engines=[
            engine(page, "stretto int8", 8, decode_1=30.0, ttft_512_s=1.0),
            engine(page, "stretto int4", 4, decode_1=60.0),
            engine(page, "peer int8", 8, decode_1=12.0),
            engine(page, "peer int4", 4, decode_1=15.0, ttft_512_s=4.0),
        ],
    )


def test_the_best_peer_has_at_most_as_many_bits(page: Any, result: Any) -> None:
    int8, int4, peer8, peer4 = result.engines
    assert page.best_peer(int8, result.engines, "decode_1") is peer4, "fewer bits may be faster"
    assert page.best_peer(int8, result.engines, "ttft_512_s") is peer8
    assert page.best_peer(int4, result.engines, "ttft_512_s") is peer4
    assert page.best_peer(peer8, result.engines, "decode_1") is None
    assert page.ratio(int8, peer4, "decode_1") == 2.0
    assert page.ratio(int4, peer4, "ttft_512_s") == 2.0, "less time is better"


def test_the_page_lists_all_results_with_ratios(page: Any, result: Any, tmp_path: Path) -> None:
    page.write(result, tmp_path)
    page.write(msgspec.structs.replace(result, shape="other"), tmp_path)
    text = (tmp_path / "peers.md").read_text()
    assert text.index("## other") < text.index("## tiny")
    assert "| decode, one stream, tokens/s | 30.0 | 60.0 | 12.0 | 15.0 |" in text
    assert "**2.00x** (peer int4), 2.50x (peer int8) | **4.00x** (peer int4) |" in text
    drawn = ElementTree.fromstring((tmp_path / "peers" / "tiny.svg").read_text())
    bars = [float(each.attrib["width"]) for each in drawn.iter() if each.tag.endswith("rect")]
    assert len(bars) == 4 * len(page.TITLES)
    assert bars[1] == max(bars[:4]) and bars[0] == pytest.approx(bars[1] / 2, rel=0.01)


def test_an_engine_without_a_peer_has_no_ratio(page: Any, result: Any) -> None:
    alone = msgspec.structs.replace(result, engines=result.engines[:2])
    assert "| - | - |" in page.section(alone)
