import pytest

from benchmarks.harness import Options
from benchmarks.scaling import CURVES, fitted_slope, measure_curve


def test_slope_of_a_power_law_is_its_exponent():
    sizes = [1, 2, 4, 8, 16]
    assert fitted_slope(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_slope_ignores_the_two_smallest_sizes():
    assert fitted_slope([1, 2, 4, 8, 16], [99.0, 50.0, 4.0, 8.0, 16.0]) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name, curve in CURVES.items() if not curve.is_landmark])
def test_cost_grows_no_faster_than_promised(name):
    line = measure_curve(CURVES[name], Options(), memory=False)
    assert line["slope"][0] <= line["expected"] + 0.2, line["seconds"]
