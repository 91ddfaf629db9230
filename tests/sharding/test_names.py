"""Walking a model gives what torch gives, faster."""

from __future__ import annotations

from torch import nn

from async_ckpt.sharding.names import every_module, listed_quickly, walk


def tree() -> nn.Module:
    """With a shared module, a missing one, and one child alone, as wrappers have it."""
    shared = nn.Linear(2, 2)
    inner = nn.Sequential(nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU())}), shared)
    inner.register_module("nothing", None)
    return nn.ModuleList([inner, nn.Sequential(shared)])


def test_a_list_of_the_modules_is_torchs() -> None:
    model = tree()
    expected = list(model.named_modules())
    assert len(expected) == 7
    with listed_quickly(model):
        assert list(model.named_modules()) == expected
        assert list(model.modules()) == [module for _, module in expected]
        assert dict(model.named_parameters(prefix="x")).keys() == {"x.0.0.a.weight", "x.0.0.a.bias"}
        assert len(list(model.named_modules(remove_duplicate=False))) == 9
    assert "named_modules" not in vars(model)
    assert list(model.named_modules()) == expected


def test_every_path_and_every_module() -> None:
    model = tree()
    assert list(walk(model)) == list(model.named_modules(remove_duplicate=False))
    assert list(every_module(model)) == list(model.modules())
