import numpy as np
import pytest

from lichen_survey import POINTS, changed, check, cover, design_effect, shannon

NAMES = ("Caloplaca", "Verrucaria", "Ramalina")


@pytest.fixture
def rng():
    return np.random.default_rng(1887)


@pytest.fixture
def shore():
    """Six transects of four quadrats. Ramalina grows on two of the transects only."""
    a = np.zeros((6, 4, 3), dtype=int)
    a[:, :, 0] = 16
    a[:, :, 1] = [[8, 9, 7, 8]] * 6
    a[1, :, 2] = 30
    a[4, :, 2] = 24
    return a


def test_mean_is_the_plain_mean(shore, rng):
    c = cover(shore, NAMES, rng=rng)
    assert c.mean == pytest.approx([0.25, 0.125, 54 / 6 / POINTS])


def test_constant_species_has_no_interval(shore, rng):
    c = cover(shore, NAMES, rng=rng)
    assert c.low[0] == c.high[0] == 0.25


def test_clumped_species_has_a_wide_one(shore, rng):
    c = cover(shore, NAMES, rng=rng)
    assert c.low[2] == 0.0
    assert c.high[2] > 0.25


def test_table_is_sorted_by_cover(shore, rng):
    lines = str(cover(shore, NAMES, rng=rng)).splitlines()
    assert [l.split()[0] for l in lines] == ["Caloplaca", "Ramalina", "Verrucaria"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda a: a[0], "2 dimensions"),
        (lambda a: a - 1, "negative"),
        (lambda a: a * 2, "transect 1, quadrat 0: 108 points"),
    ],
    ids=["flat", "negative", "overfull"],
)
def test_bad_sheets_are_refused(shore, spoil, message):
    with pytest.raises(ValueError, match=message):
        check(spoil(shore))


def test_design_effect_of_independent_points_is_near_one(rng):
    a = rng.binomial(POINTS, 0.3, size=(4000, 5, 1))
    assert design_effect(a)[0] == pytest.approx(1.0, abs=0.1)


def test_design_effect_knows_nothing_about_absent_species(shore):
    shore[:, :, 2] = 0
    assert np.isnan(design_effect(shore)[2])


def test_diversity_of_equal_shares_is_log_of_their_number():
    a = np.full((1, 3, 4), 5)
    assert shannon(a) == pytest.approx([np.log(4)])


def test_bare_rock_has_no_diversity():
    assert shannon(np.zeros((2, 3, 4), dtype=int)).tolist() == [0.0, 0.0]


class TestChanged:
    def test_same_survey_twice(self, shore):
        assert changed(shore, shore).tolist() == [1.0, 1.0, 1.0]

    def test_exact_when_few_transects(self, shore):
        later = shore.copy()
        later[:, :, 0] += 4
        p = changed(shore, later)
        assert p[0] == 2 / 2**6  # all six up, or all six down
        assert p[1] == 1.0

    def test_transects_must_be_the_same(self, shore):
        with pytest.raises(ValueError, match="same transects"):
            changed(shore, shore[:5])
