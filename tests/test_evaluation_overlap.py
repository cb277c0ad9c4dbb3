"""ROUGE-L and exact match, by hand and against the definition."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.evaluation.overlap import exact_match, longest_common_subsequence, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin's own example, S2 against S1
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("a b c", "x y", 0.0),
        ("a b", "a b c d", 2 * 1 * 0.5 / 1.5),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_rouge_l_is_that_of_its_paper(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)
    assert exact_match(answer, reference) == (expected == 1.0)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_the_common_subsequence_is_the_longest(first, second):
    def all_of(words):
        return {c for n in range(len(words) + 1) for c in itertools.combinations(words, n)}

    assert longest_common_subsequence(first, second) == max(map(len, all_of(first) & all_of(second)))
