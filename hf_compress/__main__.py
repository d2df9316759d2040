"""`python -m hf_compress`, and so `torchrun -m hf_compress`: the `hf-compress` command."""

from hf_compress.cli import main

main()
