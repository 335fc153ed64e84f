"""The shipped sweeps: each is read, all of it can be built, and it is what its header says.

Oracles are the reference facts: parameters and MACs of the released models, Table 5's ratios, MACs
of the width grid. Hours in the headers are computed again.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers import ROOT

from model.network.footprint import network_cost
from model.network.scaling import ModelConfig, NetworkSpec, Phi, resolve
from orchestrator.config.codec import merge, read_yaml
from orchestrator.search.config import SweepConfig, decode_sweep, read_sweep
from orchestrator.search.constraints import Budget, ConstraintsConfig, Sieve, draw
from orchestrator.search.proposals import proposals
from orchestrator.search.sample import apply, arm_key
from orchestrator.search.space import Sample, Space

SWEEPS = sorted((ROOT / "jobs" / "sweeps").glob("*.yaml"))
COCO = ROOT / "jobs" / "configs" / "coco.yaml"
COCO_CLASSES, COCO_IMAGES = 80, 118_287
A100_GMACS_PER_S = 255 * 2.492  # reference facts §6: D0 in mixed precision
# Reference facts §2: parameters and GMACs with 90 classes.
RELEASED = {
    "0": (3_880_067, 2.492), "1": (6_625_898, 6.003), "2": (8_097_039, 10.832),
    "3": (12_032_296, 24.569), "4": (20_723_675, 54.584), "5": (33_653_315, 134.134),
    "6": (51_871_782, 224.121), "7": (51_871_782, 322.732), "7x": (77_147_166, 407.628),
}  # fmt: skip
# Reference facts §3: parameters and FLOPs against the repeated FPN's.
TABLE_5 = {
    ("fpn", "sum"): (1.0, 1.0), ("panet", "sum"): (1.0, 1.0), ("nas_fpn", "sum"): (0.71, 0.72),
    ("fully_connected", "sum"): (1.24, 1.21), ("bifpn", "sum"): (0.88, 0.67),
    ("bifpn", "fast"): (0.88, 0.68),
}  # fmt: skip
WIDTH_GMACS = {1.2: 20.3, 1.25: 21.6, 1.3: 23.0, 1.35: 24.6, 1.4: 26.3, 1.45: 28.1}


@dataclass(frozen=True)
class Point:
    """One configuration of a sweep and its network with COCO's classes."""

    sample: Sample
    spec: NetworkSpec
    gmacs: float

    def with_all_outputs(self) -> NetworkSpec:
        """As released: 90 outputs, of which 10 are never used."""
        return replace(self.spec, num_classes=90)


def named(name: str) -> SweepConfig:
    return read_sweep(ROOT / "jobs" / "sweeps" / f"{name}.yaml")


def points(sweep: SweepConfig) -> list[Point]:
    """All that it would train, or as many of TPE's and random's first as it would."""
    budget = Budget(sweep.constraints, COCO_CLASSES)
    search = sweep.search
    samples = draw(
        sweep.space, Sieve(sweep.base, budget), grid=search.algorithm == "grid", seed=search.seed,
        num=sweep.trials.num, points=search.points,
    )  # fmt: skip
    specs = [budget.network(apply(sweep.base, sample)) for sample in samples]
    return [
        Point(sample, spec, budget.closed_forms(spec)[1])
        for sample, spec in zip(samples, specs, strict=True)
    ]


def a100_hours(sweep: SweepConfig, mean_gmacs: float, num: int) -> float:
    longest = sweep.longest()
    assert longest is not None
    share, going, before = 0.0, 1.0, 0.0
    for rung in [*sweep.scheduler.rungs(longest), longest]:
        share += going * (rung - before) / longest
        going, before = going / sweep.scheduler.reduction, rung
    images = num * sweep.trials.seeds * longest * COCO_IMAGES
    return share * images * mean_gmacs / A100_GMACS_PER_S / 3600


@pytest.fixture(params=SWEEPS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_every_table_has_its_sweep() -> None:
    there = {path.stem for path in SWEEPS}
    assert {"smoke", "fusion", "topology", "compound", "width", "fusion_scaling"} <= there


def test_it_is_read_and_kept_whole(path: Path) -> None:
    sweep = read_sweep(path)
    assert sweep.name == path.stem.replace("_", "-")
    assert decode_sweep(sweep.to_mapping()) == sweep
    assert path.read_text().startswith("# ")


def test_its_networks_are_feasible_and_its_arms_differ(path: Path) -> None:
    sweep = read_sweep(path)
    found = points(sweep)
    assert len(found) == (sweep.trials.num or sweep.space.size())
    assert len({arm_key(apply(sweep.base, point.sample)) for point in found}) == len(found)


def test_every_point_of_a_grid_is_another_network(path: Path) -> None:
    sweep = read_sweep(path)
    if sweep.search.algorithm == "grid":
        found = points(sweep)
        assert len({point.spec for point in found}) == len(found)


def test_every_value_of_every_knob_has_an_effect(path: Path) -> None:
    assert without_effect(read_sweep(path)) == []


@pytest.mark.parametrize("phi", ["0", "1", "2"])
def test_the_base_of_the_width_says_little_below_phi_3(phi: str) -> None:
    given = merge(
        read_yaml(SWEEPS[0].parent / "width.yaml"), {"space": {"model.phi": {"value": phi}}}
    )
    sweep = decode_sweep(given, folder=SWEEPS[0].parent)
    [knob] = {path for path, _, _ in without_effect(sweep)}
    assert knob == "model.scaling.width"


def without_effect(sweep: SweepConfig) -> list[tuple[str, Any, Any]]:
    """Pairs of values of one knob between which nothing that is trained differs, the rest fixed."""
    budget = Budget(ConstraintsConfig(), COCO_CLASSES)
    finite = [d for d in sweep.space.dimensions if d.domain.size is not None]
    found = []
    for dimension in finite:
        for first, second in itertools.combinations(dimension.domain.values(), 2):
            trained = []
            for value in (first, second):
                sample = with_value(sweep.space, dimension.path, value)
                job = apply(sweep.base, sample)
                rest = replace(job, model=ModelConfig())
                trained.append((budget.network(job), arm_key(rest)))
            if trained[0] == trained[1]:
                found.append((dimension.path, first, second))
    return found


def with_value(space: Space, path: str, value: Any) -> Sample:
    """The first sample of the space in which a knob is active and has this value."""
    for index in itertools.count():
        sample = {**space.sample(0, index), path: value}
        active = {d.path for d in space.dimensions if d.active(sample)}
        if path in active:
            kept = {key: given for key, given in sample.items() if key in active}
            missing = [d for d in space.dimensions if d.path in active and d.path not in kept]
            return kept | {d.path: d.domain.at(0.0) for d in missing}
    raise AssertionError


@pytest.mark.parametrize("name", ["fusion", "topology", "compound", "width", "fusion_scaling"])
def test_it_is_the_papers_recipe(name: str) -> None:
    path = ROOT / "jobs" / "sweeps" / f"{name}.yaml"
    train = read_yaml(path)["train"]
    assert (path.parent / train).resolve() == COCO
    sweep = read_sweep(path)
    assert sweep.longest() == sweep.base.train.duration.epochs == 300
    groups, rest = divmod(sweep.base.train.batch_size, sweep.base.train.bn_group or 0)
    assert (rest, groups % sweep.trials.workers_per_trial) == (0, 0), "whole groups on each worker"


@pytest.mark.parametrize("name", ["fusion", "topology", "compound", "width"])
def test_tables_are_not_stopped_early(name: str) -> None:
    sweep = named(name)
    assert sweep.scheduler.kind == "none"
    assert sweep.notes() == []


def test_what_stops_early_does_so_where_the_paper_shows_no_reversal() -> None:
    sweep = named("fusion_scaling")
    assert sweep.notes() == []
    assert sweep.scheduler.rungs(300) == (90, 270)
    assert not any(d.path.startswith("data.augment") for d in sweep.space.dimensions)


@pytest.mark.parametrize("name", ["fusion", "topology", "compound", "width", "fusion_scaling"])
def test_the_header_says_what_it_needs(name: str) -> None:
    text = (ROOT / "jobs" / "sweeps" / f"{name}.yaml").read_text()
    found = re.search(r"# Needs: (\d+) trials x (\d+) epochs, about ([\d,]+) A100-hours", text)
    assert found is not None
    sweep, trained = named(name), points(named(name))
    target = sweep.constraints.gmacs.target
    mean = target or sum(point.gmacs for point in trained) / len(trained)
    hours = a100_hours(sweep, mean, len(trained))
    assert int(found[1]) == len(trained) * sweep.trials.seeds
    assert int(found[2]) == sweep.longest()
    assert int(found[3].replace(",", "")) == pytest.approx(hours, rel=0.01)
    page = (ROOT / "docs" / "sweeps.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}.yaml`"))
    assert f"| {len(trained)} x {sweep.trials.seeds} | 300 | {found[3]} " in row
    assert row.rstrip(" |").endswith(sweep.scheduler.kind)


@pytest.mark.parametrize(("phi", "hours"), [("2", 3320), ("4", 16800)])
def test_larger_models_of_table_6(phi: str, hours: int) -> None:
    given = read_yaml(ROOT / "jobs" / "sweeps" / "fusion.yaml")
    job = merge(read_yaml(COCO), {"model": {"phi": phi}})
    sweep = decode_sweep({**given, "train": job})
    found = points(sweep)
    assert {point.spec.phi for point in found} == {phi}
    mean = sum(point.gmacs for point in found) / len(found)
    assert hours == pytest.approx(a100_hours(sweep, mean, len(found)), rel=0.01)
    assert f"{hours:,}" in (ROOT / "jobs" / "sweeps" / "fusion.yaml").read_text()


def test_fusion_changes_no_cost_but_its_weights() -> None:
    found = {point.spec.fusion: point for point in points(named("fusion"))}
    assert list(found) == ["fast", "softmax", "unbounded", "sum"]
    assert len({point.gmacs for point in found.values()}) == 1
    params = {kind: network_cost(point.spec).params for kind, point in found.items()}
    assert params["fast"] == params["softmax"] == params["unbounded"] == params["sum"] + 57
    assert named("fusion").trials.seeds >= 5


def test_seeds_that_table_6_would_take() -> None:
    """Two-sided 5 %, power 80 %, normal: as the header and the page say."""

    def seeds(sigma: float) -> int:
        return math.ceil(2 * (1.96 + 0.8416) ** 2 * (sigma / 0.11) ** 2)

    assert (seeds(0.2), seeds(0.1)) == (52, 13)


def test_topologies_have_the_ratios_of_table_5() -> None:
    found = {(point.spec.topology, point.spec.fusion): point for point in points(named("topology"))}
    assert set(found) == set(TABLE_5)
    base = network_cost(found["fpn", "sum"].spec).pyramid
    for key, point in found.items():
        pyramid, (params, macs) = network_cost(point.spec).pyramid, TABLE_5[key]
        assert pyramid.params / base.params == pytest.approx(params, rel=0.05)
        assert pyramid.macs / base.macs == pytest.approx(macs, rel=0.05)


def test_topologies_share_everything_else() -> None:
    found = points(named("topology"))
    costs = [network_cost(point.spec) for point in found]
    assert len({(cost.backbone, cost.class_head, cost.box_head) for cost in costs}) == 1
    assert min(cost.params for cost in costs) / 1e6 == pytest.approx(11.8, abs=0.05)
    assert max(cost.params for cost in costs) / 1e6 == pytest.approx(12.7, abs=0.05)
    assert max(p.gmacs for p in found) / min(p.gmacs for p in found) < 1.13
    published = next(p.spec for p in found if (p.spec.topology, p.spec.fusion) == ("bifpn", "fast"))
    assert published == resolve(ModelConfig(phi="3"), COCO_CLASSES)


def test_compound_points_are_the_released_models() -> None:
    found = [point for point in points(named("compound")) if list(point.sample) == ["model.phi"]]
    assert [point.spec.phi for point in found] == ["1", "2", "3", "4"]
    for point in found:
        assert_released(point.with_all_outputs())


def test_the_oracle_knows_every_size() -> None:
    for phi in get_args(Phi):
        assert_released(resolve(ModelConfig(phi=phi), 90))


def assert_released(spec: NetworkSpec) -> None:
    cost, (params, gmacs) = network_cost(spec), RELEASED[spec.phi]
    assert cost.params == params
    assert cost.gmacs == pytest.approx(gmacs, abs=6e-4)


def test_compound_is_a_star_around_d0() -> None:
    centre = resolve(ModelConfig(phi="0"), COCO_CLASSES)
    arms: dict[str, list[int]] = {}
    middle = 0
    for point in points(named("compound")):
        if point.spec.phi != "0":
            continue
        differs = [
            name for name in ("image_size_px", "fpn_channels", "fpn_repeats", "head_layers")
            if getattr(point.spec, name) != getattr(centre, name)
        ]  # fmt: skip
        middle += not differs
        if differs:
            [name] = differs
            arms.setdefault(name, []).append(getattr(point.spec, name))
            assert replace(point.spec, **{name: getattr(centre, name)}) == centre
    assert middle == 1
    assert arms == {
        "head_layers": [12, 32],
        "fpn_repeats": [12, 32],
        "fpn_channels": [232, 360, 608, 944],
        "image_size_px": [896, 1152, 1664, 2432],
    }


@pytest.mark.parametrize(
    ("name", "first", "step", "values"),
    [
        ("image_size_px", 512, 128, [896, 1152, 1664, 2432]),
        ("fpn_channels", 64, 8, [232, 360, 608, 944]),
    ],
)
def test_single_dimensions_reach_what_compound_costs(
    name: str, first: int, step: int, values: list[int]
) -> None:
    """The first size that costs at least as much (reference facts §3, up to D3)."""
    for phi, value in zip("1234", values, strict=True):
        sizes = itertools.count(first, step)
        enough = next(
            size for size in sizes
            if network_cost(resolve(ModelConfig(phi="0", **{name: size}), 90)).gmacs  # type: ignore[arg-type]
            >= RELEASED[phi][1]
        )  # fmt: skip
        assert enough == value


def test_compound_can_be_cut_by_its_budget() -> None:
    folder = ROOT / "jobs" / "sweeps"
    text = (folder / "compound.yaml").read_text()
    given = merge(read_yaml(folder / "compound.yaml"), {"constraints": {"gmacs": {"max": 30}}})
    sweep = decode_sweep(given, folder=folder)
    found = points(sweep)
    assert len(found) == 14
    assert max(point.gmacs for point in found) < 30
    mean = sum(point.gmacs for point in found) / len(found)
    assert a100_hours(sweep, mean, len(found)) == pytest.approx(2230, rel=0.01)
    assert "2,230" in text


def test_the_width_grid_has_the_papers_bases_and_costs() -> None:
    found = points(named("width"))
    assert [point.sample["model.scaling.width"] for point in found] == list(WIDTH_GMACS)
    assert [point.spec.fpn_channels for point in found] == [112, 128, 144, 160, 176, 192]
    for point, gmacs in zip(found, WIDTH_GMACS.values(), strict=True):
        assert network_cost(point.with_all_outputs()).gmacs == pytest.approx(gmacs, abs=0.05)
    taken = next(p for p in found if p.sample["model.scaling.width"] == 1.35)
    assert taken.spec == resolve(ModelConfig(phi="3"), COCO_CLASSES)


def test_the_mixed_search_begins_with_d1_and_keeps_its_price() -> None:
    sweep = named("fusion_scaling")
    found = points(sweep)
    assert found[0].spec == resolve(ModelConfig(phi="1", fusion="fast"), COCO_CLASSES)
    assert all(5.49 <= point.gmacs <= 6.71 for point in found)
    first = proposals(sweep, Sieve(sweep.base, Budget(sweep.constraints, COCO_CLASSES))).next()
    assert first == found[0].sample == sweep.search.points[0]
