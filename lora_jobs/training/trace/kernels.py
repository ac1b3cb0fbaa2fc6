"""What decides on a GPU and cannot on fake tensors: autocast, the choice of an attention kernel, Triton's launches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel, masking_utils, modeling_flash_attention_utils

ALIGNMENT = 8
"""Head dimensions are padded to a multiple of this. Source: ATen/native/transformers/attention.cpp."""


def install_rules() -> None:
    """Make torch, transformers and TRL take the paths that they take on a GPU. For the whole process."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.nn.functional.scaled_dot_product_attention = attend
    torch.nn.Module._apply = _convert  # type: ignore[method-assign]
    modeling_flash_attention_utils._lazy_imports = lambda *_, **__: (attend_flash, attend_flash, None, None, None)
    # Both look into the data for what build_model refuses.
    modeling_flash_attention_utils._is_packed_sequence = lambda *_: False
    masking_utils.AttentionMaskInterface.register("flash_attention_2", lambda *_, **__: None)
    PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True
    _claim_kernels()
    FakeTensor.__deepcopy__ = _copy  # type: ignore[method-assign]
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    chunked_logprob._use_triton = utils._use_triton = lambda device: device.type == "cuda"
    chunked_logprob._forward_kernel = chunked_logprob._backward_kernel = _Launch()
    chunked_logprob.triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    # addmm with out=self and a fp32 output dtype: in place, nothing is allocated.
    chunked_logprob._addmm_fp32 = lambda acc, *_: acc.add_(0)


def declare_rows(*, padded: bool, packed: bool) -> None:
    """Say whether rows are padded or hold several examples: transformers reads it from the values of mask and
    positions, and leaves out a mask of ones.
    """
    masking_utils.is_tracing = lambda _=None: False
    masking_utils.fast_all = lambda _: not padded
    masking_utils.find_packed_sequence_indices = _find_examples if packed else lambda _: None


def _find_examples(position_ids: torch.Tensor) -> torch.Tensor:
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _convert(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """Module.to as it works on real tensors, by setting .data; for fake ones torch swaps objects, and refuses."""
    for child in module.children() if recurse else ():
        child._apply(function)
    with torch.no_grad():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = function(parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = function(buffer)
    return module


def _copy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """A deep copy with one storage; torch's own leaves a fake parameter with another one than its views have."""
    if id(tensor) not in memo:
        copied = torch.empty_like(tensor, requires_grad=False)
        parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(copied, tensor.requires_grad) if parameter else copied
    return memo[id(tensor)]  # type: ignore[no-any-return]


def _claim_kernels() -> None:
    """Say that CUDA has a kernel of its own wherever CPU has one beside a composite definition.

    A CPU build of torch has no CUDA kernels, so autograd would take such operations apart (silu_backward into seven)
    and the parts' temporaries would be counted. Nothing ever calls what is registered: fake tensors answer before.
    """
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        if name.startswith("aten::") and has(name, "CPU") and not has(name, "CUDA"):
            _LIBRARY.impl(name.removeprefix("aten::"), _never, "CUDA")


_LIBRARY = torch.library.Library("aten", "IMPL")


def _never(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a CUDA kernel was called where there is no GPU")


class _Launch:
    """A Triton kernel that writes into what it is given: it allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention by torch's rule on Ampere: flash in half precision without a mask, else
    memory-efficient; autocast casts what it gets. Sources: ATen/native/transformers/cuda/sdp_utils.cpp and
    attention.cpp, ATen/autocast_mode.h.
    """
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        query, key, value = (part.to(half) for part in (query, key, value))
        attn_mask = attn_mask.to(half) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    size = query.shape[-1]
    scale = 1 / math.sqrt(size) if scale is None else scale
    padding = -size % ALIGNMENT
    if padding:
        query, key, value = (torch.nn.functional.pad(part, (0, padding)) for part in (query, key, value))
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and size <= 256:
        out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    else:
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        needs = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        bias = None if attn_mask is None else _aligned(_additive(attn_mask, query.dtype), query, key)
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs, dropout_p, is_causal, scale=scale
        )[0]
    return out[..., :size] if padding else out


def attend_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **_: Any,
) -> torch.Tensor:
    """flash_attn_func of the flash-attn package, by torch's own copy of the kernel, which saves the same: q, k, v, the
    output and a fp32 number a head. Windows and soft-caps change no size.
    """
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, causal, False, scale=softmax_scale
    )
    return found[0]  # type: ignore[no-any-return]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as minus infinity where it is false."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -math.inf)


def _aligned(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Rows of a multiple of 16 elements, seen by every head."""
    last = bias.shape[-1]
    if last % 16:
        bias = torch.nn.functional.pad(bias, (0, 16 - last % 16))[..., :last]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
