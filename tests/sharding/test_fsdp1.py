"""FSDP1 on real ranks, as llama-recipes and others use it: the bytes are what PEFT writes for an unwrapped twin."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import (
    _or_policy,
    lambda_auto_wrap_policy,
    transformer_auto_wrap_policy,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from async_ckpt.adapter import plan_adapter
from async_ckpt.core.errors import CheckpointError
from async_ckpt.sharding import find_shards, fsdp1, reshard
from tests.ranks import run_cases
from tests.tiny_llama import (
    Case,
    check_plan,
    check_saved,
    evaluate,
    forward,
    lora,
    no_collectives,
    peft_model,
    reference,
    train,
)


def llama_policy() -> Any:
    """llama-recipes' policy: every trainable leaf is a unit of its own, and so is every decoder layer."""

    def trainable_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.named_children()) and weight is not None and weight.requires_grad

    return functools.partial(
        _or_policy,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=trainable_leaf),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
        ],
    )


def layer_policy() -> Any:
    """What accelerate's TRANSFORMER_BASED_WRAP does: adapters share a unit with the layer that they are in."""
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})


def wrap(
    model: nn.Module, policy: Any = None, *, original: bool = True, checkpointing: bool = False, **options: Any
) -> Any:
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy or llama_policy(),
        use_orig_params=original,
        device_id=torch.device("cpu"),
        **options,
    )
    if checkpointing:
        apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return wrapped


def full_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained values as torch itself gathers them."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", "")
            .replace("_checkpoint_wrapped_module.", "")
            .replace("_orig_mod.", ""): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }


def through_a_run(model: nn.Module, **twin: Any) -> None:
    """Before the first forward, after it, after steps and after an evaluation; by the first plan and by new ones."""
    fresh = reference(**twin)
    early = check_saved(model, fresh)
    loss = forward(model)
    check_saved(model, fresh)
    check_plan(early, fresh)
    loss.backward()
    check_plan(early, fresh)
    train(model)
    trained = reference(**twin, values=full_values(model))
    check_plan(early, trained)
    evaluate(model)
    check_plan(early, trained)
    check_saved(model, trained)


def as_llama_recipes_does() -> None:
    through_a_run(wrap(peft_model(), checkpointing=True))


def units_that_mix_frozen_and_trained() -> None:
    through_a_run(wrap(peft_model(), layer_policy(), checkpointing=True))


def modules_to_save_in_the_root() -> None:
    config = lora(modules_to_save=["lm_head", "embed_tokens"])
    through_a_run(wrap(peft_model(config), layer_policy()), config=config)


def modules_to_save_as_units() -> None:
    config = lora(modules_to_save=["lm_head"])
    through_a_run(wrap(peft_model(config)), config=config)


def shard_grad_op() -> None:
    """After a forward without a backward the modules hold plain tensors, and register nothing."""
    config = lora(modules_to_save=["lm_head"])
    model = wrap(peft_model(config), layer_policy(), sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
    through_a_run(model, config=config)


def flat_parameters() -> None:
    through_a_run(wrap(peft_model(), original=False, checkpointing=True))


def not_sharded() -> None:
    for original in (True, False):
        through_a_run(wrap(peft_model(), original=original, sharding_strategy=ShardingStrategy.NO_SHARD))


def planned_in_the_middle_of_a_backward() -> None:
    """Then the modules register no parameters at all, and PEFT would leave modules_to_save out."""
    config = lora(modules_to_save=["lm_head"])
    model, fresh, seen = wrap(peft_model(config), layer_policy()), reference(config), []

    def look(_: torch.Tensor) -> None:
        seen.append([name for name, _ in model.named_parameters() if "modules_to_save" in name])
        check_saved(model, fresh)

    loss = forward(model)
    loss.register_hook(look)
    loss.backward()
    assert seen == [[]], "the modules are expected to register nothing"


def mixed_precision_keeps_the_master() -> None:
    # Not llama-recipes' policy: PEFT casts its input to the dtype of lora_A outside of that one's unit.
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    through_a_run(wrap(peft_model(), layer_policy(), mixed_precision=policy))


def bfloat16_parameters() -> None:
    model = wrap(peft_model(dtype=torch.bfloat16))
    plan = check_saved(model, reference(dtype=torch.bfloat16))
    assert {tensor.shard.dtype for tensor in plan.tensors} == {torch.bfloat16}


def hybrid() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    model = wrap(peft_model(), device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD)
    forward(model).backward()
    check_saved(model, reference())


def compiled() -> None:
    model = torch.compile(wrap(peft_model()), backend="eager")
    check_saved(model, reference())
    train(model, steps=1)
    check_saved(model, reference(values=full_values(model)))


def restored_values_are_used() -> None:
    config = lora(modules_to_save=["lm_head"])
    for options in (
        {"policy": layer_policy()},
        {"policy": layer_policy(), "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        {"original": False},
    ):
        model, other = wrap(peft_model(config), **options), wrap(peft_model(config), **options)
        train(other, steps=3)
        expected, before = evaluate(other), evaluate(model)
        assert not torch.equal(expected, before)
        sources = find_shards(other)
        with no_collectives():
            for name, shard in find_shards(model).items():
                shard.local().copy_(sources[name].local())
            reshard(model)
        assert torch.equal(evaluate(model), expected), options
        train(model, steps=1)


def while_a_unit_is_unsharded() -> None:
    """In the middle of a forward the module holds the gathered tensor; what is read is the shard all the same."""
    model = wrap(peft_model(), layer_policy())
    plan = plan_adapter(model, documents=dist.get_rank() == 0)
    fresh, seen = reference(), []

    def look(module: nn.Module, *_: object) -> None:
        seen.append(module.lora_A["default"].weight.shape)
        check_plan(plan, fresh)

    model.module.base_model.model.model.layers[1].module.self_attn.v_proj.register_forward_hook(look)
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
    model = wrap(peft_model())
    shards = [tensor.shard for tensor in plan_adapter(model, documents=False).tensors]
    layer = model.module.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.module
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    (shard,) = [s for s in shards if ".layers.0.self_attn.q_proj.lora_B." in s.name]
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B\.default\.weight.*no longer the tensor"):
        shard.local()

    for original in (True, False):
        model = wrap(peft_model(), original=original)
        shards = [tensor.shard for tensor in plan_adapter(model, documents=False).tensors]
        model.to(torch.bfloat16)
        for shard in shards:
            with pytest.raises(CheckpointError, match=r"lora_[AB]\.default.*torch\.float32.*torch\.bfloat16"):
                shard.local()


def what_cannot_be_saved_is_refused() -> None:
    config = lora(modules_to_save=["lm_head"])
    model = wrap(peft_model(config), original=False)
    with pytest.raises(CheckpointError, match=r"modules_to_save.*lm_head.*use_orig_params=True"):
        plan_adapter(model, documents=False)

    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with pytest.raises(CheckpointError, match=r"'weight' was not contiguous"):
        find_shards(FullyShardedDataParallel(conv, use_orig_params=True, device_id=torch.device("cpu")))


def missing_internals_are_named() -> None:
    model = wrap(peft_model())
    original = fsdp1._FLAT_ATTRIBUTES
    fsdp1._FLAT_ATTRIBUTES = (*original, "_no_such_thing")
    try:
        with pytest.raises(CheckpointError, match=r"torch 2\.\d+.*`_no_such_thing`.*FlatParameter"):
            find_shards(model)
    finally:
        fsdp1._FLAT_ATTRIBUTES = original


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        as_llama_recipes_does,
        units_that_mix_frozen_and_trained,
        modules_to_save_in_the_root,
        modules_to_save_as_units,
        shard_grad_op,
        flat_parameters,
        not_sharded,
        planned_in_the_middle_of_a_backward,
        mixed_precision_keeps_the_master,
        bfloat16_parameters,
        hybrid,
        compiled,
        restored_values_are_used,
        while_a_unit_is_unsharded,
        reading_in_another_thread,
        changes_since_attach_are_noticed,
        what_cannot_be_saved_is_refused,
        missing_internals_are_named,
    )
}


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((3, 4), (4, 1), True),
        ((4, 3), (1, 4), False),
        ((24, 1), (1, 24), True),
        ((1, 24), (99, 1), True),
        ((2, 3, 4, 4), (48, 1, 12, 3), False),
        ((), (), True),
    ],
)
def test_which_elements_lie_in_order(shape: tuple[int, ...], strides: tuple[int, ...], expected: bool) -> None:
    assert fsdp1._is_row_major(shape, strides) == expected


# Three ranks run everything: no size of the model divides by 3. One process does not shard at all.
WORLDS = {1: ["as_llama_recipes_does", "modules_to_save_in_the_root", "flat_parameters"],
          2: ["as_llama_recipes_does", "not_sharded"],
          3: [case for case in CASES if case != "not_sharded"]}  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[int, dict[str, str]]:
    return {}


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in WORLDS.items() for case in cases])
def test_fsdp1(results: dict[int, dict[str, str]], world: int, case: str) -> None:
    if world not in results:
        results[world] = run_cases("tests.sharding.test_fsdp1", WORLDS[world], world, timeout_s=280)
    if results[world][case]:
        pytest.fail(results[world][case], pytrace=False)
