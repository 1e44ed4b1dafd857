"""Streaming statistics of one activation, in memory proportional to its channels, or to their square on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.calibration.guided import add_guided, check_finite
from micromix_compile.calibration.token_layout import TokenLayout
from micromix_compile.recipe.types import ChannelStatistics, Threshold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from micromix_compile.calibration.sensitivity import CostProbe
    from micromix_compile.calibration.token_layout import Tokens
    from micromix_compile.recipe.types import ChannelCosts


class ChannelObserver:
    """Accumulates a `ChannelStatistics` over calls of `update`.

    name: the linear it observes, for errors. in_features: C. thresholds: what to count. with_squares: refuse what
    float32 cannot square and sum. layout: what is known of the model's linears.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        thresholds: Sequence[Threshold],
        *,
        with_squares: bool = False,
        layout: TokenLayout | None = None,
    ) -> None:
        self.name = name
        self._layout = layout or TokenLayout()
        self.moment: Tensor | None = None
        """(C, C) float32: the sum of x x^T over the tokens of `update_moment`, on the device of x; None before any."""
        self.guided: Tensor | None = None
        """(C, C) float32: the same, each times its importance, of `update_guided`."""
        self.probe: CostProbe | None = None
        """What measures the costs of these channels, if anything does."""
        self._with_squares = with_squares
        self.batches = 0
        self.tokens = 0
        self._abs_mean = torch.zeros(in_features, dtype=torch.float32, device="cpu")
        self._abs_max = torch.zeros(in_features, dtype=torch.float32, device="cpu")
        self._below: dict[Threshold, int] = dict.fromkeys(thresholds, 0)

    def update(self, x: Tensor, token_mask: Tensor | None = None, source: Tensor | None = None) -> None:
        """Count one batch.

        x: (..., C) float. token_mask: (B, T) attention mask of the forward pass: tokens where it is 0 are padding and
            are not counted; x may be (B, T, C), (T, B, C) or either flattened (see `token_layout`). source: what x was
            flattened from, whose shape counts.
        Raises ValueError if a counted token holds a NaN or an infinity.
        """
        for rows in self._samples(x, token_mask, source):
            self._add_sample(rows)
        self.batches += 1

    def update_moment(self, x: Tensor, token_mask: Tensor | None = None, source: Tensor | None = None) -> None:
        """Add one batch, given as to `update`, to the moment: C * C numbers."""
        for rows in self._samples(x, token_mask, source):
            values = rows.to(torch.float32)
            if self.moment is None:
                self.moment = values.new_zeros(values.shape[1], values.shape[1])
            self.moment = self.moment.to(values.device).addmm_(values.T, values)

    def update_guided(self, rows: Tensor, importance: Tensor) -> None:
        """Add inputs (M, C) float32, each times its importance, (M,), to the guided moment (see `guided`)."""
        if not bool(importance.any()):  # as of experts, which have moments of their own
            return
        if self.guided is None:
            self.guided = rows.new_zeros(rows.shape[1], rows.shape[1])
        add_guided(self.guided, rows, importance)

    def moment_for(self, weight_rounding: str) -> Tensor:
        """The moment by which weights are rounded so; zeros if no gradient ever came to these linears' outputs.

        Raises ValueError as `check_finite` does.
        """
        if weight_rounding != "guided":
            assert self.moment is not None, "moments are kept where weights are rounded"
            return self.moment
        if self.guided is None:
            channels = self._abs_mean.numel()
            return torch.zeros(channels, channels, dtype=torch.float32, device="cpu")
        check_finite(self.guided, self.name)
        return self.guided

    def forget_moments(self) -> None:
        """Free them."""
        self.moment = self.guided = None

    def _samples(self, x: Tensor, token_mask: Tensor | None, source: Tensor | None) -> Iterator[Tensor]:
        """The tokens that count, a sequence at a time: (T, C)."""
        shape, keep, time_first = self._read(x, token_mask, source)
        keep = None if keep is None or bool(keep.all()) else keep
        samples = x.detach().reshape(*shape, x.shape[-1])
        if time_first:
            samples, keep = samples.transpose(0, 1), None if keep is None else keep.T
        if samples.dim() < 3:
            samples, keep = samples.unsqueeze(0), None if keep is None else keep.unsqueeze(0)
        masks = [None] * samples.shape[0] if keep is None else keep.to(x.device)
        for sample, kept in zip(samples, masks, strict=True):
            rows = sample.reshape(-1, sample.shape[-1])
            yield rows if kept is None else rows[kept]

    def kept(self, x: Tensor, token_mask: Tensor | None, source: Tensor | None = None) -> Tensor | None:
        """What of x (..., C), an input of its linears, is no padding: bool (rows,), None if all counts."""
        keep = self._read(x, token_mask, source).keep
        return None if keep is None else keep.reshape(-1)

    def kept_tokens(self, token_mask: Tensor | None) -> Tensor | None:
        """What of a layer's tokens, flattened as its linears get them, is no padding: bool (T,), None if unknown."""
        if token_mask is None:
            return None
        keep = self._layout.read(self.name, (token_mask.numel(),), token_mask).keep
        return None if keep is None else keep.reshape(-1)

    def _read(self, x: Tensor, token_mask: Tensor | None, source: Tensor | None) -> Tokens:
        return self._layout.read(self.name, (x if source is None else source).shape[:-1], token_mask)

    def _add_sample(self, rows: Tensor) -> None:
        if not rows.shape[0]:
            return
        values = rows.to(torch.float32)
        magnitude = values.abs()
        mean = magnitude.mean(0).cpu()
        if not bool(mean.isfinite().all()):  # its sum may be an infinity where it is none itself
            mean = magnitude.mean(0, dtype=torch.float64).to("cpu", torch.float32)
        if not bool(mean.isfinite().all()):
            channel = int((~mean.isfinite()).nonzero()[0])
            raise ValueError(
                f"calibration batch {self.batches}: the input of {self.name} holds a NaN or an infinity "
                f"(channel {channel})"
            )
        abs_max = magnitude.amax(0).cpu()
        if self._with_squares:
            self._check_squares(abs_max, self.tokens + rows.shape[0])
        row_max = magnitude.amax(1, keepdim=True)
        for threshold in self._below:
            compared = values if threshold.signed else magnitude
            self._below[threshold] += int((compared < threshold.ratio * row_max).sum())
        torch.maximum(self._abs_mean, mean, out=self._abs_mean)
        torch.maximum(self._abs_max, abs_max, out=self._abs_max)
        self.tokens += rows.shape[0]

    def _check_squares(self, abs_max: Tensor, tokens: int) -> None:
        limit = (torch.finfo(torch.float32).max / tokens) ** 0.5
        if float(abs_max.max()) > limit:
            raise ValueError(
                f"calibration batch {self.batches}: the input of {self.name} reaches {float(abs_max.max()):.3g} "
                f"(channel {int(abs_max.argmax())}), but float32 sums squares of {tokens} tokens up to {limit:.3g}; "
                f"policies but 'budget' with weight_rounding='nearest' and scale_search=False need no squares"
            )

    def absorb(self, other: ChannelObserver) -> None:
        """Add all that `other` saw, of as many channels: its linears turned out to share an input with these."""
        torch.maximum(self._abs_mean, other._abs_mean, out=self._abs_mean)
        torch.maximum(self._abs_max, other._abs_max, out=self._abs_max)
        self._below = {threshold: count + other._below[threshold] for threshold, count in self._below.items()}
        self.batches += other.batches
        self.tokens += other.tokens
        self.moment = _sum(self.moment, other.moment)
        self.guided = _sum(self.guided, other.guided)
        if self.probe is not None and other.probe is not None:
            self.probe.absorb(other.probe)
        else:
            self.probe = self.probe or other.probe

    def order(self) -> Tensor:
        """(C,) int64: the channels seen so far, ascending by mean |x|."""
        return torch.argsort(self._abs_mean, stable=True)

    def statistics(self, costs: ChannelCosts | None = None) -> ChannelStatistics:
        """What was seen so far, with `costs` if they were measured. Raises ValueError if no token was."""
        if not self.tokens:
            raise ValueError(f"calibration saw no token at the input of {self.name}")
        return ChannelStatistics(
            abs_mean=self._abs_mean.clone(),
            abs_max=self._abs_max.clone(),
            elements=self.tokens * self._abs_mean.numel(),
            tokens=self.tokens,
            batches=self.batches,
            below=dict(self._below),
            costs=costs,
        )


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other.to(one.device)
