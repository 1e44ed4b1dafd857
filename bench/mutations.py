"""Damage to files: bytes, JSON, safetensors. Every function takes the random numbers it draws from."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

Tensors = dict[str, torch.Tensor]

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 32, 96, 2**31, 2**63, 2**80, 10**400, 0.5, -0.0, 1e300, math.nan, math.inf),
    *("", "x", "lm_head", "\ud800", "../../x", "\n", "x" * 5000, [], {}, [[]], {"": None}, [0, 0, 0], [32, 32, 0]),
)
ODD_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e5m2)


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """One piece flipped, overwritten, cut, doubled or put in; half of the time in the first kilobytes."""
    data = bytearray(content)
    place = rng.randrange(min(len(data), rng.choice((16, 4096, len(data), len(data)))))
    size = rng.choice((1, 1, 2, 8, 100))
    kind = rng.randrange(6)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place : place + size] = rng.randbytes(size)
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        del data[place : place + size]
    elif kind == 4:
        data[place:place] = data[place : place + size]
    else:
        data[place:place] = rng.choice((b"\0", b"[" * 5000, b'"', b"\xff", rng.randbytes(size)))
    return bytes(data)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy in which one node is replaced, removed, renamed, doubled, nudged or swapped with another."""
    root = [copy.deepcopy(value)]
    inside, key = rng.choice(_places(root))
    node, kind = inside[key], rng.randrange(6)
    if kind == 0 and inside is not root:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice((f"{key}x", "x", ""))] = inside.pop(key)
    elif kind == 2 and isinstance(inside, list) and inside is not root:
        inside.append(copy.deepcopy(node))
    elif kind == 3 and isinstance(node, int | float) and abs(node) < 2**60:
        inside[key] = rng.choice((node + 1, -node, node * 2, float(node), str(node), not node))
    elif kind == 4:
        other, at = rng.choice(_places(root))
        inside[key] = copy.deepcopy(other[at])
    else:
        inside[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return root[0]


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Where all nodes are: container and key. Large containers count no more than small ones."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        inside = waiting.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        places += [(inside, key) for key in keys]
        waiting += [inside[key] for key in keys if isinstance(inside[key], dict | list)]
    return places


def mutated_tensors(tensors: Tensors, rng: random.Random) -> Tensors:
    """A copy in which one tensor, or its name, is another."""
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    name, other = rng.sample(sorted(found), 2)
    rng.choice(_TENSOR_MUTATIONS)(found, name, other, rng)
    return found


def _swap(found: Tensors, name: str, other: str, _: random.Random) -> None:
    found[name], found[other] = found[other], found[name]


def _swap_alike(found: Tensors, name: str, _: str, rng: random.Random) -> None:
    """With one of the same shape: what no check of shapes sees."""
    alike = [one for one in found if one != name and found[one].shape == found[name].shape]
    _swap(found, name, rng.choice(sorted(alike) or [name]), rng)


def _remove(found: Tensors, name: str, _: str, __: random.Random) -> None:
    del found[name]


def _rename(found: Tensors, name: str, _: str, rng: random.Random) -> None:
    found[rng.choice((f"{name}x", "x", name.rpartition(".")[0] or "y"))] = found.pop(name)


def _add(found: Tensors, name: str, _: str, rng: random.Random) -> None:
    found[rng.choice(("extra", f"{name}.w4", f"model.{name}"))] = found[name].clone()


def _flip(found: Tensors, name: str, _: str, rng: random.Random) -> None:
    data = found[name].reshape(-1).view(torch.uint8)
    if data.numel():
        data[rng.randrange(data.numel())] ^= 1 << rng.randrange(8)


def _reorder(found: Tensors, name: str, _: str, rng: random.Random) -> None:
    """An order, if there is one, that is another, or none."""
    name = rng.choice([one for one in sorted(found) if one.endswith("channel_perm")] or [name])
    order = found[name].reshape(-1)
    order = order.view(torch.uint8) if order.itemsize == 1 else order  # there is little that torch can do with FP8
    edits: tuple[Callable[[], object], ...] = (
        lambda: order.copy_(order.flip(0)),
        lambda: order.fill_(0),
        lambda: order.fill_(-1),
        lambda: order[:1].fill_(2**31 - 1 if order.dtype == torch.int32 else 100),
        lambda: order[:2].copy_(order[1:3].clone()),
    )
    if order.numel() > 3:
        rng.choice(edits)()


def _retype(found: Tensors, name: str, _: str, rng: random.Random) -> None:
    found[name] = found[name].to(rng.choice(ODD_DTYPES))


def _reshape(found: Tensors, name: str, _: str, rng: random.Random) -> None:
    flat = found[name].reshape(-1)
    found[name] = rng.choice(
        (flat, flat[:0], flat[: len(flat) // 2], flat.reshape(-1, 1), flat[None], flat[:1].squeeze())
    )


def _fill(found: Tensors, name: str, _: str, rng: random.Random) -> None:
    value = rng.choice((0.0, 1.0, -1.0, math.nan, math.inf))
    if found[name].is_floating_point() or (math.isfinite(value) and value >= 0):
        found[name].fill_(value)


_TENSOR_MUTATIONS = (_swap, _swap_alike, _remove, _rename, _add, _flip, _reorder, _retype, _reshape, _fill)


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A file whose header says something else; its metadata are taken apart where they are JSON."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__") or {}
    if len(metadata) > 1 and rng.random() < 0.5:  # a recipe's; a checkpoint has only its format there
        name = rng.choice(sorted(metadata))
        try:
            metadata[name] = json.dumps(mutated_json(json.loads(metadata[name]), rng))
        except json.JSONDecodeError:
            metadata[name] = "x"
    else:
        header = mutated_json(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
