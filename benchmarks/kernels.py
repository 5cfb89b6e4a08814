"""Measures the CPU kernels against the limits of this machine's memory and arithmetic, by kernel and shape.

`python benchmarks/kernels.py [--json] [--shape qwen3-0.6b|qwen2.5-1.5b|desk] [--threads 2] [--level NAME]`
Each figure is the best and the median of some repetitions over more weights than fit in the caches. `share`
is the best figure divided by a limit measured at the start: for bytes, the bandwidth of a plain sum; for
products, the same kernel on data in the cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from msgspec import Struct
from rich.table import Table as Grid
from torch import Tensor

from stretto import terminal
from stretto.kernels import Attention, Batch, Cache, Geometry, Rotation
from stretto.kernels.cpu.native import Native, load
from stretto.kernels.cpu.table import CpuTable
from stretto.kernels.cpu.weights import Form, PackedLinear, WeightFormat, adopt, memory, pack

FORMATS: list[tuple[WeightFormat, int]] = [
    ("bfloat16", 0),
    ("int8", 0),
    ("int8", 128),
    ("int4", 32),
    ("int4", 64),
]
BEYOND_CACHE = 200_000_000
ROWS = (1, 8, 64, 512)
BLOCK = 16
REPETITIONS, LONGEST_S = 9, 1.5


class Shape(Struct, frozen=True):
    """The layers of a model, by size."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def linears(self) -> dict[str, tuple[int, int]]:
        width = self.heads * self.head_dim
        return {
            "qkv": (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            "out": (self.hidden, width),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
        }


SHAPES = {
    "qwen3-0.6b": Shape(1024, 3072, 16, 8, 128, 151_936),
    "qwen2.5-1.5b": Shape(1536, 8960, 12, 2, 128, 151_936),
    "desk": Shape(256, 768, 4, 2, 64, 4096),
}


class Figure(Struct, frozen=True):
    """One measurement. `rate` is GB/s or G products/s, whichever limits the kernel; `share` of that limit."""

    kernel: str
    rows: int
    context: int
    us: float
    us_median: float
    rate: float
    unit: str
    share: float | None


class Report(Struct, frozen=True):
    machine: str
    level: str
    threads: int
    load: float
    bandwidth_gb_s: float
    shape: str
    figures: list[Figure]


class Bench:
    """One level, thread count and shape."""

    def __init__(self, native: Native, shape: Shape) -> None:
        self.native, self.shape, self.table = native, shape, CpuTable(native, None)
        self.figures: list[Figure] = []
        self.bandwidth = self._bandwidth()

    def _bandwidth(self) -> float:
        """GB/s of reading 256 MB once: one row times float32 weights, where only the reading counts."""
        packed = pack(self.native, torch.zeros(65536, 1024), None, "float32")
        x = torch.ones(1, 1024)
        return packed.nbytes / timed(lambda: self.table.linear(x, packed))[0] / 1e9

    def linears(self) -> None:
        for name, (n, k) in self.shape.linears().items():
            for format, group in FORMATS:
                if group and k % group:
                    continue
                self._linear(
                    f"{name} {n}x{k} {format}" + (f" g{group}" if group else ""), n, k, format, group
                )

    def _linear(self, name: str, n: int, k: int, format: WeightFormat, group: int) -> None:
        first = pack(self.native, torch.randn(n, k) * 0.02, None, format, group)
        copies = [
            first,
            *(copy_of(self.native, first) for _ in range(min(200, BEYOND_CACHE // first.nbytes))),
        ]
        inside = None
        for rows in ROWS:
            if rows > 64 and n > 65536:
                continue
            x = torch.randn(rows, k).bfloat16()
            used = copies if rows < 64 else copies[:4]
            best, middle = timed(lambda x=x, used=used: [self.table.linear(x, packed) for packed in used])
            best, middle = best / len(used), middle / len(used)
            products = rows * n * k / best / 1e9
            if rows == 64:
                small = pack(self.native, torch.randn(256, k) * 0.02, None, format, group)
                inside = rows * 256 * k / timed(lambda x=x, small=small: self.table.linear(x, small))[0] / 1e9
            bound = first.nbytes / best / 1e9 if rows < 64 else products
            floor = self.bandwidth if rows < 64 else inside
            unit = "GB/s" if rows < 64 else "Gproducts/s"
            self._add(name, rows, 0, (best, middle), (bound, unit, bound / floor if floor else None))

    def attention(self) -> None:
        shape = self.shape
        kind = Attention(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5)
        for sequences, queries, context in (
            (1, 1, 512),
            (1, 1, 4000),
            (8, 1, 512),
            (1, 512, 512),
            (1, 512, 2048),
        ):
            batch, blocks = step(sequences, queries, context)
            size = (2, blocks, shape.kv_heads, BLOCK, shape.head_dim)
            read = 2 * sequences * context * shape.kv_heads * shape.head_dim * 2
            layers = min(64, 1 + BEYOND_CACHE // read) if queries == 1 else 1
            cache = Cache([torch.randn(size).bfloat16() for _ in range(layers)])
            rotation = Rotation(torch.rand(shape.head_dim // 2))
            plan = self.table.prepare(batch, cache, Geometry((rotation,), (0,)))
            q = torch.randn(sequences * queries, shape.heads, shape.head_dim).bfloat16()
            times = timed(
                lambda q=q, cache=cache, plan=plan: [
                    self.table.paged_attention(q, kind, layer, plan) for layer in cache.layers
                ]
            )
            best, middle = times[0] / layers, times[1] / layers
            products = sequences * queries * (context - queries / 2) * shape.heads * shape.head_dim * 2
            if queries == 1:
                rate = (read / best / 1e9, "GB/s", read / best / 1e9 / self.bandwidth)
            else:
                rate = (products / best / 1e9, "Gproducts/s", None)
            self._add(f"attend x{sequences}", queries, context, (best, middle), rate)

    def rows(self) -> None:
        shape, table = self.shape, self.table
        weight = torch.ones(shape.hidden).bfloat16()
        for rows in (1, 8, 512):
            x = torch.randn(rows, shape.hidden).bfloat16()
            both = torch.randn(rows, 2 * shape.intermediate).bfloat16()
            for name, call, moved in (
                ("add_norm", lambda x=x: table.add_norm(x, x, weight, 1e-6), 4 * x.nbytes),
                ("gate silu", lambda both=both: table.act_and_mul(both, "silu"), both.nbytes * 3 // 2),
            ):
                best, middle = timed(call)
                self._add(name, rows, 0, (best, middle), (moved / best / 1e9, "GB/s", None))

    def _add(
        self,
        kernel: str,
        rows: int,
        context: int,
        times: tuple[float, float],
        rate: tuple[float, str, float | None],
    ) -> None:
        value, unit, share = rate
        us, us_median = times[0] * 1e6, times[1] * 1e6
        self.figures.append(Figure(kernel, rows, context, us, us_median, value, unit, share))


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call: the best and the median."""
    call()
    times: list[float] = []
    until = time.perf_counter() + LONGEST_S
    while len(times) < REPETITIONS and (len(times) < 3 or time.perf_counter() < until):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times), median(times)


def copy_of(native: Native, packed: PackedLinear) -> PackedLinear:
    """The same weights elsewhere in memory."""
    data = memory(packed.data.nbytes)
    data.copy_(packed.data)
    form = Form(packed.format, packed.n, packed.k, packed.group)
    return adopt(native, form, data, packed.bias)


def step(sequences: int, queries: int, context: int) -> tuple[Batch, int]:
    """Equal sequences over scattered blocks, and how many blocks."""
    each = -(-context // BLOCK)
    order = torch.randperm(sequences * each, generator=torch.Generator().manual_seed(1))
    tables = order.view(sequences, each).int()
    span = torch.arange(context - queries, context)
    slots: Tensor = torch.cat([table[span // BLOCK].long() * BLOCK + span % BLOCK for table in tables])
    starts = torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32)
    contexts = torch.full((sequences,), context, dtype=torch.int32)
    positions = span.repeat(sequences)
    lens, seen = [queries] * sequences, [context] * sequences
    return Batch(
        positions, positions, slots, starts, contexts, tables, starts[1:].long() - 1, lens, seen
    ), len(order)


def show(report: Report) -> None:
    title = (
        f"{report.shape}, {report.level}, {report.threads} threads,"
        f" {report.bandwidth_gb_s:.1f} GB/s, load {report.load:.1f}"
    )
    grid = Grid(title=title, box=None, padding=(0, 1))
    for name in ("kernel", "rows", "context", "us", "median", "rate", "of floor"):
        grid.add_column(name, no_wrap=True)
    for f in report.figures:
        share = "" if f.share is None else f"{f.share:.0%}"
        numbers = (str(f.rows), str(f.context or ""), f"{f.us:.1f}", f"{f.us_median:.1f}")
        grid.add_row(f.kernel, *numbers, f"{f.rate:.1f} {f.unit}", share)
    terminal.out.print(grid)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--level", help="an instruction set this CPU has; the best one by default")
    parser.add_argument("--only", choices=["linears", "attention", "rows"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    native = load()
    if native is None:
        sys.exit("the CPU kernels are not built: install with a C compiler")
    if arguments.level:
        native.use(arguments.level)
    native.threads(arguments.threads)
    torch.set_num_threads(1)
    bench = Bench(native, SHAPES[arguments.shape])
    for part in ("linears", "attention", "rows"):
        if arguments.only in (None, part):
            getattr(bench, part)()
    machine = torch.backends.cpu.get_cpu_capability()
    report = Report(
        *(machine, native.level, arguments.threads, os.getloadavg()[0], bench.bandwidth),
        *(arguments.shape, bench.figures),
    )
    if arguments.json:
        terminal.print_json(report)
    else:
        show(report)


if __name__ == "__main__":
    main()
