"""Keys and values of many sequences in one pool of blocks, shown to transformers' models as a padded batch's cache.

A model that transformers can generate a left-padded batch with needs nothing of its own: each step's view puts every
row's tokens against the right edge, so that the batch's newest tokens share a column, as after left padding. The masks
(causal, sliding, chunked) are then transformers' own, made from a 2-D attention mask, and positions are each row's.
Sequences can so join, leave and be of any length between two steps, and memory is taken by the block, not by the
longest row; only one layer's padded keys and values exist at a time.

Full blocks outlive their sequences until their place is needed: a later sequence of the same model or adapter whose
first tokens are the same reads them instead of computing them again. Free blocks are that memory, so it takes no other.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

BLOCK = 16  # tokens a block


@dataclass(frozen=True)
class LayerShape:
    """What one token takes in one layer: keys [heads, key_dim], values [heads, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Blocks:
    """A sequence's blocks: `table` [most blocks] of their numbers, of which the first `count` are its own.

    The first `kept` can be read by others; `text` stands for the tokens in them and before them.
    """

    def __init__(self, most: int) -> None:
        self.table = torch.zeros(most, dtype=torch.long)
        self.count = self.kept = self.text = 0


class KeyValuePool:
    """Blocks of keys and values on one device.

    Block 0 stays zero and is what padding reads: a masked column is multiplied with 0, which only a finite value bears.

    Args:
        shapes: of each layer that caches.
        tokens: that fit.
    """

    def __init__(self, shapes: list[LayerShape], tokens: int, device: torch.device) -> None:
        self.blocks = max(tokens // BLOCK, 1)
        slots = (self.blocks + 1) * BLOCK
        self.keys = [torch.zeros(slots, s.heads, s.key_dim, dtype=s.dtype, device=device) for s in shapes]
        self.values = [torch.zeros(slots, s.heads, s.value_dim, dtype=s.dtype, device=device) for s in shapes]
        self._free = OrderedDict.fromkeys(range(1, self.blocks + 1))  # the next to be taken first
        self._users = [0] * (self.blocks + 1)
        # A text of whole blocks has a number: that of the text before its last block and that block's tokens lead to
        # it and to where the block is. Numbers are never used again, so what follows a block that is gone is not found.
        self._texts: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._text_in: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._numbers = itertools.count(1)

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def reserve(self, blocks: Blocks, tokens: int) -> bool:
        """Give a sequence room for `tokens` in all; False, and nothing changed, where there is none."""
        more = blocks_for(tokens) - blocks.count
        if more > len(self._free):
            return False
        for _ in range(more):
            block, _ = self._free.popitem(last=False)
            if block in self._text_in:
                del self._texts[self._text_in.pop(block)]
            self._take(blocks, block)
        return True

    def release(self, blocks: Blocks) -> None:
        # a text's end is of use only with what is before it: it goes first
        for block in reversed(blocks.table[: blocks.count].tolist()):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                if block not in self._text_in:
                    self._free.move_to_end(block, last=False)
        blocks.table.zero_()
        blocks.count = blocks.kept = blocks.text = 0

    def empty_text(self) -> int:
        """The number of a text without tokens: of a model, or an adapter. No two share what follows it."""
        return next(self._numbers)

    def adopt(self, blocks: Blocks, text: int, tokens: Sequence[int]) -> int:
        """Give a sequence without blocks those that hold its first tokens already, but for at least the last one.

        Args:
            text: whose tokens they are (`empty_text`).

        Returns:
            How many tokens that are.
        """
        blocks.text = text
        for at in range(0, len(tokens) - BLOCK, BLOCK):
            text, block = self._texts.get((blocks.text, tuple(tokens[at : at + BLOCK])), (0, 0))
            if not block:
                break
            self._free.pop(block, None)
            self._take(blocks, block)
            blocks.kept, blocks.text = blocks.kept + 1, text
        return blocks.kept * BLOCK

    def keep(self, blocks: Blocks, tokens: Sequence[int], cached: int) -> None:
        """Let others read the blocks that are full, once `cached` tokens are computed. `adopt` came before."""
        while (blocks.kept + 1) * BLOCK <= cached:
            at = blocks.kept * BLOCK
            text = (blocks.text, tuple(tokens[at : at + BLOCK]))
            if text not in self._texts:  # another sequence may have been faster
                block = int(blocks.table[blocks.kept])
                self._texts[text] = (next(self._numbers), block)
                self._text_in[block] = text
            blocks.kept, blocks.text = blocks.kept + 1, self._texts[text][0]

    def _take(self, blocks: Blocks, block: int) -> None:
        self._users[block] += 1
        blocks.table[blocks.count] = block
        blocks.count += 1


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


@dataclass(frozen=True)
class StepView:
    """One step's batch of R rows, each with up to Q new tokens, L columns in all.

    Attributes:
        read: slot of each column [R, L]; padding reads slot 0.
        mask: which columns are the row's own [R, L], bool.
        positions: of the Q newest columns in their rows [R, Q].
        write: slots of the new tokens [tokens].
        fresh: where they are among the R x Q columns [tokens]; None: all of them, in order.
    """

    read: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    write: torch.Tensor
    fresh: torch.Tensor | None

    @classmethod
    def of(cls, tables: torch.Tensor, cached: torch.Tensor, new: torch.Tensor) -> StepView:
        """From block tables [R, blocks], and how many tokens each row has cached and adds [R]."""
        lengths = cached + new
        columns, queries = int(lengths.max()), int(new.max())
        positions = torch.arange(columns, device=tables.device) - (columns - lengths)[:, None]
        mask = positions >= 0
        places = positions.clamp(min=0)
        read = tables.gather(1, places // BLOCK) * BLOCK + places % BLOCK
        read = read.masked_fill_(~mask, 0)
        last = slice(columns - queries, columns)
        fresh = None
        write = read[:, last].reshape(-1)
        if bool((new != queries).any()):
            real = torch.arange(queries, device=tables.device) >= (queries - new)[:, None]
            fresh = real.reshape(-1).nonzero().squeeze(1)
            write = write[fresh]
        return cls(read, mask, places[:, last], write, fresh)


class _Layer(CacheLayerMixin):
    """One layer of a `PooledCache`: writes the new tokens, reads every row's."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, view: StepView) -> None:
        super().__init__()
        self._keys, self._values, self._view = keys, values, view
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From new keys and values [R, heads, Q, dim] to all of them [R, heads, L, dim]."""
        return self._through(self._keys, key_states), self._through(self._values, value_states)

    def _through(self, pool: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        rows, heads, queries, dim = states.shape
        new = states.transpose(1, 2).reshape(rows * queries, heads, dim)
        view = self._view
        pool.index_copy_(0, view.write, new if view.fresh is None else new.index_select(0, view.fresh))
        every = pool.index_select(0, view.read.view(-1))
        return every.view(rows, -1, heads, dim).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._view.read.shape[1], 0

    def get_seq_length(self) -> int:
        return self._view.read.shape[1] - self._view.positions.shape[1]

    def get_max_length(self) -> int:
        return -1


class PooledCache(Cache):
    """A pool as the cache of one forward."""

    def __init__(self, pool: KeyValuePool, view: StepView) -> None:
        super().__init__(layers=[_Layer(k, v, view) for k, v in zip(pool.keys, pool.values, strict=True)])
