"""The choice among candidates: the few that are likely, and those that must be, by their losses."""

from hf_compress.methods.base.choice import cheapest

LOSSES = {1: 5.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 0.5}
ESTIMATES = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}


def chosen(**options):
    asked = []

    def losses(some):
        asked.append(list(some))
        return {index: LOSSES[index] for index in some}

    best, found = cheapest([1, 2, 3, 4, 5], ESTIMATES, losses, **options)
    assert asked == [sorted(found)]
    return best, found


def test_the_likely_ones_are_tried_and_the_best_of_them_is_taken():
    assert chosen(tried=3) == (2, {1: 5.0, 2: 1.0, 3: 2.0})
    assert chosen(tried=1) == (1, {1: 5.0})


def test_what_must_be_tried_is_tried_besides():
    assert chosen(tried=2, always=[5, 9]) == (5, {1: 5.0, 2: 1.0, 5: 0.5})


def test_all_are_tried_where_they_are_few():
    assert chosen(tried=9) == (5, LOSSES)
