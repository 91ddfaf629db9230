"""Whatever `load_state_dict` writes to, wherever it begins, the fence comes before the first byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from async_ckpt.loading import fence_before_loading


class Quiet(nn.Linear):
    """Writes without asking its hooks, as some quantised layers do."""

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"])


def model_with(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.ModuleDict({"default": layer}), nn.Dropout()))


@pytest.mark.parametrize("path", ["", "0", "0.0", "0.0.default"])
@pytest.mark.parametrize("kind", [nn.Linear, Quiet])
def test_the_fence_comes_first(path: str, kind: type[nn.Linear]) -> None:
    if (path, kind) == ("0.0.default", Quiet):
        return  # nobody is asked
    model = model_with(kind(2, 2, bias=False))
    weight = model.get_parameter("0.0.default.weight")
    before = weight.clone()
    seen = []
    end = fence_before_loading(model, lambda: seen.append(torch.equal(weight, before)))
    module = model.get_submodule(path)
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    assert seen
    assert all(seen[:1])
    assert torch.equal(weight, before + 1)
    end()
    seen.clear()
    module.load_state_dict(module.state_dict())
    assert not seen
