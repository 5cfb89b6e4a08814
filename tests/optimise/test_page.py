"""docs/ladder.md runs on a tiny model, and its table is that of the code. The errors of the command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stretto.ladder import registry
from stretto.optimise.recipe import reference
from tests.optimise import tiny
from tests.optimise.conftest import Workshop

PAGE = (Path(__file__).parents[2] / "docs" / "ladder.md").read_text()


def stretto(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stretto", "optimise", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=110)


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page asks for: a model, questions, the recipe, and `stretto` on the path."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(workshop.model, folder / "my-model")
    tiny.write(folder / "questions.jsonl", tiny.lines(900))
    (recipe,) = re.findall(r"^```yaml recipe\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "bin").mkdir()
    (folder / "bin" / "stretto").write_text(f'#!/bin/sh\nexec {sys.executable} -m stretto "$@"\n')
    (folder / "bin" / "stretto").chmod(0o755)
    return folder


def test_the_commands_of_the_page_make_a_ladder(folder: Path) -> None:
    blocks = re.findall(r"^```bash run\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    environ = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euc", block], capture_output=True, text=True, cwd=folder, env=environ, timeout=110
        )
        assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    ladder = registry.load(folder / "recipe")
    assert [each["name"] for each in result["ladder"]["variants"]] == [each.name for each in ladder.variants]
    assert {each["status"] for each in result["steps"] if each["step"] != "evaluate"} == {"kept"}
    assert (folder / "recipe" / "report.html").stat().st_size > 1_000_000


def test_the_samples_of_the_page_are_good(tmp_path: Path) -> None:
    data = PAGE[PAGE.index("## The data") : PAGE.index("## The recipe")]
    (block,) = re.findall(r"^```json\n(.*?)^```", data, re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        sample = json.loads(line)
        name, *digits = sample["prompt"].rstrip(":").split()
        assert tiny.TASKS[name](digits) == sample["answer"]


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    assert reference() in PAGE


def test_a_wrong_recipe_is_an_error_of_usage(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: desk\ndata: d.jsonl\nsteps:\n- {step: distill, name: s}\n")
    done = stretto("r.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: r.yaml: $.steps[0].step: there is no step 'distill'; did you mean distil?\n"
    assert done.stdout == ""


def test_bad_lines_and_a_used_folder_are_errors_of_usage(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: desk\ndata: d.jsonl\nsteps:\n- {step: quantise, name: q}\n")
    lines = [json.dumps({"prompt": f"say {number}", "answer": str(number)}) for number in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(["{", *lines]))
    done = stretto("r.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "1 bad lines in the data: d.jsonl:1:" in done.stderr
    done = stretto("r.yaml", "--skip-bad-lines", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bad_lines"] == 1
    done = stretto("r.yaml", "--skip-bad-lines", cwd=tmp_path)
    assert done.returncode == 2 and "is not empty: go on with --resume" in done.stderr
    done = stretto("r.yaml", "--device", "tpu", cwd=tmp_path)
    assert done.returncode == 2 and "'tpu' is none of auto, cpu, cuda" in done.stderr
