"""Containers of other libraries: Hugging Face outputs and encodings, and what is registered with optree."""

from __future__ import annotations

import typing
from typing import Any

import numpy as np
import optree
import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import tensorbridge as tb
from tensorbridge import tree


@pytest.mark.parametrize("to", ["torch", "numpy"])
def test_model_output_stays_one(to):
    source = CausalLMOutput(logits=torch.ones(2, 3), hidden_states=(torch.zeros(2), torch.ones(2)))
    made = getattr(tree, f"to_{to}")(source, copy=True)
    kind = {"torch": torch.Tensor, "numpy": np.ndarray}[to]
    assert type(made) is CausalLMOutput
    assert list(made) == ["logits", "hidden_states"]
    assert isinstance(made.logits, kind)
    assert made["logits"] is made.logits
    assert type(made.hidden_states) is tuple
    assert isinstance(made.hidden_states[1], kind)
    assert made.loss is None
    assert source.logits.tolist() == [[1] * 3] * 2


def test_leaf_of_a_model_output_is_named():
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\[0\]\['last_hidden_state'\]: "):
        tree.to_numpy([BaseModelOutput(last_hidden_state=torch.ones(2).to_sparse())])


@pytest.mark.parametrize("cls", [transformers.BatchEncoding, transformers.BatchFeature])
def test_encoding_stays_one(cls):
    source = cls({"input_ids": np.array([[1, 2]]), "note": "text"})
    made = tree.to_torch(source)
    assert type(made) is cls
    assert made["input_ids"].tolist() == [[1, 2]]
    assert made.input_ids is made["input_ids"]
    assert made["note"] == "text"
    assert isinstance(source["input_ids"], np.ndarray)


class Box:
    def __init__(self, inside: Any, label: str) -> None:
        self.inside, self.label = inside, label


optree.register_pytree_node(
    Box,
    lambda x: ((x.inside,), x.label, ("inside",)),
    lambda label, children: Box(*children, label),
    namespace="tensorbridge-tests",
)


def test_what_is_registered_with_optree_is_a_container():
    made = tree.to_torch({"b": Box([np.zeros(2)], "kept")})
    assert type(made["b"]) is Box
    assert made["b"].label == "kept"
    assert isinstance(made["b"].inside[0], torch.Tensor)
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['b'\]\['inside'\]: "):
        tree.to_torch({"b": Box(np.zeros(2, "M8[s]"), "")})


class Named(typing.NamedTuple):
    x: Any


def test_namedtuples_are_named_as_ever():
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\.x: "):
        tree.to_torch(Named(np.zeros(2, "M8[s]")))


def test_optrees_own_treatment_of_dicts_is_not_ours():
    assert list(tree.to_torch({"b": np.zeros(1), "a": np.zeros(1)})) == ["b", "a"]
