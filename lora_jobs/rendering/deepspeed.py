"""DeepSpeed's JSON, for Hugging Face's Trainer, which replaces "auto" by its own arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jobs.spec import DeepSpeedSpec, JobSpec

# Sizes by hidden_size and the full weights at a save; only ZeRO-3 reads them.
# Source: transformers.integrations.deepspeed, HfTrainerDeepSpeedConfig.trainer_config_finalize.
_STAGE_3 = {
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_gather_16bit_weights_on_model_save": True,
}


def build_deepspeed_config(spec: JobSpec) -> dict[str, Any] | None:
    """The JSON for this job; None when the spec asks for no DeepSpeed.

    It has no optimizer block: with one, DeepSpeed compiles its own Adam at the start of the job; without one it
    shards the optimizer that the Trainer makes from training.optim.
    """
    if spec.deepspeed is None:
        return None
    config: dict[str, Any] = {
        "zero_optimization": _build_zero(spec.deepspeed),
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    if spec.deepspeed.torch_autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif spec.training.bf16:
        config["bf16"] = {"enabled": "auto"}
    if spec.training.fp16:
        config["fp16"] = {"enabled": "auto"}
    if spec.deepspeed.offload_optimizer:
        # Else accelerate puts DeepSpeedCPUAdam in the place of the optimizer: compiled on the node, without our betas.
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _build_zero(zero: DeepSpeedSpec) -> dict[str, Any]:
    block: dict[str, Any] = {
        "stage": zero.zero_stage,
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": zero.contiguous_gradients,
        "reduce_bucket_size": zero.reduce_bucket_size,
    }
    if zero.allgather_bucket_size != "auto":
        # The Trainer fills no "auto" here; left out, DeepSpeed's own default (5e8) holds.
        block["allgather_bucket_size"] = zero.allgather_bucket_size
    if zero.offload_optimizer:
        block["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if zero.zero_stage == 3:
        block |= _STAGE_3
    return block
