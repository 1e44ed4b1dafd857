"""What a cache of keys and values as bytes is written by, one launch for both.

    micromix::write_kv(key, value, position, k_q!, k_scale!, v_q!, v_scale!, scale_rounding) -> ()

See `numerics.kv_cache` for shapes, dtypes and errors. The four tensors behind `position` are written in place, at the
positions of the T tokens; nothing waits for the device on a CPU's or a GPU's own kernels. A position outside the cache
is an error on a CPU, and on a GPU a device-side assertion, as of torch's own indexing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile.numerics.kv_cache import check_write_kv
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

_lib = torch.library.Library("micromix", "FRAGMENT")
_lib.define(
    "write_kv(Tensor key, Tensor value, Tensor position, Tensor(a!) k_q, Tensor(b!) k_scale, Tensor(c!) v_q, "
    "Tensor(d!) v_scale, str scale_rounding) -> ()"
)

write_kv: Callable[..., None] = torch.ops.micromix.write_kv.default


def _write_kv(key: Tensor, *rest: Tensor | str) -> None:
    target_of(key.device).cache.write(key, *rest)  # type: ignore[arg-type]


_lib.impl("write_kv", _write_kv, "CompositeExplicitAutograd")
torch.library.register_fake("micromix::write_kv", check_write_kv, lib=_lib)
