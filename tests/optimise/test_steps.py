"""A whole recipe on a tiny model: the ladder it makes, its resumption, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from stretto.config import EngineConfig
from stretto.engine.runners.factory import ModelLoader
from stretto.engine.step_time import StepCost
from stretto.errors import CheckpointError, StartError
from stretto.ladder import registry
from stretto.optimise import evaluate, recipe, steps
from stretto.optimise.steps import RunOptions, RunReport
from tests.ladder import tiny_ladder
from tests.optimise import tiny
from tests.optimise.conftest import Workshop

CHAIN: list[dict[str, Any]] = [
    {
        "step": "prune",
        "name": "pruned",
        "layers": 3,
        "intermediate": 96,
        "heal_steps": 60,
        "batch": 32,
        "rate": 1e-3,
    },
    {"step": "distil", "name": "small", "layers": 2, "intermediate": 64, "steps": 150, "on_policy_steps": 25}
    | {"batch": 32, "rate": 2e-3},
    {"step": "quantise", "name": "int8", "format": "int8"},
    {
        "step": "quantise",
        "name": "int4",
        "format": "int4",
        "max_kl": 1e-12,
        "exclude": 2,
    },
    {"step": "evaluate", "prompts": 150, "max_tokens": 4},
    {"step": "ladder"},
]


def run(folder: Path, parts: list[dict[str, Any]], out: Path, **options: Any) -> RunReport:
    data = {"model": "model", "data": "data.jsonl", "steps": parts}
    return steps.run(recipe.parse(data, "recipe"), RunOptions(out=out, folder=folder, **options))


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trained model and the data, as a recipe has them."""
    folder = tmp_path_factory.mktemp("recipe")
    shutil.copytree(workshop.model, folder / "model")
    shutil.copyfile(workshop.folder / "data.jsonl", folder / "data.jsonl")
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> RunReport:
    return run(folder, CHAIN, folder / "out")


def test_the_chain_makes_a_ladder_that_is_measured_and_checked(made: RunReport) -> None:
    out = Path(made.out)
    ladder = registry.load(out)
    assert ladder == made.ladder
    measured = {name.stem: json.loads(name.read_text()) for name in (out / "evaluation").glob("*.json")}
    assert set(measured) == {"full", "pruned", "small", "int8", "int4"}
    kept, dropped = {each.name for each in ladder.variants}, {each.name for each in ladder.dropped}
    assert kept | dropped == set(measured) and not kept & dropped
    assert ladder.top == "full" and ladder.variants[0].name == "full"
    assert measured["full"]["quality"]["mean"] > 0.9
    assert measured["full"]["kl"] < 1e-4 < measured["small"]["kl"]
    assert measured["small"]["bytes"] < 0.6 * measured["full"]["bytes"]
    assert measured["int4"]["bytes"] < measured["int8"]["bytes"] < measured["full"]["bytes"]
    for each in ladder.variants:
        assert set(each.tasks) == {"first", "last", "max"}
        assert set(each.tasks["max"]) == {"3", "4", "all"}
        assert each.quality.low <= each.quality.mean <= each.quality.high
        assert each.origin.versions["transformers"] and each.energy is not None
        (cost,) = each.times.values()
        assert cost.decodes(1, 64) > 0
    page = (out / "report.html").read_text()
    assert (
        "Frontier" in page
        and "Lineage" in page
        and "plotly" in page
        and "https://" not in page.split("<script>")[0]
    )


def test_excluded_matrices_are_recorded_and_lower_the_kl(made: RunReport) -> None:
    manifest = json.loads((Path(made.out) / "int4" / "manifest.json").read_text())
    assert len(manifest["exclude"]) == 2
    assert manifest["report"]["kl"] < manifest["report"]["kl_without_exclusions"]


def test_a_second_run_with_resume_keeps_everything(folder: Path, made: RunReport) -> None:
    before = (folder / "out" / "ladder.json").read_bytes()
    again = run(folder, CHAIN, folder / "out", resume=True)
    assert [each.status for each in again.steps if each.step != "evaluate"] == ["kept"] * 5
    assert (folder / "out" / "ladder.json").read_bytes() == before


def test_step_times_are_those_of_one_measurement_of_all_variants(
    folder: Path, made: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay on the same machine. On another one all are measured again, and answers stay."""
    out = folder / "timed"
    shutil.copytree(folder / "out", out)
    before, compared = json.loads((out / "step-times.json").read_text()), list[int]()
    assert set(before["costs"]) == {"full", "pruned", "small", "int8", "int4"}

    def compare(runs: list[Any], steps: list[Any]) -> list[StepCost]:
        compared.append(len(runs))
        return [StepCost(base=1.0 + place) for place in range(len(runs))]

    def elsewhere(config: EngineConfig) -> str:
        return "another machine"

    monkeypatch.setattr(evaluate, "calibrate_together", compare)
    run(folder, CHAIN, out, resume=True)
    assert not compared
    monkeypatch.setattr(evaluate, "machine_name", elsewhere)
    result = run(folder, CHAIN, out, resume=True)
    assert compared == [5] and result.usual_ms["full"] > 0
    assert result.ladder is not None
    for each in result.ladder.variants:
        assert list(each.times) == ["another machine"] and each.energy is not None
    assert (out / "evaluation" / "int8.json").read_bytes() == (
        folder / "out" / "evaluation" / "int8.json"
    ).read_bytes()


def test_variants_that_do_not_fit_together_are_timed_one_by_one(
    folder: Path, made: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, loads = folder / "large", list[int]()
    shutil.copytree(folder / "out", out)
    (out / "step-times.json").unlink()

    def loader(config: EngineConfig) -> ModelLoader:
        loads.append(len(config.models))
        if len(config.models) > 1:
            raise StartError("too little memory")
        return ModelLoader(config)

    monkeypatch.setattr(evaluate, "ModelLoader", loader)
    assert run(folder, CHAIN, out, resume=True).ladder is not None
    assert loads == [5, 1, 1, 1, 1, 1]


def test_a_changed_step_and_what_depends_on_it_are_made_again(folder: Path, made: RunReport) -> None:
    out = folder / "changed"
    shutil.copytree(folder / "out", out)
    parts = [dict(part) for part in CHAIN]
    parts[1]["steps"] = 5
    again = run(folder, parts, out, resume=True)
    status = {each.name: each.status for each in again.steps}
    assert status["small"] == "made"
    assert status["pruned"] == status["int8"] == status["int4"] == "kept"


def test_a_damaged_checkpoint_is_made_again(folder: Path, made: RunReport) -> None:
    out = folder / "damaged"
    shutil.copytree(folder / "out", out)
    weights = out / "small" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"checksum differs"):
        registry.load(_with_all(out))
    run(folder, CHAIN, out, resume=True)
    assert weights.read_bytes() == good


def _with_all(out: Path) -> Path:
    """The folder, with a ladder that has the variant `small` in any case."""
    data = json.loads((out / "ladder.json").read_text())
    if "small" not in {each["name"] for each in data["variants"]}:
        manifest = json.loads((out / "small" / "manifest.json").read_text())
        data["variants"].append(
            data["variants"][0] | {"name": "small", "path": "small", "files": manifest["files"]}
        )
        (out / "ladder.json").write_text(json.dumps(data))
    return out


def test_an_output_folder_that_is_not_empty_is_refused(folder: Path, made: RunReport) -> None:
    with pytest.raises(StartError, match="is not empty: go on with --resume"):
        run(folder, CHAIN, folder / "out")


class Interrupt(BaseException):
    """Stands for a kill."""


def interrupted(at: int) -> Callable[[str, int, int], None]:
    """A progress callback that interrupts its `at`-th call."""
    calls = iter(range(at))

    def progress(stage: str, done: int, total: int) -> None:
        if next(calls, None) is None:
            raise Interrupt

    return progress


SHORT: list[dict[str, Any]] = [
    {"step": "finetune", "name": "tuned", "steps": 6, "batch": 4},
    {"step": "prune", "name": "pruned", "from": "tuned", "layers": 3, "heal_steps": 5, "batch": 4},
    {
        "step": "distil",
        "name": "small",
        "from": "tuned",
        "layers": 2,
        "steps": 6,
        "on_policy_steps": 4,
        "batch": 4,
    },
    {"step": "quantise", "name": "int8", "from": "small"},
    {"step": "evaluate", "prompts": 10, "texts": 3, "max_tokens": 3},
    {"step": "ladder"},
]


def results(out: Path) -> dict[str, Any]:
    """All that must not depend on interruptions: weights, answers and figures without times."""
    manifests = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/manifest.json"))
    }
    measured = {
        path.stem: json.loads(path.read_text()) for path in sorted((out / "evaluation").glob("*.json"))
    }
    return {name: (each["files"], each["key"], each["exclude"]) for name, each in manifests.items()} | {
        f"{name} measured": [each[key] for key in ("key", "rights", "replies", "similar", "kl", "quality")]
        for name, each in measured.items()
    }


@pytest.fixture(scope="module")
def few(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with little data."""
    few = tmp_path_factory.mktemp("few")
    shutil.copytree(folder / "model", few / "model")
    tiny.write(few / "data.jsonl", tiny.lines(120))
    return few


def test_interruptions_anywhere_change_nothing(few: Path) -> None:
    run(few, SHORT, few / "whole", snapshot_s=0.0)
    wanted = results(few / "whole")
    assert len(wanted) == 10
    out = few / "broken"
    # Each attempt dies a few calls after the point where the one before it died, with and without snapshots.
    for attempt in range(200):
        try:
            snapshot_s = 0.0 if attempt % 2 else 1e9
            run(few, SHORT, out, resume=True, progress=interrupted(4 + attempt % 5), snapshot_s=snapshot_s)
            break
        except Interrupt:
            continue
    else:
        pytest.fail("the run never ended")
    assert attempt >= 5
    assert results(out) == wanted


def test_two_runs_in_one_folder_are_refused(few: Path) -> None:
    out = few / "shared"

    def again(stage: str, done: int, total: int) -> None:
        with pytest.raises(StartError, match="another stretto optimise works in"):
            run(few, SHORT[:1], out, resume=True)
        raise Interrupt

    with pytest.raises(Interrupt):
        run(few, SHORT[:1], out, progress=again)


def test_a_wrong_size_is_found_before_the_first_step_runs(few: Path) -> None:
    """Through all generations: the child of a small student must not be larger than that."""
    parts: list[dict[str, Any]] = [
        {"step": "finetune", "name": "long", "steps": 1_000_000},
        {"step": "distil", "name": "small", "from": "long", "layers": 2},
        {"step": "prune", "name": "grandchild", "from": "small", "layers": 3},
    ]
    with pytest.raises(StartError, match=r"\$\.steps\[2\]\.layers: 3 is more than the parent's 2"):
        run(few, parts, few / "early")
    assert [each.name for each in (few / "early").iterdir()] == [".working"]
    parts[2] = {"step": "quantise", "name": "q", "from": "small", "format": "fp8"}
    with pytest.raises(StartError, match=r"\$\.steps\[2\]\.format: .*only CUDA devices compute with fp8"):
        run(few, parts, few / "early")


def test_a_student_must_not_be_larger_than_its_teacher(few: Path) -> None:
    part = {"step": "distil", "name": "big", "layers": 9}
    with pytest.raises(StartError, match=r"\$\.steps\[0\]\.layers: 9 is more than the parent's 4"):
        run(few, [part], few / "big")
    part = {"step": "prune", "name": "big", "intermediate": 256}
    with pytest.raises(StartError, match=r"\$\.steps\[0\]\.intermediate: 256 is more than the parent's 128"):
        run(few, [part], few / "big2")
    tiny.checkpoint(few / "huge", layers=8, intermediate=512)
    part = {"step": "distil", "name": "big", "student": "huge"}
    with pytest.raises(StartError, match=r"\$\.steps\[0\]\.student: .*huge is larger than its teacher"):
        run(few, [part], few / "big3")


def test_a_student_must_read_the_same_tokens(few: Path) -> None:
    student = tiny.checkpoint(few / "foreign", layers=2)
    whole = json.loads((student / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (student / "tokenizer.json").write_text(json.dumps(whole))
    part = {"step": "distil", "name": "s", "student": "foreign"}
    with pytest.raises(StartError, match=r"\$\.steps\[0\]\.student: .*foreign has another tokenizer"):
        run(few, [part], few / "tokens")


def test_a_student_of_its_own_is_trained(few: Path) -> None:
    tiny.checkpoint(few / "student", layers=1)
    part = {"step": "distil", "name": "s", "student": "student", "steps": 3, "on_policy_steps": 2, "batch": 4}
    run(few, [part], few / "own")
    config = json.loads((few / "own" / "s" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1


def test_a_run_that_ended_early_goes_on_in_another_place(few: Path) -> None:
    """As for a recipe whose students are trained on one machine and measured on another."""
    tiny.checkpoint(few / "own-student", layers=1)
    first: dict[str, Any] = {"step": "distil", "name": "s", "student": "own-student", "replies": "ideal"}
    first |= {"steps": 3, "on_policy_steps": 0, "batch": 4}
    parts = [first, {"step": "quantise", "name": "q", "from": "s", "format": "int8"}]
    early = run(few, parts, few / "here", until="s")
    assert [each.name for each in early.steps] == ["full", "s"] and not (few / "here" / "q").exists()
    there = few / "there"
    for name in ("model", "own-student", "data.jsonl", "here"):
        copy = shutil.copytree if (few / name).is_dir() else shutil.copyfile
        there.mkdir(exist_ok=True)
        copy(few / name, there / name)
    later = run(there, parts, there / "here", resume=True)
    assert [(each.name, each.status) for each in later.steps] == [
        ("full", "kept"),
        ("s", "kept"),
        ("q", "made"),
    ]
    with pytest.raises(StartError, match=r"--until: no step makes 'smal'"):
        run(few, parts, few / "never", until="smal")
    assert not (few / "never").exists()


def test_the_model_of_a_recipe_may_be_a_ladder_which_is_its_top(few: Path) -> None:
    made = tiny_ladder.make(few / "ladder")
    # As in the package: the top is in the folder of the ladder itself.
    shutil.copytree(made / "full", made, dirs_exist_ok=True)
    ladder = registry.load(made)
    at_home = tuple(structs.replace(each, path=each.path.replace("full", ".")) for each in ladder.variants)
    registry.save(structs.replace(ladder, variants=at_home), made)
    data = {"model": "ladder", "data": "data.jsonl", "steps": [{"step": "quantise", "name": "q"}]}
    for number, model in enumerate(("ladder", str(made.resolve()))):
        out = few / f"of-ladder-{number}"
        steps.run(recipe.parse(data | {"model": model}, "recipe"), RunOptions(out=out, folder=few))
        assert {each.name for each in (out / "full").iterdir()} == {
            *(each.name for each in (made / "small").iterdir()),
            "manifest.json",
        }


def test_other_mistakes_of_a_run_say_what_to_do(few: Path) -> None:
    rate = {"step": "finetune", "name": "t", "steps": 30, "rate": 1.0, "batch": 4, "warm_up": 0}
    with pytest.raises(StartError, match=r"train: the loss of training step \d+ is not finite: lower `rate`"):
        run(few, [rate | {"weights": {"max": 1e38}}], few / "nan")
    with pytest.raises(StartError, match=r"weights: no example has the task 'summ'"):
        run(few, [rate | {"weights": {"summ": 2}}], few / "task")
    with pytest.raises(StartError, match=r"no example is shorter than max_tokens \(2\)"):
        run(few, [rate | {"max_tokens": 2}], few / "long")
    with pytest.raises(CheckpointError, match="neither a directory"):
        steps.run(
            recipe.parse({"model": "nowhere", "data": "data.jsonl", "steps": [rate]}, "r"),
            RunOptions(out=few / "none", folder=few),
        )
    with pytest.raises(StartError, match="fp8"):
        run(few, [{"step": "quantise", "name": "q", "format": "fp8"}], few / "fp8")


def test_plain_text_is_graded_by_kl_and_perplexity(few: Path) -> None:
    (few / "text.txt").write_text("".join(f"first {n} {n % 7} {n % 3}:{n} " for n in range(5000)))
    parts: list[dict[str, Any]] = [
        {
            "step": "distil",
            "name": "small",
            "layers": 2,
            "steps": 5,
            "on_policy_steps": 3,
            "batch": 4,
            "max_tokens": 48,
        },
        {"step": "evaluate", "texts": 8},
        {"step": "ladder"},
    ]
    data = {"model": "model", "data": "text.txt", "steps": parts}
    report = steps.run(recipe.parse(data, "r"), RunOptions(out=few / "text", folder=few))
    assert report.ladder is not None
    top = report.ladder.variant("full")
    assert top.perplexity is not None and top.perplexity > 1
    assert top.quality.mean > 0.999
    small = json.loads((few / "text" / "evaluation" / "small.json").read_text())
    assert small["quality"]["mean"] < 0.99 and small["kl"] > 0.01 and small["perplexity"] > 1
