"""A ladder's directory as models to serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from stretto.config import EngineConfig, ModelConfig, ServeConfig
from stretto.engine.client import EngineClient
from stretto.engine.scheduler.lengths import DEFAULT_LENGTH
from stretto.engine.scheduler.types import History
from stretto.engine.step_time import StepTime
from stretto.errors import CheckpointError, StartError
from stretto.ladder import serving
from stretto.ladder.locate import locate, locate_variants
from stretto.server import app
from tests.ladder import tiny_ladder
from tests.server.fake_engine import FakeEngine, info


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ladder.make(tmp_path_factory.mktemp("ladders") / "tiny")


def config(*models: ModelConfig) -> EngineConfig:
    return EngineConfig(models=models, device="cpu")


def test_each_variant_is_a_model_with_the_ladders_name_in_front(folder: Path) -> None:
    engine, (ladder,) = locate_variants(config(ModelConfig(name="tiny", path=str(folder))), None)
    assert [model.name for model in engine.models] == ["tiny:full", "tiny:int8", "tiny:small"]
    assert [model.quantise for model in engine.models] == [None, "int8", None]
    assert engine.models[0].path == engine.models[1].path == str((folder / "full").resolve())
    # The smallest checkpoint drafts for the others, and not for itself.
    assert [model.draft for model in engine.models] == ["tiny:small", "tiny:small", None]
    assert (ladder.name, ladder.top.name) == ("tiny", "tiny:full")
    assert [variant.name for variant in ladder.variants] == ["full", "int8", "small"]


def test_a_format_given_by_the_user_serves_the_top_alone(folder: Path) -> None:
    engine, ladders = locate_variants(
        config(ModelConfig(name="tiny", path=str(folder), quantise="int4")), None
    )
    assert ladders == ()
    (model,) = engine.models
    assert (model.name, model.quantise, Path(model.path).name) == ("tiny", "int4", "full")


def test_a_command_for_one_model_gets_the_top(folder: Path) -> None:
    (model,) = locate([ModelConfig(name="tiny", path=str(folder))], None)
    assert (model.name, model.quantise, Path(model.path).name) == ("tiny", None, "full")


def test_variants_that_the_device_cannot_run_are_left_out_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ladder = serving.read(ModelConfig(name="tiny", path=str(folder)), "cuda")
    assert list(ladder.models) == ["full", "small"]
    assert "tiny: not served, as cuda has no kernels for their formats: int8" in caplog.text


def test_a_ladder_without_a_variant_for_the_device_is_refused(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    (copied / "full").symlink_to(folder / "full")
    data = json.loads((folder / "ladder.json").read_text())
    data["variants"] = [data["variants"][1] | {"path": "."}]
    data["top"] = "int8"
    (copied / "ladder.json").write_text(json.dumps(data))
    for file in (folder / "full").iterdir():
        (copied / file.name).symlink_to(file)
    with pytest.raises(
        CheckpointError, match="no variant runs here: cuda has no kernels for the formats of int8"
    ):
        serving.read(ModelConfig(name="tiny", path=str(copied)), "cuda")


def test_two_models_of_one_name_are_refused(folder: Path) -> None:
    same = ModelConfig(name="tiny:full", path=str(folder / "full"))
    with pytest.raises(StartError, match="two models are called tiny:full"):
        locate_variants(config(ModelConfig(name="tiny", path=str(folder)), same), None)


def test_a_server_presents_the_ladder_and_its_variants(folder: Path) -> None:
    """In the process of the test: no engine, so that only names and tokenizers are looked at."""
    engine, ladders = locate_variants(config(ModelConfig(name="tiny", path=str(folder))), None)
    infos = {model.name: info(model.name, vocab=300, context=64) for model in engine.models}
    paths = {model.name: Path(model.path) for model in engine.models}
    fake = FakeEngine(lambda request: [65], infos)
    server = app.build(ServeConfig(), cast(EngineClient, fake), paths, None, ladders).server
    assert list(server.texts) == ["tiny", "tiny:full", "tiny:int8", "tiny:small"]
    assert len(set(map(id, server.texts.values()))) == 1, "all variants have the top's tokenizer and template"
    assert server.model(None).name == "tiny" and server.model("tiny").info.name == "tiny:full"
    reported = {info.name: info.blocks for info in server.report().models}
    assert reported["tiny"] == 0 and len(reported) == 4


def test_the_engine_expects_answers_as_long_as_the_ladder_measured(folder: Path) -> None:
    engine, _ = locate_variants(config(ModelConfig(name="tiny", path=str(folder))), None)
    assert {model.usual_tokens for model in engine.models} == {8}
    assert History.of(StepTime(), 8).lengths.predict("default") == 8
    assert History.of(StepTime(), 0).lengths.predict("default") == DEFAULT_LENGTH
