"""`train --mix`: several stores and domains in shares; resumed to the bit; what cannot be mixed is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import FLAGS, Left, assert_same_run, start, terminate

from cartilha.blocks.mixing import MixtureSampler
from cartilha.config import ExploreConfig, InspectConfig, PrepareConfig, ReportConfig, TrainConfig
from cartilha.errors import CheckFailedError, InterruptedRunError, UserError
from cartilha.explorer.session import Answers
from cartilha.explorer.wording import PageWording
from cartilha.pipeline.explore import explore, open_explorer
from cartilha.pipeline.inspect import inspect
from cartilha.pipeline.prepare import prepare
from cartilha.pipeline.report import report
from cartilha.runs.sources import Mix, sources_of
from cartilha.tokens.store import TokenStore


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of twelve documents, of two domains."""
    folder = tmp_path_factory.mktemp("english")
    rows = [
        {"text": f"The {n} " + "cat sat on the mat " * (1 + n % 3), "domain": ["news", "wiki"][n % 2]}
        for n in range(12)
    ]
    (folder / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(PrepareConfig(input=(str(folder / "en.jsonl"),), model="random:tiny", output=str(folder / "store")))
    return folder / "store"


@pytest.fixture(scope="module")
def settings(english: Path) -> dict[str, Any]:
    """Three sources, whose shares change after step 7 of 12."""
    news = f"{english}::news"
    mixture = {"mix": (f"{english}=0.25", f"{news}=5%"), "mix_end": (f"{news}=0.5",), "mix_end_fraction": 0.4}
    return {**mixture, "max_steps": 12, "checkpoint_steps": 3, "keep_last": 9, "keep_optimizer": True}


@pytest.fixture(scope="module")
def mixed(store: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Left:
    path = tmp_path_factory.mktemp("mixed") / "run"
    start(store, path, **settings)
    return Left(path)


def test_the_record_has_each_source_with_what_was_read_of_it_in_its_share(mixed, store, english, tmp_path):
    rows = mixed.results["sources"]
    assert [(row["store"], row["domain"]) for row in rows] == [
        (str(store), None),
        (str(english), None),
        (str(english), "news"),
    ]
    assert [row["share"] for row in rows] == [0.7, 0.25, 0.05]
    assert [row["end_share"] for row in rows] == [0.5, 0, 0.5]
    counts = TokenStore(english).counts["train"]
    assert rows[1]["num_documents"] + rows[2]["num_documents"] == counts.num_documents
    assert rows[1]["num_tokens"] + rows[2]["num_tokens"] == counts.num_tokens
    assert sum(row["tokens_read"] for row in rows) == 12 * 128
    longest = max(TokenStore(path).documents("train").num_tokens.max() for path in (store, english)) + 2
    for row in rows:
        due = 128 * (7 * row["share"] + 5 * row["end_share"])
        assert abs(row["tokens_read"] - due) <= longest
        assert row["passes"] == pytest.approx(row["tokens_read"] / (row["num_tokens"] + 2 * row["num_documents"]))
    assert mixed.results["corpus"]["num_train_tokens"] == TokenStore(store).counts["train"].num_tokens
    assert rows[2]["passes"] > 1
    page = report(ReportConfig(runs=(str(mixed.path),), output=str(tmp_path / "report.html"), language="en"))
    shown = Path(page.report).read_text(encoding="utf-8")
    assert f"{english}::news</td>" in shown and f"50 % {english}::news, in the last 40 % of the steps" in shown
    card = (mixed.path / "model" / "README.md").read_text(encoding="utf-8")
    shown = f"| {rows[2]['documents_read']} | {rows[2]['tokens_read']:,} | {rows[2]['passes']:.2f} |"
    assert f"| `{english.parent.name}/store::news` {shown}\n" in card and str(english) not in card
    assert any(f"{english}::news is used up after step" in notice for notice in mixed.results["notices"])


@pytest.mark.parametrize("step", [2, 8])
def test_interrupted_and_resumed_equals_unbroken(mixed, store, settings, tmp_path, during_step, step):
    during_step({step: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", **settings)
    start(store, tmp_path / "run", **settings, resume="auto")
    run = Left(tmp_path / "run")
    assert run.results["resumed_from_step"] == [step]
    assert_same_run(run, mixed)
    assert run.results["sources"] == mixed.results["sources"]


def test_a_resume_needs_the_same_texts_in_the_same_shares_wherever_they_lie(mixed, store, english, settings, tmp_path):
    shutil.copytree(mixed.path, tmp_path / "run")
    moved = shutil.copytree(english, tmp_path / "moved")
    changed = {
        name: [entry.replace(str(english), str(moved)) for entry in settings[name]] for name in ("mix", "mix_end")
    }
    start(store, tmp_path / "run", **{**settings, **changed}, resume="auto")  # there is nothing to do
    with pytest.raises(UserError) as error:
        start(store, tmp_path / "run", **{**settings, "mix": (f"{english}=0.3",)}, resume="auto")
    before = f"mix was 70 % {store}, 25 % {english}, 5 % {english}::news, now 70 % {store}, 30 % {english}"
    assert f"cannot go on with other settings ({before}); " in str(error.value)
    with pytest.raises(UserError, match=r"cannot go on with other settings.*mix_end_fraction was 0\.4, now 0.5"):
        start(store, tmp_path / "run", **{**settings, "mix_end_fraction": 0.5}, resume="auto")
    with pytest.raises(UserError, match=r"other settings.*news, now None; mix_end was .* 40 % of the"):
        start(store, tmp_path / "run", max_steps=12, resume="auto")
    shutil.rmtree(moved)
    start(store, tmp_path / "run", **{**settings, **changed}, resume="auto")  # as after any other removed store


def test_the_mixture_of_the_end_of_a_copy_that_decays_begins_at_its_checkpoint(store, english, tmp_path):
    common = {"mix": (f"{english}=0.1",), "warmup_fraction": 0.5}
    start(store, tmp_path / "trunk", **common, max_steps=20, schedule="wsd", checkpoint_steps=16, keep_optimizer=True)
    checkpoint = str(tmp_path / "trunk" / "checkpoints" / "step-00000016")
    ends = {"mix_end": (f"{english}=0.9",), "decay_from": checkpoint}
    with pytest.raises(UserError, match="leave out --mix_end_fraction"):
        start(store, tmp_path / "run", **common, **ends, mix_end_fraction=0.4)
    start(store, tmp_path / "run", **common, **ends)
    trunk, run = Left(tmp_path / "trunk"), Left(tmp_path / "run")
    assert run.losses[:16] == trunk.losses[:16] and run.results["steps"] == 18
    longest = TokenStore(english).documents("train").num_tokens.max() + 2
    assert abs(run.results["sources"][1]["tokens_read"] - 128 * (16 * 0.1 + 2 * 0.9)) <= longest


def test_domains_of_one_store_alone_are_mixed(english, tmp_path):
    halves = (f"{english}::news=0.5", f"{english}::wiki=0.5")
    result = start(english, tmp_path / "run", mix=halves, epochs=2, skip_checks=True)  # the texts are near-duplicates
    news, wiki = result["sources"]
    assert (news["domain"], wiki["domain"]) == ("news", "wiki")
    steps = result["packing"]["steps_per_epoch"]
    assert result["steps"] == 2 * steps
    counts = TokenStore(english).counts["train"]
    assert steps == -(-(counts.num_tokens + 2 * counts.num_documents) // 128)  # both together are read once


def test_what_the_first_store_holds_out_is_not_read_from_another(store, corpus, tmp_path):
    other = tmp_path / "other"
    prepare(PrepareConfig(input=(str(corpus),), model="random:tiny", output=str(other), validation_first=1))
    held_out = set(TokenStore(store).labels("validation", ("text_hash",))["text_hash"])
    known = held_out & set(TokenStore(other).labels("train", ("text_hash",))["text_hash"])
    assert known
    result = start(store, tmp_path / "run", mix=(f"{other}=0.5",), max_steps=1)
    assert result["sources"][1]["num_left_out"] == len(known)
    assert result["sources"][1]["num_documents"] == TokenStore(other).counts["train"].num_documents - len(known)
    assert any("held out by --store for validation, and therefore not read" in one for one in result["notices"])


def test_near_duplicates_of_the_held_out_text_in_another_store_are_said(store, tmp_path):
    pytest.importorskip("rensa", reason="needs the extra text")
    held_out = list(TokenStore(store).texts("validation"))
    others = [f"Outro assunto, o {number}." for number in range(3)]
    (tmp_path / "near.txt").write_text("\n".join([*(f"{text} Fim." for text in held_out), *others]), encoding="utf-8")
    other = tmp_path / "near"
    prepare(PrepareConfig(input=(str(tmp_path / "near.txt"),), model="random:tiny", output=str(other)))
    with pytest.raises(CheckFailedError, match=r"near-duplicate among \d+ training documents of 2 stores"):
        start(store, tmp_path / "run", mix=(f"{other}=0.3",), max_steps=1)


def test_a_plan_says_how_often_each_source_is_read(cartilha, refused, store, english):
    plan = ["plan", "--model", "random:tiny", "--device", "t4", "--epochs", 2, "--skip_probe"]
    found = json.loads(cartilha(*plan, "--store", store, "--mix", f"{english}::news=25%", "--json").out)
    first, second = found["sources"]
    assert (first["source"], second["source"]) == (str(store), f"{english}::news")
    assert first["passes"] == pytest.approx(2, rel=0.01) and second["passes"] > 2
    assert second["tokens_read"] == pytest.approx(found["train_tokens"] / 4, abs=1)
    assert found["train_tokens"] == pytest.approx(first["tokens_read"] / 0.75, abs=2)
    outcome = cartilha(*plan, "--store", store, "--mix", f"{english}::news=25%")
    assert outcome.code == 0 and f"{second['passes']:.2f}" in outcome.out
    assert "--mix needs the store that gets the rest" in refused(*plan, "--mix", f"{english}=0.1")


def test_a_block_of_a_mixture_is_the_one_that_training_reads(refused, mixed, store, english, settings):
    mix = settings["mix"]
    asked = InspectConfig(what=str(store), block=5, block_size=32, mix=mix)
    block = inspect(asked).block
    sources = sources_of(TrainConfig(store=str(store), mix=mix))
    documents = Mix.open(sources, TokenStore(store)).documents
    sampler = MixtureSampler(documents, block_size=32, blocks_per_step=4, seed=0)
    tokenizer = TokenStore(store).tokenizer()
    text = "".join(segment["text"] for segment in block["segments"])
    assert text == tokenizer.decode(sampler.blocks(1)[0].input_ids)  # the first of the second step
    names = {segment["doc_id"].rpartition(": ")[0] for page in range(1, 9) for segment in
             inspect(replace(asked, block=page)).block["segments"]}  # fmt: skip
    assert names == {str(store), str(english)}
    assert "say which one with --block" in refused("inspect", store, "--mix", *mix)
    assert "nowhere does not exist" in refused("inspect", store, "--block", 1, "--mix", "nowhere=0.5")


def test_the_explorer_shows_the_blocks_of_a_mixture(store, english):
    mix = (f"{english}=0.25",)
    explorer = open_explorer(ExploreConfig(store=str(store), mix=mix))
    names = set[str]()
    for number in range(1, 9):
        block = explorer.walk.block(number - 1, 64, seed=3)
        asked = inspect(InspectConfig(what=str(store), block=number, mix=mix, block_size=64, seed=3)).block
        assert block.num_blocks == asked["num_blocks"]
        assert [segment.name for segment in block.segments] == [row["doc_id"] for row in asked["segments"]]
        names.update(segment.name.split(": ")[0] for segment in block.segments)
    assert names == {str(store), str(english)}
    last, next_one = explorer.walk.block(10**6, 64, seed=3), explorer.walk.block(0, 64, seed=3, epoch=1)
    assert last.segments[-1].ends or last.segments[-1].name == next_one.segments[0].name  # the stream goes on
    assert f"{store}: " in Answers(explorer, PageWording("en")).block(1, 64, 3, 1).shown
    with pytest.raises(UserError, match="name it with --store"):
        explore(ExploreConfig(mix=mix))


def test_a_run_of_one_store_records_no_sources(unbroken):
    assert "sources" not in unbroken.results


BAD = {
    "{en}": "--mix takes STORE=SHARE or STORE::DOMAIN=SHARE, such as english=0.05, not '{en}'.",
    "{en}=much": "A share of --mix is a number above 0, at most 1, such as 0.05 or 5%, not '{en}=much'.",
    "{en}=0": "A share of --mix is a number above 0, at most 1, such as 0.05 or 5%, not '{en}=0'.",
    "{en}=0.6 {pt}=0.6": "The shares of --mix add up to 1.2 and not to 1; correct one of them (leave out {pt}, which",
    "{en}=0.05 {pt}=0.9": "The shares of --mix add up to 0.95 and not to 1; correct one of them (leave out {pt}, which",
    "{en}=0.6 {en}::news=0.6": "The shares of --mix add up to 1.2 and not to 1; correct one of them (--store gets what",
    "{en}=1": "The shares of --mix leave nothing for --store {pt}, whose reading is an epoch.",
    "{en}=0.1 {en}/.=0.2": "--mix names {en}/. twice; give it one share.",
    "nowhere=0.1": "nowhere does not exist; make one with: cartilha prepare",
    "{en}::blog=0.1": "The store {en} has no training documents of the domain 'blog'; it has news, wiki.",
    "{en}::news=0.1 {en}::wiki=0.1 {en}=0.1": "The source {en} has no training documents of its own; leave it out.",
}


@pytest.mark.parametrize("mix", BAD)
def test_what_cannot_be_mixed_is_refused(refused, store, english, tmp_path, mix):
    stores = {"pt": store, "en": english}
    words = [word.format_map(stores) for word in mix.split()]
    said = refused("train", *FLAGS, "--store", store, "--output", tmp_path / "run", "--mix", *words)
    assert said.startswith(BAD[mix].format_map(stores))
    assert not (tmp_path / "run").exists()


def test_stores_that_do_not_go_together_are_refused(refused, store, english, corpus, opt_tokenizer, tmp_path):
    arguments = ["train", *FLAGS, "--store", store, "--output", tmp_path / "run"]
    copy = shutil.copytree(english, tmp_path / "copy")
    assert "hold the same training text; name it once." in refused(*arguments, "--mix", f"{english}=0.1", f"{copy}=0.1")
    prepare(PrepareConfig(input=(str(corpus),), model=str(opt_tokenizer), output=str(tmp_path / "opt")))
    assert "were made with different tokenizers" in refused(*arguments, "--mix", f"{tmp_path}/opt=0.1")
    said = refused(*arguments, "--mix_end", f"{english}=0.1", "--time_budget", "1m")
    assert said.startswith("--mix_end needs to know the last step")
    for fraction in ("2", "0"):
        said = refused(*arguments, "--mix_end", f"{english}=0.1", "--mix_end_fraction", fraction)
        assert said.startswith("--mix_end_fraction must be a number above 0 and at most 1")
    assert "--mix_end, which are missing" in refused(*arguments, "--mix_end_fraction", "0.5")
    domains = (f"{english}::news=0.3", f"{english}::wiki=0.3")
    said = refused("train", *FLAGS, "--store", english, "--output", tmp_path / "run", "--mix", *domains)
    assert "besides those of its domains that are named, and it is --store, which gets the rest" in said


def test_what_is_planned_of_each_source_is_said_before_step_1(cartilha, store, english, tmp_path):
    arguments = ["--store", store, "--output", tmp_path / "run", "--mix", f"{english}=0.5", "--max_steps", 1]
    outcome = cartilha("train", *FLAGS, *arguments, "--patience", 3)
    assert outcome.code == 0
    assert "so --patience 3 cannot end this training early" in outcome.err
    assert f"Source {store} (" in outcome.err and "): 50 % of the tokens, " in outcome.err
    assert "An epoch is " in outcome.err and "in which --store is read once" in outcome.err


def test_a_job_refuses_a_mixture_before_it_prepares_anything(refused, english, corpus, tmp_path):
    train = f"train:\n  mix: ['{english}=0.6', nowhere=0.1]\n"
    job = f"model: random:tiny\noutput: {tmp_path}/job\nprepare:\n  input: ['{corpus}']\n{train}"
    (tmp_path / "recipe.yaml").write_text(job)
    assert "nowhere does not exist" in refused("run", tmp_path / "recipe.yaml")
    said = refused("run", tmp_path / "recipe.yaml", "--train.mix", f"{english}=2")
    assert said.startswith("A share of --train.mix is a number above 0, at most 1")
    assert not (tmp_path / "job").exists()
