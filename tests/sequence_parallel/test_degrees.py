"""How a group is divided into Ulysses and ring, and who holds which tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_dist.errors import JobError
from swift_dist.sequence_parallel.degrees import Degrees, choose, fits_heads
from swift_dist.sequence_parallel.limits import ring_refusal, row_refusal
from swift_dist.sequence_parallel.row import Row, row_for_all
from swift_dist.sequence_parallel.ulysses import heads_of_ranks


@pytest.mark.parametrize(
    "size, heads, kv_heads, per_node, expected",
    [
        (8, 32, 8, 8, (8, 1)),
        (8, 32, 8, 4, (4, 2)),  # the ring goes across nodes
        (16, 32, 8, 8, (8, 2)),
        (4, 6, 2, 8, (2, 2)),  # 4 does not divide 6 heads
        (8, 8, 1, 8, (8, 1)),  # one key-value head on every rank
        (3, 8, 4, 3, (1, 3)),
        (6, 12, 4, 6, (2, 3)),  # 3 and 6 ranks share 12 heads, but not 4 key-value heads
        (1, 7, 7, 1, (1, 1)),
        (5, 7, 7, 5, (1, 5)),
    ],
)
def test_chosen(size, heads, kv_heads, per_node, expected):
    found = choose(size, [(heads, kv_heads)], per_node)
    assert (found.ulysses, found.ring) == expected and found.size == size


def test_named_degrees():
    assert choose(8, [(8, 8)], 8, ulysses=2) == Degrees(2, 4)
    for wrong in (3, 16):
        with pytest.raises(JobError, match="one of 1, 2, 4, 8"):
            choose(8, [(8, 8)], 8, ulysses=wrong)


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 8))
def test_each_rank_gets_the_keys_of_its_queries(groups, kv_heads, ranks):
    heads = groups * kv_heads
    if not fits_heads(ranks, heads, kv_heads):
        return
    sent = heads_of_ranks(heads, kv_heads, ranks)
    per_rank, queries = len(sent) // ranks, heads // ranks
    for rank in range(ranks):
        mine = sent[rank * per_rank : (rank + 1) * per_rank]
        wanted = [query // groups for query in range(rank * queries, (rank + 1) * queries)]
        # as attention pairs them: query head i of a rank with its key-value head i // (queries / key-value heads)
        assert [mine[index // (queries // per_rank)] for index in range(queries)] == wanted


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 4), st.integers(1, 4))
def test_every_token_has_one_rank(lengths, ulysses, ring):
    row = Row(tuple(lengths), Degrees(ulysses, ring))
    assert sorted(row.order.tolist()) == list(range(sum(lengths)))
    assert [len(row.of(rank)) for rank in range(row.degrees.size)] == list(row.sizes)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 64))
def test_no_rank_is_left_without_a_token(lengths, ulysses, ring):
    degrees = Degrees(ulysses, ring)
    row = row_for_all(tuple(lengths), degrees)
    assert min(row.sizes) >= 1
    assert row.lengths == tuple(lengths) or min(Row(tuple(lengths), degrees).sizes) == 0
    assert sum(row.lengths) - sum(lengths) <= 3 * degrees.size


GQA = {"num_attention_heads": 8, "num_key_value_heads": 2}
LATENT = {**GQA, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}


@pytest.mark.parametrize(
    "config, reason",
    [
        (GQA, None),
        ({**GQA, "attn_logit_softcapping": None, "model_type": "gemma2"}, None),
        ({**GQA, "model_type": "gemma2"}, "softcap"),  # 50 where config.json does not say
        ({**GQA, "attn_logit_softcapping": 30.0}, "softcap"),
        ({**GQA, "model_type": "gpt_oss"}, "sinks"),
        ({**GQA, "attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({**GQA, "attn_pdrop": 0.0}, None),
        ({**LATENT, "v_head_dim": 8}, "values of 8 numbers and keys of 12"),
        ({**LATENT, "v_head_dim": 12}, None),
        ({**GQA, "head_dim": 192, "v_head_dim": 128}, "values of 128 numbers and keys of 192"),
    ],
)
def test_what_cannot_go_round_a_ring(config, reason):
    found = ring_refusal(config)
    assert found is None if reason is None else reason in str(found)


def test_a_model_that_cannot_go_round_a_ring_is_shared_by_heads_alone():
    assert choose(4, [(8, 2)], 2, no_ring="it has sinks") == Degrees(4, 1)  # across nodes, too
    assert choose(4, [(8, 2)], 4, ulysses=4, no_ring="it has sinks") == Degrees(4, 1)
    with pytest.raises(JobError, match=r"it has sinks.*\n.*one of 1, 2, 4") as caught:
        choose(3, [(8, 2)], 6, no_ring="it has sinks")
    assert caught.value.key == "parallel.context_parallel_size"
    with pytest.raises(JobError, match="2 of 4 ranks leaves a ring") as caught:
        choose(4, [(8, 2)], 4, ulysses=2, no_ring="it has sinks")
    assert caught.value.key == "parallel.ulysses_size"


def test_types_of_models_that_cannot_share_rows_are_those_of_the_table():
    table = Path(__file__).parents[2] / "docs" / "tables" / "architectures.md"
    rows = [line.split("|") for line in table.read_text().splitlines() if line.startswith("| ") and "class" not in line]
    packs = {name.strip(): verdict.strip() == "yes" for _, name, _, verdict, _ in rows}
    assert len(packs) > 100 and not packs["mamba"] and packs["llama"]
    assert {name: row_refusal({"model_type": name}) is None for name in packs} == packs


def test_layers_that_carry_state_along_the_row():
    assert row_refusal({"layer_types": ["full_attention", "sliding_attention"]}) is None
    assert "conv, mamba layers" in str(row_refusal({"layer_types": ["mamba", "full_attention", "conv"]}))
