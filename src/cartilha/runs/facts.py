"""What results.json records of a run's set-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cartilha.config import PrepareConfig, TrainConfig
from cartilha.machine.cpu import cpu_matmul_rates
from cartilha.machine.devices import describe_machine
from cartilha.machine.processes import world
from cartilha.machine.versions import versions
from cartilha.model.sharding import is_sharded
from cartilha.runs.setup import Run
from cartilha.runs.sources import sources_of
from cartilha.tokens.store import TokenStore
from cartilha.tokens.store_checks import read_store_info
from cartilha.training.state import StepRecord, rates


def _datasets(config: TrainConfig) -> list[dict[str, Any]]:
    """The datasets of the hub that the stores were made of, each with the commit that was read."""
    stores = [config.store, *(source.store for source in sources_of(config))]
    inputs = [item for path in stores for item in read_store_info(Path(path)).get("inputs", []) if "commit" in item]
    return [item for place, item in enumerate(inputs) if item not in inputs[:place]]


def _prepared(store: TokenStore) -> dict[str, Any]:
    """The names of the texts, and how they were cleaned and split, for the card; the places of files are not kept."""
    settings = {**PrepareConfig().deciding_values(), **store.info.get("settings", {})}
    names = ("clean", "decontaminate", "near_duplicates", "validation_first", "seed")
    prepared = {name: settings[name] for name in names}
    prepared["quality"] = [one["signal"] for one in store.info.get("quality", ())]
    inputs = store.info.get("inputs", [])
    prepared["validation_input"] = any(item.get("held_out") for item in inputs)
    return {"inputs": [item["name"] for item in inputs if not item.get("target")], "prepared": prepared}


def facts(run: Run) -> dict[str, Any]:
    """What results.json records of the set-up."""
    config, sampler, store = run.config, run.sampler, run.store
    machine = describe_machine(run.loaded.model.device)
    corpus: dict[str, Any] = {"tokenizer_fingerprint": store.fingerprint}
    for side, counts in store.counts.items():
        corpus |= {
            f"num_{side}_documents": counts.num_documents,
            f"num_{side}_tokens": counts.num_tokens,
            f"{side}_hash": counts.corpus_hash,
        }
    language = store.language
    corpus |= {"language": language["code"], "language_names": language["names"], "prompts": language["prompts"]}
    corpus |= _prepared(store)
    corpus["datasets"] = _datasets(config)
    return {
        "settings": {
            **run.settings,
            "store": str(store.path),
            "epochs": config.epochs,
            "max_steps": config.max_steps,
            "blocks_per_step": sampler.blocks_per_step,
            "micro_batch_size": run.plan.micro_batch_size,
            "num_processes": world()[1],
            "sharded": is_sharded(run.loaded.model),
            "device": machine["device_name"],
            "num_parameters": run.loaded.num_parameters,
            "num_trained": run.plan.size.num_trained,
            "model_commit": run.loaded.commit,
        },
        "corpus": corpus,
        **({"other_parts": run.loaded.others} if run.loaded.others else {}),
        **({"selection": store.info["selection"]} if "selection" in store.info else {}),
        **run.sources,
        "packing": {
            "num_blocks": sampler.blocks_per_epoch,
            "steps_per_epoch": sampler.steps_per_epoch,
            "padding_share": sampler.padding_share,
        },
        "machine": {**machine, **({"matmul_gflops": cpu_matmul_rates()} if machine["device"] == "cpu" else {})},
        "versions": versions(),
    }


def speed(run: Run, first: StepRecord | None) -> dict[str, Any]:
    """What results.json records of the training's speed; `first` is this command's first step, which may compile."""
    found = rates(run.state.progress, first)
    rate = found["tokens_per_second_after_first_step"] or found["tokens_per_second"]
    return {**found, "utilization": run.plan.utilization(rate / world()[1]) if rate else None}
