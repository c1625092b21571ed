"""Continued byte-pair merges: the peer's training where there is nothing to continue, plain recounting elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cartilha.corpus.primer import primer_texts
from cartilha.tokens.merges import MergeLearner

LETTERS = {letter: i for i, letter in enumerate("abcd")}


def learner(words: Counter[str], *, taken: tuple[str, ...] = (), whole_words: bool = False) -> MergeLearner:
    """Over letters, with ids of their own for `taken` tokens, which no word is cut into."""
    ids = {**LETTERS, **{token: 100 + i for i, token in enumerate(taken)}}
    return MergeLearner(words, lambda word: [LETTERS[c] for c in word], ids, 10, whole_words=whole_words)


def encode(word: str, merges: list[tuple[int, int, int]]) -> list[int]:
    """BPE by its definition: the merge of the lowest rank, the leftmost, until none applies."""
    ids = [LETTERS[letter] for letter in word]
    ranks = {(left, right): (rank, result) for rank, (left, right, result) in enumerate(merges)}
    while found := [(*ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]:
        _, result, place = min(found, key=lambda one: (one[0], one[2]))
        ids[place : place + 2] = [result]
    return ids


@settings(max_examples=150)
@given(st.dictionaries(st.text("abcd", min_size=1, max_size=9), st.integers(1, 9), min_size=1, max_size=12))
def test_every_merge_is_of_the_most_frequent_pair_and_words_stay_as_encoding_makes_them(word_counts):
    one = learner(Counter(word_counts))
    merges: list[tuple[int, int, int]] = []
    for merge in one:
        before = {word: encode(word, merges) for word in word_counts}
        pairs = Counter[tuple[int, int]]()
        for word, count in word_counts.items():
            for pair in pairwise(before[word]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        assert (merge.left, merge.right) == best and pairs[best] >= 2
        merges.append((merge.left, merge.right, merge.result))
        after = [encode(word, merges) for word in word_counts]
        assert one.words == after
        assert merge.num_tokens == sum(len(w) * n for w, n in zip(after, word_counts.values(), strict=True))
    # Nothing that occurs twice is left over.
    left = Counter[tuple[int, int]]()
    for word, count in word_counts.items():
        left.update({pair: count for pair in pairwise(encode(word, merges))})
    assert all(count < 2 for count in left.values())


def test_from_bytes_on_it_learns_what_the_tokenizers_library_learns():
    texts = [text.text for text in primer_texts()[:40]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=256 + 800, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    peer.train_from_iterator(texts, trainer)
    expected = [tuple(merge) for merge in json.loads(peer.to_str())["model"]["merges"]]
    assert len(expected) >= 800

    words = Counter(word for text in texts for word, _ in peer.pre_tokenizer.pre_tokenize_str(text))
    ids = {character: i for i, character in enumerate(alphabet)}
    names = dict(enumerate(alphabet))
    found = []
    for merge in MergeLearner(words, lambda word: [ids[c] for c in word], ids, 256):
        names[merge.result] = names[merge.left] + names[merge.right]
        found.append((names[merge.left], names[merge.right]))
        if len(found) == len(expected):
            break
    assert found == expected


def test_a_long_word_costs_no_more_than_its_length_a_merge():
    class Counted(dict):
        lookups = 0

        def __contains__(self, key: object) -> bool:
            Counted.lookups += 1
            return super().__contains__(key)

    one = learner(Counter({"a" * 4096: 1}))
    one._ranks = Counted()
    merges = [merge for merge, _ in zip(one, range(8), strict=False)]
    assert [merge.num_tokens for merge in merges] == [2048 >> i for i in range(8)]
    assert Counted.lookups < 4 * 4096 * len(merges)  # looked through anew after each join, 4096 * 4096


def test_a_pair_whose_text_is_a_token_already_is_left_alone():
    words = Counter({"abc": 5, "abd": 3})
    assert next(iter(learner(words))).left == LETTERS["a"]  # the pair ab, eight times
    names = {i: letter for letter, i in LETTERS.items()}
    made = []
    for merge in learner(words, taken=("ab",)):
        names[merge.result] = names[merge.left] + names[merge.right]
        made.append(names[merge.result])
    assert made and "ab" not in made


def test_two_ways_to_one_token_share_its_id():
    # ab and bc both arise, and abc is reached from either.
    one = learner(Counter({"ab": 9, "bc": 8, "abc": 7, "dbc": 6, "adbc": 2, "abcd": 2}))
    merges = list(one)
    results = Counter(merge.result for merge in merges)
    assert len({merge.result for merge in merges if merge.is_new}) == len(results)
    assert sum(merge.is_new for merge in merges) == len(results)


@pytest.mark.parametrize("whole_words", [False, True])
def test_where_whole_words_are_never_cut_a_new_token_that_is_a_word_replaces_it(whole_words):
    # dab is cut d|ab once ab is joined; the merges make "abab" of other words, and the word "abab" is then one token.
    words = Counter({"abab": 3, "ab": 9, "cababd": 2})
    one = learner(words, whole_words=whole_words)
    list(one)
    made = dict(zip(words, one.words, strict=True))
    assert len(made["abab"]) == 1 and len(made["ab"]) == 1
