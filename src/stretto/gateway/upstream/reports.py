"""A worker's report, read and checked: what does not make sense is no report. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, isfinite

from msgspec import DecodeError, ValidationError, msgpack, structs

from stretto.config import Tier
from stretto.engine.scheduler.admission import Outlook, Snapshot
from stretto.gateway.upstream.connection import WorkerLost
from stretto.protocol.relay import WorkerReport
from stretto.types import ModelInfo, Objective, Request, Sampling

VERSION = 1
MOST_TOKENS = 1 << 40  # of a KV cache
PROBE = Request(
    id=0,
    model="",
    prompt=tuple(range(64)),
    arrival=0.0,
    sampling=Sampling(),
    objective=Objective(ttft_ms=1000, itl_ms=100),
)


class NotAReport(WorkerLost):
    """The worker's answer is no report of a version that this gateway knows, or makes no sense."""


def read_report(body: bytes) -> tuple[WorkerReport, dict[str, Snapshot]]:
    """The report, and its snapshots by model. Raises NotAReport."""
    try:
        report = msgpack.decode(body, type=WorkerReport)
    except (DecodeError, ValidationError) as error:
        raise NotAReport(f"its report cannot be read: {error}") from error
    if report.version != VERSION:
        raise NotAReport(f"its report has version {report.version}, and this gateway knows {VERSION}")
    try:
        seen = {name: msgpack.decode(raw, type=Snapshot) for name, raw in report.snapshots.items()}
    except (DecodeError, ValidationError) as error:
        raise NotAReport(f"its report cannot be read: {error}") from error
    wrong = [*_wrong(report), *(name for name, each in seen.items() if not _usable(each, report.tiers))]
    if wrong:
        raise NotAReport(f"its report makes no sense: {', '.join(wrong)}")
    return report, seen


def _wrong(report: WorkerReport) -> Iterable[str]:
    """The fields with values that cannot be."""
    if not isfinite(report.now):
        yield "now"
    if not isfinite(report.quality):
        yield "quality"
    if not all(map(isfinite, report.bytes_per_token.values())):
        yield "bytes_per_token"
    if not all(0 <= each < inf for each in report.joules.values()):
        yield "joules"
    for info in report.models:
        if not _possible(info):
            yield f"the size of {info.name}"


def _possible(info: ModelInfo) -> bool:
    return info.context > 0 <= info.blocks and 0 <= info.block_size * info.blocks <= MOST_TOKENS


def _usable(snapshot: Snapshot, tiers: Mapping[str, Tier]) -> bool:
    """Whether a request can be predicted from it."""
    numbers = [snapshot.now, *snapshot.inflow.values(), *snapshot.worth.values()]
    for estimate in (snapshot.estimate, snapshot.patient or snapshot.estimate):
        costs = (*structs.astuple(estimate.cost), estimate.load, estimate.elsewhere, float(estimate.streams))
        if min(costs) < 0 or not (estimate.margin > 0 < estimate.itl_ms):
            return False
        numbers += [*costs, estimate.margin]
    if not all(map(isfinite, numbers)):
        return False
    outlook = Outlook(tiers)
    outlook.see(snapshot)
    try:
        forecast = outlook.forecast(structs.replace(PROBE, arrival=snapshot.now), snapshot.now)
        return forecast is not None and forecast.ttft_ms >= 0 and forecast.queue_ms >= 0
    except Exception:  # whatever its numbers break in the prediction, they are no state
        return False
