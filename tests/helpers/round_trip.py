"""Every kind of change on six families: change, save, load, compare; train a step, save, load, compare again.

    python -m tests.helpers.round_trip    # about a minute on two cores; tiny random models, nothing is downloaded

A row of the table is one family and one change. "kept in" says where the new structure stands: in the config's own
fields, so that stock Transformers loads it, or in a record that needs `import hf_compress`. The exit status is 1 when a
loaded model is not the saved one, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.parts import hidden_size
from hf_compress.anatomy.stacks import Stack
from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.size import stored_bytes
from hf_compress.modules.bottleneck import Bottleneck
from hf_compress.plan.edits import MergeBlocks, RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite import builders
from hf_compress.rewrite.apply import apply

TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 4, "num_labels": 5}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "BERT": lambda: BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)),
    "ViT": lambda: ViTForImageClassification(ViTConfig(**VISION)),
}


def build(family: str) -> PreTrainedModel:
    """A random model of a family, the same each time."""
    torch.manual_seed(0)
    return MODELS[family]().eval()


def remove(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    return Plan((RemoveBlocks(stack.path, (block,)),))


def merge(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    return Plan((MergeBlocks(stack.path, block, (block + 1,)),))


def narrow(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    """A quarter of the hidden units goes; of each expert's where there are experts."""
    ffn = Anatomy(model).parts(stack, block).ffn
    assert ffn is not None
    kept = torch.randperm(ffn.width)[: ffn.width * 3 // 4]
    if ffn.experts is None:
        return builders.narrow_ffn(Block(model, stack, block), kept.tolist())
    return builders.narrow_experts(Block(model, stack, block), kept.expand(model.config.num_local_experts, -1))


def narrow_all(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    return sum((narrow(model, stack, index) for index in range(len(stack))), start=Plan())


def linear(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    d = hidden_size(model.config)
    return builders.linear_ffn(Block(model, stack, block), [torch.randn(d, d) / d], torch.randn(d) / d)


def low_rank(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    d = hidden_size(model.config)
    return builders.linear_ffn(Block(model, stack, block), [torch.randn(d, 4) / d, torch.randn(4, d)])


def bottleneck(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    d = hidden_size(model.config)
    squeezed = Bottleneck(d, d // 2)
    with torch.no_grad():
        squeezed.decoder.copy_(0.9 * nn.init.orthogonal_(squeezed.encoder).T)
    return builders.insert_bottleneck(Block(model, stack, block), squeezed)


def pack(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    """Attention's output projection in groups of 2 to 8 bits."""
    path = f"{stack.path}.{block}.{Anatomy(model).parts(stack, block).attention_output}"
    d = hidden_size(model.config)
    return builders.pack_linear(model, path, torch.randint(2, 9, (d, d // 8)), 8)


def blend(model: PreTrainedModel, stack: Stack, block: int) -> Plan:
    return builders.replace_activation(Block(model, stack, block), "identity", 0.5)


EDITS: dict[str, Callable[[PreTrainedModel, Stack, int], Plan]] = {
    "remove a block": remove,
    "merge two blocks": merge,
    "narrow every FFN": narrow_all,
    "narrow one FFN": narrow,
    "linear FFN": linear,
    "low-rank FFN": low_rank,
    "bottleneck": bottleneck,
    "packed linear": pack,
    "blended activation": blend,
}


IN_EACH_BLOCK = ("narrow one FFN", "bottleneck", "packed linear", "blended activation")


def change(model: PreTrainedModel, edit: str, block: int = 1) -> PreTrainedModel:
    """`model` after one change of a block."""
    torch.manual_seed(2)
    apply(EDITS[edit](model, Anatomy(model).stack(), block), model)
    return model


def changed_throughout(family: str, edits: Sequence[str] = IN_EACH_BLOCK) -> PreTrainedModel:
    """A model of a family with another change in each of its blocks."""
    model = build(family)
    stack = Anatomy(model).stack()
    torch.manual_seed(2)
    apply(sum((EDITS[edit](model, stack, block) for block, edit in enumerate(edits)), start=Plan()), model)
    return model


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of four, with labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (4,), generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": labels}
    ids = torch.randint(0, 99, (4, 12), generator=generator)
    return {"input_ids": ids, "labels": labels if "Classification" in type(model).__name__ else ids}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


def train(model: PreTrainedModel) -> None:
    """One step of AdamW on every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()(**inputs(model)).loss.backward()
    optimizer.step()
    model.zero_grad()


@dataclass(frozen=True)
class Outcome:
    """What became of a model on its way through files.

    Attributes:
        plain: whether its structure stands in the config's own fields.
        bytes: of its weights, before and after the change.
        same: whether the loaded model gave the saved one's logits.
        same_trained: the same, after a step of training and once more through files.
    """

    plain: bool
    bytes: tuple[int, int]
    same: bool
    same_trained: bool


def round_trip(model: PreTrainedModel, edit: str, folder: Path) -> Outcome:
    """Change block 1 of `model`, and send it through files twice, by `from_pretrained` of its own class."""
    before = stored_bytes(model)
    hfc.save(change(model, edit), folder / "changed")
    loaded = type(model).from_pretrained(folder / "changed")
    same = torch.equal(logits(loaded), logits(model))
    train(loaded)
    assert not torch.equal(logits(loaded), logits(model)), "training changed nothing"
    hfc.save(loaded, folder / "trained")
    again = type(model).from_pretrained(folder / "trained")
    plain = getattr(model.config, "quantization_config", None) is None
    return Outcome(plain, (before, stored_bytes(model)), same, torch.equal(logits(again), logits(loaded)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.set_verbosity_error()
    table = Table("family", "change", "kept in", "stored bytes", "loads the same", "and after training")
    failed = False
    for family in MODELS:
        for edit in EDITS:
            try:
                with TemporaryDirectory() as folder:
                    outcome = round_trip(build(family), edit, Path(folder))
            except UnsupportedModelError as error:
                table.add_row(family, edit, f"[dim]refused: {error}[/dim]", "", "", "")
                continue
            failed |= not (outcome.same and outcome.same_trained)
            before, after = outcome.bytes
            words = ["yes" if same else "[red]NO[/red]" for same in (outcome.same, outcome.same_trained)]
            table.add_row(family, edit, "config" if outcome.plain else "record", f"{before:,} → {after:,}", *words)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
