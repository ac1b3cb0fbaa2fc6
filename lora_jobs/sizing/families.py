"""The families of causal language models that are known: what every model of one has in common.

Source: modeling_*.py and configuration_*.py of transformers 5.23.
"""

from __future__ import annotations

from msgspec import Struct


class Family(Struct, frozen=True):
    """What every model of one `model_type` of transformers has in common."""

    model_type: str
    norms_per_layer: int
    qk_norm: bool = False
    qkv_bias: bool = False
    fused_projections: bool = False
    """One qkv_proj for queries, keys and values, and one gate_up_proj for gate and up."""
    layer_dropouts: bool = False
    """Two dropout modules in every layer, behind attention and MLP."""
    attention_soft_cap: bool = False
    final_soft_cap: bool = False
    default_attention: str = "sdpa"
    mask_types: int = 1
    """Attention masks built per step where there is a window: one, or a full and a sliding one."""
    rope_types: int = 1
    full_attention_every: int = 0
    """Every n-th layer attends in full and the others slide; 0: all layers alike."""


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gemma2",
            norms_per_layer=4,
            attention_soft_cap=True,
            final_soft_cap=True,
            default_attention="eager",
            mask_types=2,
            full_attention_every=2,
        ),
        Family("gemma3_text", norms_per_layer=4, qk_norm=True, mask_types=2, rope_types=2, full_attention_every=6),
        Family("llama", norms_per_layer=2),
        Family("qwen2", norms_per_layer=2, qkv_bias=True, mask_types=2),
        Family("qwen3", norms_per_layer=2, qk_norm=True, mask_types=2),
        Family("phi3", norms_per_layer=2, fused_projections=True, layer_dropouts=True),
        Family("smollm3", norms_per_layer=2),
        Family("mistral", norms_per_layer=2),
    )
}
