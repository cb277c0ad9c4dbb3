"""Learning a WordPiece vocabulary: join the pair whose parts would otherwise least expect each other.

Where byte-pair encoding joins the most frequent pair, WordPiece (Schuster & Nakajima, 2012) asks what a join explains:

    score(a, b) = f(ab) / (f(a) · f(b))

with f the number of times that a pair or a token occurs. "h" + "##e" is frequent, but so are its parts; "##q" + "##u"
is joined sooner, because hardly a q stands without a u.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from llmfast.tokenizers.bpe_training import Pair, join

CONTINUATION = "##"
OnMerge = Callable[[int, tuple[str, str], float], None]  # is told the step, the pair and its score


def learn_tokens(
    words: Mapping[str, int],
    alphabet: list[str],
    num_tokens: int,
    min_count: int | None = None,
    on_merge: OnMerge | None = None,
) -> list[str]:
    """The `num_tokens` tokens that are joined first, in their order.

    `words` are the distinct words with their counts; one with a character that `alphabet` lacks (where every character
    stands as it is and, after a word's start, with `##`) is left out. Of pairs with equal scores the one with the
    smaller ids goes first, which are places in the alphabet, and then in the result.

    The score alone prefers what is rare: a pair of letters that occur once, together, has the highest there is. So a
    pair must occur `min_count` times to be joined. By default that is half as often as the most frequent pair, and half
    as often again whenever nothing is left to join, down to 2.
    """
    tokens = list(alphabet)
    ids = {token: i for i, token in enumerate(tokens)}
    spelled, counts = [], []
    for text, count in words.items():
        letters = [text[:1], *(CONTINUATION + letter for letter in text[1:])]
        if all(letter in ids for letter in letters):
            spelled.append([ids[letter] for letter in letters])
            counts.append(count)

    token_counts: Counter[int] = Counter()
    pair_counts: Counter[Pair] = Counter()
    pair_words: defaultdict[Pair, set[int]] = defaultdict(set)
    partners: defaultdict[int, set[Pair]] = defaultdict(set)  # the pairs that a token is part of
    for index, word in enumerate(spelled):
        for token in word:
            token_counts[token] += counts[index]
        for pair in zip(word, word[1:], strict=False):
            pair_counts[pair] += counts[index]
            pair_words[pair].add(index)
            partners[pair[0]].add(pair)
            partners[pair[1]].add(pair)

    def score(pair: Pair) -> float:
        # Dividing integers rounds once, so that equal scores are equal numbers.
        return pair_counts[pair] / (token_counts[pair[0]] * token_counts[pair[1]])

    learned: list[str] = []
    for least in _halves(max(pair_counts.values(), default=0)) if min_count is None else [min_count]:
        # A heap with outdated entries: an entry counts only if its score is still the pair's.
        heap = [(-score(pair), pair) for pair, count in pair_counts.items() if count >= least]
        heapq.heapify(heap)
        while heap and len(learned) < num_tokens:
            negative_score, pair = heapq.heappop(heap)
            if pair_counts[pair] < least or score(pair) != -negative_score:
                continue
            left, right = tokens[pair[0]], tokens[pair[1]]
            if on_merge is not None:
                on_merge(len(learned), (left, right), -negative_score)
            token = len(tokens)
            tokens.append(left + right.removeprefix(CONTINUATION))
            learned.append(tokens[token])

            changed: set[Pair] = set()
            for index in pair_words.pop(pair):
                word, count = spelled[index], counts[index]
                merged = join(word, pair, token)
                joined = len(word) - len(merged)
                token_counts[token] += joined * count
                for part in pair:
                    token_counts[part] -= joined * count
                for old in zip(word, word[1:], strict=False):
                    pair_counts[old] -= count
                    changed.add(old)
                for new in zip(merged, merged[1:], strict=False):
                    pair_counts[new] += count
                    pair_words[new].add(index)
                    partners[new[0]].add(new)
                    partners[new[1]].add(new)
                    changed.add(new)
                spelled[index] = merged
            # The parts of the pair have become rarer, so that their other pairs' scores have changed as well.
            for other in changed | partners[pair[0]] | partners[pair[1]]:
                if pair_counts[other] >= least:
                    heapq.heappush(heap, (-score(other), other))
                elif pair_counts[other] == 0:
                    del pair_counts[other]
                    partners[other[0]].discard(other)
                    partners[other[1]].discard(other)
    return learned


def _halves(count: int) -> list[int]:
    """A half, a quarter, … of a count, down to 2."""
    return [count >> shift for shift in range(1, count.bit_length()) if count >> shift >= 2]
