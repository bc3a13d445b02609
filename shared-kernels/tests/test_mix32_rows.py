import pytest
import torch

from shared_kernels import mix32_rows
from shared_kernels.mix32_rows.reference import mix32_rows_reference


def number(text: str) -> int:
    return int.from_bytes(text.encode(), "little")


@pytest.mark.parametrize(
    ("trigram", "seed", "rows"),
    [
        (" He", 0, [374, 1189, 2203, 2430, 3717, 4503, 5367, 5876, 6807, 7224]),
        ("llo", 7, [376, 1300, 2039, 2403, 3375, 4645, 5299, 5653, 7171, 7548]),
    ],
)
def test_golden_rows(run, trigram, seed, rows):
    out = run(mix32_rows, torch.tensor([number(trigram)]), table_size=8000, num_hashes=10, seed=seed)
    assert out.tolist() == [rows]
    assert out.dtype == torch.int32


@pytest.mark.parametrize("seed", [0, 7, -1, 2**31 + 5, 2**40 + 3])
@pytest.mark.parametrize(
    ("table_size", "num_hashes", "num_lowercase"),
    [
        pytest.param(1, 1, 0, id="smallest"),
        pytest.param(640, 10, 3, id="some-lower-case"),
        pytest.param(33 * 7, 33, 33, id="all-lower-case"),
        pytest.param(2**31, 8, 2, id="largest-table"),
        pytest.param(600, 600, 1, id="more-columns-than-half-a-block"),
    ],
)
def test_rows_equal_the_definition_in_integers(run, table_size, num_hashes, num_lowercase, seed):
    letters = [number(text) for text in ("HeL", "Z[@", " aZ", "AAA", "zzz")]
    trigrams = torch.cat(
        [torch.randint(0, 2**24, (40,)), torch.randint(2**24, 2**24 + 2**31, (9,)), torch.tensor([*letters, 0])]
    )
    settings = {"table_size": table_size, "num_hashes": num_hashes, "num_lowercase": num_lowercase, "seed": seed}
    assert torch.equal(run(mix32_rows, trigrams, **settings), mix32_rows_reference(trigrams, **settings))


def test_no_trigrams_have_no_rows(run):
    out = run(mix32_rows, torch.zeros(0, dtype=torch.int64), table_size=64, num_hashes=8)
    assert out.shape == (0, 8)


def test_lower_case_columns_are_those_of_the_lower_cased_trigram(run):
    upper, lower = torch.tensor([[number("HAT")], [number("hat")]])
    settings = {"table_size": 800, "num_hashes": 8, "num_lowercase": 3}
    ours, theirs = (run(mix32_rows, each, **settings)[0] for each in (upper, lower))
    assert torch.equal(ours[5:], theirs[5:])
    assert not torch.equal(ours[:5], theirs[:5])


def test_rows_of_a_trigram_are_distinct_and_rows_of_all_are_spread_evenly():
    trigrams = torch.arange(20_000) * 7
    rows = mix32_rows(trigrams, table_size=500, num_hashes=10)
    assert rows.sort(1).values.diff(dim=1).gt(0).all()
    counts = rows.long().flatten().bincount(minlength=500).double()
    chi_square = ((counts - counts.mean()).square() / counts.mean()).sum() / 499
    assert 0.7 < chi_square < 1.3


def test_trigrams_may_be_strided(run):
    trigrams = torch.arange(20)[::3]
    settings = {"table_size": 64, "num_hashes": 8}
    assert torch.equal(run(mix32_rows, trigrams, **settings), mix32_rows_reference(trigrams, **settings))


@pytest.mark.triton
def test_the_operator_is_well_registered():
    from shared_kernels.mix32_rows.op import _mix32_rows

    torch.library.opcheck(_mix32_rows, (torch.arange(5), 64, 8, 2, 7))


def test_a_compiled_graph_has_no_breaks(impl):
    def function(trigrams):
        return mix32_rows(trigrams, table_size=64, num_hashes=8, num_lowercase=2, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.arange(9)), function(torch.arange(9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trigrams": torch.zeros(2).int()}, "trigrams must be int64, got torch.int32"),
        ({"trigrams": torch.zeros(2, 2).long()}, r"trigrams must have the shape \[U\], got \(2, 2\)"),
        ({"num_hashes": 0}, "num_hashes must be at least 1, got 0"),
        ({"table_size": 65}, r"table_size must be a multiple of num_hashes \(8\) in \[num_hashes, 2\*\*31\], got 65"),
        ({"table_size": 0}, r"table_size must be a multiple of num_hashes \(8\)"),
        ({"table_size": 2**32}, r"table_size must be a multiple of num_hashes \(8\)"),
        ({"num_lowercase": 9}, r"num_lowercase must lie in \[0, 8\] \(num_hashes\), got 9"),
    ],
)
def test_an_error_names_the_argument(change, message):
    arguments = {"trigrams": torch.zeros(2).long(), "table_size": 64, "num_hashes": 8}
    with pytest.raises(ValueError, match=message):
        mix32_rows(**(arguments | change))
