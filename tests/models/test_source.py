from __future__ import annotations

import json
from pathlib import Path

import pytest

from swift_dist import plugins
from swift_dist.config import ModelSection
from swift_dist.errors import JobError
from swift_dist.models import find_family, model_folder, read_hf_config


def refusal(call, *arguments, **keywords) -> JobError:
    with pytest.raises(JobError) as caught:
        call(*arguments, **keywords)
    return caught.value


def test_config_inline_and_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_hf_config(ModelSection(path=str(tmp_path))) == {"model_type": "llama"}
    assert read_hf_config(ModelSection(config={"model_type": "qwen2"})) == {"model_type": "qwen2"}
    assert model_folder(str(tmp_path), weights=True) == tmp_path


def test_config_refusals(tmp_path: Path) -> None:
    assert "neither" in str(refusal(read_hf_config, ModelSection()))
    assert "no folder" in str(refusal(read_hf_config, ModelSection(path=str(tmp_path / "absent"))))
    assert "no config.json" in str(refusal(read_hf_config, ModelSection(path=str(tmp_path))))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "swift-dist merge" in str(refusal(read_hf_config, ModelSection(path=str(tmp_path))))
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in str(refusal(read_hf_config, ModelSection(path=str(tmp_path))))
    assert "is a file" in str(refusal(read_hf_config, ModelSection(path=str(tmp_path / "config.json"))))


def test_hub_failure_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*arguments: object, **keywords: object) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refusal(read_hf_config, ModelSection(path="someone/some-model"))
    assert error.key == "model.path" and "no route to host" in str(error) and "second line" not in str(error)
    assert "could not be fetched" in str(refusal(model_folder, "someone/some-model", weights=True))


def test_code_from_a_model_folder_is_refused_unless_allowed() -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling.X"}}
    assert "trust_remote_code" in str(refusal(read_hf_config, ModelSection(config=config)))
    assert read_hf_config(ModelSection(config=config, trust_remote_code=True)) == config


def test_find_family() -> None:
    assert find_family({"model_type": "qwen3"}).name == "qwen3"
    assert find_family({"architectures": ["MistralForCausalLM"]}).name == "mistral"
    assert find_family({}, name="swift_dist.models.llama:FAMILY").name == "llama"


def test_find_family_refusals_list_what_there_is() -> None:
    for config, says in (
        ({"model_type": "qwen4"}, "did you mean"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification",
        ),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({}, "model_type"),
    ):
        error = refusal(find_family, config)
        assert says in str(error) and "qwen3_moe (Qwen3MoeForCausalLM)" in str(error)


def test_plugins_are_files() -> None:
    converted_only = ("deepseek_v2", "deepseek_v3", "mixtral")
    trained = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
    assert plugins.names("swift_dist.models") == tuple(sorted(converted_only + trained))
    with pytest.raises(plugins.UnknownPlugin, match="did you mean mistral"):
        plugins.find("swift_dist.models", "mistrall", "FAMILY")
    for name in ("base", "_rope", "nobody.there:FAMILY", ":X", "json:absent"):
        with pytest.raises(plugins.UnknownPlugin):
            plugins.find("swift_dist.models", name, "FAMILY")
    assert plugins.find("swift_dist.models", "json:dumps", "FAMILY") is json.dumps


def test_an_error_inside_a_plugin_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plugin.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        plugins.find("swift_dist.models", "broken_plugin:FAMILY", "FAMILY")
