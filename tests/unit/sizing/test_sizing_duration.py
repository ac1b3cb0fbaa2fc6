"""How long a job trains: against published speeds, by hand, and where something is not known."""

from __future__ import annotations

import pytest

from lora_jobs.sizing import GPUS, cpu_device, find_gpu
from lora_jobs.sizing.duration import (
    SPEEDS,
    Rows,
    Work,
    count_row_tokens,
    count_work,
    estimate_duration,
    keep_rows,
    step_flops,
    sustained_flops,
)
from lora_jobs.sizing.models import ModelShape, find_shape
from lora_jobs.spec import JobSpec, parse_spec
from lora_jobs.units import GIB

# Qwen-7B as its config.json has it; close to Llama in everything that costs time.
QWEN_7B = ModelShape(
    "qwen-7b", "llama", 151936, 4096, 11008, 32, 32, 32, 128, False, 8192, source="Qwen/Qwen-7B config.json"
)  # fmt: skip


def build_spec(*overrides: str) -> JobSpec:
    text = (
        "name: t\nmodel: {name_or_path: google/gemma-2-2b, dtype: bfloat16}\n"
        "lora: {r: 64}\ndata: {train: t.jsonl, max_length: 1024}\n"
        "training: {max_steps: 1, bf16: true, per_device_train_batch_size: 1, gradient_accumulation_steps: 8}\n"
    )
    return parse_spec(text, source="t.yaml", overrides=overrides)


@pytest.mark.parametrize(
    ("tokens", "seconds", "quantized_seconds"),
    # Qwen's README, "Profiling of Memory and Speed": 7B on one A100-80, batch 1, accumulation 8, checkpointing.
    [(512, 1.5, 3.0), (1024, 2.8, 3.5), (2048, 5.2, 7.0), (4096, 10.1, 11.6), (8192, 21.3, 22.3)],
)
def test_published_speeds_on_an_a100(tokens: int, seconds: float, quantized_seconds: float):
    work = Work(steps=1, sequences=8, row_tokens=tokens, computed_tokens=8.0 * tokens, evaluation_tokens=0)
    plain = estimate_duration(build_spec(), QWEN_7B, find_gpu("A100-80"), work)
    quantized_spec = build_spec("model.quantization={load_in_4bit: true}")
    quantized = estimate_duration(quantized_spec, QWEN_7B, find_gpu("A100-80"), work)
    assert plain is not None
    assert quantized is not None
    assert plain.components["training"] == pytest.approx(seconds, rel=0.15)
    if tokens > 512:
        assert quantized.components["training"] == pytest.approx(quantized_seconds, rel=0.35)


def test_flops_of_a_step_by_hand():
    """Two for each weight and pass; three passes with checkpointing; adapters' weight gradients on top."""
    h, i, layers, vocabulary, r, s = 4096, 11008, 32, 151936, 64, 1024
    linear = layers * (4 * h * h + 3 * h * i) + vocabulary * h
    adapters = layers * r * (4 * (h + h) + 3 * (h + i))
    attention = 2 * s * h * layers
    forward = 2 * (linear + adapters) + attention
    expected = 3 * forward + attention + 2 * adapters
    assert step_flops(build_spec(), QWEN_7B, s) == expected
    off = build_spec("training.activation_checkpointing=false")
    assert step_flops(off, QWEN_7B, s) == expected - forward


def test_sliding_windows_bound_the_attention():
    shape = find_shape("gemma-3-1b")
    near, far = (step_flops(build_spec(), shape, tokens) for tokens in (512, 1024))
    full_only = 4 * 2 * 512 * shape.query_size * (shape.num_hidden_layers - shape.sliding_layers)
    assert far - near == full_only


def test_every_gpu_of_the_table_has_a_speed():
    assert set(SPEEDS) == {gpu.name for gpu in GPUS}


def test_precision_decides_the_peak():
    a100 = find_gpu("A100-80")

    def peak(*overrides: str) -> float:
        found = sustained_flops(build_spec(*overrides), a100, 10**9)
        assert found is not None
        return found[0] / 0.5e12

    single = ("model.dtype=float32", "training.bf16=false")
    assert [round(peak(*case), 1) for case in ((), single, (*single, "training.tf32=true"))] == [312, 19.5, 156]


def test_rows_longer_than_max_length_are_left_out():
    tokens = [count_row_tokens(characters) for characters in (35, 70, 3500)]
    assert keep_rows(tokens, 100) == Rows((22, 32), too_long=1)
    assert keep_rows([101], 100) is None


def test_what_the_tokenizer_counted_is_no_guess():
    found = [keep_rows([10, 20, 300], 100, counted=counted) for counted in (0, 2, 3)]
    assert [rows.basis for rows in found if rows] == ["guessed", "partly counted", "counted"]


def test_the_longest_of_a_batch():
    rows = Rows((10, 20, 30, 40))
    assert rows.longest_of(1) == rows.mean() == 25
    assert rows.longest_of(2) == pytest.approx((10 * 1 + 20 * 3 + 30 * 5 + 40 * 7) / 16)
    assert rows.longest_of(1000) == pytest.approx(40)


def test_work_of_epochs_steps_packing_and_padding():
    rows = Rows(tuple([100] * 90 + [200] * 10))
    epochs = build_spec("training.max_steps=null", "training.num_train_epochs=2", "resources.gpus_per_node=4")
    work = count_work(epochs, rows, None)
    assert work is not None
    assert (work.steps, work.sequences, work.text_tokens) == (7, 7 * 32, 7 * 32 * 110)
    padded = count_work(build_spec("data.pad_to_multiple_of=64"), rows, None)
    assert padded is not None
    assert padded.computed_tokens == 8 * 128
    packed = count_work(build_spec("data.packing=true"), rows, None)
    assert packed is not None
    assert packed.computed_tokens == 8 * 1024
    assert count_work(epochs, None, None) is None
    longest = count_work(build_spec(), None, None)
    assert longest is not None
    assert longest.text_tokens == 8 * 1024


def test_evaluations_are_counted():
    spec = build_spec("data.eval=e.jsonl", "training.eval_steps=10", "training.max_steps=100")
    work = count_work(spec, Rows((100,)), Rows((50, 50)))
    assert work is not None
    assert work.evaluation_tokens == 12 * 2 * 50


def test_a_measured_speed_replaces_the_estimate():
    spec = build_spec("resources.gpus_per_node=4", "training.max_steps=100")
    work = count_work(spec, Rows((500,)), None)
    assert work is not None
    shape, gpu = find_shape("gemma-2-2b"), find_gpu("A100-64")
    found = estimate_duration(spec, shape, gpu, work, measured=1000.0, runs="t-1")
    assert found is not None
    assert found.components["training"] == pytest.approx(100 * 32 * 500 / (1000 * 4 * 0.95))
    assert found.tokens_per_second == pytest.approx(3800)
    assert (found.measured, found.basis) == (True, "measured: 1,000 tokens/s a GPU in t-1")
    guessed = estimate_duration(spec, shape, gpu, work)
    assert guessed is not None
    assert not guessed.measured
    assert "of A100-64's 312 TFLOP/s" in guessed.basis


def test_an_unknown_gpu_has_no_duration_unless_measured():
    from lora_jobs.sizing import detected_gpu

    spec, shape = build_spec(), find_shape("gemma-2-2b")
    work = Work(1, 8, 100, 800, 0)
    unknown = detected_gpu("NVIDIA B300", 288 * GIB)
    assert estimate_duration(spec, shape, unknown, work) is None
    assert estimate_duration(spec, shape, unknown, work, measured=5.0, runs="t-1") is not None
    assert estimate_duration(spec, shape, cpu_device(64 * GIB), work) is not None
