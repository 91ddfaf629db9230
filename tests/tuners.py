"""Every way in which PEFT adapts a model, as small seeded cases: what async_ckpt saves, and what it refuses.

`python -m tests.tuners` writes docs/tuners.md from it. A new release of PEFT may add a tuner: then
tests/test_tuners.py fails and names it, until it has a case here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft import PeftType
from torch import nn

from tests import tuner_models as models
from tests.tiny_llama import lora

BaseModel = Callable[[torch.dtype], nn.Module]


@dataclass(frozen=True)
class Refusal:
    """`reason` and `instead` are quoted from the error that attach raises."""

    reason: str
    instead: str


@dataclass(frozen=True)
class TunerCase:
    """One adapter on one tiny model.

    `extend` is applied to the PeftModel when it was made. `refused` holds under every wrapper. `inputs` are what the
    forward takes besides tokens; it may change buffers that are saved, at random (`changes_in_forward`).
    """

    name: str
    kind: PeftType
    make_config: Callable[[], Any]
    base: BaseModel = models.llama
    extend: Callable[[Any], None] | None = None
    adapter_name: str = "default"
    inputs: Mapping[str, Any] = field(default_factory=dict)
    refused: Refusal | None = None
    changes_in_forward: bool = False

    def build(self, dtype: torch.dtype = torch.float32, *, whole: bool = False) -> Any:
        """The same model with the same values each time, on every rank; with `whole` all of it is converted."""
        with models.clustering():
            model = models.adapted(self.base(dtype), self.make_config())
        if self.extend is not None:
            torch.manual_seed(11)
            self.extend(model)
        if whole:
            model.to(dtype)
        models.randomise(model)
        return model


CASES: dict[str, TunerCase] = {}

ATTENTION = ["q_proj", "v_proj"]
OWN_FIELDS = ("extend", "adapter_name", "inputs", "refused", "changes_in_forward")
ASK_PEFT = "save with save_pretrained"


def _add(name: str, kind: PeftType, config_class: Any, /, base: BaseModel = models.llama, **options: Any) -> None:
    """`options` are the case's own fields, and else the configuration's."""
    own = {key: options.pop(key) for key in OWN_FIELDS if key in options}
    if base is not models.conv_net:
        options.setdefault("task_type", "CAUSAL_LM")
    assert name not in CASES
    CASES[name] = TunerCase(name, kind, lambda: config_class(**options), base, **own)


def _lora(name: str, /, base: BaseModel = models.llama, **options: Any) -> None:
    _add(name, PeftType.LORA, lora, base, **options)


def _tuner(kind: str, /, variant: str = "", target_modules: Any = ATTENTION, **options: Any) -> None:
    """A tuner that needs no more than its name to be found in PEFT."""
    peft_type = PeftType[kind]
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    name = kind.lower() + (f", {variant}" if variant else "")
    _add(name, peft_type, config_class, target_modules=target_modules, **options)


def _prompt(kind: str, /, variant: str = "", **options: Any) -> None:
    peft_type = PeftType[kind]
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    name = kind.lower() + (f", {variant}" if variant else "")
    _add(name, peft_type, config_class, **{"num_virtual_tokens": 5, **options})


def _add_second(model: Any) -> None:
    model.add_adapter("second", lora(target_modules=["k_proj"], modules_to_save=["lm_head"]))


def _add_second_prompt(model: Any) -> None:
    model.add_adapter("second", peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"))


def _mix_dtypes(model: Any) -> None:
    """The adapter of the first layer in another dtype. Within a layer FSDP2 allows one trained dtype only."""
    other = torch.float32 if model.dtype == torch.bfloat16 else torch.bfloat16
    for name, module in model.named_modules():
        if ".layers.0." in name and name.endswith((".lora_A", ".lora_B")):
            module.to(other)


def _reduce_ranks(model: Any) -> None:
    """As AdaLoRA's allocator does it: one module loses all ranks, one keeps them, the others lose some."""
    names = [name for name, _ in model.named_parameters() if ".lora_E." in name]
    ranks = range(model.peft_config["default"].init_r)
    kept = {name.removeprefix("base_model.model."): [index % 3 != 0 for index in ranks] for name in names}
    first, second, *_ = kept
    kept[first], kept[second] = [True for _ in ranks], [False for _ in ranks]
    model.peft_config["default"].rank_pattern = kept


def _xlora(**options: Any) -> Any:
    return peft.XLoraConfig(adapters=models.experts(), **options)


_lora("lora")
_lora("lora, r=2 all-linear", target_modules="all-linear", r=2, rank_pattern={})
_lora("lora, rank_pattern and alpha_pattern", rank_pattern={"q_proj": 3, "down_proj": 7}, alpha_pattern={"q_proj": 2})
_lora("lora, rsLoRA", use_rslora=True)
_lora("lora, DoRA", use_dora=True)
_lora("lora, DoRA of embeddings", use_dora=True, target_modules=["q_proj", "embed_tokens"])
_lora("lora, lora_bias", models.biased_llama, lora_bias=True)
_lora("lora, bias=all", models.biased_llama, bias="all")
_lora("lora, bias=lora_only", models.biased_llama, bias="lora_only")
_lora("lora, bias=all without biases", bias="all")
_lora("lora, PiSSA", init_lora_weights="pissa")
_lora("lora, OLoRA", init_lora_weights="olora")
_lora("lora, no task type", task_type=None)
_lora("lora, modules_to_save lm_head", modules_to_save=["lm_head"])
_lora("lora, modules_to_save embed_tokens and lm_head", modules_to_save=["embed_tokens", "lm_head"])
_lora("lora, modules_to_save lm_head, tied", models.tied_llama, modules_to_save=["lm_head"])
_lora("lora, modules_to_save both, tied", models.tied_llama, modules_to_save=["embed_tokens", "lm_head"])
_lora("lora, modules_to_save embed_tokens, ensure_weight_tying", models.tied_llama,
      modules_to_save=["embed_tokens"], ensure_weight_tying=True)  # fmt: skip
_lora("lora, target embed_tokens", target_modules=["q_proj", "embed_tokens"])
_lora("lora, target embed_tokens and lm_head", target_modules=["embed_tokens", "lm_head"])
_lora("lora, target embed_tokens, tied", models.tied_llama, target_modules=["q_proj", "embed_tokens"])
_lora("lora, trainable_token_indices", trainable_token_indices=[1, 5])
_lora("lora, trainable_token_indices, tied", models.tied_llama, trainable_token_indices=[1, 5])
_lora("lora, trainable_token_indices of two", trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [2]})
_lora("lora, target_parameters", models.mixture, target_modules=["q_proj"], rank_pattern={}, r=2,
      target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])  # fmt: skip
_lora("lora, convolutions", models.conv_net, target_modules=["first", "second", "head"], task_type=None)
_lora("lora, layer_replication", layer_replication=[[0, 2], [1, 2]])
_lora("lora, two adapters, the first", extend=_add_second)
_lora("lora, two adapters, the second", extend=_add_second, adapter_name="second")
_lora("lora, mixed dtypes", extend=_mix_dtypes)
_lora("lora, frozen", extend=lambda model: model.requires_grad_(False))
_lora("lora, aLoRA", alora_invocation_tokens=[3, 4])

_lora("lora, KaSA", kasa_config=peft.KasaConfig())
_lora("lora, MonteCLoRA", r=2, monteclora_config=peft.MontecloraConfig(num_samples=2), changes_in_forward=True)
_lora("lora, BD-LoRA", r=2, target_modules=["q_proj", "o_proj"],
      use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
)  # fmt: skip
_lora("lora, VeLoRA", velora_config=peft.VeloraConfig(num_groups=4), changes_in_forward=True)
_lora("lora, attention of torch", models.torch_attention, target_modules=["attention", "table"], task_type=None)
_lora("lora, sequence classification", models.classifier, task_type="SEQ_CLS")

_tuner("ADALORA", total_step=9, init_lora_weights=False)
_tuner("ADALORA", "ranks reduced", total_step=9, init_lora_weights=False, extend=_reduce_ranks)
_tuner("ADAMSS", r=6, num_subspaces=2)
_add("adaption_prompt", PeftType.ADAPTION_PROMPT, peft.AdaptionPromptConfig, adapter_len=3, adapter_layers=2)
_add("adaption_prompt, not the active one", PeftType.ADAPTION_PROMPT, peft.AdaptionPromptConfig,
     adapter_len=3, adapter_layers=2, extend=_add_second_prompt, adapter_name="second",
     refused=Refusal("is not the active one", "call set_adapter('second') before wrapping"))  # fmt: skip
_tuner("BEFT")
_tuner("BOFT", boft_block_size=4, init_weights=False)
_tuner("BOFT", "convolutions", ["second"], base=models.conv_net, boft_block_size=3)
_tuner("C3A", block_size=8)
_prompt("CARTRIDGE", refused=Refusal("joined from two parameters", "set num_frozen_tokens=0"))
_prompt("CARTRIDGE", "num_frozen_tokens=0", num_frozen_tokens=0)
_prompt("CPT", num_virtual_tokens=4, cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4],
        refused=Refusal("computed by the prompt encoder when PEFT saves it", ASK_PEFT))  # fmt: skip
_tuner("DEFT", r=3)
_tuner("DELORA", r=3)
_tuner("FOURIERFT", n_frequency=20)
_tuner("FROD", progressbar=False)
_tuner("FROD", "save_projection=False", progressbar=False, save_projection=False)
_tuner("GLORA", r=3)
_tuner("GRALORA", r=4)
_tuner("HIRA", r=3)
_tuner("HRA", r=4)
_tuner("IA3", feedforward_modules=[])
_tuner("IA3", "modules_to_save lm_head", feedforward_modules=[], modules_to_save=["lm_head"])
_tuner("IA3", "feed-forward", ["k_proj", "down_proj"], feedforward_modules=["down_proj"])
_tuner("LILY", r=3)
_add("ln_tuning", PeftType.LN_TUNING, peft.LNTuningConfig)
_tuner("LOHA", r=3, init_weights=False)
_tuner("LOHA", "convolutions", ["first", "second"], base=models.conv_net, r=3, use_effective_conv2d=True)
_tuner("LOKR", r=2, init_weights=False)
_tuner("LOKR", "convolutions", ["first", "second"], base=models.conv_net, r=2, use_effective_conv2d=True)
_tuner("MISS", r=4)
_tuner("OFT", oft_block_size=4)
_tuner("OSF", effective_rank=3)
_tuner("PEANUT", r=3, depth=1)
_tuner("POLY", r=4, n_tasks=3, n_skills=2, inputs={"task_ids": torch.tensor([1])})
_prompt("MULTITASK_PROMPT_TUNING", num_tasks=3, num_ranks=2, inputs={"task_ids": torch.tensor([1])})
_prompt("PROMPT_TUNING")
_prompt("PROMPT_TUNING", "encoder and decoder", base=models.encoder_decoder, task_type="SEQ_2_SEQ_LM",
        inputs={"labels": torch.tensor([[1, 2]])})  # fmt: skip
_prompt("PREFIX_TUNING")
_prompt("PREFIX_TUNING", "prefix_projection", prefix_projection=True, encoder_hidden_size=8,
        refused=Refusal("computed by a projection when PEFT saves it", "use prefix_projection=False"))  # fmt: skip
_prompt("P_TUNING", encoder_hidden_size=8,
        refused=Refusal("computed by the prompt encoder when PEFT saves it",
                        "use prompt tuning or prefix tuning"))  # fmt: skip
_tuner("PSOFT", r=4)
_tuner("PVERA", r=3)
_tuner("RANDLORA", r=3)
_tuner("RANDLORA", "sparse", r=3, sparse=True)
_tuner("ROAD", group_size=8)
_tuner("SHADOW", r=3, target_modules=r".*\.layers\.\d+$")
_tuner("SHIRA", r=2)
_tuner("SUPERTUNING", sparsity=0.9)
_tuner("SUPERTUNING", "Supra", sparsity=0.9, r=3, lora_alpha=4)
_tuner("TINYLORA", u=5)
_tuner("TINYLORA", "save_projection=False", u=5, save_projection=False)
_add("trainable_tokens", PeftType.TRAINABLE_TOKENS, peft.TrainableTokensConfig, token_indices=[1, 5, 7])
_add("trainable_tokens, tied", PeftType.TRAINABLE_TOKENS, peft.TrainableTokensConfig, models.tied_llama,
     token_indices=[1, 5, 7])  # fmt: skip
_tuner("UNILORA", theta_d_length=16)
_tuner("UNILORA", "save_indices", theta_d_length=16, save_indices=True)
_tuner("VBLORA", r=2, num_vectors=5, topk=2, vector_length=8)
_tuner("VBLORA", "save_only_topk_weights", r=2, num_vectors=5, topk=2, vector_length=8, save_only_topk_weights=True,
       refused=Refusal("computed when PEFT saves it, not copied from a tensor of the model",
                       "use save_only_topk_weights=False"))  # fmt: skip
_tuner("VERA", r=3)
_tuner("VERA", "save_projection=False", r=3, save_projection=False)
_tuner("WAVEFT", n_frequency=20)
_add("xlora", PeftType.XLORA, _xlora, models.llama_without_cache, hidden_size=24, xlora_depth=2, xlora_size=8)


if __name__ == "__main__":
    from tests.tuner_table import PATH, table

    PATH.write_text(table())
    print(f"wrote {PATH}")
