"""Reports torch's view of the machine and of a checkpoint: `python -m stretto.profiler.probe [DIRECTORY]`.

`stretto doctor`, which never imports torch, runs it as a process and reads its output (JSON). It reads the
headers of a checkpoint and no weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch

from stretto.errors import CheckpointError
from stretto.hardware import Gpu, Probed, Stored
from stretto.kernels.choice import choose_kernels
from stretto.models import families
from stretto.models.checkpoint import Checkpoint


def stored(path: Path) -> Stored:
    """The checkpoint in a directory. Raises CheckpointError if Stretto cannot run it."""
    spec = families.read(path)
    with Checkpoint(path) as checkpoint:
        dtype, parameters, nbytes = spec.dtype or checkpoint.dtype, checkpoint.parameters, checkpoint.nbytes
    return Stored(
        family=spec.family,
        dtype=dtype,
        context=spec.context,
        vocab=spec.vocab,
        parameters=parameters,
        token_elements=2 * len(spec.layers) * spec.kv_heads * spec.head_dim,
        token_rows=2 * len(spec.layers) * spec.kv_heads,
        bytes=nbytes,
    )


def main() -> None:
    """Print the report. A checkpoint that cannot be read is reported as `error`."""
    cuda = torch.cuda.is_available()
    gpus: list[Gpu] = []
    for device in range(torch.cuda.device_count() if cuda else 0):
        free, total = torch.cuda.mem_get_info(device)
        gpus.append(Gpu(torch.cuda.get_device_name(device), total, free))
    found, error = None, None
    if len(sys.argv) > 1:
        try:
            found = stored(Path(sys.argv[1]))
        except CheckpointError as failure:
            error = failure.message
    kernels, why = choose_kernels(torch.device("cuda" if cuda else "cpu"), torch.bfloat16)
    probed = Probed(
        cuda=cuda,
        isa=torch.backends.cpu.get_cpu_capability(),
        kernels=kernels.name,
        kernels_why=why,
        gpus=tuple(gpus),
        stored=found,
        error=error,
    )
    sys.stdout.buffer.write(msgspec.json.encode(probed))


if __name__ == "__main__":
    main()
