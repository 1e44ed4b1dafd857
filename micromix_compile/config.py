"""What the user sets: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS, ScaleRounding
from micromix_compile.numerics.layout import ACTIVATIONS, RowLayout
from micromix_compile.recipe.parts import split_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import UnionType

    from micromix_compile.numerics.layout import Split

PolicyName = Literal["budget", "mxfp8-anchor", "paper", "released", "mxfp4", "mxfp6", "mxfp8"]
POLICY_NAMES: Final[tuple[str, ...]] = get_args(PolicyName)
THRESHOLD_POLICIES: Final = ("mxfp8-anchor", "paper", "released")
"""Policies that split channels by calibrated thresholds."""
UNIFORM_POLICIES: Final = ("mxfp4", "mxfp6", "mxfp8")
"""Policies that give every channel one format."""
ADDED_POLICIES: Final[list[str]] = []
"""What `calibration.policies.add_policy` brought."""

SCALE_ROUNDINGS: Final = tuple(ScaleRounding)
TARGET_KINDS: Final = ("element", "stored", "time")
WEIGHT_ROUNDINGS: Final = ("nearest", "gptq", "guided")
WEIGHT_MODES: Final = ("same", "mxfp4")
UNIFORM_ORDERS: Final = ("model", "sheltered")
ACTIVATION_MODES: Final = ("auto", *ACTIVATIONS)
ROTATIONS: Final = ("auto", "none", "all")
MIN_TARGET_BITS: Final = 4
MAX_TARGET_BITS: Final = 16
"""Above 8 only padding and small layers' scales are left to pay for; nothing takes more than twice that."""

DUMPED: Final = (
    *("open_attention", "find_linears", "insert_observers", "rewrite_linears", "share_activations", "fold_products"),
    *("fuse_rms_norm", "fuse_residual", "fuse_silu_mul", "sum_experts"),
)
"""The passes, by name, whose graphs can be dumped."""

DEFAULT_SKIP: Final = (
    "*lm_head",
    "*embed_out",
    "*score",
    "*router*",
    "*.mlp.gate",
    "*_sparse_moe.gate",
    "*_expert_gate",
)
"""Heads, and the routers of mixtures of experts, whose few weights decide much."""

GRANULARITIES: Final = (32, 64, 128)

DEFAULT_ROW_PARALLEL: Final = (
    *("*o_proj", "*out_proj", "*down_proj", "*c_proj", "*.dense", "*dense_4h_to_h", "*fc2", "*fc_out", "*.w2", "*.wo"),
)
"""Linears that tensor parallelism cuts along their input channels: those at the end of attention and of the MLP."""

DEBUGGING: Final = ("dump", "dump_dir")
"""Wishes for one run, which no file carries: someone else's recipe decides numbers, and writes nothing."""

_LISTS: Final = ("skip", "row_parallel", "dump")
"""Fields that are tuples here and lists in JSON."""


Check = Callable[[str, Any], None]
"""Called with a field's name and value; raises ValueError or TypeError that says what is accepted."""


def _is_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    accepted = f"one of {', '.join(map(str, choices))}"
    if isinstance(choices[0], int):
        _check_type(name, value, int, accepted)
    if value not in choices:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _is_policy(name: str, value: object) -> None:
    _is_one_of(name, value, (*POLICY_NAMES, *ADDED_POLICIES))


def _is_in_range(name: str, value: Any) -> None:
    _check_type(name, value, int | float, "a number")
    if not MIN_TARGET_BITS <= value <= MAX_TARGET_BITS:
        raise ValueError(f"{name} must be in [{MIN_TARGET_BITS}, {MAX_TARGET_BITS}], got {value}")


def _is_positive(name: str, value: Any) -> None:
    _check_type(name, value, int | float, "a number")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite number, got {value}")


def _is_count(name: str, value: Any) -> None:
    _check_type(name, value, int, "a positive integer")
    if value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value}")


def _is_seed(name: str, value: Any) -> None:
    accepted = "an integer from 0 to 2**63 - 1"
    _check_type(name, value, int, accepted)
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} must be {accepted}, got {value}")


def _is_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _is_text(name: str, value: object) -> None:
    _check_type(name, value, str, "a string")


def _are_texts(name: str, value: object) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list or tuple of strings, got {value!r}")


def _are_passes(name: str, value: Any) -> None:
    _are_texts(name, value)
    for one in value:
        if one not in ("all", *DUMPED):
            raise ValueError(f"{name} must list passes, all, {', '.join(DUMPED)}, got {one!r}")


def _check_type(name: str, value: object, kind: type | UnionType, accepted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What belongs to a field of the config besides its type and default.

    help_text: what commands say of the option, without its choices and the full stop. They don't take one without it.
    """

    choices: tuple[object, ...] = ()
    check: Check
    help_text: str

    @classmethod
    def of(cls, field: Field[Any]) -> Option:
        """The one of a field of `MicroMixConfig`."""
        option = field.metadata["option"]
        assert isinstance(option, cls), "every field has one"
        return option


def _takes(
    accepted: Check | tuple[object, ...], help_text: str = "", *, choices: tuple[object, ...] = ()
) -> dict[str, Option]:
    """The metadata of a field. accepted: the values that it may have, or what checks them, with `choices` to show."""
    if isinstance(accepted, tuple):
        check = partial(_is_one_of, choices=accepted)
        return {"option": Option(choices=accepted, check=check, help_text=help_text)}
    return {"option": Option(choices=choices, check=accepted, help_text=help_text)}


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroMixConfig:
    """Options of the backend, of `calibrate` and of `quantize_`.

    policy: how channels are split. "mxfp8-anchor", "paper" and "released" compare |x| with per-format thresholds
        (MicroMix, Eq. 6; see `thresholds`); "budget" spends `target_bits` where a predicted divergence from the
        unquantized model is least (see `budget`); "mxfp4", "mxfp6" and "mxfp8" give every channel that format.
    target_bits, target_kind: what "budget" may spend on average: "element" bits a channel weighted by
        multiply-accumulates, "stored" bits a weight with scales, padding and orders, or "time": element bits of which
        MXFP6 takes 8, because Blackwell's tensor cores run it as fast as MXFP8 and half as fast as MXFP4.
    lam: factor on the thresholds; larger means more MXFP4.
    fp6: the MXFP6 element format, "e2m3" or "e3m2" (the paper's).
    weights: "same" gives a weight its channel's format, "mxfp4" makes every weight MXFP4.
    activations: "same" (the paper's) rounds each channel of activations to the format of its weight, "fp8" all to E4M3
        with one scale a row, "mxfp6" to MXFP6 where weights are MXFP4. "auto" is decided when a model is
        calibrated: "same" on GPUs that multiply MXFP4 faster than FP8, and for the policies of the paper and its
        released code; else "fp8".
    rotate: blocks of channels are multiplied by a Hadamard matrix before they are rounded (see `rotation`): "none",
        or "all". "auto" rotates those of an activation if the predicted divergence falls by it, which the policy
        "budget" measures; it is "all" for the policy "mxfp4", and "none" for others.
    scale_rounding: "fit", "rceil" (the authors'), "floor" (OCP's) or "even"; see `ScaleRounding`.
    weight_rounding: "nearest"; "gptq": weights make up for each other's rounding errors on the calibrated inputs; or
        "guided": the same, and a token counts by how much the model's output depends on it, which `calibrate` measures
        by running all batches backward, too. Without gradients, as in the one-line form, "guided" becomes "gptq".
    scale_search: weights choose between two block exponents by error. Activations always follow `scale_rounding`.
    uniform_order: channels of the policies of one format stay in the order of the "model", or are "sheltered": the
        largest share their blocks with those that lose least by it (see `orders`). Mixed formats sort by size.
    granularity: channels per format are rounded to multiples of this: 32, 64 or 128.
    skip: fnmatch patterns of module names that stay as they are.
    convolutions: nn.Conv1d and nn.Conv2d of kernel size 1, with stride 1, one group and no padding, count as linears.
    shards: what number of tensor-parallel ranks, or of which multiple, linears that these cut along their input
        channels are ordered for (see `numerics.shards`); any number that divides it can load a packed checkpoint.
    row_parallel: fnmatch patterns of the names of those linears.
    strict: an error instead of a warning: an emulated or plain-PyTorch path, and a weight that looks like a linear's
        and stays unquantized though `skip` does not name it.
    exact: never the folded FP8 product of sm_90, which is faster and not exact (see `folding`).
    keep_expanded: on sm_90, keep each weight as E4M3, too, a byte for each of its channels beside the packed 4 to 8
        bits: products of more than 256 rows are the library's then, and expand nothing.
    seed: of the random output directions in which "budget" measures how much each channel matters.
    calibration_batches, calibration_tokens: the one-line form converts itself after so many batches or tokens,
        whichever comes first.
    dump: names of passes ("all" for each) whose graph before and after is written to `dump_dir`; Inductor's
        caches are not used then.

    Raises ValueError or TypeError that names the field, its value and what is accepted.
    """

    policy: str = field(default="budget", metadata=_takes(_is_policy, "How channels are split", choices=POLICY_NAMES))
    target_bits: float = field(
        default=5.5, metadata=_takes(_is_in_range, "What the policy budget may spend on average")
    )
    target_kind: str = field(default="element", metadata=_takes(TARGET_KINDS, "The bits that the target counts"))
    lam: float = field(default=1.0, metadata=_takes(_is_positive, "Factor on the thresholds; larger means more MXFP4"))
    fp6: str = field(default="e2m3", metadata=_takes(FP6_FORMATS, "The MXFP6 element format"))
    weights: str = field(default="same", metadata=_takes(WEIGHT_MODES, "Formats of the weights"))
    activations: str = field(
        default="auto", metadata=_takes(ACTIVATION_MODES, "Formats of the activations; auto depends on the device")
    )
    rotate: str = field(
        default="auto", metadata=_takes(ROTATIONS, "Which blocks a Hadamard matrix rotates before they are rounded")
    )
    scale_rounding: ScaleRounding = field(
        default=ScaleRounding.FIT, metadata=_takes(SCALE_ROUNDINGS, "How block scales are rounded")
    )
    weight_rounding: str = field(default="guided", metadata=_takes(WEIGHT_ROUNDINGS, "How weights are rounded"))
    scale_search: bool = field(default=True, metadata=_takes(_is_flag, "Choose the scales of weights by error"))
    uniform_order: str = field(
        default="sheltered", metadata=_takes(UNIFORM_ORDERS, "Order of channels that all have one format")
    )
    granularity: int = field(default=32, metadata=_takes(GRANULARITIES, "Channel counts are multiples of"))
    skip: tuple[str, ...] = field(
        default=DEFAULT_SKIP, metadata=_takes(_are_texts, "Names (fnmatch) of linears to leave as they are; repeatable")
    )
    convolutions: bool = field(
        default=False, metadata=_takes(_is_flag, "Take convolutions of kernel size 1 for linears, too")
    )
    shards: int = field(
        default=1,
        metadata=_takes(_is_count, "Tensor-parallel ranks, or a multiple, that packed weights can be cut for"),
    )
    row_parallel: tuple[str, ...] = field(
        default=DEFAULT_ROW_PARALLEL,
        metadata=_takes(_are_texts, "Names (fnmatch) of linears that ranks cut along input channels; repeatable"),
    )
    strict: bool = field(default=False, metadata=_takes(_is_flag))
    exact: bool = field(default=False, metadata=_takes(_is_flag))
    keep_expanded: bool = field(default=False, metadata=_takes(_is_flag))
    seed: int = field(default=0, metadata=_takes(_is_seed))
    calibration_batches: int = field(default=32, metadata=_takes(_is_count))
    calibration_tokens: int = field(default=65_536, metadata=_takes(_is_count))
    dump: tuple[str, ...] = field(default=(), metadata=_takes(_are_passes))
    dump_dir: str = field(default="micromix_graphs", metadata=_takes(_is_text))

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            Option.of(one).check(one.name, getattr(self, one.name))
        object.__setattr__(self, "scale_rounding", ScaleRounding(self.scale_rounding))
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def rounds_weights(self) -> bool:
        """Whether weights are rounded while calibrating, and not when they are packed."""
        return self.scale_search or self.weight_rounding != "nearest"

    def why_skipped(self, names: Iterable[str]) -> str | None:
        """Why a linear of these names stays as it is, if `skip` matches one of them, or what it is a part of."""
        own_and_whole = [one for name in names for one in (name, split_name(name)[0])]
        found = (p for p in self.skip for name in own_and_whole if name == p or fnmatch.fnmatch(name, p))
        return next((f"its name matches skip={pattern!r}" for pattern in found), None)

    def row_layout(self, split: Split, rotated: int) -> RowLayout:
        """How activations are quantized whose weights are split so. Not for "auto", which calibration decides."""
        assert self.activations != "auto", "a recipe's config says what activations are"
        return RowLayout(*split, self.fp6, str(self.scale_rounding), self.activations, rotated)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> MicroMixConfig:
        """A config from plain keys and values. Raises ValueError for an unknown key, listing the valid ones."""
        unknown = sorted(set(options) - set(cls.option_names()))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; the options are {', '.join(cls.option_names())}")
        return cls(**options)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options, in the order of their definition."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_file(cls, options: Mapping[str, Any]) -> MicroMixConfig:
        """A config from what a file says. Options for debugging, which older files have, are left at their defaults.

        Files of before there was a choice have activations as their weights, and rotate nothing. Raises ValueError that
        names the option.
        """
        try:
            known = {name: value for name, value in options.items() if name not in DEBUGGING}
            config = cls.from_mapping({"activations": "same", "rotate": "none", **known})
        except TypeError as error:
            raise ValueError(str(error)) from error
        if config.activations == "auto":
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)} in a file, got 'auto'")
        return config

    def to_file(self) -> dict[str, Any]:
        """`to_dict` without the options for debugging; `from_file` reads it."""
        return {name: value for name, value in self.to_dict().items() if name not in DEBUGGING}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_mapping` is its inverse."""
        values = dataclasses.asdict(self)
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        return {**values, "scale_rounding": str(self.scale_rounding), **lists}


assert all(granularity % BLOCK_SIZE == 0 for granularity in GRANULARITIES), "granularities are whole blocks"


def check_config(config: object) -> None:
    """Raise TypeError unless it is a `MicroMixConfig`."""
    if not isinstance(config, MicroMixConfig):
        raise TypeError(
            f"config must be a MicroMixConfig, got {type(config).__name__}; "
            f"MicroMixConfig(**options) makes one of a mapping"
        )
