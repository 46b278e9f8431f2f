"""What a user names -> what is served: every kind of source, made by real runs and conversions of a tiny model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import chat_model
import pytest
from toy_engine import save_toy_model

from swift_dist.errors import JobError
from swift_dist.serving.sources.source import Source, name_of, named_adapters, resolve_model

SYSTEM = "Be {{ brief }}."
pytestmark = pytest.mark.timeout(900)  # two runs are trained first: minutes on a busy machine
MAIN = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())"]


def command(*words: str | Path) -> None:
    done = subprocess.run(
        [*MAIN, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and runs of it: ``full`` and ``lora`` (with a system message) of two steps each."""
    home = tmp_path_factory.mktemp("home")
    chat_model.save_chat_model(home / "base")
    rows = chat_model.save_rows(home / "rows.jsonl", chat_model.conversations(16))
    for tuner in ("lora", "full"):
        words = ["--tuner_type", tuner, "--max_length", "128", "--train.steps", "2", "--checkpoint.interval", "1"]
        words += ["--nproc_per_node", "1", "--launcher", "torchrun", "--optimizer.lr", "0.01"]
        words += ["--system", SYSTEM] if tuner == "lora" else []
        command("sft", "--model", home / "base", "--dataset", rows, "--output", home / tuner, *words)
    return home


def weights(folder: str | Path, name: str = "model") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / f"{name}.safetensors")


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_model_folder_is_served_as_it_is(home: Path) -> None:
    assert resolve_model(str(home / "base")) == Source("base", "base", str(home / "base"), {}, str(home / "base"))


def test_a_finished_run_is_its_export(home: Path) -> None:
    full, lora = resolve_model(str(home / "full")), resolve_model(str(home / "lora"))
    assert (full.name, full.adapters, Path(full.path).parent) == ("full", {}, home / ".cache" / "serving")
    assert equal(weights(full.path), weights(home / "full" / "model"))
    assert (lora.name, lora.base_name) == ("lora", "base")
    assert Path(lora.path).parent == home / ".cache" / "serving"
    assert equal(weights(lora.path), weights(home / "base"))
    kept = Path(lora.adapters["lora"])
    assert {f.name: f.read_bytes() for f in kept.iterdir()} == {
        f.name: f.read_bytes() for f in (home / "lora" / "adapter").iterdir()
    }


def test_what_a_run_exported_is_kept_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is served, or was, has the weights it was given: a rollback returns to them."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "job.yaml").write_text("{}")
    save_toy_model(run / "model", "first")
    first = resolve_model(str(run))
    assert resolve_model(str(run)) == first
    assert (Path(first.path) / "model.safetensors").samefile(run / "model" / "model.safetensors"), "no second copy"
    shutil.rmtree(run / "model")
    save_toy_model(run / "model", "second")
    second = resolve_model(str(run))
    assert [json.loads((Path(s.path) / "toy.json").read_text())["says"] for s in (first, second)] == ["first", "second"]

    def no_links(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", no_links)
    other = resolve_model(str(run), cache=tmp_path / "other")
    assert Path(other.path).parent == tmp_path / "other" and equal(weights(other.path), weights(second.path))


def test_what_a_run_exported_is_served_where_nothing_can_be_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "job.yaml").write_text("{}")
    save_toy_model(run / "model", "hello")
    (tmp_path / ".cache").write_text("no folder")
    assert resolve_model(str(run)).path == str(run / "model")


def test_a_run_is_asked_with_the_system_message_it_was_trained_with(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Token for token as training's own template writes it: of its adapter, of a step, merged."""
    from transformers import AutoTokenizer

    from swift_dist.config.finetune import TemplateSection
    from swift_dist.data.rows import Row
    from swift_dist.data.templates.template import load_template

    user, answer = {"role": "user", "content": "the moon"}, {"role": "assistant", "content": "is red."}
    own = {"role": "system", "content": "Mine."}

    def trained(*messages: dict[str, str], system: str | None = None) -> list[int]:
        template = load_template(str(home / "base"), TemplateSection(system=system))
        encoded = template.encode(Row((*messages, answer)))
        return encoded.ids[: encoded.weights.argmax()].tolist()

    lora = resolve_model(str(home / "lora"))
    step = resolve_model(str(home / "lora" / "checkpoints" / "step_1"))
    merged = resolve_model(str(home / "lora"), merge_lora=True)
    for source in (lora, step, merged):
        tokenizer = AutoTokenizer.from_pretrained(source.path)
        for messages in ([user], [own, user]):
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ids == trained(*messages, system=SYSTEM)
    assert trained(user, system=SYSTEM) != trained(user)
    assert (Path(lora.path) / "model.safetensors").samefile(home / "base" / "model.safetensors"), "no second copy"
    beside = resolve_model(str(home / "base"), adapters={"a": str(home / "lora")})
    assert beside.path == str(home / "base")
    assert "a was trained with a chat template of its own" in caplog.text


@pytest.mark.parametrize(
    ("tuner", "exported", "file"), [("full", "model", "model"), ("lora", "adapter", "adapter_model")]
)
def test_a_step_is_what_the_run_would_have_exported_there(home: Path, tuner: str, exported: str, file: str) -> None:
    """The last step's weights are the export's bit for bit; an earlier step's are others, under the same names."""
    of_run = weights(home / tuner / exported, file)
    steps = {step: resolve_model(str(home / tuner / "checkpoints" / f"step_{step}")) for step in (1, 2)}
    folders = {step: source.adapters.get("lora", source.path) for step, source in steps.items()}
    assert equal(weights(folders[2], file), of_run)
    assert not equal(weights(folders[1], file), of_run)
    assert weights(folders[1], file).keys() == of_run.keys()
    assert {path.name for path in Path(folders[1]).iterdir()} == {
        path.name for path in (home / tuner / exported).iterdir()
    }
    assert Path(folders[1]).parent == home / ".cache" / "serving"


def test_a_run_that_goes_on_is_its_newest_whole_checkpoint(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "going"
    shutil.copytree(home / "full", run)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running"}))
    assert equal(weights(resolve_model(str(run)).path), weights(home / "full" / "model"))
    next((run / "checkpoints" / "step_2").glob("*.distcp")).write_bytes(b"torn")
    source = resolve_model(str(run))
    assert source.description == f"step 1 of {run}"
    with pytest.raises(JobError, match="is not a whole checkpoint"):
        resolve_model(str(run / "checkpoints" / "step_2"))


def test_what_was_made_is_found_again(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Made once by two at the same time, and once more when the checkpoint's files change."""
    step, cache, found = home / "lora" / "checkpoints" / "step_1", tmp_path / "cache", []
    caplog.set_level("INFO")
    threads = [threading.Thread(target=lambda: found.append(resolve_model(str(step), cache=cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and caplog.text.count("exporting step 1") == 1
    os.utime(step / "common.pt")
    assert resolve_model(str(step), cache=cache).adapters != found[0].adapters
    assert not [path for path in cache.iterdir() if "new" in path.name]


def test_an_adapter_is_merged_when_asked(home: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    source = resolve_model(str(home / "lora"), merge_lora=True)
    assert (source.name, source.base_name, source.adapters) == ("lora", "lora", {})
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    by_peft = peft.PeftModel.from_pretrained(base, home / "lora" / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    merged = AutoModelForCausalLM.from_pretrained(source.path)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, by_peft(ids).logits, rtol=1e-4, atol=1e-4)
    assert (Path(source.path) / "tokenizer.json").is_file()
    beside = resolve_model(str(home / "base"), adapters={"a": str(home / "lora")}, merge_lora=True)
    assert equal(weights(beside.path), weights(source.path)) and beside.name == "base"


def test_an_adapter_that_engines_cannot_load_is_merged_where_it_is_the_model(home: Path, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    dora = peft.get_peft_model(
        base, peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], init_lora_weights=False)
    )
    dora.save_pretrained(tmp_path / "dora")
    source = resolve_model(str(tmp_path / "dora"))
    assert source.adapters == {} and Path(source.path).name.startswith("dora-merged-")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(source.path)(ids).logits
        torch.testing.assert_close(merged, dora.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    named = resolve_model(str(home / "base"), adapters={"d": str(tmp_path / "dora")})  # the engine says whether it can
    assert named.adapters == {"d": str(tmp_path / "dora")}


def test_a_megatron_checkpoint_is_converted(home: Path, tmp_path: Path) -> None:
    command("convert", "hf-to-megatron", home / "base", tmp_path / "mega", "--workers", "1")
    source = resolve_model(str(tmp_path / "mega"))
    assert equal(weights(source.path), weights(home / "base"))
    assert (Path(source.path) / "tokenizer.json").is_file() and source.name == "mega"
    with pytest.raises(JobError, match="tokenizer: there is no"):
        resolve_model(str(tmp_path / "mega"), tokenizer=str(tmp_path / "none"))
    (tmp_path / "mega" / ".metadata").write_bytes(b"torn")
    with pytest.raises(JobError):
        resolve_model(str(tmp_path / "mega"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer: .* holds no tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no .*safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "model.safetensors",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").unlink(), "weights but no config.json"),
        (lambda f: _change(f, architectures=["LlamaForSequenceClassification"]), "scores text and generates none"),
        (lambda f: _change(f, auto_map={"AutoModel": "m.M"}, model_type="mine"), "code of its own"),
    ],
)
def test_a_folder_that_would_fail_late_or_answer_nonsense_is_refused(
    home: Path, tmp_path: Path, change: Any, message: str
) -> None:
    shutil.copytree(home / "base", tmp_path / "broken")
    change(tmp_path / "broken")
    with pytest.raises(JobError, match=message):
        resolve_model(str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("config", "modules", "task"),
    [
        ({}, None, "generate"),
        ({}, '[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]', "embed"),
        ({}, '[{"type": "sentence_transformers.sparse_encoder.models.SpladePooling"}]', "generate"),
        ({}, '{"somebody": "elses"}', "generate"),
        ({"architectures": ["LlamaModel"]}, None, "embed"),
        ({"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"}, None, "embed"),
        ({"architectures": ["LlamaModel"], "auto_map": {"AutoModel": "m.M"}}, None, "generate"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, None, "generate"),
        ({"architectures": None}, None, "generate"),
    ],
)
def test_a_model_is_for_embeddings_where_its_folder_is_certain_of_it(
    tmp_path: Path, config: dict[str, Any], modules: str | None, task: str
) -> None:
    folder = save_toy_model(tmp_path / "model", "hello")
    _change(folder, **config)
    if modules is not None:
        (folder / "modules.json").write_text(modules)
    assert resolve_model(str(folder)).task == task
    assert resolve_model(str(folder), task="generate").task == "generate"
    assert resolve_model(str(folder), task="embed").task == "embed"


def test_what_fills_gaps_generates_no_text(tmp_path: Path) -> None:
    folder = save_toy_model(tmp_path / "model", "hello")
    _change(folder, architectures=["BertForMaskedLM"], model_type="bert")
    with pytest.raises(JobError, match=r"fills gaps in text(?s:.)*--task embed"):
        resolve_model(str(folder))
    assert resolve_model(str(folder), task="embed").task == "embed"


def _shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def _change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_names_that_are_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for named, message in [
        (str(home / "lor"), f"did you mean {home / 'lora'}"),
        (str(tmp_path / "x" / "y"), "there is no"),
        (str(home / "rows.jsonl"), "is a file"),
        (str(home), "name one of its runs"),
        ("owner/name", "could not be had from the Hugging Face hub: it is not in the local cache"),
    ]:
        with pytest.raises(JobError, match=message):
            resolve_model(named)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "job.yaml").write_text("task: sft\n")
    with pytest.raises(JobError, match="has no checkpoint yet"):
        resolve_model(str(tmp_path / "run"))


def test_adapters_that_cannot_be(home: Path, tmp_path: Path) -> None:
    base, lora = str(home / "base"), str(home / "lora")
    with pytest.raises(JobError, match="is a model, not an adapter"):
        resolve_model(base, adapters={"a": base})
    with pytest.raises(JobError, match="what the model itself is called"):
        resolve_model(base, adapters={"base": lora})
    with pytest.raises(JobError, match="there is no adapter to merge"):
        resolve_model(base, merge_lora=True)
    with pytest.raises(JobError, match="a, b: only one can be merged"):
        resolve_model(base, adapters={"a": lora, "b": lora}, merge_lora=True)
    gone = tmp_path / "gone"
    gone.mkdir()
    for file in (home / "lora" / "adapter").iterdir():
        (gone / file.name).write_bytes(file.read_bytes())
    config = json.loads((gone / "adapter_config.json").read_text())
    (gone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(JobError, match=r"the base of the adapter .* is not here"):
        resolve_model(str(gone))
    assert resolve_model(base, adapters={"a": str(gone)}).adapters == {"a": str(gone)}
    (gone / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(JobError, match="is not a whole weight file"):
        resolve_model(base, adapters={"a": str(gone)})


def test_names_of_adapters(home: Path) -> None:
    assert named_adapters([f"a={home}/x=y", str(home / "lora" / "adapter")]) == {
        "a": f"{home}/x=y",
        "lora": str(home / "lora" / "adapter"),
    }
    assert named_adapters(["poems@2:b+c=x"]) == {"poems@2:b+c": "x"}  # as the control API takes them
    for words in (["a=x", "a=y"], ["../a=x"], ["=x"], ["a b=x"]):
        with pytest.raises(JobError, match="adapters"):
            named_adapters(words)
    assert name_of(str(home / "lora" / "checkpoints" / "step_1")) == "lora" and name_of("owner/Name-1") == "Name-1"


def test_models_of_the_hub_are_found_in_its_cache(home: Path, tmp_path: Path) -> None:
    """By id, branch and commit, without a network: in a process of its own, since the hub's place is read at import."""
    folder = tmp_path / "hf" / "hub" / "models--owner--name"
    for commit, ref in (("a" * 40, "main"), ("b" * 40, "trial")):
        shutil.copytree(home / "base", folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    code = """
import sys
from swift_dist.errors import JobError
from swift_dist.serving.sources.source import resolve_model
for named in sys.argv[1:]:
    try:
        source = resolve_model(named)
        print(source.name, source.path)
    except JobError as error:
        print(error.key, error.message)
"""
    asked = ["owner/name", "owner/name@trial", "owner/name@" + "b" * 40, "owner/name@none", "owner/other"]
    place = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}  # where nothing listens
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], env={**clean, **place}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    snapshots = folder / "snapshots"
    assert said[:3] == [f"name {snapshots / ('a' * 40)}", *[f"name {snapshots / ('b' * 40)}"] * 2]
    for line, named in zip(said[3:], asked[3:], strict=True):
        assert line.startswith(f"model {named} is no folder here and could not be had from the Hugging Face hub")
        assert "it is not in the local cache, and http://127.0.0.1:9 does not answer" in line
