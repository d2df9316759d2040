"""llama.cpp's converter, told how a tokenizer splits texts where it does not know: a script, run by `gguf`.

python gguf_convert.py CONVERTER PRE_TOKENIZER ARGUMENTS OF THE CONVERTER …

The converter knows tokenizers by the hash of what they make of one text, so that it knows none but published ones.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    converter, name, *arguments = sys.argv[1:]
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
    sys.argv = [converter, *arguments]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main()
