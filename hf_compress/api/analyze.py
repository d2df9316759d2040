"""What a model's blocks do to the residual stream, and what would be taken out of it: a look, nothing changed."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.compressible import check_model
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.data import Calibration, DataOptions, prepare
from hf_compress.calibration.media import Processor
from hf_compress.calibration.statistics import BlockStatistics, block_statistics
from hf_compress.checks import check
from hf_compress.evaluation.size import parameter_count
from hf_compress.methods.base.amounts import Amount
from hf_compress.methods.layer_collapse.closed_form import projections
from hf_compress.methods.layer_collapse.config import LayerCollapseConfig
from hf_compress.methods.layer_collapse.linear import fit_ffns
from hf_compress.methods.mka.config import MKAConfig
from hf_compress.methods.mka.similarity import check_samples, similarity_of
from hf_compress.numerics.defaults import torch_defaults

if TYPE_CHECKING:
    from rich.table import Table

RATIOS = (0.125, 0.25, 0.375, 0.5)


@dataclass(frozen=True)
class BlockRow:
    """One block.

    Attributes:
        index: its place in the stack.
        kind: a letter; blocks with the same letter may be merged with each other.
        parameters: number of its parameters.
        attention: path of the projection by which its attention, or another token mixer, writes to the stream.
        ffn: kind and width of its FFN, such as "gated 704".
        linearity: R² of the best affine map in the place of its FFN, on held-out batches: 1 for a linear FFN, below 0
            where the mean output would do better. None where no linear map can take its place, or none was measured
            (see `Analysis.note`). LayerCollapse may still refuse a map that is larger than the FFN.
        influence: 1 - mean cosine of a token's stream before and after it (ShortGPT, arXiv 2403.03853, equation 1).
        similarity_to_next: of its output to the next block's; None for the last.
    """

    index: int
    kind: str
    parameters: int
    attention: str
    ffn: str
    linearity: float | None
    influence: float
    similarity_to_next: float | None


@dataclass(frozen=True)
class Removal:
    """What a ratio would take out.

    Attributes:
        ratio: share of the blocks.
        merged: groups of neighbours that would become one block each, by similarity measured once: MKA,
            `variant="paper"`, `iterative=False`. Fewer than the ratio asks for where no more are of one kind.
        dropped: the blocks of least influence (`DropBlocksConfig(criterion="block_influence")`).
        parameters: what the model would have left after dropping.
    """

    ratio: float
    merged: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found.

    Attributes:
        model: where the model came from.
        stack: path of the residual stack that was looked at.
        measure: name of the similarity.
        similarity: (blocks, blocks), symmetric, ones on the diagonal.
        blocks: a row a block.
        removals: a row a ratio.
        parameters: of the whole model.
        calibration: samples, tokens, truncated samples, and how they were drawn (see `Stage`).
        note: why no FFN's linearity was measured; None where it was, or where no FFN can be one linear map.
    """

    model: str
    stack: str
    measure: str
    similarity: tuple[tuple[float, ...], ...]
    blocks: tuple[BlockRow, ...]
    removals: tuple[Removal, ...]
    parameters: int
    calibration: dict[str, int | str]
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The analysis as JSON text; also written to `path` when one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def table(self) -> Table:
        """The blocks, for `rich.print`."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"{self.model or 'model'}: {self.stack}", caption=self.note and escape(self.note))
        for name in ("block", "kind", "parameters", "attention", "FFN", "FFN R²", "influence", "similarity to next"):
            table.add_column(name, justify="left" if name in ("kind", "attention", "FFN") else "right")
        for row in self.blocks:
            similarity = "" if row.similarity_to_next is None else f"{row.similarity_to_next:.3f}"
            linearity = "" if row.linearity is None else f"{row.linearity:.3f}"
            counts = (str(row.index), row.kind, f"{row.parameters:,}")
            table.add_row(*counts, row.attention, row.ffn, linearity, f"{row.influence:.3f}", similarity)
        return table

    def removals_table(self) -> Table:
        """What each ratio would take out, for `rich.print`."""
        from rich.table import Table

        table = Table(title="what would be taken out")
        table.add_column("ratio", justify="right")
        table.add_column(f"merged by {self.measure} (paper)")
        table.add_column("dropped by block influence")
        table.add_column("parameters left", justify="right")
        for row in self.removals:
            merged = ", ".join("+".join(map(str, group)) for group in row.merged) or "nothing can be merged"
            left = f"{row.parameters:,} ({100 * row.parameters / self.parameters:.0f}%)"
            table.add_row(f"{row.ratio:g}", merged, ", ".join(map(str, row.dropped)), left)
        return table

    def plot(self, path: str | Path) -> Path:
        """Draw the similarity matrix; PNG or SVG by `path`."""
        from hf_compress.report.plots import plot_similarity

        name = Path(self.model).name or "model"
        return plot_similarity(self.similarity, path, f"{name}: {self.measure} similarity of the blocks' outputs")


@torch_defaults()
def analyze(
    model: PreTrainedModel,
    calibration: Any,
    tokenizer: Processor | None = None,
    *,
    config: MKAConfig | None = None,
    ratios: Sequence[float] = RATIOS,
    options: DataOptions | None = None,
) -> Analysis:
    """Look at a model's blocks. The model is left as it was.

    One pass over the data reads the streams. Another measures how linear the FFNs are, those that can be linear maps:
    for each in turn it adds up Gram matrices (hidden, hidden) on the CPU, 4 · hidden² operations a token, and solves
    two systems of that size. With the model on the CPU too, it takes about one and a half plain forward passes; with a
    wide model on a GPU it is by far the longer part.

    Args:
        model: any Transformers model whose blocks can be found.
        calibration: as for `compress`.
        tokenizer: as for `compress`.
        config: which similarity to measure, how, and in which stack; how much to merge is not read.
        ratios: shares of the blocks to say the removals for.
        options: batch size, maximum length, and text column of the calibration data.

    Raises:
        ValueError, TypeError: as `compress`.
    """
    config = config or MKAConfig(ratio=0.5)
    for ratio in ratios:
        check("ratios", ratio, float, "(0, 1)")
    check_model(model)
    data = prepare(calibration, model, tokenizer, options)
    anatomy = Anatomy(model)
    stack = anatomy.stack(config.stack)
    check_samples(config, data)  # before the pass, not after it
    statistics = block_statistics(model, stack, data, config.pooling)  # type: ignore[arg-type]
    similarity = similarity_of(config, statistics)
    kinds = anatomy.kinds(stack)
    linearity, note = _linearity(model, anatomy, stack, data)
    return Analysis(
        model=str(model.name_or_path or ""),
        stack=stack.path,
        measure=config.similarity,
        similarity=tuple(tuple(row) for row in similarity.tolist()),
        blocks=tuple(_rows(anatomy, stack, kinds, linearity, statistics, similarity)),
        removals=tuple(_removal(model, stack, ratio, kinds, statistics, similarity) for ratio in ratios),
        parameters=parameter_count(model),
        calibration=data.describe(),
        note=note,
    )


def _linearity(
    model: PreTrainedModel, anatomy: Anatomy, stack: Stack, data: Calibration
) -> tuple[dict[int, float], str | None]:
    """R² of the FFNs that can be linear maps, by block, and why there is none where it could not be measured."""
    blocks = [index for index in range(len(stack)) if projections(anatomy.parts(stack, index).ffn)]
    try:
        fits = fit_ffns(model, stack, data, blocks, LayerCollapseConfig.penalty)
    except ValueError as error:  # too little data, or an FFN that overflows; the rest of the analysis stands without it
        return {}, f"no FFN R²: {error}"
    return {index: fit.r2 for index, fit in fits.items()}, None


def _rows(
    anatomy: Anatomy,
    stack: Stack,
    kinds: list[Hashable],
    linearity: dict[int, float],
    statistics: BlockStatistics,
    similarity: Tensor,
) -> list[BlockRow]:
    letters = {kind: _letter(number) for number, kind in enumerate(dict.fromkeys(kinds))}
    rows = []
    for index, block in enumerate(stack.blocks):
        parts = anatomy.parts(stack, index)
        rows.append(
            BlockRow(
                index=index,
                kind=letters[kinds[index]],
                parameters=sum(p.numel() for p in block.parameters()),
                attention=parts.attention_output or "none found",
                ffn=f"{parts.ffn.kind} {parts.ffn.width}" if parts.ffn else "none found",
                linearity=linearity.get(index),
                influence=statistics.influence[index].item(),
                similarity_to_next=similarity[index, index + 1].item() if index + 1 < len(stack) else None,
            )
        )
    return rows


def _letter(number: int) -> str:
    """A to Z, then AA and on."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def _removal(
    model: PreTrainedModel,
    stack: Stack,
    ratio: float,
    kinds: list[Hashable],
    statistics: BlockStatistics,
    similarity: Tensor,
) -> Removal:
    count = Amount("ratio", ratio).of_blocks(len(stack))
    # Measured once, a fused block is to either side what its outermost block was: so the pairs are simply the best.
    pairs = [i for i in range(len(stack) - 1) if kinds[i] == kinds[i + 1]]
    pairs = sorted(sorted(pairs, key=lambda i: -similarity[i, i + 1].item())[:count])
    influence = statistics.influence.tolist()
    dropped = sorted(sorted(range(len(stack)), key=influence.__getitem__)[:count])
    return Removal(ratio, _groups(pairs), tuple(dropped), _left(model, stack, dropped))


def _groups(pairs: list[int]) -> tuple[tuple[int, ...], ...]:
    """The blocks that become one when every i of `pairs`, in rising order, is merged with i + 1."""
    groups: list[list[int]] = []
    for first in pairs:
        if groups and groups[-1][-1] == first:
            groups[-1].append(first + 1)
        else:
            groups.append([first, first + 1])
    return tuple(tuple(group) for group in groups)


def _left(model: PreTrainedModel, stack: Stack, dropped: Sequence[int]) -> int:
    """Parameters without some blocks; one that another part of the model shares stays."""
    prefixes = tuple(f"{stack.path}.{index}." for index in dropped)
    kept = {id(p): p.numel() for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(prefixes)}
    return sum(kept.values())
