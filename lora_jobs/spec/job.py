"""The job spec as typed values.

Names are the field's own: PEFT's LoraConfig, Hugging Face's TrainingArguments and from_pretrained, sbatch's options,
DeepSpeed's JSON keys. Everything about one fine-tune is in one frozen JobSpec, which is stored with every run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from lora_jobs.spec.faults import find_section
from lora_jobs.spec.mesh import fill_from_mesh, find_mesh_faults, shards_weights
from lora_jobs.spec.section import Conflict, ConflictError, Section
from lora_jobs.spec.targets import translate_targets
from lora_jobs.spec.words import (
    COMMIT_PATTERN,
    CONSTRAINT_PATTERN,
    NAME_PATTERN,
    REVISION_PATTERN,
    Count,
    Duration,
    Fraction,
    Names,
    Natural,
    NotNegative,
    Positive,
    Prose,
    Size,
    Text,
    Word,
    check_expression,
    read_whole_float,
)

LESS_THAN_ONE = Field(ge=0, lt=1, allow_inf_nan=False)


def _kind_of_targets(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "text"


def _kind_of_number(value: object) -> str:
    return "text" if isinstance(value, str) else "number"


# A list of module names, or one regular expression; the two kinds are told apart first, so that only one complains.
TargetModules = Annotated[
    Annotated[tuple[Text, ...], Field(strict=False, min_length=1), Tag("list")]
    | Annotated[Text, AfterValidator(check_expression), Tag("text")],
    Discriminator(_kind_of_targets),
]
ExcludedModules = Annotated[
    Annotated[tuple[Text, ...], Field(strict=False), Tag("list")]
    | Annotated[Text, AfterValidator(check_expression), Tag("text")],
    Discriminator(_kind_of_targets),
]
InitialWeights = Annotated[
    Annotated[bool, Tag("number")] | Annotated[Literal["gaussian", "orthogonal"], Tag("text")],
    Discriminator(_kind_of_number),
]
# DeepSpeed's documents write bucket sizes as 5e8, which YAML reads as a float.
BucketSize = Annotated[
    Annotated[Count, BeforeValidator(read_whole_float), Tag("number")] | Annotated[Literal["auto"], Tag("text")],
    Discriminator(_kind_of_number),
]

# What get_scheduler of transformers hands on to the schedule of each name; the others take nothing.
SCHEDULER_KEYS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
}
SchedulerKwargs = Annotated[dict[Text, Positive], Field(max_length=8)]


Tracker = Literal["tensorboard", "wandb", "trackio"]
FinalMetric = Literal["bleu"]
TargetMetric = Literal["eval_loss", "perplexity", "bleu"]

# Phi has qkv_proj and gate_up_proj in the place of five others; PEFT takes those of the names that the model has.
DEFAULT_TARGETS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip


class QuantizationSpec(Section):
    """transformers' BitsAndBytesConfig, by its own names."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def find_conflicts(self) -> list[Conflict]:
        if self.load_in_4bit != self.load_in_8bit:
            return []
        message = "set exactly one of load_in_4bit and load_in_8bit to true, or leave quantization out"
        return [Conflict(("load_in_4bit", "load_in_8bit"), message)]


class ModelSpec(Section):
    """The base model, by the names of `from_pretrained`."""

    name_or_path: Text = Field(description="Hugging Face model id, or a local directory with a config.json")
    revision: Annotated[str, Field(pattern=REVISION_PATTERN)] | None = Field(
        None, description="branch, tag or commit; a 40-digit commit reproduces exactly"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="left out, the library chooses: eager for Gemma 2, else sdpa"
    )
    trust_remote_code: bool = False
    quantization: QuantizationSpec | None = None
    device_map: Literal["auto"] | None = Field(
        None, description="auto, for one process: the weights are loaded straight onto its GPU, not by way of the host"
    )
    low_cpu_mem_usage: bool = Field(True, description="accepted as true: transformers 5 knows no other way of loading")

    def find_conflicts(self) -> list[Conflict]:
        found = []
        if self.trust_remote_code and not re.fullmatch(COMMIT_PATTERN, self.revision or ""):
            message = "runs code from the hub: pin model.revision to a 40-digit commit"
            found.append(Conflict(("trust_remote_code", "revision"), message))
        if not self.low_cpu_mem_usage:
            message = "transformers 5 knows no other way of loading: leave it out"
            found.append(Conflict(("low_cpu_mem_usage",), message))
        return found


class LoraSpec(Section):
    """PEFT's LoraConfig, by its own names."""

    r: Count
    lora_alpha: Positive | None = Field(None, description="left out, equal to r (scaling 1)")
    lora_dropout: Annotated[float, LESS_THAN_ONE] = 0.0
    target_modules: TargetModules = Field(
        DEFAULT_TARGETS,
        description="list of module names, or one regular expression over full layer names, or all-linear; "
        "left out, every projection of attention and MLP, fused or not",
    )
    exclude_modules: ExcludedModules = Field((), description="modules left out of target_modules: names, or one regex")
    layers_to_transform: Annotated[tuple[Natural, ...], Field(strict=False)] = Field(
        (), description="numbers of the layers that get adapters, from 0; left out, all. Needs a list of target_modules"
    )
    init_lora_weights: InitialWeights = Field(
        True, description="true: B starts at zero; false: at random; those that change the base's weights are not taken"
    )
    modules_to_save: Names = Field((), description="modules trained in full and saved with the adapter")
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = Field(False, description="keep tied embeddings one tensor under modules_to_save")
    rank_pattern: Annotated[dict[Text, Count], Field(max_length=256)] = Field(
        {}, description="another r for the layers that a name or regular expression matches"
    )
    alpha_pattern: Annotated[dict[Text, Positive], Field(max_length=256)] = Field(
        {}, description="another lora_alpha, likewise"
    )
    trainable_token_indices: Annotated[tuple[Natural, ...], Field(strict=False)] = Field(
        (), description="token ids whose embeddings are trained: rows of the embedding, not all of it"
    )
    autocast_adapter_dtype: bool = Field(
        True, description="adapters in float32 over a bf16 or fp16 base; PEFT's default of get_peft_model"
    )

    @property
    def alpha(self) -> float:
        """lora_alpha, or r where the spec leaves it out."""
        return float(self.r) if self.lora_alpha is None else self.lora_alpha

    @property
    def targets(self) -> tuple[str, ...] | str:
        """target_modules by transformers' names."""
        return translate_targets(self.target_modules)

    def find_conflicts(self) -> list[Conflict]:
        found = []
        if self.layers_to_transform and isinstance(self.target_modules, str):
            message = "needs target_modules as a list of names; a regular expression can name the layers itself"
            found.append(Conflict(("layers_to_transform", "target_modules"), message))
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            found.append(Conflict(("init_lora_weights", "r"), f"orthogonal needs an even r, which is {self.r}"))
        return found


class DataSpec(Section):
    """The examples and how they become tokens."""

    train: Text = Field(
        description="JSONL or Parquet file; relative paths start at the directory the command is typed in; "
        "with data.dataset the name of a split"
    )
    eval: Text | None = Field(None, description="the held-out examples, likewise")
    dataset: Text | None = Field(
        None, description="Hugging Face dataset id, or a local directory that load_dataset takes; fetched by `fetch`"
    )
    dataset_config: Text | None = Field(None, description="name of the dataset's configuration, where it has several")
    dataset_revision: Annotated[str, Field(pattern=REVISION_PATTERN)] | None = Field(
        None, description="branch, tag or commit of data.dataset"
    )
    format: Literal["prompt_completion", "chat", "text", "svg_caption"] = Field(
        "prompt_completion",
        description="keys of a row: prompt and completion; messages; text; svg and caption",
    )
    instruction: Prose | None = Field(None, description="svg_caption: what stands before the SVG in the user's turn")
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        1024, description="tokens; longer examples are left out"
    )
    packing: bool = Field(False, description="fill each sequence with several examples (training.trainer: trl)")
    pad_to_multiple_of: Count | None = None
    completion_only: bool = Field(True, description="the loss is on the completion (the model's turn) only")

    def find_conflicts(self) -> list[Conflict]:
        if self.dataset is not None:
            return []
        message = "needs data.dataset, the Hugging Face dataset that it belongs to"
        return [
            Conflict((key, "dataset"), message) for key in ("dataset_config", "dataset_revision") if getattr(self, key)
        ]

    def names_dataset_directory(self) -> bool:
        """Whether data.dataset is a directory of this machine, not an id of the hub."""
        return self.dataset is not None and Path(self.dataset).is_dir()


class TrainingSpec(Section):
    """transformers' TrainingArguments, by their own names."""

    older_words: ClassVar[dict[str, str]] = {"gradient_checkpointing": "activation_checkpointing"}
    unneeded_words: ClassVar[dict[str, str]] = {
        "remove_unused_columns": "examples become tokens and labels before the trainer sees them, without other columns"
    }

    trainer: Literal["trl", "transformers"] = Field(
        "trl", description="trl: SFTTrainer with its fused loss; transformers: the plain Trainer with the stock loss"
    )
    per_device_train_batch_size: Count = 1
    per_device_eval_batch_size: Count = 1
    gradient_accumulation_steps: Count = 1
    eval_accumulation_steps: Count | None = Field(
        None, description="accepted, changes nothing: an evaluation keeps the loss only, so nothing accumulates"
    )
    learning_rate: Positive = 2e-4
    num_train_epochs: Positive | None = Field(None, description="this or max_steps, not both")
    max_steps: Count | None = Field(None, description="optimizer steps; this or num_train_epochs, not both")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    lr_scheduler_kwargs: SchedulerKwargs = Field(
        {}, description="more for the schedule, such as num_cycles: 2 for cosine_with_restarts (left out: 1)"
    )
    warmup_ratio: Fraction = 0.0
    warmup_steps: Natural | None = None
    weight_decay: NotNegative = 0.0
    adam_beta1: Annotated[float, LESS_THAN_ONE] = 0.9
    adam_beta2: Annotated[float, LESS_THAN_ONE] = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: NotNegative = 1.0
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "adamw_torch_fused"
    )
    bf16: bool = False
    fp16: bool = False
    tf32: bool = False
    activation_checkpointing: bool = Field(
        True, description="recompute activations in the backward pass; gradient_checkpointing is the older word for it"
    )
    logging_steps: Count = 1
    eval_steps: Count | None = Field(None, description="optimizer steps between evaluations; needs data.eval")
    save_steps: Count = Field(100, description="optimizer steps between checkpoints")
    load_best_model_at_end: bool = False
    early_stopping_patience: Count | None = Field(None, description="evaluations without a better eval loss")
    early_stopping_threshold: NotNegative = 0.0
    dataloader_num_workers: Natural = 0
    dataloader_pin_memory: bool = True
    torch_empty_cache_steps: Count | None = None
    torch_compile: bool = False
    use_liger_kernel: bool = Field(False, description="Liger's fused kernels, where liger-kernel is installed")
    report_to: Annotated[tuple[Tracker, ...], Field(strict=False)] | None = Field(
        None, description="tensorboard, wandb, trackio; left out, TensorBoard where it is installed; []: none"
    )
    final_metrics: Annotated[tuple[FinalMetric, ...], Field(strict=False)] = Field(
        (),
        description="measured on the finished adapter; bleu: BLEU-4 (0 to 100) of generated answers; needs data.eval",
    )
    final_examples: Count = Field(64, description="held-out examples, from the first, that are answered for bleu")
    max_new_tokens: Count = Field(128, description="longest generated answer, in tokens")
    targets: Annotated[dict[TargetMetric, Positive], Field(max_length=8)] = Field(
        {}, description="expected results, shown beside the reached ones: eval_loss, perplexity, bleu"
    )
    # numpy's generator, which the Trainer seeds too, takes 32 bits.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    def find_conflicts(self) -> list[Conflict]:
        found = []
        if (self.num_train_epochs is None) == (self.max_steps is None):
            seen = "neither is set" if self.max_steps is None else "both are set"
            message = f"set exactly one of num_train_epochs and max_steps ({seen})"
            found.append(Conflict(("max_steps", "num_train_epochs"), message))
        if self.bf16 and self.fp16:
            found.append(Conflict(("bf16", "fp16"), "bf16 and fp16 exclude each other"))
        if self.warmup_ratio and self.warmup_steps:
            message = "warmup_ratio and warmup_steps exclude each other"
            found.append(Conflict(("warmup_steps", "warmup_ratio"), message))
        taken = SCHEDULER_KEYS.get(self.lr_scheduler_type, ())
        if unknown := sorted(self.lr_scheduler_kwargs.keys() - set(taken)):
            wanted = f"takes {' and '.join(taken)}" if taken else "takes none"
            message = f"{', '.join(unknown)}: not known to {self.lr_scheduler_type}, which {wanted}"
            found.append(Conflict(("lr_scheduler_kwargs", "lr_scheduler_type"), message))
        if self.lr_scheduler_kwargs.get("lr_end", 0) >= self.learning_rate:
            message = f"lr_end must be smaller than learning_rate ({self.learning_rate:g})"
            found.append(Conflict(("lr_scheduler_kwargs", "learning_rate"), message))
        if self.early_stopping_patience and self.eval_steps is None:
            message = "needs training.eval_steps: it counts evaluations"
            found.append(Conflict(("early_stopping_patience", "eval_steps"), message))
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            message = "needs early_stopping_patience, the evaluations to wait: alone it stops nothing"
            found.append(Conflict(("early_stopping_threshold", "early_stopping_patience"), message))
        if self.load_best_model_at_end and (self.eval_steps is None or self.save_steps % self.eval_steps):
            message = f"needs save_steps ({self.save_steps}) to be a multiple of eval_steps ({self.eval_steps})"
            found.append(Conflict(("load_best_model_at_end", "save_steps", "eval_steps"), message))
        if "bleu" in self.targets and "bleu" not in self.final_metrics:
            message = "bleu is not measured: add it to final_metrics"
            found.append(Conflict(("targets", "final_metrics"), message))
        return found


class DeepSpeedSpec(Section):
    """DeepSpeed's ZeRO settings, by the keys of its JSON. Left out of the spec, training runs without DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    allgather_bucket_size: BucketSize = Field("auto", description="elements; auto lets the Trainer choose")
    reduce_bucket_size: BucketSize = Field(
        "auto", description="elements; the buffer is allocated in full, whatever is trained; auto is hidden_size^2"
    )
    overlap_comm: bool = False
    torch_autocast: bool = Field(
        False, description="bf16 by torch's autocast instead of a cast of the weights: adapters stay float32"
    )
    contiguous_gradients: bool = True


MeshSizes = Annotated[tuple[Count, ...], Field(strict=False, min_length=1, max_length=3)]
MeshAxes = Annotated[tuple[Literal["fsdp", "dp", "data", "tp"], ...], Field(strict=False, min_length=1, max_length=3)]
MeshShape = Annotated[tuple[MeshSizes, MeshAxes], Field(strict=False)]


class ResourceSpec(Section):
    """What sbatch is asked for, by its own option names; `cluster` names a file of envs/."""

    cluster: Text = Field("local", description="name of an environment (envs/NAME.yaml) or the path of such a file")
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Annotated[str, Field(pattern=CONSTRAINT_PATTERN)] | None = None
    nodes: Count = 1
    gpus_per_node: Count = Field(1, description="one process each; on a machine without GPUs, processes")
    gpu: Word | None = Field(None, description="GPU type to size for; left out, the partition's")
    cpus_per_task: Count = 1
    mem: Size | None = Field(None, description="host memory per node, such as 120G")
    time: Duration = Field("01:00:00", description="[days-]hours:minutes:seconds")
    array_task_throttle: Count | None = Field(
        None, description="tasks of a sweep that run at once, the %N of sbatch --array; left out: all, locally one"
    )

    mesh_shape: MeshShape | None = Field(
        None, description="sizes and names of a device mesh, such as [[4, 1], [fsdp, tp]]: GPUs, and ZeRO-3 for fsdp"
    )

    @property
    def world_size(self) -> int:
        """Processes of the job: one per GPU."""
        return self.nodes * self.gpus_per_node

    def find_conflicts(self) -> list[Conflict]:
        return [] if self.mesh_shape is None else find_mesh_faults(self.mesh_shape, self.nodes, self.gpus_per_node)


class ResumeSpec(Section):
    """What happens when the job is stopped before its end."""

    auto: bool = Field(True, description="requeue after a saved stop (time limit, preemption)")
    max_attempts: Count = Field(20, description="starts in all until the run is resumed by hand")
    signal_seconds: Annotated[int, Field(ge=10, le=3600)] = Field(
        120, description="how long before the time limit the job is told to save"
    )
    hang_seconds: Annotated[int, Field(ge=5, le=86400)] = Field(
        900, description="silence that ends a rank as hung; more where its steps are longer"
    )


SweepValue = bool | int | float | Text
SweepValues = Annotated[tuple[SweepValue, ...], Field(strict=False, min_length=1, max_length=1000)]


class JobSpec(Section):
    """One fine-tune: everything that is asked, from one YAML file."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    model: ModelSpec
    lora: LoraSpec
    data: DataSpec
    training: TrainingSpec
    deepspeed: DeepSpeedSpec | None = None
    resources: ResourceSpec = ResourceSpec()
    resume: ResumeSpec = ResumeSpec()
    sweep: dict[Text, SweepValues] = Field({}, description='values to try for dotted keys, such as "lora.r": [8, 16]')

    @model_validator(mode="before")
    @classmethod
    def _fill_from_mesh(cls, values: Any) -> Any:
        """What a mesh says and the spec leaves out: GPUs per node, and ZeRO-3 for an fsdp axis."""
        return fill_from_mesh(values)

    def find_conflicts(self) -> list[Conflict]:
        found = []
        if self.resources.mesh_shape is not None and shards_weights(self.resources.mesh_shape):
            stage = None if self.deepspeed is None else self.deepspeed.zero_stage
            if stage != 3:
                message = f"its axis fsdp splits the weights, which is deepspeed.zero_stage: 3 (it is {stage})"
                found.append(Conflict(("resources.mesh_shape", "deepspeed.zero_stage"), message))
        if self.training.eval_steps is not None and self.data.eval is None:
            found.append(Conflict(("training.eval_steps", "data.eval"), "needs data.eval, the held-out examples"))
        unheld = [key for key in ("final_metrics", "targets") if getattr(self.training, key) and self.data.eval is None]
        needs = "needs data.eval, the held-out examples"
        found += [Conflict((f"training.{key}", "data.eval"), needs) for key in unheld]
        if self.training.final_metrics and self.deepspeed is not None and self.deepspeed.zero_stage == 3:
            message = "generates answers, which ZeRO-3 is not asked to do here: use zero_stage 2, or leave it out"
            found.append(Conflict(("training.final_metrics", "deepspeed.zero_stage"), message))
        if self.training.final_metrics and (unprompted := _find_unprompted(self.data)) is not None:
            key, why = unprompted
            message = (
                f"bleu answers held-out prompts, and with {why} no example has one: leave bleu out, or change that"
            )
            found.append(Conflict(("training.final_metrics", f"data.{key}"), message))
        if self.model.device_map is not None and (self.resources.world_size > 1 or self.deepspeed is not None):
            message = "is for one process without DeepSpeed: each of several has a GPU of its own, so leave it out"
            found.append(Conflict(("model.device_map", "resources.gpus_per_node", "deepspeed"), message))
        if self.data.packing and self.training.trainer != "trl":
            found.append(Conflict(("data.packing", "training.trainer"), "needs training.trainer: trl"))
        if self.training.bf16 and self.model.dtype == "float16":
            found.append(Conflict(("training.bf16", "model.dtype"), "contradicts model.dtype: float16"))
        if self.training.fp16 and self.model.dtype == "bfloat16":
            found.append(Conflict(("training.fp16", "model.dtype"), "contradicts model.dtype: bfloat16"))
        return [*found, *_find_precision_conflicts(self)]

    @model_validator(mode="after")
    def _sweep_names_known_keys(self) -> JobSpec:
        found = [(key, message) for key, values in self.sweep.items() if (message := find_sweep_fault(key, values))]
        if found:
            raise ConflictError([Conflict((f"sweep.{key}",), message) for key, message in found])
        return self

    def to_values(self) -> dict[str, Any]:
        """Plain values (dict, list, str, int, float, bool, None) that load back to an equal spec."""
        return self.model_dump(mode="json")


def _find_unprompted(data: DataSpec) -> tuple[str, str] | None:
    """The key by which the loss is on whole examples, so that none has a prompt before its answer; and its value."""
    if data.format == "text":
        return "format", "data.format: text"
    return None if data.completion_only else ("completion_only", "data.completion_only: false")


def _find_precision_conflicts(spec: JobSpec) -> list[Conflict]:
    """What the libraries refuse when the job starts, hours later."""
    found = []
    half = spec.training.bf16 or spec.training.fp16 or spec.model.dtype != "float32"
    if spec.model.attn_implementation == "flash_attention_2" and not half:
        message = "flash_attention_2 computes in bf16 or fp16 only: set training.bf16"
        found.append(Conflict(("model.attn_implementation", "training.bf16", "model.dtype"), message))
    if spec.training.use_liger_kernel and spec.training.trainer == "trl":
        message = "needs training.trainer: transformers; trl has a fused loss of its own"
        found.append(Conflict(("training.use_liger_kernel", "training.trainer"), message))
    zero = spec.deepspeed
    if zero is not None and zero.zero_stage == 3 and spec.model.quantization is not None:
        message = (
            "does not work with model.quantization: transformers loads no bitsandbytes weights under ZeRO-3; use 2"
        )
        found.append(Conflict(("deepspeed.zero_stage", "model.quantization"), message))
    if zero is not None and zero.torch_autocast and not spec.training.bf16:
        message = "is bf16 by another way: needs training.bf16: true"
        found.append(Conflict(("deepspeed.torch_autocast", "training.bf16"), message))
    return found


SWEPT_SECTIONS: dict[str, type[Section]] = {
    "model": ModelSpec,
    "lora": LoraSpec,
    "data": DataSpec,
    "training": TrainingSpec,
    "deepspeed": DeepSpeedSpec,
}


def find_sweep_fault(key: str, values: tuple[SweepValue, ...]) -> str | None:
    """Why a sweep can't vary this dotted key over these values; None where it can."""
    section, _, rest = key.partition(".")
    if section == "resources" and rest in ResourceSpec.model_fields:
        return "can't be swept: all tasks of a Slurm array ask for the same; submit once a value with --set"
    *names, field = rest.split(".")
    known = find_section(SWEPT_SECTIONS[section], tuple(names)) if section in SWEPT_SECTIONS else None
    if known is None or field not in known.model_fields:
        return "is no key that can be swept: wanted section.key, such as lora.r"
    seen = [(type(value), value) for value in values]
    twice = next((value for number, value in enumerate(seen) if value in seen[:number]), None)
    return None if twice is None else f"holds {twice[1]!r} twice: each value is one run"
