"""Tokens for losses, and the slow computations that the fast ones are held against."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from lightning_ray.algorithms import LossConfig
from lightning_ray.algorithms.losses import Part

NUMBER = st.floats(-3, 3, width=32)


@dataclass(frozen=True)
class Token:
    """One token to learn from, in plain numbers."""

    new: float
    recorded: float
    advantage: float
    weight: float
    reference: float
    entropy: float


TOKEN = st.builds(Token, NUMBER, NUMBER, NUMBER, st.floats(0, 2, width=32), NUMBER, NUMBER)
SEQUENCES = st.lists(st.lists(TOKEN, min_size=1, max_size=5), max_size=4)


def part_of(sequences: list[list[Token]]) -> Part:
    """Sequences of tokens as the part of a batch; the logprobs and entropies want a gradient."""
    tokens = [token for sequence in sequences for token in sequence]
    number = [n for n, sequence in enumerate(sequences) for _ in sequence]

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(token, name) for token in tokens], dtype=torch.float32)

    return Part(
        logprobs=column("new").requires_grad_(),
        old_logprobs=column("recorded"),
        advantages=column("advantage"),
        weights=column("weight"),
        sequence=torch.tensor(number, dtype=torch.int64),
        reference=column("reference"),
        entropy=column("entropy").requires_grad_(),
    )


@dataclass
class Slow:
    """What the loss and its gradient should be, and whether a bound is too near to say."""

    loss: float
    gradient: list[float]
    masked: int
    near_a_bound: bool


def slow_loss(sequences: list[list[Token]], config: LossConfig) -> Slow:
    """The loss of `policy_loss` one token at a time, with gradients worked out by hand."""
    slow = Slow(0.0, [], 0, False)
    for sequence in sequences:
        apart = [token.new - token.recorded for token in sequence]
        costs = [config.kl.coefficient * _divergence(token, config)[0] for token in sequence]
        for place, token in enumerate(sequence):
            credit = token.advantage
            if config.kl.place == "reward":
                credit -= sum(costs[place:])
            weight, near = _correction(apart, place, config)
            slow.near_a_bound |= near
            if weight == 0:
                slow.masked += 1
                value = gradient = 0.0
            else:
                value, gradient, near = _surrogate(token, credit, apart, config)
                slow.near_a_bound |= near
            value, gradient = weight * value, weight * gradient
            if config.kl.place == "loss":
                value += costs[place]
                gradient += config.kl.coefficient * _divergence(token, config)[1]
            value -= config.entropy_coefficient * token.entropy
            slow.loss += token.weight * value
            slow.gradient.append(token.weight * gradient)
    return slow


def _surrogate(
    token: Token, credit: float, apart: list[float], config: LossConfig
) -> tuple[float, float, bool]:
    """Value, derivative by the token's logprob, and whether the ratio lies on a bound."""
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    if config.kind == "policy_gradient":
        return -credit * token.new, -credit, False
    log_ratio = (
        sum(apart) / len(apart)
        if config.kind == "sequence_clipped"
        else (token.new - token.recorded)
    )
    ratio = 1.0 if config.old == "current" else math.exp(log_ratio)
    bounded = min(max(ratio, low), high)
    near = any(abs(ratio - bound) < 1e-3 for bound in (low, high))
    if config.kind == "clipped_weight":
        return -bounded * credit * token.new, -bounded * credit, near
    active = ratio * credit <= bounded * credit
    value = -min(ratio * credit, bounded * credit)
    return value, -ratio * credit if active else 0.0, near


def _correction(apart: list[float], place: int, config: LossConfig) -> tuple[float, bool]:
    kind, low, high = config.correction.kind, config.correction.low, config.correction.high
    if kind == "none":
        return 1.0, False
    log_weight = sum(apart) if kind.startswith("sequence_") else apart[place]
    weight = math.exp(log_weight)
    near = any(abs(weight - bound) < 1e-3 for bound in (low, high))
    if kind.endswith("_truncate"):
        return min(weight, high), near
    if weight > high or (kind == "icepop" and weight < low):
        return 0.0, near
    return 1.0 if config.old == "recorded" and config.kind != "policy_gradient" else weight, near


def _divergence(token: Token, config: LossConfig) -> tuple[float, float]:
    """Value, and derivative by the token's logprob."""
    d = token.new - token.reference
    return {
        "k1": (d, 1.0),
        "k2": (d * d / 2, d),
        "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    }[config.kl.estimator]
