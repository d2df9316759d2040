"""Layer-wise relevance propagation: what each token, unit, head and weight contributes to an output."""
