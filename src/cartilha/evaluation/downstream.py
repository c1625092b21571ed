"""Downstream tasks: handed to lm-evaluation-harness (extra `eval`), whose results are put beside ours."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from cartilha.corpus.questions import Question, is_task_file, record_texts
from cartilha.errors import UserError, first_line, log
from cartilha.evaluation.task_scores import TaskScore, harness_scores
from cartilha.languages import find_language, language_codes
from cartilha.model.load import LoadedModel
from cartilha.model.packed_or_rows import transformers_attention
from cartilha.tokens.tokenizer import TextTokenizer

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow", "pandas")  # a dataset_path that names the kind of files


def expand(tasks: Sequence[str]) -> list[str]:
    """The tasks, with those of a built-in language in the place of its code; each once."""
    return list(dict.fromkeys(task for name in tasks for task in _of_language(name) or (name,)))


def _of_language(name: str) -> tuple[str, ...]:
    return find_language(name).tasks if name in language_codes() else ()


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that the harness does not have, before any model is loaded."""
    named = [task for task in expand(tasks) if not is_task_file(task)]
    if not named:
        return
    manager = _manager(True)
    unknown = [task for task in named if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them.")


def task_questions(tasks: Sequence[str]) -> Iterator[Question]:
    """What the harness's tasks ask, a record each; a UserError says that it has no such task, or not the dataset."""
    try:
        check_tasks(tasks)
    except UserError as error:
        raise UserError(f"{tasks[0]} is neither a file that is there nor a task: {error}") from None
    try:
        for name, task in _load_tasks(_as_harness(expand(tasks))).items():
            for number, record in enumerate(task.eval_docs, 1):
                yield Question(name, f"{name}:{number}", tuple(record_texts(record)))
    except Exception as error:  # the harness and `datasets` have no class of their own
        raise _cannot_run(tasks, error) from error


@cache
def _manager(include_defaults: bool) -> Any:
    """The harness's list of its tasks, for which it reads thousands of files; empty where only files are named."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def datasets_of(tasks: Sequence[str]) -> list[str]:
    """The datasets of the hub that tasks read, as far as the harness tells before it reads them."""
    manager = _manager(any(not is_task_file(task) for task in expand(tasks)))
    found: dict[str, None] = {}
    left = _as_harness(expand(tasks))
    while left:
        task = left.pop(0)
        settings = getattr(manager.task_index.get(task), "cfg", None) if isinstance(task, str) else task
        if not isinstance(settings, Mapping):  # a release that does not say
            continue
        parts = settings.get("task")
        left += parts if isinstance(parts, list) else []
        name = settings.get("dataset_path")
        if name and name not in LOCAL_FORMATS and not os.path.exists(name):
            found[name] = None
    return list(found)


def _load_tasks(tasks: list[Any]) -> dict[str, Any]:
    """The harness's tasks by name, those of groups each by itself."""
    from lm_eval.tasks import get_task_dict

    manager = _manager(any(isinstance(task, str) for task in tasks))
    if hasattr(manager, "load"):
        return dict(manager.load(tasks)["tasks"])
    found, loaded = [get_task_dict(tasks, manager)], {}  # older releases nest groups
    while found:
        for name, task in found.pop().items():
            if isinstance(task, Mapping):
                found.append(task)
            else:
                loaded[str(name)] = task
    return loaded


def _as_harness(tasks: Sequence[str]) -> list[Any]:
    return [yaml.safe_load(Path(task).read_text("utf-8")) if is_task_file(task) else task for task in tasks]


def _cannot_run(tasks: Sequence[str], error: Exception) -> UserError:
    needed = ", ".join(datasets_of(tasks))
    return UserError(
        f"lm-evaluation-harness could not run {', '.join(tasks)} ({first_line(error)[:200]}); "
        f"its tasks need their datasets from the hub{f': {needed}' if needed else ''}."
    )


def run_tasks(loaded: LoadedModel, tokenizer: TextTokenizer, tasks: Sequence[str]) -> tuple[TaskScore, ...] | None:
    """The harness's scores of tasks (names or YAML files, already checked), or None without tasks.

    The model's attention is switched to transformers' own meanwhile, and back. A UserError says why the harness could
    not run them (as a rule a dataset of the hub that cannot be reached).
    """
    if not tasks:
        return None
    if needed := datasets_of(tasks):
        log.info("The tasks read datasets of the hub; what is not on this machine is fetched: %s.", ", ".join(needed))
    tasks = expand(tasks)
    import lm_eval
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    # Two messages that mean nothing here: a model is given as an object, and "fatal: not a git repository".
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    lm_eval.evaluator.get_git_commit_hash = str
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    special = {name: tokenizer.backend.id_to_token(i) for name, i in names.items() if i is not None}
    with transformers_attention(loaded.model):
        try:
            harness = HFLM(
                pretrained=loaded.model,
                tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **special),
                max_length=loaded.context_length,
                add_bos_token=False,
                batch_size=8,
            )
            for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                quiet = bool(os.environ.get("TQDM_DISABLE"))  # the harness overrides it
                setattr(harness, request, partial(getattr(harness, request), disable_tqdm=quiet))
            results = lm_eval.simple_evaluate(
                model=harness,
                tasks=_as_harness(tasks),
                task_manager=_manager(any(not is_task_file(task) for task in tasks)),
                bootstrap_iters=1000,
            )
        except Exception as error:
            raise _cannot_run(tasks, error) from error
    assert results is not None
    return tuple(harness_scores(results))
