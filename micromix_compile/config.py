"""What the user sets: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS, ScaleRounding

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import UnionType

Policy = Literal["budget", "mxfp8-anchor", "paper", "released", "mxfp4", "mxfp6", "mxfp8"]
POLICIES: Final[tuple[str, ...]] = get_args(Policy)
THRESHOLD_POLICIES: Final = ("mxfp8-anchor", "paper", "released")
"""Policies that split channels by calibrated thresholds."""
UNIFORM_POLICIES: Final = ("mxfp4", "mxfp6", "mxfp8")
"""Policies that give every channel one format."""
ADDED_POLICIES: Final[list[str]] = []
"""What `calibration.policies.add_policy` brought."""

TARGET_KINDS: Final = ("element", "stored", "time")
WEIGHT_ROUNDINGS: Final = ("nearest", "gptq")
WEIGHT_MODES: Final = ("same", "mxfp4")
UNIFORM_ORDERS: Final = ("model", "sheltered")
MIN_TARGET_BITS: Final = 4
MAX_TARGET_BITS: Final = 16
"""Above 8 only padding and small layers' scales are left to pay for; nothing takes more than twice that."""

DUMPED: Final = (
    *("open_attention", "find_linears", "insert_observers", "rewrite_linears", "share_activations", "fold_products"),
    *("fuse_rms_norm", "fuse_residual", "fuse_silu_mul"),
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

DEBUGGING: Final = ("dump", "dump_dir")
"""Wishes for one run, which no file carries: someone else's recipe decides numbers, and writes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroMixConfig:
    """Options of the backend, of `calibrate` and of `quantize_`.

    policy: how channels are split. "mxfp8-anchor", "paper" and "released" compare |x| with per-format thresholds
        (MicroMix, Eq. 6; see `assignment`); "budget" spends `target_bits` where a predicted divergence from the
        unquantized model is least (see `budget`); "mxfp4", "mxfp6" and "mxfp8" give every channel that format.
    target_bits, target_kind: what "budget" may spend on average: "element" bits a channel weighted by
        multiply-accumulates, "stored" bits a weight with scales, padding and orders, or "time": element bits of which
        MXFP6 takes 8, because Blackwell's tensor cores run it as fast as MXFP8 and half as fast as MXFP4.
    lam: factor on the thresholds; larger means more MXFP4.
    fp6: the MXFP6 element format, "e2m3" or "e3m2" (the paper's).
    weights: "same" gives a weight its channel's format, "mxfp4" makes every weight MXFP4.
    scale_rounding: "fit", "rceil" (the authors'), "floor" (OCP's) or "even"; see `ScaleRounding`.
    weight_rounding: "nearest", or "gptq": weights make up for each other's rounding errors on the calibrated inputs.
    scale_search: weights choose between two block exponents by error. Activations always follow `scale_rounding`.
    uniform_order: channels of the policies of one format stay in the order of the "model", or are "sheltered": the
        largest share their blocks with those that lose least by it (see `assignment`). Mixed formats sort by size.
    granularity: channels per format are rounded to multiples of this: 32, 64 or 128.
    skip: fnmatch patterns of module names that stay as they are.
    strict: an emulated or plain-PyTorch path is an error instead of a warning.
    exact: never the folded FP8 product of sm_90, which is faster and not exact (see `folding`).
    seed: of the random output directions in which "budget" measures how much each channel matters.
    calibration_batches, calibration_tokens: the one-line form converts itself after so many batches or tokens,
        whichever comes first.
    dump: names of passes ("all" for each) whose graph before and after is written to `dump_dir`; Inductor's
        caches are not used then.

    Raises ValueError or TypeError that names the field, its value and what is accepted.
    """

    policy: str = "budget"
    target_bits: float = 5.5
    target_kind: str = "element"
    lam: float = 1.0
    fp6: str = "e2m3"
    weights: str = "same"
    scale_rounding: ScaleRounding = ScaleRounding.FIT
    weight_rounding: str = "gptq"
    scale_search: bool = True
    uniform_order: str = "sheltered"
    granularity: int = 32
    skip: tuple[str, ...] = DEFAULT_SKIP
    strict: bool = False
    exact: bool = False
    seed: int = 0
    calibration_batches: int = 32
    calibration_tokens: int = 65_536
    dump: tuple[str, ...] = ()
    dump_dir: str = "micromix_graphs"

    def __post_init__(self) -> None:
        _one_of("policy", self.policy, (*POLICIES, *ADDED_POLICIES))
        _typed("target_bits", self.target_bits, int | float, "a number")
        if not MIN_TARGET_BITS <= self.target_bits <= MAX_TARGET_BITS:
            raise ValueError(f"target_bits must be in [{MIN_TARGET_BITS}, {MAX_TARGET_BITS}], got {self.target_bits}")
        _one_of("target_kind", self.target_kind, TARGET_KINDS)
        _one_of("fp6", self.fp6, FP6_FORMATS)
        _one_of("weights", self.weights, WEIGHT_MODES)
        _one_of("scale_rounding", self.scale_rounding, tuple(ScaleRounding))
        _one_of("weight_rounding", self.weight_rounding, WEIGHT_ROUNDINGS)
        _one_of("uniform_order", self.uniform_order, UNIFORM_ORDERS)
        _typed("granularity", self.granularity, int, f"one of {', '.join(map(str, GRANULARITIES))}")
        _one_of("granularity", self.granularity, GRANULARITIES)
        _typed("lam", self.lam, int | float, "a number")
        if not 0.0 < self.lam < float("inf"):
            raise ValueError(f"lam must be a positive finite number, got {self.lam}")
        _typed("seed", self.seed, int, "an integer from 0 to 2**63 - 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed}")
        for name in ("calibration_batches", "calibration_tokens"):
            _typed(name, getattr(self, name), int, "a positive integer")
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        for name in ("skip", "dump"):
            _strings(name, getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in self.dump:
            if name not in ("all", *DUMPED):
                raise ValueError(f"dump must list passes, all, {', '.join(DUMPED)}, got {name!r}")
        for name in ("strict", "exact", "scale_search"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _typed("dump_dir", self.dump_dir, str, "a string")
        object.__setattr__(self, "scale_rounding", ScaleRounding(self.scale_rounding))

    @property
    def rounds_weights(self) -> bool:
        """Whether weights are rounded while calibrating, and not when they are packed."""
        return self.scale_search or self.weight_rounding != "nearest"

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

        Raises ValueError that names the option.
        """
        try:
            return cls.from_mapping({name: value for name, value in options.items() if name not in DEBUGGING})
        except TypeError as error:
            raise ValueError(str(error)) from error

    def to_file(self) -> dict[str, Any]:
        """`to_dict` without the options for debugging; `from_file` reads it."""
        return {name: value for name, value in self.to_dict().items() if name not in DEBUGGING}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_mapping` is its inverse."""
        values = dataclasses.asdict(self)
        return {**values, "scale_rounding": str(self.scale_rounding), "skip": list(self.skip), "dump": list(self.dump)}


def _one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(str, accepted))}, got {value!r}")


def _typed(name: str, value: object, kind: type | UnionType, accepted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")


def _strings(name: str, value: object) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list or tuple of strings, got {value!r}")


assert all(granularity % BLOCK_SIZE == 0 for granularity in GRANULARITIES), "granularities are whole blocks"
