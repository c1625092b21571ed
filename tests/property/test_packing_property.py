"""Packing of any documents: all is a target once, nothing crosses documents, only the end is padded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cartilha.blocks.packing import IGNORE_INDEX, Block, PackedStream, stack
from cartilha.blocks.sampler import BlockSampler, epoch_order
from cartilha.tokens.packed import PackedDocuments

FIRST_TEXT_ID = 10  # prefix and end lie below, so that each text token is known by its id


@dataclass(frozen=True)
class Corpus:
    """Documents whose tokens are all different, in an order, to be packed."""

    lengths: tuple[int, ...]
    order: tuple[int, ...]
    prefix_id: int
    end_id: int
    block_size: int

    @property
    def texts(self) -> list[np.ndarray]:
        tokens = np.arange(FIRST_TEXT_ID, FIRST_TEXT_ID + sum(self.lengths), dtype=np.uint16)
        return np.split(tokens, np.cumsum(self.lengths)[:-1]) if self.lengths else []

    @property
    def spans(self) -> PackedDocuments:
        return PackedDocuments.from_ids(self.texts, self.prefix_id, self.end_id)

    @property
    def packed(self) -> PackedStream:
        return PackedStream(self.spans, self.block_size, np.array(self.order, np.int64))

    @property
    def documents(self) -> list[list[int]]:
        """`[prefix] tokens [end]` of each document, in the order: what packing must do, in three lines."""
        return [[self.prefix_id, *self.texts[i].tolist(), self.end_id] for i in self.order]

    def sampler(self, blocks_per_step: int, seed: int) -> BlockSampler:
        return BlockSampler(self.spans, block_size=self.block_size, blocks_per_step=blocks_per_step, seed=seed)


@st.composite
def corpora(draw, min_documents: int = 0) -> Corpus:
    lengths = draw(st.lists(st.integers(0, 6) | st.integers(0, 40), min_size=min_documents, max_size=10))
    order = draw(st.permutations(range(len(lengths))))
    ids = draw(st.tuples(st.integers(0, FIRST_TEXT_ID - 1), st.integers(0, FIRST_TEXT_ID - 1)))
    prefix_id, end_id = draw(st.sampled_from([ids, (ids[0], ids[0])]))
    return Corpus(tuple(lengths), tuple(order), prefix_id, end_id, draw(st.integers(1, 9) | st.integers(1, 120)))


# One document a block's end cuts, an empty one, one that fits exactly, one of many blocks; equal prefix and end.
CUT = Corpus((3, 0, 2, 40), (0, 1, 2, 3), prefix_id=2, end_id=2, block_size=4)
EMPTY_DOCUMENTS = Corpus((0, 0, 0), (2, 0, 1), prefix_id=0, end_id=1, block_size=1)
NOTHING = Corpus((), (), prefix_id=0, end_id=1, block_size=8)


def blocks_of(stream: PackedStream) -> list[Block]:
    return [stream.block(i) for i in range(len(stream))]


def joined(blocks: list[Block], name: str) -> list[int]:
    return [int(value) for block in blocks for value in getattr(block, name)]


@given(corpora())
@example(CUT)
@example(EMPTY_DOCUMENTS)
@example(NOTHING)
def test_inputs_are_the_stream_and_only_the_last_block_is_padded(corpus):
    stream = corpus.packed
    inputs = [token for document in corpus.documents for token in document][:-1]
    padding = -len(inputs) % corpus.block_size
    blocks = blocks_of(stream)
    for name in ("input_ids", "targets", "position_ids"):
        assert all(getattr(block, name).shape == (corpus.block_size,) for block in blocks)
        assert all(getattr(block, name).dtype == np.int64 for block in blocks)
    assert stream.num_inputs == len(inputs)
    assert joined(blocks, "input_ids") == inputs + [corpus.end_id] * padding  # less than a block, so all in the last
    assert len(blocks) == (len(inputs) + padding) // corpus.block_size
    assert stream.padding_share == (padding / (len(inputs) + padding) if inputs else 0)
    if padding:
        assert set(blocks[-1].targets[-padding:]) == {IGNORE_INDEX}


@given(corpora())
@example(CUT)
@example(EMPTY_DOCUMENTS)
def test_each_target_is_the_next_token_of_the_same_document(corpus):
    # The target of an end token is IGNORE_INDEX: what comes next is another document's prefix.
    expected = [target for document in corpus.documents for target in [*document[1:], IGNORE_INDEX]][:-1]
    expected += [IGNORE_INDEX] * (-len(expected) % corpus.block_size)
    assert joined(blocks_of(corpus.packed), "targets") == expected


@given(corpora())
@example(CUT)
@example(EMPTY_DOCUMENTS)
@example(NOTHING)
def test_every_text_token_and_every_end_is_a_target_once_and_a_prefix_never(corpus):
    counts = Counter(joined(blocks_of(corpus.packed), "targets"))
    counts.pop(IGNORE_INDEX, None)
    # Text tokens are all different. Where prefix and end are equal, the count of ends leaves no room for a prefix.
    expected = Counter(range(FIRST_TEXT_ID, FIRST_TEXT_ID + sum(corpus.lengths)))
    expected[corpus.end_id] = len(corpus.lengths)
    assert counts == +expected
    assert corpus.packed.num_targets == counts.total()


@given(corpora(min_documents=1))
@example(CUT)
@example(EMPTY_DOCUMENTS)
def test_segments_are_the_pieces_of_documents_and_positions_restart_in_each(corpus):
    blocks = blocks_of(corpus.packed)
    for block in blocks:
        assert block.segment_lengths.min() >= 1 and block.segment_lengths.sum() == corpus.block_size
        assert block.position_ids.tolist() == [i for length in block.segment_lengths for i in range(length)]
    begins = np.cumsum([0, *joined(blocks, "segment_lengths")])[:-1]
    document_begins = np.cumsum([0, *map(len, corpus.documents)])[:-1]
    block_begins = np.arange(len(blocks)) * corpus.block_size
    padding_begins = [corpus.packed.num_inputs] if corpus.packed.padding_share else []
    assert begins.tolist() == sorted({*document_begins, *block_begins, *padding_begins})


@given(corpora())
@example(Corpus((7, 5), (0, 1), prefix_id=2, end_id=3, block_size=8))  # the first block holds all but the end token
@example(CUT)
@example(EMPTY_DOCUMENTS)
@example(NOTHING)
def test_pieces_are_the_segments_and_each_document_begins_and_ends_in_one_of_them(corpus):
    stream = corpus.packed
    segments = [segment for number in range(len(stream)) for segment in stream.segments(number)]
    lengths = [length for block in blocks_of(stream) for length in block.segment_lengths]
    assert [segment.end - segment.begin for segment in segments] == lengths
    of_documents = [segment for segment in segments if segment.document is not None]
    documents = list(range(len(corpus.lengths)))
    inputs = [corpus.lengths[i] + 2 for i in corpus.order]
    if documents:
        inputs[-1] -= 1  # the last end token is a target only
    for number in documents:
        own = [segment for segment in of_documents if segment.document == number]
        assert sum(segment.end - segment.begin for segment in own) == inputs[number]
        assert [segment.begins for segment in own] == [True] + [False] * (len(own) - 1)
        assert [segment.ends for segment in own] == [False] * (len(own) - 1) + [True]
        assert [segment.has_end_token for segment in own] == [p.ends and number != documents[-1] for p in own]
    assert of_documents == segments[: len(of_documents)]
    assert len(segments) - len(of_documents) == bool(stream.padding_share)


def test_not_vacuous_a_document_that_is_cut_goes_on_from_position_0():
    # 2 10 11 12 | 2e 2 2e 2 | 13 14 2e 2 | 15 ... where 2e is an end and 2 a prefix
    blocks = blocks_of(CUT.packed)[:4]
    assert joined(blocks, "input_ids") == [2, 10, 11, 12, 2, 2, 2, 2, 13, 14, 2, 2, 15, 16, 17, 18]
    no = IGNORE_INDEX
    assert joined(blocks, "targets") == [10, 11, 12, 2, no, 2, no, 13, 14, 2, no, 15, 16, 17, 18, 19]
    assert joined(blocks, "position_ids") == [0, 1, 2, 3, 0, 0, 1, 0, 0, 1, 2, 0, 0, 1, 2, 3]
    assert [block.segment_lengths.tolist() for block in blocks] == [[4], [1, 2, 1], [3, 1], [4]]


@given(st.integers(0, 60), st.integers(-(2**63), 2**63), st.integers(0, 1000))
def test_an_epochs_order_has_each_document_once_and_is_drawn_from_seed_and_epoch_alone(num_documents, seed, epoch):
    order = epoch_order(num_documents, seed, epoch)
    assert sorted(order) == list(range(num_documents))
    np.random.default_rng().random()
    assert order.tolist() == epoch_order(num_documents, seed, epoch).tolist()
    assume(num_documents >= 15)  # 15! orders: two equal ones would be no chance
    assert order.tolist() != epoch_order(num_documents, seed, epoch + 1).tolist()
    assert order.tolist() != epoch_order(num_documents, seed + 1, epoch).tolist()


@given(corpora(min_documents=1), st.integers(1, 5), st.integers(0, 2**32), st.integers(0, 3))
@example(CUT, 2, 0, 1)
def test_the_steps_of_an_epoch_cover_its_blocks_once_in_order(corpus, blocks_per_step, seed, epoch):
    sampler = corpus.sampler(blocks_per_step, seed)
    steps = [sampler.position(epoch * sampler.steps_per_epoch + i) for i in range(sampler.steps_per_epoch)]
    assert {step.epoch for step in steps} == {epoch}
    covered = [step.first_block + i for step in steps for i in range(step.num_blocks)]
    assert covered == list(range(len(sampler.stream(epoch)))) == list(range(sampler.blocks_per_epoch))
    assert {step.num_blocks for step in steps[:-1]} <= {blocks_per_step}
    assert 1 <= steps[-1].num_blocks <= blocks_per_step
    order = tuple(epoch_order(len(corpus.lengths), seed, epoch).tolist())
    expected = Corpus(corpus.lengths, order, corpus.prefix_id, corpus.end_id, corpus.block_size).packed
    first = epoch * sampler.steps_per_epoch
    blocks = [block for i in range(sampler.steps_per_epoch) for block in sampler.blocks(first + i)]
    assert [b.input_ids.tolist() for b in blocks] == [b.input_ids.tolist() for b in blocks_of(expected)]
    assert stack(blocks).num_targets == sampler.targets_per_epoch


@given(corpora(min_documents=1), st.integers(1, 7), st.integers(1, 9), st.integers(0, 60))
@example(CUT, 5, 2, 1)
def test_micro_batches_of_any_size_hold_the_same_blocks(corpus, blocks_per_step, micro_batch_size, step):
    sampler = corpus.sampler(blocks_per_step, seed=3)
    position = sampler.position(step)
    whole = stack([sampler.stream(position.epoch).block(position.first_block + i) for i in range(position.num_blocks)])
    blocks = sampler.blocks(step)
    parts = [stack(blocks[i : i + micro_batch_size]) for i in range(0, len(blocks), micro_batch_size)]
    for name in ("input_ids", "targets", "position_ids", "segment_lengths"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()
    for part in parts:
        assert part.segment_lengths.sum() == part.input_ids.size


@given(corpora(min_documents=2), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_is_the_same_whatever_was_asked_before(corpus, steps):
    used = corpus.sampler(2, seed=1)
    for step in steps:  # jumps between epochs, forth and back, as a resumed run does
        fresh = corpus.sampler(2, seed=1)
        for ours, theirs in zip(used.blocks(step), fresh.blocks(step), strict=True):
            assert ours.input_ids.tolist() == theirs.input_ids.tolist()


def test_a_token_of_the_text_that_equals_the_end_id_is_still_text():
    stream = PackedStream(PackedDocuments.from_ids([np.array([5, 2, 6], np.uint16)], prefix_id=2, end_id=2), 4)
    (block,) = blocks_of(stream)
    assert block.input_ids.tolist() == [2, 5, 2, 6] and block.targets.tolist() == [5, 2, 6, 2]
    assert block.segment_lengths.tolist() == [4]
