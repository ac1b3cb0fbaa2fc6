"""`python -m lora_jobs.training.merge`: a request as JSON on standard input, what was merged as one line of JSON back.

What can't be merged is answered {"error": ..., "hint": ...}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.errors import LoraJobsError, RunError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_jobs.spec import ModelSpec

PROBE_TOKENS = 16
# By how much the merged model's logits may differ, as a share of the largest: the rounding of W + BA to its dtype.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.25}


def merge_adapter(model: ModelSpec, adapter: Path, target: Path, *, dtype: str) -> dict[str, Any]:
    """Write base plus adapter as one model with its tokenizer into `target`, load it again, compare its logits.

    A quantized base is loaded unquantized. Errors: RunError where the reloaded model does not answer as the adapter.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from lora_jobs.training.model import load_base_model

    plain = model.model_copy(update={"quantization": None, "dtype": dtype})
    base = load_base_model(plain, device=torch.device("cpu"), activation_checkpointing=False)
    was_tied = bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    probe = build_probe(base)
    wanted = find_logits(adapted, probe)
    merged = adapted.merge_and_unload(safe_merge=True)
    untied = was_tied and untie_embeddings(merged)
    merged.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(str(adapter)).save_pretrained(str(target))
    parameters = merged.num_parameters()
    del base, adapted, merged
    gc.collect()
    there = plain.model_copy(update={"name_or_path": str(target), "revision": None})
    found = find_logits(
        load_base_model(there, device=torch.device("cpu"), activation_checkpointing=False).eval(), probe
    )
    difference, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= TOLERANCE[dtype] * scale:
        raise RunError(
            f"the merged model answers otherwise than the adapter: logits differ by {difference:g} of {scale:g}"
        )
    return {"parameters": parameters, "dtype": dtype, "difference": difference, "scale": scale, "untied": untied}


def build_probe(model: PreTrainedModel) -> torch.Tensor:
    """Some tokens from all over the vocabulary; the same for the same model."""
    import torch

    size = model.get_input_embeddings().num_embeddings
    return torch.linspace(0, size - 1, PROBE_TOKENS).long().unsqueeze(0)


def find_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of these tokens, in float32."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return logits


def untie_embeddings(model: PreTrainedModel) -> bool:
    """Where training made two tensors of a tied embedding, say so in the config, or loading would make them one.

    PEFT says it in the outer config only, which a multimodal model does not ask.
    """
    import torch

    head, first = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head is None or first is head.weight or torch.equal(first, head.weight):
        return False
    for each in (model.config, model.config.get_text_config()):
        each.tie_word_embeddings = False
    return True


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints
    from lora_jobs.spec import parse_spec

    request = json.loads(sys.stdin.read())
    try:
        spec = parse_spec(json.dumps(request["spec"]), source="spec.yaml")
        answer = merge_adapter(spec.model, Path(request["adapter"]), Path(request["target"]), dtype=request["dtype"])
    except LoraJobsError as error:
        answer = {"error": error.message, "hint": error.hint}
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}", "hint": None}
    answers.write(json.dumps(answer) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
