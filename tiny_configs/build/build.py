"""Make one of the tiny models from nothing, by the config NAME.json beside this file:

    python tiny_configs/build/build.py runs/build-NAME/model

What it begins with is made first: another model, or fresh weights of a shape, a folder here with
config.json and a tokenizer.  A model that is there is left alone.
"""

import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))

import opd  # noqa: E402


def fresh(shape: str, folder: str | Path, seed: int = 0) -> None:
    """Save a model of this shape with fresh weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(HERE / shape))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(HERE / shape).save_pretrained(folder)


def build(model: str) -> None:
    """Make the model runs/build-NAME/model, if it is not there; any other name is left alone.

    It is saved once more in half precision, as the shipped ones are.  The synonym models learn
    from soft labels, by soft_labels.py.
    """
    folder = Path(model).parent
    if not folder.name.startswith("build-") or Path(model).exists():
        return
    opd.require(not folder.exists(), f"{folder}: was not finished; delete it")
    name, hooks = folder.name.removeprefix("build-"), {}
    if (HERE / name).is_dir():
        fresh(name, model)
        return
    config = opd.Config.load(HERE / f"{name}.json")
    build(config.student)
    if config.task.startswith("synonyms"):
        hooks = runpy.run_path(str(HERE / "soft_labels.py"))["soft_labels"](config.task)
    run = opd.train(config, **hooks)
    run.model.half().save_pretrained(run.dir / "model")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(sys.argv[1])
