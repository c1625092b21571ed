"""The sections of the model card, each written from the run's record in one language (`templates/strings.yaml`)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cartilha.reporting.wording import Wording
from cartilha.runs.best import evaluation_of_model

Values = dict[str, Any]
MAX_INPUTS = 8
BOTH = ("before", "after")
OPT_LICENCE = "opt-175b"
OPTIMIZER_NAMES = {"rmsprop": "rmsprop (AdamW, beta1 = 0)"}  # torch's RMSprop is another
# Types of models that other programs read, by their documentation of 2026.
VLLM = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "gpt2", "gpt_neox"}
VLLM |= {"gptj", "bloom", "phi", "phi3", "falcon", "mpt", "stablelm", "olmo", "olmo2", "starcoder2", "granite", "mamba"}
LLAMA_CPP = VLLM - {"opt", "gptj"}


class CardWording(Wording):
    """How one language says what stands in the card."""

    package = "cartilha.runs"

    def between(self, bounds: Sequence[float | None] | None, write: Callable[[float | None], str]) -> str:
        """An interval in brackets, to stand after a figure; nothing if there is none."""
        if not bounds or None in bounds:
            return ""
        return " " + self("interval", low=write(bounds[0]), high=write(bounds[1]))


def code(text: object) -> str:
    """Text of others, such as a file's name, as it is: it ends neither its code span nor its table cell."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "¦") + "`"


@dataclass(frozen=True)
class CardParts:
    """A run's results as paragraphs and tables; what its record lacks, such as that of an older version, is left out.

    `base` is the base model's name that may be published, `licences` what its card and those of the datasets say.
    """

    results: Values
    base: str
    licences: Values

    @property
    def corpus(self) -> Values:
        """The texts."""
        found: Values = self.results["corpus"]
        return found

    @cached_property
    def after(self) -> Values:
        """The evaluation of the weights that are in the folder."""
        return dict(evaluation_of_model(self.results))

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter alone."""
        return bool(self.results["settings"].get("lora"))

    def language(self, say: Wording) -> str:
        """The name of the text's language."""
        known = self.corpus.get("language") or say("language_unknown")
        return str(self.corpus.get("language_names", {}).get(say.language, known))

    def intro(self, say: CardWording) -> str:
        """What it is, in a sentence or two."""
        said = say(
            "intro",
            base=code(self.base),
            language=self.language(say),
            documents=say.number(self.corpus["num_train_documents"]),
            tokens=say.number(self.corpus["num_train_tokens"]),
            targets=say.number(self.results["tokens"]),
        )
        return _paragraphs(said, self._adapter(say), self._other_parts(say))

    def _other_parts(self, say: CardWording) -> str:
        """What was not trained of a model that reads more than text, if it does."""
        parts = self.results.get("other_parts")
        if not parts or self.is_adapter:
            return ""
        listed, number = ", ".join(map(code, parts["names"])), say.number(parts["num_parameters"] / 1e6, 1)
        return say("other_parts", names=listed, parameters=number)

    def _adapter(self, say: CardWording) -> str:
        """That this is an adapter, if it is one, and what it was trained with."""
        settings = self.results["settings"]
        if not self.is_adapter:
            return ""
        also = say("adapter_embeddings") if settings.get("lora_embeddings") else ""
        trained, base = say.number(settings["num_trained"] / 1e6, 1), code(self.base)
        kind = settings["lora_base"]
        return say("adapter", rank=settings["lora"], also=also, trained=trained, base=base, kind=kind)

    def data(self, say: CardWording) -> str:
        """Texts, their cleaning and choice, and what was read of each source."""
        return _paragraphs(self._inputs(say), self._chosen(say), self._mixed(say), self._commits(say))

    def _inputs(self, say: CardWording) -> str:
        prepared, inputs = self.corpus.get("prepared"), self.corpus.get("inputs", [])
        said = [say("data_inputs", inputs=", ".join([*map(code, inputs[:MAX_INPUTS]), *_more(say, inputs)]))]
        if prepared is not None:
            said.append(say("data_language", language=self.language(say)))
            steps = [step for step in prepared["clean"] if step != "none"] + prepared.get("quality", [])
            said.append(say("data_cleaned", steps=", ".join(map(code, steps))) if steps else say("data_plain"))
            if questions := prepared["decontaminate"]:
                listed = ", ".join(code(Path(name).name) for name in questions)
                said.append(say("data_decontaminated", questions=listed))
        return " ".join(said if inputs else said[1:])

    def _chosen(self, say: CardWording) -> str:
        selection = self.results.get("selection")
        if not selection:
            return ""
        sizes = {name: say.number(selection[f"{key}_documents"]) for name, key in (("chosen", "num"), ("pool", "pool"))}
        if "divergence" not in selection:
            return say("chosen_random", **sizes)
        random, chosen = (say.number(selection["divergence"][name], 3) for name in ("random", "chosen"))
        return say(
            "chosen_like", targets=say.number(selection["target_documents"]), random=random, nats=chosen, **sizes
        )

    def _mixed(self, say: CardWording) -> str:
        """A row for each source of a mixture; of a store's place only the end is published."""
        rows = []
        for row in self.results.get("sources") or ():
            name = "/".join(Path(row["store"]).parts[-2:]) + (f"::{row['domain']}" if row["domain"] else "")
            read = say.number(row["documents_read"]), say.number(row["tokens_read"]), say.number(row["passes"], 2)
            rows.append(f"| {code(name)} | {' | '.join(read)} |")
        return "\n".join([say("mixed_head"), "|---|---|---|---|", *rows]) if rows else ""

    def _commits(self, say: CardWording) -> str:
        commit = self.results["settings"].get("model_commit")
        read = {self.base: commit} if commit else {}
        read |= {item["name"]: item["commit"] for item in self.corpus.get("datasets", [])}
        listed = ", ".join(f"{code(name)} (commit `{commit}`)" for name, commit in read.items())
        return say("read_from_hub", listed=listed) if read else ""

    def protocol(self, say: CardWording) -> str:
        """What was held out, and how it is scored."""
        prepared, split = self.corpus.get("prepared"), []
        if prepared is not None:
            held = {name: say.number(self.corpus[f"num_validation_{name}"]) for name in ("documents", "tokens")}
            by_hash = prepared["validation_first"] is None and not prepared["validation_input"]
            split = [say("split_hash", seed=prepared["seed"], **held) if by_hash else say("split_given", **held)]
            split.append(say("near_one_side" if prepared["near_duplicates"] else "near_not_looked_for"))
        protocol = self.after["protocol"]
        scored = say(
            "scored",
            documents=say.number(self.after["num_documents"]),
            tokens=say.number(self.after["num_tokens"]),
            prefix=protocol["prefix_id"],
            **{name: protocol[name] for name in ("name", "window", "stride", "dtype", "hash")},
        )
        return _paragraphs(" ".join(split), f"{scored} {say('comparable')}")

    def results_table(self, say: CardWording) -> str:
        """The figures before and after, and those of tasks."""
        before, after = self.results["evaluations"][0], self.after
        rows = [[say("perplexity"), *(say.number(one["perplexity"], 2) for one in (before, after))]]
        rows.append([say("bits"), *(self._bits(say, one) for one in (before, after))])
        english = self.results.get("english") or {}
        if english.get("before") and english.get("after"):
            rows.append([say("english_bits"), *(self._bits(say, english[when]) for when in ("before", "after"))])
        table = "\n".join([say("results_head"), "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])
        brackets = say("one_document" if after.get("num_documents") == 1 else "intervals")
        return _paragraphs(table, f"{brackets} {self._paired(say)}".strip(), self._tasks(say))

    @staticmethod
    def _bits(say: CardWording, evaluation: Values) -> str:
        return say.bits(evaluation["bits_per_byte"]) + say.between(evaluation.get("bits_per_byte_interval"), say.bits)

    def _paired(self, say: CardWording) -> str:
        pairs = self.results.get("comparison") or {}
        bounds = pairs.get("bits_per_byte_difference_interval")
        if not bounds or None in bounds or pairs.get("steps", [None])[-1] != self.after.get("step"):
            return ""
        low, high = map(say.signed, bounds)
        return say(
            "paired",
            difference=say.signed(pairs["bits_per_byte_difference"]),
            **{"low": low, "high": high, "share": say.percent(pairs["share_improved"], 0)},
            documents=say.number(pairs["num_documents"]),
        )

    def _tasks(self, say: CardWording) -> str:
        tasks = self.results.get("tasks")
        if not tasks:
            return say("no_tasks")
        rows = []
        for row in tasks["scores"]:
            name = f"{row['task']}: {row['metric']}" + ("" if row["higher_is_better"] else f" ({say('lower')})")
            cells = [say.score(row[when]) + say.between(row[f"{when}_interval"], say.score) for when in BOTH]
            cells.append(say.signed(row["difference"]) + say.between(row["difference_interval"], say.signed))
            rows.append(f"| {' | '.join([name, say.number(row['num_questions']), *cells])} |")
        lists = "".join(say("tasks_list", code=name, number=number) for name, number in tasks["lists"].items())
        table = "\n".join([say("tasks_head"), "|---|---|---|---|---|", *rows])
        return _paragraphs(table, say("tasks_note", harness=tasks["harness"], lists=lists))

    def forgotten(self, say: CardWording) -> str:
        """What the English sample says."""
        english = self.results.get("english") or {}
        bounds = english.get("bits_per_byte_difference_interval")
        if not bounds or None in bounds:
            return say("forgotten_unknown")
        low, high = map(say.signed, bounds)
        difference = say.signed(english["bits_per_byte_difference"])
        documents = say.number(english["after"]["num_documents"])
        return say("forgotten_text", documents=documents, difference=difference, low=low, high=high)

    def training(self, say: CardWording) -> str:
        """Settings, machine, time and energy."""
        settings, results = self.results["settings"], self.results
        planned, held = settings["num_steps"], results.get("model_step")
        whole = held is None or held == planned
        steps = say("steps", steps=say.number(planned))
        if not whole:
            steps = say("steps_best", steps=say.number(planned), step=say.number(held))
        said = say(
            "settings",
            block=say.number(settings["block_size"]),
            batch=say.number(settings["batch_tokens"]),
            lr=f"{settings['lr']:.2g}" if say.language == "en" else f"{settings['lr']:.2g}".replace(".", ","),
            optimizer=OPTIMIZER_NAMES.get(found := settings.get("optimizer", "adamw"), found),
            **{"steps": steps, "seed": settings["seed"], "dtype": settings["dtype"]},
        )
        versions = ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items())
        return _paragraphs(said, self._machine(say), say("versions", versions=versions) if versions else "")

    def _machine(self, say: CardWording) -> str:
        machine, seconds = self.results.get("machine"), self.results.get("seconds")
        if not machine or seconds is None:
            return ""
        processes, threads = self.results["settings"].get("num_processes", 1), machine.get("threads") or 1
        device = machine.get("device_name") or machine.get("device", "?")
        where = say("machine", time=say.duration(seconds), processes=processes, device=device, threads=threads)
        if energy := self.results.get("energy"):
            kilowatt_hours, time = say.number(energy["joules"] / 3.6e6, 4), say.duration(energy["seconds"])
            of_gpu = energy.get("source") != "RAPL"
            counted = say("energy_measured" if of_gpu else "energy_of_processors", energy=kilowatt_hours, time=time)
            one = [say("energy_of_one", processes=processes)] if of_gpu and processes > 1 else []
            return " ".join([where, counted, *one])
        on_gpu = machine.get("device") != "cpu"
        hours = seconds / 3600 * processes * (1 if on_gpu else threads)
        unit = say("gpu_hours" if on_gpu else "processor_hours")
        return f"{where} {say('energy_not_measured', hours=say.number(hours, 3), unit=unit)}"

    def licence(self, say: CardWording) -> str:
        """The base model's, and those of the texts."""
        own = base_licence(self.licences.get("base", {}), say)
        stated = self.licences.get("data", {})
        listed = "; ".join(f"{code(name)}: {found or say('licence_not_stated')}" for name, found in stated.items())
        texts = [say("licence_data", listed=listed)] if stated else []
        if len(self.corpus.get("inputs", [])) > len(stated):
            texts.append(say("licence_files"))
        return " ".join([own, *texts])


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def _more(say: CardWording, inputs: Sequence[str]) -> list[str]:
    left = len(inputs) - MAX_INPUTS
    return [say("more_inputs", number=say.number(left))] if left > 0 else []


def base_licence(record: Values, say: CardWording) -> str:
    """The licence that a model has from its base, by what the base's card says."""
    if record.get("license_name") == OPT_LICENCE:
        return say("licence_opt")
    if "license" not in record:
        return say("licence_unknown")
    link = f" ({record['license_link']})" if record.get("license_link") else ""
    return say("licence_base", licence=f"{record.get('license_name', record['license'])}{link}")


def engines(model_type: str | None) -> list[str]:
    """Commands of the programs that are known to load a model of this type."""
    lines = []
    if model_type in VLLM:
        lines.append("vllm serve NAME  # vLLM")
    if model_type in LLAMA_CPP:
        lines.append("python convert_hf_to_gguf.py NAME --outfile model.gguf  # llama.cpp; NAME as a folder")
        lines.append("llama-completion -m model.gguf -n 40 -p PROMPT")
    return lines


def prompt(known: Sequence[str]) -> str:
    """The beginning of a text, as a Python literal."""
    return json.dumps(known[0] if known else "...", ensure_ascii=False)


def dataset_id(ref: str) -> str:
    """The repository of `hf:OWNER/NAME@REVISION:CONFIG`."""
    return re.split("[@:]", ref.removeprefix("hf:"))[0]
