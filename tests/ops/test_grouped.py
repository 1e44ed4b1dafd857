"""Grouped products, on plain PyTorch and on what the CPU has: each row is its expert's product; checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.grouped import expert_of_rows, folded_experts, packed_experts
from support.products import assert_folded_product_is_exact, assert_product_is_exact, pack_activation, quantized_rows
from support.strategies import Routing, fp6_formats, routings, splits
from torch import Tensor

from micromix_compile import ops
from micromix_compile.numerics.folding import FoldedActivation
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.kernels import PLAIN_GROUPED, FoldedWeight

if TYPE_CHECKING:
    from micromix_compile.numerics.layout import PackedWeight

TOKENS, EXPERTS = 6, 3
ALL_TO_ONE = Routing(torch.arange(5, dtype=torch.int32), torch.tensor([0, 5, 5], dtype=torch.int32))
NOBODY = Routing(torch.zeros(0, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
ONLY_BEHIND = Routing(torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
OUT_DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def grouped(x: QuantizedActivation, routing: Routing, w: PackedWeight, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    """By the operation and by the reference."""
    return [
        ops.grouped_mx_mm(*x, *routing, *w, bias, *rest),
        PLAIN_GROUPED.multiply(x, *routing, w, bias, *rest),
    ]


@given(routings(TOKENS, EXPERTS), splits(128), fp6_formats, st.booleans(), st.sampled_from([1, 17, 40]), OUT_DTYPES)
@example(ALL_TO_ONE, (32, 64, 32), "e2m3", True, 40, torch.float32)
@example(NOBODY, (32, 64, 32), "e2m3", True, 40, torch.float32)
@example(ONLY_BEHIND, (32, 64, 32), "e2m3", True, 40, torch.bfloat16)
def test_each_row_is_the_product_with_its_experts_weights(
    routing: Routing, split: tuple[int, int, int], fp6: str, has_bias: bool, columns: int, out_dtype: torch.dtype
) -> None:
    x, w = quantized_rows(TOKENS, split, fp6), packed_experts(EXPERTS, columns, split, fp6)
    bias = torch.randn(EXPERTS, columns) if has_bias else None
    owners = expert_of_rows(*routing)
    for got in grouped(x, routing, w, bias, fp6, out_dtype):
        assert got.shape == (len(owners), columns)
        assert got.dtype == out_dtype
        for row, (token, expert) in enumerate(zip(routing.rows.tolist(), owners, strict=True)):
            if expert is None:
                assert not got[row].any()
                continue
            read = QuantizedActivation(*(part[token : token + 1] for part in x))
            weight = (w.w4[expert], w.w6[expert], w.w8[expert], w.w_scale[expert])
            own = None if bias is None else bias[expert]
            assert_product_is_exact(got[row : row + 1], read, weight, own, fp6)


@given(routings(TOKENS, EXPERTS), splits(128), fp6_formats, st.booleans())
@example(ALL_TO_ONE, (32, 64, 32), "e2m3", True)
@example(ONLY_BEHIND, (32, 32, 64), "e3m2", False)
def test_each_row_is_the_folded_product_with_its_experts_weights(
    routing: Routing, split: tuple[int, int, int], fp6: str, has_bias: bool
) -> None:
    x = pack_activation(torch.randn(TOKENS, 128), split, fp6)
    w = folded_experts(EXPERTS, 24, split, fp6, bias=has_bias)
    got = ops.grouped_folded_mm(x.q, x.row_scale, *routing, *w, fp6, torch.float32)
    owners = expert_of_rows(*routing)
    assert got.shape == (len(owners), 24)
    for row, (token, expert) in enumerate(zip(routing.rows.tolist(), owners, strict=True)):
        if expert is None:
            assert not got[row].any()
            continue
        read = FoldedActivation(x.q[token : token + 1], x.row_scale[token : token + 1], x.locks)
        weight = FoldedWeight(*(part[expert] for part in w[:5]), None if w.bias is None else w.bias[expert])
        assert_folded_product_is_exact(got[row : row + 1], read, [weight], fp6)


def places(tokens: int, top_k: int, count: int) -> Tensor:
    """Of rows, some of them counted from the end."""
    return torch.randint(-count, count, (tokens, top_k)) if count else torch.zeros(tokens, top_k).long()


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 4), st.integers(0, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), OUT_DTYPES,
)  # fmt: skip
def test_the_weighted_sum_is_rounded_once(
    seed: int, tokens: int, top_k: int, columns: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    rows, weights, place = torch.randn(7, columns).to(dtype), torch.rand(7).to(dtype), places(tokens, top_k, 7)
    got = ops.weighted_sum(rows, weights, place, out_dtype)
    exact = torch.zeros(tokens, columns, dtype=torch.float64)
    size = exact.clone()
    for j in range(top_k):
        term = weights[place[:, j]].double().unsqueeze(-1) * rows[place[:, j]].double()
        exact, size = exact + term, size + term.abs()
    assert (got.shape, got.dtype) == (exact.shape, out_dtype)
    bound = 2 * top_k * 2.0**-24 * size + torch.finfo(out_dtype).eps / 2 * 1.01 * exact.abs()
    assert ((got.double() - exact).abs() <= bound).all()


def summands(**changes: Any) -> list[Any]:
    named = {"rows": torch.randn(6, 8), "weights": torch.rand(6), "place": places(3, 2, 6), "out_dtype": torch.bfloat16}
    return list({**named, **changes}.values())


def test_the_weighted_sum_passes_the_checks_of_torch_library() -> None:
    torch.library.opcheck(ops.weighted_sum, tuple(summands()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.ones(6, 8).int()}, TypeError, r"rows must be of floating point, got torch.int32"),
        ({"weights": torch.ones(6).int()}, TypeError, r"weights must be of floating point, got torch.int32"),
        ({"out_dtype": torch.int32}, TypeError, r"out_dtype must be of floating point, got torch.int32"),
        ({"place": torch.zeros(3, 2)}, TypeError, r"place must be int32 or int64, got torch.float32"),
        ({"place": torch.arange(6)}, ValueError, r"place \(T, k\), got shapes \(6, 8\) and \(6,\)"),
        ({"rows": torch.randn(6)}, ValueError, r"rows must be \(R, N\) and place \(T, k\), got shapes \(6,\) and"),
        ({"weights": torch.rand(5)}, ValueError, r"weights must be \(6,\), one a row, got shape \(5,\)"),
        ({"place": torch.full((3, 2), 6)}, IndexError, r"index 6 is out of bounds"),
    ],
)
def test_what_does_not_fit_a_weighted_sum_is_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.weighted_sum(*summands(**change))


def exact_operands(**changes: Any) -> list[Any]:
    split = (32, 32, 32)
    named: dict[str, Any] = dict(zip(("x4", "x6", "x8", "x_scale"), quantized_rows(4, split, "e2m3"), strict=True))
    named |= {
        "rows": torch.tensor([0, 3, 3, 1], dtype=torch.int32),
        "offs": torch.tensor([1, 1, 3], dtype=torch.int32),
    }
    named |= dict(zip(("w4", "w6", "w8", "w_scale"), packed_experts(3, 8, split, "e2m3"), strict=True))
    named |= {"bias": torch.randn(3, 8), "fp6": "e2m3", "out_dtype": torch.float32, **changes}
    return list(named.values())


def folded_operands(**changes: Any) -> list[Any]:
    split = (32, 64, 32)
    x, w = pack_activation(torch.randn(4, 128), split, "e2m3"), folded_experts(3, 8, split, "e2m3", bias=True)
    named = {
        "q": x.q, "row_scale": x.row_scale, "rows": torch.tensor([0, 3, 3, 1], dtype=torch.int32),
        "offs": torch.tensor([1, 1, 3], dtype=torch.int32), "w4": w.w4, "w6": w.w6, "w8": w.w8, "w_factor": w.factor,
        "w_row_scale": w.row_scale, "bias": w.bias, "fp6": "e2m3", "out_dtype": torch.bfloat16, **changes,
    }  # fmt: skip
    return list(named.values())


def test_the_products_pass_the_checks_of_torch_library() -> None:
    torch.library.opcheck(ops.grouped_mx_mm, tuple(exact_operands()))
    torch.library.opcheck(ops.grouped_folded_mm, tuple(folded_operands()))


INT64 = {name: torch.zeros(3, dtype=torch.int64) for name in ("rows", "offs")}
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rows": INT64["rows"]}, TypeError, r"rows must be int32, got torch.int64"),
    ({"offs": INT64["offs"]}, TypeError, r"offs must be int32, got torch.int64"),
    ({"rows": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"rows must be 1-dimensional"),
    ({"offs": torch.zeros(2, dtype=torch.int32)}, ValueError, r"offs must be of the 3 experts of w4, got shape \(2,\)"),
    ({"w4": torch.zeros(8, 16, dtype=torch.uint8)}, ValueError, r"w4 must be \(E, N, k4 // 2\)"),
    ({"w8": torch.zeros(2, 8, 32, dtype=torch.uint8)}, ValueError, r"w8 must be of the 3 experts of w4"),
    ({"bias": torch.randn(3, 9)}, ValueError, r"bias must have shape"),
    ({"offs": torch.tensor([2, 1, 3], dtype=torch.int32)}, ValueError, r"offs must ascend from 0 to 4, got 1 behind 2"),
    ({"offs": torch.tensor([2, 3, 5], dtype=torch.int32)}, ValueError, r"offs must ascend from 0 to 4, got 5 behind 3"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.grouped_mx_mm(*exact_operands(**change))
    with pytest.raises(error, match=message):
        ops.grouped_folded_mm(*folded_operands(**change))


def test_a_folded_activation_of_another_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"q must have rows of 128 bytes, as the weights take them, got shape \(4, 96"):
        ops.grouped_folded_mm(*folded_operands(q=torch.zeros(4, 96, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"row_scale must have shape \(4,\), got \(3,\)"):
        ops.grouped_folded_mm(*folded_operands(row_scale=torch.ones(3)))
