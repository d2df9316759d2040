"""The config of the plain dense network. Apart from the model, so that `AutoConfig` alone does not import that."""

from __future__ import annotations

from typing import Any, Literal

from transformers.configuration_utils import PreTrainedConfig

from hf_compress.checks import check

_COUNT = "[1, inf)"
_Problem = Literal["regression", "single_label_classification", "multi_label_classification"]


class DenseConfig(PreTrainedConfig):
    """Settings of a `DenseForClassification`. All are given by name.

    Args:
        input_size: features of a sample.
        hidden_size: width of the stream between the blocks.
        intermediate_size: hidden units of a block's FFN: one number for all blocks, or a list with one for each. Kept
            as a list; config.json has one number where all are the same.
        num_hidden_layers: blocks, at least 1.
        hidden_act: one of `transformers.activations.ACT2FN`.
        gated: whether an FFN is down(act(gate(h)) * up(h)) instead of down(act(up(h))); with "silu" that is SwiGLU.
        residual: whether a block adds its FFN's output to what it reads, instead of passing it on alone.
        use_bias: whether the linear maps have a bias, the classifier's included.
        initializer_range: standard deviation of the first weights; 1 / √inputs of each linear map when None, since
            there are no norms that would make up for another.
        kwargs: fields of every config, such as num_labels (1 means regression) and problem_type.

    Raises:
        ValueError: a field that fits no model.
    """

    model_type = "hfc_dense"

    input_size: int = 64
    hidden_size: int = 64
    intermediate_size: int | list[int] = 128
    num_hidden_layers: int = 2
    hidden_act: str = "relu"
    gated: bool = False
    residual: bool = False
    use_bias: bool = True
    initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("input_size", "hidden_size", "num_hidden_layers"):
            check(name, getattr(self, name), int, _COUNT)
        if isinstance(self.intermediate_size, (list, tuple)):
            self.intermediate_size = list(self.intermediate_size)
        else:
            self.intermediate_size = [self.intermediate_size] * self.num_hidden_layers
        self.check_widths()
        for name in ("gated", "residual", "use_bias"):
            check(name, getattr(self, name), bool)
        self._check_activation()
        check("initializer_range", self.initializer_range, float | None, "(0, inf)", "1 / √inputs when None")
        super().__post_init__(**kwargs)
        check("num_labels", self.num_labels, int, _COUNT)
        check("problem_type", self.problem_type, _Problem | None, help="told from the labels when None")

    def check_widths(self) -> None:
        """Raise ValueError unless there is one width for each block; asked again when a model is built."""
        widths = self.intermediate_size
        assert isinstance(widths, list)
        for width in widths:
            check("intermediate_size", width, int, _COUNT)
        if len(widths) != self.num_hidden_layers:
            raise ValueError(
                f"intermediate_size must have one width for each of num_hidden_layers={self.num_hidden_layers} blocks; "
                f"got {len(widths)} ({widths[:8]}): give as many, or one number for all"
            )

    def _check_activation(self) -> None:
        from transformers.activations import ACT2FN

        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act must be an activation that Transformers knows, such as relu, gelu or silu "
                f"(transformers.activations.ACT2FN has them all); got {self.hidden_act!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, with one number for the widths where all are the same."""
        values = super().to_dict()
        widths = values["intermediate_size"]
        if len(set(widths)) == 1:
            values["intermediate_size"] = widths[0]
        return values


def register(auto: Any) -> None:
    """Tell Transformers' `configuration_auto`, the module `auto`, which config the model type means."""
    auto.AutoConfig.register(DenseConfig.model_type, DenseConfig)
