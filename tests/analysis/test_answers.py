"""Answers of several runs beside each other are those of the runs; what the planted circuit needs is its source."""

import numpy as np
import pytest
import torch
from planted import NAME_A, planted_circuit
from tiny_models import hooked, random_tokens

from ssminterp import HookedMamba
from ssminterp.analysis import intervened_answers, likely_pair
from ssminterp.interventions import knockout


def test_only_the_source_of_the_planted_circuit_changes_the_answer() -> None:
    circuit = planted_circuit()
    tokens = circuit.prompt(NAME_A, 3, 9)
    cuts = {"as it is": []} | {str(s): [knockout(circuit.layer, sources=s, targets=8)] for s in (2, 3, 4)}
    found = intervened_answers(circuit.model, tokens, cuts, k=12)
    with torch.no_grad():
        expected = circuit.model(tokens)[0, -1].softmax(-1)
    np.testing.assert_allclose(found.sel(run="as it is"), expected[found["id"].values], rtol=1e-5)
    towards = found.swap_dims(token="id").sel(id=NAME_A)
    assert float(towards.sel(run="3")) < 0.5 * float(towards.sel(run="as it is"))
    np.testing.assert_allclose(towards.sel(run=["2", "4"]), float(towards.sel(run="as it is")), rtol=0.2)
    assert (np.diff(found.max("run")) <= 0).all()


def test_the_answer_and_the_word_of_the_text_that_it_competes_with() -> None:
    model = HookedMamba.from_pretrained("tiny-mamba", device="cpu")
    pair = likely_pair(model, "Then, Shelby and Emma had fun at the school. Shelby gave an apple to")
    assert [model.to_str_tokens(torch.tensor([i]))[0].strip() for i in pair] == ["Emma", "Shelby"]
    plain = hooked()
    tokens = torch.tensor([[5, 5, 5]])
    with torch.no_grad():
        best, second = plain(tokens)[0, -1].topk(2).indices.tolist()
    assert likely_pair(plain, tokens) == (best, second if best == 5 else 5)


def test_what_cannot_be_answered_is_refused(as_users_run_it: None) -> None:
    model = hooked()
    with pytest.raises(ValueError, match="one text is answered at a time, got 2"):
        intervened_answers(model, random_tokens(2, 4), {"as it is": []})
    with pytest.raises(ValueError, match="at least one run"):
        intervened_answers(model, random_tokens(1, 4), {})
    with pytest.raises(ValueError, match=r"positions \[7\] are out of range"):
        likely_pair(model, random_tokens(1, 4), 7)
