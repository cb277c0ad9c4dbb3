"""How the loss falls with parameters, tokens and compute: the law of Hoffmann et al. (2022, arXiv:2203.15556).

    L(N, D) = E + A / N^α + B / D^β          N parameters, D training tokens, L nats a token

E is what no model of the family would ever learn of the text, the second term what a model of N parameters has no room
for, the third what D tokens did not show it. Training takes about C = 6 N D operations (Kaplan et al., 2020,
arXiv:2001.08361), and for a given C one division into N and D is the best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OPERATIONS = 6  # for a parameter and a token: two forward, four backward
DELTA = 1e-3  # where the Huber loss turns from squares to absolute values, as Hoffmann et al. have it
NUMBER_OF_CONSTANTS = 5
STEEPEST = 4.0  # α and β are looked for between 0 and this: more model or more text never makes the loss worse


@dataclass(frozen=True)
class ScalingPoint:
    """A model that was trained to the end of its schedule."""

    parameters: int
    tokens: int  # seen in training
    loss: float  # of validation, in nats a token

    @property
    def compute(self) -> float:
        return OPERATIONS * self.parameters * self.tokens


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def optimal(self, compute: float) -> tuple[float, float]:
        """The parameters and the tokens of the lowest loss that `compute` operations buy (equation 4 of the paper).

        Both are nan for a law that does not depend on one of them.
        """
        if not (self.A > 0 and self.B > 0 and self.alpha > 0 and self.beta > 0):
            return math.nan, math.nan
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        share = self.beta / (self.alpha + self.beta)
        parameters = balance * (compute / OPERATIONS) ** share
        return parameters, compute / OPERATIONS / parameters


@dataclass(frozen=True)
class Fit:
    law: ScalingLaw
    samples: tuple[ScalingLaw, ...]  # of the bootstrap; none where there are no more runs than constants

    def interval(self, quantity: Callable[[ScalingLaw], float], share: float = 0.8) -> tuple[float, float]:
        """Where the middle `share` of the bootstrap's values of `quantity` lies; nan where there are no samples."""
        if not self.samples:
            return math.nan, math.nan
        values = torch.tensor([quantity(law) for law in self.samples], dtype=torch.float64)
        low, high = torch.quantile(values, torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64))
        return float(low), float(high)


def fit(
    runs: Sequence[ScalingPoint],
    resamples: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Fit:
    """The law that the runs follow: the smallest Huber loss between logarithms of losses, by L-BFGS from many starts.

    The uncertainty is a bootstrap of residuals (Efron, 1979): the differences between runs and law, widened for the
    five constants that were fitted to them, are dealt anew to the runs, and the law is fitted again, `resamples` times.

    `ValueError` with fewer than five runs, or fewer than three sizes or lengths of training: E, A and α can't be told
    apart by two sizes.
    """
    sizes, lengths = {run.parameters for run in runs}, {run.tokens for run in runs}
    if len(runs) < NUMBER_OF_CONSTANTS or len(sizes) < 3 or len(lengths) < 3:
        raise ValueError(
            f"a scaling law has {NUMBER_OF_CONSTANTS} constants: it needs as many runs, of three model sizes and three "
            f"numbers of tokens at least; got {len(runs)} runs, {len(sizes)} sizes, {len(lengths)} numbers of tokens"
        )
    if any(not run.loss > 0 for run in runs):
        raise ValueError("every run needs a loss above 0")
    scale = _Scale(runs)
    targets = torch.tensor([run.loss for run in runs], dtype=torch.float64).log()
    starts = [scale.start(*choice) for choice in itertools.product((0.3, 0.8), (0.25, 0.75), (0.25, 0.75))]
    total = len(starts) + resamples
    found = []
    for index, start in enumerate(starts):
        found.append(_minimum(scale, targets, start))
        if progress is not None:
            progress(index + 1, total)
    _, best = min(found, key=lambda each: each[0])
    samples = []
    if (freedom := len(runs) - NUMBER_OF_CONSTANTS) > 0:
        fitted = scale.log_loss(best)
        residuals = (targets - fitted) * math.sqrt(len(runs) / freedom)
        generator = torch.Generator().manual_seed(seed)
        for index in range(resamples):
            dealt = residuals[torch.randint(len(runs), (len(runs),), generator=generator)]
            samples.append(scale.law(_minimum(scale, fitted + dealt, best)[1]))
            if progress is not None:
                progress(len(starts) + index + 1, total)
    return Fit(scale.law(best), tuple(samples))


class _Scale:
    """The law over N / N₀ and D / D₀, with N₀ and D₀ in the middle of the runs: five numbers of like size to look for,

    θ = (log E, log A / N₀^α, logit α / 4, log B / D₀^β, logit β / 4).
    """

    def __init__(self, runs: Sequence[ScalingPoint]):
        log_n = torch.tensor([run.parameters for run in runs], dtype=torch.float64).log()
        log_d = torch.tensor([run.tokens for run in runs], dtype=torch.float64).log()
        self.middle_n, self.middle_d = log_n.mean(), log_d.mean()
        self.log_n, self.log_d = log_n - self.middle_n, log_d - self.middle_d
        self.smallest = min(run.loss for run in runs)
        self.middle = math.exp(sum(math.log(run.loss) for run in runs) / len(runs))

    def log_loss(self, theta: Tensor) -> Tensor:
        """log L of every run: (5,) float64 -> (runs,)."""
        e, a, x, b, y = theta.unbind()
        alpha, beta = STEEPEST * x.sigmoid(), STEEPEST * y.sigmoid()
        terms = torch.stack([e.expand_as(self.log_n), a - alpha * self.log_n, b - beta * self.log_d])
        return torch.logsumexp(terms, dim=0)

    def start(self, share: float, alpha: float, beta: float) -> Tensor:
        """E as a share of the smallest loss, and what is left in the middle in equal parts for the other terms."""
        rest = math.log((self.middle - share * self.smallest) / 2)
        x, y = torch.tensor([alpha / STEEPEST, beta / STEEPEST], dtype=torch.float64).logit().tolist()
        return torch.tensor([math.log(share * self.smallest), rest, x, rest, y], dtype=torch.float64)

    def law(self, theta: Tensor) -> ScalingLaw:
        e, a, b = theta[[0, 1, 3]].tolist()
        alpha, beta = (STEEPEST * theta[[2, 4]].sigmoid()).tolist()
        A, B = math.exp(a + alpha * float(self.middle_n)), math.exp(b + beta * float(self.middle_d))
        return ScalingLaw(math.exp(e), A, alpha, B, beta)


def _minimum(scale: _Scale, targets: Tensor, start: Tensor) -> tuple[float, Tensor]:
    """The objective and the θ that L-BFGS finds from `start`."""
    theta = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [theta], max_iter=150, tolerance_grad=1e-9, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        search.zero_grad()
        loss = torch.nn.functional.huber_loss(scale.log_loss(theta), targets, reduction="sum", delta=DELTA)
        (loss / DELTA**2).backward()  # in numbers around 1, as the tolerances expect
        return float(loss.detach()) / DELTA**2

    search.step(closure)
    objective = closure()
    return (objective if math.isfinite(objective) else math.inf), theta.detach()
