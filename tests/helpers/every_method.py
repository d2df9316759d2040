"""Settings of all methods that work differently, for tests that hold for each of them."""

import hf_compress as hfc
from tests.helpers.marks import only_quick

BITS = {"bits": 4.75, "group_size": 16}
SETTINGS = {
    "merge": hfc.MKAConfig(num_merges=2),
    "merge, paper": hfc.MKAConfig(num_merges=2, variant="paper"),
    "merge, paper, measured once": hfc.MKAConfig(num_merges=2, variant="paper", iterative=False),
    "drop": hfc.DropBlocksConfig(num_blocks=2),
    "drop by loss": hfc.DropBlocksConfig(num_blocks=2, criterion="perplexity"),
    "clusters": hfc.ILLCConfig(ratio=0.25),
    "clusters of heads": hfc.ILLCConfig(head_gamma=0.5),
    "clusters, paper": hfc.ILLCConfig(gamma=0.75, variant="paper"),
    "collapse": hfc.LayerCollapseConfig(num_layers=2),
    "collapse by loss": hfc.LayerCollapseConfig(num_layers=1, criterion="loss"),
    "features": hfc.AdaptiveCompressConfig(layers=[1, 3], ratio=0.5),
    "bits": hfc.LRPConfig(**BITS),
    "bits by relevance": hfc.LRPConfig(**BITS, allocation="relevance"),
    "bits by error": hfc.LRPConfig(**BITS, allocation="error", rounding="nearest"),
    "bits for all alike": hfc.LRPConfig(**BITS, allocation="uniform"),
    "bits of modules": hfc.LRPConfig(bits=6.5, group_size=16, per="module"),
    "weights": hfc.LRPConfig(sparsity=0.5),
    "weights across maps": hfc.LRPConfig(sparsity=0.5, scope="model"),
    "weights by Wanda": hfc.LRPConfig(sparsity=0.5, score="wanda", scope="row"),
    "weights by size": hfc.LRPConfig(granularity="n:m", score="magnitude", compensation="none"),
    "weights by chance": hfc.LRPConfig(sparsity=0.5, score="random"),
    "rows across maps": hfc.LRPConfig(sparsity=0.25, granularity="row", scope="model", score="signed"),
    "weights and bits": hfc.LRPConfig(sparsity=0.25, **BITS),
    "weights and bits by relevance": hfc.LRPConfig(sparsity=0.25, **BITS, allocation="relevance"),
    "weights, paper": hfc.LRPConfig(variant="paper"),
    "halves, paper": hfc.LRPConfig(variant="paper", prune=False, split=(8, 4), group_size=16),
    "neurons": hfc.LRPConfig(sparsity=0.25, granularity="neuron"),
    "heads and bits": hfc.LRPConfig(sparsity=0.5, granularity="head", scope="layer", **BITS),
    "blocks": hfc.LRPConfig(sparsity=0.25, granularity="block", score="wanda"),
}
NAMES = only_quick(
    SETTINGS, "merge", "merge, paper", "drop", "clusters", "collapse", "features", "bits", "weights", "neurons"
)
