"""What a replay is given: the recorded requests, and the machine, tiers and schedule that serve them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice, repeat
from random import Random

from msgspec import Struct, field, structs

from stretto.config import Tier
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.default_tiers import default_tiers
from stretto.engine.step_time import StepCost
from stretto.errors import InvalidRequest, StartError
from stretto.types import Objective, Request, Sampling

PREFIX_BLOCK = 512  # tokens
# A Qwen3-0.6B shape in int8 on two cores of a server CPU, in round figures. `benchmarks/times` holds what was
# measured on one machine, for `benchmarks/objectives.py --times`.
SMALL_CPU = StepCost(base=38.0, per_decode=1.5, per_prefill=2.9, per_key=0.0022, per_pair=2e-6)
MIX = {"priority": 0.2, "default": 0.6, "flex": 0.2}


class Arrival(Struct, frozen=True, array_like=True):
    """One request of a recorded load."""

    at: float  # seconds from the start of the load
    prompt_tokens: int
    output_tokens: int
    # Ids of its blocks of `PREFIX_BLOCK` tokens, equal where two prompts begin alike. Empty: unknown.
    prefix: tuple[int, ...] = ()
    tenant: str = "local"


CPU_TIERS = default_tiers([SMALL_CPU])


class Setting(Struct, frozen=True, kw_only=True):
    """What to replay a load on. Raises StartError for an unknown schedule or a load out of range."""

    schedule: str = "deadline"
    load: float = 1.0  # times the capacity
    cost: StepCost = SMALL_CPU  # what a step takes
    known: StepCost | None = None  # the scheduler's step-time model at the start; None: `cost`
    noise: float = 0.0  # sigma of the log-normal factor by which a step's time differs from its cost
    tiers: dict[str, Tier] = field(default_factory=lambda: CPU_TIERS)
    mix: dict[str, float] = field(default_factory=lambda: MIX)  # the share of each tier
    seed: int = 0
    context: int = 16384
    blocks: int = 16384
    max_running: int = 256
    max_step_tokens: int = 512

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise StartError(f"--schedule is one of {', '.join(SCHEDULES)}, not {self.schedule}")
        if not 0.01 <= self.load <= 100:
            raise StartError(f"--load must be from 0.01 to 100, not {self.load}")


def within(arrival: Arrival, setting: Setting) -> Arrival:
    """The arrival with its prompt cut to what the answer leaves of the context.

    Raises InvalidRequest when the answer alone exceeds the context.
    """
    longest = setting.context - arrival.output_tokens
    if longest < 1:
        raise InvalidRequest(
            f"an answer of {arrival.output_tokens} tokens exceeds a context of {setting.context}"
        )
    return structs.replace(arrival, prompt_tokens=min(arrival.prompt_tokens, longest))


def planned(arrivals: Sequence[Arrival], setting: Setting, rate: float) -> list[Request]:
    """The requests of a load, each of a tier that is drawn from the mix.

    `rate` is requests per second at load 1.0. Time is stretched to a mean rate of `rate * load`. Bursts stay.
    """
    span = max(arrivals[-1].at - arrivals[0].at, 1e-9)
    stretch = (len(arrivals) / (rate * setting.load)) / span
    rng = Random(f"tiers {setting.seed}")
    names = rng.choices(list(setting.mix), list(setting.mix.values()), k=len(arrivals))
    return [
        request_of(arrival, ident, arrival.at * stretch, tier=name, objective=setting.tiers[name].objective)
        for ident, (arrival, name) in enumerate(zip(arrivals, names, strict=True), 1)
    ]


def request_of(arrival: Arrival, ident: int, at: float, *, tier: str, objective: Objective) -> Request:
    """A request for the null model that arrives `at`. Equal prefixes become equal tokens."""
    tokens = (0,) * arrival.prompt_tokens
    if arrival.prefix:
        ids = (block * PREFIX_BLOCK + offset for block in arrival.prefix for offset in range(PREFIX_BLOCK))
        tokens = tuple(islice(chain(ids, repeat(-ident)), arrival.prompt_tokens))
    return Request(
        id=ident,
        model="null",
        prompt=tokens,
        arrival=at,
        sampling=Sampling(seed=ident),
        tenant=arrival.tenant,
        objective=objective,
        tier=tier,
    )
