"""`swift-dist infer`: a conversation in the terminal, one prompt, or the rows of a dataset.

It starts engines of its own, or asks a server that runs (``--url``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from swift_dist.errors import EXIT_FAILED, EXIT_INTERRUPTED, JobError, RunError
from swift_dist.serving.inference.sampling import SamplingOptions, request_fields
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.sources.source import SourceOptions

if TYPE_CHECKING:
    from openai import OpenAI

    from swift_dist.data.rows.prompts import PromptSource
    from swift_dist.serving.inference.batch import Asking
    from swift_dist.serving.inference.pool import Replica
    from swift_dist.serving.sources.source import Source

log = logging.getLogger(__name__)

ALIASES = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "max_new_tokens": "max_tokens",
    "ckpt_dir": "model",
    "val_dataset": "dataset",
}
_OF_BATCHES = ("output", "resume", "format", "columns", "concurrency", "replicas", "launcher", "ray_address", "usage")
_OF_ANSWERS_AT_ONCE = ("n", "logprobs", "top_logprobs")
_REMOTE_CONCURRENCY = 64


class InferOptions(SourceOptions, SamplingOptions, EngineOptions):
    prompt: str | None = Field(None, description="one message: print its answer and end (default: a conversation)")
    system: str | None = Field(None, description="system message, before conversations that have none")
    complete: bool = Field(False, description="go on with the prompt as it stands, without a chat template")
    adapter: str | None = Field(None, description="which of the adapters answers (default: the one there is)")
    dataset: tuple[str, ...] = Field((), description="rows to answer: files, folders or hub ids of any row format")
    format: str = Field("auto", description="of the rows, a file of swift_dist/data/rows (auto: by their columns)")
    columns: dict[str, str] = Field({}, description="{name that a format knows: name in the file}")
    output: str | None = Field(None, description="JSONL file of the answered rows, in the order of the dataset")
    resume: Literal["auto", "never"] = Field("auto", description="go on with an output that is there, or refuse it")
    concurrency: int | None = Field(
        None, gt=0, description="rows asked at once (default: max_num_seqs of each engine; 64 of a --url)"
    )
    replicas: int = Field(1, gt=0, description="engines that share the rows")
    launcher: Literal["local", "ray"] = Field(
        "local", description="engines on this machine, or on a Ray cluster that runs"
    )
    ray_address: str | None = Field(None, description="of --launcher ray (default: RAY_ADDRESS, or this machine's)")
    usage: bool = Field(False, description="give each row its counts of tokens")
    url: str | None = Field(None, description="ask this OpenAI server instead (its key: variable OPENAI_API_KEY)")


def run(options: InferOptions) -> dict[str, Any] | None:
    """Answer what is asked.

    Returns:
        of a dataset: see `answer_rows`; of a prompt: ``{"response", "finish_reason", ...}``, the columns that a row
        would get; of a conversation None.

    Raises:
        JobError: the options are wrong; nothing was started. RunError: no engine could be started, or it failed.
        KeyboardInterrupt: interrupted; the same command goes on.
    """
    check_options(options)
    if options.dataset:
        return answer_rows(options)
    if options.prompt is not None:
        return answer_prompt(options)
    return converse(options)


def check_options(options: InferOptions) -> None:
    """Raises JobError for options that contradict each other, or that nothing would read."""
    given = options.model_fields_set

    def refuse(names: Sequence[str], problem: str, remedy: str) -> None:
        wrong = [name for name in names if name in given and getattr(options, name) not in (None, (), {}, False)]
        if wrong:
            raise JobError(wrong[0], problem, remedy)

    if options.task == "embed":
        raise JobError("task", "infer generates text", "swift_dist.Engine(...).embed, or swift-dist deploy")
    if options.dataset and options.prompt is not None:
        raise JobError("prompt", "is given beside --dataset", "give one of them")
    if not options.dataset:
        refuse(
            _OF_BATCHES, "is read with --dataset only", "--dataset ROWS.jsonl --output ANSWERS.jsonl, or leave it out"
        )
        if options.prompt is None:
            refuse((*_OF_ANSWERS_AT_ONCE, "complete"), "is read with --prompt and --dataset only", "leave it out")
    else:
        refuse(("complete",), "is of --prompt; rows with a column text are gone on with as they stand", "leave it out")
        if not options.output:
            raise JobError("output", "is not given", "--output ANSWERS.jsonl")
    if options.complete:
        refuse(("system", "json_schema", "chat_template"), "is of conversations; --complete has none", "leave it out")
    if options.launcher == "local":
        refuse(("ray_address",), "is not read with launcher local", "add --launcher ray, or leave it out")
    if options.url:
        engine = [name for name in EngineOptions.model_fields if name != "seed"]
        source = [name for name in SourceOptions.model_fields if name != "model"]
        refuse([*engine, *source, "replicas"], "has no effect on the server at --url", "leave it out")
        refuse(("launcher",), "starts nothing with --url", "leave it out")
    elif not options.model:
        raise JobError("model", "is not given", "--model PATH, or --url of a server that runs")
    request_fields(options, chat=True)


def fields_of(options: InferOptions, *, chat: bool) -> dict[str, Any]:
    """The fields of a request. Of the seed: where it was given; else each engine draws by its own."""
    fields = request_fields(options, options.seed if "seed" in options.model_fields_set else None, chat=chat)
    if not chat:
        fields.pop("response_format", None)
    return fields


def chosen_name(options: InferOptions, source: Source) -> str:
    """Who answers: the adapter that is meant, else the model.

    Raises:
        JobError: it is not clear, there is no such adapter, or the model is one of embeddings.
    """
    if source.task == "embed":
        raise JobError("model", f"{source.description} is for embeddings", "swift-dist deploy, or --task generate")
    names = [source.base_name, *source.adapters]
    if options.adapter is not None:
        if options.adapter not in names:
            raise JobError("adapter", f"{options.adapter} is not among {', '.join(names)}", "--adapters name=DIR")
        return options.adapter
    if source.name in source.adapters and not options.adapters:
        return source.name
    if len(source.adapters) == 1:
        return next(iter(source.adapters))
    if source.adapters:
        raise JobError("adapter", f"there are {', '.join(source.adapters)}", "--adapter NAME says which one answers")
    return source.base_name


def remote_name(options: InferOptions) -> tuple[str, list[str]]:
    """(who answers, who could) at --url: what --model says, else the only model there.

    Raises:
        JobError: it serves several, or none of that name. RunError: it does not answer.
    """
    from swift_dist.serving.inference.client import served_models

    names = served_models(str(options.url))
    wanted = options.adapter or options.model
    if wanted is None and len(names) == 1:
        return names[0], names
    if wanted not in names:
        key = "adapter" if options.adapter else "model"
        problem = f"{wanted} is not served there" if wanted else "the server has several"
        raise JobError(key, f"{problem}: {', '.join(names)}", "--model NAME, one of these")
    return wanted, names


@contextmanager
def one_server(options: InferOptions) -> Iterator[tuple[str, str, list[str], Callable[[], OpenAI]]]:
    """(name that answers, URL, names there, what gives a client of a server that runs) for a prompt or a conversation.

    An engine that has ended is started again by the last of these.
    """
    from swift_dist.serving.inference.client import open_client

    with ExitStack() as stack:
        if options.url:
            name, names = remote_name(options)
            client = stack.enter_context(open_client(options.url, is_ours=False))
            yield name, options.url, names, lambda: client
            return
        from swift_dist.serving.families import template_of
        from swift_dist.serving.inference.replicas import LogFolder, engine_for, local_replicas
        from swift_dist.serving.sources.made import in_use
        from swift_dist.serving.sources.source import resolve_options

        source = resolve_options(options, trust_remote_code=options.trust_remote_code, task=options.task)
        name = chosen_name(options, source)
        stack.enter_context(in_use(*source.folders))
        engines = engine_for(options, source)
        has_own_format = (Path(source.path) / "tekken.json").is_file()  # vLLM's own for Mistral, without a template
        if not (options.complete or has_own_format or template_of(source.path, options)):
            remedy = "--chat_template FILE, or --prompt TEXT --complete true"
            raise JobError("chat_template", f"{source.description} has none to ask with", remedy)
        replica = local_replicas(engines, 1, stack.enter_context(LogFolder()))[0]
        stack.callback(replica.stop)
        log.info("%s: starting the %s engine", source.description, engines.engine.name)
        began = time.monotonic()
        url = replica.start()
        log.info("ready after %.1f s", time.monotonic() - began)
        clients = {url: stack.enter_context(open_client(url, is_ours=True))}

        def connect() -> OpenAI:
            if not replica.alive():
                log.warning("the engine has ended: it is started again")
                new = replica.start()
                clients[new] = stack.enter_context(open_client(new, is_ours=True))
            return clients[replica.process.url]

        yield name, url, [source.base_name, *source.adapters], connect


def answer_prompt(options: InferOptions) -> dict[str, Any]:
    """The answer to --prompt."""
    import openai

    from swift_dist.data.rows.prompts import Prompt
    from swift_dist.serving.inference.batch import Asking, answered_row, messages_of
    from swift_dist.serving.inference.client import arguments, as_run_error

    assert options.prompt is not None
    prompt = (
        Prompt("prompt", {}, text=options.prompt)
        if options.complete
        else Prompt("prompt", {}, ({"role": "user", "content": options.prompt},))
    )
    with one_server(options) as (name, url, _, connect):
        fields = arguments(name, fields_of(options, chat=not options.complete))
        messages: Any = messages_of(prompt, options.system)
        try:
            answer: Any = (
                connect().completions.create(prompt=options.prompt, **fields)
                if options.complete
                else connect().chat.completions.create(messages=messages, **fields)
            )
        except openai.APIError as error:
            raise as_run_error(error, url) from None
    return answered_row(prompt, answer, Asking(name, {}, {}, usage=True))


def converse(options: InferOptions) -> dict[str, Any] | None:
    """A conversation on stdin and stdout."""
    from swift_dist.serving.inference.chat import Chat, talk

    if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
        # Of the command line: Ctrl-C stops an answer here, and this is no Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))
    with one_server(options) as (name, _, names, connect):
        failed = talk(Chat(connect, name, names, fields_of(options, chat=True), options.system))
    if failed:
        raise RunError(f"{failed} messages got no answer")
    return None


def answer_rows(options: InferOptions) -> dict[str, Any]:
    """Answer every row of --dataset that has no answer yet.

    Returns:
        ``output``; ``rows`` in it; of those ``failed``; ``answered`` by this command, in ``seconds`` with ``tokens``
        and ``tokens_per_second``; engines' ``restarts``; ``exit_code`` 1 where rows failed.
    """
    from swift_dist.data.rows.prompts import PromptSource
    from swift_dist.serving.inference.journal import Journal

    rows = PromptSource(options.dataset, options.format, options.columns, "dataset")
    if options.url:
        name, source = remote_name(options)[0], None
    else:
        from swift_dist.serving.sources.source import resolve_options

        source = resolve_options(options, trust_remote_code=options.trust_remote_code, task=options.task)
        name = chosen_name(options, source)
    identity = identity_of(options, rows, source, name)
    assert options.output is not None
    journal = Journal(Path(options.output), identity, resume=options.resume == "auto")
    journal.check()
    if journal.is_finished:
        log.info("%s is whole: nothing is left to be done", options.output)
        return {**_summary(journal.record), "output": str(journal.output), "answered": 0, "exit_code": 0}
    with ExitStack() as stack:
        # before the journal: an engine that cannot be had leaves no file behind
        replicas = _replicas(options, source, stack)
        with journal:
            return _answer(options, rows, journal, replicas, _asking(options, name))


def _answer(
    options: InferOptions, rows: PromptSource, journal: Any, replicas: Sequence[Replica], asking: Asking
) -> dict[str, Any]:
    from swift_dist.serving.inference.batch import Batch, run_async
    from swift_dist.serving.inference.pool import EnginePool

    total = rows.count()
    if not total:
        raise JobError("dataset", f"{', '.join(options.dataset)}: there are no rows in it", "give files with rows")
    each = options.max_num_seqs if not options.url else _REMOTE_CONCURRENCY
    concurrency = options.concurrency or each * len(replicas)
    restarts, numbers = 0, {"tokens": 0, "seconds": 0.0, "tokens_per_second": 0.0}
    before = len(journal.done) - len(journal.failed)

    async def ask_all() -> tuple[int, dict[str, Any]]:
        pool = EnginePool(replicas, -(-concurrency // len(replicas)))
        batch = Batch(iter(rows), total, journal, pool, asking, concurrency)
        await batch.run()
        seconds = batch.progress.seconds
        rate = batch.progress.tokens / seconds if seconds else 0.0
        found = {"tokens": batch.progress.tokens, "seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)}
        return pool.restarts, found

    if before < total:
        try:
            restarts, numbers = run_async(ask_all)
        except KeyboardInterrupt:
            done = len(journal.done) - len(journal.failed)
            raise KeyboardInterrupt(
                f"interrupted: {done} of {total} rows are answered; the same command goes on"
            ) from None
    numbers = {**numbers, "answered": total - len(journal.failed) - before, "restarts": restarts}
    failed = len(journal.failed)
    journal.finish(total, numbers)
    result = {"output": str(journal.output), "rows": total, "failed": failed, **numbers}
    return {**result, "exit_code": EXIT_FAILED if failed else 0}


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "of"}


def identity_of(options: InferOptions, rows: PromptSource, source: Source | None, name: str) -> dict[str, Any]:
    """All that answers depend on; the engine, its replicas and its address may change on the way.

    Args:
        source: None: `name` of a server that runs, whose weights cannot be seen.
    """
    from swift_dist.serving.families import given_template
    from swift_dist.serving.inference.journal import files_of
    from swift_dist.serving.sources.made import facts

    folders = [] if source is None else [source.path, *([source.adapters[name]] if name in source.adapters else [])]
    own = files_of(Path(options.output or ""))  # which may lie in one of them
    files = json.dumps([facts(Path(folder), but=own) for folder in folders]).encode()
    template = given_template(options.chat_template).encode() if options.chat_template else None
    sampling = [key for key in SamplingOptions.model_fields if key != "json_schema"]  # in one order in every process
    of_rows = ("system", "complete", "format", "columns", "usage")
    of_engine = ("dtype", "agent_format", "tool_call_parser", "reasoning_parser", "engine_args")
    settings = {key: getattr(options, key) for key in (*sampling, *of_rows, *of_engine)}
    schema = request_fields(options).get("response_format")
    return {
        "dataset": rows.fingerprint(),
        "model": " with ".join(folders) or name,
        "weights": hashlib.sha256(files).hexdigest()[:16] if folders else None,
        "chat_template": template and hashlib.sha256(template).hexdigest()[:16],
        "seed": options.seed if "seed" in options.model_fields_set else None,
        "json_schema": schema and schema["json_schema"]["schema"],
        **settings,
    }


def _asking(options: InferOptions, name: str) -> Asking:
    from swift_dist.serving.inference.batch import Asking

    return Asking(name, fields_of(options, chat=True), fields_of(options, chat=False), options.system, options.usage)


def _replicas(options: InferOptions, source: Source | None, stack: ExitStack) -> Sequence[Replica]:
    """What answers the rows, not started yet."""
    from swift_dist.serving.inference.replicas import LogFolder, RemoteReplica, engine_for, local_replicas
    from swift_dist.serving.sources.made import in_use

    if source is None:
        return [RemoteReplica(str(options.url))]
    stack.enter_context(in_use(*source.folders))
    if options.launcher == "ray":
        from swift_dist.serving.inference.ray_engines import ray_replicas

        return ray_replicas(options, source, options.replicas, options.ray_address, stack)
    engines = engine_for(options, source)
    log.info("%s: %d engines of %s", source.description, options.replicas, engines.engine.name)
    return local_replicas(engines, options.replicas, stack.enter_context(LogFolder()))


def render(result: dict[str, Any] | None) -> str:
    """For people."""
    if result is None:
        return ""
    if "output" not in result:
        answers = result["response"] if isinstance(result["response"], list) else [result["response"]]
        calls = [f"\n{call}" for call in result.get("tool_calls") or ()]
        return "\n\n".join(answers) + "".join(calls)
    text = f"{result['output']}: {result['rows']} rows"
    if result.get("answered"):
        text += f", {result['answered']} answered now at {result['tokens_per_second']:g} tokens/s"
    return text + (f", {result['failed']} FAILED (column error)" if result.get("failed") else "")
