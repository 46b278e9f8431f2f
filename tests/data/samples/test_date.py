"""The date that chat templates write: one for all workers of a run, and the same after a resume."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import yaml

from swift_dist.config.finetune import TemplateSection
from swift_dist.config.section import updated
from swift_dist.data.rows.base import Row
from swift_dist.data.templates.template import load_template
from swift_dist.finetune import _with_date
from tests.data.samples.cases import CHATML, conversation, job, make_tokenizer


def test_the_template_writes_the_jobs_date(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    template = load_template(str(folder), TemplateSection(date="2031-05-06"))
    template.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    ids = template.encode(Row(messages=tuple(conversation("q", "a")["messages"]))).ids
    assert template.tokenizer.decode(ids).startswith("06 May 2031")


def test_a_run_keeps_the_date_on_which_it_began(tmp_path: Path) -> None:
    new = _with_date(job(), str(tmp_path / "run"))
    assert new.template.date == date.today().isoformat()
    (tmp_path / "run").mkdir()
    began = updated(new, template=updated(new.template, date="2020-02-02"))
    (tmp_path / "run" / "job.yaml").write_text(yaml.safe_dump(began.model_dump(mode="json")))
    assert _with_date(job(), str(tmp_path / "run")).template.date == "2020-02-02"
    given = job(template={"date": "2021-03-03"})
    assert _with_date(given, str(tmp_path / "run")).template.date == "2021-03-03"
