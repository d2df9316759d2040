"""A language of sixty words: its tokenizer, its texts, and a tiny random Llama that reads them."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
POSITIONS = 48


def word_tokenizer(add_special: bool) -> PreTrainedTokenizerFast:
    """One token a word; with `<s> … </s>` around each text if asked."""
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if add_special:
        backend.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", WORDS.index("<s>")), ("</s>", WORDS.index("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def words(count: int, seed: int) -> str:
    """A text of that many random words of the tokenizer's vocabulary."""
    picks = torch.randint(4, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[pick] for pick in picks.tolist())


def tiny_llama(layers: int = 2, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.4,  # far from uniform predictions, so that a wrong context shows
        tie_word_embeddings=tied,
        bos_token_id=WORDS.index("<s>"),
        eos_token_id=WORDS.index("</s>"),
        pad_token_id=WORDS.index("<pad>"),
    )
    return LlamaForCausalLM(config).eval()
