"""The faithfulness of compressed networks as metrics of the library `evaluate`.

metric = InputOutputUnfaithfulness()
metric.add_batch(predictions=compressed_probabilities, references=original_probabilities)
metric.compute()        # {"input_output_unfaithfulness": …}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import torch
from torch import Tensor

from hf_compress.evaluation.faithfulness import input_output_unfaithfulness, structural_unfaithfulness

_INPUTS = """
Args:
    predictions: of the compressed network, a list of numbers for each sample: {values}.
    references: the same of the original network{means}.
    weights: how much each sample counts, for the local form; all alike when left out.
"""


class _Unfaithfulness(evaluate.Metric):
    """What both have in common: rows of numbers in, one number out."""

    name: ClassVar[str]
    values: ClassVar[str]
    means: ClassVar[str] = ""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=f"{type(self).__doc__}",
            citation="arXiv 2503.03693, arXiv 2301.09559",
            inputs_description=_INPUTS.format(values=self.values, means=self.means),
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[Sequence[float]],
        weights: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        counts = None if weights is None else _tensor(weights)
        return {self.name: self._of(_tensor(predictions), _tensor(references), counts)}

    def _of(self, predictions: Tensor, references: Tensor, weights: Tensor | None) -> float:
        raise NotImplementedError


def _tensor(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


class InputOutputUnfaithfulness(_Unfaithfulness):
    """Mean over samples of the squared distance of a compressed network's outputs from the original's."""

    name = "input_output_unfaithfulness"
    values = "its outputs"

    def _of(self, predictions: Tensor, references: Tensor, weights: Tensor | None) -> float:
        return input_output_unfaithfulness(predictions, references, weights)


class StructuralUnfaithfulness(_Unfaithfulness):
    """Mean absolute difference of a compressed network's hidden units and outputs from the original's clusters."""

    name = "structural_unfaithfulness"
    values = "the activations of all its hidden units, layer after layer, then its outputs"
    means = ", with the mean activation of each cluster in the place of a unit's"

    def _of(self, predictions: Tensor, references: Tensor, weights: Tensor | None) -> float:
        return structural_unfaithfulness([predictions], [references], weights)
