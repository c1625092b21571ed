"""Byte-pair merges learnt on a corpus on top of those that a tokenizer has (Sennrich et al. 2016, arXiv:1508.07909).

Training continues where the tokenizer's own ended: each word is cut as the tokenizer cuts it, then the most frequent
pair of neighbours becomes a token, again and again. A merge updates the counts of the words that it changes, no others.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

Pair = tuple[int, int]

LEAST_COUNT = 2  # a pair that occurs once says nothing about other texts


@dataclass(frozen=True)
class Merge:
    """A learnt merge: the ids of its two parts and of its result, and the tokens of the whole corpus after it.

    It is new if no earlier merge has made the same token from other parts.
    """

    left: int
    right: int
    result: int
    is_new: bool
    num_tokens: int


class MergeLearner:
    """Learns merges one by one; iterate for as many as are wanted.

    At any time `words` is how the tokenizer with the merges so far would cut each word: a merge can bring together two
    tokens that an earlier one joins, and these are joined at once, as in encoding.

    Args:
        word_counts: How often each word occurs, spelt as by the tokenizer's splitter.
        tokenize: Gives the ids of a word under the tokenizer as it is.
        token_ids: Of every token, added ones included; no pair is joined to one of these, whose row has its meaning.
        whole_words: Whether a word that is a token is never cut (`ignore_merges`, as in Llama 3's tokenizer).
    """

    def __init__(
        self,
        word_counts: Mapping[str, int],
        tokenize: Callable[[str], list[int]],
        token_ids: Mapping[str, int],
        first_id: int,
        *,
        whole_words: bool = False,
    ) -> None:
        self.counts = list(word_counts.values())
        self.words = [tokenize(word) for word in word_counts]
        self.num_tokens = sum(len(w) * n for w, n in zip(self.words, self.counts, strict=True))
        self._tokens = {i: token for token, i in token_ids.items()}
        self._taken = set(token_ids)
        self._new_ids: dict[str, int] = {}
        self._first_id = first_id
        self._index = {word: i for i, word in enumerate(word_counts)} if whole_words else {}
        self._ranks: dict[Pair, tuple[int, int]] = {}  # of the learnt merges: rank and resulting id
        self._pair_counts: dict[Pair, int] = defaultdict(int)
        self._places: dict[Pair, set[int]] = defaultdict(set)
        for i, word in enumerate(self.words):
            self._count(i, pairwise(word), self.counts[i])
        self._heap = [(-count, pair) for pair, count in self._pair_counts.items() if count >= LEAST_COUNT]
        heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[Merge]:
        """Merges in the order of their ranks, until no pair occurs twice."""
        while self._heap:
            negative, pair = heapq.heappop(self._heap)
            count = self._pair_counts.get(pair, 0)
            if count != -negative:  # the entry is older than some merge
                if count >= LEAST_COUNT:
                    heapq.heappush(self._heap, (-count, pair))
                continue
            token = self._tokens[pair[0]] + self._tokens[pair[1]]
            if token in self._taken:
                continue
            yield self._merge(pair, token)

    def _merge(self, pair: Pair, token: str) -> Merge:
        is_new = token not in self._new_ids
        result = self._new_ids.setdefault(token, self._first_id + len(self._new_ids))
        self._tokens[result] = token
        self._ranks[pair] = (len(self._ranks), result)
        changed: set[Pair] = set()
        for i in self._places.pop(pair, ()):
            self._join(i, changed)
        if is_new and token in self._index:
            self._keep_whole(self._index[token], result)
        for other in changed:
            if self._pair_counts[other] >= LEAST_COUNT:
                heapq.heappush(self._heap, (-self._pair_counts[other], other))
        return Merge(*pair, result, is_new, self.num_tokens)

    def _join(self, i: int, changed: set[Pair]) -> None:
        """Apply every learnt merge to a word: the lowest rank first, and the leftmost pair among equal ranks."""
        ids = [*self.words[i], -1]  # -1 at the end, and where a token has been joined to the one before it
        before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        pairs = enumerate(pairwise(self.words[i]))
        waiting = [(self._ranks[pair][0], place, pair) for place, pair in pairs if pair in self._ranks]
        heapq.heapify(waiting)
        while waiting:
            _, left, pair = heapq.heappop(waiting)
            right, left_one = after[left], before[left]
            if (ids[left], ids[right]) != pair:
                continue  # one of the two has been joined to another
            next_one = after[right]
            around = [(left_one, left), (left, right), (right, next_one)]
            self._count(i, [(ids[a], ids[b]) for a, b in around if a >= 0 and ids[b] >= 0], -self.counts[i])
            self.num_tokens -= self.counts[i]
            ids[left], ids[right] = self._ranks[pair][1], -1
            after[left], before[next_one] = next_one, left
            for a, b in ((left_one, left), (left, next_one)):
                if a >= 0 and ids[b] >= 0:
                    new = (ids[a], ids[b])
                    self._count(i, [new], self.counts[i])
                    changed.add(new)
                    if new in self._ranks:
                        heapq.heappush(waiting, (self._ranks[new][0], a, new))
        self.words[i] = [token for token in ids if token >= 0]

    def _keep_whole(self, i: int, token_id: int) -> None:
        self.num_tokens -= (len(self.words[i]) - 1) * self.counts[i]
        self._count(i, pairwise(self.words[i]), -self.counts[i])
        self.words[i] = [token_id]

    def _count(self, i: int, pairs: Iterable[Pair], count: int) -> None:
        for pair in pairs:
            self._pair_counts[pair] += count
            if count > 0:
                self._places[pair].add(i)
