"""Questions that hang on others, against the other way round: which of a question's ancestors was answered no."""

import itertools

from diffalign.ops.scene_graph import holding


def test_a_question_holds_where_all_it_hangs_on_was_answered_yes():
    parents = [[], [0], [0, 1], [], [3, 2]]
    above = [{0}, {0, 1}, {0, 1, 2}, {3}, {0, 1, 2, 3, 4}]  # each with all its ancestors, by hand
    for yes in itertools.product((False, True), repeat=5):
        assert holding(yes, parents) == [all(yes[k] for k in own) for own in above], yes


def test_a_parent_that_comes_later_counts_by_its_own_answer():
    assert holding([True, True, False], [[1], [2], []]) == [True, False, False]
