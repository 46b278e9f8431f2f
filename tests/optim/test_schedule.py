from __future__ import annotations

import math

import pytest

from swift_dist.config import ScheduleSection
from swift_dist.errors import JobError
from swift_dist.optim import build_schedule, decays


def schedule(peak: float = 1.0, steps: int = 100, **section: object):
    return build_schedule(ScheduleSection(**section), peak=peak, train_steps=steps)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_evenly_to_the_peak_and_nothing_exceeds_it(name: str) -> None:
    lr = schedule(name=name, warmup_steps=9)
    assert [lr(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(lr(step) for step in range(200)) == 1.0


def test_cosine_is_half_way_down_in_the_middle_and_stays_at_the_bottom() -> None:
    lr = schedule(name="cosine", warmup_steps=20, min_lr_ratio=0.1)
    assert lr(20) == 1.0
    assert lr(60) == pytest.approx(0.55)
    assert lr(40) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr(100) == lr(1000) == pytest.approx(0.1)


def test_linear_falls_evenly_to_its_end() -> None:
    lr = schedule(name="linear", min_lr_ratio=0.0, decay_steps=50)
    assert [lr(0), lr(25), lr(50), lr(99)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_wsd_holds_the_peak_and_falls_at_the_end() -> None:
    lr = schedule(name="wsd", warmup_steps=5, decay_steps=20, min_lr_ratio=0.2)
    assert {lr(step) for step in range(5, 81)} == {1.0}
    assert lr(90) == pytest.approx(0.6)
    assert lr(100) == pytest.approx(0.2)


def test_constant_never_falls() -> None:
    lr = schedule(name="constant", peak=3e-4)
    assert lr(0) == lr(10**6) == 3e-4


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"name": "cosine", "warmup_steps": 100}, "schedule.warmup_steps"),
        ({"name": "linear", "warmup_steps": 50, "decay_steps": 40}, "schedule.warmup_steps"),
        ({"name": "wsd", "warmup_steps": 50, "decay_steps": 60}, "schedule.decay_steps"),
    ],
)
def test_what_does_not_fit_is_refused(section: dict, key: str) -> None:
    with pytest.raises(JobError) as error:
        schedule(**section)
    assert error.value.key == key


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    rule = {"decay_norm_and_bias": False}
    assert decays("decoder.layers.0.mlp.linear_fc1.weight", (4, 4), **rule)
    assert decays("embedding.word_embeddings.weight", (4, 4), **rule)
    assert not decays("decoder.final_layernorm.weight", (4,), **rule)
    assert not decays("decoder.layers.0.self_attention.linear_qkv.bias", (4,), **rule)
    assert not decays("base_model.model.model.layers.0.self_attn.k_proj.ia3_l.default", (4, 1), **rule)  # begins at 1
    assert decays("base_model.model.model.layers.0.self_attn.k_proj.lora_A.default.weight", (1, 4), **rule)
    assert decays("decoder.final_layernorm.weight", (4,), decay_norm_and_bias=True)
