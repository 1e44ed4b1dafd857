"""Streaming statistics."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micromix_compile.calibration.observer import ChannelObserver
from micromix_compile.calibration.token_layout import token_mask_of
from micromix_compile.recipe.types import Threshold

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


def test_what_one_observer_saw_can_be_added_to_another_one() -> None:
    batches = [torch.randn(2, length, 8) for length in (3, 5, 4)]
    one, two, both = observe(*batches[:1]), observe(*batches[1:]), observe(*batches)
    for observer, seen in ((one, batches[:1]), (two, batches[1:]), (both, batches)):
        for batch in seen:
            observer.update_moment(batch)
    two.update_guided(torch.ones(2, 8), torch.ones(2))
    one.absorb(two)
    got, want = one.statistics(), both.statistics()
    assert torch.equal(got.abs_mean, want.abs_mean)
    assert torch.equal(got.abs_max, want.abs_max)
    assert (got.below, got.elements, got.tokens, got.batches) == (want.below, want.elements, want.tokens, want.batches)
    torch.testing.assert_close(one.moment_for("gptq"), both.moment_for("gptq"))
    assert torch.equal(one.moment_for("guided"), torch.full((8, 8), 2.0))


def test_padding_tokens_are_not_counted() -> None:
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    poisoned = x.clone()
    poisoned[0, 3:] = float("nan")
    masked = observe(poisoned, mask=mask).statistics()
    assert masked.tokens == 8
    assert torch.equal(masked.abs_mean, torch.maximum(x[0, :3].abs().mean(0), x[1].abs().mean(0)))


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def poisoned(mask: torch.Tensor, channels: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (B, T, C) whose padding is NaN, and the mean |x| that the rest has."""
    x = torch.randn(*mask.shape, channels)
    mean = torch.stack([row[keep].abs().mean(0) for row, keep in zip(x, mask.bool(), strict=True)]).amax(0)
    x[mask == 0] = float("nan")
    return x, mean


def assert_padding_is_left_out(observer: ChannelObserver, tokens: int, mean: torch.Tensor) -> None:
    seen = observer.statistics()
    assert seen.tokens == tokens
    torch.testing.assert_close(seen.abs_mean, mean)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("time_first", [False, True])
def test_padding_is_left_out_in_every_layout(time_first: bool, flat: bool) -> None:
    x, mean = poisoned(MASK)
    x = x.transpose(0, 1) if time_first else x
    observer = ChannelObserver("fc", 8, ())
    observer.update(x.flatten(0, 1) if flat else x, MASK, x)
    assert_padding_is_left_out(observer, 8, mean)
    kept = observer.kept(x.flatten(0, 1), MASK)
    assert kept is not None
    assert torch.equal(x.flatten(0, 1)[kept].isnan(), torch.zeros(8, 8, dtype=torch.bool))


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_layout_that_one_batch_told_holds_where_batch_and_time_are_equal(time_first: bool, flat: bool) -> None:
    square = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]])
    x, mean = poisoned(square)
    told = torch.zeros(2, 5, 8)
    observer = ChannelObserver("fc", 8, ())
    observer.update(told.transpose(0, 1) if time_first else told, torch.ones(2, 5))
    x = x.transpose(0, 1) if time_first else x
    observer.update(x.flatten(0, 1) if flat else x, square)
    assert_padding_is_left_out(observer, 10 + 6, mean)


@pytest.mark.parametrize("time_first", [False, True])
def test_where_a_layout_cannot_be_told_no_padding_counts_and_the_log_says_so(
    time_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    square = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]])
    x, _ = poisoned(square)
    x = x.transpose(0, 1) if time_first else x
    observer = ChannelObserver("fc", 8, ())
    with caplog.at_level(logging.WARNING):
        for rows in (x, x, x.flatten(0, 1)):
            observer.update(rows, square)
    assert observer.statistics().tokens == 3 * 4  # the diagonal's two, and the pair that is kept both ways
    assert len(caplog.records) == 1
    assert "the input of fc is (batch, time) or (time, batch)" in caplog.text


def test_without_padding_a_square_batch_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    assert observe(torch.randn(3, 3, 8), mask=torch.ones(3, 3)).tokens == 9
    assert not caplog.records


def test_a_mask_that_fits_no_way_is_said_once_where_it_has_padding(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert observe(torch.randn(1, 2, 8), mask=torch.ones(1, 5)).tokens == 2
        assert observe(torch.randn(2, 8), mask=MASK).tokens == 2  # one row a sequence
        assert not caplog.records
        assert observe(torch.randn(2, 4, 8), torch.randn(2, 4, 8), mask=MASK).tokens == 16
    assert [record.getMessage() for record in caplog.records] == [
        "the attention mask (2, 5) does not fit the input (2, 4) of fc: all of it is counted, padding, if it holds "
        "any, included"
    ]


def test_tokens_without_a_mask_are_all_counted_and_other_masks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    ids, causal = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 1, 5, 5)
    assert token_mask_of((), {"input_ids": ids, "attention_mask": MASK}) is MASK
    for positional, named in (((ids,), {}), ((), {"input_ids": ids}), ((), {"inputs_embeds": torch.randn(2, 5, 8)})):
        mask = token_mask_of(positional, named)
        assert mask is not None
        assert mask.shape == (2, 5)
        assert mask.all()
    assert token_mask_of((torch.randn(4, 8),), {}) is None
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        token_mask_of((), {"input_ids": ids, "attention_mask": causal})
    assert "attention_mask has 4 dimensions, so all tokens are counted" in caplog.text


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
