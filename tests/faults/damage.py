"""What can happen to a checkpoint, one row each: a name and a function that does it to the newest one of a run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MANIFEST = "MANIFEST.json"
ADAPTER = "adapter_model.safetensors"
STATE = "trainer_state.json"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Scene:
    """A stopped run: its newest checkpoint, the older good one, and a checkpoint of the same step of another run."""

    newest: Path
    older: Path
    foreign: Path
    marker: Path
    """Created by code that is hidden in a checkpoint, should anything run it."""

    def find(self, pattern: str) -> Path:
        """The one file of the newest checkpoint that fits; a pattern is `rank1` or a name."""
        patterns = {
            "shard0": "global_step*/*zero_pp_rank_0*optim_states.pt",
            "shard1": "global_step*/*zero_pp_rank_1*optim_states.pt",
            "model_states": "global_step*/mp_rank_00_model_states.pt",
        }
        (found,) = self.newest.glob(patterns.get(pattern, pattern))
        return found


@dataclass(frozen=True)
class Damage:
    """`kinds`: which trainings have the file at all. `zero2`: DeepSpeed ZeRO-2 with two ranks; `plain`: one process.

    `expected`: what our resume may do.
    """

    name: str
    apply: Callable[[Scene], None]
    kinds: tuple[str, ...] = ("plain", "zero2")
    ours_only: bool = False
    expected: tuple[str, ...] = ("fell back",)
    needs_root: bool = False


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_bit(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        remove(path)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))


def edit_adapter(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite an adapter's tensors."""
    from safetensors.torch import load_file, save_file

    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def rename_keys(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("lora_A", "lora_X"): tensor for key, tensor in tensors.items()}


def poison(tensors: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(tensors))
    tensors[first].view(-1)[0] = float("nan")
    return tensors


def poison_state(path: Path, moments: bool) -> None:
    """NaN in the moments, or in the fp32 master copy that ZeRO keeps of the weights."""
    import torch

    state = torch.load(path, weights_only=False)
    if "optimizer_state_dict" in state:
        zero_state = state["optimizer_state_dict"]
        if moments:
            inner = zero_state["base_optimizer_state"]
            rows = inner["state"].values() if "state" in inner else inner
            next(iter(rows))["exp_avg"].data.view(-1)[0] = float("nan")
        else:
            zero_state["single_partition_of_fp32_groups"][0].data.view(-1)[0] = float("nan")
    else:
        next(iter(state["state"].values()))["exp_avg"].data.view(-1)[0] = float("nan")
    torch.save(state, path)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (os.system, (f"touch {self.marker}",))


def hide_bomb(path: Path, marker: Path) -> None:
    """A whole, loadable torch file that holds its old content and code to run at load."""
    import torch

    state = torch.load(path, weights_only=False)
    torch.save({**state, "extra": Bomb(marker)}, path)


def hide_global(path: Path) -> None:
    """A harmless object of a class that no training state needs."""
    import torch

    state = torch.load(path, weights_only=False)
    torch.save({**state, "extra": shutil.copyfile}, path)


def replace_by_link(path: Path, outside: Path) -> None:
    target = outside / f"{path.parents[1].name}-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def recommit(directory: Path) -> None:
    """Make the manifest agree with the files again: sizes, hashes and its own digest."""
    path = directory / MANIFEST
    values = json.loads(path.read_text())
    for name, entry in list(values["files"].items()):
        if not (directory / name).is_file():
            del values["files"][name]
            continue
        content = (directory / name).read_bytes()
        entry["bytes"], entry["hash"] = len(content), xxhash.xxh3_128(content).hexdigest()
    write_manifest(path, values)


def write_manifest(path: Path, values: dict[str, Any]) -> None:
    values.pop("digest", None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**values, "digest": xxhash.xxh3_128(text.encode()).hexdigest()}, indent=2))


def take_foreign(scene: Scene, pattern: str) -> None:
    """A file of another run's checkpoint of the same step."""
    path = scene.find(pattern)
    path.write_bytes((scene.foreign / path.relative_to(scene.newest)).read_bytes())


def take_older(scene: Scene, pattern: str) -> None:
    """A file of the older checkpoint of the same run."""
    path = scene.find(pattern)
    name = path.name
    (source,) = [found for found in scene.older.rglob(name) if found.is_file()]
    path.write_bytes(source.read_bytes())


ZERO = ("zero2",)
PLAIN = ("plain",)

NOTHING = Damage("nothing is damaged", lambda _: None)
DAMAGES: tuple[Damage, ...] = (
    Damage("trainer_state.json is missing", lambda s: remove(s.newest / STATE)),
    Damage("trainer_state.json is cut in half", lambda s: cut(s.newest / STATE)),
    Damage("the newest folder is empty", lambda s: empty(s.newest)),
    Damage("latest is missing", lambda s: remove(s.newest / "latest"), ZERO),
    Damage("latest is empty", lambda s: cut(s.newest / "latest", 0), ZERO),
    Damage("model states are missing", lambda s: remove(s.find("model_states")), ZERO),
    Damage("rank 1's optimizer shard is missing", lambda s: remove(s.find("shard1")), ZERO),
    Damage("rank 1's optimizer shard is cut in half", lambda s: cut(s.find("shard1")), ZERO),
    Damage("rank 1's optimizer shard is all zeros", lambda s: zero(s.find("shard1")), ZERO),
    Damage("rank 1's optimizer shard has no bytes", lambda s: cut(s.find("shard1"), 0), ZERO),
    Damage("one bit flipped in an optimizer shard", lambda s: flip_bit(s.find("shard1")), ZERO),
    Damage("one bit flipped in the model states", lambda s: flip_bit(s.find("model_states")), ZERO),
    Damage("the ranks' optimizer shards are swapped", lambda s: swap(s.find("shard0"), s.find("shard1")), ZERO),
    Damage("an optimizer shard of an older step", lambda s: take_older(s, "shard1"), ZERO),
    Damage("an optimizer shard of another run", lambda s: take_foreign(s, "shard1"), ZERO),
    Damage("rng_state_1.pth is missing", lambda s: remove(s.newest / "rng_state_1.pth"), ZERO),
    Damage("rng_state.pth is missing", lambda s: remove(s.newest / "rng_state.pth"), PLAIN),
    Damage("optimizer.pt is missing", lambda s: remove(s.newest / "optimizer.pt"), PLAIN),
    Damage("scheduler.pt is missing", lambda s: remove(s.newest / "scheduler.pt"), PLAIN),
    Damage("optimizer.pt is cut in half", lambda s: cut(s.newest / "optimizer.pt"), PLAIN),
    Damage("optimizer.pt is all zeros", lambda s: zero(s.newest / "optimizer.pt"), PLAIN),
    Damage("one bit flipped in optimizer.pt", lambda s: flip_bit(s.newest / "optimizer.pt"), PLAIN),
    Damage("optimizer.pt of an older step", lambda s: take_older(s, "optimizer.pt"), PLAIN),
    Damage("the adapter is missing", lambda s: remove(s.newest / ADAPTER)),
    Damage("the adapter is cut in half", lambda s: cut(s.newest / ADAPTER)),
    Damage("the adapter is all zeros", lambda s: zero(s.newest / ADAPTER)),
    Damage("one bit flipped in the adapter", lambda s: flip_bit(s.newest / ADAPTER, 0.7)),
    Damage("the adapter's keys are renamed", lambda s: edit_adapter(s.newest / ADAPTER, rename_keys)),
    Damage("the adapter is another run's", lambda s: take_foreign(s, ADAPTER)),
    Damage("NaN in the adapter", lambda s: edit_adapter(s.newest / ADAPTER, poison)),
    Damage("NaN in the fp32 master weights", lambda s: poison_state(s.find("shard0"), False), ZERO),
    Damage("NaN in the moments (shard)", lambda s: poison_state(s.find("shard0"), True), ZERO),
    Damage("NaN in the moments (optimizer.pt)", lambda s: poison_state(s.newest / "optimizer.pt", True), PLAIN),
    Damage("adapter_config.json has another lora_alpha", lambda s: edit_json(s.newest / CONFIG, lora_alpha=64)),
    Damage("global_step is edited", lambda s: edit_json(s.newest / STATE, global_step=6)),
    Damage("a file is a link out of the run", lambda s: replace_by_link(s.newest / ADAPTER, s.marker.parent)),
    Damage(
        "the folder is a link out of the run",
        lambda s: replace_by_link(s.newest, s.marker.parent),
        expected=("fell back", "refused"),
    ),
    Damage("code hidden in an optimizer shard", lambda s: hide_bomb(s.find("shard0"), s.marker), ZERO),
    Damage("code hidden in optimizer.pt", lambda s: hide_bomb(s.newest / "optimizer.pt", s.marker), PLAIN),
    Damage("a class nobody needs in an optimizer shard", lambda s: hide_global(s.find("shard0")), ZERO),
    Damage("the manifest is missing", lambda s: remove(s.newest / MANIFEST), ours_only=True),
    Damage("the manifest is cut in half", lambda s: cut(s.newest / MANIFEST), ours_only=True),
    Damage("the manifest says another step", lambda s: edit_json(s.newest / MANIFEST, step=6), ours_only=True),
    Damage("the manifest of another folder", lambda s: shutil.copy(s.older / MANIFEST, s.newest), ours_only=True),
    Damage("the manifest of another run", lambda s: shutil.copy(s.foreign / MANIFEST, s.newest), ours_only=True),
    Damage("a file that nobody committed", lambda s: (s.newest / "extra.pt").touch(), ours_only=True),
)

# Whole, but somebody else could have written it. Only root can give files away.
OTHERS = 65534
OPEN: tuple[Damage, ...] = (
    Damage("the adapter can be written by everyone", lambda s: (s.newest / ADAPTER).chmod(0o666)),
    Damage("the newest folder can be written by everyone", lambda s: s.newest.chmod(0o777), PLAIN),
    Damage("the newest folder is another user's", lambda s: os.chown(s.newest, OTHERS, OTHERS), PLAIN, needs_root=True),
    Damage(
        "an optimizer shard is another user's", lambda s: os.chown(s.find("shard1"), OTHERS, OTHERS), ZERO,
        needs_root=True,
    ),
)  # fmt: skip

# The same, but committed so: what a hash over wrong bytes cannot tell, and only their meaning can.
COMMITTED: tuple[Damage, ...] = (
    Damage("committed: rank 1's optimizer shard is missing", lambda s: remove(s.find("shard1")), ZERO),
    Damage("committed: rank 1's optimizer shard is all zeros", lambda s: zero(s.find("shard1")), ZERO),
    Damage("committed: an optimizer shard of an older step", lambda s: take_older(s, "shard1"), ZERO),
    Damage("committed: the adapter is another run's", lambda s: take_foreign(s, ADAPTER), ZERO),
    Damage("committed: NaN in the adapter", lambda s: edit_adapter(s.newest / ADAPTER, poison)),
    Damage("committed: NaN in the fp32 master weights", lambda s: poison_state(s.find("shard0"), False), ZERO),
    Damage("committed: NaN in the moments (shard)", lambda s: poison_state(s.find("shard0"), True), ZERO),
    Damage(
        "committed: NaN in the moments (optimizer.pt)", lambda s: poison_state(s.newest / "optimizer.pt", True), PLAIN
    ),
    Damage("committed: global_step is edited", lambda s: edit_json(s.newest / STATE, global_step=6)),
    Damage("committed: code hidden in an optimizer shard", lambda s: hide_bomb(s.find("shard0"), s.marker), ZERO),
    Damage("committed: code hidden in optimizer.pt", lambda s: hide_bomb(s.newest / "optimizer.pt", s.marker), PLAIN),
    Damage("committed: a class nobody needs", lambda s: hide_global(s.find("shard0")), ZERO),
)


def damage(case: Damage, scene: Scene, *, committed: bool) -> None:
    """Do it; with `committed` the manifest then agrees with what is there."""
    case.apply(scene)
    if committed:
        recommit(scene.newest)
