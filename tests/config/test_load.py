"""From YAML and command-line words to a job, and what a wrong job says."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from swift_dist.config import JobConfig, Section
from swift_dist.config.aliases import JOB_ALIASES, JOB_ELSEWHERE
from swift_dist.config.keys import did_you_mean, walk
from swift_dist.config.load import build, dump_job, load_job, parse_words
from swift_dist.data.preview import PreviewOptions
from swift_dist.errors import JobError

KEYS = {key.name: key for key in walk(JobConfig)}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_overrides_and_aliases_compose(tmp_path):
    file = write(tmp_path / "job.yaml", "train: {steps: 10, seed: 3}\noptimizer: {lr: 1e-4}\ntp: 2\n")
    job = load_job(
        file, ["--train.steps", "20", "--pp=2", "--dataset", "a", "b", "--sequence_parallel", "--lr", "3e-5"]
    )
    assert (job.train.steps, job.train.seed, job.optimizer.lr) == (20, 3, 3e-5)
    assert (job.parallel.tensor_model_parallel_size, job.parallel.pipeline_model_parallel_size) == (2, 2)
    assert [e.path for e in job.data.train] == ["a", "b"]
    assert job.parallel.sequence_parallel is True


def test_an_exponent_is_a_number_even_inside_free_form_geometry(tmp_path):
    file = write(tmp_path / "job.yaml", "model: {config: {rms_norm_eps: 1e-6, hidden_size: 64}}\n")
    job = load_job(file, ["--model.config.hidden_size", "128"])
    assert job.model.config == {"rms_norm_eps": 1e-6, "hidden_size": 128}


def test_weighted_entries_from_yaml_and_from_the_command_line(tmp_path):
    file = write(tmp_path / "job.yaml", "data:\n  train:\n    - {path: a, weight: 2}\n    - b\n")
    assert [(e.path, e.weight) for e in load_job(file).data.train] == [("a", 2.0), ("b", None)]
    job = load_job(None, ["--data.train", "[{path: a, epochs: 2}]"])
    assert job.data.train[0].epochs == 2


@pytest.mark.parametrize(
    "spelling", [["q_proj,v_proj"], ["q_proj", "v_proj"], ["q_proj, v_proj"], ["[q_proj, v_proj]"]]
)
def test_names_are_a_list_however_they_are_written(spelling):
    words = ["--tuner_type", "lora,neftune", "--target_modules", *spelling, "--tuner.lora.exclude_modules", *spelling]
    tuner = load_job(None, words, "sft").tuner
    assert tuner.name == ("lora", "neftune")
    assert tuner.lora.target_modules == tuner.lora.exclude_modules == ("q_proj", "v_proj")


def test_a_comma_within_the_brackets_of_a_pattern_is_the_patterns(tmp_path):
    words = ["--tuner_type", "freeze", "--tuner.freeze.parameters", "embed_tokens,layers.[0,3].mlp"]
    assert load_job(None, words, "sft").tuner.freeze.parameters == ("embed_tokens", "layers.[0,3].mlp")


def test_text_that_looks_like_a_number_stays_text():
    assert load_job(None, ["--output", "2024"]).output == "2024"
    assert load_job(None, ["--output", "none"]).output is None
    assert load_job(None, ["--train.recompute", "none"]).train.recompute == "none"


def test_dumped_job_loads_back_equal(tmp_path):
    job = load_job(None, ["--dataset", "x", "--optimizer.betas", "0.8", "0.99", "--cluster.env", "{A: b}"])
    again = load_job(write(tmp_path / "job.yaml", dump_job(job)))
    assert again == job


@pytest.mark.parametrize("task", ["pretrain", "sft", "rlhf"])
def test_ranks_take_the_task_from_the_file(tmp_path, task):
    job = load_job(None, ["--dataset", "x"], task)
    assert job.task == task
    assert load_job(write(tmp_path / "job.yaml", dump_job(job)), task=None) == job


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (["--train.stepz", "3"], "--train.stepz", "did you mean train.steps"),
        (["--steps", "3"], "--steps", "train.steps"),
        (["--train.steps", "many"], "train.steps", "valid integer"),
        (["--train.steps", "0"], "train.steps", "greater than 0"),
        (["--train.steps"], "--train.steps", "needs a value"),
        (["--train.precision", "fp64"], "train.precision", "'fp32', 'bf16' or 'fp16'"),
        (["--optimizer.betas", "0.9", "1.5"], "optimizer", "betas must lie in [0, 1)"),
        (["--model", "a", "--model.config.x", "1"], "model", "model.path or model.config"),
        (["--init", "x"], "--init", "model.init"),
        (["--data.train.0.weight", "-1"], "--data.train.0.weight", "unknown option"),
        (["--data.train", "[{path: a, weight: -1}]"], "data.train.0.weight", "greater than 0"),
        (["--optimizer.lr", ".nan"], "optimizer.lr", "finite"),
        (["--merge_lora", "true"], "--merge_lora", "instead: swift-dist merge"),
        (["--eval_dataset", "x"], "--eval_dataset", "instead: val_dataset"),
        (["--rlhf_type", "kto", "--beta", "1"], "--beta", "did you mean objective.kto.beta or objective.cpo.beta"),
        (["--rlhf_type=dpo", "--beta", "1"], "--beta", "did you mean objective.dpo.beta or objective.cpo.beta"),
        (["--warmup-ratio", "10"], "schedule.warmup_ratio", "less than 1"),
        (["stray", "--train.steps", "3"], "stray", "unexpected argument"),
    ],
)
def test_wrong_words_name_the_key_and_what_is_allowed(words, key, says):
    with pytest.raises(JobError) as error:
        load_job(None, words)
    assert error.value.key == key
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  step: 3\n", "did you mean train.steps"),
        ("train: 3\n", "is a section"),
        ("- a\n- b\n", "mapping"),
        ("train: {steps: 1\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "stands twice"),
        ("seed: 1\ntrain: {seed: 2}\n", "set twice"),
        ("task: sft\n", "pretrain"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path, text, says):
    with pytest.raises(JobError, match=".*" + says):
        load_job(write(tmp_path / "job.yaml", text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(JobError, match="No such file"):
        load_job(tmp_path / "none.yaml")


def test_several_wrong_values_come_in_one_message():
    with pytest.raises(JobError) as error:
        load_job(None, ["--train.steps", "-1", "--optimizer.lr", "-1"])
    assert "train.steps" in str(error.value) and "optimizer.lr" in str(error.value)


def test_job_errors_survive_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(JobError("a.b", "is wrong", "mend it")))
    assert (error.key, error.message, error.remedy) == ("a.b", "is wrong", "mend it")


def test_every_alias_points_at_a_key_and_every_key_is_described():
    assert set(JOB_ALIASES.values()) <= set(KEYS)
    assert not JOB_ELSEWHERE.keys() & (JOB_ALIASES.keys() | KEYS)
    assert not [name for name, key in KEYS.items() if not key.description]


def test_keys_that_scripts_rely_on_exist():
    contract = """task model.path model.init data.train data.validation data.sequence_length train.steps
        train.micro_batch_size train.global_batch_size train.seed train.precision optimizer.name optimizer.lr
        optimizer.weight_decay optimizer.betas optimizer.eps optimizer.clip_grad schedule.name schedule.warmup_steps
        parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size
        parallel.virtual_pipeline_model_parallel_size parallel.context_parallel_size
        parallel.expert_model_parallel_size parallel.expert_tensor_parallel_size parallel.sequence_parallel
        parallel.use_distributed_optimizer checkpoint.interval checkpoint.keep checkpoint.async_save cluster.nnodes
        cluster.nproc_per_node cluster.max_failures cluster.spares cluster.stall_timeout output""".split()
    assert set(contract) <= set(KEYS)


def test_did_you_mean_finds_spelling_and_leaf():
    assert "train.steps" in did_you_mean("trian.steps", KEYS)
    assert did_you_mean("zzz", KEYS) == ""


class _Verb(Section):
    input: tuple[str, ...] = ()
    output: str | None = None
    force: bool = False


def test_positional_words_and_flags():
    words = ["a.txt", "--force", "b.txt", "--output", "out"]
    options = build(_Verb, [parse_words(words, _Verb, positional=("input...",))])
    assert options == _Verb(input=("a.txt", "b.txt"), output="out", force=True)


@pytest.mark.parametrize("train", ["data/a", ["data/a", {"path": "b", "weight": 2}], {"path": "a"}, [{"path": "a"}]])
def test_schema_accepts_every_spelling_of_a_dataset(train):
    jsonschema.validate({"data": {"train": train}}, JobConfig.model_json_schema())
    assert load_job(None, []).data.train == ()
    assert build(JobConfig, [{"data": {"train": train}}]).data.train[0].path in ("a", "data/a")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"data": {"train": [3]}}, JobConfig.model_json_schema())


def test_what_is_not_given_is_named_as_an_option():
    with pytest.raises(JobError, match="is not given\n  remedy: --tokenizer <text>: the model's folder"):
        build(PreviewOptions, [{"input": ["rows.jsonl"]}])


def test_schema_accepts_what_we_dump():
    schema = JobConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(yaml.safe_load(dump_job(JobConfig()))) == set(schema["properties"])


def test_python_builds_the_same_job():
    import swift_dist

    assert swift_dist.job_config({"train": {"steps": 10}}, tp=2, optimizer__lr=1e-4) == load_job(
        None, ["--train.steps", "10", "--tp", "2", "--optimizer.lr", "1e-4"]
    )


def test_python_says_what_takes_the_place_of_options_that_are_no_keys():
    import swift_dist

    for name, value, says in (
        (
            "launcher",
            "torchrun",
            r"launcher: 'torchrun': .* Ray (.|\n)*swift-dist sft job.yaml --launcher torchrun",
        ),
        ("gradient_checkpointing", True, "gradient_checkpointing: unknown key. instead: train.recompute full"),
    ):
        with pytest.raises(JobError, match=says):
            swift_dist.sft(model="x", **{name: value})


def test_python_refuses_a_job_of_another_task(tmp_path):
    """`sft` of a file that says rlhf would learn from the chosen answers alone."""
    import swift_dist

    file = write(tmp_path / "job.yaml", "task: rlhf\n")
    for source in (file, {"task": "rlhf"}, load_job(file, task=None)):
        for function in (swift_dist.sft, swift_dist.pretrain):
            with pytest.raises(JobError, match="says 'rlhf'") as error:
                function(source)
            assert error.value.key == "task"


def test_did_you_mean_names_a_key_once():
    hint = did_you_mean("learning_rat", ["optimizer.lr", "optimizer.learning_rat_"], {"learning_rate": "optimizer.lr"})
    assert hint.count("learning_rate") == 1 and "optimizer.lr" not in hint.split(" or ")
    from swift_dist.config.aliases import JOB_ALIASES

    hint = did_you_mean("data.seq_lenght", KEYS, JOB_ALIASES)
    hint += did_you_mean("use_distributed_optimiser", KEYS, JOB_ALIASES)
    assert hint.count("use_distributed_optimizer") == 1, hint


def test_a_tuners_option_without_the_tuner_is_refused_even_at_its_default(tmp_path):
    default = str(JobConfig().tuner.lora.rank)
    with pytest.raises(JobError, match=r"tuner\.lora\.rank: has no effect") as caught:
        load_job(None, ["--lora_rank", default], task="sft")
    assert "--tuner.name lora" in str(caught.value)
    assert load_job(None, ["--lora_rank", default, "--tuner_type", "lora"], task="sft").tuner.lora.rank == int(default)
    job = tmp_path / "job.yaml"
    job.write_text(dump_job(load_job(None, ["--model", "m"], task="sft")))  # states every option at its default
    assert load_job(job, task="sft").tuner.name == ("full",)
