"""Everybody is granted the run, or everybody gets one reason."""

from __future__ import annotations

import msgspec
import pytest

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import FileLayout, TensorSpec, plan_file
from async_ckpt.core.protocol import PROTOCOL, Claim, Claims, ImageFile, Layout, Options, Process, Register
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import shm_identity
from async_ckpt_saver.registration import Complete, Grant, Refusal, Registration, Verdict, Want, check_layout

OPTIONS = Options("/data/run", 2, 2, Policy(), 600.0)


def layout_of(file: FileLayout) -> Layout:
    return Layout((ImageFile(file.path, file.header, file.total_bytes),), {"README.md": b"hello"})


def plain(shape: tuple[int, ...] = (4, 2), name: str = "lora_A.weight", dtype: str = "F32") -> Layout:
    return layout_of(plan_file("adapter_model.safetensors", [TensorSpec(name, dtype, shape)]))


def halves(number: int) -> Claims:
    file = plan_file("adapter_model.safetensors", [TensorSpec("lora_A.weight", "F32", (4, 2))])
    return pack_claims([file], [Claim(0, 0, Region(False, (2 * number, 0), (2, 2)))])[0]


def register(number: int, **changes: object) -> Register:
    message = Register(
        protocol=PROTOCOL,
        options=OPTIONS,
        job="job",
        rank=number,
        process=Process(100 + number, 1, "pid:[1]"),
        launcher=None,
        shm=shm_identity(),
        layout_hash="h",
        layout=plain() if number == 0 else None,
        claims=halves(number),
        versions={},
    )
    return msgspec.structs.replace(message, **changes)


def reason(verdict: Verdict) -> str:
    assert isinstance(verdict, Refusal)
    return verdict.reason


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_all_ranks_in_any_order_are_granted(order: tuple[int, int]) -> None:
    registration = Registration(OPTIONS, "job", 0.0)
    assert registration.add(b"a", register(order[0])) is None
    verdict = registration.add(b"b", register(order[1]))
    assert verdict == Complete()
    verdict = registration.conclude()
    assert isinstance(verdict, Grant)
    assert verdict.ownership.owned == {0: [0], 1: [0]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"protocol": 99}, "protocol 99"),
        ({"rank": 7}, "rank 7 of 2"),
        ({"options": msgspec.structs.replace(OPTIONS, slots=3)}, "slots=3"),
        ({"options": msgspec.structs.replace(OPTIONS, world=3)}, "world=3"),
        ({"options": msgspec.structs.replace(OPTIONS, policy=Policy(keep_last=1))}, "policy="),
        ({"claims": Claims(b"", b"", [])}, "lora_A.weight"),
    ],
)
def test_a_rank_that_does_not_fit_refuses_all(changes: dict[str, object], expected: str) -> None:
    registration = Registration(OPTIONS, "job", 0.0)
    registration.add(b"a", register(0))
    verdict = registration.add(b"b", register(1, **changes))
    assert expected in reason(registration.conclude() if verdict == Complete() else verdict)
    assert b"b" in registration.identities.values(), "the odd rank must be told as well"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (plain((8, 2)), "'lora_A.weight' is F32 [8, 2] on rank 1, but F32 [4, 2] on rank 0"),
        (plain(dtype="BF16"), "'lora_A.weight' is BF16 [4, 2] on rank 1"),
        (plain(name="lora_B.weight"), "rank 1 has no tensor 'lora_A.weight'"),
        (
            layout_of(plan_file("adapter_model.safetensors",
                                [TensorSpec("lora_A.weight", "F32", (4, 2)), TensorSpec("z", "F32", (1,))])),
            "rank 1 has a tensor 'z'",
        ),
    ],
)  # fmt: skip
def test_a_different_layout_is_asked_for_and_the_tensor_named(other: Layout, expected: str) -> None:
    registration = Registration(OPTIONS, "job", 0.0)
    registration.add(b"a", register(0))
    assert registration.add(b"b", register(1, layout_hash="other")) == Complete()
    assert registration.conclude() == Want(1)
    assert expected in reason(registration.add_layout(1, other))


def test_the_missing_ranks_are_named_after_the_timeout() -> None:
    registration = Registration(msgspec.structs.replace(OPTIONS, world=3), "job", 100.0)
    registration.add(b"b", register(1, options=registration.options))
    assert registration.expire(699.0) is None
    refusal = registration.expire(700.0)
    assert refusal is not None
    assert "rank 0, 2 of 3 did not attach within 600 s" in refusal.reason


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b", "", "a//b", "./a", "a\0b"])
def test_a_path_that_could_leave_the_directory_is_refused(path: str) -> None:
    file = plan_file("x", [TensorSpec("t", "F32", (1,))])
    with pytest.raises(RuntimeError, match="plain relative path"):
        check_layout(Layout((ImageFile(path, file.header, file.total_bytes),), {}))
    with pytest.raises(RuntimeError, match="plain relative path"):
        check_layout(Layout((), {path: b""}))


def test_a_length_that_is_not_the_headers_is_refused() -> None:
    file = plan_file("x", [TensorSpec("t", "F32", (1,))])
    with pytest.raises(RuntimeError, match="should have"):
        check_layout(Layout((ImageFile("x", file.header, file.total_bytes + 1),), {}))
