"""The verbs of the command line, one row each. Nothing is imported here: a row names the module of its verb."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A row of the command line: `module` holds `options` (a Section), `function` and, where named, `render`."""

    name: str
    help: str
    module: str
    options: str
    function: str
    positional: tuple[str, ...] = ()
    render: str | None = None


VERBS: tuple[Verb, ...] = (
    Verb(
        "data prepare",
        "text files -> tokenised Megatron dataset",
        "swift_dist.data.prepare",
        "PrepareOptions",
        "prepare",
        ("input...",),
        "render",
    ),
    Verb(
        "data train-tokenizer",
        "text files -> byte-level BPE tokenizer",
        "swift_dist.data.tokenizer",
        "TrainTokenizerOptions",
        "train_tokenizer",
        ("input...",),
        "render",
    ),
    Verb(
        "data preview",
        "rows of fine-tuning data as tokens, coloured by what learns",
        "swift_dist.data.preview",
        "PreviewOptions",
        "preview",
        ("input...",),
        "render",
    ),
    Verb("pretrain", "train a model on prepared data, from scratch or continued", "swift_dist.config", "JobConfig", ""),
    Verb("sft", "fine-tune a model on conversations or labels", "swift_dist.config", "JobConfig", ""),
    Verb(
        "sft --list-tuners",
        "tuners, and the strategies under which each trains as in one process",
        "swift_dist.tuners._listing",
        "ListOptions",
        "run",
        (),
        "render",
    ),
    Verb("rlhf", "fine-tune a model on preferences (DPO, KTO, ...)", "swift_dist.config", "JobConfig", ""),
    Verb(
        "infer",
        "answer a dataset's rows, one prompt, or a conversation in the terminal",
        "swift_dist.serving.infer",
        "InferOptions",
        "run",
        (),
        "render",
    ),
    Verb(
        "merge",
        "an adapter of any kind and its base -> one Hugging Face model",
        "swift_dist.tuners._merge_verb",
        "MergeOptions",
        "run",
        ("adapter", "target"),
        "render",
    ),
    Verb(
        "convert hf-to-megatron",
        "Hugging Face folder -> torch_dist checkpoint, for any layout",
        "swift_dist.convert.hf_to_megatron",
        "HFToMegatronOptions",
        "run",
        ("source", "target"),
        "render",
    ),
    Verb(
        "convert megatron-to-hf",
        "Megatron checkpoint -> Hugging Face folder",
        "swift_dist.convert.megatron_to_hf",
        "MegatronToHFOptions",
        "run",
        ("source", "target"),
        "render",
    ),
    Verb(
        "convert reshard",
        "legacy checkpoint (mp_rank_*) -> torch_dist, or another legacy layout",
        "swift_dist.convert.reshard",
        "ReshardOptions",
        "run",
        ("source", "target"),
        "render",
    ),
    Verb(
        "convert inspect",
        "tensors, shapes, dtypes and sizes of any checkpoint",
        "swift_dist.convert.inspect",
        "InspectOptions",
        "run",
        ("source",),
        "render",
    ),
    Verb(
        "convert verify",
        "whether two checkpoints hold the same weights and compute the same",
        "swift_dist.convert.verify",
        "VerifyOptions",
        "run",
        ("a", "b"),
        "render",
    ),
    Verb(
        "convert --list",
        "families, and what was measured of their conversions",
        "swift_dist.convert.listing",
        "ListOptions",
        "run",
        (),
        "render",
    ),
    Verb(
        "runs list",
        "what ran and what runs",
        "swift_dist.runs.verbs",
        "ListOptions",
        "list_runs",
        ("root",),
        "render_list",
    ),
    Verb(
        "runs show",
        "one run: job, state, newest numbers",
        "swift_dist.runs.verbs",
        "ShowOptions",
        "show_run",
        ("run",),
        "render_show",
    ),
    Verb(
        "runs plot",
        "loss, gradient norm and throughput as a PNG",
        "swift_dist.runs.verbs",
        "PlotOptions",
        "plot_run",
        ("run",),
        "render_plot",
    ),
    Verb(
        "runs logs",
        "logs of a run's ranks and driver",
        "swift_dist.runs.verbs",
        "LogsOptions",
        "run_logs",
        ("run",),
        "render_logs",
    ),
    Verb(
        "runs stop",
        "ask a running run to checkpoint and end",
        "swift_dist.runs.verbs",
        "StopOptions",
        "stop_run",
        ("run",),
        "render_stop",
    ),
    Verb(
        "deploy",
        "serve models as an OpenAI API; update, watch and stop what is served",
        "swift_dist.serving.deploy",
        "DeployOptions",
        "deploy",
        (),
        "render",
    ),
    Verb(
        "doctor",
        "look over this machine or a cluster before a job does",
        "swift_dist.doctor.verb",
        "DoctorOptions",
        "look_over",
        (),
        "render",
    ),
    Verb(
        "bench length",
        "the longest trainable sequence of a model, by features and ranks that share it",
        "swift_dist.bench.length",
        "LengthOptions",
        "find_lengths",
        (),
        "render",
    ),
    Verb("recipes list", "shipped job files", "swift_dist.recipes", "ListOptions", "list_verb", (), "render_list"),
    Verb(
        "recipes show",
        "print a shipped job file",
        "swift_dist.recipes",
        "ShowOptions",
        "show_verb",
        ("name",),
        "render_show",
    ),
)
VERB_ALIASES = {"pt": "pretrain"}
JOB_VERBS = ("pretrain", "sft", "rlhf")
