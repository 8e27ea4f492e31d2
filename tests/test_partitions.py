"""Plans: every row covers what it sees exactly once, and the listed examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from naive import naive_plan
from numpy.typing import NDArray

from sketchattn.partitions.patterns import (
    PATTERNS,
    block_of_rank,
    default_block,
    label_plan,
    make_plan,
)
from sketchattn.partitions.plans import Plan
from sketchattn.partitions.ragged import Ragged

Array = NDArray[Any]
# Every pattern whose rows cover a key once.
COVERING = tuple(x for x in PATTERNS if x != "axial_joint")


def message(text: str) -> str:
    """Return a pattern for a whole message."""
    return f"^{re.escape(text)}$"


def kinds() -> Iterator[tuple[str, bool, bool]]:
    """Yield (pattern, causal, split) of every plan of positions."""
    for pattern in COVERING:
        for causal in (False, True):
            yield pattern, causal, False
            if pattern == "axial_horizontal" or (pattern == "axial_vertical" and not causal):
                yield pattern, causal, True


def blocks(pattern: str, n: int) -> list[int | None]:
    """Return block lengths, those that do not divide n and those above n among them."""
    if pattern == "logsparse":
        return [None, 4]
    return [None, *dict.fromkeys([1, 2, 3, 5, n, n + 3])]


def check_all(sizes: range | list[int]) -> int:
    """Check every plan of these sizes, and return how many there were."""
    count = 0
    for n in sizes:
        for pattern, causal, split in kinds():
            for block in blocks(pattern, n):
                make_plan(pattern, n, block=block, causal=causal, split=split).check()
                count += 1
        labels = np.random.default_rng(n).integers(0, max(1, n // 3), n)
        for own in (False, True):
            for causal in (False, True):
                label_plan(labels, own=own, causal=causal).check()
                count += 1
    return count


def test_plans_are_disjoint_and_cover() -> None:
    assert check_all([*range(1, 34), 63, 64, 65, 70]) > 2000


@pytest.mark.slow
def test_plans_are_disjoint_and_cover_for_every_length() -> None:
    assert check_all(range(1, 301)) > 20000


def regions_of(plan: Plan, i: int) -> list[list[int]]:
    """Return the regions of a row, in the order of their first keys."""
    return sorted(plan.regions[t].tolist() for t in plan.row_regions[i])


@pytest.mark.parametrize(("pattern", "causal", "split"), list(kinds()))
def test_plans_are_those_of_the_definition(pattern: str, causal: bool, split: bool) -> None:
    for n in (1, 2, 3, 5, 9, 12, 13, 17, 24):
        for block in (1, 2, 4, 8) if pattern == "logsparse" else (1, 2, 3, 4, 5, n, n + 3):
            plan = make_plan(pattern, n, block=block, causal=causal, split=split)
            expected = naive_plan(pattern, n, block, causal=causal, split=split)
            for i, (direct, regions) in enumerate(expected):
                if pattern == "logsparse":  # whose blocks of one key are direct
                    direct = sorted(direct + [r[0] for r in regions if len(r) == 1])
                    regions = [r for r in regions if len(r) > 1]
                assert plan.direct[i].tolist() == direct, (n, block, i)
                assert regions_of(plan, i) == sorted(map(list, regions)), (n, block, i)


# --- listed examples ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "direct", "regions"),
    [
        (6, [6], [[0, 1, 2, 3], [4, 5]]),
        (7, [6, 7], [[0, 1, 2, 3], [4, 5]]),
        (8, [8], [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_logsparse_of_nine(row: int, direct: list[int], regions: list[list[int]]) -> None:
    plan = make_plan("logsparse", 9, causal=True)
    assert plan.direct[row].tolist() == direct
    assert regions_of(plan, row) == regions


def test_logsparse_of_six_in_both_directions() -> None:
    plan = make_plan("logsparse", 6)
    for row in (0, 1):
        assert plan.direct[row].tolist() == [0, 1]
        assert regions_of(plan, row) == [[2, 3], [4, 5]]
    for row in (4, 5):
        assert plan.direct[row].tolist() == [4, 5]
        assert regions_of(plan, row) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 256, 257])
def test_logsparse_has_its_slots_and_regions(n: int) -> None:
    plan = make_plan("logsparse", n, causal=True)
    slots = plan.direct.sizes + plan.row_regions.sizes
    assert slots.tolist() == [1 + i.bit_count() for i in range(n)]
    assert len(plan.regions) == max((n + 1) // 2 - 1, 0)
    k = (n - 1).bit_length() - 1
    if n >= 3 and n == 2**k + 1:  # one level more than log2(n - 1) rounded up
        assert plan.direct[n - 1].tolist() == [n - 1]
        assert regions_of(plan, n - 1) == [list(range(2**k))]
    both = make_plan("logsparse", n)
    assert (both.direct.sizes + both.row_regions.sizes).max() <= 1 + (n - 1).bit_length()
    if n & (n - 1) == 0 and n > 1:
        assert len(both.regions) == n - 2


@pytest.mark.parametrize(
    ("pattern", "options", "direct", "regions"),
    [
        ("axial_vertical", {"causal": True}, [2, 4, 5, 6], [[0], [1], [3]]),
        ("axial_horizontal", {"causal": True}, [2, 4, 5, 6], [[0, 1, 3]]),
        ("axial_horizontal", {"causal": True, "split": True}, [2, 4, 5, 6], [[0, 1], [3]]),
        ("axial_rowmajor", {"causal": True}, [4, 5, 6], [[0, 1, 2, 3]]),
        ("axial_vertical", {}, [2, 4, 5, 6, 7, 10], [[0, 8], [1, 9], [3, 11]]),
        ("axial_horizontal", {}, [2, 4, 5, 6, 7, 10], [[0, 1, 3], [8, 9, 11]]),
    ],
)
def test_axial_plans_of_twelve(
    pattern: str, options: dict[str, Any], direct: list[int], regions: list[list[int]]
) -> None:
    plan = make_plan(pattern, 12, block=4, **options)
    assert plan.direct[6].tolist() == direct
    assert regions_of(plan, 6) == regions


@pytest.mark.parametrize(
    ("pattern", "options", "count", "most"),
    [
        ("axial_vertical", {"causal": True}, 240, 46),
        ("axial_vertical", {}, 256, 46),
        ("axial_vertical", {"split": True}, 480, 61),
        ("axial_horizontal", {"causal": True}, 240, 46),
        ("axial_horizontal", {}, 256, 46),
        ("axial_horizontal", {"causal": True, "split": True}, 450, 60),
        ("axial_horizontal", {"split": True}, 480, 61),
        ("axial_rowmajor", {"causal": True}, 15, 31),
        ("axial_rowmajor", {}, 16, 31),
    ],
)
def test_axial_plans_of_a_square_grid(
    pattern: str, options: dict[str, Any], count: int, most: int
) -> None:
    plan = make_plan(pattern, 256, block=16, **options)
    assert len(plan.regions) == count
    assert (plan.direct.sizes + plan.row_regions.sizes).max() == most
    means = {"axial_horizontal": 23.5, "axial_rowmajor": 16.0, "axial_vertical": 30.0625}
    if options == {"causal": True}:
        assert plan.slots / 256 == means[pattern]


def test_spans_have_their_slots() -> None:
    plan = make_plan("fixed", 60, block=6, causal=True)
    slots = plan.direct.sizes + plan.row_regions.sizes
    assert slots.tolist() == [i % 6 + 1 + i // 6 for i in range(60)]
    assert slots.mean() == (6 + 60 / 6) / 2
    both = make_plan("fixed", 64, block=6)
    expected = [(6 if i < 60 else 4) + 11 - 1 for i in range(64)]
    assert (both.direct.sizes + both.row_regions.sizes).tolist() == expected
    # The short last span is never a region of causal rows.
    assert len(make_plan("fixed", 64, block=6, causal=True).regions) == 10


def test_the_joint_plan_covers_pairs_off_the_own_row_and_column_twice() -> None:
    plan = make_plan("axial_joint", 20, block=5, causal=True)
    counts = [np.bincount(keys, minlength=20) for keys in plan.covered()]
    assert sum(int((c == 2).sum()) for c in counts) == 120
    assert sum(int((c > 0).sum()) for c in counts) == 210
    with pytest.raises(ValueError, match="exactly once"):
        plan.check()
    # 3 R + 2 m slots at most, with those that are empty.
    for m, slots in ((128, 304), (64, 224)):
        large = make_plan("axial_joint", 2048, block=m, causal=True)
        most = int((large.direct.sizes + large.row_regions.sizes).max())
        assert slots - 6 <= most <= slots


def test_blocks_by_default_and_by_rank() -> None:
    assert [default_block(x, 512) for x in ("fixed", "axial_horizontal", "axial_rowmajor")] == [
        32,
        32,
        32,
    ]
    assert default_block("axial_vertical", 512) == 16
    assert default_block("logsparse", 512) == default_block("fixed", 1) == 1
    assert block_of_rank("fixed", 10, 6) == 2
    assert len(make_plan("fixed", 10, block=2).regions) == 5  # fewer than asked for
    assert [block_of_rank("logsparse", 64, r) for r in (1, 2, 3, 64)] == [1, 2, 4, 64]


# --- labels, windows, masks ---------------------------------------------------------------------


def test_labels_by_the_definition(global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    labels = rng.integers(0, 5, 30) * 2  # gaps are dropped
    for causal in (False, True):
        for own in (False, True):
            plan = label_plan(labels, own=own, causal=causal)
            plan.check()
            for i in range(30):
                sets: dict[int, list[int]] = {}
                for j in range(i + 1 if causal else 30):
                    sets.setdefault(int(labels[j]), []).append(j)
                direct = sets.pop(int(labels[i])) if own else []
                assert plan.direct[i].tolist() == direct
                assert regions_of(plan, i) == sorted(sets.values())
    assert len(label_plan(labels, own=False, causal=True).regions) <= 30
    other = rng.integers(0, 10, 12)
    crossed = label_plan(labels, row_labels=other, n_q=12)
    crossed.check()
    for i in range(12):
        assert crossed.direct[i].tolist() == np.flatnonzero(labels == other[i]).tolist()


PLANS: list[Callable[[], Plan]] = [
    lambda: make_plan("fixed", 20, block=5),
    lambda: make_plan("fixed", 21, block=5, causal=True),
    lambda: make_plan("logsparse", 21, causal=True),
    lambda: make_plan("axial_horizontal", 18, block=4),
    lambda: label_plan(np.arange(20) * 7 % 4, own=False),
    lambda: label_plan(np.arange(20) * 7 % 4, causal=True),
]


@pytest.mark.parametrize("make", PLANS)
@pytest.mark.parametrize("width", [0, 1, 3, 30])
def test_windows_take_keys_out_of_regions(make: Callable[[], Plan], width: int) -> None:
    plan = make()
    wider = plan.with_window(width)
    wider.check()
    for i in range(plan.n_q):
        near = {j for j in range(plan.n_k) if abs(i - j) <= width and not (plan.causal and j > i)}
        assert set(wider.direct[i].tolist()) == near | set(plan.direct[i].tolist())
        expected = []
        for keys in regions_of(plan, i):
            left = [j for j in keys if j not in near]
            if len(left) == len(keys):
                expected.append(keys)
            else:
                expected += [[j for j in left if j < i], [j for j in left if j > i]]
        assert regions_of(wider, i) == sorted(keys for keys in expected if keys)


@pytest.mark.parametrize("make", PLANS)
def test_regions_can_be_promoted(make: Callable[[], Plan], global_random_seed: int) -> None:
    plan = make()
    rng = np.random.default_rng(global_random_seed)
    chosen = rng.random(len(plan.row_regions.items)) < 0.4
    more, kept = plan.promote(chosen)
    more.check()
    assert len(more.regions) == len(kept)
    for new, old in enumerate(kept):
        assert np.array_equal(more.regions[new], plan.regions[old])
    everything, none = plan.promote(np.ones(len(chosen), bool))
    assert len(none) == 0
    assert everything.slots == sum(len(x) for x in plan.covered())


@pytest.mark.parametrize("make", PLANS)
def test_masked_keys_are_deleted_from_a_plan(
    make: Callable[[], Plan], global_random_seed: int
) -> None:
    plan = make()
    mask = np.random.default_rng(global_random_seed).random(plan.n_k) < 0.5
    less, kept = plan.keep(mask)
    assert less.regions.sizes.all()
    for i in range(plan.n_q):
        assert less.direct[i].tolist() == [j for j in plan.direct[i] if mask[j]]
        expected = [[j for j in keys if mask[j]] for keys in regions_of(plan, i)]
        assert regions_of(less, i) == sorted(keys for keys in expected if keys)
    for new, old in enumerate(kept):
        assert less.regions[new].tolist() == [j for j in plan.regions[old] if mask[j]]
    same, numbers = plan.keep(None)
    assert same.slots == plan.slots
    assert numbers.tolist() == list(range(len(plan.regions)))


# --- checks and refusals ------------------------------------------------------------------------


def test_a_key_that_is_missing_or_twice_is_reported() -> None:
    plan = make_plan("fixed", 8, block=2)
    keep = np.ones(len(plan.direct.items), bool)
    keep[plan.direct.starts[5]] = False
    broken = Plan(8, plan.direct.select(keep), plan.regions, plan.row_regions)
    text = (
        "a plan must cover each key that a row sees exactly once, got no key 4 in row 5; "
        "check direct, regions and row_regions"
    )
    with pytest.raises(ValueError, match=message(text)):
        broken.check()
    text = text.replace("no key 4 in row 5", "a key twice or unseen in row 0")
    with pytest.raises(ValueError, match=message(text)):
        Plan.from_lists(2, [[0, 1], [0]], [[1]], [[0], [0]])
    with pytest.raises(ValueError, match=message(text)):
        Plan.from_lists(2, [[0, 1], [0, 1]], [], [[], []], causal=True)


def test_the_published_sets_read_with_positions_from_one_do_not_cover() -> None:
    # Equation (10) with j in 1..L: regions {j : j div s = r} for r in {L div s}, row i = 4.
    length, s, i = 4, 2, 4
    direct = [j for j in range(1, i + 1) if j // s == i // s]
    regions = [[j for j in range(1, length + 1) if j // s == r] for r in (1,)]
    assert (direct, regions) == ([4], [[2, 3]])
    assert set(range(1, i + 1)) - set(direct) - set(regions[0]) == {1}


REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: make_plan("fixd", 4),
        ValueError,
        "pattern must be a known plan, got 'fixd'; did you mean 'fixed'?",
    ),
    (
        lambda: make_plan("fixed", 0),
        ValueError,
        "n must be a positive integer, got 0; a plan needs a position",
    ),
    (
        lambda: make_plan("fixed", 4, block=0),
        ValueError,
        "block must be at least 1, got 0; None is the default of the plan",
    ),
    (
        lambda: make_plan("fixed", 4, block=2.0),  # type: ignore[arg-type]  # the point
        TypeError,
        "block must be an integer, got float; it is the length of a span or the number of columns",
    ),
    (
        lambda: make_plan("logsparse", 9, block=3),
        ValueError,
        "block must be a power of two for pattern 'logsparse', whose leaves are dyadic, got 3; "
        "use 4",
    ),
    (
        lambda: make_plan("axial_vertical", 9, causal=True, split=True),
        ValueError,
        "split must be False for pattern 'axial_vertical' (causal), whose regions have one side, "
        "got True; use axial_horizontal",
    ),
    (
        lambda: make_plan("axial_joint", 9),
        ValueError,
        "causal must be True for pattern 'axial_joint', which is released for causal problems "
        "only, got False; use a mixture of 'axial_vertical' and 'axial_horizontal'",
    ),
    (
        lambda: label_plan(np.array([0, -1])),
        ValueError,
        "labels must be at least 0, got -1; count from 0",
    ),
    (
        lambda: label_plan(np.array([0.0, 1.0])),
        TypeError,
        "labels must be a one-dimensional integer array, got float64 of shape (2,); give the "
        "region of each position",
    ),
    (
        lambda: label_plan(np.array([0, 1]), n_q=3),
        ValueError,
        "row_labels must have shape (n_q,) = (3,), got (2,); label each row",
    ),
    (
        lambda: Plan.from_lists(2, [[0], [1]], [[]], [[], []]),
        ValueError,
        "regions must not be empty, got no key in region 0; drop it",
    ),
    (
        lambda: Plan.from_lists(2, [[0, 2]], [], [[]]),
        ValueError,
        "direct must hold integers in 0..1, got 0..2; count from 0",
    ),
    (
        lambda: Plan.from_lists(2, [[0, 1]], [], []),
        ValueError,
        "row_regions must have a list for each of the 1 rows, got 0; give empty lists where there "
        "is no region",
    ),
    (
        lambda: Plan.from_lists(2, [[0, 1]], [], [[]], causal=True),
        ValueError,
        "n_q and n_k must be equal in a causal plan, got 1 and 2; give a row for each position",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED)
def test_refusals(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=message(text)):
        call()


def test_ragged_lists() -> None:
    lists = Ragged.of([[3, 1], [], [2]])
    assert [x.tolist() for x in lists] == [[3, 1], [], [2]]
    assert lists[-1].tolist() == [2]
    with pytest.raises(IndexError):
        lists[3]
    assert [x.tolist() for x in lists.take(np.array([2, 0]))] == [[2], [3, 1]]
    assert lists.owner.tolist() == [0, 0, 2]
    assert [x.tolist() for x in lists.select(lists.items > 1)] == [[3], [], [2]]
    assert [x.tolist() for x in Ragged.ranges(np.array([0, 5]), np.array([2, 4]))] == [[0, 1], []]
    assert lists.nbytes == 8 * 7
