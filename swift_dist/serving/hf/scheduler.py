"""Continuous batching: what each step computes, for which sequences.

Sequences join and leave between any two steps. A step computes first the next part of prompts (a bounded number of
tokens, so that a long prompt does not hold up everybody's answers), then one token of every answer. Blocks are taken as
sequences grow; where none is left the sequence that joined last gives its own back and is computed again later.

transformers' own `ContinuousBatchingManager` (5.23) was looked at first: it reports the chosen token's logprob after
processing and no alternatives, knows temperature, top_k and top_p of a request but no seed, penalties, bias or guide,
runs no PEFT adapters per row and no models without keys and values. What it shares with this one, the models'
`generate`-able forward, is used here through the same public `Cache` interface.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from swift_dist.serving.hf import sampling
from swift_dist.serving.hf.cache import Blocks
from swift_dist.serving.hf.requests import Alternative, Event, Finished, Prompt, RequestFailed, Token
from swift_dist.serving.hf.runners import PooledRunner, SerialRunner
from swift_dist.serving.hf.sampling import RowSampler
from swift_dist.serving.hf.text import Detokenizer, StopTexts

log = logging.getLogger(__name__)
PROMPT_TOKENS = 512  # of prompts in one step, padding included


@dataclass(eq=False)
class Running:
    """One request in the engine's thread.

    Attributes:
        tokens: prompt and answer.
        prompt: how many of them are the prompt's.
        limit: tokens of the answer.
        deliver: where its events go.
        cached, blocks, state: as `runners.Row`.
        reused: tokens of the prompt that others had computed.
    """

    tokens: list[int]
    prompt: int
    limit: int
    sampler: RowSampler
    detokenizer: Detokenizer
    stops: StopTexts
    adapter: str | None
    deliver: Callable[[Sequence[Event | BaseException]], None]
    blocks: Blocks
    cached: int = 0
    reused: int = 0
    state: dict[str, Any] | None = None
    scored: list[Token] = field(default_factory=list)
    cancelled: bool = False

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached

    @property
    def scoring(self) -> bool:
        """Whether the prompt's own log-probabilities are still wanted."""
        wanted = self.sampler.options.prompt_logprobs is not None
        return wanted and len(self.tokens) == self.prompt and len(self.scored) < self.prompt


class Scheduler:
    """Waiting and running sequences over a runner. One thread calls it.

    Args:
        calls: groups rows by the adapters that can share a forward: rows -> [(what to call, their places)].
        piece: a token's bytes.
        guides: for rows with a guide.
        check: raises where the model does not compute any more what it should; asked after an error.
        most: sequences that run at the same time.
        most_adapters: different adapters among them.
    """

    def __init__(
        self,
        runner: PooledRunner | SerialRunner,
        *,
        calls: Callable[[Sequence[str | None]], Iterable[tuple[Any, list[int]]]],
        piece: Callable[[int], bytes],
        guides: Any,
        check: Callable[[], None],
        most: int,
        most_adapters: int,
    ) -> None:
        self._runner, self._calls, self._piece, self._guides = runner, calls, piece, guides
        self._check, self._most, self._most_adapters = check, most, most_adapters
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self._shared = runner.pool if isinstance(runner, PooledRunner) and runner.shares else None
        self._texts: dict[str | None, int] = {}  # of the model and of each adapter, for `KeyValuePool.adopt`

    def add(self, sequence: Running) -> None:
        self.waiting.append(sequence)

    def uses(self, adapter: str) -> bool:
        return any(s.adapter == adapter for s in (*self.running, *self.waiting))

    def forget(self, adapter: str) -> None:
        """The adapter is gone: what it computed is of no use to a later one of its name."""
        self._texts.pop(adapter, None)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def step(self) -> None:
        """One pass: leave, join, a part of the prompts, a token of every answer."""
        for sequence in [s for s in self.running if s.cancelled]:
            self._leave(sequence)
        self.waiting = deque(s for s in self.waiting if not s.cancelled)
        self._admit()
        prompts = self._prompts()
        if prompts:
            self._compute(*prompts)
        # A sequence whose prompt was completed just now has its first token: it goes on with the others.
        answers = self._with_room([s for s in self.running if s.pending == 1 and not s.scoring])
        if answers:
            self._compute(answers, [1] * len(answers))

    def fail(self, error: BaseException) -> None:
        """Tell everybody, and forget them."""
        for sequence in (*self.running, *self.waiting):
            sequence.deliver([error])
        self.running, self.waiting = [], deque()

    # who runs

    def _admit(self) -> None:
        later: deque[Running] = deque()
        while self.waiting and len(self.running) < self._most:
            sequence = self.waiting.popleft()
            adapters = {s.adapter for s in self.running} - {None}
            if sequence.adapter and len(adapters | {sequence.adapter}) > self._most_adapters:
                later.append(sequence)  # those behind it need not wait for its adapter
                continue
            self._adopt(sequence)
            if not self._reserve(sequence, len(sequence.tokens)):
                if sequence.cached:
                    self._give_back(sequence)
                later.append(sequence)
                break
            self.running.append(sequence)
        self.waiting.extendleft(reversed(later))

    def _adopt(self, sequence: Running) -> None:
        """Begin a sequence after the tokens that are computed already; where its prompt is scored, all are wanted."""
        if self._shared:
            text = self._texts.setdefault(sequence.adapter, self._shared.empty_text())
            sequence.cached = self._shared.adopt(sequence.blocks, text, () if sequence.scoring else sequence.tokens)
            if len(sequence.tokens) == sequence.prompt:
                sequence.reused = sequence.cached

    def _adopt_again(self, sequence: Running) -> None:
        """`_adopt` for one that waited after it joined: others with the same prompt may have been computed since."""
        if self._shared:
            self._give_back(sequence)
            self._adopt(sequence)
            self._reserve(sequence, len(sequence.tokens))  # in place of the blocks that it gave back

    def _reserve(self, sequence: Running, tokens: int) -> bool:
        if isinstance(self._runner, PooledRunner):
            return self._runner.pool.reserve(sequence.blocks, tokens)
        return sequence in self.running or self._runner.room(self.running)

    def _with_room(self, sequences: list[Running]) -> list[Running]:
        """Those that have a slot for one more token; the youngest are put back where there are too few."""
        for sequence in sequences:
            while sequence in self.running and not self._reserve(sequence, len(sequence.tokens)):
                youngest = self.running[-1]
                self._leave(youngest)
                if youngest.scoring:  # of a prompt that was told already nothing is told again
                    youngest.scored.clear()
                self.waiting.appendleft(youngest)
        return [s for s in sequences if s in self.running]

    def _leave(self, sequence: Running) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)

    def _give_back(self, sequence: Running) -> None:
        sequence.state, sequence.cached = None, 0
        if isinstance(self._runner, PooledRunner):
            self._runner.pool.release(sequence.blocks)

    # what is computed

    def _prompts(self) -> tuple[list[Running], list[int]] | None:
        """Sequences with more than one token to compute or to score, the oldest first, and how many tokens of each."""
        rows: list[Running] = []
        new: list[int] = []
        for sequence in self.running:
            if not sequence.cached and sequence.pending > 1 and not sequence.scoring:
                self._adopt_again(sequence)
            if sequence.pending < 2 and not sequence.scoring:
                continue
            number = min(sequence.pending, PROMPT_TOKENS) if self._runner.batched else sequence.pending
            if rows and (sequence.scoring or (len(rows) + 1) * max(*new, number) > PROMPT_TOKENS):
                break
            rows.append(sequence)
            new.append(number)
            if sequence.scoring or not self._runner.batched:
                break
        return (rows, new) if rows else None

    def _compute(self, rows: list[Running], new: list[int]) -> None:
        for call, places in self._calls([row.adapter for row in rows]):
            for some in [places] if self._runner.batched else [[at] for at in places]:
                group = [rows[at] for at in some]
                with self._failing(group):
                    self._forward(call, group, [new[at] for at in some])

    @contextlib.contextmanager
    def _failing(self, rows: Sequence[Running]) -> Iterator[None]:
        """An error within ends the requests of these rows; the engine goes on where the model is sound after it.

        What the rows had written is only in blocks of their own that nobody else reads before writing them: others
        read a block once it was computed without an error (`KeyValuePool.keep`).
        """
        failed = False
        try:
            yield
        except Exception as error:
            failed = True
            log.exception("requests failed: %d", len(rows))
            traceback.clear_frames(error.__traceback__)  # they hold activations, of which there may be no more room
            told = RequestFailed(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            for row in [row for row in rows if row in self.running]:
                self._leave(row)
                row.deliver([told])
        if failed:
            self._check()

    def _forward(self, call: Any, rows: list[Running], new: list[int]) -> None:
        every = len(rows) == 1 and rows[0].scoring
        logits = self._runner.forward(call, rows, new, every=every)
        if every:
            self._score(rows[0], logits)
            logits = logits[-1:]
        for row, number in zip(rows, new, strict=True):
            row.cached += number
            if self._shared:
                self._shared.keep(row.blocks, row.tokens, row.cached)
        done = [at for at, row in enumerate(rows) if row.pending == 0]
        if not done:
            return
        if len(done) < len(rows):
            logits = logits[torch.tensor(done, device=logits.device)]
        finished = [rows[at] for at in done]
        samplers = [row.sampler for row in finished]
        for row, drawn in zip(finished, sampling.draw(logits, samplers, self._guides), strict=True):
            with self._failing([row]):
                self._take(row, drawn)

    def _score(self, row: Running, logits: torch.Tensor) -> None:
        """The prompt's log-probabilities, of the tokens that `logits` [new tokens, vocabulary] are about."""
        number = row.sampler.options.prompt_logprobs
        if not row.scored:
            first = self._piece(row.tokens[0])
            row.scored.append(Token(row.tokens[0], first.decode(errors="replace"), first))
        following = row.tokens[row.cached + 1 : row.cached + 1 + len(logits)]
        reports = sampling.report(logits[: len(following)], following, [number] * len(following))
        for token, (logprob, top) in zip(following, reports, strict=True):
            piece = self._piece(token)
            row.scored.append(Token(token, piece.decode(errors="replace"), piece, logprob, self._alternatives(top)))
        if len(row.scored) == row.prompt:
            row.deliver([Prompt(tuple(row.scored))])

    def _alternatives(self, top: list[tuple[int, float]]) -> tuple[Alternative, ...]:
        return tuple(Alternative(token, self._piece(token), logprob) for token, logprob in top)

    def _take(self, row: Running, drawn: sampling.Drawn) -> None:
        """A row's new token: into the sequence, its text and event out, and the end where it is one."""
        sampler, options = row.sampler, row.sampler.options
        token = drawn.token
        row.tokens.append(token)
        sampler.took(token)
        if sampler.matcher is not None and sampler.matcher.is_error():
            # llguidance gave up (a grammar too costly to follow): what it allows from then on is nothing but the end
            raise ValueError(f"the guide cannot be followed further: {sampler.matcher.get_error()}")
        early = sampler.length <= options.min_tokens
        text = ""
        stop: str | int | None = None
        reason: Literal["stop", "length"] | None = None
        if token in sampler.ends:
            reason, stop = "stop", token
        else:
            text, stop = self._shown(row, row.detokenizer.push(token), early)
            if stop is not None or (sampler.matcher is not None and sampler.matcher.is_stopped()):
                reason = "stop"
            elif sampler.length >= row.limit:
                reason = "length"
        if reason and not isinstance(stop, str):
            rest, met = self._shown(row, row.detokenizer.flush(), early)
            text += rest
            if met is None:
                text += row.stops.flush()
            else:
                reason, stop = "stop", met
        events: list[Event] = [Token(token, text, self._piece(token), drawn.logprob, self._alternatives(drawn.top))]
        if reason:
            self._leave(row)
            events.append(Finished(reason, stop, row.prompt, sampler.length, row.reused))
        row.deliver(events)

    def _shown(self, row: Running, text: str, early: bool) -> tuple[str, str | None]:
        return (text, None) if early else row.stops.push(text)
