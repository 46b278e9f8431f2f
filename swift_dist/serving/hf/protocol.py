"""What requests of the OpenAI API may hold. A field that is not here is refused, never ignored.

The exceptions say for themselves that they change nothing. Fields that OpenAI does not know are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

INT64 = 2**63
MAX_CHOICES = 128
MAX_LOGPROBS = 20
Number = int | float
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]
IdLists = Annotated[list[Ids], Field(min_length=1, max_length=2048)]
Prompt = str | Texts | Ids | IdLists
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,256}$")]


class Body(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class TextPart(Body):
    type: Literal["text"]
    text: str


class OtherPart(BaseModel):
    """A picture, sound, video or file, which models of text cannot take: refused with its name."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["image_url", "input_audio", "video_url", "audio_url", "file", "refusal", "image", "video"]


class FunctionCall(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: str = "{}"


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)  # clients send back what a stream gave them, such as `index`
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A message of a conversation. Other fields of a message are given back by clients and are not read."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | OtherPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_content)):
            raise ValueError(f"a message of the {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant calls tools")
        return self


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="calls that are forced always fit the schema; those the model chooses to make only with true"
    )


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Body):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="the answer always fits the schema, whatever is said here")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type json_schema, and only there")
        return self


class StructuredOutputs(Body):
    """vLLM's way of saying what the text must be; exactly one."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar]
        if sum(value is not None for value in given) != 1:
            raise ValueError("exactly one of json, json_object, regex, choice and grammar")
        return self


class StreamOptions(Body):
    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(None, description="changes nothing: nothing is added to chunks")


class SamplingBody(Body):
    """What text completions and chats have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = 0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = 0
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=32)] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description="changes nothing")
    metadata: dict[str, Any] | None = Field(None, description="changes nothing")
    safety_identifier: str | None = Field(None, description="changes nothing")
    prompt_cache_key: str | None = Field(None, description="changes nothing")
    service_tier: Literal["auto", "default"] | None = Field(None, description="changes nothing: there is one tier")
    store: Literal[False] | None = Field(None, description="nothing is stored")

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, Number] | None) -> dict[str, Number] | None:
        if any(not key.isascii() or not key.isdecimal() or len(key) > 10 for key in bias or {}):
            raise ValueError("the keys of logit_bias are token ids")
        return bias

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and "" in stop:
            raise ValueError("an empty stop text would end every answer at once")
        return stop

    @model_validator(mode="after")
    def _agrees(self) -> SamplingBody:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream: true")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.structured_outputs:
            raise ValueError("response_format and structured_outputs both say what the text must be")
        return self


class ChatRequest(SamplingBody):
    """``POST /v1/chat/completions``"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = Field(None, description="answers are text")

    @model_validator(mode="after")
    def _chat_agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ValueError("continue_final_message and add_generation_prompt exclude each other")
            if self.messages[-1].role != "assistant":
                raise ValueError("continue_final_message needs a last message of the assistant")
        choice = self.tool_choice
        if choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if choice.function.name not in names:
                raise ValueError(f"tool_choice names {choice.function.name!r}, which is not one of tools")
        return self


class CompletionRequest(SamplingBody):
    """``POST /v1/completions``"""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="of the answer (default: 16, or as many as the context has room for)"
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _completion_agrees(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of is at least n")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("the best of several answers is known only at their end: no stream")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is at least 1 (0 only with echo)")
        if self.max_tokens == 0 and self.stream:
            raise ValueError("max_tokens 0 cannot be streamed")
        return self


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``"""

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = Field(None, description="changes nothing")


class LoadAdapter(Body):
    """``POST /v1/load_lora_adapter``"""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapter(Body):
    """``POST /v1/unload_lora_adapter``"""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]


class Tokenize(Body):
    """``POST /tokenize``, of a text or a conversation"""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> Tokenize:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages")
        return self


class Detokenize(Body):
    """``POST /detokenize``"""

    model: str | None = None
    tokens: list[TokenId]
