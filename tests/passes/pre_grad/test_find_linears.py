"""Which nodes are linears, under which names, and why others are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.graphs import session_with, trace
from torch import Tensor, nn

from micromix_compile.lowering.torch_private.operators import GROUPED_MM
from micromix_compile.passes import find_linears
from micromix_compile.passes.pre_grad import views

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.versions
functional = nn.functional


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is (C, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, 64), self.weight).reshape(*x.shape[:-1], 32)


def test_linears_are_found_with_name_operands_and_orientation() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64, bias=False), Conv1D()).eval()
    session = session_with(find_linears, model=model)
    _, context, _ = trace(model, torch.randn(3, 64), session=session)
    assert [session.name_of(site.parameter) for site in context.sites] == ["0", "1", "2"]
    assert [site.transposed for site in context.sites] == [False, False, True]
    assert [site.bias is not None for site in context.sites] == [True, False, True]
    assert [(site.in_features, site.out_features) for site in context.sites] == [(64, 32), (32, 64), (64, 32)]
    assert not context.refusals


@pytest.mark.parametrize("product", [torch.mm, torch.matmul, lambda x, w: x @ w, lambda x, w: torch.mm(x, mat2=w)])
def test_a_product_with_a_parameter_on_the_right_is_a_linear(product: Callable[..., Tensor]) -> None:
    weight = nn.Parameter(torch.randn(64, 32))
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(3, 64), session=session_with(find_linears))
    assert [(site.in_features, site.transposed) for site in context.sites] == [(64, True)]


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w.T,
        lambda x, w: torch.mm(x, w.t()),
        lambda x, w: torch.matmul(x, w.mT),
        lambda x, w: x @ w.transpose(-1, -2),
        lambda x, w: x @ torch.transpose(w, 0, 1),
        lambda x, w: torch.addmm(w[:, 0], x, w.permute(1, 0)),
    ],
)
def test_a_product_with_a_transposed_parameter_is_a_linear(product: Callable[..., Tensor]) -> None:
    weight = nn.Parameter(torch.randn(32, 64))
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(3, 64), session=session_with(find_linears))
    assert [(site.in_features, site.transposed) for site in context.sites] == [(64, False)]
    assert not context.refusals


@pytest.mark.parametrize(
    "product",
    [lambda x, w: x @ w.transpose(0, 0), lambda x, w: x @ w.permute(0, 1), lambda x, w: x @ w.T.detach()[:, :].mT],
)
def test_what_leaves_a_matrix_as_it_is_is_no_transpose(product: Callable[..., Tensor]) -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(3, 64), session=session_with(find_linears))
    assert [(site.transposed, site.part) for site in context.sites] == [(True, None)]


@pytest.mark.parametrize(
    ("product", "name", "transposed"),
    [
        (lambda x, w: functional.linear(x, w[8:24]), "[8:24]", False),
        (lambda x, w: functional.linear(x, w.narrow(0, 8, 16), x[0, :16]), "[8:24]", False),
        (lambda x, w: functional.linear(x, w.chunk(4)[1]), "[24:48]", False),
        (lambda x, w: functional.linear(x, w.split([8, 80, 8])[2]), "[88:96]", False),
        (lambda x, w: functional.linear(x, w.tensor_split(2)[0]), "[0:48]", False),
        (lambda x, w: functional.linear(x, w.view(3, 32, 64)[1]), "[32:64]", False),
        (lambda x, w: functional.linear(x, w[8:][:4][1:2]), "[9:10]", False),
        (lambda x, w: x @ w[-8:].T, "[88:96]", False),
        (lambda x, w: torch.mm(x, w.t()[:, 8:24]), "[8:24]", False),
        (lambda x, w: torch.addmm(x[0, :16], x, w.T[:, :16]), "[0:16]", False),
        (lambda x, w: torch.cat((x, x[:, :32]), 1) @ w[:, 8:24], "[:, 8:24]", True),
        (lambda x, w: functional.linear(torch.cat((x, x[:, :32]), 1), w[:, 8:24].T), "[:, 8:24]", True),
    ],
)
def test_a_run_of_output_channels_is_a_linear_of_its_own(
    product: Callable[..., Tensor], name: str, transposed: bool
) -> None:
    weight = nn.Parameter(torch.randn(96, 64))
    session = session_with(find_linears)
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(3, 64), session=session)
    (site,) = context.sites
    assert session.name_of(site.parameter, site.part) == f"l_weight_{name}"
    assert (site.transposed, site.in_features) == (transposed, 96 if transposed else 64)
    assert site.part is not None
    assert site.out_features == site.part.size
    assert not context.refusals


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (lambda x, w: functional.linear(x[:, :32], w[:, :32]), views.CUT_ALONG_INPUTS),
        (lambda x, w: x @ w[:64], views.CUT_ALONG_INPUTS),
        (lambda x, w: functional.linear(x, w[::2]), views.CUT_OTHERWISE),
        (lambda x, w: functional.linear(x, w[8:8]), views.CUT_OTHERWISE),
        (lambda x, w: functional.linear(x[:, :32], w[8:24, :32]), views.CUT_OTHERWISE),
        (lambda x, w: functional.linear(x, w[[1, 3]]), views.CUT_OTHERWISE),
        (lambda x, w: functional.linear(x, w[:, :2].as_strided((4, 64), (64, 1), 32)), views.CUT_OTHERWISE),
        (lambda x, w: functional.linear(x[:, :32], w.view(192, 32)), views.OF_ANOTHER_SHAPE),
        (lambda x, w: functional.linear(x, w[: x.shape[0]]), views.CUT_BY_INPUT),
    ],
)
def test_other_parts_of_a_weight_are_named_with_why(product: Callable[..., Tensor], reason: str) -> None:
    weight = nn.Parameter(torch.randn(96, 64))
    by_input, session = reason is views.CUT_BY_INPUT, session_with(find_linears)
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(5, 64), session=session, dynamic=by_input)
    assert not context.sites
    assert list(context.refusals.values()) == [reason]


def test_products_of_activations_are_no_linears() -> None:
    def attention(x: Tensor) -> Tensor:
        return torch.matmul(x, x.transpose(1, 2)) @ x

    _, context, _ = trace(attention, torch.randn(2, 4, 32), session=session_with(find_linears))
    assert not context.sites
    assert not context.refusals


@pytest.mark.parametrize(
    ("build", "dtype", "reason"),
    [
        (lambda: nn.Linear(8, 8, dtype=torch.float64), torch.float64, "torch.float64, not float32"),
        (lambda: nn.Linear(64, 8), torch.float32, "matches skip='*'"),
    ],
)
def test_a_refused_linear_comes_with_its_reason(
    build: Callable[[], nn.Linear], dtype: torch.dtype, reason: str
) -> None:
    linear = build()
    session = session_with(find_linears, skip=("*",) if "skip" in reason else ())
    _, context, _ = trace(linear.eval(), torch.randn(2, linear.in_features, dtype=dtype), session=session)
    assert not context.sites
    assert reason in next(iter(context.refusals.values()))


def test_a_weight_computed_in_the_graph_is_refused() -> None:
    weight = nn.Parameter(torch.randn(8, 64))

    def doubled(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, 2 * weight)

    _, context, _ = trace(doubled, torch.randn(3, 64), session=session_with(find_linears))
    assert list(context.refusals.values()) == ["its weight is computed in the graph, not a Parameter"]


def test_an_addmm_with_factors_is_not_taken_for_a_linear() -> None:
    layer = Conv1D()
    _, context, _ = trace(
        lambda x: torch.addmm(layer.bias, x, layer.weight, beta=2.0),
        torch.randn(2, 64),
        session=session_with(find_linears),
    )
    assert not context.sites


OFFSETS = torch.tensor([3, 16], dtype=torch.int32)


def grouped(x: Tensor, w: Tensor) -> Tensor:
    return GROUPED_MM(x, w, offs=OFFSETS)


class Experts(nn.Module):
    """`of_rows` of x, with the experts' weights as `view` takes them."""

    def __init__(self, view: Callable[[Tensor], Tensor], of_rows: Callable[[Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(shape).bfloat16())
        self._view, self._of_rows = view, of_rows

    def forward(self, x: Tensor) -> Tensor:
        return grouped(self._of_rows(x), self._view(self.down_proj))


ROWS = torch.tensor([*range(12), 3, 3, 0, 11])


def doubled(x: Tensor) -> Tensor:
    """Other values than the tokens', in the node that gathered them."""
    gathered = x[ROWS]
    gathered.mul_(2)
    return gathered


@pytest.mark.parametrize(
    ("of_rows", "gathered"),
    [
        (lambda x: x, False),
        (lambda x: x[ROWS].to(torch.bfloat16), True),
        (doubled, False),
        (lambda x: x[ROWS].float().bfloat16(), False),
        (lambda x: x[:, torch.arange(64)], False),
    ],
)
@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_products_are_linears_that_read_tokens_where_rows_are_gathered(
    of_rows: Callable[[Tensor], Tensor], gathered: bool, transposed: bool
) -> None:
    shape = (2, 64, 32) if transposed else (2, 32, 64)
    model = Experts((lambda w: w) if transposed else (lambda w: w.transpose(-2, -1)), of_rows, *shape).eval()
    _, context, _ = trace(model, torch.randn(16, 64).bfloat16(), session=session_with(find_linears))
    (site,) = context.sites
    assert (site.in_features, site.out_features, site.transposed) == (64, 32, transposed)
    assert site.routing is not None
    assert (site.routing.rows is not None) == gathered
    assert site.routing.tokens is site.routing.rows


@pytest.mark.parametrize("view", [lambda w: w.transpose(-2, -1).contiguous().mT, lambda w: w * 2])
def test_grouped_products_with_computed_weights_are_named_among_what_is_left_alone(
    view: Callable[[Tensor], Tensor],
) -> None:
    model, x = Experts(view, lambda x: x, 2, 64, 32).eval(), torch.randn(16, 64).bfloat16()
    _, context, _ = trace(model, x, session=session_with(find_linears))
    assert context.refusals == {"down_proj": "its weight is computed in the graph, not a Parameter"}


def test_a_grouped_product_of_activations_is_nobodys_linear() -> None:
    _, context, _ = trace(
        lambda x: grouped(x, x.reshape(2, 64, 8)), torch.randn(16, 64).bfloat16(), session=session_with(find_linears)
    )
    assert not context.refusals


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.nn.functional.linear(input=x, weight=w),
        lambda x, w: torch.addmm(w[:, 0], x, w.T, beta=1, alpha=1),
        lambda x, w: torch.mm(input=x, mat2=w.T),
    ],
)
def test_a_linears_operands_may_be_given_by_name(product: Callable[..., Tensor]) -> None:
    weight = nn.Parameter(torch.randn(32, 64))
    session = session_with(find_linears)
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(3, 64), session=session)
    assert [(site.in_features, site.out_features, site.transposed) for site in context.sites] == [(64, 32, False)]
