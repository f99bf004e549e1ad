import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_lit.plan.largest import largest


@given(
    fixed=st.floats(0, 900),
    each=st.floats(0.01, 200),
    bend=st.floats(0, 1),
    start=st.integers(1, 4096),
    unit=st.sampled_from([1, 64]),
)
def test_what_it_finds_fits_and_3_percent_more_does_not(fixed, each, bend, start, unit):
    def needed(size):
        return fixed + each * size ** (1 + bend / 4)

    found = largest(needed, start, 2 * start, 1000, unit)
    if found is None:
        assert needed(unit) > 1000
        return
    assert found % unit == 0
    assert needed(found) <= 1000
    assert needed(found + max(unit, int(0.03 * found))) > 1000


@pytest.mark.parametrize(("start", "at_most"), [(4, 4), (64, 3), (1000, 7)])
def test_a_line_is_followed_in_few_steps(start, at_most):
    asked = []
    assert largest(lambda size: asked.append(size) or 100 + 7 * size, start, 2 * start, 1000) == pytest.approx(
        128, rel=0.03
    )
    assert len(asked) <= at_most
