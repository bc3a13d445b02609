from benchmarks.harness import Case, Options, floor_seconds, ratio

QUICK = Options(quick=True)
RUN = {"limits": {"flops": 1e9, "bandwidth": 1e9}, "device": "cpu", "threads": 1, "versions": {}, "revision": "none"}


def test_ratio_is_formed_within_each_round_and_its_range_leaves_out_the_extremes():
    ours, theirs = [1.0, 4.0, 3.0, 8.0, 100.0], [2.0, 4.0, 6.0, 4.0, 100.0]
    assert ratio(ours, theirs) == [1.0, 0.5, 1.0]  # 0.5 1 0.5 2 1 sorted: 0.5 0.5 1 1 2


def test_floor_is_the_slower_of_arithmetic_and_traffic():
    case = Case(name="x", ours=float, peers={}, flops=4e9, bytes=3e9)
    assert floor_seconds(case, {"flops": 2e9, "bandwidth": 1e9}) == 3.0
    assert floor_seconds(case, {"flops": 1e9, "bandwidth": 1e9}) == 4.0
