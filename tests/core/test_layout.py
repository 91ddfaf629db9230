from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import MAX_HEADER_BYTES, TensorSpec, parse_file, plan_file

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

# safetensors' names for torch's dtypes; packed ones have no torch shape of their own.
DTYPES = {
    name: dtype
    for name, dtype in safetensors_torch._TYPES.items()
    if not name.startswith(("F4", "F6_")) and dtype.itemsize * 8 in (8, 16, 32, 64)
}

names = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "",
        'a"b',
        "a\\b",
        "\x00",
        "\x7f",
        "\x1f\b\f\n\r\t",
        "\u2028",
        "é",
        "\U0001f600",
        "\uffff",
        "a.b",
        "a/b",
        "A",
        "__",
    ]
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensor_sets = st.dictionaries(
    names.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), shapes),
    min_size=1,
    max_size=8,
)


def specs_of(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[TensorSpec]:
    return [TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()]


def by_safetensors(specs: list[TensorSpec], path: Path) -> bytes:
    tensors = {}
    for index, spec in enumerate(specs):
        data = torch.full((spec.nbytes,), index + 1, dtype=torch.uint8)
        if spec.dtype == "BOOL":
            data.fill_(1)
        tensors[spec.name] = data.view(DTYPES[spec.dtype]).reshape(spec.shape)
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


def by_us(specs: list[TensorSpec]) -> bytes:
    layout = plan_file("adapter_model.safetensors", specs)
    image = bytearray(layout.total_bytes)
    image[: len(layout.header)] = layout.header
    number = {spec.name: index + 1 for index, spec in enumerate(specs)}
    for extent in layout.extents:
        value = 1 if extent.spec.dtype == "BOOL" else number[extent.spec.name]
        image[extent.start : extent.stop] = bytes([value]) * extent.spec.nbytes
    return bytes(image)


def test_every_dtype_torch_can_save_is_tried() -> None:
    assert {"F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "U16"} <= set(DTYPES)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tensors=tensor_sets)
def test_the_image_is_the_file_that_safetensors_writes(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    specs = specs_of(tensors)
    assert by_us(specs) == by_safetensors(specs, tmp_path / "f")


def test_all_dtypes_in_one_file_in_any_order_of_arrival(tmp_path: Path) -> None:
    specs = [TensorSpec(f"{letter}.{dtype}", dtype, (3,)) for letter in "ba" for dtype in DTYPES]
    expected = by_safetensors(specs, tmp_path / "f")
    assert by_us(specs) == expected
    reordered = plan_file("f", reversed(specs))
    assert expected.startswith(reordered.header)
    assert reordered.total_bytes == len(expected)


@given(tensor_sets)
def test_a_header_comes_back_from_its_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    layout = plan_file("f", specs_of(tensors))
    assert parse_file("f", layout.header) == layout
    assert parse_file("f", layout.header + bytes(100)) == layout
    assert len(layout.header) % 8 == 0


def test_a_lora_sized_header_is_the_same(tmp_path: Path) -> None:
    specs = [
        TensorSpec(f"base_model.model.model.layers.{layer}.self_attn.{proj}_proj.lora_{ab}.weight", "BF16", shape)
        for layer in range(11)
        for proj in "qkv"
        for ab, shape in (("A", (4, 64)), ("B", (64, 4)))
    ]
    assert by_us(specs) == by_safetensors(specs, tmp_path / "f")


def test_impossible_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match="'Q4'"):
        plan_file("f", [TensorSpec("a", "Q4", (1,))])
    with pytest.raises(CheckpointError, match="two tensors are named 'a'"):
        plan_file("f", [TensorSpec("a", "F32", (1,)), TensorSpec("a", "F16", (1,))])
    with pytest.raises(CheckpointError):
        plan_file("f", [TensorSpec("__metadata__", "F32", (1,))])


def head(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
        b"\xff" * 16,
        (100).to_bytes(8, "little") + b"{}",
        head([]),
        head("text"),
        head({"a": None}),
        head({"a": {"dtype": "F32", "shape": [1]}}),
        head({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}),
        head({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        head({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}),
        head({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}),
        head({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
        head({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}),
        head(
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            }
        ),
    ],
)
def test_damaged_headers_are_refused(damaged: bytes) -> None:
    with pytest.raises(CheckpointError, match="f"):
        parse_file("f", damaged)


@given(tensor_sets, st.data())
def test_flipped_bits_raise_our_error_or_still_describe_a_file(
    tensors: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    header = bytearray(plan_file("f", specs_of(tensors)).header)
    header[data.draw(st.integers(0, len(header) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        layout = parse_file("f", bytes(header))
    except CheckpointError:
        return
    assert sum(extent.spec.nbytes for extent in layout.extents) == layout.total_bytes - len(layout.header)
