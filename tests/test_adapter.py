"""What PEFT would write, for many kinds of adapters on one process; wrappers are tested in tests/sharding."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from async_ckpt import adapter
from async_ckpt.adapter import plan_adapter
from async_ckpt.core.errors import CheckpointError
from async_ckpt.sharding.names import spliced
from tests.tiny_llama import TARGETS, base_model, check_saved, evaluate, forward, lora, peft_model, saved_files, tree_of

PLAIN: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Any] = {
    "lora": lora(),
    "no task type": lora(task_type=None),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "lora bias": lora(lora_bias=True),
    "bias all": lora(bias="all"),
    "modules_to_save": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "embeddings": lora(target_modules=[*TARGETS, "embed_tokens"]),
    "trainable tokens": lora(trainable_token_indices=[1, 5]),
    "all-linear": lora(target_modules="all-linear"),
    "adalora": peft.AdaLoraConfig(total_step=9, init_lora_weights=False, **PLAIN),
    "vera": peft.VeraConfig(r=3, init_weights=False, **PLAIN),
    "ia3": peft.IA3Config(feedforward_modules=[], **PLAIN),
    "loha": peft.LoHaConfig(r=2, init_weights=False, **PLAIN),
    "oft": peft.OFTConfig(r=0, oft_block_size=2, init_weights=False, **PLAIN),
    "randlora": peft.RandLoraConfig(r=2, init_weights=False, **PLAIN),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=5, topk=2, vector_length=8, **PLAIN),
    "ln tuning": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "multitask prompts": peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_file_is_the_one_that_peft_writes(kind: str) -> None:
    model = peft_model(copy.deepcopy(CONFIGS[kind]))
    expected = saved_files(peft_model(copy.deepcopy(CONFIGS[kind])))
    check_saved(model, expected)


@pytest.mark.parametrize("tied", [lora(modules_to_save=["lm_head"]), lora(trainable_token_indices=[2])])
def test_tied_embeddings(tied: Any) -> None:
    expected = saved_files(peft_model(copy.deepcopy(tied), tie_word_embeddings=True))
    check_saved(peft_model(copy.deepcopy(tied), tie_word_embeddings=True), expected)


def test_frozen_adapters_are_saved_too() -> None:
    model = peft_model()
    model.requires_grad_(False)
    check_saved(model, saved_files(peft_model()))


def test_mixed_dtypes() -> None:
    def make() -> Any:
        model = peft_model(lora(modules_to_save=["lm_head"]), dtype=torch.bfloat16)
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.to(torch.float32)
        return model

    plan = check_saved(make(), saved_files(make()))
    assert {tensor.shard.dtype for tensor in plan.tensors} == {torch.float32, torch.bfloat16}


def test_another_adapter_goes_to_its_subfolder() -> None:
    def make() -> Any:
        model = peft_model()
        torch.manual_seed(11)
        model.add_adapter("other", lora(target_modules=["k_proj"], modules_to_save=["lm_head"]))
        return model

    for name in ("default", "other"):
        expected = saved_files(make(), name)
        plan = check_saved(make(), expected, name)
    assert plan.subfolder == "other"
    assert plan.documents.keys() == {"other/adapter_config.json", "README.md"}


def test_the_live_model_is_left_as_it_was() -> None:
    model = peft_model(lora(task_type=None))
    config = model.peft_config["default"]
    before, tree = copy.deepcopy(vars(config)), tree_of(model)
    state = {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()}
    plan_adapter(model, documents=True)
    assert vars(config) == before
    assert tree_of(model) == tree
    assert {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()} == state


def test_documents_are_written_on_request_only() -> None:
    assert plan_adapter(peft_model(), documents=False).documents == {}


def test_a_model_inside_another_module_is_found() -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = torch.compile(peft_model(), backend="eager")

    check_saved(Trainer(), saved_files(peft_model()))
    names = {tensor.shard.name for tensor in plan_adapter(Trainer(), documents=False).tensors}
    assert all(name.startswith("policy.base_model.model.") for name in names)


@pytest.mark.parametrize("source", ["folder", "cache"])
@pytest.mark.parametrize("vocabulary", [51, 57])
def test_resized_embeddings_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, vocabulary: int
) -> None:
    base_model().config.save_pretrained(tmp_path)

    def make(name: str) -> Any:
        base = base_model(vocab_size=vocabulary)
        base.name_or_path = name
        torch.manual_seed(8)
        return peft.get_peft_model(base, lora())

    expected = saved_files(make(str(tmp_path)))
    model = make(str(tmp_path))
    if source == "cache":
        model = make("some/model")
        expected = {name: data.replace(str(tmp_path).encode(), b"some/model") for name, data in expected.items()}
        monkeypatch.setattr(adapter, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with_embeddings = any("embed_tokens" in t.name for t in check_saved(model, expected).tensors)
    assert with_embeddings == (vocabulary == 57)


@pytest.mark.parametrize("offline", ["1", "0"])
def test_the_network_is_never_asked(monkeypatch: pytest.MonkeyPatch, offline: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    base = base_model()
    base.name_or_path = "some/model"
    model = peft.get_peft_model(base, lora())
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    plan = plan_adapter(model, documents=True)
    assert len(plan.tensors) == 16
    assert json.loads(plan.documents["adapter_config.json"])["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
            r"'prompt_embeddings'.*PREFIX_TUNING.*projection",
        ),
        (peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8), r"'prompt_embeddings'.*P_TUNING"),
        (
            peft.VBLoRAConfig(
                r=2, num_vectors=5, topk=2, vector_length=8, save_only_topk_weights=True, target_modules=["q_proj"]
            ),
            r"tensor '.*vblora_logits_A_topk_\w+' of adapter 'default' \(VBLORA\) is computed",
        ),
    ],
)
def test_computed_tensors_are_refused(config: Any, message: str) -> None:
    config.task_type = "CAUSAL_LM"
    model = peft_model(config)
    before = copy.deepcopy(vars(model.peft_config["default"]))
    with pytest.raises(CheckpointError, match=message):
        plan_adapter(model, documents=True)
    assert vars(model.peft_config["default"]) == before


def test_wrong_models_and_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM without a PeftModel.*wrap it with peft"):
        plan_adapter(base_model(), documents=False)
    with pytest.raises(CheckpointError, match=r"no adapter named 'mine'; it has 'default'"):
        plan_adapter(peft_model(), "mine", documents=False)
    model = peft_model()
    model.add_adapter("/tmp/evil", lora())
    with pytest.raises(CheckpointError, match=r"'/tmp/evil' is no plain folder name"):
        plan_adapter(model, "/tmp/evil", documents=True)
    with pytest.raises(CheckpointError, match=r"holds 2 PeftModels, at 0, 1"):
        plan_adapter(nn.Sequential(peft_model(), peft_model()), documents=False)


def test_an_adapter_without_tensors_is_refused() -> None:
    model = peft_model()
    for module in model.modules():
        for name in ("lora_A", "lora_B"):
            if hasattr(module, name):
                getattr(module, name).clear()
    with pytest.raises(CheckpointError, match=r"adapter 'default' \(LORA\) has no tensors"):
        plan_adapter(model, documents=False)


def test_only_the_base_model_may_be_on_meta() -> None:
    with torch.device("meta"):
        model = peft.get_peft_model(base_model(), lora())
    with pytest.raises(CheckpointError, match=r"lora_A.*on the meta device.*before attach"):
        plan_adapter(model, documents=False)
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            module.to_empty(device="cpu")
    assert len(plan_adapter(model, documents=True).tensors) == 16


def test_wrappers_are_put_back_when_peft_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken")

    model = peft_model()
    model.base_model.model.model = torch.compile(model.base_model.model.model, backend="eager")
    tree = tree_of(model)
    monkeypatch.setattr(adapter, "get_peft_model_state_dict", fail)
    with pytest.raises(CheckpointError, match=r"PEFT could not list the tensors.*broken"):
        plan_adapter(model, documents=True)
    assert tree_of(model) == tree
    assert any("_orig_mod" in name for name, _ in tree)


def test_a_tree_that_was_changed_meanwhile_is_noticed() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    wrapped = model[0]
    with pytest.raises(CheckpointError, match="children of Sequential"), spliced(model) as tree:
        tree.add_module("extra", nn.Linear(2, 2))
    assert model[0] is wrapped


def test_the_plan_stays_right_while_the_model_runs() -> None:
    model = peft_model()
    expected = saved_files(peft_model())
    plan = check_saved(model, expected)
    forward(model).backward()
    evaluate(model)
    check_saved(model, expected)
    assert plan.tensors[0].shard.local() is plan.tensors[0].shard.local()
