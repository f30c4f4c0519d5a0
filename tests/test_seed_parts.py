"""The benchmark that takes the noise between seeds apart finds the parts that were put in."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.seed_parts import components


def made_up(start: float, order: float, both: float, count: int = 60) -> list[SimpleNamespace]:
    """Return runs whose val_bpb has a part of each seed and one of the pair, of these standard deviations."""
    rng = np.random.default_rng(5)
    by_start = rng.normal(scale=start, size=count)
    by_order = rng.normal(scale=order, size=count)
    return [
        SimpleNamespace(start=s, order=o, val_bpb=1 + by_start[s] + by_order[o] + rng.normal(scale=both))
        for s in range(count)
        for o in range(count)
    ]


@pytest.mark.parametrize("parts", [(0.03, 0.01, 0.02), (0.0, 0.02, 0.005), (0.01, 0.0, 0.03)])
def test_each_part_of_the_noise_is_found(parts):
    found = components(made_up(*parts), "val_bpb")
    assert found == pytest.approx(parts, abs=0.0025, rel=0.2)


def test_what_only_the_start_decides_is_not_the_orders():
    runs = [SimpleNamespace(start=s, order=o, val_bpb=1 + s / 10) for s in range(3) for o in range(3)]
    start, order, both = components(runs, "val_bpb")
    assert start == pytest.approx(0.1) and order == pytest.approx(0, abs=1e-9)
    assert both == pytest.approx(0, abs=1e-9)
