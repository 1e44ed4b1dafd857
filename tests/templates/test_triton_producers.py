"""An RMSNorm or SiLU·mul in the Triton quantizer against its two steps: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.products import INTERPRETED
from support.quantized import (
    assert_same_bytes,
    launch_behind_norm,
    launch_behind_silu_mul,
    quantized_by_the_reference,
)
from support.rows import gates_of_one_rounding, rows_with_an_exact_mean
from support.strategies import activation_formats, float_dtypes, fp6_formats, scale_roundings
from torch.nn.functional import silu

from micromix_compile import ops
from micromix_compile.numerics import reference
from micromix_compile.numerics.checks import FLOAT_DTYPES
from micromix_compile.numerics.formats import BLOCK_SIZE

pytestmark = INTERPRETED

GATES = {dtype: gates_of_one_rounding(dtype) for dtype in (torch.bfloat16, torch.float16)}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("channels", [32, 256, 1024])
def test_norm_and_quantize_equals_its_two_steps_where_the_mean_is_exact(
    device: str, dtype: torch.dtype, channels: int
) -> None:
    x, weight, perm, split = rows_with_an_exact_mean(9, channels, dtype)
    x, weight, perm = x.to(device), weight.to(device), perm.to(device)
    got = launch_behind_norm(x, weight, 1e-5, perm, *split, "e2m3", "rceil")
    y = ops.rms_norm(x, weight, 1e-5).cpu()
    assert_same_bytes(got, reference.reorder_quantize(y, perm.cpu(), split, fp6="e2m3"))


def test_norm_of_a_bfloat16_row_takes_a_float32_weight(device: str) -> None:
    x, weight = torch.randint(-15, 16, (5, 64)).bfloat16().to(device), torch.randn(64).to(device)
    perm = torch.arange(64, device=device)
    got = launch_behind_norm(x, weight, 1e-5, perm, 32, 32, 0, "e2m3", "rceil")
    want = reference.reorder_quantize(ops.rms_norm(x, weight, 1e-5).cpu(), perm.cpu(), (32, 32, 0), fp6="e2m3")
    assert_same_bytes(got, want)


def test_norm_of_a_row_wider_than_one_tile(device: str) -> None:
    channels = 20000
    x = torch.randn(2, channels, device=device)
    perm = torch.arange(channels, device=device)
    got = launch_behind_norm(x, torch.ones_like(x[0]), 1e-6, perm, 0, 0, channels, "e2m3", "rceil")
    want = x / x.double().square().mean(1, keepdim=True).sqrt()
    values = reference.dequantize_activation(*got)
    assert bool(((values - want).abs() <= want.abs() * 2.0**-4 + 2.0**-9).all())


def test_norm_and_quantize_of_a_nan_row_is_nan_and_of_others_is_not(device: str) -> None:
    x = torch.randn(3, 48, dtype=torch.bfloat16, device=device)
    x[1, 3] = torch.nan
    perm = torch.cat((torch.full((32,), -1), torch.arange(48), torch.full((16,), -1))).to(device)
    got = launch_behind_norm(x, torch.ones_like(x[0]), 1e-6, perm, 32, 32, 32, "e2m3", "rceil")
    assert (got.scale == 255).tolist() == [[False] * 3, [False, True, True], [False] * 3]


@settings(max_examples=40)
@given(float_dtypes, fp6_formats, scale_roundings, activation_formats, st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_rows_behind_a_norm_are_quantized_as_the_reference_does(
    device: str, dtype: torch.dtype, fp6: str, rounding: str, activations: str, blocks: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight, perm, split = rows_with_an_exact_mean(3, 256, dtype)
    names = (fp6, rounding, activations, blocks * BLOCK_SIZE)
    got = launch_behind_norm(x.to(device), weight.to(device), 1e-5, perm.to(device), *split, *names)
    y = ops.rms_norm(x.to(device), weight.to(device), 1e-5).cpu()
    assert_same_bytes(got, quantized_by_the_reference(y, perm, split, *names))


@settings(max_examples=40)
@given(
    st.sampled_from(tuple(GATES)), fp6_formats, scale_roundings, activation_formats, st.integers(0, 64),
    st.integers(0, 16),
)  # fmt: skip
def test_rows_behind_silu_mul_are_quantized_as_the_reference_does(
    device: str, dtype: torch.dtype, fp6: str, rounding: str, activations: str, blocks: int, row: int
) -> None:
    gate, up = (values[row : row + 1] for values in GATES[dtype])
    perm, split, names = torch.randperm(2048), (1024, 512, 512), (fp6, rounding, activations, blocks * BLOCK_SIZE)
    got = launch_behind_silu_mul(gate.to(device), up.to(device), perm.to(device), *split, *names)
    assert_same_bytes(got, quantized_by_the_reference(silu(gate) * up, perm, split, *names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_mul_and_quantize_equals_its_steps_for_every_gate(device: str, dtype: torch.dtype) -> None:
    gate, up = GATES[dtype]
    perm = torch.randperm(2048)
    got = launch_behind_silu_mul(gate.to(device), up.to(device), perm.to(device), 1024, 512, 512, "e2m3", "rceil")
    want = reference.reorder_quantize(silu(gate) * up, perm, (1024, 512, 512), fp6="e2m3")
    assert_same_bytes(got, want)


def test_silu_mul_in_float32_is_close_and_rows_are_read_in_step(device: str) -> None:
    both = torch.randn(5, 400, device=device)
    gate, up = both[:, :192], both[:, 200:392]
    perm = torch.arange(192, device=device)
    got = launch_behind_silu_mul(gate, up, perm, 0, 0, 192, "e2m3", "rceil")
    want = silu(gate) * up
    amax = want.unflatten(1, (-1, BLOCK_SIZE)).abs().amax(2).repeat_interleave(BLOCK_SIZE, 1)
    values = reference.dequantize_activation(*got)
    assert bool(((values - want).abs() <= want.abs() * (2.0**-4 + 2.0**-20) + amax * 2.0**-15).all())


def test_operands_of_producers_must_fit_x() -> None:
    x, perm = torch.zeros(2, 64), torch.arange(64)
    with pytest.raises(TypeError, match=r"weight must be float32, bfloat16 or float16, got .*int64"):
        launch_behind_norm(x, torch.ones(64).long(), 1e-5, perm, 64, 0, 0, "e2m3", "rceil")
    with pytest.raises(ValueError, match=r"weight must have shape \(64,\), got \(32,\)"):
        launch_behind_norm(x, torch.ones(32), 1e-5, perm, 64, 0, 0, "e2m3", "rceil")
    with pytest.raises(TypeError, match=r"up must have gate's dtype .*float32, got .*float16"):
        launch_behind_silu_mul(x, x.half(), perm, 64, 0, 0, "e2m3", "rceil")
    with pytest.raises(ValueError, match=r"up must have shape \(2, 64\), got \(1, 64\)"):
        launch_behind_silu_mul(x, x[:1], perm, 64, 0, 0, "e2m3", "rceil")
