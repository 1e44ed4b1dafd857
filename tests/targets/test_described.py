"""What a device runs for a linear, in words; that compiled kernels hold these instructions is tested with them."""

from __future__ import annotations

import pytest
from support.targets import served_by

from micromix_compile.targets import cpu, described, gluon_kernels
from micromix_compile.targets.described import FOLDED_KIND, Product, named_target, products_of
from micromix_compile.targets.folded_tiles import FOLDED_SM_90
from micromix_compile.targets.kernels import PlainExact
from micromix_compile.targets.target import Device, Target, target_for

SPLIT = (64, 32, 32)
FOUR = {"sm_100": "tcgen05.mma mxf4", "sm_120": "mma.sync mxf4nvf4"}
OTHER = {"sm_100": "tcgen05.mma mxf8f6f4", "sm_120": "mma.sync mxf8f6f4", "sm_89": "mma.sync bf16"}


@pytest.mark.parametrize("name", ["sm_100", "sm_100a", "sm_120"])
def test_blackwell_multiplies_formats_by_what_both_sides_are(name: str) -> None:
    target, four, other = named_target(name), FOUR[name.removesuffix("a")], OTHER[name.removesuffix("a")]
    (same,) = products_of(target, SPLIT, weights="same", activations="same")
    assert same == ("any", "mixed_mx_mm", {"MXFP4": four, "MXFP6": other, "MXFP8": other})
    (wide,) = products_of(target, SPLIT, weights="same", activations="fp8")
    assert set(wide.kinds.values()) == {other}
    (small,) = products_of(target, SPLIT, weights="mxfp4", activations="same")
    assert small.kinds == {"MXFP4": f"{four} and {other}"}


@pytest.mark.parametrize("split", [(64, 0, 0), (0, 32, 0), (0, 0, 32), (32, 0, 32)])
def test_only_formats_that_are_there_are_named(split: tuple[int, int, int]) -> None:
    there = {name for name, channels in zip(described.SEGMENTS, split, strict=True) if channels}
    for name in ("sm_70", "sm_89", "sm_90", "sm_100"):
        products = products_of(named_target(name), split, weights="same", activations="same")
        assert all(set(product.kinds) == there for product in products)


def test_hopper_folds_up_to_its_bound_and_is_exact_where_asked() -> None:
    few, many = products_of(named_target("sm_90"), SPLIT, weights="same", activations="fp8")
    bound = FOLDED_SM_90.expand_from
    assert (few.rows, few.kernel, set(few.kinds.values())) == (f"up to {bound - 1}", "folded_mm", {FOLDED_KIND})
    assert (many.rows, set(many.kinds.values())) == (f"{bound} and more", {"the library's FP8 product"})
    (exact,) = products_of(named_target("sm_90", exact=True), SPLIT, weights="same", activations="same")
    assert set(exact.kinds.values()) == {"wgmma bf16"}


def test_the_persistent_kernel_reads_packed_weights_of_more_rows_if_it_takes_the_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gluon_kernels, "refusal", lambda: None)
    for split, last, kernels in (((64, 64, 32), 1024, "folded_mm and folded_mm_rows"), (SPLIT, 256, "folded_mm")):
        few, many = products_of(named_target("sm_90"), split, weights="same", activations="fp8")
        assert (few.rows, few.kernel, set(few.kinds.values())) == (f"up to {last}", kernels, {FOLDED_KIND})
        assert (many.rows, set(many.kinds.values())) == (f"{last + 1} and more", {"the library's FP8 product"})
    for split, kernels in (((64, 64, 32), "grouped_folded_mm and grouped_mm_rows"), (SPLIT, "grouped_folded_mm")):
        (one,) = products_of(named_target("sm_90"), split, weights="same", activations="fp8", experts=True)
        assert one == ("any", kernels, dict.fromkeys(described.SEGMENTS, FOLDED_KIND))


def test_experts_have_products_of_their_own_with_the_same_instructions() -> None:
    for name, kernel in (("sm_90", "grouped_folded_mm"), ("sm_100", "grouped_mx_mm"), ("sm_89", "grouped_mx_mm")):
        one, *_ = products_of(named_target(name), SPLIT, weights="same", activations="same")
        (many,) = products_of(named_target(name), SPLIT, weights="same", activations="same", experts=True)
        assert many == ("any", kernel, one.kinds)


def test_what_is_emulated_has_no_matrix_instruction() -> None:
    target = named_target("sm_75")
    assert target.emulated == "compute capability 7.5 has no bfloat16 MMA, 8.0 is the least"
    assert products_of(target, SPLIT, weights="mxfp4", activations="same") == [
        Product("any", "plain PyTorch", {"MXFP4": "no matrix instruction"})
    ]


@pytest.mark.parametrize("isa", ["amx-bf16", "avx512-bf16", "portable"])
def test_a_cpu_names_its_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = cpu.NativeStatus(available=True, reason="", isa=isa, library=None, threads=1)
    monkeypatch.setattr(cpu, "load", lambda: True)
    monkeypatch.setattr(cpu, "status", lambda: status)
    target = target_for(Device(type="cpu", model="cpu"))
    (product,) = products_of(target, SPLIT, weights="same", activations="same")
    assert product.kernel == f"C++, {isa}"
    assert len(set(product.kinds.values())) == 1


def test_kernels_of_others_are_called_by_their_name() -> None:
    class Theirs(PlainExact):
        pass

    with served_by(Target(name="theirs", exact=Theirs()), "cuda"):
        target = target_for(Device(type="cuda", model="a GPU", capability=(9, 0)))
        (product,) = products_of(target, (32, 0, 0), weights="same", activations="same")
    assert product == ("any", "Theirs", {"MXFP4": "not known"})


@pytest.mark.parametrize("name", ["", "sm_", "sm_1", "100", "sm_100b", "h100", "SM_90", "sm_9.0", "sm_1000"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"target must be sm_ and a compute capability .*, got {name!r}"):
        named_target(name)
