"""The sources of a run that mixes several stores, or domains of them: what was asked for, and what was read of each."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.blocks.mixing import MixedDocuments, MixtureSampler, Rate
from cartilha.config import TrainConfig
from cartilha.errors import UserError, counted, log
from cartilha.settings import IN_WORDS
from cartilha.tokens.packed import PackedDocuments
from cartilha.tokens.store import TokenStore
from cartilha.tokens.store_checks import read_store_info

SHOWN_DOMAINS = 8
DECODED_DOCUMENTS = 256


@dataclass(frozen=True)
class Source:
    """A store, or a domain of it, and its share of the tokens: at first, and in the last part of the steps."""

    store: str
    domain: str | None  # None: what no other source names of the store
    share: Fraction
    end_share: Fraction

    @property
    def name(self) -> str:
        """As it is given on the command line, without the share."""
        return self.store if self.domain is None else f"{self.store}::{self.domain}"


def sources_of(config: TrainConfig) -> tuple[Source, ...]:
    """The sources that `--mix` and `--mix_end` ask for, those of `--store` first; none where they are not given.

    A UserError says what is wrong with the shares.
    """
    if not config.mix and not config.mix_end:
        return ()
    names: dict[tuple[str, str | None], str] = {_key(config.store, None): config.store}
    first = _shares("mix", config, names) if config.mix else {_key(config.store, None): Fraction(1)}
    last = _shares("mix_end", config, names) if config.mix_end else first
    found = [
        Source(path, key[1], first.get(key, Fraction(0)), last.get(key, Fraction(0))) for key, path in names.items()
    ]
    found = [source for source in found if source.share or source.end_share]
    of_store = [source for source in found if _is_of(source, config.store)]
    if not sum(source.share for source in of_store):
        raise UserError(f"The shares of --mix leave nothing for --store {config.store}, whose reading is an epoch.")
    return (*of_store, *(source for source in found if source not in of_store))


def _key(store: str, domain: str | None) -> tuple[str, str | None]:
    return os.path.realpath(store), domain


def _is_of(source: Source, store: str) -> bool:
    return os.path.realpath(source.store) == os.path.realpath(store)


def _shares(
    option: str, config: TrainConfig, names: dict[tuple[str, str | None], str]
) -> dict[tuple[str, str | None], Fraction]:
    """The share of each source that an option names, and of `--store`, which gets the rest; new `names` are added."""
    found: dict[tuple[str, str | None], Fraction] = {}
    for entry in getattr(config, option):
        name, _, share = entry.rpartition("=")
        path, _, domain = name.partition("::")
        key = _key(path, domain or None)
        if not path:
            raise UserError(
                f"--{option} takes STORE=SHARE or STORE::DOMAIN=SHARE, such as english=0.05, not {entry!r}."
            )
        if key in found:
            raise UserError(f"--{option} names {name} twice; give it one share.")
        found[key] = _share(share, option, entry)
        names.setdefault(key, path)
    total, rest = sum(found.values(), Fraction(0)), _key(config.store, None)
    if total > 1 or (rest in found and total < 1):
        remedy = (
            f"leave out {names[rest]}, which then gets the rest" if rest in found else "--store gets what they leave"
        )
        raise UserError(
            f"The shares of --{option} add up to {float(total):.6g} and not to 1; correct one of them ({remedy})."
        )
    found.setdefault(rest, 1 - total)
    return found


def _share(text: str, option: str, entry: str) -> Fraction:
    """A share as it is written, exactly: `5%`, `0.05` and `1/20` are the same."""
    try:
        share = Fraction(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise UserError(f"A share of --{option} is a number above 0, at most 1, such as 0.05 or 5%, not {entry!r}.")
    return share


def check_sources(config: TrainConfig) -> None:
    """Refuse, with a UserError, what shares, stores and the other options show to be wrong.

    The store of a job need not be there yet.
    """
    sources = sources_of(config)
    if config.mix_end and config.time_budget:
        raise UserError(
            "--mix_end needs to know the last step, which a --time_budget leaves open; give --max_steps instead."
        )
    seen: dict[tuple[str, str | None], str] = {}
    tokenizers: dict[str, str] = {}
    for source in sources:
        if _is_of(source, config.store) and not Path(config.store).exists():
            continue
        info = read_store_info(Path(source.store))
        other = tokenizers.setdefault(info["tokenizer_fingerprint"], source.store)
        if len(tokenizers) > 1:
            raise UserError(
                f"The stores {next(iter(tokenizers.values()))} and {other} were made with different tokenizers; "
                "prepare one of them again with the --model of the other."
            )
        other = seen.setdefault((info["splits"]["train"]["corpus_hash"], source.domain), source.name)
        if other != source.name:
            raise UserError(f"{other} and {source.name} hold the same training text; name it once.")
        if source.domain is not None:
            _chosen(source, sources, TokenStore(source.store))


def identities(config: TrainConfig) -> dict[str, Any]:
    """`--mix` and `--mix_end` as a resume compares them: with the hashes of the texts instead of their places.

    With each goes its `_in_words`, which messages show. Nothing is compared if a store has been removed since.
    """
    sources = sources_of(config)
    if not all((Path(source.store) / "store.json").is_file() for source in sources):
        return {}
    hashes = {s.store: read_store_info(Path(s.store))["splits"]["train"]["corpus_hash"][:12] for s in sources}
    names = [f"{s.domain or 'text'} of {hashes[s.store]}" for s in sources]
    shares = {
        "mix": [s.share for s in sources if config.mix],
        "mix_end": [s.end_share for s in sources if config.mix_end],
    }
    found: dict[str, Any] = {}
    for option, own in shares.items():
        found[option] = [f"{name}: {share}" for name, share in zip(names, own, strict=False)]
        parts = (f"{100 * float(share):.6g} % {s.name}" for s, share in zip(sources, own, strict=False) if share)
        found[option + IN_WORDS] = ", ".join(parts)
    if config.mix_end:
        found["mix_end" + IN_WORDS] += f", in the last {100 * config.mix_end_fraction:.4g} % of the steps"
    return found


@dataclass(frozen=True)
class Mix:
    """The sources of a run, opened."""

    sources: tuple[Source, ...]
    documents: MixedDocuments
    left_out: tuple[int, ...]  # documents of each source that the first store holds out
    stores: tuple[TokenStore, ...]  # each once, that of `--store` first
    begins: tuple[int, ...]  # the number of each store's first document among all

    @classmethod
    def of(cls, mix: tuple[str, ...], store: TokenStore) -> Mix:
        """The mixture that `--mix` asks for beside a store, as training reads it."""
        return cls.open(sources_of(TrainConfig(store=str(store.path), mix=mix)), store)

    @classmethod
    def open(cls, sources: Sequence[Source], store: TokenStore) -> Mix:
        """The training documents of each source; `store` is that of `--store`.

        What that store holds out for validation is not read from others. A UserError names a source without documents.
        """
        stores: dict[str, TokenStore] = {os.path.realpath(store.path): store}
        for source in sources:
            path = os.path.realpath(source.store)
            if path not in stores:
                stores[path] = TokenStore(source.store)
        parts = {path: one.packed("train") for path, one in stores.items()}
        begins = dict(zip(parts, np.cumsum([0, *map(len, parts.values())]), strict=False))
        held_out = store.labels("validation", ("text_hash",))["text_hash"]
        members, left_out = [], []
        for source in sources:
            path = os.path.realpath(source.store)
            chosen = _chosen(source, sources, stores[path])
            known = chosen & stores[path].where("train", "text_hash", held_out)
            members.append(np.flatnonzero(chosen & ~known) + begins[path])
            left_out.append(int(known.sum()))
            if not len(members[-1]):
                raise _nothing_of_its_own(source, store)
        rates = tuple(Rate(source.share, source.end_share) for source in sources)
        num_counted = sum(_is_of(source, str(store.path)) for source in sources)
        mixed = MixedDocuments(PackedDocuments.joined(list(parts.values())), tuple(members), rates, num_counted)
        opened = tuple(stores.values()), tuple(int(begins[path]) for path in stores)
        return cls(tuple(sources), mixed, tuple(left_out), *opened)

    def label(self, document: int) -> str:
        """The name of a document among all, with its store."""
        number = bisect.bisect_right(self.begins, document) - 1
        store, row = self.stores[number], document - self.begins[number]
        return f"{store.path}: {store.labels('train', ('doc_id',), row)['doc_id'][0]}"

    def texts(self) -> list[Iterator[str]]:
        """What is read of each store but that of `--store`."""
        bounds = [*self.begins, len(self.documents.documents)]
        return [self._texts(number, bounds[number], bounds[number + 1]) for number in range(1, len(self.stores))]

    def _texts(self, number: int, begin: int, past: int) -> Iterator[str]:
        tokenizer, documents = self.stores[number].tokenizer(), self.documents.documents
        members = np.sort(np.concatenate(self.documents.members))
        members = members[(members >= begin) & (members < past)]
        for first in range(0, len(members), DECODED_DOCUMENTS):
            own = members[first : first + DECODED_DOCUMENTS]
            yield from tokenizer.decode_batch([documents.ids(number) for number in own.tolist()])

    def planned(self, num_tokens: int) -> list[dict[str, Any]]:
        """Each source with what so many tokens of the stream take of it."""
        rows = []
        for i, (source, rate) in enumerate(zip(self.sources, self.documents.rates, strict=True)):
            due, size = float(rate.due(num_tokens)), self.documents.sizes[i]
            rows.append(
                {
                    "source": source.name,
                    "share": float(source.share),
                    "num_documents": len(self.documents.members[i]),
                    "num_tokens": size,
                    "tokens_read": round(due),
                    "passes": due / size,
                }
            )
        return rows

    def ending(self, num_steps: int, fraction: float, tokens_per_step: int) -> Mix:
        """With the last part of the steps, at least one, mixed by the shares that are meant for it."""
        turn = (num_steps - min(num_steps, max(1, round(fraction * num_steps)))) * tokens_per_step
        rates = tuple(replace(rate, turn=turn) for rate in self.documents.rates)
        return replace(self, documents=replace(self.documents, rates=rates))

    def rows(self, sampler: MixtureSampler, step: int) -> list[dict[str, Any]]:
        """Each source with what was read of it in the first `step` steps, for the run's record.

        `tokens_read` counts the prefix and the end of each document, too, as the tokens of a step do.
        """
        documents, tokens = sampler.read_until(step)
        rows = []
        for i, source in enumerate(self.sources):
            rows.append(
                {
                    "store": source.store,
                    "domain": source.domain,
                    "share": float(source.share),
                    "end_share": float(source.end_share),
                    "num_documents": len(self.documents.members[i]),
                    "num_tokens": int(self.documents.documents.num_tokens[self.documents.members[i]].sum()),
                    "num_left_out": self.left_out[i],
                    "documents_read": int(documents[i]),
                    "tokens_read": int(tokens[i]),
                    "passes": int(tokens[i]) / self.documents.sizes[i],
                }
            )
        return rows

    def announce(self, num_steps: int, tokens_per_step: int) -> None:
        """Say what is planned of each source, and warn where one is used up and begins again."""
        for i, (source, rate) in enumerate(zip(self.sources, self.documents.rates, strict=True)):
            size, planned = self.documents.sizes[i], float(rate.due(num_steps * tokens_per_step))
            later = "" if source.share == source.end_share else f" ({100 * float(source.end_share):.4g} % at the end)"
            log.info(
                "Source %s (%s, %s): %.4g %% of the tokens%s, %s in %s, which reads it %.2f times.",
                *(source.name, counted(len(self.documents.members[i]), "document"), counted(size, "token")),
                *(100 * float(source.share), later, f"{planned:,.0f}", counted(num_steps, "step"), planned / size),
            )
            if self.left_out[i]:
                log.warning(
                    "%s of %s: held out by --store for validation, and therefore not read.",
                    *(counted(self.left_out[i], "document"), source.name),
                )
            # Of the one source that the epochs count, more than one pass is what was asked for.
            if planned > size and (i or self.documents.num_counted > 1):
                log.warning(
                    "The source %s is used up after step %d and begins again: it is read %.1f times.",
                    *(source.name, int(rate.reached(size) // tokens_per_step) + 1, planned / size),
                )


def _nothing_of_its_own(source: Source, store: TokenStore) -> UserError:
    nothing = f"The source {source.name} has no training documents of its own"
    if source.domain is None and _is_of(source, str(store.path)):
        return UserError(
            f"{nothing}, besides those of its domains that are named, and it is --store, which gets the rest of the"
            " tokens; give its domains shares that add up to 1 with those of the other sources."
        )
    return UserError(f"{nothing}; leave it out.")


def _chosen(source: Source, sources: Sequence[Source], store: TokenStore) -> np.ndarray:
    """Which training documents of a store are the source's: booleans."""
    if source.domain is not None:
        chosen = store.where("train", "domain", [source.domain])
        if not chosen.any():
            known = sorted(set(store.labels("train", ("domain",))["domain"]))
            shown = ", ".join(known[:SHOWN_DOMAINS]) + (", ..." if len(known) > SHOWN_DOMAINS else "")
            raise UserError(
                f"The store {source.store} has no training documents of the domain {source.domain!r}; it has {shown}."
            )
        return chosen
    named = [other.domain for other in sources if _is_of(other, source.store) and other.domain is not None]
    return ~store.where("train", "domain", named)
