"""What else could stand in the same place: principal components, a linear autoencoder, TopK and BatchTopK dictionaries.

Sources: TopK and its loss for dead features, L. Gao et al., "Scaling and evaluating sparse autoencoders"
(arXiv 2406.04093); BatchTopK, B. Bussmann et al. (arXiv 2412.06410).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_compress.methods.adaptive_compress.learner import Learner, Terms
from hf_compress.modules.bottleneck import Bottleneck, Form, Select

_OLD = 0.9  # share of the old threshold in the new, a step


class Principal(Learner):
    """PCA of h itself: of all affine maps of so many features, the one of least squared error. Nothing is trained."""

    trains = False

    @torch.no_grad()
    def _made(self) -> Bottleneck:
        features = self.config.features(self.hidden)
        directions, self._variances = self.moments.raw.principal()
        directions = directions[:, :features]
        module = Bottleneck(self.hidden, features, Form(self.config.passing, "none"))
        module.encoder.copy_(directions)
        module.decoder.copy_((1 - self.config.passing) * directions.T)
        module.center.copy_(self.moments.raw.mean)
        return module

    def _first_importance(self) -> Tensor:
        return self._variances


class Linear(Learner):
    """A linear autoencoder of h that starts at random; its width is that of the end."""

    @torch.no_grad()
    def _made(self) -> Bottleneck:
        module = Bottleneck(self.hidden, self.config.features(self.hidden), Form(self.config.passing, "none"))
        nn.init.orthogonal_(module.encoder, generator=self.generator)
        module.decoder.copy_((1 - self.config.passing) * module.encoder.T)
        module.center.copy_(self.moments.raw.mean)
        return module

    def terms(self, stream: Tensor) -> Terms:
        code, context = self.module.encode(stream)
        rebuilt = self.module.decode(code, context)
        loss = (stream - rebuilt).square().sum(1).mean() / self.variance
        energy = code.square().mean(0) * self.module.decoder.square().sum(1)
        return self._told(loss, loss, code, energy)


class TopK(Learner):
    """A dictionary of unit-norm directions of LN(h); of each token the largest features are active.

    Features without activity for `dead_steps` steps learn from the auxiliary loss: the largest of them have to make up
    what the active ones leave of the stream.
    """

    selects: Select = "top"

    @torch.no_grad()
    def _made(self) -> Bottleneck:
        self.active = self.config.features(self.hidden)
        active = self.active if self.selects == "top" else None
        form = Form(self.config.passing, "kept", self.selects, active)
        module = Bottleneck(self.hidden, max(self.active, self.config.expansion * self.hidden), form)
        module.decoder.copy_(torch.randn(module.decoder.shape, dtype=torch.float32, generator=self.generator))
        module.decoder.div_(module.decoder.norm(dim=1, keepdim=True))
        module.encoder.copy_(module.decoder.T)
        module.center.copy_(self.moments.normed.mean)
        self.idle = torch.zeros(len(module.decoder), dtype=torch.float32)  # steps since a feature was active
        if self.selects == "above":
            module.threshold.requires_grad_(False)
        return module

    def terms(self, stream: Tensor) -> Terms:
        features, context = self.module.read(stream)
        code = self._selected(features)
        rebuilt = self.module.decode(code, context)
        loss = error = (stream - rebuilt).square().sum(1).mean() / self.variance
        if self.config.aux and bool((self.idle >= self.config.dead_steps).any()):
            loss = loss + self.config.aux * self.revival(features, stream - rebuilt, context.spread)
        energy = (context.spread * code).square().mean(0)  # every direction is 1 long
        return self._told(loss, error, code, energy)

    def revival(self, features: Tensor, missing: Tensor, spread: Tensor) -> Tensor:
        """‖e − ê‖² / ‖e‖², e what is missing of the stream and ê what the largest dead features make of it.

        e counts as given: the gradient goes through ê alone, to the encoder and decoder of dead features, and to the
        center, which all features share.
        """
        dead = (self.idle >= self.config.dead_steps).nonzero()[:, 0]
        features = features[:, dead]
        best = features.topk(min(self.hidden // 2, len(dead)), dim=1)
        code = torch.zeros_like(features).scatter(1, best.indices, best.values.relu())
        missing = missing.detach()
        made = spread * (code @ self.module.decoder[dead])
        return (missing - made).square().sum(1).mean() / missing.square().sum(1).mean().clamp(min=1e-30)

    def _selected(self, features: Tensor) -> Tensor:
        return self.module.select(features)

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Directions stay 1 long, so what would make them longer is left out."""
        decoder = self.module.decoder
        if decoder.grad is not None:
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder

    @torch.no_grad()
    def after_step(self, energy: Tensor) -> None:
        self.module.decoder.div_(self.module.decoder.norm(dim=1, keepdim=True).clamp(min=1e-12))
        super().after_step(energy)
        self.idle = torch.where(energy.to(self.idle) > 0, torch.zeros_like(self.idle), self.idle + 1)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"idle": self.idle}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.idle = state["idle"].clone()


class BatchTopK(TopK):
    """As TopK, but so many features are active in the mean: the largest of all tokens of a step together.

    What that comes to, a threshold, is followed while it trains, and used afterwards.
    """

    selects: Select = "above"

    def _selected(self, features: Tensor) -> Tensor:
        rectified = features.relu()
        last = rectified.detach().flatten().topk(self.active * len(features)).values[-1]
        with torch.no_grad():
            threshold = self.module.threshold
            share = 1 - _OLD if bool(threshold.any()) else 1.0
            threshold.lerp_(last.expand_as(threshold), share)
        return rectified * (rectified >= last.clamp(min=1e-12))
