"""The study of indirect object identification finds the bottlenecks of tiny-mamba and says what its numbers are of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_models import hooked

from ssminterp import HookedMamba
from ssminterp.patching import ablate_layers
from ssminterp.studies import IOIStudy, beside_the_paper, disagreements, ioi_study, summary
from ssminterp.studies.ioi_report import as_text, save_ioi_report, study_tables
from ssminterp.tasks import make_task


@pytest.fixture(scope="module")
def model() -> HookedMamba:
    return HookedMamba.from_pretrained("tiny-mamba")


@pytest.fixture(scope="module")
def study(model: HookedMamba) -> IOIStudy:
    return ioi_study(model, 6, progress=False)


def test_the_bottlenecks_of_tiny_mamba_are_in_the_summary(study: IOIStudy) -> None:
    answers = summary(study).set_index("question")["answer"]
    assert study.key_layer == 2
    assert answers["Does it do the task?"] == "100% right"
    assert answers["Without which layer's output does it fail?"] == "0, 1, 2"
    assert answers["Which layers' output depends on the names?"] == "0, 2"
    assert answers["Which layers pass the names on?"] == "2, in every set that suffices"
    assert answers["At which tokens does layer 2 get the names?"] == "IO, S2"
    assert answers["In what of that layer are they?"] == "x, state"
    assert answers["From where on is its state enough?"] == "S2, S2+1, end"
    assert answers["Which tap of that layer's conv carries them?"] == "the token's own"
    assert answers["Which names must the last token read from a state?"] == "IO, S2"
    assert "⟨IO⟩ → (x of layer 0) → (state of layer 2)" in answers["Which way does the answer come?"]
    (exchange,) = [answer for question, answer in answers.items() if "average x" in str(question)]
    assert exchange == "100% of the prompts"


def test_a_model_that_fails_the_task_is_not_read_as_if_it_did_it(study: IOIStudy) -> None:
    weak = replace(
        study,
        baseline=study.baseline.assign(accuracy=0.2),
        minimal_sets=study.minimal_sets.assign(layers=[[] for _ in study.minimal_sets.index]),
    )
    answers = summary(weak).set_index("question")["answer"]
    assert answers["Does it do the task?"] == "20% right: no, so what follows says nothing of how it is done"
    assert answers["Which layers pass the names on?"] == "none is in every set that suffices"


def test_its_numbers_are_those_of_the_tools(study: IOIStudy, model: HookedMamba) -> None:
    three = make_task("ioi_ensign", model.tokenizer, n=3, seed=0)
    metric = three.metric("probability")
    found = ablate_layers(model, three.clean, metric, method="zero", progress=False)["probability"]
    np.testing.assert_allclose(study.zero["probability"], found, atol=1e-5)
    assert study.baseline["probability"].iloc[0] == pytest.approx(found.attrs["baseline"], abs=1e-5)
    # A patch of every hook at a layer's input is a patch of the input; of the state at the end, of all that it holds.
    sites = study.sites.sel(layer=2)
    assert float(sites.sel(hook="state", position="end")) == pytest.approx(1.0, abs=0.05)
    np.testing.assert_allclose(study.taps.sel(back=0), sites.sel(hook="x"), atol=0.06)
    total = float(study.flow["total"])
    state = study.flow["state"].sel(layer=2, target=study.flow.attrs["end"])
    assert float(state.sum()) == pytest.approx(total, rel=0.15)


def test_disagreements_name_both_sides(study: IOIStudy) -> None:
    table = disagreements(study).set_index("question")
    layer = table.loc["Is layer 1 needed?"]
    assert layer["one"].startswith("zero ablation of its output: probability 0.0")
    assert layer["other"] == "resampling of its output: probability 1.00, 100% right"
    assert layer["why"].endswith("probability 1.00, 100% right.")
    both = table.loc["How does layer 0 take the name at IO?"]
    assert both["one"].startswith("its input patched: +1.0")
    assert "its gate alone: +0." in both["other"]
    assert any("S1" in str(question) and "state of layer 2" in str(question) for question in table.index)


def test_the_papers_figures_stand_only_beside_its_checkpoint(study: IOIStudy) -> None:
    with pytest.raises(ValueError, match=r"of mamba-370m, the study is of tiny-mamba"):
        beside_the_paper(study)
    assert not any("paper" in heading for heading in study_tables(study))
    theirs = replace(study, model_name="state-spaces/mamba-370m-hf")
    table = beside_the_paper(theirs).set_index("quantity")
    assert table.loc["accuracy of the full model"].tolist() == ["about 96 %", "100.0%"]
    assert table.loc["key layer"].tolist() == ["39", "2"]
    assert any("paper" in heading for heading in study_tables(theirs))


def test_the_page_has_every_table_and_figure(study: IOIStudy, tmp_path: Path) -> None:
    path = save_ioi_report(study, tmp_path / "out" / "index.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("<table") == len(study_tables(study))
    assert text.count("plotly-graph-div") == 13
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_long_texts_become_paragraphs() -> None:
    short = pd.DataFrame({"a": ["x"], "b": [0.5]})
    assert as_text(short).split() == ["a", "b", "x", "0.500"]
    assert as_text(short.assign(a="word " * 30)).splitlines()[0].startswith("- word")


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="load the model with its tokenizer"):
        ioi_study(hooked())
