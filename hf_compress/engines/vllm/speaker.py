"""vLLM in a process of its own, asked by lines of JSON.

`python -m hf_compress.engines.vllm.speaker FOLDER LIKELIEST DTYPE` starts it. Each line that it reads is
`{"prompt": [tokens], "count": number}`. Its first is `{}` when the model is loaded; then it answers each with
`{"words": [[token, {token: log-probability}]]}`. What goes wrong it tells as `{"error": message}`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

_ROOM = 512  # tokens of a prompt and what comes after it

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""In which it is started, as long as the user has set nothing else."""


def main(folder: str, likeliest: int, dtype: str) -> None:
    # Libraries print as they like; what is read by the other process is ours alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        model = _load(folder, dtype)
        tell({})
        for line in sys.stdin:
            asked = json.loads(line)
            tell({"words": _words(model, asked["prompt"], asked["count"], likeliest)})
    except Exception as error:
        tell({"error": " ".join(str(error).split()) or type(error).__name__})
        raise


def _load(folder: str, dtype: str) -> Any:
    """Without compiling anything."""
    import vllm
    from transformers import AutoConfig

    from hf_compress.calibration.vocabulary import position_limit

    room = min(_ROOM, position_limit(AutoConfig.from_pretrained(folder)) or _ROOM)
    return vllm.LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        disable_log_stats=True,
        max_model_len=room,
        max_num_seqs=1,
        skip_tokenizer_init=True,
    )


def _words(model: Any, prompt: list[int], count: int, likeliest: int) -> list[tuple[int, dict[int, float]]]:
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=count, logprobs=likeliest, ignore_eos=True, detokenize=False)
    (answer,) = model.generate({"prompt_token_ids": prompt}, how, use_tqdm=False)
    said = answer.outputs[0]
    return [
        (token, {other: found.logprob for other, found in told.items()})
        for token, told in zip(said.token_ids, said.logprobs, strict=True)
    ]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
