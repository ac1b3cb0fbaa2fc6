"""Checkpoints as Trainer and DeepSpeed write them, without torch: real safetensors, real zip archives, real JSON."""

from __future__ import annotations

import json
import struct
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    """float32 tensors of one dimension, by the format's own description."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


def write_torch(path: Path, content: bytes) -> None:
    """A stored (not compressed) zip archive, as torch.save writes it: an empty dict, and bytes that nothing names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", content)


def write_checkpoint(directory: Path, *, step: int, world_size: int = 1, deepspeed: bool = False) -> None:
    directory.mkdir(parents=True)
    state = {"global_step": step, "epoch": step / 8, "log_history": [{"step": step, "loss": 1.5}]}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    (directory / "adapter_config.json").write_text('{"r": 8}')
    write_safetensors(directory / "adapter_model.safetensors", {"a": bytes(range(64)), "b": b"\1" * 128})
    (directory / "README.md").write_text("An adapter.\n")
    for rank in range(world_size):
        name = "rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth"
        write_torch(directory / name, b"random state")
    write_torch(directory / "scheduler.pt", b"scheduler")
    if not deepspeed:
        write_torch(directory / "optimizer.pt", b"moments" * 100)
        return
    folder = directory / f"global_step{step}"
    folder.mkdir()
    (directory / "latest").write_text(folder.name)
    write_torch(folder / "mp_rank_00_model_states.pt", b"model")
    for rank in range(world_size):
        write_torch(folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", b"moments" * 100)
