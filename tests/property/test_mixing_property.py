"""A mixture: each source has its share wherever the stream is cut, and the order follows from shares and seed alone."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import islice, pairwise

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from cartilha.blocks.mixing import NEVER, MixedDocuments, MixtureSampler, Rate
from cartilha.blocks.sampler import BlockSampler, epoch_order
from cartilha.tokens.packed import PackedDocuments

Lengths = list[list[int]]


def mixed(lengths: Lengths, first: list[int], last: list[int] | None = None, turn: int = NEVER) -> MixedDocuments:
    """Sources with documents of these lengths; the token ids of source i are all 10 + i."""
    parts = [
        PackedDocuments.from_ids([np.full(n, 10 + i, np.uint16) for n in source], prefix_id=1, end_id=2)
        for i, source in enumerate(lengths)
    ]
    begins = np.cumsum([0, *map(len, lengths)])
    members = tuple(np.arange(begin, past) for begin, past in pairwise(begins))
    shares = [[Fraction(number, sum(numbers)) for number in numbers] for numbers in (first, last or first)]
    rates = tuple(Rate(*pair, turn) for pair in zip(*shares, strict=True))
    return MixedDocuments(PackedDocuments.joined(parts), members, rates)


@st.composite
def mixtures(draw) -> MixedDocuments:
    size = draw(st.integers(1, 6))
    source = st.lists(st.integers(0, 3) | st.integers(0, 60), min_size=1, max_size=8)
    lengths = draw(st.lists(source, min_size=size, max_size=size))
    weights = st.lists(st.integers(1, 100), min_size=size, max_size=size)
    later = st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any)
    return mixed(lengths, draw(weights), draw(st.none() | later), draw(st.integers(0, 600)))


# A source that only the second part reads, one that it no longer reads, and one document longer than all that precedes.
TURN = mixed([[3, 5, 2], [4, 4], [200, 1]], [9, 1, 0], [0, 1, 9], 150)


@given(mixtures(), st.integers(0, 2**63 - 1))
@example(TURN, 0)
@example(mixed([[1]] * 12, [50, *[5] * 11]), 0)  # by deadline alone the first source would be five documents ahead
def test_no_source_is_further_than_a_document_from_its_share_wherever_the_stream_is_cut(mixture, seed):
    longest_of_all = max(mixture.documents.num_tokens) + 2
    taken, position = [0] * len(mixture.rates), 0
    for document, source, length in islice(mixture.order(seed), 200):
        assert document in mixture.members[source] and length == mixture.documents.num_tokens[document] + 2
        taken[source] += length
        position += length
        for members, rate, had in zip(mixture.members, mixture.rates, taken, strict=True):
            ahead = had - rate.due(position)
            assert -longest_of_all <= ahead <= max(mixture.documents.num_tokens[members]) + 2


@given(mixtures(), st.integers(0, 2**63 - 1))
@example(TURN, 0)
def test_a_source_is_read_whole_before_it_begins_again(mixture, seed):
    read = [[] for _ in mixture.members]
    for document, source, _ in islice(mixture.order(seed), 200):
        read[source].append(document)
    for number, (members, documents) in enumerate(zip(mixture.members, read, strict=True)):
        for begin in range(0, len(documents) - len(members) + 1, len(members)):
            assert sorted(documents[begin : begin + len(members)]) == members.tolist()
        if number == 0 and len(documents) >= len(members):
            assert documents[: len(members)] == members[epoch_order(len(members), seed, 0)].tolist()


@given(mixtures(), st.integers(1, 5), st.lists(st.integers(0, 30), min_size=1, max_size=5))
@example(TURN, 3, [9, 2])
def test_a_step_and_what_was_read_before_it_are_the_same_whatever_was_asked_before(mixture, blocks_per_step, steps):
    used = MixtureSampler(mixture, block_size=7, blocks_per_step=blocks_per_step, seed=1)
    for step in steps:
        fresh = MixtureSampler(mixture, block_size=7, blocks_per_step=blocks_per_step, seed=1)
        assert [b.input_ids.tolist() for b in used.blocks(step)] == [b.input_ids.tolist() for b in fresh.blocks(step)]
        assert used.num_targets(step) == fresh.num_targets(step)
        for ours, theirs in zip(used.read_until(step), fresh.read_until(step), strict=True):
            assert ours.tolist() == theirs.tolist()


@given(mixtures(), st.integers(1, 5), st.integers(0, 30))
@example(TURN, 3, 12)
def test_what_is_counted_as_read_is_what_the_blocks_hold(mixture, blocks_per_step, num_steps):
    sampler = MixtureSampler(mixture, block_size=7, blocks_per_step=blocks_per_step, seed=5)
    ids = Counter(int(i) for step in range(num_steps) for block in sampler.blocks(step) for i in block.input_ids)
    documents, tokens = sampler.read_until(num_steps)
    assert tokens.sum() == num_steps * sampler.tokens_per_step == ids.total()
    assert documents.sum() == ids[1]
    num_text = [ids[10 + source] for source in range(len(mixture.members))]
    for text, begun, read in zip(num_text, documents, tokens, strict=True):
        assert 2 * begun - 1 <= read - text <= 2 * begun or begun == 0 == read


@given(st.lists(st.integers(0, 30), min_size=1, max_size=10), st.integers(1, 4), st.integers(0, 99))
def test_a_mixture_of_one_source_is_that_source_as_it_is_read_alone(lengths, blocks_per_step, seed):
    mixture = mixed([lengths], [1])
    alone = BlockSampler(mixture.documents, block_size=8, blocks_per_step=blocks_per_step, seed=seed)
    ours = MixtureSampler(mixture, block_size=8, blocks_per_step=blocks_per_step, seed=seed)
    assert ours.steps_per_epoch - alone.steps_per_epoch in (0, 1)  # without one the last end token is not an input
    whole = (alone.blocks_per_epoch - 1) // blocks_per_step  # steps without the block that is padded
    for step in range(whole):
        for one, other in zip(ours.blocks(step), alone.blocks(step), strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist() and one.targets.tolist() == other.targets.tolist()


def test_a_source_begins_again_in_another_order_and_sources_of_one_size_have_orders_of_their_own():
    mixture = mixed([[1] * 20, [1] * 20], [1, 1])
    first, second = ([d for d, s, _ in islice(mixture.order(4), 80) if s == source] for source in (0, 1))
    orders = [first[:20], first[20:], [d - 20 for d in second[:20]], [d - 20 for d in second[20:]]]
    assert len(set(map(tuple, orders))) == 4


def test_an_epoch_reads_the_first_source_once():
    mixture = mixed([[8] * 90, [8] * 5], [9, 1])
    sampler = MixtureSampler(mixture, block_size=10, blocks_per_step=4, seed=0)
    assert sampler.steps_per_epoch == 25  # 900 tokens are nine tenths of 1,000, and a step has 40
    documents, tokens = sampler.read_until(25)
    assert documents.tolist() == [90, 10] and tokens.tolist() == [900, 100]  # the second is read twice
