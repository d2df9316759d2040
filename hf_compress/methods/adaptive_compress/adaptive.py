"""AdaptiveCompress itself: by the paper's equations, and repaired.

Source: AdaptiveCompress (anonymous, under review). Where it leaves something open, or contradicts itself, is said in
docs/adaptive_compress.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_compress.methods.adaptive_compress.learner import Learner, Terms, correlation, top_mask
from hf_compress.modules.bottleneck import Bottleneck, Form

_RIDGE = 1e-6  # of the codes' mean variance, where the decoder is solved for


class Gated(Learner):
    """As many features as the stream is wide, of which the gates keep the most important."""

    norm = "kept"

    def _made(self) -> Bottleneck:
        form = Form(self.config.passing, self.norm, gated=True)  # type: ignore[arg-type]
        return Bottleneck(self.hidden, self.hidden, form)

    @property
    def kept(self) -> Tensor:
        """Indices of the features whose gates are open, in rising order."""
        return self.module.gate.nonzero()[:, 0]

    def constrain_gradients(self) -> None:
        """With tied weights, the decoder's gradient is the encoder's, too."""
        encoder, decoder = self.module.encoder, self.module.decoder
        if self.config.tie_weights and encoder.grad is not None and decoder.grad is not None:
            encoder.grad += (1 - self.module.form.skip) * decoder.grad.T

    @torch.no_grad()
    def after_step(self, energy: Tensor) -> None:
        super().after_step(energy)
        self._tie()

    @torch.no_grad()
    def _tie(self) -> None:
        if self.config.tie_weights:
            self.module.decoder.copy_((1 - self.module.form.skip) * self.module.encoder.T)

    def _tracked(self, stream: Tensor, features: Tensor, spread: Tensor) -> Tensor:
        """What importance is the mean of: σ²u²·‖W′_i‖² of every feature, its gate open or not; or the sign of h."""
        if self.config.tracked == "sign":
            return (stream > 0).float().mean(0)
        return (spread * features).square().mean(0) * self.module.decoder.square().sum(1)

    @torch.no_grad()
    def cut(self) -> tuple[Bottleneck, Tensor]:
        """W[:, kept] times their gates, W′[kept]."""
        self._tie()
        kept, module = self.kept, self.module
        return self._sliced(module.encoder[:, kept] * module.gate[kept], module.decoder[kept]), kept

    def finished(self) -> tuple[Bottleneck, Tensor]:
        return self.cut()

    def _sliced(self, encoder: Tensor, decoder: Tensor) -> Bottleneck:
        """One of the features kept alone, with these maps of them."""
        sliced = Bottleneck(self.hidden, encoder.shape[1], Form(self.module.form.skip, self.module.form.norm))
        center = {name: tensor for name, tensor in self.module.state_dict().items() if name == "center"}
        sliced.load_state_dict(center | {"encoder": encoder, "decoder": decoder})
        return sliced


class Adaptive(Gated):
    """The default: starts from principal directions, and ends with the decoder that is best for its encoder.

    loss = E‖h − ĥ‖² / V + λ·E mean_i |σ z_i|·‖W′_i‖ / √(V / hidden) + γ·L_cont, V the variance of h: free of the
    stream's scale, and of how a feature's size is shared between encoder and decoder.
    """

    @torch.no_grad()
    def _made(self) -> Bottleneck:
        module = super()._made()
        directions, variances = self.moments.normed.principal()
        module.encoder.copy_(directions)
        module.decoder.copy_((1 - module.form.skip) * directions.T)
        module.center.copy_(self.moments.normed.mean)
        self._energy = variances * (self.moments.normed.count / self.moments.raw.count)
        return module

    def _first_importance(self) -> Tensor:
        if self.config.tracked == "sign":
            return torch.ones(self.hidden, dtype=torch.float32)
        return self._energy * (1 - self.module.form.skip) ** 2

    @torch.no_grad()
    def retain(self, retention: float) -> None:
        self.module.gate.copy_(top_mask(self.importance, self.config.features(self.hidden, retention)))

    def terms(self, stream: Tensor) -> Terms:
        features, context = self.module.read(stream)
        code = self.module.select(features)
        rebuilt = self.module.decode(code, context)
        sizes = self.module.decoder.norm(dim=1)
        loss = error = (stream - rebuilt).square().sum(1).mean() / self.variance
        if self.config.l1:
            spent = ((context.spread * code).abs().mean(0) * sizes).mean()
            loss = loss + self.config.l1 * spent / (self.variance / self.hidden) ** 0.5
        if self.config.contrastive:
            loss = loss + self.config.contrastive * correlation(code[:, self.kept])
        return self._told(loss, error, code, self._tracked(stream, features, context.spread))

    @torch.no_grad()
    def finished(self) -> tuple[Bottleneck, Tensor]:
        """With the decoder of least squares for W[:, kept]: the L1 term has made codes smaller than they are."""
        if self.config.tie_weights:
            return self.cut()
        kept = self.kept
        encoder = self.module.encoder[:, kept]
        self.module.center.copy_(self.moments.normed.mean)  # codes of mean 0, as least squares takes them
        wide, covariance = encoder.double(), self.moments.normed.covariance.to(encoder.device)
        gram = wide.T @ covariance @ wide
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        solved = torch.linalg.solve(gram + ridge, wide.T @ covariance)
        return self._sliced(encoder, ((1 - self.module.form.skip) * solved).float()), kept


class Paper(Gated):
    """The paper's: f(h) = LN(h)W ⊙ g, f⁻¹(z) = zW′ + s·h, ‖h − ĥ‖² + λ‖f(h)‖₁ + γ·L_cont (equations 2 to 6).

    W and W′ start as a linear layer's weights do, which it does not say, and g at 1: all features open.
    """

    norm = "lost"

    @torch.no_grad()
    def _made(self) -> Bottleneck:
        module = super()._made()
        for table in (module.encoder, module.decoder):
            nn.init.uniform_(table, -(self.hidden**-0.5), self.hidden**-0.5, generator=self.generator)
        if self.config.tie_weights:
            module.decoder.copy_((1 - module.form.skip) * module.encoder.T)
        return module

    def _first_importance(self) -> Tensor:
        return torch.ones(self.hidden, dtype=torch.float32)

    @torch.no_grad()
    def retain(self, retention: float) -> None:
        mask = top_mask(self.importance, self.config.features(self.hidden, retention))
        self.module.gate.copy_(mask * self.importance)

    def terms(self, stream: Tensor) -> Terms:
        features, context = self.module.read(stream)
        code = self.module.select(features)
        rebuilt = self.module.decode(code, context)
        missed = (stream - rebuilt).square().sum(1).mean()
        loss = missed + self.config.l1 * code.abs().sum(1).mean()
        if self.config.contrastive:
            loss = loss + self.config.contrastive * correlation(code)
        return self._told(loss, missed / self.variance, code, self._tracked(stream, features, context.spread))
