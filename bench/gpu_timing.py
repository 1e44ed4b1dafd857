"""Times of GPU work by replaying CUDA graphs over operands that L2 does not hold, and a kernel that only reads."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

COLD_BYTES = 200 * 2**20


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one launch, or of one linear."""

    us: float
    p20: float
    p80: float


def measure(runs: Sequence[Callable[[], object]], *, seconds: float = 0.04) -> Times:
    """Replay a graph of all runs for about `seconds`; times are those of one run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs[:2]:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    once = min(replay() for _ in range(2))
    samples = [1e3 * replay() / len(runs) for _ in range(min(max(int(1e3 * seconds / once), 5), 50))]
    cuts = statistics.quantiles(samples, n=5)
    return Times(statistics.median(samples), cuts[0], cuts[3])


def size(*tensors: Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def copies(num_bytes: int) -> int:
    """How many operands of a size are more than L2 holds; at least two."""
    return max(2, COLD_BYTES // num_bytes + 1)


@triton.jit
def read_kernel(words, out, count, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803 - a Triton kernel
    """Read int32 words and keep a sum a program, so that nothing is optimized away."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(words + place, mask=place < count, other=0), 0))


READ_BLOCK = 8192


def read_sums(words: Tensor) -> Tensor:
    """Where `read_all` leaves its sums."""
    return words.new_empty(triton.cdiv(words.numel(), READ_BLOCK))


def read_all(words: Tensor, out: Tensor) -> None:
    """Read a flat int32 tensor."""
    read_kernel[(triton.cdiv(words.numel(), READ_BLOCK),)](words, out, words.numel(), BLOCK=READ_BLOCK, num_warps=8)
