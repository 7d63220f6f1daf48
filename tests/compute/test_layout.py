"""As many processes as are offered and the work can be divided by."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.compute.layout import any_number, choose
from liaoyuan.errors import LiaoyuanError


def divides(rows: int):  # type: ignore[no-untyped-def]
    return lambda count: rows % count == 0


@given(st.lists(st.integers(1, 16), min_size=1, max_size=8), st.integers(1, 64))
def test_the_largest_legal_number_that_is_offered_runs(slots: list[int], rows: int) -> None:
    shares = choose(slots, 1, divides(rows))
    assert all(0 <= share <= slot for share, slot in zip(shares, slots, strict=True))
    assert sum(shares) == max(count for count in range(1, sum(slots) + 1) if rows % count == 0)


def test_hosts_are_filled_in_order() -> None:
    assert choose([4, 4, 4], 1, divides(8)) == [4, 4, 0]
    assert choose([4, 4], 8, any_number) == [4, 4]


def test_a_range_without_a_legal_number_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(LiaoyuanError, match="over 5 to 7 processes; 4 or 8 would do"):
        choose([7], 5, divides(8))
    with pytest.raises(LiaoyuanError, match="over 9 processes; 8 would do"):
        choose([9], 9, divides(8))
