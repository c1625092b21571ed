"""What `prepare` is asked to do, checked before anything is read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cartilha.config import PrepareConfig
from cartilha.corpus.cleaning import Cleaner, named_steps
from cartilha.corpus.files import SourceFile
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.sources import HubSource, LeftOut, Source, refuse_to_write_over, resolve_inputs
from cartilha.corpus.splits import SplitRule
from cartilha.errors import UserError
from cartilha.languages import Language, find_language
from cartilha.preparation.decontamination import QuestionNames
from cartilha.preparation.mixture import InputShares
from cartilha.preparation.quality import Signal, read_signals
from cartilha.preparation.selection import Amount
from cartilha.storage import LONE_SURROGATES
from cartilha.units import parse_amount, parse_duration


@dataclass(frozen=True)
class PrepareRequest:
    """What is to be read, and what becomes of it; `left_out` has the files in folders of the input that are not read.

    The first `num_held_out` sources are held out as a whole, and the `num_targets` after them are what the selection
    aims at; they come first so that a text on both sides stays there.
    """

    sources: list[Source]
    left_out: LeftOut
    num_held_out: int
    num_targets: int
    amount: Amount | None
    mixture: InputShares | None
    rule: SplitRule
    reading: ReadSettings
    steps: tuple[str, ...]
    language: Language
    questions: QuestionNames
    signals: tuple[Signal, ...]
    stream_best: float | None


def read_request(config: PrepareConfig) -> PrepareRequest:
    """Check the settings and find the inputs; a UserError if a setting makes no sense or an input does not exist."""
    rule = SplitRule(config.validation_fraction, config.validation_documents, config.validation_first, config.seed)
    reading = ReadSettings.of(config)
    if LONE_SURROGATES.search(config.output):
        raise UserError(f"--output {config.output} is not valid UTF-8, which Arrow asks of paths; choose another name.")
    if config.ray_address and config.executor != "ray":
        raise UserError("--ray_address is for the Ray executor; add --executor ray.")
    steps = named_steps(config.clean)
    language = find_language(config.language)
    Cleaner(steps, language)  # refuses missing extras
    signals = read_signals(config)
    if config.rejects and not (steps or config.decontaminate or signals):
        raise UserError(
            "--rejects takes what --clean, --decontaminate, --max_perplexity, --min_perplexity and --classifier leave"
            " out, and none of them is given; add one, such as --clean web."
        )
    if config.rejects and not Path(config.rejects).parent.is_dir():
        raise UserError(f"--rejects {config.rejects} cannot be written; name a file in a folder that is there.")
    amount = _amount(config)
    left_out: LeftOut = {}
    held_out = resolve_inputs(config.validation_input, left_out)
    if held_out and (config.validation_documents is not None or config.validation_first is not None):
        raise UserError("Hold out either given files or a number of documents, not both.")
    # Unweighted inputs are resolved together, so that files of equal names are named with their folders.
    inputs = [resolve_inputs(refs, left_out) for refs in (zip(config.input) if config.weights else [config.input])]
    targets = resolve_inputs(config.like, left_out)
    read = {"--validation_input": held_out, "--input": list(itertools.chain(*inputs))}
    _refuse_shared(targets, "--like", read, "give other texts as the target")
    sources = resolve_inputs([*held_out, *targets, *read["--input"]])
    questions = QuestionNames.of(config.decontaminate)
    refuse_to_write_over([*sources, *questions.sources], config)
    _refuse_shared(questions.sources, "--decontaminate", read | {"--like": targets}, "name a benchmark's text")
    mixture = InputShares.of(config, inputs, sources) if config.weights else None
    return PrepareRequest(
        sources=sources,
        left_out=left_out,
        num_held_out=len(held_out),
        num_targets=len(targets),
        amount=amount,
        mixture=mixture,
        rule=rule,
        reading=reading,
        steps=steps,
        language=language,
        questions=questions,
        signals=signals,
        stream_best=_stream_best(config, amount),
    )


def _amount(config: PrepareConfig) -> Amount | None:
    """How much is to be chosen; for a time, anything until the speed is measured."""
    if config.select_tokens is None and config.select_for is None:
        if config.like or config.keep_pool:
            name = "--like" if config.like else "--keep_pool"
            raise UserError(f"{name} needs to know how much to choose; add --select_tokens, such as 5m or 20%.")
        return None
    if config.select_tokens is not None and config.select_for is not None:
        raise UserError("--select_tokens and --select_for do not go together; give one of them.")
    if config.weights:
        raise UserError("A selection and --weights do not go together; choose from each input in its own store.")
    if config.select_for is not None:
        parse_duration(config.select_for)
        return Amount(1.0)
    return Amount(parse_amount(str(config.select_tokens), "--select_tokens"))


def _stream_best(config: PrepareConfig, amount: Amount | None) -> float | None:
    if config.stream_best is None:
        return None
    share = parse_amount(config.stream_best, "--stream_best")
    if not isinstance(share, float) or share == 1:
        raise UserError(f"--stream_best is a share of the text, such as 5%, not {config.stream_best!r}.")
    if amount is None or (config.select_for is None and isinstance(amount.value, float)):
        raise UserError(
            "--stream_best reads until there is enough good text; say how much with --select_tokens, such as 50m."
        )
    for name in ("limit_documents", "max_perplexity", "min_perplexity", "classifier"):
        if getattr(config, name) is not None:
            raise UserError(
                f"--stream_best ends the reading by itself, and --{name} does not go with it; leave one out."
            )
    return share


def _refuse_shared(found: Sequence[Source], option: str, read: Mapping[str, Sequence[Source]], remedy: str) -> None:
    """Refuse a text that two options name."""
    for source in found:
        for other, sources in read.items():
            if any(_is_same(source, one) for one in sources):
                raise UserError(f"{option} names {_name(source)}, which is also a text of {other}; {remedy}.")


def _is_same(first: Source, second: Source) -> bool:
    if isinstance(first, SourceFile) and isinstance(second, SourceFile):
        return Path(first.path).resolve() == Path(second.path).resolve()
    return first == second


def _name(source: Source) -> str:
    return source.label if isinstance(source, HubSource) else source.name
