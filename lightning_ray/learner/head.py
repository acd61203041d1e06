"""The output head and the log-softmax as one operation, for the few tokens that are asked for.

Invariant: of the M x vocabulary logits only one chunk exists at a time, in the forward and in the
backward pass; the backward pass computes them again. The logits and what follows are float32, and
done in place: on a CPU, touching fresh memory costs more than the arithmetic. On a GPU what follows
is compiled into few kernels, for there reading the logits is what costs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    chunk: int,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logprob of each target under softmax(hidden @ weight.T + bias), and that softmax's entropy.

    Args:
        hidden: float[M, H], float32 also where the weight is narrower.
        weight: float[V, H]
        bias: float[V] or None.
        target: int64[M]
        chunk: positions whose logits may exist at one time.
        with_entropy: the entropies have a gradient as well, which costs some time.

    Returns:
        float32[M] natural logarithms, with gradient for hidden, weight and bias, and float32[M]
        entropies in nats.
    """
    logprobs, entropy = _SelectedLogprobs.apply(hidden, weight, bias, target, chunk, with_entropy)
    return logprobs, entropy


def _factor(weight: Tensor) -> Tensor:
    """What hidden states are multiplied by: float32[V, H], or on a GPU bfloat16[V, 2 H].

    A GPU multiplies bfloat16 some ten times as fast as float32. A hidden state is there the sum of
    two numbers in bfloat16, which leaves a relative error of 2^-17, and the weight is exact.
    """
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        return torch.cat([weight, weight], dim=1)
    return weight.float()


def _logits(hidden: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """float32[m, V]. Rounded to bfloat16, logits near 20 would be wrong by up to 0.06, and engine
    and learner would disagree by as much (MiniMax-M1, 2025, section 3.2, on the output head)."""
    wide_bias = None if bias is None else bias.float()
    if factor.dtype != torch.bfloat16:
        return torch.nn.functional.linear(hidden.float(), factor, wide_bias)
    high = hidden.to(torch.bfloat16)
    low = (hidden - high).to(torch.bfloat16)
    logits = torch.mm(torch.cat([high, low], dim=1), factor.t(), out_dtype=torch.float32)
    return logits if wide_bias is None else logits.add_(wide_bias)


def _statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32[m] each: the target's logprob, the entropy, log Z. The logits are used up."""
    peak = logits.amax(dim=-1, keepdim=True)
    logits.sub_(peak)
    powers = logits.exp()
    total = powers.sum(dim=-1)
    log_total = total.log()
    logprobs = logits.gather(1, target[:, None])[:, 0] - log_total
    # H = log Z - sum_v p_v logit_v, all relative to the peak
    entropy = log_total - torch.einsum("mv,mv->m", powers, logits) / total
    return logprobs, entropy, log_total + peak[:, 0]


def _statistics_of_gpu(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_statistics`, in the form that compiles into two readings of the logits."""
    peak = logits.amax(dim=-1, keepdim=True)
    above = logits - peak
    powers = above.exp()
    total = powers.sum(dim=-1)
    log_total = total.log()
    chosen = logits.gather(1, target[:, None])[:, 0] - peak[:, 0]
    entropy = log_total - (powers * above).sum(dim=-1) / total
    return chosen - log_total, entropy, log_total + peak[:, 0]


def _gradient(
    logits: Tensor,
    target: Tensor,
    normalizer: Tensor,
    grad: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the logits, [m, V] of `dtype`. The logits are used up."""
    log_p = logits.sub_(normalizer[:, None])
    if grad_entropy is None:
        grad_logits = log_p.exp_().mul_(-grad[:, None])
    else:
        factor = grad[:, None] + grad_entropy[:, None] * (log_p + entropy[:, None])
        grad_logits = log_p.exp_().mul_(-factor)
    return grad_logits.scatter_add_(1, target[:, None], grad[:, None]).to(dtype)


def _gradient_of_gpu(
    logits: Tensor,
    target: Tensor,
    normalizer: Tensor,
    grad: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `_gradient`, in the form that compiles into one reading of the logits."""
    log_p = logits - normalizer[:, None]
    factor = grad[:, None]
    if grad_entropy is not None:
        factor = factor + grad_entropy[:, None] * (log_p + entropy[:, None])
    chosen = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    return (torch.where(chosen, grad[:, None], 0.0) - log_p.exp() * factor).to(dtype)


@functools.cache
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    # The last chunk of a row has any number of positions.
    compiled: Callable[..., Any] = torch.compile(plain, dynamic=True)
    return compiled


def _on(device: torch.device, plain: Callable[..., Any], of_gpu: Callable[..., Any]) -> Any:
    return _compiled(of_gpu) if device.type == "cuda" else plain


class _SelectedLogprobs(torch.autograd.Function):
    """logprob = logit of the target - log Z;  d logprob / d logit_v = [v = target] - p_v.

    H = - sum_v p_v log p_v;  d H / d logit_v = - p_v (log p_v + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        size = len(target)
        logprobs = torch.empty(size, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        normalizer = torch.empty_like(logprobs)
        factor = _factor(weight)
        statistics = _on(hidden.device, _statistics, _statistics_of_gpu)
        for begin in range(0, size, chunk):
            part = slice(begin, begin + chunk)
            logits = _logits(hidden[part], factor, bias)
            logprobs[part], entropy[part], normalizer[part] = statistics(logits, target[part])
        ctx.save_for_backward(hidden, weight, bias, target, normalizer, entropy)
        ctx.chunk = chunk
        ctx.with_entropy = with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        hidden, weight, bias, target, normalizer, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        size, chunk = len(target), ctx.chunk
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in float32; one chunk needs no sum.
        many = size > chunk
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if many else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        factor = _factor(weight)
        gradient = _on(hidden.device, _gradient, _gradient_of_gpu)
        for begin in range(0, size, chunk):
            part = slice(begin, begin + chunk)
            logits = _logits(hidden[part], factor, bias)
            grad_logits = gradient(
                logits,
                target[part],
                normalizer[part],
                grad_logprobs[part],
                entropy[part],
                grad_entropy[part] if ctx.with_entropy else None,
                weight.dtype,
            )
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=torch.float32)
            grad_hidden[part] = grad_logits @ weight
            product = grad_logits.t() @ hidden[part].to(weight.dtype)
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
        assert grad_weight is not None  # M is never 0: every row predicts something
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None,
            None,
            None,
        )
