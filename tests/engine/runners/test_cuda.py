"""The engine with the CUDA runner, which launches a step before the host has read the previous one.

On a GPU every family is tested. Without one, two families run in Triton's interpreter, and the runner
executes each step instead of replaying a graph.
"""

# torch's stubs do not type `tolist` and `norm`, and pytest's patches take lambdas.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportArgumentType=false
from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from stretto.config import EngineConfig, ModelConfig
from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.factory import ModelLoader
from stretto.engine.runners.graphs import StepSize, first_sizes, rows_for
from stretto.engine.scheduler.fcfs import fcfs
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence
from stretto.kernels import Activation, AnyKernels
from stretto.kernels.reference import REFERENCE, DenseExperts
from stretto.models.decoder import Decoder
from stretto.models.load import load
from stretto.models.spec import Routing
from stretto.types import Reason, Request, Sampling
from tests.engine.runners.cuda_bench import (
    LAYERS,
    OUTPUT,
    PROMPTS,
    Bench,
    Counting,
    DeviceDriver,
    bench,
    events,
)
from tests.kernels.cuda import DEVICE, GPU
from tests.models.checkpoints import FAMILIES, VOCAB, expected, make

from stretto.engine.runners import cuda  # isort: skip
from stretto.kernels.cuda import table as cuda_table  # isort: skip
from stretto.kernels.cuda.experts import FEW_TOKENS  # isort: skip
from stretto.kernels.cuda.hopper.gated import LEAST_ROWS  # isort: skip
from stretto.kernels.cuda.launch import is_loading  # isort: skip
from stretto.kernels.cuda.table import table  # isort: skip

__all__ = ["bench", "events"]
pytestmark = [pytest.mark.cuda] if GPU else []

# All experts are used, so that rounding cannot choose between two that are nearly equal.
EXPERTS = {"mixtral": 4, "qwen3_moe": 6}
# The interpreter is slow, so it runs one layer of two families.
CHOSEN = FAMILIES if GPU else ["qwen3", "mixtral"]


@pytest.mark.parametrize("family", CHOSEN)
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    """A GPU is compared in bfloat16 with the float32 reference. Texts are read whole, in chunks and token by
    token. The weights are small enough that plain torch in bfloat16 also stays within the tolerance."""
    dtype, tolerance = (torch.bfloat16, 2e-2) if GPU else (torch.float32, 1e-4)
    every = {"num_experts_per_tok": EXPERTS[family]} if family in EXPERTS else {}
    model = make(family, tmp_path, dtype=dtype, initializer_range=0.06, **every, **LAYERS)
    decoder = load(tmp_path, dtype=dtype, device=DEVICE, kernels=table(DEVICE))
    tokens = [3 + 7919 * i % (VOCAB - 3) for i in range(50 if GPU else 14)]
    wanted = expected(model, tokens)
    for chunk in (len(tokens), 9, 1) if GPU else (13,):
        found = DeviceDriver(decoder).read(tokens, chunk).cpu()
        assert torch.isfinite(found).all()
        assert (found - wanted).norm() / wanted.norm() <= tolerance


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter knows no FP8")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_that_the_kernel_before_quantises_are_as_exact_as_those_quantised_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
    model = make(family, tmp_path, dtype=torch.bfloat16, initializer_range=0.06, **sizes)
    decoder = load(tmp_path, dtype=torch.bfloat16, device=DEVICE, kernels=table(DEVICE, "fp8"))
    tokens = [3 + 7919 * i % (VOCAB - 3) for i in range(100)]
    wanted = expected(model, tokens)
    fused = DeviceDriver(decoder).read(tokens, len(tokens)).cpu()
    monkeypatch.setattr(cuda_table, "SKINNY_ROWS", 1000)
    alone = DeviceDriver(decoder).read(tokens, len(tokens)).cpu()
    assert not torch.equal(fused, alone), "both took the same path"
    errors = [float((found - wanted).norm() / wanted.norm()) for found in (fused, alone)]
    assert errors[0] <= 1.2 * errors[1] <= 0.3


@pytest.mark.parametrize("quantise", ["fp8", "int4"])
def test_a_quantised_mixture_of_experts_is_near_its_rounded_weights(
    quantise: cuda_table.CudaQuantise, tmp_path: Path
) -> None:
    """One token at a time, activations are not rounded. In a chunk they are, in int4 where there is fp8."""
    dtype = torch.bfloat16 if GPU else torch.float32
    changes = {"num_experts_per_tok": 6, "mlp_only_layers": [], **LAYERS}
    make("qwen3_moe", tmp_path, dtype=dtype, initializer_range=0.06, **changes)
    narrow = table(DEVICE, quantise)

    def rounded(gate_up: Tensor, down: Tensor, activation: Activation) -> DenseExperts:
        return narrow.pack_experts(gate_up, down, activation).widened(dtype)

    def loaded(kernels: AnyKernels) -> DeviceDriver:
        return DeviceDriver(load(tmp_path, dtype=dtype, device=DEVICE, kernels=kernels))

    tokens = [3 + 7919 * i % (VOCAB - 3) for i in range(30 if GPU else FEW_TOKENS + 1)]
    reference, own = loaded(replace(REFERENCE, pack_experts=rounded)), loaded(narrow)
    for count, chunk, tolerance in ((2, 1, 2e-2 if GPU else 1e-4), (len(tokens), len(tokens), 6e-2)):
        found, wanted = (each.read(tokens[:count], chunk).cpu() for each in (own, reference))
        assert torch.isfinite(found).all()
        assert (found - wanted).norm() / wanted.norm() <= tolerance


@pytest.mark.parametrize("family", CHOSEN if GPU else [])
def test_greedy_tokens_equal_transformers_batched_chunked_cached_and_preempted(
    family: str, tmp_path: Path
) -> None:
    model = make(family, tmp_path)
    made = Bench(tmp_path)
    alone = [made.run(made.engine(), [prompt])[0] for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        logits = expected(model, prompt + answer)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert made.run(made.engine(), PROMPTS) == alone
    assert made.run(made.engine(step_tokens=7), PROMPTS) == alone
    engine = made.engine()
    assert made.run(engine, PROMPTS) == made.run(engine, PROMPTS) == alone
    assert made.run(made.engine(blocks=20, step_tokens=16), PROMPTS) == alone
    assert sum(step.preempted for step in made.steps) > 0


def test_answers_do_not_depend_on_the_batch(bench: Bench) -> None:
    """Greedy, device-sampled and host-sampled requests run alone, in one batch and with preemption."""
    samplings: list[dict[str, object]] = [
        {"temperature": 1.3, "top_p": 0.9, "seed": 11},
        {"repetition_penalty": 1.5, "logprobs": 2},
        {},
        {"temperature": 0.8, "top_k": 20, "seed": 5},
        {"min_tokens": 2, "temperature": 1.0, "seed": 3},
    ]
    alone = [bench.run(bench.engine(), [p], samplings[i])[0] for i, p in enumerate(PROMPTS)]
    assert all(len(answer) == OUTPUT for answer in alone)
    assert bench.run(bench.engine(), PROMPTS, *samplings[: len(PROMPTS)]) == alone
    reported = [event for event in bench.events if event.logprobs is not None]
    assert len(reported) == OUTPUT and all(event.id == 1 for event in reported)
    if GPU:
        assert bench.run(bench.engine(blocks=20, step_tokens=7), PROMPTS, *samplings) == alone


def test_the_tokens_of_prompts_are_scored_beside_others(bench: Bench) -> None:
    """In chunks, beside a stream, with the prompt in the cache: the same scores as in one step."""
    prompts = [PROMPTS[1], PROMPTS[0]]

    def scores(engine: EngineCore, *samplings: dict[str, object]) -> list[float]:
        bench.run(engine, prompts, *samplings)
        (began,) = [event.began for event in bench.events if event.id == 0 and event.began is not None]
        assert began.prompt_logprobs is not None and len(began.prompt_logprobs) == len(prompts[0]) - 1
        assert all(score.rank is not None and len(score.top) == 2 for score in began.prompt_logprobs)
        return [score.chosen for score in began.prompt_logprobs]

    wanted: list[dict[str, object]] = [{"prompt_logprobs": 2}, {}]
    engine = bench.engine()
    whole = scores(engine, *wanted)
    tolerance = 0.05 if GPU else 1e-4
    assert scores(engine, {"prompt_logprobs": 2, "max_tokens": 0}, {}) == pytest.approx(whole, abs=tolerance)
    assert scores(bench.engine(step_tokens=7), *wanted) == pytest.approx(whole, abs=tolerance)
    assert max(whole) < 0


PENALISED: list[dict[str, object]] = [
    {"repetition_penalty": 1.8, "ignore_eos": True},
    {"frequency_penalty": 0.9, "presence_penalty": 0.4, "ignore_eos": True},
    {"repetition_penalty": 0.6, "temperature": 0.9, "seed": 4, "ignore_eos": True},
]


def test_penalties_on_the_device_equal_those_on_the_host(bench: Bench) -> None:
    """Logprobs make the host sample. Preemption makes the device rebuild its token histories."""
    wanted = [
        bench.run(bench.engine(), [p], a | {"logprobs": 0})[0]
        for p, a in zip(PROMPTS, PENALISED, strict=False)
    ]
    assert bench.run(bench.engine(), PROMPTS[: len(PENALISED)], *PENALISED) == wanted
    if GPU:
        assert bench.run(bench.engine(blocks=20, step_tokens=7), PROMPTS[:3], *PENALISED) == wanted


def test_steps_are_padded_to_graphs_and_none_is_captured_while_serving(bench: Bench) -> None:
    """After the start a graph holds every step, and more graphs in spare time change no answer."""
    samplings: list[dict[str, object]] = [{}, {"temperature": 1.1, "seed": 7}, {"repetition_penalty": 1.5}]
    wanted = bench.run(bench.engine(step_tokens=16), PROMPTS[:3], *samplings)
    engine = bench.engine(step_tokens=16)
    runner = engine.models["m"].runner
    assert isinstance(runner, Counting)
    loads, step = set[bool](), runner._step  # pyright: ignore[reportPrivateUsage]

    def spied(*given: Any, **options: Any) -> Any:
        loads.add(is_loading())
        return step(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_step", spied)
        runner.start()
    assert loads == {False, True} and not is_loading(), (
        "products are measured while kernels load, not captured"
    )
    ready = runner.captures
    assert ready == 7, "decodes of 1, 2, 4, 8, 12 and 16 rows, and 16 tokens of any"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_allocate", lambda size: pytest.fail(f"no graph holds {size}"))
        assert bench.run(engine, PROMPTS[:3], *samplings) == wanted
    assert runner.captures == ready
    assert runner.prepare() and runner.captures == ready + 1
    assert bench.run(engine, PROMPTS[:1]) == wanted[:1]


@pytest.mark.parametrize("most_tokens", [LEAST_ROWS, 700, 8192])
@pytest.mark.parametrize("routed", [False, True])
def test_the_start_compiles_what_only_longer_steps_use(
    bench: Bench, most_tokens: int, routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing = Routing(count=4, top_k=2, normalise=True, intermediate=8) if routed else None
    decoder, compiled = bench.decoder, list[StepSize]()
    spec = structs.replace(decoder.spec, routing=routing)
    monkeypatch.setattr(bench, "decoder", Decoder(spec, decoder.kernels, decoder.weights, decoder.kv_dtype))
    runner = bench.runner(step_tokens=most_tokens)
    monkeypatch.setattr(runner, "_step", lambda memory, abridged: compiled.append(memory.size))
    monkeypatch.setattr(runner, "_capture_first", lambda progress, times: None)
    runner.start()
    prompts = {size.tokens for size in compiled if not size.decodes}
    assert prompts & {*range(LEAST_ROWS, most_tokens + 1)}, "gated products are other kernels from here on"
    assert max(prompts) == (1024 if routed and most_tokens > 1024 else LEAST_ROWS)
    decodes = {size for size in first_sizes(rows_for(6), most_tokens) if size.decodes}
    assert decodes and decodes <= {*compiled}


def test_a_graph_that_cannot_be_captured_later_is_done_without(bench: Bench) -> None:
    runner = bench.engine(step_tokens=16).models["m"].runner
    assert isinstance(runner, Counting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_prepare", lambda size: raise_(torch.OutOfMemoryError("no memory")))
        assert not runner.prepare()
    assert not runner.prepare() and runner.captures == 0


def raise_(error: Exception) -> None:
    raise error


def test_a_step_is_launched_before_the_previous_one_is_read(bench: Bench) -> None:
    engine = bench.engine()
    runner = engine.models["m"].runner
    calls: list[str] = []
    launch, wait = runner.launch, cuda.Launched.wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "launch", lambda plan: (calls.append("launch"), launch(plan))[1])
        patch.setattr(cuda.Launched, "wait", lambda self: (calls.append("wait"), wait(self))[1])
        bench.run(engine, PROMPTS[:1])
        assert calls == ["launch", *["launch", "wait"] * (OUTPUT - 1), "wait"]
        calls.clear()
        bench.run(engine, PROMPTS[:1], {"frequency_penalty": 0.5})
        assert calls == ["launch", *["launch", "wait"] * (OUTPUT - 1), "wait"], "its history is on the device"
        calls.clear()
        bench.run(engine, PROMPTS[:1], {"logprobs": 0})
        assert calls == ["launch", "wait"] * OUTPUT, "the host draws"


def test_no_token_follows_the_end_of_an_answer(bench: Bench) -> None:
    """The next step is already running when the host reads the last token."""
    answer = bench.run(bench.engine(), PROMPTS[:1])[0]
    assert bench.run(bench.engine(eos=answer[1]), PROMPTS[:1]) == [answer[: answer.index(answer[1])]]
    ends = [event.finish for event in bench.events if event.finish is not None]
    assert [end.reason for end in ends] == [Reason.STOP]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns about the NaN that the test puts in.
def test_embeddings_are_unit_vectors_and_a_sequence_with_nan_fails_alone(tmp_path: Path) -> None:
    make("llama", tmp_path, **LAYERS)
    bench = Bench(tmp_path)
    engine = bench.engine()
    sound = bench.run(engine, PROMPTS[:1])[0]
    poison = next(token for token in range(VOCAB) if token not in [*PROMPTS[0], *sound])
    bench.decoder.weights.embedding[poison] = torch.inf
    bench.events.clear()
    tasks = {0: (PROMPTS[0], "generate"), 1: ([5, poison, 6], "generate"), 2: (PROMPTS[1], "embed")}
    for ident, (prompt, task) in tasks.items():
        sampling = Sampling(max_tokens=OUTPUT, temperature=0.0)
        request = Request(
            id=ident, model="m", prompt=tuple(prompt), arrival=0.0, sampling=sampling, task=task  # type: ignore[arg-type]
        )  # fmt: skip
        engine.submit(Sequence.of(request, 256))
    while engine.step() or not engine.idle:
        engine.check()
    ends = {event.id: event.finish.reason for event in bench.events if event.finish is not None}
    assert ends == {0: Reason.LENGTH, 1: Reason.ERROR, 2: Reason.STOP}
    assert [event.token for event in bench.events if event.id == 0 and event.token is not None] == sound
    (vector,) = [event.embedding for event in bench.events if event.embedding is not None]
    assert torch.tensor(vector).norm().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_an_engine_built_for_a_gpu_gives_the_greedy_tokens_of_transformers(tmp_path: Path) -> None:
    model = make("llama-3", tmp_path)
    config = EngineConfig(models=(ModelConfig(name="m", path=str(tmp_path)),), device="cuda", kv_bytes=2**24)
    (runner,) = ModelLoader(config).runners
    assert isinstance(runner, cuda.CudaRunner) and runner.info.device == "cuda"
    assert runner.info.kv_bytes <= 2**24
    made = Bench.__new__(Bench)
    made.events, made.steps = [], []
    limits = Limits(config.max_running, 512)
    engine = EngineCore(
        [LoadedModel(runner)], limits=limits, schedule=fcfs, clock=time.monotonic, emit=made.on_events
    )
    for prompt, answer in zip(PROMPTS, made.run(engine, PROMPTS, {"ignore_eos": True}), strict=True):
        logits = expected(model, prompt + answer)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
