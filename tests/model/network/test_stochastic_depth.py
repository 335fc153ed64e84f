from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from model.network.backbone import Backbone
from model.network.stochastic_depth import DropPath, draw, replace_drop_path


def network(*rates: float) -> nn.Sequential:
    return nn.Sequential(*(DropPath(rate) for rate in rates), nn.Linear(1, 1))


def decisions(net: nn.Module) -> Tensor:
    layers = [layer for layer in net.modules() if isinstance(layer, DropPath)]
    kept = [layer.keep for layer in layers]
    return torch.stack([keep.flatten() for keep in kept if keep is not None], dim=1)


def test_rows_of_a_group_do_not_depend_on_who_computes_them() -> None:
    whole, part = network(0.3, 0.5), network(0.3, 0.5)
    draw(whole, seed=(1, 7, 2), group_size=8, rows=slice(0, 8))
    torch.manual_seed(999)  # nor on the process's own generator
    for rows in (slice(0, 4), slice(4, 8), slice(3, 5)):
        draw(part, seed=(1, 7, 2), group_size=8, rows=rows)
        assert torch.equal(decisions(part), decisions(whole)[rows])


@pytest.mark.parametrize("seed", [(2, 7, 2), (1, 8, 2), (1, 7, 3)])
def test_seed_step_and_group_each_change_the_draw(seed: tuple[int, int, int]) -> None:
    first, second = network(0.5), network(0.5)
    draw(first, seed=(1, 7, 2), group_size=64, rows=slice(0, 64))
    draw(second, seed=seed, group_size=64, rows=slice(0, 64))
    assert not torch.equal(decisions(first), decisions(second))


def test_draws_are_those_of_any_other_process() -> None:
    """A restarted worker must drop what the first one dropped."""
    net = network(0.5)
    draw(net, seed=(1, 7, 2), group_size=16, rows=slice(0, 16))
    drawn = "".join(str(int(v)) for v in decisions(net).flatten() > 0)
    assert drawn == "0001001101011010"


def test_rate_and_scale() -> None:
    net = network(0.25)
    draw(net, seed=(0, 0, 0), group_size=4000, rows=slice(0, 4000))
    keep = decisions(net)
    assert keep.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (keep > 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert keep.mean().item() == pytest.approx(1.0, abs=0.04)


def test_a_dropped_sample_loses_its_branch_in_training_only() -> None:
    layer = DropPath(0.5)
    layer.keep = torch.tensor([0.0, 2.0]).view(-1, 1, 1, 1)
    branch = torch.ones(2, 3, 2, 2)
    assert layer(branch)[:, 0, 0, 0].tolist() == [0.0, 2.0]
    assert layer(branch.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.eval()(branch), branch)


def test_timm_layers_are_replaced_with_linear_rates() -> None:
    backbone = Backbone("test_efficientnet", pretrained=False, drop_path=0.3)
    assert not [m for m in backbone.modules() if isinstance(m, timm.layers.DropPath)]
    rates = [m.rate for m in backbone.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates)
    assert rates
    assert all(0 < rate <= 0.3 for rate in rates)


def test_a_rate_of_zero_becomes_nothing() -> None:
    net = nn.Sequential(timm.layers.DropPath(0.0), timm.layers.DropPath(0.1))
    replace_drop_path(net)
    assert isinstance(net[0], nn.Identity)
    assert isinstance(net[1], DropPath)


def test_drop_path_changes_the_features_of_dropped_images_only() -> None:
    torch.manual_seed(0)
    backbone = Backbone("mobilenetv3_small_050", pretrained=False, drop_path=0.9).double().train()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # so that images do not meet in batch statistics
    images = torch.randn(1, 3, 64, 64).double().expand(4, -1, -1, -1)
    draw(backbone, seed=(0, 0, 0), group_size=4, rows=slice(0, 4))
    features = backbone(images)[-1]
    blocks = [m for m in backbone.modules() if getattr(m, "has_skip", False)]
    kept = torch.cat([decisions(block) > 0 for block in blocks], dim=1)
    assert 0 < kept.float().mean() < 1
    for i in range(4):
        for j in range(i):
            same = torch.allclose(features[i], features[j], atol=1e-12)
            assert same == torch.equal(kept[i], kept[j])
