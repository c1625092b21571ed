"""Walking through a store: its documents as tokens, and the blocks that a training sees, with their boundaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cartilha.blocks.mixing import MixedDocuments, MixtureSampler
from cartilha.blocks.packing import IGNORE_INDEX, PackedSegment
from cartilha.blocks.sampler import BlockSampler
from cartilha.corpus.splits import Split
from cartilha.explorer.token_text import token_label
from cartilha.explorer.wording import Refusal
from cartilha.tokens.store import TokenStore

MAX_SHOWN_TOKENS = 2000
MAX_BLOCK_SIZE = 8192
MAX_EPOCHS = 1_000_000
MAX_MIXED_EPOCHS = 100  # the order of a mixture is made from its beginning
MAX_CHARACTER_BYTES = 4  # of UTF-8: so many tokens may share a character

Kind = Literal["prefix", "text", "end", "padding"]


@dataclass(frozen=True)
class StoreToken:
    """A token as it lies in a store or block: what it says, and whether it is text, prefix, end or padding."""

    token_id: int
    text: str
    kind: Kind


@dataclass(frozen=True)
class StoredDocument:
    """A document of a store, with the first `MAX_SHOWN_TOKENS` of its tokens."""

    number: int
    num_documents: int
    doc_id: str
    source: str
    domain: str
    num_tokens: int
    num_bytes: int
    num_words: int
    tokens: tuple[StoreToken, ...]


@dataclass(frozen=True)
class Segment:
    """The piece of one document (or the padding) that lies in a block."""

    tokens: tuple[StoreToken, ...]
    begins: bool
    ends: bool
    name: str = ""  # of the document, in a mixture of several stores

    @property
    def is_padding(self) -> bool:
        """Whether it holds no document."""
        return self.tokens[0].kind == "padding"


@dataclass(frozen=True)
class Mixture:
    """What the blocks are made of, where they are of several stores, and how each document is called."""

    documents: MixedDocuments
    label: Callable[[int], str]


@dataclass(frozen=True)
class StoredBlock:
    """A block as training sees it."""

    number: int  # from 0
    num_blocks: int  # in an epoch
    segments: tuple[Segment, ...]  # what attention keeps apart, in order
    num_targets: int  # positions that are scored: all but those that hold an end token or padding

    @property
    def num_padding(self) -> int:
        """Positions that hold nothing."""
        return sum(len(segment.tokens) for segment in self.segments if segment.is_padding)


class StoreWalk:
    """A store to be walked through, of which only the tokens looked at are read; its blocks may be of a mixture."""

    def __init__(self, store: TokenStore, mixture: Mixture | None = None) -> None:
        self.store = store
        self.mixture = mixture
        self._last: MixtureSampler | None = None  # a mixture's order is made document by document
        self.tokenizer = self.store.tokenizer()

    def document(self, split: Split, number: int) -> StoredDocument:
        """A document of a side by its number (from 0; beyond the ends the first or the last).

        A side without documents is a Refusal, a store that is gone an OSError.
        """
        table, labels = self.store.documents(split), self.store.labels(split)
        if not len(table.start):
            raise Refusal("no_documents")
        number = min(max(number, 0), len(table.start) - 1)
        start, num_tokens = int(table.start[number]), int(table.num_tokens[number])
        doc_id, source, domain = (labels[name][number] for name in ("doc_id", "source", "domain"))
        counts = (num_tokens, int(table.num_bytes[number]), int(table.num_words[number]))
        ids = np.asarray(self.store.tokens(split)[start : start + min(num_tokens, MAX_SHOWN_TOKENS)])
        return StoredDocument(number, len(table.start), doc_id, source, domain, *counts, self._text_tokens(ids))

    def block(self, number: int, block_size: int, seed: int = 0, epoch: int = 0) -> StoredBlock:
        """A block of the training side, packed as `cartilha train` packs it for this seed and epoch.

        A block size or an epoch that does not exist, and a side without documents, are a Refusal.
        """
        num_epochs = MAX_EPOCHS if self.mixture is None else MAX_MIXED_EPOCHS
        if not 1 <= block_size <= MAX_BLOCK_SIZE:
            raise Refusal("bad_block_size", limit=MAX_BLOCK_SIZE, block_size=block_size)
        if not 0 <= epoch < num_epochs:
            raise Refusal("bad_epoch", limit=num_epochs, epoch=epoch + 1)
        documents = self.store.packed("train")
        if not len(documents):
            raise Refusal("no_documents")
        if self.mixture is None:
            sampler = BlockSampler(documents, block_size=block_size, blocks_per_step=1, seed=seed)
        else:
            sampler = self._sampler(self.mixture.documents, block_size, seed)
        stream, num_blocks, order = sampler.stream(epoch), sampler.blocks_per_epoch, sampler.order(epoch)
        number = min(max(number, 0), num_blocks - 1)
        index = sampler.position(epoch * num_blocks + number).first_block
        block, parts = stream.block(index), stream.segments(index)
        segments = [self._segment(block.input_ids[part.begin : part.end], part, order) for part in parts]
        return StoredBlock(number, num_blocks, tuple(segments), int((block.targets != IGNORE_INDEX).sum()))

    def _sampler(self, documents: MixedDocuments, block_size: int, seed: int) -> MixtureSampler:
        last = self._last
        if last is None or (last.block_size, last.seed) != (block_size, seed):
            last = MixtureSampler(documents, block_size=block_size, blocks_per_step=1, seed=seed)
        self._last = last
        return last

    def _segment(self, ids: np.ndarray, part: PackedSegment, order: np.ndarray) -> Segment:
        if part.document is None:
            return Segment((StoreToken(self.store.end_id, "", "padding"),) * len(ids), False, False)
        # Where the two ids are one (OPT's </s>), only the place says which is meant.
        text = ids[int(part.begins) : len(ids) - int(part.has_end_token)]
        head = (self._mark(int(ids[0]), "prefix"),) if part.begins else ()
        tail = (self._mark(int(ids[-1]), "end"),) if part.has_end_token else ()
        name = "" if self.mixture is None else self.mixture.label(int(order[part.document]))
        return Segment((*head, *self._text_tokens(text), *tail), part.begins, part.ends, name)

    def _mark(self, token_id: int, kind: Kind) -> StoreToken:
        return StoreToken(token_id, token_label(self.tokenizer, token_id), kind)

    def _text_tokens(self, ids: np.ndarray) -> tuple[StoreToken, ...]:
        """Tokens with the text that each adds; of tokens that share a character the last one shows it."""
        tokens: list[StoreToken] = []
        waiting: list[int] = []
        for token_id in ids.tolist():
            waiting.append(token_id)
            together = self.tokenizer.decode(waiting)
            if "\ufffd" not in together or len(waiting) >= MAX_CHARACTER_BYTES:
                label = token_label(self.tokenizer, token_id) if len(waiting) == 1 else together
                tokens += [StoreToken(i, "", "text") for i in waiting[:-1]]
                tokens.append(StoreToken(token_id, label, "text"))
                waiting = []
        tokens += [StoreToken(i, token_label(self.tokenizer, i), "text") for i in waiting]
        return tuple(tokens)
