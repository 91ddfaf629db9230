"""What a batched copy is given: the same bytes in the same places, cut where it makes the copy fast."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.batch import Prepared, aligned

_LARGE = 1 << 16


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.int8]),
            st.sampled_from([(3, 5), (256, 512), (256, 514), (), (0, 4)]),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 15),
)
def test_cutting_changes_no_byte(tensors: list[tuple[torch.dtype, tuple[int, ...], bool]], eights: int) -> None:
    """Of every type, one behind the other from a multiple of 8 bytes, some of them columns of something wider."""
    sizes = [torch.empty(shape, dtype=dtype).nbytes for dtype, shape, _ in tensors]
    image = torch.zeros(64 + 8 * eights + sum(sizes) + 8 * len(sizes), dtype=torch.uint8)
    place = -image.data_ptr() % 64 + 8 * eights
    targets, sources = [], []
    for (dtype, shape, columns), size in zip(tensors, sizes, strict=True):
        place = -(-place // 8) * 8 if dtype is torch.float64 else -(-place // 4) * 4
        target = image[place : place + size].view(dtype).view(shape)
        source = torch.randint(-100, 100, (*shape[:-1], shape[-1] + 1) if shape else shape).to(dtype)
        source = source[..., :-1] if shape else source
        targets.append(target)
        sources.append(source if columns else source.contiguous())
        place += size
    cut_targets, cut_sources = aligned((targets, sources))
    torch._foreach_copy_(cut_targets, cut_sources)
    assert all(map(torch.equal, targets, sources))
    assert sum(part.numel() for part in cut_targets) == sum(target.numel() for target in targets)


def test_a_large_target_begins_where_a_cache_line_does_but_for_a_few_elements_before() -> None:
    image = torch.zeros(1 << 17, dtype=torch.uint8)
    start = -image.data_ptr() % 64 + 8
    target = image[start : start + _LARGE].view(torch.bfloat16)
    targets, _ = aligned(([target], [torch.ones(_LARGE // 2, dtype=torch.bfloat16)]))
    assert [part.numel() for part in targets] == [28, _LARGE // 2 - 28]
    assert targets[1].data_ptr() % 64 == 0
    small = target[:64]
    assert aligned(([small], [torch.ones(64, dtype=torch.bfloat16)]))[0][0] is small
    on_a_line = image[start - 8 : start - 8 + _LARGE]
    assert len(aligned(([on_a_line], [torch.ones(_LARGE, dtype=torch.uint8)]))[0]) == 1


def test_two_batches_are_one() -> None:
    one, two = (Prepared.of([torch.zeros(size)], [torch.ones(size)]) for size in (2, 3))
    both = one + two
    assert [tensor.numel() for tensor in both.host[0]] == [2, 3]
    assert both.host_bytes == 20
    assert both.devices == {}
