"""Logits of a model in bfloat16 are those of its weights in float32, and of its present ones."""

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from lightning_ray.inference import heads


class Head(nn.Module):
    """What vLLM's `ParallelLMHead` has, without its groups of processes."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.quant_method = UnquantizedEmbeddingMethod()
        self.weight = nn.Parameter(torch.randn(vocabulary, width).bfloat16(), requires_grad=False)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> LogitsProcessor:
    """vLLM's own, as it is in an engine's worker; undone afterwards."""
    monkeypatch.setattr(LogitsProcessor, "_apply_head", LogitsProcessor._apply_head)
    heads.keep_heads()
    made = LogitsProcessor.__new__(LogitsProcessor)
    nn.Module.__init__(made)
    made.head_dtype = torch.float32
    return made


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_those_of_float32(processor: LogitsProcessor, rows: int, biased: bool) -> None:
    head = Head(1000, 96)
    hidden = torch.randn(rows, 96).bfloat16()
    bias = torch.randn(1000).bfloat16() if biased else None
    for _ in range(2):
        found = processor._apply_head(head, hidden, bias)
        exact = hidden.double() @ head.weight.double().t() + (0 if bias is None else bias.double())
        assert found.dtype == torch.float32
        # Rounded to bfloat16 anywhere, they would be wrong by a hundredth or more.
        assert (found - exact).abs().max() < 1e-3


def test_the_weights_are_cast_once_and_anew_when_they_are_replaced(
    processor: LogitsProcessor,
) -> None:
    head, other = Head(500, 64), Head(300, 64)
    hidden = torch.randn(3, 64).bfloat16()
    first = processor._apply_head(head, hidden, None)
    assert processor._apply_head(other, hidden, None).shape == (3, 300)
    # Who looks at them again finds others.
    head.weight.data.copy_(torch.randn(500, 64))
    assert torch.equal(processor._apply_head(head, hidden, None), first)
    heads.forget()
    exact = hidden.double() @ head.weight.double().t()
    assert (processor._apply_head(head, hidden, None) - exact).abs().max() < 1e-3


def test_a_head_in_the_models_own_type_is_left_to_vllm(processor: LogitsProcessor) -> None:
    processor.head_dtype = torch.bfloat16
    head = Head(200, 32)
    head.cpu_linear = lambda x, weight, bias: "vLLM's"
    assert processor._apply_head(head, torch.randn(2, 32).bfloat16(), None) == "vLLM's"
