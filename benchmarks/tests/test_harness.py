import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.harness import (
    REGISTRY,
    Case,
    Entry,
    Fact,
    Options,
    UnequalResultsError,
    check_equal,
    compare,
    floor_seconds,
    ratio,
)
from benchmarks.memory import measure_apart, peaks
from benchmarks.report import case_rows, duration, print_line, run_case, short

QUICK = Options(quick=True)
RUN = {"limits": {"flops": 1e9, "bandwidth": 1e9}, "device": "cpu", "threads": 1, "versions": {}, "revision": "none"}
MIB = 2**20


def case(ours, peers, **settings):
    return Case(name="sample", ours=ours, peers=peers, **settings)


def test_ratio_is_formed_within_each_round_and_its_range_leaves_out_the_extremes():
    ours, theirs = [1.0, 4.0, 3.0, 8.0, 100.0], [2.0, 4.0, 6.0, 4.0, 100.0]
    assert ratio(ours, theirs) == [1.0, 0.5, 1.0]  # ratios 0.5 1 0.5 2 1


def test_ratio_of_few_rounds_shows_the_whole_range():
    assert ratio([1.0, 2.0, 9.0], [1.0, 1.0, 3.0]) == [2.0, 1.0, 3.0]


def test_floor_is_the_slower_of_arithmetic_and_traffic():
    work = case(float, {}, flops=4e9, bytes=3e9)
    assert floor_seconds(work, {"flops": 2e9, "bandwidth": 1e9}) == 3.0
    assert floor_seconds(work, {"flops": 1e9, "bandwidth": 1e9}) == 4.0


def test_order_of_contenders_reverses_every_round():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or 1.0 for name in ("ours", "peer")}
    compare(case(contenders["ours"], {"peer": contenders["peer"]}, clock="self", rtol=1.0), QUICK)
    assert calls[-6:] == ["ours", "peer", "peer", "ours", "ours", "peer"]


@pytest.mark.parametrize(
    "theirs",
    [torch.tensor([1.0, 2.1]), torch.tensor([1.0]), torch.tensor([1.0, float("nan")])],
    ids=["wrong-value", "wrong-shape", "nan"],
)
def test_unequal_results_are_refused(theirs):
    with pytest.raises(UnequalResultsError, match="sample: peer differs from ours"):
        check_equal(case(lambda: torch.tensor([1.0, 2.0]), {"peer": lambda: theirs}, rtol=1e-3))


def test_margin_says_how_much_of_the_tolerance_is_used():
    margin = check_equal(case(lambda: torch.tensor([2.0]), {"peer": lambda: torch.tensor([2.1])}, rtol=0.1))
    assert margin["peer"] == pytest.approx(0.5)


def test_views_select_what_is_common_to_all():
    different = case(lambda: [1, 2], {"peer": lambda: [2, 1]}, views={"ours": sorted, "peer": sorted})
    assert check_equal(different) == {"peer": 0.0}


def test_setup_runs_before_every_call_and_outside_the_clock():
    log = []
    timed = case(lambda: log.append("call") or 1.0, {}, setup=lambda: log.append("setup"))
    compare(timed, QUICK)
    assert log == ["setup", "call"] * (len(log) // 2)


def test_a_red_case_becomes_a_line_without_times(monkeypatch):
    red = case(lambda: 1.0, {"peer": lambda: 2.0})
    monkeypatch.setitem(REGISTRY, "sample", Entry(lambda options: red, ("cpu",)))
    (line,) = run_case("sample", QUICK, RUN)
    assert line["kind"] == "red" and "samples" not in line


def test_a_case_that_raises_becomes_a_line_with_its_message(monkeypatch):
    def build(options):
        raise ValueError("no such table")

    monkeypatch.setitem(REGISTRY, "sample", Entry(build, ("cpu",)))
    (line,) = run_case("sample", QUICK, RUN)
    assert line["kind"] == "error" and line["message"] == "ValueError: no such table"


def test_a_peer_that_is_not_installed_is_named_and_not_timed(monkeypatch, capsys):
    entry = Entry(lambda options: case(lambda: 1.0, {"absent": None}), ("cpu",))
    monkeypatch.setitem(REGISTRY, "sample", entry)
    (line,) = run_case("sample", QUICK, RUN)
    print_line(line)
    assert "absent: peer not installed" in capsys.readouterr().out
    assert list(line["samples"]) == ["ours"]


def test_a_fact_is_printed_with_its_unit(monkeypatch, capsys):
    entry = Entry(lambda options: [Fact(name="sample", value=0.125, unit="MiB", size={"W": 1_000_000})], ("cpu",))
    monkeypatch.setitem(REGISTRY, "sample", entry)
    (line,) = run_case("sample", QUICK, RUN)
    print_line(line)
    assert capsys.readouterr().out.split() == ["sample", "W=1M", "0.125", "MiB"]


def test_peak_of_a_call_is_what_it_allocates_at_most():
    keeps, drops = peaks(*_allocation(keep=True)), peaks(*_allocation(keep=False))
    assert keeps["peak_mib"] == pytest.approx(64, abs=3) and keeps["held_mib"] == pytest.approx(64, abs=3)
    assert drops["peak_mib"] == pytest.approx(64, abs=3) and drops["held_mib"] == pytest.approx(0, abs=3)


def _allocation(keep):
    def call():
        block = torch.ones(64 * MIB // 4)
        return block if keep else None

    return case(call, {}), call, "cpu"


def test_memory_child_measures_every_contender_by_itself():
    found = measure_apart("sample.allocation", QUICK, modules=["benchmarks.tests.sample_cases"])
    assert found["large"]["peak_mib"] == pytest.approx(64, abs=8)
    assert found["ours"]["peak_mib"] < 8


def test_memory_child_that_fails_says_why():
    found = measure_apart("sample.unknown", QUICK, modules=["benchmarks.tests.sample_cases"])
    assert "sample.unknown" in found["ours"]["error"]


def test_quick_run_of_two_cases_writes_complete_lines(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    chosen = ["--quick", "--only", "tfree.hash", "--only", "tfree.decode.w50k.b8", "--json", str(path)]
    assert command.main(chosen) == 0
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert sorted(line["case"] for line in lines) == ["tfree.decode.w50k.b8", "tfree.hash"]
    for line in lines:
        assert line["kind"] == "case"
        assert {
            "size",
            "dtype",
            "device",
            "threads",
            "versions",
            "revision",
            "floor",
            "margin",
            "limits",
        } <= line.keys()
        assert all(0 <= margin <= 1 for margin in line["margin"].values())
        assert set(line["samples"]) == {"ours", *line["ratios"]}
        assert all(len(values) >= 3 and min(values) > 0 for values in line["samples"].values())
        assert all(low <= middle <= high for middle, low, high in line["ratios"].values())
        assert len(case_rows(line)) == len(line["ratios"]) + len(line["missing"])
    assert "original gather+index_add" in capsys.readouterr().out


def test_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "no-such-case"])
    assert "--only must match a case" in capsys.readouterr().err


def test_numbers_are_short_and_keep_three_digits():
    assert [short(200_000), short(1_000_000), short(8000), short(1306)] == ["200k", "1M", "8k", "1306"]
    assert [duration(0.0124), duration(2.5e-6), duration(1.661)] == ["12.4 ms", "2.5 us", "1.66 s"]
