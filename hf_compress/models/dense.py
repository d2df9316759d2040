"""A plain dense network as a Transformers model: what the papers on multilayer perceptrons compress.

Samples are vectors of features. Inside they are texts of one position, (samples, 1, width), so that all that works on
the residual stream of a language model works here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from hf_compress.models.dense_config import DenseConfig

__all__ = ["DenseConfig", "DenseForClassification"]


class DenseFFN(nn.Module):
    """down(act(up(h))), or down(act(gate(h)) * up(h)) when gated, with `width` hidden units."""

    def __init__(self, config: DenseConfig, width: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.use_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if config.gated else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        up = self.up_proj(hidden_states)
        units = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        return self.down_proj(units)


class DenseBlock(nn.Module):
    """An FFN, plus what it reads when `residual`.

    The FFN is a module of its own: in its place an edit may put another, and the sum stays.
    """

    def __init__(self, config: DenseConfig, width: int) -> None:
        super().__init__()
        self.residual = config.residual
        self.mlp = DenseFFN(config, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        written = self.mlp(hidden_states)
        return hidden_states + written if self.residual else written


class DenseForClassification(PreTrainedModel):
    """Embedding, blocks and classifier, all linear but for the blocks' activations.

    Without `residual` a plain multilayer perceptron. Between two activations stand products of matrices: a block's down
    projection, then the next one's up projection.
    """

    config_class = DenseConfig
    config: DenseConfig
    main_input_name = "input_values"
    _no_split_modules = ["DenseBlock"]  # noqa: RUF012  as Transformers declares it
    # Transformers' losses for classification and regression are means, all but one whatever num_items_in_batch says.
    # So the Trainer is not to give it, and divides by the steps of accumulation itself.
    accepts_loss_kwargs = False

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        config.check_widths()
        widths = config.intermediate_size
        assert isinstance(widths, list)
        self.embedding = nn.Linear(config.input_size, config.hidden_size, bias=config.use_bias)
        self.layers = nn.ModuleList(DenseBlock(config, width) for width in widths)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 1, bias=config.use_bias)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if self.config.initializer_range is not None or not isinstance(module, nn.Linear):
            super()._init_weights(module)
            return
        init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Two random samples, always the same, (2, input_size)."""
        generator = torch.Generator().manual_seed(0)
        return {"input_values": torch.randn((2, self.config.input_size), generator=generator)}

    @can_return_tuple
    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits of samples.

        Args:
            input_values: floats, (samples, input_size).
            labels: class indices (samples) for one label of several, targets (samples) or (samples, num_labels) for
                regression, or 0 and 1 (samples, num_labels) for several labels at once. Which it is says problem_type;
                when None, the labels' dtype does (floats are several labels), and one label is regression.

        Returns:
            logits (samples, num_labels), and the mean loss when there are labels. A tuple with return_dict=False.

        Raises:
            ValueError: inputs of another shape, or that are no floats; labels that are not one for each logit.
        """
        features = self.config.input_size
        if input_values.ndim != 2 or input_values.shape[1] != features or not input_values.is_floating_point():
            raise ValueError(
                f"input_values must be floats of the shape (samples, {features}); got {input_values.dtype}, "
                f"{tuple(input_values.shape)}: flatten images, and convert whole numbers by .float()"
            )
        hidden_states = self.embedding(input_values.to(self.dtype)[:, None])
        for block in self.layers:
            hidden_states = block(hidden_states)
        logits = self.classifier(hidden_states)[:, 0]
        loss = None if labels is None else self._loss(labels, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Transformers' loss, with labels of the shape and dtype that it wants."""
        measured = self.config.problem_type in ("regression", "multi_label_classification")
        if not (measured or self.config.num_labels == 1 or labels.is_floating_point()):
            return self.loss_function(labels.long(), logits, self.config)
        if labels.numel() != logits.numel():
            raise ValueError(
                f"labels must be as many as logits, {tuple(logits.shape)}, for {self.config.problem_type or 'floats'}; "
                f"got {tuple(labels.shape)}: class indices must be whole numbers"
            )
        return self.loss_function(labels.to(logits.dtype).view_as(logits), logits, self.config)


def register(auto: Any) -> None:
    """Tell Transformers' `modeling_auto`, the module `auto`, which model the config means."""
    auto.AutoModelForSequenceClassification.register(DenseConfig, DenseForClassification)
