"""The job: typed sections composed into one `JobConfig`. What a YAML file may say, with its defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from swift_dist.config.finetune import ObjectiveBase, StrategySection, TemplateSection, TunerBase
from swift_dist.config.launch import LaunchSection
from swift_dist.config.plugged import plugged
from swift_dist.config.section import Section

TunerSection: Any = plugged("swift_dist.tuners", TunerBase, "TunerSection")
ObjectiveSection: Any = plugged("swift_dist.objectives", ObjectiveBase, "ObjectiveSection")


class ModelSection(Section):
    path: str | None = Field(None, description="Hugging Face id or folder (config.json, and weights to continue from)")
    config: dict[str, Any] | None = Field(None, description="the Hugging Face config.json inline, instead of a path")
    init: Literal["random", "pretrained"] | None = Field(
        None, description="start from random weights or from those at model.path (default: pretrained if path is given)"
    )
    tokenizer: str | None = Field(None, description="tokenizer folder or id that travels with exports (default: path)")
    attention: str | None = Field(
        None,
        description="hf engine: transformers' attention implementation (default: chosen for the layout of batches)",
    )
    num_labels: int | None = Field(None, gt=0, description="classes of a classification head (default: config.json's)")
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = Field(
        None, description="of a classification head (default: config.json's, else by the labels)"
    )
    liger: bool | None = Field(None, description="hf engine: Liger's kernels (default: where they import, on CUDA)")
    kernels: bool = Field(
        False,
        description="hf engine: swift_dist's kernels for norms, rotary embeddings and gated MLPs, in the place of "
        "Liger's; on a CPU their plain-torch form",
    )
    trust_remote_code: bool = Field(False, description="allow Python code from the model folder to run")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if self.path and self.config:
            raise ValueError("give model.path or model.config, not both")
        if self.init == "pretrained" and not self.path:
            raise ValueError("model.init: pretrained needs model.path")
        return self

    @property
    def resolved_init(self) -> Literal["random", "pretrained"]:
        return self.init or ("pretrained" if self.path else "random")


class DatasetEntry(Section):
    path: str = Field(
        description="pretraining: prefix of a prepared dataset (PREFIX.bin and PREFIX.idx); fine-tuning: file, folder "
        "or hub id of rows, path:subset#N takes N of a subset"
    )
    weight: float | None = Field(None, gt=0, description="share in the blend, relative to the other weights")
    epochs: float | None = Field(
        None, gt=0, description="how often each of its samples is seen; sets its share instead"
    )


def _as_entries(value: Any) -> Any:
    """One path, or a list in which paths stand for entries."""
    items = [value] if isinstance(value, (str, dict)) else value
    return tuple({"path": i} if isinstance(i, str) else i for i in items) if isinstance(items, (list, tuple)) else items


Entries = Annotated[
    tuple[DatasetEntry, ...],
    BeforeValidator(_as_entries, json_schema_input_type=str | DatasetEntry | tuple[str | DatasetEntry, ...]),
]


class DataSection(Section):
    train: Entries = Field((), description="training data: paths, or {path, weight} or {path, epochs}")
    validation: Entries = Field((), description="validation data, as data.train")
    sequence_length: int = Field(1024, gt=0, description="tokens in one sample")
    mask_eod_loss: bool = Field(False, description="no loss where the input is an end-of-document token")
    separate_documents: bool = Field(
        False,
        description="pretraining: tokens do not see the documents before theirs, and positions begin at 0 in each",
    )
    prefetch: int = Field(4, ge=0, description="global batches read ahead by a background thread (0: none)")
    format: str = Field(
        "auto", description="rows: their format, a file of swift_dist/data/rows (auto: by their columns)"
    )
    columns: dict[str, str] = Field({}, description="rows: {name that a format knows: name in the file}")
    split_ratio: float = Field(0.0, ge=0, lt=1, description="rows: share of data.train taken for validation instead")
    bad_rows: Literal["skip", "stop"] = Field("skip", description="rows that cannot be used: count them, or stop")
    packing: bool = Field(False, description="rows: fill samples of sequence_length with several, attention kept apart")
    padding_free: bool | None = Field(
        None, description="rows: lay a micro-batch out without padding (default: where the model's attention allows it)"
    )
    group_by_length: bool = Field(False, description="rows: of about the same length in one micro-batch")
    streaming: bool = Field(
        False, description="rows: begin to train while they are still being encoded; train.steps says where it ends"
    )
    workers: int | None = Field(None, gt=0, description="rows: processes that encode them (default: CPUs)")
    cache: str | None = Field(None, description="rows: folder of encoded rows (default: .cache beside the run folder)")


class TrainSection(Section):
    steps: int | None = Field(
        None, gt=0, description="optimizer steps (may be left out where every dataset has epochs)"
    )
    epochs: float | None = Field(None, gt=0, description="fine-tuning: passes over the rows, instead of steps")
    micro_batch_size: int = Field(1, gt=0, description="samples in one forward pass of one data-parallel rank")
    global_batch_size: int = Field(8, gt=0, description="samples in one optimizer step over all ranks")
    seed: int = Field(1234, ge=0, description="of initial weights, dropout and data order")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="of forward and backward; masters are fp32")
    fp8: Literal["none", "hybrid", "e4m3"] = Field("none", description="FP8 matrix products through transformer-engine")
    recompute: Literal["none", "selective", "full"] = Field("none", description="activations recomputed in backward")
    eval_interval: int = Field(0, ge=0, description="steps between evaluations (0: none)")
    eval_steps: int = Field(10, gt=0, description="global batches in one evaluation")
    eval_answers: int = Field(
        0, ge=0, description="fine-tuning: samples of an evaluation that the model answers, into answers.jsonl"
    )
    eval_answer_tokens: int = Field(128, gt=0, description="tokens of such an answer, at most")
    log_interval: int = Field(1, gt=0, description="steps between progress lines; metrics.jsonl has every step")
    nan_policy: Literal["stop", "skip"] = Field("stop", description="a NaN or infinite loss or gradient: stop, or skip")
    spike_factor: float | None = Field(None, gt=1, description="a loss above this times its recent median is a spike")
    spike_policy: Literal["stop", "skip"] = Field("stop", description="what a spike does: stop, or skip the update")
    early_stopping_patience: int | None = Field(
        None, gt=0, description="evaluations without a better eval_loss after which the run ends"
    )
    compile: bool = Field(False, description="hf engine: torch.compile each layer")
    tiled_loss: bool | None = Field(
        None,
        description="hf engine: log-probabilities without logits, by rows (default: where ranks share sequences)",
    )
    tiled_mlp: bool | None = Field(
        None,
        description="hf engine: MLPs some tokens at a time, computed again in backward (default: where ranks share "
        "sequences and layers are recomputed)",
    )
    offload_activations: bool = Field(
        False, description="hf engine: what recomputed layers keep lies in the host's memory"
    )
    max_skipped: int = Field(10, ge=0, description="skipped steps after which the run stops")
    initial_loss_scale: float = Field(65536.0, gt=0, description="fp16: first dynamic loss scale")


class OptimizerSection(Section):
    name: Literal["adamw", "sgd", "muon"] = Field("adamw", description="the update rule")
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay")
    decay_norm_and_bias: bool = Field(
        False, description="also decay norm weights and biases (1-dimensional parameters)"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator term")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's and Muon's momentum")
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm (0: no clipping)")

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimizerSection:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self


class ScheduleSection(Section):
    name: Literal["cosine", "wsd", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear rise from 0 to optimizer.lr")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of train.steps, rounded up, as warmup_steps")
    decay_steps: int | None = Field(
        None,
        gt=0,
        description="step at which the lowest rate is reached (default: train.steps); wsd: length of the decay",
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="lowest rate as a fraction of optimizer.lr")


class ParallelSection(Section):
    tensor_model_parallel_size: int = Field(1, gt=0, description="ranks that split each layer's matrices (TP)")
    pipeline_model_parallel_size: int = Field(1, gt=0, description="pipeline stages (PP)")
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, gt=1, description="model chunks per stage: the interleaved schedule (VPP)"
    )
    context_parallel_size: int = Field(
        1,
        gt=0,
        description="ranks that share each sequence, attention included (CP, on either engine; sequence parallelism)",
    )
    ulysses_size: int | None = Field(
        None,
        gt=0,
        description="hf engine: how many of those exchange heads; the rest pass keys round a ring (default: as many "
        "as the heads allow inside a node)",
    )
    expert_model_parallel_size: int = Field(1, gt=0, description="ranks that share out the experts (EP)")
    expert_tensor_parallel_size: int | None = Field(None, gt=0, description="TP inside the experts (default: TP) (ETP)")
    sequence_parallel: bool | None = Field(
        None, description="split norms and dropout along the sequence (default: on for MoE with TP > 1)"
    )
    use_distributed_optimizer: bool = Field(True, description="shard optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = Field(True, description="reduce gradients while the backward runs")
    overlap_param_gather: bool = Field(True, description="gather parameters while the forward runs")


class CheckpointSection(Section):
    interval: int = Field(0, ge=0, description="steps between checkpoints (0: only the final one)")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")
    keep_every: int = Field(0, ge=0, description="checkpoints whose step is a multiple of this stay for ever (0: none)")
    keep_best: bool = Field(
        False, description="also keep the checkpoint with the lowest eval_loss; what is exported at the end is of it"
    )
    async_save: bool = Field(True, description="write in the background while training goes on")
    export_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="hf engine: of an exported model's weights (default: fp32, as they were trained)"
    )
    load: str | None = Field(None, description="go on from this checkpoint of another run: weights, optimizer, steps")


class ClusterSection(Section):
    nnodes: int = Field(1, gt=0, description="machines")
    nproc_per_node: int | None = Field(None, gt=0, description="ranks per machine (default: its GPUs, or 1 without)")
    address: str | None = Field(
        None, description="Ray cluster to attach to (default: RAY_ADDRESS, else one of its own)"
    )
    accelerator: Literal["auto", "gpu", "cpu"] = Field("auto", description="what the ranks compute on")
    cpus_per_rank: float = Field(1, gt=0, description="logical CPUs that one rank asks of Ray")
    threads_per_rank: int | None = Field(None, gt=0, description="OMP threads of a rank (default: by rule)")
    max_failures: int = Field(3, ge=0, description="restarts after a lost or stalled rank before the run fails")
    spares: int = Field(0, ge=0, description="warm ranks that wait to replace a lost one")
    stall_timeout: float | None = Field(
        None, gt=0, description="seconds without a step before the gang restarts (default: 10 x median step, >= 60)"
    )
    placement_timeout: float = Field(60.0, gt=0, description="seconds to wait for the machines a job asks for")
    replacement_timeout: float = Field(
        0.0, ge=0, description="seconds to wait for a new node where one is lost and no other could take its place"
    )
    rendezvous_timeout: float = Field(120.0, gt=0, description="seconds for all ranks to meet")
    dashboard: bool = Field(False, description="serve Ray's dashboard on 127.0.0.1 where the cluster is the job's own")
    preflight: bool = Field(
        True, description="look over the nodes before a job of several begins (the short form of swift-dist doctor)"
    )
    exclude_bad_nodes: bool = Field(
        False, description="look over all nodes of the cluster first, and place the ranks on good ones only"
    )
    env: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        {}, description="environment variables set for every rank"
    )

    @model_validator(mode="after")
    def _excluded_by_preflight(self) -> ClusterSection:
        if self.exclude_bad_nodes and not self.preflight:
            raise ValueError("exclude_bad_nodes needs the preflight, which finds them: leave out preflight: false")
        return self


class ReportSection(Section):
    tensorboard: bool = Field(True, description="write TensorBoard event files")
    trackers: tuple[Literal["wandb", "swanlab", "mlflow"], ...] = Field(
        (), description="experiment trackers to report to"
    )
    project: str = Field("swift_dist", description="the trackers' project name")
    name: str | None = Field(None, description="the trackers' run name (default: the output folder's name)")


class JobConfig(Section):
    """One job: everything that `swift-dist pretrain job.yaml` reads."""

    task: Literal["pretrain", "sft", "rlhf"] = Field("pretrain", description="what the job does")
    engine: Literal["megatron", "hf"] | None = Field(
        None, description="what runs the model (default: megatron for pretrain, else hf)"
    )
    output: str | None = Field(None, description="run folder (default: runs/<task>-<time>)")
    resume: Literal["auto", "never"] = Field("auto", description="continue what the run folder holds, or refuse to")
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    template: TemplateSection = TemplateSection()
    tuner: TunerSection = TunerSection()
    objective: ObjectiveSection = ObjectiveSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    strategy: StrategySection = StrategySection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    cluster: ClusterSection = ClusterSection()
    report: ReportSection = ReportSection()
    launch: LaunchSection = LaunchSection()

    @model_validator(mode="before")
    @classmethod
    def _engine_of_the_task(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("engine") is None:
            return {**values, "engine": "megatron" if values.get("task", "pretrain") == "pretrain" else "hf"}
        return values
