"""Streaming statistics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micromix_compile.observer import ChannelObserver
from micromix_compile.recipe import Threshold

LOW, HIGH, SIGNED = Threshold(ratio=0.1), Threshold(ratio=0.4), Threshold(ratio=0.1, signed=True)


def observe(*batches: torch.Tensor, mask: torch.Tensor | None = None) -> ChannelObserver:
    observer = ChannelObserver("fc", batches[0].shape[-1], (LOW, HIGH, SIGNED))
    for batch in batches:
        observer.update(batch, mask)
    return observer


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_statistics_equal_those_of_all_samples_at_once(lengths: list[int], dtype: torch.dtype) -> None:
    batches = [torch.randn(2, length, 8).to(dtype) for length in lengths]
    seen = observe(*batches).statistics()
    samples = [sample.float() for batch in batches for sample in batch]
    rows = torch.cat(samples)
    assert torch.equal(seen.abs_mean, torch.stack([s.abs().mean(0) for s in samples]).amax(0))
    assert torch.equal(seen.abs_max, rows.abs().amax(0))
    top = rows.abs().amax(1, keepdim=True)
    assert seen.below[LOW] == int((rows.abs() < 0.1 * top).sum())
    assert seen.below[HIGH] == int((rows.abs() < 0.4 * top).sum())
    assert seen.below[SIGNED] == int((rows < 0.1 * top).sum())
    assert (seen.elements, seen.tokens, seen.batches) == (rows.numel(), len(rows), len(batches))


def test_padding_tokens_are_not_counted() -> None:
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    poisoned = x.clone()
    poisoned[0, 3:] = float("nan")
    masked = observe(poisoned, mask=mask).statistics()
    assert masked.tokens == 8
    assert torch.equal(masked.abs_mean, torch.maximum(x[0, :3].abs().mean(0), x[1].abs().mean(0)))


def test_a_mask_of_other_tokens_is_ignored() -> None:
    assert observe(torch.randn(1, 2, 8), mask=torch.tensor([[1, 1, 1, 0, 1]])).tokens == 2


def test_flattened_rows_are_taken_apart_by_the_mask() -> None:
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    flat, whole = (observe(rows, mask=mask).statistics() for rows in (x.flatten(0, 1), x))
    assert flat.tokens == whole.tokens == 8
    assert torch.equal(flat.abs_mean, whole.abs_mean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_activation_is_named_with_its_layer_and_batch(bad: float) -> None:
    x = torch.randn(1, 4, 8)
    x[0, 2, 5] = bad
    with pytest.raises(ValueError, match=r"calibration batch 1: the input of fc holds .* \(channel 5\)"):
        observe(torch.randn(1, 4, 8), x)


def test_no_token_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="saw no token at the input of fc"):
        observe(torch.zeros(1, 0, 8)).statistics()


def test_memory_does_not_grow_with_the_tokens() -> None:
    observer = observe(torch.randn(1, 4, 8))

    def held() -> int:
        return sum(value.untyped_storage().nbytes() for value in vars(observer).values() if torch.is_tensor(value))

    before = held()
    for _ in range(10):
        observer.update(torch.randn(4, 100, 8))
    assert held() == before == 2 * 8 * 4
