"""The modules of a causal language model, by the full names that transformers gives them and PEFT matches against."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.sizing.models import ModelShape, VisionTower

Kind = Literal["linear", "embedding", "norm", "convolution", "container"]

HEAD = "lm_head"


class Module(Struct, frozen=True):
    """One module and its own weight, fan_out x fan_in (an embedding: fan_in x fan_out); mostly none in a container."""

    name: str
    kind: Kind
    fan_in: int = 0
    fan_out: int = 0
    has_bias: bool = False
    layer: int | None = None
    """Number of the text model's layer that it is in."""

    @property
    def leaf(self) -> str:
        """Last part of the name: q_proj."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def is_token_embedding(self) -> bool:
        return self.leaf == "embed_tokens"

    @property
    def weights(self) -> int:
        return self.fan_in * self.fan_out

    @property
    def biases(self) -> int:
        if not self.has_bias:
            return 0
        return self.fan_in if self.kind == "norm" else self.fan_out

    @property
    def parameters(self) -> int:
        return self.weights + self.biases


@lru_cache(maxsize=64)
def list_modules(shape: ModelShape) -> tuple[Module, ...]:
    """Every module below the model itself, parents before children. Source: modeling_*.py of transformers 5.23."""
    layers = [module for layer in range(shape.num_hidden_layers) for module in _layer_modules(shape, layer)]
    path = shape.text_path
    return (
        *((Module("model", "container"), *vision_modules(shape)) if shape.vision else ()),
        Module(path, "container"),
        Module(f"{path}.embed_tokens", "embedding", shape.vocab_size, shape.hidden_size),
        Module(f"{path}.layers", "container"),
        *layers,
        Module(f"{path}.norm", "norm", shape.hidden_size, 1),
        Module(f"{path}.rotary_emb", "container"),
        Module(HEAD, "linear", shape.hidden_size, shape.vocab_size),
    )


def find_token_embedding(shape: ModelShape) -> Module:
    """The input embedding; a tied output layer is the same tensor."""
    return next(module for module in list_modules(shape) if module.is_token_embedding)


def _layer_modules(shape: ModelShape, layer: int) -> Iterator[Module]:
    hidden, middle = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.query_size, shape.key_value_size
    qkv_bias = shape.traits.qkv_bias or shape.attention_bias
    path = f"{shape.text_path}.layers.{layer}"

    def linear(name: str, fan_in: int, fan_out: int, has_bias: bool) -> Module:
        return Module(f"{path}.{name}", "linear", fan_in, fan_out, has_bias, layer)

    def norm(name: str, size: int) -> Module:
        return Module(f"{path}.{name}", "norm", size, 1, layer=layer)

    def container(name: str) -> Module:
        return Module(f"{path}.{name}", "container", layer=layer)

    yield Module(path, "container", layer=layer)
    yield container("self_attn")
    if shape.traits.fused_projections:
        yield linear("self_attn.qkv_proj", hidden, query + 2 * key_value, qkv_bias)
    else:
        yield linear("self_attn.q_proj", hidden, query, qkv_bias)
        yield linear("self_attn.k_proj", hidden, key_value, qkv_bias)
        yield linear("self_attn.v_proj", hidden, key_value, qkv_bias)
    yield linear("self_attn.o_proj", query, hidden, shape.attention_bias)
    if shape.traits.qk_norm:
        yield norm("self_attn.q_norm", shape.head_dim)
        yield norm("self_attn.k_norm", shape.head_dim)
    yield container("mlp")
    if shape.traits.fused_projections:
        yield linear("mlp.gate_up_proj", hidden, 2 * middle, shape.mlp_bias)
    else:
        yield linear("mlp.gate_proj", hidden, middle, shape.mlp_bias)
        yield linear("mlp.up_proj", hidden, middle, shape.mlp_bias)
    yield linear("mlp.down_proj", middle, hidden, shape.mlp_bias)
    yield container("mlp.activation_fn" if shape.traits.fused_projections else "mlp.act_fn")
    if shape.traits.layer_dropouts:
        yield container("resid_attn_dropout")
        yield container("resid_mlp_dropout")
    for name in _NORMS[shape.traits.norms_per_layer]:
        yield norm(name, hidden)


_NORMS = {
    2: ("input_layernorm", "post_attention_layernorm"),
    4: ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


def vision_modules(shape: ModelShape) -> Iterator[Module]:
    """The vision tower and its projector into the text model. Source: modeling_siglip.py and modeling_gemma3.py."""
    tower = shape.vision
    if tower is None:
        return
    size, path = tower.hidden_size, "model.vision_tower"
    patches = (tower.image_size // tower.patch_size) ** 2
    yield Module(path, "container")
    yield Module(f"{path}.embeddings", "container")
    yield Module(f"{path}.embeddings.patch_embedding", "convolution", 3 * tower.patch_size**2, size, has_bias=True)
    yield Module(f"{path}.embeddings.position_embedding", "embedding", patches, size)
    yield Module(f"{path}.encoder", "container")
    yield Module(f"{path}.encoder.layers", "container")
    for layer in range(tower.num_hidden_layers):
        yield from _vision_layer(tower, f"{path}.encoder.layers.{layer}")
    yield Module(f"{path}.post_layernorm", "norm", size, 1, has_bias=True)
    yield Module("model.multi_modal_projector", "container", size, shape.hidden_size)
    yield Module("model.multi_modal_projector.mm_soft_emb_norm", "norm", size, 1)
    yield Module("model.multi_modal_projector.avg_pool", "container")


def _vision_layer(tower: VisionTower, path: str) -> Iterator[Module]:
    size, middle = tower.hidden_size, tower.intermediate_size
    yield Module(path, "container")
    yield Module(f"{path}.layer_norm1", "norm", size, 1, has_bias=True)
    yield Module(f"{path}.self_attn", "container")
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield Module(f"{path}.self_attn.{name}", "linear", size, size, has_bias=True)
    yield Module(f"{path}.layer_norm2", "norm", size, 1, has_bias=True)
    yield Module(f"{path}.mlp", "container")
    yield Module(f"{path}.mlp.activation_fn", "container")
    yield Module(f"{path}.mlp.fc1", "linear", size, middle, has_bias=True)
    yield Module(f"{path}.mlp.fc2", "linear", middle, size, has_bias=True)
