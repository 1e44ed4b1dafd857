"""What was made from a weight follows it: through optimizers, loading, merges, and edits in place."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import fake_quantized
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.changes import adapters, versions
from micromix_compile.changes.versions import Snapshot
from micromix_compile.config import MicroMixConfig
from micromix_compile.ops import prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
KINDS = ("fused", "foreach")
NEAREST = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)


def variants() -> Iterator[Any]:
    for name, cls in OPTIMIZERS.items():
        accepted = inspect.signature(cls).parameters
        for kind in ("plain", *(kind for kind in KINDS if kind in accepted)):
            yield pytest.param(cls, {} if kind == "plain" else {kind: True}, id=f"{name}-{kind}")


class Compiled:
    """A linear that runs compiled, and what it must equal."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 48, bias=False)).eval()
        self.x = torch.randn(4, 64)
        self.recipe = micromix.calibrate(self.net, [self.x], NEAREST)
        self.fast = torch.compile(self.net, backend="micromix", options={"recipe": self.recipe})

    def assert_follows(self, before: Tensor) -> None:
        with torch.no_grad():
            want, got = fake_quantized(self.net, self.recipe)(self.x), self.fast(self.x)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert not torch.equal(got, before)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    yield Compiled()
    torch._dynamo.reset()


@pytest.mark.parametrize(("cls", "options"), list(variants()))
def test_a_compiled_model_follows_every_optimizer(
    compiled: Compiled, cls: type[torch.optim.Optimizer], options: dict[str, bool]
) -> None:
    weight = compiled.net[0].weight
    with torch.no_grad():
        before = compiled.fast(compiled.x)
    grad = torch.randn_like(weight)
    weight.grad = grad.to_sparse() if cls is torch.optim.SparseAdam else grad
    optimizer = cls([weight], lr=0.1, **options)
    closure = (lambda: (weight * grad).sum(),) if cls is torch.optim.LBFGS else ()
    optimizer.step(*closure)
    compiled.assert_follows(before)


class Careless(torch.optim.Optimizer):
    """As people write optimizers: through `.data`, and without a call of the base class's step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(2)


def test_a_compiled_model_follows_an_optimizer_that_writes_through_data(compiled: Compiled) -> None:
    with torch.no_grad():
        before = compiled.fast(compiled.x)
    Careless(compiled.net.parameters()).step()
    compiled.assert_follows(before)


def edit_storage(net: nn.Module) -> None:
    """Twice, so that the second allocation may get the memory of the first."""
    for _ in range(2):
        net[0].weight.data = net[0].weight.data * 2


def edit_data(net: nn.Module) -> None:
    net[0].weight.data.mul_(2)
    micromix.refresh(net)


def edit_numpy(net: nn.Module) -> None:
    array = net[0].weight.detach().numpy()
    array *= 2
    micromix.refresh(net)


def load(net: nn.Module) -> None:
    net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()})


@pytest.mark.parametrize("edit", [edit_storage, edit_data, edit_numpy, load])
def test_a_compiled_model_follows_edits_that_are_seen_or_said(
    compiled: Compiled, edit: Callable[[nn.Module], None]
) -> None:
    with torch.no_grad():
        before = compiled.fast(compiled.x)
    edit(compiled.net)
    compiled.assert_follows(before)


def test_a_compiled_model_follows_a_compiled_optimizer(compiled: Compiled) -> None:
    with torch.no_grad():
        before = compiled.fast(compiled.x)
    weight = compiled.net[0].weight
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    torch.compile(optimizer.step, backend="aot_eager")()
    compiled.assert_follows(before)


def test_a_compiled_model_follows_merges_of_lora_both_ways() -> None:
    net = nn.Sequential(nn.Linear(64, 48, bias=False)).eval()
    model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    x = torch.randn(4, 64)
    recipe = micromix.calibrate(model, [x], NEAREST)
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    outputs = []
    for change in (lambda: None, model.merge_adapter, model.unmerge_adapter, model.merge_adapter):
        change()
        with torch.no_grad():
            want, got = fake_quantized(model, recipe)(x), fast(x)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        outputs.append(got)
    assert not torch.equal(outputs[0], outputs[1])
    torch._dynamo.reset()


def test_merging_and_unmerging_a_layer_touch_its_weight() -> None:
    net = nn.Sequential(nn.Linear(8, 8)).eval()
    weight = net[0].weight
    model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
    adapters.watch_merges()
    for change in (model.merge_adapter, model.unmerge_adapter):
        snapshot = Snapshot(weight)
        assert snapshot.holds(weight)
        change()
        assert not snapshot.holds(weight)


def test_a_snapshot_holds_while_nothing_is_written_and_for_its_tensor_only() -> None:
    one, other = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
    snapshot = Snapshot(one)
    torch.optim.SGD([other], lr=0.1).step()
    micromix.refresh(nn.ParameterList([other]))
    one + one
    assert snapshot.holds(one)
    assert not snapshot.holds(other)
    one.data = one.data.T
    assert not snapshot.holds(one)


def test_a_snapshot_of_an_inference_tensor_ends_by_refresh() -> None:
    with torch.inference_mode():
        net = nn.Linear(4, 4)
    snapshot = Snapshot(net.weight)
    assert snapshot.holds(net.weight)
    micromix.refresh(net)
    assert not snapshot.holds(net.weight)


def test_what_kernels_keep_of_scales_ends_by_refresh() -> None:
    net = nn.Module()
    net.register_buffer("order", torch.arange(32, dtype=torch.int32))
    first = prepared.short_order(net.order)[0]
    assert prepared.short_order(net.order)[0] is first
    net.order.data.copy_(net.order.flip(0))
    micromix.refresh(net)
    assert torch.equal(prepared.short_order(net.order)[0], net.order.to(torch.int16))


def test_only_a_module_is_refreshed() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got Tensor"):
        versions.refresh(torch.zeros(3))  # type: ignore[arg-type]
