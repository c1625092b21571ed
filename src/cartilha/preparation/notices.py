"""What `prepare` logs about the documents: how inputs are mixed, what was left out, what each side holds."""

from __future__ import annotations

from typing import Any

from cartilha.config import PrepareConfig
from cartilha.corpus.readers import ReadCounts, no_text
from cartilha.corpus.splits import Split
from cartilha.errors import UserError, counted, log
from cartilha.preparation.assembly import Sides
from cartilha.preparation.selection import FEW_DOCUMENTS
from cartilha.tokens.store import SplitCounts

LITTLE = 0.2  # a lower correlation of the weights by two halves of a target is said


def nothing_left(config: PrepareConfig, rejected: dict[str, int]) -> UserError:
    """The error that says why no document is left."""
    if not rejected:
        return no_text(config.input)
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in rejected.items())
    documents = f"all {counted(sum(rejected.values()), 'document')} ({reasons})"
    questions = ", or others with --decontaminate" if config.decontaminate else ""
    return UserError(f"Cleaning left out {documents}; name fewer steps with --clean, or another --language{questions}.")


def tell_mixture(config: PrepareConfig, sides: Sides) -> None:
    """Log what `--weights` does to each input, before the store is written."""
    for ref, part in zip(config.input, sides.mixture, strict=False):
        taken = (
            f"{ref}: its {part['num_tokens']:,} tokens are taken {part['times']:.2f} times, for {part['share']:.1%} of"
            " the training tokens"
        )
        if part["num_left_out"]:
            documents = counted(part["num_documents"], "document", "is", "are")
            more = f"--max_repeats {config.max_repeats + 1}, or another weight, keeps more"
            log.warning("%s; %s of its %s left out (%s).", taken, f"{part['num_left_out']:,}", documents, more)
        else:
            log.info("%s.", taken)


def tell_selection(config: PrepareConfig, selection: dict[str, Any]) -> None:
    """Log how much was chosen, and how much nearer to the target it is than the pool."""
    how = "chosen by --like" if "divergence" in selection else "drawn at random, since no --like says what to aim at"
    log.info(
        "%s of %s (%s of %s) were %s.",
        f"{selection['num_documents']:,}",
        counted(selection["pool_documents"], "document"),
        f"{selection['num_tokens']:,}",
        counted(selection["pool_tokens"], "token"),
        how,
    )
    if config.select_for and selection["num_documents"] == selection["pool_documents"]:
        log.warning("All of the input is taken: there is less of it than can be read in %s.", config.select_for)
    if "divergence" in selection:
        log.info(
            "Divergence from the target: %.3f nats per n-gram in text drawn at random, %.3f in what was chosen.",
            *selection["divergence"].values(),
        )
        if selection["divergence"]["chosen"] > selection["divergence"]["random"] and selection["reliability"] >= LITTLE:
            log.warning("What was chosen is no nearer to the target than text drawn at random: look at the weights.")
        if selection["reliability"] < LITTLE:
            log.warning(
                "Two halves of the target hardly agree on what is like it (correlation %.2f): the input is all alike,"
                " or the target too small, and the documents are drawn nearly at random.",
                selection["reliability"],
            )
        if selection["target_documents"] <= FEW_DOCUMENTS:
            log.warning(
                "The target has %s; a few hundred tell more of what it is like.",
                counted(selection["target_documents"], "document"),
            )


def tell_rest(read: ReadCounts, sides: Sides, leaks: dict[str, float] | None) -> None:
    """Log what else happened to the documents."""
    if read.replaced_bytes_documents:
        log.warning("Invalid bytes were replaced by U+FFFD in %s.", counted(read.replaced_bytes_documents, "document"))
    if read.nul_documents:
        log.warning("NUL characters are kept in %s.", counted(read.nul_documents, "document"))
    if read.joined_rows:
        log.warning(
            "Quotes joined several lines into one row %s, the first at %s; where quotes are plain characters, add"
            " --csv_quoting none.",
            *(counted(read.joined_rows, "time"), read.first_joined),
        )
    for reason, number in read.skipped.items():
        left_out = counted(number, "record", "was left out", "were left out")
        log.warning("%s (%s), the first: %s", left_out, reason, read.first_skipped[reason])
    for note in sides.split.notes:
        log.warning("%s", note)
    if sides.dropped["exact_duplicates"]:
        log.info("%s left out.", counted(sides.dropped["exact_duplicates"], "exact duplicate", "was", "were"))
    if leaks:
        log.info(
            "%.2f %% of the held-out documents have a near-duplicate in training; a split that looked at each document"
            " alone would have had %.2f %%.",
            *(100 * leaks["leak_rate"], 100 * leaks["plain_leak_rate"]),
        )


def tell_counts(split: Split, counts: SplitCounts) -> None:
    """Log what a side holds."""
    log.info(
        "%s: %s, %s, %s (%.2f tokens per word, %.2f bytes per token)",
        split,
        counted(counts.num_documents, "document"),
        counted(counts.num_tokens, "token"),
        counted(counts.num_words, "word"),
        counts.num_tokens / max(1, counts.num_words),
        counts.num_bytes / max(1, counts.num_tokens),
    )
