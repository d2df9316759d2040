"""A bottleneck while it is fitted: its loss on the tokens of a step, its importance, and what it ends as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.modules.bottleneck import Bottleneck
from hf_compress.numerics.moments import Moments

_CONSTANT = 1e-5


class StreamMoments:
    """What is known of a stream before anything is fitted.

    Attributes:
        raw: moments of h.
        normed: of LN(h), each token weighted by its variance σ²: by what an error there costs in h.
    """

    def __init__(self, hidden: int, device: torch.device) -> None:
        self.raw, self.normed = Moments(hidden, device), Moments(hidden, device)

    def update(self, stream: Tensor) -> None:
        """Add tokens (tokens, hidden)."""
        stream = stream.to(self.raw.device).double()
        spread = stream.std(1, correction=0)
        centred = stream - stream.mean(1, keepdim=True)
        self.raw.add(stream)
        self.normed.add(centred / spread.clamp(min=1e-12)[:, None], spread.square())

    @property
    def variance(self) -> float:
        """E ‖h − E h‖²."""
        return float(self.raw.covariance.trace())


@dataclass
class Terms:
    """Of one step: the loss, a scalar with a gradient; ‖h − ĥ‖² over the variance of h; features active in the mean;
    and what importance is made of, (features)."""

    loss: Tensor
    error: Tensor
    active: Tensor
    energy: Tensor

    @property
    def told(self) -> Tensor:
        """The last three in one, (2 + features)."""
        return torch.cat([self.error[None], self.active[None], self.energy])


class Learner:
    """Common to all: the features of largest importance stay, as many as the schedule says.

    Args:
        config: the settings.
        moments: of the stream.
        seed: of what starts at random.

    Attributes:
        module: what is trained, in float32.
        importance: (features) float32; it is no part of the module, so that the model's dtype does not touch it.
        trains: whether there is anything to train.
    """

    trains = True

    def __init__(self, config: AdaptiveCompressConfig, moments: StreamMoments, seed: int) -> None:
        self.config, self.moments = config, moments
        self.hidden = moments.raw.inputs
        self.variance = max(moments.variance, 1e-30)
        self.generator = torch.Generator().manual_seed(seed)
        self.module = self._made()
        self.importance = self._first_importance().float()

    def _made(self) -> Bottleneck:
        """The module before the first step."""
        raise NotImplementedError

    def _first_importance(self) -> Tensor:
        """Before the first step, (features)."""
        return torch.zeros(self.module.encoder.shape[1], dtype=torch.float32)

    def terms(self, stream: Tensor) -> Terms:
        """The loss on tokens (tokens, hidden) and what is told of it."""
        raise NotImplementedError

    def retain(self, retention: float) -> None:
        """Close the gates of all but the most important features, a share `retention` of the stream's width."""

    def constrain_gradients(self) -> None:
        """Called before a step of the optimizer."""

    @torch.no_grad()
    def after_step(self, energy: Tensor) -> None:
        """Called after one; `energy` is that of the step's tokens, of all processes.

        g ← αg + (1 − α)·energy (AdaptiveCompress, equation 2).
        """
        self.importance.lerp_(energy.to(self.importance), 1 - self.config.ema)

    def finished(self) -> tuple[Bottleneck, Tensor]:
        """The module as it is to be used, and which of the features it has, in rising order."""
        return self.module, torch.arange(self.module.encoder.shape[1])

    def cut(self) -> tuple[Bottleneck, Tensor]:
        """As `finished`, with the weights as they are."""
        return self.finished()

    def state(self) -> dict[str, Tensor]:
        """All that changes."""
        return {"importance": self.importance, **self.module.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.importance.copy_(state["importance"])
        self.module.load_state_dict({name: state[name] for name in self.module.state_dict()})

    def _told(self, loss: Tensor, error: Tensor, code: Tensor, energy: Tensor) -> Terms:
        return Terms(loss, error.detach(), (code.detach() != 0).sum(1).float().mean(), energy.detach())


def correlation(code: Tensor) -> Tensor:
    """Mean square of the correlations between features, over the tokens of code (tokens, features).

    L_cont: the paper names it and does not define it. Features that do not vary, up to what float32 makes of it, or do
    next to others, correlate with nothing: what rounding correlates with would have the largest gradient of all.
    """
    centred = code - code.mean(0)
    sizes = centred.norm(dim=0)
    least = torch.maximum(_CONSTANT * code.detach().norm(dim=0), _CONSTANT * sizes.detach().max())
    varies = sizes.detach() > least
    normed = centred[:, varies] / sizes[varies]
    gram = normed.T @ normed
    pairs = max(1, code.shape[1] * (code.shape[1] - 1))
    return (gram.square().sum() - gram.diagonal().square().sum()) / pairs


def top_mask(importance: Tensor, count: int) -> Tensor:
    """Ones at the `count` largest, the earlier of equals first, (features)."""
    order = importance.argsort(descending=True, stable=True)
    mask = torch.zeros_like(importance)
    mask[order[:count]] = 1
    return mask
