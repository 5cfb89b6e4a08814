"""The types that all of Stretto shares: requests, their options, tokens, and the state of engine and worker.

They are frozen, because they cross process and package boundaries. They know no tensor and no wire format.
Times are seconds of the machine's monotonic clock unless a name ends in `_ms`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct, field, json, structs

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "tool_calls"]
INT32_MAX = 2**31 - 1
# The most characters of a grammar's source.
LONGEST_GRAMMAR: dict[GrammarKind, int] = {
    "regex": 2**12,
    "choice": 2**17,
    "json_schema": 2**17,
    "tool_calls": 2**18,
}
# The range of each sampling option, for the wire types and for `Sampling`. msgspec reads a Meta by itself.
BOUNDS: dict[str, Meta] = {
    "max_tokens": Meta(ge=0, le=INT32_MAX),
    "min_tokens": Meta(ge=0, le=INT32_MAX),
    "temperature": Meta(ge=0, le=100),
    "top_p": Meta(gt=0, le=1),
    "top_k": Meta(ge=0, le=INT32_MAX),
    "min_p": Meta(ge=0, le=1),
    "repetition_penalty": Meta(ge=0.01, le=100),  # less would overflow a logit
    "frequency_penalty": Meta(ge=-2, le=2),
    "presence_penalty": Meta(ge=-2, le=2),
    "logit_bias": Meta(ge=-100, le=100),
    "logprobs": Meta(ge=0, le=20),
    "prompt_logprobs": Meta(ge=0, le=20),
    "n": Meta(ge=1, le=INT32_MAX),
}
# The same as numbers, which each request is checked by: lowest, highest, and what a value must be above.
_RANGES = tuple(
    (name, (each.ge if each.gt is None else each.gt) or 0.0, each.le or 0.0, each.gt)
    for name, each in BOUNDS.items()
    if name != "logit_bias"
)
Milliseconds = Annotated[float, Meta(gt=0, le=86_400_000)]
QualityFloor = Annotated[float, Meta(ge=0, le=1)]
Preference = Literal["quality", "energy", "latency"]  # what a choice among variants that are on time is by
# Why a variant answers. `best`: no other is better by the preference. `deadline`: better ones would be late.
# `floor`: better ones are below `min_quality`. `load`: better ones take machine time that others need more.
# `below_floor`, `late`: none keeps both the deadlines and the floor. `moved`: the one chosen first would have
# been late after all. `no_forecast`: nothing is known of the queues, as under the schedule fcfs.
# `read_ahead`: it has read the text while it was typed, and no other is sure to be better.
# `explored`: feedback was drawn on a variant that is perhaps as good as the best. `cascade`: it began and was
# sure of every token. `unsure`: the variant that began was not sure of a token.
VariantReason = Literal[
    "best",
    "deadline",
    "floor",
    "load",
    "read_ahead",
    "explored",
    "below_floor",
    "late",
    "moved",
    "cascade",
    "unsure",
    "no_forecast",
]


# Why a model goes on with the sequence of another one. `moved`: it would have been late there. `unsure`: the
# other was not sure of the next token.
MoveReason = Literal["moved", "unsure"]


class Grammar(Struct, frozen=True):
    """A grammar that an answer must follow.

    `source`: a JSON schema, a regex, a JSON list of choices, or for `tool_calls` a JSON `CallGrammar`.
    """

    kind: GrammarKind
    source: str = ""

    @property
    def label(self) -> str:
        """The name of the kind in messages for users."""
        return self.kind.replace("json_", "JSON ").replace("tool_calls", "schema of a tool")


class CallGrammar(Struct, frozen=True):
    """Free text with calls in it, each held to its schema.

    `rules` are in the Lark dialect of llguidance and begin with `start`. `marks`: for each rule `mark_N`,
    which is not in `rules`, the ids of the special tokens that match it. `calls`: the rules of single calls.
    """

    rules: str
    marks: list[list[int]]
    calls: list[str]


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn. The engine applies all options except `stop` and `n`, which its clients apply.

    `top_k = 0` means no limit, and `max_tokens = None` only that of the context. `max_tokens = 0` computes
    the prompt and draws nothing: its full blocks stay in the prefix cache. `logprobs = k` reports the chosen
    token and the k likeliest; 0 reports only the chosen one. `prompt_logprobs` does so for the tokens of the
    prompt after the first; the prompt is then computed anew, whatever the prefix cache holds. Raises
    ValueError for a wrong value.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict[int, float])
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, low, high, above in _RANGES:
            value = getattr(self, name)
            if value is not None and (not low <= value <= high or value == above):
                raise _beyond(name, value, BOUNDS[name])
        bounds = BOUNDS["logit_bias"]
        for token, bias in self.logit_bias.items():
            if not (bounds.ge or 0.0) <= bias <= (bounds.le or 0.0):
                raise _beyond(f"logit_bias[{token}]", bias, bounds)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        # Requests have signed 64-bit seeds. The k-th answer to one has seed + k, which may be larger.
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be from -2^63 to 2^64 - 1, not {self.seed}")
        if "" in self.stop:
            raise ValueError("stop must not hold an empty string: it would end every answer at once")

    @property
    def least_tokens(self) -> int:
        """The tokens for which the context must have room: all that are asked for, or one."""
        return 1 if self.max_tokens is None else self.max_tokens

    def fan_out(self) -> tuple[Sampling, ...]:
        """One sampling for each of the `n` answers. With a seed, answer k (from 0) has `seed + k`."""
        if self.n == 1:
            return (self,)
        if self.seed is None:
            return (structs.replace(self, n=1),) * self.n
        return tuple(structs.replace(self, n=1, seed=self.seed + index) for index in range(self.n))


def _beyond(name: str, value: float, bounds: Meta) -> ValueError:
    low, how = (bounds.ge, "from") if bounds.gt is None else (bounds.gt, "above")
    return ValueError(f"{name} must be {how} {low} to {bounds.le}, not {value}")


class Objective(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The latency and quality that a request needs. None: no limit of that kind.

    `min_quality`: the least share of right answers that is expected, with 95 % confidence, of the variant
    that answers.
    """

    ttft_ms: Milliseconds | None = None
    itl_ms: Milliseconds | None = None
    total_ms: Milliseconds | None = None
    min_quality: QualityFloor | None = None
    on_miss: Literal["degrade", "reject", "late"] = "degrade"

    @property
    def timed(self) -> bool:
        """Whether it sets any deadline."""
        return (self.ttft_ms, self.itl_ms, self.total_ms) != (None, None, None)


def cache_salt(*parts: str | None) -> str:
    """The key that, beside the tenant, keeps the cached prompts of different users apart."""
    return json.encode(parts).decode() if any(part is not None for part in parts) else ""


def is_about(salt: str, subject: str) -> bool:
    """Whether a salt has the subject among its parts."""
    return bool(salt) and subject in json.decode(salt, type=list[str | None])


class Cascade(Struct, frozen=True):
    """A better model, which goes on with an answer as soon as the one that began it is not sure of a token:
    when the log-probability of the likeliest token is less than `below`. It has the same tokenizer."""

    model: str
    below: float


class Request(Struct, frozen=True, kw_only=True):
    """One sequence to run. Its maker has validated it for the model.

    `emitted` are output tokens that another worker generated before it failed. The sequence goes on after
    them: `sampling` counts them, and token k of the answer has the same random number on every worker.

    `spare_time`: it has no objective, runs only in time that no other request needs, and makes none wait.
    `cached`: tokens of its prompt that its maker expects in the prefix cache; only predictions before the
    engine use it, which looks itself.
    `admitted`: its maker has asked admission, so the schedule does not ask again.
    `expected_tokens`: of its answer, as its maker expects; 0: as is usual for its tier.
    """

    id: int
    model: str
    prompt: tuple[int, ...]
    arrival: float
    sampling: Sampling = Sampling()
    task: Literal["generate", "embed"] = "generate"
    tenant: str = "local"
    salt: str = ""
    objective: Objective = Objective(on_miss="late")  # without an objective it is never refused
    tier: str = "default"
    emitted: tuple[int, ...] = ()
    spare_time: bool = False
    cached: int = 0
    admitted: bool = False
    expected_tokens: int = 0
    request_id: str = ""  # of the HTTP request, for log lines
    # Models that may answer in place of `model` if it would be late, the best first. They have its tokenizer.
    lighter: tuple[str, ...] = ()
    cascade: Cascade | None = None


class Reason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    INVALID = "invalid"  # the model cannot run this request; `Finish.error` says why
    DEADLINE = "deadline"
    REFUSED = "refused"
    ERROR = "error"


class Finish(Struct, frozen=True, array_like=True):
    """The end of a sequence."""

    reason: Reason
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    queue_ms: float  # from arrival to its first step
    stop_token: int | None = None  # the token that ended it
    error: str | None = None
    preemptions: int = 0
    late: bool = False  # whether a token missed its deadline
    retry_after: float | None = None  # of a refusal: seconds after which to try again


class Logprobs(Struct, frozen=True, array_like=True):
    """Natural-log probability of the chosen token, and of the likeliest ones, best first.

    `rank`: how many tokens are at least as likely as the chosen one. Only a prompt's tokens have it.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class TokenJoules(NamedTuple):
    """The energy of a token of a prompt and of one of an answer, in joules, and how it is known."""

    prompt: float
    output: float
    source: str


class Moved(Struct, frozen=True, array_like=True, gc=False):
    """The model that runs a sequence after its first `after` tokens, and why it does."""

    model: str
    after: int
    why: MoveReason


class Began(Struct, frozen=True, array_like=True, gc=False):
    """How a sequence started. The first token after a move has it again."""

    queue_ms: float  # from arrival to its first step
    cached_tokens: int  # of its prompt
    forecast_ms: float | None = None  # the `queue_ms` that was predicted when the request was sent
    prompt_logprobs: tuple[Logprobs, ...] | None = None  # of its prompt's tokens after the first
    moved: Moved | None = None  # since the last token, if it did


class TokenEvent(Struct, frozen=True, array_like=True, gc=False):
    """One token of a sequence, or its end, or both.

    The token that ends a sequence (EOS) arrives as `finish.stop_token`, with `token = None`. The first token
    has `began`, and so has the first one after a move.
    """

    id: int
    token: int | None = None
    logprobs: Logprobs | None = None
    finish: Finish | None = None
    embedding: tuple[float, ...] | None = None
    began: Began | None = None


class StepStats(Struct, frozen=True, array_like=True):
    """The content and the duration of one step.

    It verified `proposed` draft tokens and accepted `accepted` of them, which `decode_tokens` includes.
    """

    model: str
    started: float
    ms: float
    decode_tokens: int
    prefill_tokens: int
    context_tokens: int
    running: int
    waiting: int
    blocks_free: int
    blocks_total: int
    preempted: int = 0
    predicted_ms: float | None = None
    proposed: int = 0
    accepted: int = 0


class QueueState(Struct, frozen=True, array_like=True):
    """What one model runs and holds at one moment: sequences and blocks of its KV cache."""

    running: int
    waiting: int
    blocks_free: int
    blocks_total: int


EngineState = Literal["loading", "ready", "stalled", "restarting", "failing"]


class EngineHealth(Struct, frozen=True, kw_only=True):
    """The state of the engine process, as `/health` shows it.

    `loading`: its models are being loaded. `ready`: it takes requests. `stalled`: it does not respond.
    `restarting`: it ended, and is about to be started again. `failing`: so many starts in a row (`failures`)
    have failed that somebody should look; it is tried on. `reason` is one sentence, empty when it is ready.
    """

    state: EngineState
    reason: str = ""
    restarts: int = 0
    failures: int = 0


class ModelInfo(Struct, frozen=True, kw_only=True):
    """A loaded model. `kernels` names the kernels that compute it, and the reason; `kv_why` is the reason for
    the size of its KV cache. `revision` changes when the checkpoint does. `usual_tokens`: of a long answer,
    as a ladder measured it; 0: unknown."""

    name: str
    path: str
    family: str
    dtype: str
    quantise: str | None = None
    device: str
    context: int
    vocab: int
    parameters: int
    weight_bytes: int
    kv_bytes: int
    block_size: int
    blocks: int
    load_s: float
    kernels: str = ""
    kv_why: str = ""
    usual_tokens: int = 0
    revision: str = ""


class WorkerState(Struct, frozen=True, kw_only=True):
    """The state of a worker: the response of `/state`, and the input of routing."""

    ready: bool
    draining: bool
    uptime_s: float
    engine_pid: int | None
    engine_restarts: int
    models: tuple[ModelInfo, ...]
    active: int
    running: int
    waiting: int
    blocks_free: int
    blocks_total: int
    steps: int
    schedule: str = ""
    objectives: dict[str, Objective] = {}  # of each tier, for requests that name none
    last_step: StepStats | None = None
