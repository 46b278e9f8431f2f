"""DeepSpeed's configuration: presets, a user's own JSON, and everything that contradicts the job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swift_dist.config import JobConfig
from swift_dist.engines.hf.strategies import _deepspeed_config as configuration
from swift_dist.errors import JobError


def job(deepspeed: str | None, **changes: Any) -> JobConfig:
    values: dict[str, Any] = {
        "task": "sft",
        "model": {"path": "/models/tiny"},
        "strategy": {"deepspeed": deepspeed},
        "cluster": {"nproc_per_node": 2},
        "train": {"steps": 5, "micro_batch_size": 2, "global_batch_size": 16, "precision": "bf16"},
        "optimizer": {"clip_grad": 1.0},
    }
    for section, inner in changes.items():
        values[section] = {**values.get(section, {}), **inner}
    return JobConfig.model_validate(values)


@pytest.fixture
def written(tmp_path):
    def write(content: dict[str, Any] | str) -> str:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(file)

    return write


def made(wanted: JobConfig, hidden_size: int | None = 64) -> dict[str, Any]:
    return configuration.settings(wanted, hidden_size=hidden_size, data_parallel_size=2)


@pytest.mark.parametrize("name", sorted(configuration.PRESETS))
def test_presets_are_complete(name):
    config = made(job(name, strategy={"nvme_path": "/scratch/nvme"}))
    assert "auto" not in json.dumps(config)
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert zero.get("offload_optimizer", {}).get("device") == {"offload": "cpu", "nvme": "nvme"}.get(name[6:])
    assert config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.0  # the strategy clips
    assert config["bf16"]["enabled"] == (zero["stage"] > 0)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_nvme_goes_where_the_job_says():
    zero = made(job("zero3_nvme", strategy={"nvme_path": "/scratch/nvme"}))["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == zero["offload_param"]["nvme_path"] == "/scratch/nvme"
    with pytest.raises(JobError, match=r"strategy\.nvme_path"):
        configuration.check(job("zero3_nvme"))


def test_presets_are_not_changed_by_use():
    before = json.dumps(dict(configuration.PRESETS))
    made(job("zero3_nvme", strategy={"nvme_path": "/scratch/nvme"}))
    made(job("zero3"))
    assert json.dumps(dict(configuration.PRESETS)) == before


def test_auto_is_filled_in_as_hugging_face_does(written):
    """The sizes of ``HfTrainerDeepSpeedConfig.trainer_config_finalize``."""
    file = written(
        {
            "bf16": {"enabled": "auto"},
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": "auto",
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
    )
    zero = made(job(file), hidden_size=100)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10_000
    assert zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    assert "overlap_comm" not in zero
    assert "reduce_bucket_size" not in made(job(file), hidden_size=None)["zero_optimization"]


def test_a_files_own_values_win(written):
    file = written(
        {
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 12345, "offload_optimizer": {"device": "cpu"}},
            "communication_data_type": "bf16",
            "train_batch_size": 16,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 1,
            "bf16": {"enabled": True, "immediate_grad_update": False},
        }
    )
    config = made(job(file))
    assert config["zero_optimization"]["reduce_bucket_size"] == 12345
    assert config["communication_data_type"] == "bf16"
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": False}
    assert made(job("zero2"))["communication_data_type"] == "fp32"


ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"train_batch_size": 32}, ["train_batch_size is 32", "train.global_batch_size", "16"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["is 4", "train.micro_batch_size makes it 2"]),
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps is 8", "makes it 4"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "optimizer.clip_grad makes it 1.0"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is true", "train.precision makes it false"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled is false", "train.precision makes it true"]),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer", "optimizer.name"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "schedule.name"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["AutoTP needs the same rows"]),
        ({"activation_checkpointing": {"partition_activations": True}}, ["train.recompute"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ['grad_accum_dtype is "bf16"']),
        ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer"]),
        ({"zero_optimisation": {"stage": 3}}, ["zero_optimisation", "did you mean zero_optimization"]),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, ["did you mean overlap_comm"]),
        ({"zero_optimization": {"stage": 3, "overlap_com": False}}, ["did you mean overlap_comm"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4"]),
        ({"zero_optimization": {"stage": True}}, ["stage is true"]),
        ({"zero_optimization": 3}, ["must be an object"]),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, ["loses gradients"]),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, ["wrong weights"]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, ["ZeRO++"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["does nothing with stage 2"]),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["does nothing with stage 0"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ["needs stage 3"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["ratio"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "gpu"}}}, ['device is "gpu"']),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ["offload_optimizer: {device: cpu}"]),
    ],
)
def test_wrong_files_say_what_and_how_to_mend_it(written, content, says):
    with pytest.raises(JobError) as error:
        configuration.check(job(written({**ZERO_2, **content})))
    assert error.value.key == "strategy.deepspeed"
    assert error.value.remedy
    for part in says:
        assert part in str(error.value)


def test_what_is_switched_off_is_no_contradiction(written):
    off = {"round_robin_gradients": False, "zero_quantized_weights": False, "allgather_partitions": True}
    configuration.check(job(written({"zero_optimization": {"stage": 2, **off}, "amp": None})))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("zero33", "did you mean zero3"),
        ("nowhere.json", "zero2_offload"),
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
    ],
)
def test_what_is_neither_preset_nor_file(written, value, says):
    with pytest.raises(JobError, match=says):
        configuration.check(job(written(value) if value in ("{", "[]") else value))


def test_muon_needs_whole_matrices():
    with pytest.raises(JobError, match="muon"):
        configuration.check(job("zero1", optimizer={"name": "muon"}))
    configuration.check(job("zero0", optimizer={"name": "muon"}))


def test_ranks_may_be_unknown_before_the_start(written):
    file = written({**ZERO_2, "gradient_accumulation_steps": 3})
    configuration.check(job(file, cluster={"nproc_per_node": None}))
    with pytest.raises(JobError, match="makes it 4"):
        made(job(file, cluster={"nproc_per_node": None}))


def test_loss_scale_of_fp16(written):
    def check(precision: str, **block: Any) -> None:
        train = {"precision": precision, "initial_loss_scale": 1024.0}
        configuration.check(job(written({**ZERO_2, "fp16": block}), train=train))

    check("fp16", enabled="auto", loss_scale=0, initial_scale_power=10, loss_scale_window="auto", hysteresis=1)
    check("bf16", enabled=False, loss_scale=0, initial_scale_power=16, loss_scale_window=1000, hysteresis=2)
    with pytest.raises(JobError, match=r"65536\.0.*train.initial_loss_scale"):
        check("fp16", initial_scale_power=16)
    with pytest.raises(JobError, match="loss_scale is 128; only 0 is supported"):
        check("fp16", loss_scale=128)
    with pytest.raises(JobError, match="loss_scale_window is 1000"):
        check("fp16", loss_scale_window=1000)
    made_of = made(job("zero2", train={"precision": "fp16"}))
    assert made_of["fp16"] == {"enabled": True, "loss_scale": 1.0}  # the strategy scales


def test_the_check_loads_nothing_heavy():
    code = (
        "import sys; from swift_dist.engines.hf.strategies import _deepspeed_config;"
        "print(sorted(set(sys.modules) & {'torch', 'deepspeed', 'transformers', 'megatron'}))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
