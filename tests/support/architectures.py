"""Models of many architectures as transformers has them, tiny and with random weights, and what to call them with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

VOCABULARY: Final = 64
TEXT: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Of a decoder. Head and embeddings are as small a part of it as of models that people run."""
EXPERTS: Final = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
PICTURE: Final[dict[str, Any]] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

Inputs = dict[str, "Tensor"]


def _tokens(length: int = 24) -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY - 4, (2, length))}


def _pixels(size: int = 32) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _encoder_and_decoder() -> Inputs:
    return {**_tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY - 4, (2, 12))}


def _text_and_picture() -> Inputs:
    return {**_tokens(), **_pixels(), "attention_mask": torch.ones(2, 24, dtype=torch.int64)}


def _sound() -> Inputs:
    ids = torch.randint(3, VOCABULARY - 4, (2, 12))
    return {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": ids}


IMAGE_TOKEN: Final = VOCABULARY - 1


def _picture_in_text() -> Inputs:
    ids = _tokens()["input_ids"]
    ids[:, 4:20] = IMAGE_TOKEN
    return {"input_ids": ids, **_pixels()}


def _patches_in_text() -> Inputs:
    """One picture of 4 x 4 patches for each of two texts, of which 2 x 2 become a token."""
    ids = _tokens()["input_ids"]
    ids[:, 4:8] = IMAGE_TOKEN
    grid = torch.tensor([[1, 4, 4]] * 2)
    types = (ids == IMAGE_TOKEN).to(torch.int32)
    return {
        "input_ids": ids, "pixel_values": torch.randn(32, 3 * 2 * 8 * 8), "image_grid_thw": grid,
        "mm_token_type_ids": types,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One row of the table.

    config: the name of its config. tiny: what differs in the one that is run; head: the class that is run, by its
    name; inputs: a call of it. published: what differs from the config's defaults in a model that was published, if
    those are of none. is_moe: whether experts make up most of it.
    """

    config: str
    tiny: Mapping[str, Any]
    head: str = "AutoModelForCausalLM"
    inputs: Callable[[], Inputs] = _tokens
    published: Mapping[str, Any] | None = None
    is_moe: bool = False

    def tiny_config(self) -> Any:
        """Of the model that is run."""
        return getattr(transformers, self.config)(**self.tiny)

    def published_config(self) -> Any:
        """Of a model of a published size."""
        return getattr(transformers, self.config)(**(self.published or {}))

    def model(self, config: Any) -> Any:
        """With random weights."""
        return getattr(transformers, self.head).from_config(config, dtype=torch.float32).eval()


_moe = partial(Architecture, is_moe=True)
_encoded = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}  # fmt: skip
_vl_text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}

ARCHITECTURES: Final[dict[str, Architecture]] = {
    "Llama": Architecture(config="LlamaConfig", tiny=TEXT),
    "Llama 4, text": _moe(
        config="Llama4TextConfig",
        tiny={
            **TEXT, "num_hidden_layers": 2, "num_local_experts": 8, "intermediate_size_mlp": 96, "head_dim": 16,
            "moe_layers": [1], "interleave_moe_layer_step": 2, "attention_chunk_size": 64,
        },
    ),
    "Qwen2": Architecture(config="Qwen2Config", tiny=TEXT),
    "Qwen3": Architecture(config="Qwen3Config", tiny={**TEXT, "head_dim": 16}),
    "Qwen3-MoE": _moe(config="Qwen3MoeConfig", tiny={**TEXT, **EXPERTS, "head_dim": 16}),
    "Qwen3-Next": _moe(
        config="Qwen3NextConfig",
        tiny={
            **TEXT, **EXPERTS, "num_hidden_layers": 2, "head_dim": 16, "shared_expert_intermediate_size": 96,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Mistral": Architecture(config="MistralConfig", tiny=TEXT),
    "Mixtral": _moe(config="MixtralConfig", tiny={**TEXT, "num_local_experts": 8}),
    "gpt-oss": _moe(
        config="GptOssConfig", tiny={**TEXT, "num_local_experts": 8, "head_dim": 16, "num_experts_per_tok": 2}
    ),
    "DeepSeek-V3": _moe(
        config="DeepseekV3Config",
        tiny={
            **TEXT, "num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 96, "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
        },
    ),
    "Gemma 3": Architecture(config="Gemma3TextConfig", tiny={**TEXT, "head_dim": 16}),
    "Phi-3": Architecture(config="Phi3Config", tiny=TEXT),
    "OLMo 2": Architecture(config="Olmo2Config", tiny=TEXT),
    "StableLM": Architecture(config="StableLmConfig", tiny=TEXT),
    "GPT-2": Architecture(
        config="GPT2Config", tiny={"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
    ),
    "GPT-NeoX": Architecture(config="GPTNeoXConfig", tiny=TEXT),
    "OPT": Architecture(config="OPTConfig", tiny={**TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Falcon": Architecture(config="FalconConfig", tiny=TEXT),
    "Bloom": Architecture(
        config="BloomConfig", tiny={"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 1, "n_head": 4},
        published={"hidden_size": 4096, "n_layer": 30, "n_head": 32},
    ),
    "T5": Architecture(
        config="T5Config", head="AutoModelForSeq2SeqLM", inputs=_encoder_and_decoder,
        tiny={"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4},
    ),
    "BERT": Architecture(config="BertConfig", tiny=TEXT, head="AutoModelForMaskedLM"),
    "ViT": Architecture(config="ViTConfig", tiny=PICTURE, head="AutoModelForImageClassification", inputs=_pixels),
    "CLIP": Architecture(
        config="CLIPConfig", head="AutoModel", inputs=_text_and_picture,
        tiny={"text_config": TEXT, "vision_config": PICTURE, "projection_dim": 32},
    ),
    "Whisper": Architecture(
        config="WhisperConfig", head="AutoModelForSpeechSeq2Seq", inputs=_sound,
        tiny={
            **_encoded, "vocab_size": VOCABULARY, "num_mel_bins": 16, "max_source_positions": 32,
            "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        published={"d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
                   "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120,
                   "num_mel_bins": 128},
    ),
    "LLaVA": Architecture(
        config="LlavaConfig", head="AutoModelForImageTextToText", inputs=_picture_in_text,
        tiny={
            "vision_config": {"model_type": "clip_vision_model", **PICTURE, "projection_dim": 32},
            "text_config": {"model_type": "llama", **TEXT}, "image_token_index": IMAGE_TOKEN,
        },
    ),
    "Qwen2-VL": Architecture(
        config="Qwen2VLConfig", head="AutoModelForImageTextToText", inputs=_patches_in_text,
        tiny={
            "text_config": _vl_text, "image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN - 1,
            "vision_start_token_id": IMAGE_TOKEN - 2, "vision_end_token_id": IMAGE_TOKEN - 3,
            "vision_config": {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2,
                              "patch_size": 8},
        },
    ),
    "Mamba 2": Architecture(
        config="Mamba2Config",
        tiny={
            "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 16,
            "n_groups": 2, "state_size": 16, "chunk_size": 8,
        },
    ),
    "Jamba": _moe(
        config="JambaConfig",
        tiny={
            **TEXT, "num_hidden_layers": 2, "num_experts": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
            "mamba_dt_rank": 32, "num_experts_per_tok": 2,
        },
    ),
}  # fmt: skip
