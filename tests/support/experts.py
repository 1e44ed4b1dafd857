"""Tiny models with experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from micromix_compile.linear.experts import sorted_by_expert
from micromix_compile.lowering.torch_private.operators import GROUPED_MM

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "intermediate_size": 96,
}  # fmt: skip


def _mixtral(**sizes: Any) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(num_local_experts=4, **{**_SIZES, **sizes})


def _qwen3_moe(**sizes: Any) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**{**_SIZES, "num_experts": 4, "moe_intermediate_size": 96, "head_dim": 16, **sizes})


def _gpt_oss(**sizes: Any) -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(num_local_experts=4, head_dim=16, layer_types=["full_attention"], **{**_SIZES, **sizes})


def _deepseek_v3(**sizes: Any) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=0, moe_intermediate_size=96, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        **{**_SIZES, "num_key_value_heads": 4, **sizes},
    )  # fmt: skip


MODELS: Final[dict[str, Callable[[], Any]]] = {
    "mixtral": _mixtral, "gpt_oss": _gpt_oss, "qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_v3,
}  # fmt: skip
"""Configs of transformers by a name for them."""


def model_of_experts(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A model of random weights, biases of experts among them. sizes: of its config, where they are to be others."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name](**sizes), dtype=dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("proj_bias"):
                parameter.normal_(std=0.05)
    return model


class GroupedExperts(nn.Module):
    """Experts as plain torch has them: `torch._grouped_mm` in bfloat16, a sum of each token's two experts."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, 64).bfloat16(), requires_grad=False)
        self.w_in = nn.Parameter(torch.randn(experts, 64, 96).bfloat16() / 8)
        self.w_out = nn.Parameter(torch.randn(experts, 64, 96).bfloat16() / 8)

    def forward(self, x: Tensor) -> Tensor:
        """(T, 64) -> (T, 64)."""
        order, rows, offs = sorted_by_expert((x @ self.router.t()).topk(2).indices, len(self.w_in))
        inner = torch.nn.functional.silu(GROUPED_MM(x[rows], self.w_in, offs=offs))
        out = GROUPED_MM(inner, self.w_out.transpose(-2, -1), offs=offs)
        return out[order.argsort()].view(*x.shape[:1], 2, -1).sum(1)


class Expert(nn.Module):
    """One of `ListedExperts`."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, inner), nn.Linear(inner, 64)

    def forward(self, x: Tensor) -> Tensor:
        """(T, 64) -> (T, 64)."""
        return self.down(torch.nn.functional.silu(self.up(x)))


class ListedExperts(nn.Module):
    """Experts as modules of their own, of unequal sizes, each called with the tokens that were sent to it.

    Nobody sends a token to the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(map(Expert, (96, 64, 32)))

    def forward(self, x: Tensor) -> Tensor:
        """(T, 64) -> (T, 64)."""
        chosen, out = (x[:, 0] > 0).int(), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == index)
            if len(rows):
                out[rows] = expert(x[rows])
        return out
