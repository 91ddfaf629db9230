"""FSDP2 and other DTensors on real ranks: the bytes of all of them are what PEFT writes for an unwrapped twin."""

from __future__ import annotations

import math
import threading

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from async_ckpt.adapter import plan_adapter
from async_ckpt.core.errors import CheckpointError
from async_ckpt.sharding import dtensor, find_shards, reshard
from tests.ranks import run_cases
from tests.tiny_llama import (
    Case,
    assembled,
    check_plan,
    check_saved,
    evaluate,
    forward,
    gathered,
    lora,
    no_collectives,
    peft_model,
    reference,
    train,
)


def wrap(model: nn.Module, **options: object) -> nn.Module:
    """Each decoder layer is a unit, the rest belongs to the root: as torchtitan and accelerate do it."""
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def full_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained values as torch itself gathers them."""
    reshard(model)
    return {
        name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): parameter.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def before_and_after_the_first_forward() -> None:
    model = wrap(peft_model())
    fresh = reference()
    plan = check_saved(model, fresh)
    empty = [t for t in plan.tensors if t.shard.region.numel == 0]
    assert (len(empty) > 0) == (dist.get_rank() > 0), "r=1 leaves every rank but the first without lora_A"
    forward(model)
    check_plan(plan, fresh)
    check_saved(model, fresh)


def after_optimizer_steps() -> None:
    model = wrap(peft_model())
    plan = check_saved(model, reference())
    train(model)
    twin = reference(values=full_values(model))
    check_plan(plan, twin)
    check_saved(model, twin)


def after_an_evaluation() -> None:
    """The root's parameters stay unsharded, and named_parameters shows those."""
    config = lora(modules_to_save=["lm_head", "embed_tokens"])
    model = wrap(peft_model(config))
    early = check_saved(model, reference(config))
    train(model)
    twin = reference(config, values=full_values(model))
    evaluate(model)
    heads = [p for name, p in model.named_parameters() if "lm_head.modules_to_save" in name]
    assert not any(isinstance(parameter, DTensor) for parameter in heads), "the root is expected to be unsharded"
    check_plan(early, twin)
    check_saved(model, twin)
    evaluate(model)
    check_saved(model, twin)


def between_forward_and_backward() -> None:
    model = wrap(peft_model())
    plan = plan_adapter(model, documents=dist.get_rank() == 0)
    loss = forward(model)
    check_plan(plan, reference())
    loss.backward()
    check_plan(plan, reference())


def mixed_precision_keeps_the_master() -> None:
    model = wrap(peft_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    train(model)
    twin = reference(values=full_values(model))
    evaluate(model)
    check_saved(model, twin)


def bfloat16_parameters() -> None:
    model = wrap(peft_model(dtype=torch.bfloat16))
    plan = check_saved(model, reference(dtype=torch.bfloat16))
    assert {tensor.shard.dtype for tensor in plan.tensors} == {torch.bfloat16}


def shard_of_dimension_1() -> None:
    def place(parameter: nn.Parameter) -> Shard | None:
        even = parameter.ndim == 2 and parameter.shape[1] % dist.get_world_size() == 0
        return Shard(1) if even else None

    model = wrap(peft_model(), shard_placement_fn=place)
    plan = check_saved(model, reference())
    assert any(t.shard.region.offsets[-1] > 0 for t in plan.tensors) == (dist.get_rank() > 0)
    train(model)
    check_plan(plan, reference(values=full_values(model)))


def compiled_and_checkpointed() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = peft_model()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    model = wrap(model)
    compiled = torch.compile(model, backend="eager")
    plan = check_saved(compiled, reference())
    train(compiled, steps=1)
    twin = reference(values=full_values(compiled))
    check_plan(plan, twin)
    check_saved(compiled, twin)


def every_kind_of_tensor() -> None:
    """DoRA has vectors, trainable biases and embeddings are frozen or belong to the base model."""
    config = lora(use_dora=True, target_modules=[*["q_proj", "v_proj"], "embed_tokens"], use_rslora=True)
    check_saved(wrap(peft_model(config)), reference(config))
    tied = lora(modules_to_save=["embed_tokens", "lm_head"])
    check_saved(wrap(peft_model(tied, tie_word_embeddings=True)), reference(tied, tie_word_embeddings=True))


def other_tuners() -> None:
    """VeRA's projections are buffers; the prompt of prompt tuning is what PEFT cannot save under FSDP2 itself."""
    vera = peft.VeraConfig(r=3, init_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    plan = check_saved(wrap(peft_model(vera)), reference(vera))
    assert {tensor.shard.is_buffer for tensor in plan.tensors} == {True, False}
    for prompt in (
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ):
        model = fully_shard(peft_model(prompt))
        forward(model)
        plan = check_saved(model, reference(prompt))
        assert all(tensor.shard.region.numel < math.prod(tensor.shard.shape) for tensor in plan.tensors)


def documents_name_the_original_class() -> None:
    """`fully_shard` gives a module another class, which adapter_config.json must not mention."""
    config = lora(task_type=None)
    model = peft_model(config)
    fully_shard(model.base_model.model)
    check_saved(fully_shard(model), reference(config))


def offloaded_to_cpu() -> None:
    model = wrap(peft_model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(model, steps=1)
    check_saved(model, reference(values=full_values(model)))


def meshes() -> None:
    """Replicated, strided and plain placements of one DTensor: the regions of all ranks are the whole."""
    world = dist.get_world_size()
    whole = torch.arange(35.0).view(7, 5)
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("outer", "inner"))
    for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(1)], [Shard(1), Replicate()], [Shard(1), Shard(0)]):
        module = nn.Module()
        module.weight = nn.Parameter(distribute_tensor(whole, mesh, placements))
        with no_collectives():
            (shard,) = find_shards(module).values()
            shard.local()
        pieces = gathered([shard])
        assert dist.get_rank() > 0 or torch.equal(assembled(shard, pieces[0]), whole), placements


def restored_values_are_used() -> None:
    """What is written to local() after an evaluation is what the next forward computes with, once resharded."""
    config = lora(modules_to_save=["lm_head"])
    model, other = wrap(peft_model(config)), wrap(peft_model(config))
    train(other, steps=3)
    expected, before = evaluate(other), evaluate(model)
    assert not torch.equal(expected, before)
    sources = find_shards(other)
    with no_collectives():
        for name, shard in find_shards(model).items():
            shard.local().copy_(sources[name].local())
        reshard(model)
    assert torch.equal(evaluate(model), expected)


def while_a_unit_is_unsharded() -> None:
    """In the middle of a forward the module holds the gathered tensor; what is read is the shard all the same."""
    model = wrap(peft_model())
    plan = plan_adapter(model, documents=dist.get_rank() == 0)
    fresh, seen = reference(), []

    def look(module: nn.Module, *_: object) -> None:
        seen.append(module.lora_A["default"].weight.shape)
        check_plan(plan, fresh)

    model.base_model.model.model.layers[1].self_attn.v_proj.register_forward_hook(look)
    forward(model)
    assert seen == [(1, 24)], "the unit is expected to be unsharded"


def reading_in_another_thread() -> None:
    model = wrap(peft_model())
    plan = plan_adapter(model, documents=dist.get_rank() == 0)
    forward(model).backward()
    views: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: views.extend(tensor.shard.local() for tensor in plan.tensors))
    thread.start()
    thread.join()
    assert len(views) == len(plan.tensors)
    check_plan(plan, reference())


def changes_since_attach_are_noticed() -> None:
    def plan_of(model: nn.Module) -> list[object]:
        return [tensor.shard for tensor in plan_adapter(model, documents=False).tensors]

    model = wrap(peft_model())
    shards = plan_of(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for shard in shards:
        with pytest.raises(CheckpointError, match=r"lora_[AB]\.default.*no longer the tensor.*assign=True"):
            shard.local()

    model = wrap(peft_model())
    shards = plan_of(model)
    model.to(torch.bfloat16)
    for shard in shards:
        with pytest.raises(CheckpointError, match=r"lora_[AB]\.default.*torch\.float32.*torch\.bfloat16"):
            shard.local()

    model = wrap(peft_model())
    shards = plan_of(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    (shard,) = [s for s in shards if ".layers.0.self_attn.q_proj.lora_B." in s.name]
    with pytest.raises(CheckpointError, match="no longer the tensor"):
        shard.local()


def missing_internals_are_named() -> None:
    model = wrap(peft_model())
    original = dtensor._PARAMETER_ATTRIBUTES
    dtensor._PARAMETER_ATTRIBUTES = (*original, "_no_such_thing")
    try:
        with pytest.raises(CheckpointError, match=r"torch 2\.\d+.*`_no_such_thing`.*FSDPParam"):
            find_shards(model)
    finally:
        dtensor._PARAMETER_ATTRIBUTES = original


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        before_and_after_the_first_forward,
        after_optimizer_steps,
        after_an_evaluation,
        between_forward_and_backward,
        mixed_precision_keeps_the_master,
        bfloat16_parameters,
        shard_of_dimension_1,
        compiled_and_checkpointed,
        every_kind_of_tensor,
        other_tuners,
        documents_name_the_original_class,
        offloaded_to_cpu,
        meshes,
        restored_values_are_used,
        while_a_unit_is_unsharded,
        reading_in_another_thread,
        changes_since_attach_are_noticed,
        missing_internals_are_named,
    )
}


# Three ranks run everything: no size of the model divides by 3.
WORLDS = {2: ["after_an_evaluation", "shard_of_dimension_1", "meshes"], 3: list(CASES)}


@pytest.fixture(scope="module")
def results() -> dict[int, dict[str, str]]:
    return {}


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in WORLDS.items() for case in cases])
def test_fsdp2(results: dict[int, dict[str, str]], world: int, case: str) -> None:
    if world not in results:
        results[world] = run_cases("tests.sharding.test_dtensor", WORLDS[world], world, timeout_s=280)
    if results[world][case]:
        pytest.fail(results[world][case], pytrace=False)
