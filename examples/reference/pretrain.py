"""Make a small language model like the bundled one, from documentation packages and Python's standard library.

    apt-get install manpages manpages-dev python3.11-doc perl-doc git-doc debian-handbook
    python examples/reference/pretrain.py --output out/my-llama
    python examples/reference/pretrain.py --architecture gpt2 --width 192 --steps 1200 --output out/my-gpt2

A document that holds a tenth of the eight-word sequences of one of `heldout.jsonl` is kept out of training, whatever
its markup, so that the held-out texts stay held out. The tokenizer is the bundled one unless `--new-tokenizer` trains
another on the gathered documents.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
SHARE = Path("/usr/share")
SOURCES = {
    "man": (SHARE / "man", ["man1/*.gz", "man2/*.gz", "man3/*.gz", "man4/*.gz", "man5/*.gz", "man7/*.gz", "man8/*.gz"]),
    "doc": (SHARE / "doc/python3.11/html/_sources", ["**/*.rst.txt"]),
    "git": (SHARE / "doc/git-doc", ["**/*.txt"]),
    "pod": (SHARE / "perl", ["**/*.pod"]),
    "handbook": (SHARE / "doc/debian-handbook/html/en-US", ["*.html"]),
    "py": (Path(sysconfig.get_paths()["stdlib"]), ["*.py", "[a-z]*/*.py"]),
}
SHORTEST = 400  # characters of a document
SHINGLE = 8  # words
SHARED = 0.1  # of a held-out document's shingles


def strip_troff(source: str) -> str:
    """The text of a manual page's source: its macros' arguments and its plain lines, without fonts and comments."""
    lines = []
    for line in source.splitlines():
        if re.match(r"['.]\s*(\\\"|TH|de|ds|if|ie|el|nr|tr|so)", line):
            continue
        line = re.sub(r"^[.']\s*[A-Za-z]{1,2}\b ?", "", line)
        line = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d|\\&|\\\".*", "", line)
        lines.append(re.sub(r"\\(-|e|\(..|\[\w+\])", lambda match: "-" if match[1] == "-" else "", line))
    return "\n".join(line for line in lines if line.strip())


def read_document(path: Path) -> str:
    """The text of one file, unpacked and without HTML tags or troff macros."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    if path.suffix == ".gz":
        text = strip_troff(text)
    if path.suffix == ".html":
        text = html.unescape(re.sub(r"<[^>]+>", " ", text))
    return text.strip()


def gather_documents() -> Iterator[str]:
    """Every document of the sources that are installed, longer than a paragraph, outside site-packages and tests."""
    seen: set[Path] = set()
    for root, patterns in SOURCES.values():
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                real = path.resolve()
                if (
                    real in seen
                    or not real.is_file()
                    or {"site-packages", "test", "tests", "idlelib"} & set(path.parts)
                ):
                    continue
                seen.add(real)
                text = read_document(real)
                if len(text) > SHORTEST:
                    yield text


def shingles(text: str) -> set[int]:
    """Hashes of all sequences of eight words, so that markup, line breaks and numbers make no difference."""
    words = re.findall(r"[a-z]{2,}", text.lower())
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def training_documents() -> list[str]:
    """The gathered documents without the held-out ones and without duplicates, in a fixed random order."""
    heldout = [shingles(text) for text in bundled("heldout")]
    every = set().union(*heldout)
    kept = []
    for text in tqdm(dict.fromkeys(gather_documents()), desc="reading documents"):
        common = shingles(text) & every
        if not any(len(common & document) > SHARED * len(document) for document in heldout):
            kept.append(text)
    random.Random(0).shuffle(kept)
    return kept


def bundled(split: str) -> list[str]:
    """The texts of `calibration.jsonl` or `heldout.jsonl`."""
    return [json.loads(line)["text"] for line in (HERE / f"{split}.jsonl").read_text().splitlines()]


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an end-of-text and a padding token."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocabulary, special_tokens=["<|endoftext|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A randomly initialised decoder of the asked architecture, width and depth."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if args.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=512,
                n_embd=args.width,
                n_layer=args.depth,
                n_head=args.width // 48,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
                **ids,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            intermediate_size=args.width * 11 // 4,
            num_hidden_layers=args.depth,
            num_attention_heads=args.width // 64,
            num_key_value_heads=max(1, args.width // 128),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            **ids,
        )
    )


def optimizer_for(model: PreTrainedModel, rate: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a twelfth of training, constant, linear decay over the last three tenths."""
    return min(1.0, (step + 1) / max(1, steps // 12), (steps - step) / (0.3 * steps))


def train(model: PreTrainedModel, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """Next-token training on random windows of the token stream."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = optimizer_for(model, args.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, args.steps))
    bar = tqdm(range(args.steps), desc="pretraining")
    for step in bar:
        starts = torch.randint(len(stream) - args.length, (args.batch,), generator=generator)
        batch = torch.stack([stream[start : start + args.length] for start in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int) -> float:
    """Mean cross-entropy (nats a token) on the first 64 windows of the held-out texts."""
    ids = [
        i
        for text in bundled("heldout")
        for i in [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ]
    windows = torch.tensor(ids[: 64 * length]).view(-1, length)
    return sum(model(input_ids=w, labels=w).loss.item() for w in windows.split(8)) / len(windows.split(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--architecture", choices=["llama", "gpt2"], default="llama")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1757)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new-tokenizer", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    documents = training_documents()
    tokenizer = (
        train_tokenizer(documents, vocabulary=8192)
        if args.new_tokenizer
        else AutoTokenizer.from_pretrained(HERE / "manuals-llama-12l")
    )
    encoded = tokenizer(documents, add_special_tokens=False).input_ids
    stream = torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])
    model = build_model(args, tokenizer)
    print(f"{len(documents):,} documents, {len(stream):,} tokens, {model.num_parameters():,} parameters")
    train(model.train(), stream, args)
    print(f"held-out loss {heldout_loss(model.eval(), tokenizer, args.length):.3f}")
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
