"""What transformers would write, for many kinds of models on one process; wrappers are in tests/system."""

from __future__ import annotations

import copy
import importlib
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from async_ckpt import full_model
from async_ckpt.contents import SAFETENSORS_DTYPE, Contents, NamedTensor
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.full_model import plan_full_model
from async_ckpt.plan import Selection, plan_checkpoint
from async_ckpt.training_state import Parts
from tests.tiny_llama import base_model, evaluate, lora, no_collectives, tree_of

_TEXT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
                         "vocab_size": 50}  # fmt: skip
_IMAGES = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 1}
_EXPERTS = {**_TEXT, "num_key_value_heads": 1, "num_local_experts": 2}


def _of(architecture: str, configuration: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(3)
        return getattr(transformers, architecture)(getattr(transformers, configuration)(**settings))

    return make


def _llava() -> Any:
    text, vision = transformers.LlamaConfig(**_TEXT), transformers.CLIPVisionConfig(**_TEXT | _IMAGES)
    return _of("LlavaForConditionalGeneration", "LlavaConfig", text_config=text, vision_config=vision)()


MODELS: dict[str, Callable[[], Any]] = {
    "untied": base_model,
    "tied": lambda: base_model(tie_word_embeddings=True),
    "bf16": lambda: base_model(torch.bfloat16),
    "tied weights and biases": _of("BertForPreTraining", "BertConfig", **_TEXT),
    "three names of one tensor": _of("T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=24,
                                     num_layers=2, num_heads=2, vocab_size=50),
    "buffers": _of("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 8],
                   depths=[1, 1]),
    "renamed keys": _llava,
    "parametrised": _of("Wav2Vec2ForCTC", "Wav2Vec2Config", **_TEXT, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,),
                        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    "experts": _of("GptOssForCausalLM", "GptOssConfig", **_EXPERTS, head_dim=8),
}  # fmt: skip


def written(twin: Any, size: int | str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder, max_shard_size=size)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def image(contents: Contents) -> dict[str, bytes]:
    """Every file of the checkpoint with the values that the shards show now."""
    return {**contents.documents, **{path: _file(path, tensors) for path, tensors in contents.files.items()}}


def _file(path: str, tensors: tuple[NamedTensor, ...]) -> bytes:
    layout = plan_file(path, [TensorSpec(t.name, SAFETENSORS_DTYPE[t.shard.dtype], t.shard.shape) for t in tensors])
    values = {tensor.name: tensor.shard.local().contiguous().view(-1).view(torch.uint8) for tensor in tensors}
    return layout.header + b"".join(values[extent.spec.name].numpy().tobytes() for extent in layout.extents)


def plan(model: nn.Module, size: int | str = "50GB", *, documents: bool = True) -> Contents:
    return plan_full_model(model, max_shard_size=size, documents=documents)


def check(model: nn.Module, expected: dict[str, bytes], size: int | str) -> Contents:
    with no_collectives():
        contents = plan(model, size)
    found = image(contents)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    return contents


@pytest.mark.parametrize("kind", MODELS)
def test_the_files_are_those_that_transformers_writes(kind: str) -> None:
    for size, files in (("50GB", 1), (4000, 2)):
        contents = check(MODELS[kind](), written(MODELS[kind](), size), size)
        assert len(contents.files) >= files


def test_a_model_that_was_loaded_keeps_the_names_of_its_files(tmp_path: Path) -> None:
    """from_pretrained notes how it renamed the keys, and save_pretrained goes back by these notes."""
    _llava().save_pretrained(tmp_path)
    kind = transformers.LlavaForConditionalGeneration
    check(kind.from_pretrained(tmp_path), written(kind.from_pretrained(tmp_path), 4000), 4000)


def test_tied_storage_without_a_common_parameter() -> None:
    def make() -> Any:
        model = base_model(tie_word_embeddings=True)
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
        return model

    contents = check(make(), written(make(), "50GB"), "50GB")
    assert len(contents.files["model.safetensors"]) == 20


def test_what_is_not_contiguous_is_written_in_rows() -> None:
    def make() -> Any:
        model = base_model()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().t().contiguous().t())
        return model

    check(make(), written(make(), "50GB"), "50GB")


def test_the_live_model_is_left_as_it_was() -> None:
    model = base_model(tie_word_embeddings=True)
    model.config.dtype = None
    before, generation = copy.deepcopy(vars(model.config)), copy.deepcopy(vars(model.generation_config))
    state = {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    tree = tree_of(model)
    assert b'"dtype": "float32"' in plan(model).documents["config.json"]
    assert (vars(model.config), vars(model.generation_config)) == (before, generation)
    assert {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()} == state
    assert tree_of(model) == tree


def test_documents_are_written_on_request_only() -> None:
    contents = plan(base_model(), 9000, documents=False)
    assert contents.documents == {}
    assert contents.files.keys() == plan(base_model(), 9000).files.keys()


def test_wrappers_do_not_show(tmp_path: Path) -> None:
    model = base_model()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    evaluate(model)
    check(torch.compile(model, backend="eager"), written(base_model(), 9000), 9000)


def test_the_network_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    model = base_model()
    model.name_or_path = "some/model"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(plan(model).files["model.safetensors"]) == 21


def test_a_model_with_code_of_its_own_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_code.py").write_text("from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM): ...")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("its_code")
    module.Own.register_for_auto_class("AutoModelForCausalLM")

    def make() -> Any:
        torch.manual_seed(7)
        return module.Own(base_model().config)

    contents = check(make(), written(make(), "50GB"), "50GB")
    assert b"its_code.Own" in contents.documents["config.json"]
    assert "its_code.py" in contents.documents
    del sys.modules["its_code"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def _quantised() -> Any:
    model = base_model()
    model.hf_quantizer = object()
    return model


def _with_added_adapter() -> Any:
    model = base_model()
    model.add_adapter(lora())
    return model


class _SavesItself(transformers.LlamaForCausalLM):
    def save_pretrained(self, *args: Any, **options: Any) -> None: ...


class _WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy = base_model()
        self.value = nn.Linear(2, 1)


class _Computes(transformers.LlamaForCausalLM):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        state = super().state_dict(*args, **options)
        state["lm_head.weight"] = state["lm_head.weight"] * 2
        return state


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no transformers model": (lambda: nn.Linear(2, 2), r"a Linear and holds neither a PeftModel nor.*get_peft_model"),
    "tensors beside it": (_WithHead, r"_WithHead that holds a LlamaForCausalLM at 'policy' and 2 tensors beside it"),
    "quantised": (_quantised, r"LlamaForCausalLM is quantised.*without a quantization_config.*PEFT adapter"),
    "added adapters": (_with_added_adapter, r"added with add_adapter.*get_peft_model"),
    "saves itself": (lambda: _SavesItself(base_model().config), r"_SavesItself has a save_pretrained of its own"),
    "on meta": (lambda: base_model().to("meta"), r"tensor 'model.embed_tokens.weight' of the model is on the meta"),
    "computed": (lambda: _Computes(base_model().config), r"1 tensors of the _Computes, such as 'lm_head\.weight'"),
    "split up": (_of("MixtralForCausalLM", "MixtralConfig", **_EXPERTS), r"MixtralForCausalLM.*experts.*are computed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(CheckpointError, match=message):
        plan(make())


@pytest.mark.parametrize(("size", "message"), [("5 apples", "Unit 'ES' not"), (0, "above 0"), (-1, "above 0"),
                                               (None, "'>' not supported"), ("xMB", "Could not parse")])  # fmt: skip
def test_wrong_sizes_are_refused(size: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"max_shard_size={size!r}: .*{message}.*such as '5GB'"):
        plan(base_model(), size)


def test_an_adapter_that_is_not_there_is_no_whole_model() -> None:
    with pytest.raises(CheckpointError, match=r"no adapter named 'mine'; wrap it with peft.get_peft_model"):
        plan_checkpoint(base_model(), Selection(("mine",), "50GB"), Parts(), rank=0, world=1)


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    with pytest.raises(CheckpointError, match=r"transformers 5\.\S+ does not tell.*needs transformers 5"):
        plan(base_model())


def test_errors_of_transformers_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(full_model, "_functions_of_transformers", lambda: (fail, fail))
    with pytest.raises(CheckpointError, match=r"could not list the tensors of the LlamaForCausalLM.*broken"):
        plan(base_model())
