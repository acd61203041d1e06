"""The output head and the log-softmax as one operation, for the few tokens that are asked for.

Invariant: of the M x vocabulary logits only one chunk exists at a time, in the forward and in the
backward pass; the backward pass computes them again. The logits and what follows are float32, and
done in place: on a CPU, touching fresh memory costs more than the arithmetic.
"""

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


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32[m, V]. Rounded to bfloat16, logits near 20 would be wrong by up to 0.06, and engine
    and learner would disagree by as much (MiniMax-M1, 2025, section 3.2, on the output head)."""
    return torch.nn.functional.linear(
        hidden.float(), weight, None if bias is None else bias.float()
    )


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
        wide = weight.float()
        for begin in range(0, size, chunk):
            part = slice(begin, begin + chunk)
            logits = _logits(hidden[part], wide, bias)
            peak = logits.amax(dim=-1, keepdim=True)
            logits.sub_(peak)
            powers = logits.exp()
            total = powers.sum(dim=-1)
            log_total = total.log()
            logprobs[part] = logits.gather(1, target[part, None])[:, 0] - log_total
            # H = log Z - sum_v p_v logit_v, all relative to the peak
            entropy[part] = log_total - torch.einsum("mv,mv->m", powers, logits) / total
            normalizer[part] = log_total + peak[:, 0]
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
        wide = weight.float()
        for begin in range(0, size, chunk):
            part = slice(begin, begin + chunk)
            grad = grad_logprobs[part, None]
            logits = _logits(hidden[part], wide, bias)
            log_p = logits.sub_(normalizer[part, None])
            if ctx.with_entropy:
                factor = grad + grad_entropy[part, None] * (log_p + entropy[part, None])
                grad_logits = log_p.exp_().mul_(-factor)
            else:
                grad_logits = log_p.exp_().mul_(-grad)
            grad_logits.scatter_add_(1, target[part, None], grad)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(weight.dtype)
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
