"""The step `ladder`: which measured variants earn their place. Pure.

The top always stays. Of the others, those stay that no variant beats in quality and speed, and that are much
faster than the next slower one or statistically better than the next faster one.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from stretto.engine.step_time import StepCost
from stretto.ladder.registry import Dropped, Flips
from stretto.optimise.evaluate import Measured, difference


class Kept(Struct, frozen=True):
    """The names that stay, the best quality first, and the others with the reason."""

    names: tuple[str, ...]
    dropped: tuple[Dropped, ...]


def request_ms(cost: StepCost, prompt: int, answer: int) -> float:
    """The milliseconds of one usual request alone: the prompt, then `answer` tokens."""
    return cost.base + cost.prefill(0, prompt) + max(answer - 1, 0) * cost.decodes(1, prompt + answer // 2)


def usual_ms(variants: Sequence[Measured], top: str) -> dict[str, float]:
    """The milliseconds of the same request on each variant: the median prompt and answer of the top."""
    lengths = next(each.lengths for each in variants if each.name == top)
    return {each.name: request_ms(each.cost, lengths.prompt_p50, lengths.p50) for each in variants}


def keep(variants: Sequence[Measured], top: str, faster: float) -> Kept:
    """Which variants stay in the ladder. `faster`: how many times as fast a variant must be to stay beside a
    better one."""
    times = usual_ms(variants, top)
    dropped: list[Dropped] = []
    frontier: list[Measured] = []
    for each in variants:
        better = None if each.name == top else _dominating(each, variants, times)
        if better is None:
            frontier.append(each)
        else:
            dropped.append(Dropped(each.name, f"{better} is at least as good and as fast"))
    frontier.sort(key=lambda each: (times[each.name], each.name))
    kept: list[Measured] = []
    for each in frontier:
        if kept and not _apart(each, kept[-1], times, faster):
            # Of two that are about equal, the faster one stays, unless the other is the top.
            gone, stays = (kept.pop(), each) if each.name == top else (each, kept[-1])
            why = f"it is about as fast as {stays.name} and about as good"
            dropped.append(Dropped(gone.name, why))
            if gone is each:
                continue
        kept.append(each)
    kept.sort(key=lambda each: (each.name != top, -each.quality.mean, times[each.name]))
    return Kept(tuple(each.name for each in kept), tuple(dropped))


def _apart(slow: Measured, fast: Measured, times: dict[str, float], faster: float) -> bool:
    """Whether two variants are far enough apart in speed or in quality to be both useful."""
    low, _ = difference(grades(slow), grades(fast))
    return low > 0 or times[slow.name] >= faster * times[fast.name]


def _dominating(each: Measured, others: Sequence[Measured], times: dict[str, float]) -> str | None:
    """The fastest variant that is no worse and no slower than `each`, and better in one of the two."""
    for other in sorted(others, key=lambda other: (times[other.name], -other.quality.mean)):
        if other.name == each.name:
            continue
        quality = other.quality.mean - each.quality.mean
        speed = times[each.name] - times[other.name]
        if quality >= 0 and speed >= 0 and (quality > 0 or speed > 0):
            return other.name
    return None


def grades(each: Measured) -> list[float]:
    """The quality of each prompt, or of each text."""
    return [float(good) for good in each.rights] if each.rights else each.similar


def flips(each: Measured, top: Measured) -> Flips:
    """The shares of the prompts whose answer is wrong though the top's is right, and the other way round."""
    count = len(each.rights)
    if not count:
        return Flips()
    pairs = list(zip(each.rights, top.rights, strict=True))
    return Flips(sum(b and not a for a, b in pairs) / count, sum(a and not b for a, b in pairs) / count)
