"""Finds a model in a local directory, on the Hugging Face hub, or in the package.

Imports no torch, because the API server uses it too. Does not read the files.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from errno import ENOSPC
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import huggingface_hub

from stretto.disk.files import loading
from stretto.errors import CheckpointError

ProgressCallback = Callable[[str, int, int], None]
BUNDLED = "desk"
LADDER = "ladder.json"  # in a directory of several models
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
# In these patterns * also matches a slash. Weights in folders, and in another layout, are never read.
UNWANTED = ["*/*.safetensors", "*/*.json", "*/*.model", "*/tokenizer*", "consolidated*", "optimizer*"]


def resolve(name: str, progress: ProgressCallback | None = None) -> Path:
    """The directory of model `name`: a path, a hub id `org/name`, or `desk`, the bundled model.

    A model of the hub is downloaded once, into the hub's cache. `progress(stage, done, total)` counts bytes.
    Raises CheckpointError, which says what to do, when there is no such model, when it cannot be downloaded,
    and when the directory is not a model in safetensors.
    """
    with loading(f"the model {name!r}"):
        return _resolve(name, progress)


def _resolve(name: str, progress: ProgressCallback | None) -> Path:
    if name == BUNDLED:
        return check(Path(str(files("stretto"))) / BUNDLED)
    path = Path(os.path.expanduser(name))  # which leaves a `~` that means no directory as it is
    if path.exists():
        return check(path)
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return check(_fetch(name, progress))
    raise CheckpointError(
        f"{name!r} is neither a directory, nor a hub id (organisation/name), nor the bundled {BUNDLED!r}"
    )


def check(path: Path) -> Path:
    """`path`, if it is a directory with config.json and safetensors, or with a ladder. Raises CheckpointError
    when it is neither."""
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        raise CheckpointError(f"{path} is GGUF, which is not read: use the safetensors it was made from")
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file: give the directory that holds config.json and *.safetensors"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path} is an adapter, not a model: merge it into its base model first")
    if (path / LADDER).exists():
        return path
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} is not a model directory: it has no config.json")
    if any(path.glob("*.safetensors")):
        return path
    if any(found for suffix in ("bin", "pt", "pth", "ckpt", "pkl") for found in path.glob(f"*.{suffix}")):
        raise CheckpointError(
            f"{path} holds only pickled weights, which can run code and are never loaded: "
            "convert it to safetensors (save_pretrained does) or find a safetensors version of it"
        )
    raise CheckpointError(f"{path} has no *.safetensors; a download may not have finished")


def _fetch(name: str, progress: ProgressCallback | None) -> Path:
    # The first use of the attribute imports the hub's client, which takes a third of a second. Its modules
    # `utils` and `errors` exist only after that.
    fetch = cast(Callable[..., str], cast(Any, huggingface_hub).snapshot_download)
    bar = None if progress is None else _bar(progress)
    try:
        return Path(fetch(name, allow_patterns=WANTED, ignore_patterns=UNWANTED, tqdm_class=bar))
    except huggingface_hub.errors.GatedRepoError as error:
        raise CheckpointError(f"{name} is gated: accept its terms on the hub, then set HF_TOKEN") from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{name} is neither a directory here nor a model on the hub") from error
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        raise CheckpointError(f"{name} is not in the hub's cache, and the hub cannot be reached") from error
    except (huggingface_hub.errors.HfHubHTTPError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno == ENOSPC:
            raise CheckpointError(
                f"the disk is full: {name} was not downloaded whole; free some space, or set HF_HOME to a "
                "folder on another disk, and start again: what is there is kept"
            ) from error
        raise CheckpointError(f"{name} could not be fetched from the hub: {error}") from error


def _bar(progress: ProgressCallback) -> type[Any]:
    """A progress bar for the hub's client that draws nothing and passes the bytes written to `progress`."""

    class Bar(huggingface_hub.utils.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = str(kwargs.pop("name", "")).endswith("snapshot_download")
            cast(Any, super()).__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self._counts_bytes:
                progress("download", int(self.n), int(self.total or 0))

    return Bar
