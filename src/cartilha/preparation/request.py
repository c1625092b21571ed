"""What `prepare` is asked to do, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cartilha.config import PrepareConfig
from cartilha.corpus.cleaning import STEPS, Cleaner
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.sources import LeftOut, Source, resolve_inputs
from cartilha.corpus.splits import SplitRule
from cartilha.errors import UserError
from cartilha.preparation.mixture import Mixture
from cartilha.storage import LONE_SURROGATES


@dataclass(frozen=True)
class PrepareRequest:
    """What is to be read, and what becomes of it; `left_out` has the files in folders of the input that are not read.

    The first `num_held_out` sources are held out as a whole; they come first so that a text on both sides stays there.
    """

    sources: list[Source]
    left_out: LeftOut
    num_held_out: int
    mixture: Mixture | None
    rule: SplitRule
    reading: ReadSettings
    steps: tuple[str, ...]
    language: str


def read_request(config: PrepareConfig) -> PrepareRequest:
    """Check the settings and find the inputs; a UserError if a setting makes no sense or an input does not exist."""
    rule = SplitRule(config.validation_fraction, config.validation_documents, config.validation_first, config.seed)
    reading = ReadSettings.of(config)
    if LONE_SURROGATES.search(config.output):
        raise UserError(f"--output {config.output} is not valid UTF-8, which Arrow asks of paths; choose another name.")
    if config.ray_address and config.executor != "ray":
        raise UserError("--ray_address is for the Ray executor; add --executor ray.")
    steps = tuple(step for name in config.clean for step in (STEPS if name == "web" else (name,)) if step != "none")
    Cleaner(steps, config.language)  # refuses unknown steps and missing extras
    if config.rejects and not steps:
        raise UserError("--rejects takes what cleaning leaves out, and nothing is cleaned; add --clean web.")
    if config.rejects and (Path(config.rejects).is_dir() or not Path(config.rejects).parent.is_dir()):
        raise UserError(f"--rejects {config.rejects} cannot be written; name a file in a folder that is there.")
    left_out: LeftOut = {}
    held_out = resolve_inputs(config.validation_input, left_out)
    if held_out and (config.validation_documents is not None or config.validation_first is not None):
        raise UserError("Hold out either given files or a number of documents, not both.")
    # Unweighted inputs are resolved together, so that files of equal names are named with their folders.
    inputs = [resolve_inputs(refs, left_out) for refs in (zip(config.input) if config.weights else [config.input])]
    sources = resolve_inputs([*held_out, *(source for found in inputs for source in found)])
    mixture = Mixture.of(config, inputs, sources) if config.weights else None
    return PrepareRequest(sources, left_out, len(held_out), mixture, rule, reading, steps, config.language)
