"""What llm-compressor's GPTQ (W4A16) costs on the work of cost.py, which runs this in an environment that has it.

    pip install llmcompressor==0.14.0
    python benchmarks/cost.py --peer that/environment/bin/python

Prints time over one plain pass, and the MiB that the largest resident set grew by beyond that of the plain pass.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

SAMPLES, POSITIONS, VOCABULARY, BATCH = 32, 256, 32_000, 8  # as in cost.py


def resident() -> float:
    """Largest resident set so far in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from llmcompressor import oneshot  # in an environment of its own
    from llmcompressor.modifiers.quantization import GPTQModifier

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=6,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )
    with TemporaryDirectory() as folder:  # it looks at the config that a model was loaded from
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        run(folder, oneshot, GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]))


def run(folder: str, oneshot: Callable[..., object], recipe: object) -> None:
    """Time it, and print what was found."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    windows = torch.randint(3, VOCABULARY, (SAMPLES, POSITIONS), generator=torch.Generator().manual_seed(1))

    def plain() -> float:
        start = perf_counter()
        with torch.no_grad():
            for ids in windows.split(BATCH):
                model(input_ids=ids, use_cache=False)
        return perf_counter() - start

    plain()
    before, lowest = plain(), resident()
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    words = WordLevel({"<pad>": 0}, unk_token="<pad>")  # it asks for a tokenizer, and has nothing to do for it
    start = perf_counter()
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>"),
        dataset=data,
        recipe=recipe,
        max_seq_length=POSITIONS,
        num_calibration_samples=SAMPLES,
        batch_size=BATCH,
    )
    print(f"{(perf_counter() - start) / before:.3f} {resident() - lowest:.1f}")


if __name__ == "__main__":
    main()
