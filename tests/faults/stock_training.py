"""What a user of transformers and PEFT writes: a Trainer, train(resume_from_checkpoint=get_last_checkpoint(...))."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 8
SAVE_STEPS = 2


@dataclass(frozen=True)
class StockJob:
    """A stock training: where it writes, what it trains, and what differs from the first start."""

    directory: str
    tiny: str
    zero_stage: int | None
    accumulation: int = 1
    lora: dict[str, Any] = field(default_factory=dict)
    rows: str = "prompt.jsonl"
    model: str = "tiny_gemma2"


def train_stock(job: StockJob) -> None:
    """Train to the end, from the last checkpoint where there is one; the adapter goes to `final`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_utils import get_last_checkpoint

    if job.zero_stage is not None:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    root, model_path = Path(job.directory), Path(job.tiny) / "models" / job.model
    args = TrainingArguments(
        output_dir=job.directory,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=job.accumulation,
        learning_rate=0.01,
        logging_steps=1,
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        seed=42,
        report_to="none",
        disable_tqdm=True,
        deepspeed=build_zero_config(job.zero_stage),
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    lines = (Path(job.tiny) / "data" / "tiny" / job.rows).read_text().splitlines()
    texts = [" ".join(str(value) for value in json.loads(line).values()) for line in lines]
    rows = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    set_seed(42)
    base = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager", dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear", **job.lora}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    last = get_last_checkpoint(job.directory) if root.is_dir() else None
    if trainer.is_world_process_zero():
        (root / "resumed_from").write_text(Path(last).name if last else "")
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(root / "final"))


def build_zero_config(stage: int | None) -> dict[str, Any] | None:
    """The DeepSpeed configuration of the Hugging Face documentation, for this stage."""
    if stage is None:
        return None
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
