"""What each engine is started with, what it refuses, which one serves, and LMDeploy's environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from swift_dist.errors import JobError, RunError
from swift_dist.serving.engines._environment import OwnEnvironment
from swift_dist.serving.engines.choose import choose, find_engine
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.options import EngineOptions, ServedModel

VLLM, LMDEPLOY, HF = (find_engine(name) for name in ("vllm", "lmdeploy", "hf"))
LMDEPLOY_FLAGS = Path(__file__).parent / "lmdeploy_flags.txt"
CONFIG = {"model_type": "qwen3", "dtype": "bfloat16", "hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}


@pytest.fixture
def model(tmp_path) -> Path:
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text("{{ '<think></think>' }}<tool_call>{{ messages }}")
    return folder


def adapter(folder: Path, **changes: object) -> str:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def served(model: Path, gpu: bool = False, adapters: dict[str, str] | None = None, **options: object) -> ServedModel:
    return ServedModel("chat", str(model), EngineOptions(**options), adapters or {}, gpu)


def flags(words: list[str]) -> dict[str, str]:
    """Flag -> the word behind it ("" where it has none)."""
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {word: "" if after.startswith("--") else after for word, after in pairs if word.startswith("--")}


def on_gpus(monkeypatch, number: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(number))))
    monkeypatch.setattr("swift_dist.serving.engines.vllm._built_for_cpu", lambda: False)


def test_vllm_is_given_every_option(model, tmp_path, monkeypatch):
    on_gpus(monkeypatch, 4)
    one = adapter(tmp_path / "one")
    options = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "dtype": "bf16", "max_model_len": 512}
    options |= {"max_num_seqs": 7, "gpu_memory_utilization": 0.5, "max_loras": 3, "max_lora_rank": 20, "seed": 9}
    options |= {"trust_remote_code": True, "engine_args": ("--enforce-eager",)}
    asked = served(model, gpu=True, adapters={"one": one}, **options)
    VLLM.check(asked)
    words = VLLM.command(asked, "127.0.0.1", 1234)
    expected = {
        "--host": "127.0.0.1",
        "--port": "1234",
        "--served-model-name": "chat",
        "--dtype": "bfloat16",
        "--tensor-parallel-size": "2",
        "--pipeline-parallel-size": "2",
        "--distributed-executor-backend": "mp",
        "--max-model-len": "512",
        "--max-num-seqs": "7",
        "--gpu-memory-utilization": "0.5",
        "--seed": "9",
        "--enable-lora": "",
        "--max-loras": "3",
        "--max-lora-rank": "32",
        "--lora-modules": f"one={one}",
        "--trust-remote-code": "",
        "--tool-call-parser": "hermes",
        "--enable-auto-tool-choice": "",
        "--reasoning-parser": "qwen3",
        "--runner": "generate",
        "--enforce-eager": "",
    }
    assert expected.items() <= flags(words).items()
    assert words[-1] == "--enforce-eager"
    assert VLLM.environment(asked)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    with pytest.raises(JobError, match="cpu_cache_gib: vLLM computes on GPUs here"):
        VLLM.check(served(model, gpu=True, cpu_cache_gib=2.0))


def test_vllm_looks_for_other_nodes_where_its_own_gpus_are_too_few(model, monkeypatch):
    on_gpus(monkeypatch, 2)
    across = served(model, gpu=True, tensor_parallel_size=4)
    assert flags(VLLM.command(across, "h", 1))["--distributed-executor-backend"] == "ray"
    assert "VLLM_HOST_IP" not in VLLM.environment(across)
    assert "--distributed-executor-backend" not in flags(VLLM.command(served(model, gpu=True), "h", 1))


def test_vllm_on_a_cpu(model, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    on_cpu = served(model, cpu_cache_gib=0.5, max_loras=0, tensor_parallel_size=2)
    found = flags(VLLM.command(on_cpu, "h", 1))
    assert found["--kv-cache-memory-bytes"] == str(2**29)
    assert not {"--gpu-memory-utilization", "--enable-lora", "--distributed-executor-backend"} & found.keys()
    variables = VLLM.environment(on_cpu)
    assert variables["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in variables


@pytest.mark.parametrize(("saved", "dtype"), [("float32", "float32"), ("bfloat16", "auto"), (None, "float32")])
def test_as_saved_is_not_vllms_auto(model, saved, dtype):
    """vLLM's "auto" turns fp32 into 16 bits on a GPU. Where the configuration is silent the weights are looked at."""
    import torch
    from safetensors.torch import save_file

    (model / "config.json").write_text(json.dumps({**CONFIG, "dtype": saved}))
    save_file({"a": torch.zeros(4), "b": torch.zeros(1, dtype=torch.bfloat16)}, model / "model.safetensors")
    assert flags(VLLM.command(served(model), "h", 1))["--dtype"] == dtype


READ_BY_VLLM = """
import json, sys
from swift_dist.serving.engines._vllm_server import _answer_for_vllm_cpu
_answer_for_vllm_cpu()
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in json.loads(sys.argv[1]):
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    print(parsed.model_tag)

from types import SimpleNamespace
from vllm.tool_parsers import ToolParserManager
ToolParserManager.import_tool_parser(parsed.tool_parser_plugin)
ANSWER = 'I look it up.\\nAction: find\\nAction Input: {"what": "a \\\\"moon\\\\""}\\n'
for text in (ANSWER, ANSWER + 'Action: wait\\nAction Input: {}\\n', "No Action: at all, Act", "Action: find"):
    for size in (1, 3, 1000):
        whole = ToolParserManager.get_tool_parser("react")(None).extract_tool_calls(text, None)
        parser = ToolParserManager.get_tool_parser("react")(None)
        request = SimpleNamespace(tools=[1], tool_choice="auto", stop="END", structured_outputs=None)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        deltas = [parser.extract_tool_calls_streaming("", "", piece, [], [], [], request) for piece in pieces]
        deltas = [delta for delta in [*deltas, parser.finish_streaming()] if delta]
        streamed = [call for delta in deltas for call in delta.tool_calls or []]
        calls = [(call.index, call.function.name, call.function.arguments) for call in streamed]
        wanted = [(place, call.function.name, call.function.arguments) for place, call in enumerate(whole.tool_calls)]
        assert wanted == calls, (text, size)
        assert "".join(delta.content or "" for delta in deltas) == (whole.content or ""), (text, size)
        assert len(calls) == text.count("Action Input") == len(parser.prev_tool_call_arr)
        request.tool_choice = "none"
        assert parser.extract_tool_calls_streaming("", "", text, [], [], [], request).content == text
        assert parser.extract_tool_calls(text, request).content == text
print("parsers agree")
"""


@pytest.mark.skipif(VLLM.why_not() is not None, reason="vLLM is not installed")
def test_every_flag_is_one_of_vllms(model, tmp_path):
    """Its own parser reads what we write, and ours of calls answer through its interface, in pieces as in one.

    In a process of its own: importing vLLM sets up the process.
    """
    asked = served(model, adapters={"one": adapter(tmp_path / "one")}, tensor_parallel_size=2, max_model_len=64)
    embed, agent = served(model, task="embed"), served(model, agent_format="react")
    assert flags(VLLM.command(agent, "127.0.0.1", 1))["--tool-call-parser"] == "react"
    lines = [VLLM.command(one, "127.0.0.1", 1)[5:] for one in (asked, embed, agent)]
    done = subprocess.run(
        [sys.executable, "-c", READ_BY_VLLM, json.dumps(lines)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-4:] == [str(model)] * 3 + ["parsers agree"]


REFUSED = [
    ({"use_dora": True}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ({"bias": "all"}, "bias: all"),
    ({"peft_type": "IA3"}, "type IA3"),
    ({"r": 128}, "rank 128"),
    ({"lora_alpha": None}, "lora_alpha is not said"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"something_new": {"x": 1}}, "something_new"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_adapters_that_are_not_plain_lora_are_refused_by_name(model, tmp_path, changes, named):
    path = adapter(tmp_path / "a", **changes)
    with pytest.raises(JobError, match=named) as caught:
        VLLM.check(served(model, adapters={"mine": path}))
    assert "mine" in str(caught.value)
    if "r" not in changes:  # the server itself refuses the rank, and nothing else of these
        with pytest.raises(JobError, match=named):
            VLLM.adapter_request("mine", path)


def test_plain_lora_is_asked_for_by_name(tmp_path):
    path = adapter(tmp_path / "a", use_rslora=True, rank_pattern={"q_proj": 8}, lora_dropout=0.1)
    assert VLLM.adapter_request("mine", path) == ("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": path})
    assert VLLM.adapter_request("mine", None) == ("/v1/unload_lora_adapter", {"lora_name": "mine"})


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("model", {"config": {**CONFIG, "head_dim": 8}}),  # would start, and end at the first request
        ("max_model_len", {"config": {**CONFIG, "max_position_embeddings": 256}, "max_model_len": 257}),
        ("max_lora_rank", {"max_lora_rank": 1024}),
        ("tool_call_parser", {"task": "embed", "tool_call_parser": "hermes"}),
        ("max_loras", {"task": "embed", "max_loras": 8}),
        ("seed", {"task": "embed", "seed": 1}),
        ("gpu_memory_utilization", {"gpu_memory_utilization": 0.5}),
        ("infer_backend", {"gpu": True}),  # a build for CPUs
        ("chat_template", {"chat_template": "missing.jinja"}),
        ("tool_call_parser", {"tool_call_parser": "hermess"}),
        ("reasoning_parser", {"reasoning_parser": "qwen33"}),
    ],
)
@pytest.mark.skipif(VLLM.why_not() is not None, reason="vLLM is not installed")
def test_vllm_refuses(model, key, options):
    options = dict(options)
    (model / "config.json").write_text(json.dumps(options.pop("config", CONFIG)))
    with pytest.raises(JobError) as caught:
        VLLM.check(served(model, gpu=options.pop("gpu", False), **options))
    assert caught.value.key == key


def test_a_length_is_compared_with_positions_that_are_not_scaled(model):
    config = CONFIG | {"max_position_embeddings": 256}
    (model / "config.json").write_text(json.dumps(config))
    HF.check(served(model, max_model_len=256))
    with pytest.raises(JobError, match="257 is more than the model's 256 positions"):
        HF.check(served(model, max_model_len=257))
    (model / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "yarn", "factor": 4.0}}))
    HF.check(served(model, max_model_len=1024))


@pytest.mark.skipif(VLLM.why_not() is not None, reason="vLLM is not installed")
def test_a_parser_of_a_plug_in_is_vllms_to_find(model):
    named = {"tool_call_parser": "mine", "reasoning_parser": "qwen3"}
    VLLM.check(served(model, engine_args=("--tool-parser-plugin", "mine.py"), **named))
    with pytest.raises(JobError, match=r"none called 'mine'\n"):
        VLLM.check(served(model, **named))


def test_lmdeploy_is_given_every_option_with_flags_that_it_has(model, tmp_path):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    options = {"tensor_parallel_size": 2, "dtype": "fp16", "max_model_len": 512, "max_num_seqs": 7}
    asked = served(
        model, True, {"one": one, "two": two}, trust_remote_code=True, engine_args=("--eager-mode",), **options
    )
    LMDEPLOY.check(asked)
    words = LMDEPLOY.command(asked, "127.0.0.1", 1234)
    expected = {
        "--server-name": "127.0.0.1",
        "--server-port": "1234",
        "--model-name": "chat",
        "--dtype": "float16",
        "--tp": "2",
        "--max-batch-size": "7",
        "--session-len": "512",
        "--backend": "pytorch",
        "--device": "cuda",
        "--tool-call-parser": "qwen3",
        "--reasoning-parser": "default",
        "--trust-remote-code": "",
        "--adapters": f"one={one}",
        "--eager-mode": "",
    }
    assert flags(words) == expected
    assert words[words.index("--adapters") + 2] == f"two={two}"
    assert flags(words).keys() <= set(LMDEPLOY_FLAGS.read_text().split())


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("infer_backend", {"gpu": False}),
        ("dtype", {"dtype": "fp32"}),
        ("dtype", {"config": {**CONFIG, "dtype": "float32"}}),
        ("pipeline_parallel_size", {"pipeline_parallel_size": 2}),
        ("task", {"task": "embed"}),
        ("seed", {"seed": 1}),
        ("max_loras", {"max_loras": 8}),
        ("gpu_memory_utilization", {"gpu_memory_utilization": 0.5}),
        ("cpu_cache_gib", {"cpu_cache_gib": 2.0}),
        ("agent_format", {"agent_format": "react"}),
        ("tool_call_parser", {"tool_call_parser": "mistral"}),
    ],
)
def test_lmdeploy_refuses_what_it_has_no_counterpart_of(model, key, options):
    options = dict(options)
    (model / "config.json").write_text(json.dumps(options.pop("config", CONFIG)))
    with pytest.raises(JobError) as caught:
        LMDEPLOY.check(served(model, gpu=options.pop("gpu", True), **options))
    assert caught.value.key == key


def test_lmdeploy_loads_no_adapter_at_run_time():
    with pytest.raises(JobError, match="only at its start"):
        LMDEPLOY.adapter_request("mine", "/a")


def test_the_engine_that_was_asked_for_or_the_first_that_can_run(monkeypatch):
    assert choose(EngineOptions(infer_backend="hf")).name == "hf"
    assert choose(EngineOptions()).name == ("vllm" if VLLM.why_not() is None else "hf")
    monkeypatch.setattr(type(VLLM), "why_not", lambda self: "it is not installed")
    assert choose(EngineOptions()).name == "hf"
    with pytest.raises(JobError, match="vllm cannot run here: it is not installed"):
        choose(EngineOptions(infer_backend="vllm"))
    monkeypatch.setattr(type(VLLM), "why_not", lambda self: None)
    for cpu in (True, False):  # what this vLLM is built for
        monkeypatch.setattr("swift_dist.serving.engines.vllm._built_for_cpu", lambda cpu=cpu: cpu)
        assert [choose(EngineOptions(), use_gpu).name for use_gpu in (not cpu, cpu, None)] == ["vllm", "hf", "vllm"]
    with pytest.raises(JobError, match="did you mean vllm"):
        choose(EngineOptions(infer_backend="vlm"))


PROGRAM = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
def main():
    words = sys.argv
    print("python", sys.prefix, flush=True)
    host, port = (words[words.index(flag) + 1] for flag in ("--server-name", "--server-port"))
    HTTPServer((host, int(port)), Handler).serve_forever()
"""


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder of wheels instead of an index, with an lmdeploy that answers /health, and a cache of one's own."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "lmdeploy-0.18.0.dist-info"
    files = {
        "lmdeploy.py": PROGRAM,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: lmdeploy\nVersion: 0.18.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nlmdeploy = lmdeploy:main\n",
    }
    with zipfile.ZipFile(folder / "lmdeploy-0.18.0-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": "".join(f"{name},,\n" for name in files)}.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.mark.slow
def test_an_environment_of_its_own_is_made_once_and_serves(wheels, model, tmp_path):
    """Cut off, then asked for by two at once: the second waits. Its program runs with its own Python."""
    own = OwnEnvironment("lmdeploy", "0.18.0")
    wheels.rename(tmp_path / "away")
    with pytest.raises(RunError, match=r"pip failed(.|\n)*No matching distribution") as caught:
        own.make()
    assert "PIP_INDEX_URL" in caught.value.remedy
    assert not own.is_complete and own.folder.is_dir()
    (tmp_path / "away").rename(wheels)

    threads = [threading.Thread(target=own.make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own.is_complete and own.folder == LMDEPLOY.own.folder
    before = own.program("lmdeploy").stat().st_mtime_ns
    with EngineProcess(LMDEPLOY, served(model, gpu=True), log=tmp_path / "log").start().wait_ready() as process:
        assert process.healthy()
    assert own.program("lmdeploy").stat().st_mtime_ns == before
    assert f"python {own.folder}" in (tmp_path / "log").read_text()


@pytest.mark.table
def test_the_recorded_flags_are_lmdeploys():
    """Rewrites lmdeploy_flags.txt from the real package where it is installed (first use of the engine, or PATH)."""
    program = LMDEPLOY.own.program("lmdeploy") if LMDEPLOY.own.is_complete else shutil.which("lmdeploy")
    if not program:
        pytest.skip("lmdeploy is not installed: --infer_backend lmdeploy installs it on first use")
    shown = subprocess.run(
        [program, "serve", "api_server", "--help"], capture_output=True, text=True, check=True
    ).stdout
    found = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", shown.partition("\noptions:")[0])))
    assert {"--server-name", "--adapters", "--tool-call-parser"} <= set(found)
    LMDEPLOY_FLAGS.write_text("".join(f"{flag}\n" for flag in found))
