"""llama.cpp's converter, told what it does not find out: a script, run by `gguf`.

python gguf_convert.py CONVERTER PRE_TOKENIZER SHAPES ARGUMENTS OF THE CONVERTER …

The converter knows tokenizers by the hash of what they make of one text, so that it knows none but published ones: what
it is told of such a one is PRE_TOKENIZER. SHAPES, as `{"feed_forward_length": [660, 352], …}`, are the sizes of each
block of a Llama by llama.cpp's names, where its config has one number for all: llama.cpp calls such a Llama "deci".
"""

from __future__ import annotations

import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    converter, name, shapes, *arguments = sys.argv[1:]
    sys.path[:0] = [str(Path(converter).parent), str(Path(converter).parent / "gguf-py")]
    known_by: Any = import_module("conversion.base").TextModel.get_vocab_base_pre

    def named(model: Any, tokenizer: Any) -> Any:
        try:
            return known_by(model, tokenizer)
        except NotImplementedError:
            if not name:
                raise
            return name

    import_module("conversion.base").TextModel.get_vocab_base_pre = named
    if shapes:
        _tell(**json.loads(shapes))
    sys.argv = [converter, *arguments]
    runpy.run_path(converter, run_name="__main__")


def _tell(head_width: int, **lengths: list[int]) -> None:
    """Have the converter write a Llama whose blocks differ.

    Args:
        head_width: entries of each head, which are laid out in another order in the file.
        lengths: of each block, by llama.cpp's names.
    """
    writer: Any = import_module("gguf").GGUFWriter
    llama: Any = import_module("conversion.llama").LlamaModel
    llama.model_arch = import_module("gguf").MODEL_ARCH.DECI
    reorder = llama.permute
    llama.permute = staticmethod(lambda weights, *_: reorder(weights, len(weights) // head_width, None))
    for name, values in lengths.items():
        write = getattr(writer, f"add_{name}")
        setattr(writer, f"add_{name}", lambda self, _, write=write, values=values: write(self, values))


if __name__ == "__main__":
    main()
