"""What a torch file would run if it were loaded: read from its pickle with pickletools, which executes nothing."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_PICKLE_BYTES = 64 * 1024**2
_ZIP_START = b"PK\x03\x04"
_STORAGES = ("Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double", "Bool")
_DTYPES = (
    "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip

# "module name" of everything that the files of Trainer, PEFT and DeepSpeed name. Source: the checkpoints that the
# pinned versions write (plain, DDP, ZeRO-1 to 3, fp16, bf16, 8-bit Adam).
ALLOWED_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "collections defaultdict",
        "_codecs encode",
        "builtins set",
        "__builtin__ set",
        "builtins dict",
        "__builtin__ dict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        # A tensor with attributes, as ZeRO-3 leaves them: torch's own weights_only unpickler takes both.
        "torch._tensor _rebuild_from_type_v2",
        "torch Tensor",
        "torch Size",
        "torch device",
        "torch.storage UntypedStorage",
        *(f"torch {kind}Storage" for kind in _STORAGES),
        *(f"torch {name}" for name in _DTYPES),
        "numpy ndarray",
        "numpy dtype",
        "numpy.core.multiarray _reconstruct",
        "numpy.core.multiarray scalar",
        "numpy._core.multiarray _reconstruct",
        "numpy._core.multiarray scalar",
        "deepspeed.runtime.zero.config ZeroStageEnum",
        "deepspeed.utils.tensor_fragment fragment_address",
        "deepspeed.runtime.fp16.loss_scaler LossScaler",
        "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
    }
)

_STRINGS = frozenset({"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING"})
_STORES = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_FETCHES = frozenset({"GET", "BINGET", "LONG_BINGET"})
_REGISTERED = frozenset({"EXT1", "EXT2", "EXT4"})


def check_archive(archive: zipfile.ZipFile, start: bytes) -> None:
    """ValueError, in words, when torch.load of this zip archive could do anything but build known values.

    `start` is the first bytes of the file: torch reads anything that does not start as a zip as a bare pickle.
    """
    if start != _ZIP_START:
        raise ValueError("it does not start as a zip archive: torch would read it as a bare pickle")
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError("two entries have one name")
    if compressed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"{compressed[0]} is compressed: torch stores its entries as they are")
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if [entry.filename.partition("/")[2] for entry in pickles] != ["data.pkl"]:
        raise ValueError(f"wanted one data.pkl, found {', '.join(entry.filename for entry in pickles) or 'none'}")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
    if unknown := sorted(set(list_globals(archive.read(pickles[0]))) - ALLOWED_GLOBALS):
        names_of = ", ".join(name.replace(" ", ".") for name in unknown[:3])
        raise ValueError(f"loading it would run {names_of}, which no checkpoint needs")


def list_globals(data: bytes) -> Iterator[str]:
    """Every "module name" that a pickle would import. ValueError where one can't be told without running it."""
    import pickletools  # slow to load: only where it is worth it

    memo: dict[int, str | None] = {}
    recent: list[str | None] = []
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in {"GLOBAL", "INST"}:
            yield str(argument)
        elif name == "STACK_GLOBAL":
            yield _join(recent)
        elif name in _REGISTERED:
            raise ValueError("its pickle uses the extension registry")
        if name in _STORES:
            memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = recent[-1] if recent else None
        elif name not in {"PROTO", "FRAME"}:
            recent = [*recent[-1:], _find_text(name, argument, memo)]


def _find_text(name: str, argument: Any, memo: dict[int, str | None]) -> str | None:
    """The text that an opcode leaves on top of the stack; None for anything else."""
    if name in _STRINGS:
        return argument.decode("latin-1") if isinstance(argument, bytes) else str(argument)
    return memo.get(int(argument)) if name in _FETCHES else None


def _join(recent: Sequence[str | None]) -> str:
    module, name = ([None, None, *recent])[-2:]
    if module is None or name is None:
        raise ValueError("its pickle computes the name of what it imports")
    return f"{module} {name}"
