"""Every metric of the product, once: name, type, labels, help, its graphs, its alerts.

`metrics` fills them, `dashboard` makes Grafana's dashboard, Prometheus' rules and the reference of them.
Labels take few values: tiers, models held, codes of errors; nothing a client may choose freely.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
SELF = "METRIC"
WINDOW = "$__rate_interval"
CHOSEN = 'model=~"$model",'


class Panel(Struct, frozen=True, kw_only=True):
    """A metric's part of a graph: metrics of the same title share one. `queries`: legend -> PromQL, in which
    METRIC stands for the metric's name."""

    row: str
    title: str
    queries: dict[str, str]
    unit: str = "short"
    stacked: bool = False


class Alert(Struct, frozen=True, kw_only=True):
    """Fires when `when` has held for so many minutes; `do` is what to look at then."""

    name: str
    when: str
    minutes: int
    severity: Literal["warning", "critical"]
    summary: str
    do: str


class Record(Struct, frozen=True, kw_only=True):
    """A recording rule: `value` under a name of its own. `tier`: the label to give it."""

    name: str
    value: str
    tier: str | None = None


class Metric(Struct, frozen=True, kw_only=True):
    """`name` is as Prometheus shows it, without the `_total` of a counter."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    panels: tuple[Panel, ...] = ()
    records: tuple[Record, ...] = ()
    alerts: tuple[Alert, ...] = ()

    @property
    def shown(self) -> str:
        """The name that a query uses."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _quantiles(by: str) -> dict[str, str]:
    """The median and the 99th percentile of a histogram."""
    inner = f'sum by (le, {by}) (rate({SELF}_bucket{{model=~"$model"}}[{WINDOW}]))'
    return {
        f"p{share * 100:.0f} {{{{{by}}}}}": f"histogram_quantile({share}, {inner})" for share in (0.5, 0.99)
    }


def _rate(by: str, selector: str = '{model=~"$model"}') -> dict[str, str]:
    return {f"{{{{{by}}}}}": f"sum by ({by}) (rate({SELF}{selector}[{WINDOW}]))"}


def _total(name: str) -> dict[str, str]:
    return {name: f'sum(rate({SELF}{{model=~"$model"}}[{WINDOW}]))'}


def _mean(name: str) -> dict[str, str]:
    of = f'{{model=~"$model"}}[{WINDOW}]'
    return {name: f"sum(rate({SELF}_sum{of})) / sum(rate(stretto_step_seconds_count{of}))"}


def _value(name: str, selector: str = '{model=~"$model"}') -> dict[str, str]:
    return {name: f"sum({SELF}{selector})"}


def _goodput(by: str, of: str = "", window: str = "5m") -> str:
    return f'sum{by} (rate({SELF}{{{of}verdict="on_time"}}[{window}]))'


def _attainment(by: str, of: str = "", window: str = "5m") -> str:
    judged = f'sum{by} (rate({SELF}{{{of}verdict!="cancelled"}}[{window}]))'
    return f"{_goodput(by, of, window)} / {judged}"


TIME, LATENCY, LOAD, STEPS, WORKER = "On time", "Latency", "Load", "Steps", "Worker"
REQUEST = ("tier", "model")

JUDGED = Metric(
    name="stretto_judged_requests",
    kind="counter",
    help="Requests by what became of their objective: on_time (without one: answered), late, refused, "
    "failed, or cancelled by the client before it was late. Attainment is on_time over all but cancelled.",
    labels=("tier", "model", "verdict"),
    panels=(
        Panel(
            row=TIME,
            title="Attainment",
            unit="percentunit",
            queries={
                "{{tier}}": _attainment(" by (tier)", CHOSEN, WINDOW),
                "all": _attainment("", CHOSEN, WINDOW),
            },
        ),
        Panel(
            row=TIME,
            title="Goodput",
            unit="reqps",
            queries={
                "{{tier}}": _goodput(" by (tier)", CHOSEN, WINDOW),
                "all": _goodput("", CHOSEN, WINDOW),
            },
        ),
    ),
    records=(
        Record(name="stretto:attainment:ratio5m", value=_attainment(" by (tier)")),
        Record(name="stretto:attainment:ratio5m", value=_attainment(""), tier="all"),
        Record(name="stretto:goodput:rate5m", value=_goodput(" by (tier)")),
        Record(name="stretto:goodput:rate5m", value=_goodput(""), tier="all"),
    ),
    alerts=(
        Alert(
            name="StrettoPriorityLate",
            when='stretto:attainment:ratio5m{tier="priority"} < 0.99',
            minutes=5,
            severity="critical",
            summary="less than 99 % of priority requests are on time",
            do="Look at refusals, waiting sequences and the step-time model's error: the load is above what "
            "this worker can keep, or its forecast is off.",
        ),
        Alert(
            name="StrettoDefaultLate",
            when='stretto:attainment:ratio5m{tier="default"} < 0.95',
            minutes=15,
            severity="warning",
            summary="less than 95 % of default requests are on time",
            do="Add a worker, quantise the model, or give the tier more time in its configuration.",
        ),
    ),
)
SLACK = Metric(
    name="stretto_slack_seconds",
    kind="histogram",
    help="Of requests that were on time: how long before its due the token with the least to spare came.",
    labels=REQUEST,
    buckets=LATENCY_S,
    panels=(Panel(row=TIME, title="Slack", unit="s", queries=_quantiles("tier")),),
)
LATENESS = Metric(
    name="stretto_lateness_seconds",
    kind="histogram",
    help="Of requests that were late: how long after its due the latest token came.",
    labels=REQUEST,
    buckets=LATENCY_S,
    panels=(Panel(row=TIME, title="Lateness", unit="s", queries=_quantiles("tier")),),
)
TTFT = Metric(
    name="stretto_ttft_seconds",
    kind="histogram",
    help="Seconds from arrival to the first token.",
    labels=REQUEST,
    buckets=LATENCY_S,
    panels=(Panel(row=LATENCY, title="Time to first token", unit="s", queries=_quantiles("tier")),),
)
ITL = Metric(
    name="stretto_itl_seconds",
    kind="histogram",
    help="Seconds between the tokens of an answer, as the front received them.",
    labels=REQUEST,
    buckets=GAP_S,
    panels=(Panel(row=LATENCY, title="Inter-token latency", unit="s", queries=_quantiles("tier")),),
)
E2E = Metric(
    name="stretto_e2e_seconds",
    kind="histogram",
    help="Seconds from arrival to the end, of requests that had a token.",
    labels=REQUEST,
    buckets=LATENCY_S,
    panels=(Panel(row=LATENCY, title="Whole answer", unit="s", queries=_quantiles("tier")),),
)
QUEUE = Metric(
    name="stretto_queue_seconds",
    kind="histogram",
    help="Seconds from arrival to the first step that read the prompt.",
    labels=REQUEST,
    buckets=LATENCY_S,
    panels=(
        Panel(
            row=LATENCY,
            title="Queue wait, actual and predicted",
            unit="s",
            queries={f"actual {legend}": query for legend, query in _quantiles("tier").items()},
        ),
    ),
)
FORECAST = Metric(
    name="stretto_queue_forecast_seconds",
    kind="histogram",
    help="What stretto_queue_seconds was expected to be when the request was sent to the engine.",
    labels=REQUEST,
    buckets=LATENCY_S,
    panels=(
        Panel(
            row=LATENCY,
            title="Queue wait, actual and predicted",
            unit="s",
            queries={f"predicted {legend}": query for legend, query in _quantiles("tier").items()},
        ),
    ),
)
FORECAST_ERROR = Metric(
    name="stretto_queue_forecast_error_seconds",
    kind="histogram",
    help="How far the forecast of the queue wait was off, either way.",
    labels=REQUEST,
    buckets=LATENCY_S,
    panels=(Panel(row=LATENCY, title="Error of the queue's forecast", unit="s", queries=_quantiles("tier")),),
)
REQUESTS = Metric(
    name="stretto_requests",
    kind="counter",
    help="Requests that ended, by endpoint and outcome: ok, client_gone, or an error's code.",
    labels=("endpoint", "outcome"),
    panels=(Panel(row=LOAD, title="Requests by outcome", unit="reqps", queries=_rate("outcome", "")),),
)
TOKENS = Metric(
    name="stretto_tokens",
    kind="counter",
    help="Tokens of requests that ended: prompt (cached among them) and output.",
    labels=("kind", "model"),
    panels=(Panel(row=LOAD, title="Tokens per second", queries=_rate("kind")),),
)
REFUSALS = Metric(
    name="stretto_refusals",
    kind="counter",
    help="Requests turned away with a status of 503, by the error's code and the tier asked for.",
    labels=("reason", "tier"),
    panels=(Panel(row=LOAD, title="Refusals by reason", unit="reqps", queries=_rate("reason", "")),),
    alerts=(
        Alert(
            name="StrettoRefusing",
            when=f"sum(rate({SELF}[5m])) / sum(rate(stretto_requests_total[5m])) > 0.05",
            minutes=10,
            severity="warning",
            summary="more than 5 % of requests are refused",
            do="The reason label says why. Add a worker where it is overloaded or cannot_be_on_time.",
        ),
    ),
)
STEP = Metric(
    name="stretto_step_seconds",
    kind="histogram",
    help="Seconds per step of the engine.",
    labels=("model",),
    buckets=STEP_S,
    panels=(Panel(row=STEPS, title="Step time", unit="s", queries=_quantiles("model")),),
)
STEP_DECODE = Metric(
    name="stretto_step_decode_tokens",
    kind="histogram",
    help="Decode tokens per step that had any.",
    labels=("model",),
    buckets=SIZES,
    panels=(Panel(row=STEPS, title="Tokens per step, mean", stacked=True, queries=_mean("decode")),),
)
STEP_PREFILL = Metric(
    name="stretto_step_prefill_tokens",
    kind="histogram",
    help="Prompt tokens per step that had any.",
    labels=("model",),
    buckets=SIZES,
    panels=(Panel(row=STEPS, title="Tokens per step, mean", stacked=True, queries=_mean("prefill")),),
)
STEP_ERROR = Metric(
    name="stretto_step_time_error_ratio",
    kind="histogram",
    help="How far the step-time model was off, as a share of what the step took.",
    labels=("model",),
    buckets=SHARES,
    panels=(
        Panel(row=STEPS, title="Step-time model's error", unit="percentunit", queries=_quantiles("model")),
    ),
    alerts=(
        Alert(
            name="StrettoForecastOff",
            when=f"histogram_quantile(0.5, sum by (le, model) (rate({SELF}_bucket[10m]))) > 0.3",
            minutes=15,
            severity="warning",
            summary="half of the steps take 30 % more or less than predicted",
            do="Something else uses the cores or the GPU, or clocks change. Until it ends, deadlines are "
            "kept by guess.",
        ),
    ),
)
PREEMPTIONS = Metric(
    name="stretto_preemptions",
    kind="counter",
    help="Sequences put back to be computed again.",
    labels=("model",),
    panels=(Panel(row=STEPS, title="Preemptions", unit="ops", queries=_rate("model")),),
)
PROPOSED = Metric(
    name="stretto_guesses_proposed",
    kind="counter",
    help="Guesses at coming tokens that a step checked (speculative decoding).",
    labels=("model",),
    panels=(Panel(row=STEPS, title="Speculation", unit="ops", queries=_total("proposed")),),
)
ACCEPTED = Metric(
    name="stretto_guesses_accepted",
    kind="counter",
    help="Guesses that were the token the model drew.",
    labels=("model",),
    panels=(Panel(row=STEPS, title="Speculation", unit="ops", queries=_total("accepted")),),
)
RUNNING = Metric(
    name="stretto_running_sequences",
    kind="gauge",
    help="Sequences in the last step.",
    labels=("model",),
    panels=(Panel(row=LOAD, title="Sequences", queries=_value("running")),),
)
WAITING = Metric(
    name="stretto_waiting_sequences",
    kind="gauge",
    help="Sequences waiting for a step.",
    labels=("model",),
    panels=(Panel(row=LOAD, title="Sequences", queries=_value("waiting")),),
)
BLOCKS_FREE = Metric(
    name="stretto_kv_blocks_free",
    kind="gauge",
    help="Free blocks of KV cache.",
    labels=("model",),
    panels=(Panel(row=LOAD, title="KV blocks", queries=_value("free")),),
    alerts=(
        Alert(
            name="StrettoBlocksShort",
            when=f"{SELF} / stretto_kv_blocks < 0.02 and on (instance, model) "
            "rate(stretto_preemptions_total[5m]) > 0.1",
            minutes=10,
            severity="warning",
            summary="the KV cache is full, and sequences are computed twice",
            do="Give --kv-memory more, or --max-running less.",
        ),
    ),
)
BLOCKS = Metric(
    name="stretto_kv_blocks",
    kind="gauge",
    help="All blocks of KV cache.",
    labels=("model",),
    panels=(Panel(row=LOAD, title="KV blocks", queries=_value("all")),),
)
OPEN = Metric(
    name="stretto_open_requests",
    kind="gauge",
    help="Requests being answered.",
    panels=(Panel(row=WORKER, title="Open requests", queries=_value("open", "")),),
)
READY = Metric(
    name="stretto_engine_ready",
    kind="gauge",
    help="1 while the engine takes requests.",
    panels=(Panel(row=WORKER, title="Engine ready", queries={"{{instance}}": SELF}),),
    alerts=(
        Alert(
            name="StrettoEngineDown",
            when=f"{SELF} == 0",
            minutes=2,
            severity="critical",
            summary="the engine takes no requests",
            do="Its log says why it ended or what it waits for.",
        ),
    ),
)
DRAINING = Metric(name="stretto_draining", kind="gauge", help="1 while the worker shuts down.")
RESTARTS = Metric(
    name="stretto_engine_restarts",
    kind="counter",
    help="Times the engine process was started again.",
    panels=(Panel(row=WORKER, title="Engine restarts", queries={"{{instance}}": SELF}),),
    alerts=(
        Alert(
            name="StrettoEngineRestarted",
            when=f"increase({SELF}[15m]) > 0",
            minutes=0,
            severity="warning",
            summary="the engine process died and was started again",
            do="Open streams ended in an error. Its log has the exit code: was it out of memory?",
        ),
    ),
)
BUILD = Metric(
    name="stretto_build_info",
    kind="gauge",
    help="Always 1; the labels say what runs.",
    labels=("version", "python"),
)
METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
