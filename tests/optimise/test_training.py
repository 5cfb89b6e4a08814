"""Training: snapshots, the gain of distillation and of healing, and low-rank updates."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stretto.errors import StartError
from stretto.ladder.registry import weight_digests
from stretto.optimise.answers import AnswerOptions, Encoded, generate
from stretto.optimise.data import right
from stretto.optimise.distil import distil
from stretto.optimise.finetune import finetune
from stretto.optimise.job import StepJob, load_decoder
from stretto.optimise.prune import prune
from stretto.optimise.recipe import DistilStep, FinetuneStep, PruneStep
from stretto.optimise.training.batches import TrainingRow, batch_of, chosen, shortened
from tests.optimise import tiny
from tests.optimise.conftest import Workshop

SEEDS = (0, 1, 2)


def accuracy(job: StepJob, path: Path) -> float:
    """The share of right answers on the test split."""
    samples = job.corpus.test
    answers = generate(
        load_decoder(path, torch.device("cpu")),
        [job.codec.prompt(each) for each in samples],
        job.generation(),
    )
    good = [right(each, job.codec.text.decode(ids)) for each, ids in zip(samples, answers, strict=True)]
    return sum(good) / len(good)


def test_the_tiny_model_knows_its_tasks(workshop: Workshop) -> None:
    assert accuracy(workshop.job("known"), workshop.model) > 0.95


def test_a_student_of_the_teacher_beats_the_same_size_from_scratch(workshop: Workshop) -> None:
    """The same number of steps, batch and rate, with three seeds."""
    steps = 80
    options: dict[str, Any] = {"batch": 32, "rate": 2e-3}
    taught: list[float] = []
    alone: list[float] = []
    for seed in SEEDS:
        job = workshop.job(f"distil {seed}", seed=seed)
        distil(job, DistilStep(name="s", layers=2, steps=steps, on_policy_steps=0, **options))
        taught.append(accuracy(job, job.made))
        random = tiny.checkpoint(workshop.folder / f"random {seed}", seed=seed, layers=2)
        other = workshop.job(f"scratch {seed}", parent=random, seed=seed)
        finetune(other, FinetuneStep(name="s", steps=steps, **options))
        alone.append(accuracy(other, other.made))
    assert min(taught) > max(alone)


def test_a_healed_model_beats_the_same_cut_unhealed_and_the_same_size_from_scratch(
    workshop: Workshop,
) -> None:
    options: dict[str, Any] = {"batch": 32, "rate": 1e-3}
    sizes = {"layers": 1, "intermediate": 64}
    unhealed = workshop.job("unhealed")
    prune(unhealed, PruneStep(name="p", heal_steps=0, **sizes, **options))
    before = accuracy(unhealed, unhealed.made)
    for seed in SEEDS:
        job = workshop.job(f"healed {seed}", seed=seed)
        prune(job, PruneStep(name="p", heal_steps=60, **sizes, **options))
        random = tiny.checkpoint(workshop.folder / f"pruned {seed}", seed=seed, **sizes)
        other = workshop.job(f"prune scratch {seed}", parent=random, seed=seed)
        finetune(other, FinetuneStep(name="s", steps=60, **options))
        healed = accuracy(job, job.made)
        assert healed > before + 0.1
        assert healed > accuracy(other, other.made) + 0.1


@pytest.mark.parametrize("by", ["kl", "block_influence"])
def test_a_layer_that_does_nothing_is_the_first_to_go(workshop: Workshop, tmp_path: Path, by: str) -> None:
    """A model whose third layer adds nothing loses that layer, and answers as before."""
    idle = tmp_path / "idle"
    make_idle(workshop.model, idle, layer=2)
    job = workshop.job(f"idle {by}", parent=idle)
    prune(job, PruneStep(name="p", layers=3, heal_steps=0, by="kl" if by == "kl" else "block_influence"))
    prompts = [job.codec.prompt(sample) for sample in job.corpus.test[:40]]
    before, after = (
        generate(load_decoder(path, torch.device("cpu")), prompts, job.generation())
        for path in (idle, job.made)
    )
    assert before == after


def make_idle(source: Path, target: Path, layer: int) -> None:
    """Copy a checkpoint with one layer that adds nothing to the residual stream."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def test_the_better_of_two_stages_is_kept(workshop: Workshop) -> None:
    """A ruinous on-policy stage is thrown away."""
    job = workshop.job("stages")
    step = DistilStep(name="s", layers=3, steps=30, batch=32, rate=1e-3, on_policy_steps=3)
    report = distil(job, step)
    kept = report["on_policy"] if report["kept"] == "online" else report["offline"]
    assert kept == max(report["on_policy"], report["offline"])


def test_the_weights_of_tasks_decide_what_is_learnt(workshop: Workshop) -> None:
    """A task of weight 0 is not learnt, and the others are."""
    random = tiny.checkpoint(workshop.folder / "weighted", layers=2)
    job = workshop.job("weighted", parent=random)
    finetune(job, FinetuneStep(name="w", steps=150, batch=32, rate=3e-3, weights={"max": 0, "last": 0}))
    shares: dict[str, float] = {}
    for task in tiny.TASKS:
        samples = [sample for sample in job.corpus.test if sample.task == task]
        decoder = load_decoder(job.made, torch.device("cpu"))
        answers = generate(decoder, [job.codec.prompt(sample) for sample in samples], job.generation())
        good = [right(s, job.codec.text.decode(ids)) for s, ids in zip(samples, answers, strict=True)]
        shares[task] = sum(good) / len(good)
    assert shares["first"] > 0.8
    assert shares["last"] < 0.5 and shares["max"] < 0.6


def test_a_step_without_peft_says_what_to_install(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(StartError, match=r"pip install 'stretto\[optimise\]'"):
        finetune(workshop.job("no peft"), FinetuneStep(name="l", method="lora", steps=1))


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_low_rank_update_is_merged_into_the_weights(workshop: Workshop) -> None:
    job = workshop.job("lora")
    finetune(job, FinetuneStep(name="l", method="lora", steps=20, batch=32, rate=1e-3, rank=4))
    before, after = (load_file(path / "model.safetensors") for path in (workshop.model, job.made))
    assert before.keys() == after.keys()
    assert not torch.equal(*(held["model.layers.1.mlp.up_proj.weight"] for held in (before, after)))
    assert torch.equal(*(held["model.embed_tokens.weight"] for held in (before, after)))
    change = after["model.layers.1.mlp.up_proj.weight"] - before["model.layers.1.mlp.up_proj.weight"]
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) <= 4
    assert accuracy(job, job.made) > 0.95


def test_the_same_seed_gives_the_same_weights(workshop: Workshop) -> None:
    digests: list[dict[str, str]] = []
    for name, seed in (("first", 5), ("second", 5), ("third", 6)):
        job = workshop.job(f"seed {name}", seed=seed)
        finetune(job, FinetuneStep(name="s", steps=4, batch=8))
        digests.append(weight_digests(job.made))
    assert digests[0] == digests[1] != digests[2]


def test_every_row_is_in_each_epoch_once() -> None:
    for count, size in ((10, 3), (7, 7), (3, 8)):
        seen = [place for step in range(21) for place in chosen(count, size, step, seed=4)]
        for epoch in range(len(seen) // count):
            assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_batch_learns_the_tokens_of_replies_and_nothing_else() -> None:
    rows = [TrainingRow(Encoded([5, 6, 7, 8], 2), 2.0), TrainingRow(Encoded([1, 2], 1), 1.0, certain=False)]
    batch = batch_of(rows, torch.device("cpu"))
    assert batch.ids.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), strict=True)) == [
        (0, 1, 7),
        (0, 2, 8),
        (1, 0, 2),
    ]
    assert batch.weights.tolist() == pytest.approx([2 / 2**0.5, 2 / 2**0.5, 1.0])
    assert batch.certain.tolist() == [1.0, 1.0, 0.0]


def test_rows_are_cut_and_those_without_a_reply_are_dropped() -> None:
    rows = [TrainingRow(Encoded([1, 2, 3, 4], 3)), TrainingRow(Encoded([1, 2, 3, 4], 1))]
    assert [row.text.ids for row in shortened(rows, 3)] == [[1, 2, 3]]


def test_answers_are_those_of_one_prompt_at_a_time(workshop: Workshop) -> None:
    job = workshop.job("alone")
    decoder = load_decoder(workshop.model, torch.device("cpu"))
    prompts = [job.codec.prompt(sample) for sample in job.corpus.test[:40]]
    together = generate(decoder, prompts, job.generation())
    assert together == [generate(decoder, [prompt], job.generation())[0] for prompt in prompts]
    assert generate(decoder, [[2] * 64], job.generation()) == [[]]
    long = generate(decoder, [[2] * 60], AnswerOptions(50, 64, frozenset()))
    assert len(long[0]) == 4
