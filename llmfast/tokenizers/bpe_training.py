"""Learning the merges of byte-pair encoding: join the most frequent pair of neighbouring tokens, again and again.

Twice: `learn_merges` is the algorithm to read; `learn_merges_with_library` runs it in the `tokenizers` library, which
is written in Rust and uses every core. They give the same merges. Both count a pair by its occurrences in the distinct
chunks times how often each chunk occurs, and of pairs with equal counts both join the one with the smaller ids first,
where the ids are bytes in GPT-2's order and then merges in theirs; neither side had to be bent to the other.
(Characters newer than one side's Unicode tables can be split otherwise; see `splitting`.)
"""

from __future__ import annotations

import heapq
import importlib.util
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from llmfast.tokenizers.byte_letters import BYTES, unprintable
from llmfast.tokenizers.splitting import split_pattern

Pair = tuple[int, int]
Merge = tuple[bytes, bytes]
OnMerge = Callable[[int, Merge, int], None]  # is told the step, the pair and its count


def learn_merges(chunks: Iterable[tuple[bytes, int]], num_merges: int, on_merge: OnMerge | None = None) -> list[Merge]:
    """The `num_merges` most frequent pairs, in the order in which they are joined (Sennrich et al., 2016).

    `chunks` are the distinct chunks of the corpus with their counts. Each is walked once; afterwards a merge touches
    only the chunks that contain its pair. Of pairs with equal counts the one with the smaller token ids goes first.
    `on_merge(step, pair, count)` sees every merge as it happens.
    """
    pieces = list(BYTES)  # id -> the bytes it stands for
    ids = {piece: i for i, piece in enumerate(pieces)}
    words, counts = [], []
    for chunk, count in chunks:
        words.append([ids[bytes([byte])] for byte in chunk])
        counts.append(count)

    pair_counts: Counter[Pair] = Counter()
    pair_words: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pair_counts[pair] += counts[index]
            pair_words[pair].add(index)
    # A heap with outdated entries: an entry counts only if its count is still the pair's.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    merges: list[Merge] = []
    while heap and len(merges) < num_merges:
        negative_count, pair = heapq.heappop(heap)
        if pair_counts[pair] != -negative_count or negative_count == 0:
            continue
        left, right = pieces[pair[0]], pieces[pair[1]]
        if on_merge is not None:
            on_merge(len(merges), (left, right), -negative_count)
        merges.append((left, right))
        token = len(pieces)  # no two merges spell the same bytes: the first would have joined the second's
        pieces.append(left + right)

        changed: set[Pair] = set()
        for index in pair_words.pop(pair):
            word, count = words[index], counts[index]
            merged = join(word, pair, token)
            for old in zip(word, word[1:], strict=False):
                pair_counts[old] -= count
                changed.add(old)
            for new in zip(merged, merged[1:], strict=False):
                pair_counts[new] += count
                pair_words[new].add(index)
                changed.add(new)
            words[index] = merged
        for pair in changed:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            else:
                del pair_counts[pair]
    return merges


def join(word: list[int], pair: Pair, token: int) -> list[int]:
    """`word` with every `pair`, from the left, replaced by `token`."""
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            merged.append(token)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def has_library() -> bool:
    return importlib.util.find_spec("tokenizers") is not None


def learn_merges_with_library(
    texts: Iterable[str], num_merges: int, split: str = "gpt2", show_progress: bool = False
) -> list[Merge]:
    """The same merges from the `tokenizers` library; `show_progress` draws its bars on stderr.

    The texts are a stream: what is kept of them is their distinct chunks with their counts.
    """
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            'the trainer "tokenizers" needs the library of this name: pip install "llmfast-kernels[train]"; '
            'or choose the trainer "python"'
        ) from None
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split_pattern(split)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(BYTES) + num_merges,
        min_frequency=0,
        show_progress=show_progress,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # sorted by code point, which is GPT-2's order of bytes
    )
    library.train_from_iterator(texts, trainer)
    pairs = json.loads(library.to_str())["model"]["merges"]
    return [(unprintable(left), unprintable(right)) for left, right in pairs]
