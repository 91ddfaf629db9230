"""How many of an adapter's tensors each way of saving writes under FSDP1 with the llama-recipes wrapping policy.

    python benchmarks/empty_adapter.py      # two gloo ranks on the CPU, a tiny Llama: no download, about 15 s

PEFT 0.21 takes `_fsdp_wrapped_module.` out of the front of a module's name only. Under a policy that wraps inner
modules no tensor belongs to the adapter any more, and the file that is written, without a warning, is empty.
"""

from __future__ import annotations

import filecmp
import os
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import async_ckpt

RANKS = 2
ADAPTER = "adapter_model.safetensors"
EXPECTED = "PEFT save_pretrained, before wrapping"


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    # With the usual zeros in lora_B a wrong file could look right.
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


def llama_recipes_policy() -> Any:
    """Each decoder layer is a unit, and so is each trainable leaf: lora_A and lora_B."""

    def trainable_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.named_children()) and weight is not None and weight.requires_grad

    leaves = partial(lambda_auto_wrap_policy, lambda_fn=trainable_leaf)
    layers = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return partial(_or_policy, policies=[leaves, layers])


def save_every_way(root: Path) -> dict[str, Path]:
    """Each way of saving the same weights, and the file it wrote."""
    main = dist.get_rank() == 0
    files = {}

    def directory(way: str) -> str:
        files[way] = root / str(len(files)) / ADAPTER
        return str(files[way].parent)

    model = tiny_model()
    model.save_pretrained(directory(EXPECTED), is_main_process=main)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=llama_recipes_policy(), use_orig_params=True, device_id=torch.device("cpu")
    )
    tokens = torch.arange(16).view(1, 16)
    wrapped(input_ids=tokens, labels=tokens).loss.backward()  # FSDP1 finds its root in the first forward
    wrapped.save_pretrained(directory("PEFT save_pretrained, wrapped model"), is_main_process=main)
    # llama-recipes adds cpu_offload=True, which crashes in torch when the ranks are on the CPU already.
    gathered = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    way = directory("llama-recipes: gather all, save_pretrained")
    wrapped.save_pretrained(way, state_dict=gathered, is_main_process=main)
    with async_ckpt.attach(wrapped, directory=root / "async_ckpt") as ckpt:
        files["async_ckpt"] = ckpt.save(0).wait() / ADAPTER
    return files


def print_table(files: dict[str, Path]) -> None:
    packages = ("torch", "peft", "transformers")
    print("FSDP1, llama-recipes policy, 2 ranks;", ", ".join(f"{name} {version(name)}" for name in packages))
    print(f"{'way of saving':44} {'tensors':>8} {'bytes':>8}  content")
    for way, path in files.items():
        with safe_open(path, "pt") as file:
            tensors = len(file.keys())
        content = "right" if filecmp.cmp(path, files[EXPECTED], shallow=False) else "WRONG"
        print(f"{way:44} {tensors:8} {path.stat().st_size:8}  {'reference' if way == EXPECTED else content}")


def main() -> None:
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory() as root:
            os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", TRANSFORMERS_VERBOSITY="error")
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
            sys.exit(os.spawnv(os.P_WAIT, sys.executable, [*launcher, __file__, root]))
    dist.init_process_group("gloo")
    files = save_every_way(Path(sys.argv[1]))
    if dist.get_rank() == 0:
        print_table(files)
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # taking down gloo under FSDP1 may abort


if __name__ == "__main__":
    main()
