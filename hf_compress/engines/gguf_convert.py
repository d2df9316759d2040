"""llama.cpp's converter, told what it does not find out: a script, run by `gguf`.

python gguf_convert.py CONVERTER PRE_TOKENIZER WIDTHS ARGUMENTS OF THE CONVERTER …

The converter knows tokenizers by the hash of what they make of one text, so that it knows none but published ones: what
it is told of such a one is PRE_TOKENIZER. WIDTHS, as "[660, 352]", are the hidden units of each block of a Llama, where
its config has one number for all: llama.cpp calls such a Llama "deci".
"""

from __future__ import annotations

import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    converter, name, widths, *arguments = sys.argv[1:]
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
    if widths:
        gguf: Any = import_module("gguf")
        import_module("conversion.llama").LlamaModel.model_arch = gguf.MODEL_ARCH.DECI
        write = gguf.GGUFWriter.add_feed_forward_length
        gguf.GGUFWriter.add_feed_forward_length = lambda writer, _: write(writer, json.loads(widths))
    sys.argv = [converter, *arguments]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main()
