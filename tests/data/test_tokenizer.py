"""Training a tokenizer, and loading any so that workers give the ids that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from swift_dist.data.tokenizer import TrainTokenizerOptions, render, train_tokenizer
from swift_dist.data.tokenizer_files import load_tokenizer
from swift_dist.errors import JobError
from tests.data.corpora import compress, jsonl, texts


def train(source: Path, output: Path, **more: object) -> dict:
    given = {"input": [str(source)], "output": str(output), "vocab_size": 400, **more}
    return train_tokenizer(TrainTokenizerOptions.model_validate(given))


def test_trained_tokenizer_loads_in_transformers_and_loses_nothing(tmp_path: Path) -> None:
    documents = texts(100)
    (tmp_path / "c.jsonl").write_bytes(jsonl(documents) + b"{half\n")
    result = train(tmp_path / "c.jsonl", tmp_path / "deep" / "tok", vocab_size=320)
    assert result["documents"] == 100 and result["skipped"] == 1 and result["vocab_size"] == 320
    assert "320 tokens" in render(result)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "deep" / "tok")
    assert loaded.eos_token == "<|endoftext|>" and len(loaded) == 320
    for text in [*documents, "日本語 \x00 \ud7ff 🙂🙂  \n\n", "<unseen>"]:
        ids = loaded(text)["input_ids"]
        assert loaded.decode(ids) == text
        assert max(ids, default=0) < 320
    own = load_tokenizer(str(tmp_path / "deep" / "tok"))
    assert own.eos_id == loaded.eos_token_id and own.vocab_size == 320 and not own.appends_eos
    with pytest.raises(JobError, match="exists"):
        train(tmp_path / "c.jsonl", tmp_path / "deep" / "tok")
    train(tmp_path / "c.jsonl", tmp_path / "deep" / "tok", overwrite=True, eos_token="</s>")
    assert load_tokenizer(str(tmp_path / "deep" / "tok")).eos_id == 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tok"]


def test_training_is_deterministic_and_may_take_a_sample(tmp_path: Path) -> None:
    raw = jsonl(texts(1500, longest=600))
    (tmp_path / "c.jsonl").write_bytes(raw)
    (tmp_path / "c.jsonl.gz").write_bytes(compress(raw, ".gz"))
    for name in ("a", "b"):
        train(tmp_path / "c.jsonl", tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    for source in ("c.jsonl", "c.jsonl.gz"):
        result = train(tmp_path / source, tmp_path / f"s_{source}", max_megabytes=1)
        assert 400_000 < result["text_bytes"] < 1_100_000
    with pytest.raises(JobError, match="no document"):
        train(tmp_path / "c.jsonl", tmp_path / "none", text_key="other")
    assert not (tmp_path / "none").exists()


def save(folder: Path, tokenizer: str, **settings: object) -> str:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((Path(tokenizer) / "tokenizer.json").read_bytes())
    plain = json.loads((Path(tokenizer) / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**plain, **settings}))
    return str(folder)


VARIANTS: dict[str, dict] = {
    "plain": {},
    "adds bos": {"bos_token": "<|endoftext|>", "add_bos_token": True},
    "adds eos": {"add_eos_token": True},
    "a token that only the configuration has": {"additional_special_tokens": ["<|new|>"]},
    "another class": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "an older class": {"tokenizer_class": "Qwen2TokenizerFast"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_are_those_of_transformers(tmp_path: Path, tokenizer: str, name: str) -> None:
    path = save(tmp_path / "tok", tokenizer, **VARIANTS[name])
    reference = AutoTokenizer.from_pretrained(path)
    loaded = load_tokenizer(path)
    own = Tokenizer.from_str(loaded.text)
    for text in [*texts(40), "<|new|> x <|endoftext|>", "it's  12345\u3000"]:
        assert own.encode(text).ids == reference(text)["input_ids"]
    assert loaded.vocab_size == len(reference)
    assert loaded.appends_eos == (reference("a")["input_ids"][-1] == reference.eos_token_id)
    assert loaded.eos_id == reference.eos_token_id


def test_truncation_and_padding_of_a_tokenizer_file_do_not_cut_documents(tmp_path: Path, tokenizer: str) -> None:
    changed = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    long = "a b c " * 50
    whole = changed.encode(long).ids
    changed.enable_truncation(8)
    changed.enable_padding(length=16)
    changed.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.from_str(load_tokenizer(str(path)).text).encode(long).ids == whole


def test_a_template_that_ends_texts_itself_gives_one_end(tmp_path: Path, tokenizer: str) -> None:
    from swift_dist.data.prepare import PrepareOptions, prepare
    from tests.data.corpora import stored

    changed = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    eos = changed.token_to_id("<|endoftext|>")
    changed.post_processor = processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[("<|endoftext|>", eos)])
    path = save(tmp_path / "tok", tokenizer)
    changed.save(f"{path}/tokenizer.json")
    (tmp_path / "c.jsonl").write_bytes(jsonl(["some words"]))
    for add, ends in ((True, 1), (False, 1)):
        prepare(
            PrepareOptions(
                input=(str(tmp_path / "c.jsonl"),),
                output=str(tmp_path / f"out{add}"),
                tokenizer=path,
                append_eod=True,
                add_special_tokens=add,
            )
        )
        (row,) = stored(tmp_path / f"out{add}")
        assert row.count(eos) == ends and row[-1] == eos


def test_no_eos(tmp_path: Path, tokenizer: str) -> None:
    from swift_dist.data.prepare import PrepareOptions, prepare

    (tmp_path / "tokenizer.json").write_bytes((Path(tokenizer) / "tokenizer.json").read_bytes())
    (tmp_path / "c.jsonl").write_bytes(jsonl(["some words"]))
    given = {"input": (str(tmp_path / "c.jsonl"),), "output": str(tmp_path / "out"), "append_eod": True}
    given["tokenizer"] = str(tmp_path / "tokenizer.json")
    with pytest.raises(JobError, match="does not say which token ends a text") as caught:
        prepare(PrepareOptions(**given))
    assert "--eod_token" in caught.value.remedy
    assert prepare(PrepareOptions(**given, eod_token="<|endoftext|>"))["documents"] == 1


def test_a_job_with_a_broken_tokenizer_is_refused_and_another_one_noticed(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    from swift_dist.advice import _about_the_tokenizer
    from swift_dist.config import DatasetEntry, JobConfig
    from swift_dist.resolve import _check_tokenizer

    for name in "ab":
        Tokenizer(models.WordLevel({name: 0}, name)).save(str(tmp_path / f"{name}.json"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text('{"broken')
    for suffix in ("bin", "idx"):
        (tmp_path / f"data.{suffix}").touch()
    facts = {
        "outputs": {"bin": {"bytes": 0}, "idx": {"bytes": 0}},
        "tokenizer": {"path": "a.json", "sha256": load_tokenizer(str(tmp_path / "a.json")).sha256},
    }
    (tmp_path / "data.manifest.json").write_text(json.dumps(facts))

    def check(tokenizer: str) -> list[str]:
        plain = JobConfig()
        model = plain.model.model_copy(update={"tokenizer": tokenizer})
        data = plain.data.model_copy(update={"train": (DatasetEntry(path=str(tmp_path / "data")),)})
        job = plain.model_copy(update={"model": model, "data": data})
        _check_tokenizer(job)
        return list(_about_the_tokenizer(job))

    assert check(str(tmp_path / "a.json")) == check("owner/name") == []
    (warning,) = check(str(tmp_path / "b.json"))
    assert "does not look like the one that" in warning and "a.json" in warning
    wrong = {"bad": "not a readable tokenizer", "none": "there is no"}
    for name, says in wrong.items():
        with pytest.raises(JobError, match=says) as caught:
            check(str(tmp_path / name))
        assert caught.value.key == "model.tokenizer"
    (tmp_path / "data.manifest.json").unlink()
    assert check(str(tmp_path / "b.json")) == []
