"""Compiled models, and the kinds of KV cache that ``generate`` can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import Strides
from tiny import BATCH, build, inputs_for
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

from llava_todre import hf
from llava_todre.errors import TodreError

STAGE_1 = Strides(retain_ratio=0.25)
STAGE_2 = Strides(retain_ratio=0.25, plan=((9, 0, 0), (8, 0, 2)))
SHORT = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def model() -> Any:
    return build("llava_next", num_hidden_layers=2)


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def noting(graphs: list[Any]) -> Callable[..., Any]:
    """Return a backend that runs graphs as they are, and notes them."""

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def answer(model: Any, method: Strides, **options: Any) -> Tensor:
    with hf.prune(model, method):
        return model.generate(**inputs_for(model, BATCH), **(SHORT | options))


def test_a_compiled_decoder_runs_compiled_where_its_layers_keep_all_tokens(model, graphs):
    expected = {method: answer(model, method) for method in (STAGE_1, STAGE_2)}
    model.model.language_model.compile(backend=noting(graphs))
    assert torch.equal(answer(model, STAGE_2), expected[STAGE_2])
    assert not graphs
    first = answer(model, STAGE_1, max_new_tokens=1)
    assert torch.equal(first, expected[STAGE_1][:, : first.shape[1]])
    assert graphs


def test_a_compiled_model_runs_plain_where_tokens_leave_inside(model, graphs):
    expected = answer(model, STAGE_2)
    model.forward = torch.compile(model.forward, backend=noting(graphs))
    assert torch.equal(answer(model, STAGE_2), expected)
    assert not graphs


def test_steps_compiled_by_generate_itself_over_a_static_cache(model, graphs):
    expected = answer(model, STAGE_1)
    how = CompileConfig(backend=noting(graphs), fullgraph=False, mode=None)
    how._compile_all_devices = True  # a CPU, too
    found = answer(model, STAGE_1, cache_implementation="static", compile_config=how)
    assert torch.equal(found, expected)
    assert graphs
    with pytest.raises(TodreError, match="cache_implementation must be dynamic .*, got static"):
        answer(model, STAGE_2, cache_implementation="static", compile_config=how)


def test_a_model_wrapped_by_compile_is_refused(model):
    with pytest.raises(TodreError, match="must be the model itself, .* wrapped by torch.compile"):
        hf.attach(torch.compile(model, backend="eager"))


@pytest.mark.parametrize("method", [STAGE_1, STAGE_2])
def test_the_dynamic_cache_may_be_asked_for_by_name(model, method):
    expected = answer(model, method)
    assert torch.equal(answer(model, method, cache_implementation="dynamic"), expected)
    asked = {"cache_implementation": "dynamic", "pad_token_id": 0, **SHORT}
    with hf.prune(model, method):
        config = GenerationConfig(**asked)
        found = model.generate(**inputs_for(model, BATCH), generation_config=config)
    assert torch.equal(found, expected)
    model.generation_config.cache_implementation = "dynamic"
    assert torch.equal(answer(model, method), expected)
