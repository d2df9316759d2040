"""LRP and AttnLRP (arXiv 2402.05602): their messages sent one by one, against gradient × input under modified rules.

What is written here knows no gradients: each output j of a linear map z_j = Σ_i w_ji x_i + b_j sends R_j w_ji x_i / z_j
to its input i, and every other step has its equation from section 3 of the paper. All in float64; the package holds
norms in float32, so that is how near it comes.
"""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_compress as hfc
from tests.helpers.tiny import randomise

FEATURES, CLASSES, SAMPLES = 4, 3, 2
ACTIVATIONS = {
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
IDS = torch.tensor([[5, 17, 3, 11, 8]])


def near(found, expected):
    """To the rounding of float32, beside the largest relevance there is."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def through_linear(x, weight, bias, relevance, epsilon=0.0):
    """The ε-rule for a vector: what each input receives, and what each weight passes on, (outputs, inputs)."""
    messages = torch.zeros_like(weight)
    for j in range(len(weight)):
        z = sum(float(weight[j, i] * x[i]) for i in range(len(x))) + (0.0 if bias is None else float(bias[j]))
        divisor = z + epsilon * (1 if z >= 0 else -1)
        for i in range(len(x)):
            messages[j, i] = 0.0 if divisor == 0 else x[i] * weight[j, i] / divisor * relevance[j]
    return messages.sum(dim=0), messages


def split_sum(first, second, relevance):
    """Each of two terms receives its share of their sum."""
    total = first + second
    share = torch.where(total == 0, 0.0, first / total)
    return share * relevance, torch.where(total == 0, 0.0, second / total) * relevance


def numbers(linear):
    """Weight, (outputs, inputs), and bias of either kind of linear module."""
    weight = linear.weight.detach().double()
    bias = None if linear.bias is None else linear.bias.detach().double()
    return (weight if isinstance(linear, torch.nn.Linear) else weight.T.contiguous()), bias


# --- dense networks ---------------------------------------------------------------------------------------------------


def dense(seed=0, **fields):
    """A small network in float64, with biases that are not zero where it has any."""
    torch.manual_seed(seed)
    sizes = {"input_size": FEATURES, "hidden_size": 5, "intermediate_size": 7, "num_hidden_layers": 2}
    model = hfc.DenseForClassification(hfc.DenseConfig(**(sizes | {"num_labels": CLASSES} | fields))).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def affine(x, linear):
    weight, bias = numbers(linear)
    return weight @ x if bias is None else weight @ x + bias


@dataclass
class Messages:
    """What the slow propagation finds of one sample."""

    inputs: torch.Tensor | None = None
    neurons: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)


def dense_by_hand(model, x, epsilon):
    """The class predicted, and relevance everywhere, of one sample."""
    stream, seen = affine(x, model.embedding), []
    for block in model.layers:
        up = affine(stream, block.mlp.up_proj)
        activation = ACTIVATIONS[model.config.hidden_act]
        gate = None if block.mlp.gate_proj is None else activation(affine(stream, block.mlp.gate_proj))
        units = activation(up) if gate is None else gate * up
        written = affine(units, block.mlp.down_proj)
        seen.append((stream, units, written))
        stream = stream + written if model.config.residual else written
    logits, found = affine(stream, model.classifier), Messages()
    relevance = torch.zeros_like(logits)
    relevance[logits.argmax()] = logits.max()

    def back(name, read, relevance):
        received, found.weights[name] = through_linear(read, *numbers(model.get_submodule(name)), relevance, epsilon)
        return received

    relevance = back("classifier", stream, relevance)
    for index, (stream, units, written) in reversed(list(enumerate(seen))):
        kept, ffn = torch.zeros_like(relevance), relevance
        if model.config.residual:
            kept, ffn = split_sum(stream, written, relevance)
        name = f"layers.{index}.mlp"
        of_units = found.neurons[f"{name}.down_proj"] = back(f"{name}.down_proj", units, ffn)
        if model.config.gated:  # half to each factor, which hands it through its activation as it is
            relevance = kept + back(f"{name}.gate_proj", stream, of_units / 2)
            relevance = relevance + back(f"{name}.up_proj", stream, of_units / 2)
        else:
            relevance = kept + back(f"{name}.up_proj", stream, of_units)
    found.inputs = back("embedding", x, relevance)
    return logits, found


@pytest.mark.parametrize("epsilon", [0.0, 0.25])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("act", "gated", "bias"),
    [("relu", False, False), ("relu", False, True), ("gelu", False, True), ("silu", True, True), ("silu", True, False)],
)
def test_dense_networks(act, gated, bias, residual, epsilon):
    model = dense(hidden_act=act, gated=gated, use_bias=bias, residual=residual)
    x = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(3))
    result = hfc.relevance(model, x, weights=True, epsilon=epsilon)
    by_hand = [dense_by_hand(model, row.double(), epsilon) for row in x]
    near(result.explained, torch.stack([logits.max() for logits, _ in by_hand]))
    near(result.inputs["input_values"], torch.stack([found.inputs for _, found in by_hand]))
    assert result.neurons.keys() == by_hand[0][1].neurons.keys()
    for name, units in result.neurons.items():
        near(units, torch.stack([found.neurons[name] for _, found in by_hand]))
    assert result.weights.keys() == by_hand[0][1].weights.keys()
    for name, weights in result.weights.items():
        near(weights, sum(found.weights[name] for _, found in by_hand))


# --- the steps of a transformer, (tokens, width) ----------------------------------------------------------------------


class Transformer:
    """What is the same in both families; `epsilon` is that of the linear maps of the model, not of sums or norms."""

    def __init__(self, model, epsilon, rule):
        self.model, self.epsilon, self.rule = model, epsilon, rule
        self.neurons, self.heads, self.weights = {}, {}, {}

    def linear(self, name, x):
        return torch.stack([affine(token, self.model.get_submodule(name)) for token in x])

    def back(self, name, x, relevance):
        """Token by token; a weight's relevance is summed over them."""
        weight, bias = numbers(self.model.get_submodule(name))
        received = [through_linear(token, weight, bias, r, self.epsilon) for token, r in zip(x, relevance, strict=True)]
        self.weights[name] = sum(messages for _, messages in received)
        return torch.stack([inputs for inputs, _ in received])

    def attend(self, q, k, v, scaling):
        """Causal attention of one head: scores, their softmax, and what it makes of the values."""
        scores, probabilities = torch.zeros(len(q), len(q)).double(), torch.zeros(len(q), len(q)).double()
        for i in range(len(q)):
            for j in range(i + 1):
                scores[i, j] = scaling * (q[i] * k[j]).sum()
            shifted = (scores[i, : i + 1] - scores[i, : i + 1].max()).exp()
            probabilities[i, : i + 1] = shifted / shifted.sum()
        return scores, probabilities, probabilities @ v

    def attend_back(self, q, k, v, scaling, relevance):
        """Relevance of queries, keys and values of one head from that of what it gave."""
        scores, probabilities, gave = self.attend(q, k, v, scaling)
        to_q, to_k, to_v = (torch.zeros_like(part) for part in (q, k, v))
        to_values, to_probabilities = (0.5, 0.5) if self.rule == "attnlrp" else (1.0, 0.0)
        for i in range(len(q)):
            messages = probabilities[i, :, None] * v / gave[i] * relevance[i]  # A_ij V_jd / O_id · R_id
            to_v += to_values * messages
            of_softmax = to_probabilities * messages.sum(dim=1)
            lost = of_softmax.sum()
            for j in range(i + 1):  # Taylor: R(s_j) = s_j (R_j - A_j Σ R), eq. 13 of the paper
                of_score = scores[i, j] * (of_softmax[j] - probabilities[i, j] * lost)
                shares = scaling * q[i] * k[j] / scores[i, j] * of_score
                to_q[i] += shares / 2
                to_k[j] += shares / 2
        return to_q, to_k, to_v


def normalised(norm, x):
    """The matrix and the bias by which a norm, its scale held, turns each token into what it gives."""
    gain, bias = norm.weight.detach().double(), getattr(norm, "bias", None)
    matrices = []
    for token in x:
        centre = torch.eye(len(token)).double()
        if isinstance(norm, torch.nn.LayerNorm):
            centre = centre - 1 / len(token)
            scale = (token.var(unbiased=False) + norm.eps) ** -0.5
        else:
            scale = (token.square().mean() + norm.variance_epsilon) ** -0.5
        matrices.append(scale * gain[:, None] * centre)
    return torch.stack(matrices), None if bias is None else bias.detach().double()


def normalise(norm, x):
    matrices, bias = normalised(norm, x)
    gave = torch.stack([matrix @ token for matrix, token in zip(matrices, x, strict=True)])
    return gave if bias is None else gave + bias


def normalise_back(norm, x, relevance):
    matrices, bias = normalised(norm, x)
    if not isinstance(norm, torch.nn.LayerNorm):
        return relevance  # each number is only scaled: the identity rule
    return torch.stack([through_linear(t, m, bias, r)[0] for t, m, r in zip(x, matrices, relevance, strict=True)])


# --- Llama ------------------------------------------------------------------------------------------------------------


def rotations(length, dim, base):
    """(tokens, dim, dim): the matrix that turns a head's query or key at each position."""
    matrices = torch.zeros(length, dim, dim).double()
    for position in range(length):
        for pair in range(dim // 2):
            angle = torch.tensor(position * base ** (-2 * pair / dim)).double()
            first, second = pair, pair + dim // 2
            matrices[position, first, first] = matrices[position, second, second] = angle.cos()
            matrices[position, first, second], matrices[position, second, first] = -angle.sin(), angle.sin()
    return matrices


class Llama(Transformer):
    def heads_of(self, x):
        """Queries, keys and values of one layer by head, before and after they are turned."""
        return x.unflatten(1, (-1, self.model.config.head_dim)).transpose(0, 1)

    def attention(self, name, x):
        config = self.model.config
        turn = rotations(len(x), config.head_dim, config.rope_parameters["rope_theta"])
        q, k, v = (self.heads_of(self.linear(f"{name}.{part}_proj", x)) for part in "qkv")
        turned_q, turned_k = (torch.einsum("tij,htj->hti", turn, part) for part in (q, k))
        return turn, q, k, v, turned_q, turned_k

    def attention_output(self, name, x):
        _, _, _, v, q, k = self.attention(name, x)
        groups, scaling = len(q) // len(k), self.model.config.head_dim**-0.5
        gave = [self.attend(q[h], k[h // groups], v[h // groups], scaling)[2] for h in range(len(q))]
        return torch.cat(gave, dim=1)

    def attention_back(self, name, x, relevance):
        turn, q, k, v, turned_q, turned_k = self.attention(name, x)
        groups, scaling = len(q) // len(k), self.model.config.head_dim**-0.5
        relevance = self.heads_of(relevance)
        self.heads[f"{name}.o_proj"] = relevance.sum(dim=(1, 2))
        to_q, to_k, to_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for h in range(len(q)):
            g = h // groups
            found = self.attend_back(turned_q[h], turned_k[g], v[g], scaling, relevance[h])
            to_v[g] += found[2]
            for t in range(len(x)):
                to_q[h, t] += through_linear(q[h, t], turn[t], None, found[0][t])[0]
                to_k[g, t] += through_linear(k[g, t], turn[t], None, found[1][t])[0]
        parts = {"q": to_q, "k": to_k, "v": to_v}
        return sum(self.back(f"{name}.{p}_proj", x, r.transpose(0, 1).flatten(1)) for p, r in parts.items())

    def explain(self, ids):
        """Relevance of the tokens (tokens, width) for the word held most likely to come next."""
        core = self.model.model
        stream, seen = core.embed_tokens.weight.detach().double()[ids], []
        for index, block in enumerate(core.layers):
            name, start = f"model.layers.{index}", stream
            read = normalise(block.input_layernorm, start)
            mixed = self.attention_output(f"{name}.self_attn", read)
            attended = self.linear(f"{name}.self_attn.o_proj", mixed)
            middle = start + attended
            read_ffn = normalise(block.post_attention_layernorm, middle)
            gate = torch.nn.functional.silu(self.linear(f"{name}.mlp.gate_proj", read_ffn))
            units = gate * self.linear(f"{name}.mlp.up_proj", read_ffn)
            written = self.linear(f"{name}.mlp.down_proj", units)
            stream = middle + written
            seen.append((name, block, start, read, mixed, attended, middle, read_ffn, units, written))
        read = normalise(core.norm, stream)
        logits = self.linear("lm_head", read)
        relevance = torch.zeros_like(logits)
        relevance[-1, logits[-1].argmax()] = logits[-1].max()
        relevance = normalise_back(core.norm, stream, self.back("lm_head", read, relevance))
        for name, block, start, read, mixed, attended, middle, read_ffn, units, written in reversed(seen):
            kept, ffn = split_sum(middle, written, relevance)
            of_units = self.back(f"{name}.mlp.down_proj", units, ffn)
            self.neurons[f"{name}.mlp.down_proj"] = of_units.sum(dim=0)
            of_read = self.back(f"{name}.mlp.gate_proj", read_ffn, of_units / 2)
            of_read = of_read + self.back(f"{name}.mlp.up_proj", read_ffn, of_units / 2)
            relevance = kept + normalise_back(block.post_attention_layernorm, middle, of_read)
            kept, attention = split_sum(start, attended, relevance)
            of_mixed = self.back(f"{name}.self_attn.o_proj", mixed, attention)
            of_read = self.attention_back(f"{name}.self_attn", read, of_mixed)
            relevance = kept + normalise_back(block.input_layernorm, start, of_read)
        return logits[-1].max(), relevance


def tiny_llama():
    """Two layers, grouped keys, gains that are not one."""
    sizes = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=16)).double().eval()
    randomise(model, seed=1)
    return model


def compare(result, by_hand, explained):
    near(result.explained, explained[None])
    assert result.neurons.keys() == by_hand.neurons.keys()
    for name, units in result.neurons.items():
        near(units[0], by_hand.neurons[name])
    assert result.heads.keys() == by_hand.heads.keys()
    for name, heads in result.heads.items():
        near(heads[0], by_hand.heads[name])


def compare_weights(result, by_hand):
    """A linear map to which nothing comes may be left out."""
    left_out = by_hand.weights.keys() - result.weights.keys()
    assert result.weights.keys() == by_hand.weights.keys() - left_out
    assert all(not by_hand.weights[name].any() for name in left_out)
    for name, weights in result.weights.items():
        near(weights, by_hand.weights[name])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("rule", "epsilon"), [("attnlrp", 0.0), ("cp", 0.0), ("attnlrp", 0.05)])
def test_llama(rule, epsilon, implementation):
    """RMSNorm, grouped rotary attention and SwiGLU."""
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    by_hand = Llama(model, epsilon, rule)
    explained, relevance = by_hand.explain(IDS[0])
    result = hfc.relevance(model, IDS, weights=True, composite=rule, epsilon=epsilon)
    near(result.inputs["model.embed_tokens"][0], relevance)
    near(result.tokens[0], relevance.sum(dim=1))
    compare(result, by_hand, explained)
    compare_weights(result, by_hand)


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


class GPT2(Transformer):
    def attention_heads(self, name, x):
        q, k, v = self.linear(f"{name}.c_attn", x).chunk(3, dim=1)
        return [part.unflatten(1, (self.model.config.n_head, -1)).transpose(0, 1) for part in (q, k, v)]

    def attention_output(self, name, x):
        q, k, v = self.attention_heads(name, x)
        return torch.cat([self.attend(*head, q.shape[-1] ** -0.5)[2] for head in zip(q, k, v, strict=True)], dim=1)

    def attention_back(self, name, x, relevance):
        q, k, v = self.attention_heads(name, x)
        relevance = relevance.unflatten(1, (len(q), -1)).transpose(0, 1)
        self.heads[f"{name}.c_proj"] = relevance.sum(dim=(1, 2))
        found = [self.attend_back(*h, q.shape[-1] ** -0.5, r) for *h, r in zip(q, k, v, relevance, strict=True)]
        parts = [torch.cat(part, dim=1) for part in zip(*found, strict=True)]
        return self.back(f"{name}.c_attn", x, torch.cat(parts, dim=1))

    def explain(self, ids):
        """Relevance of the tokens and of the positions, each (tokens, width)."""
        core = self.model.transformer
        words = core.wte.weight.detach().double()[ids]
        positions = core.wpe.weight.detach().double()[: len(ids)]
        stream, seen = words + positions, []
        for index, block in enumerate(core.h):
            name, start = f"transformer.h.{index}", stream
            read = normalise(block.ln_1, start)
            mixed = self.attention_output(f"{name}.attn", read)
            attended = self.linear(f"{name}.attn.c_proj", mixed)
            middle = start + attended
            read_ffn = normalise(block.ln_2, middle)
            units = ACTIVATIONS["gelu_new"](self.linear(f"{name}.mlp.c_fc", read_ffn))
            written = self.linear(f"{name}.mlp.c_proj", units)
            stream = middle + written
            seen.append((name, block, start, read, mixed, attended, middle, read_ffn, units, written))
        read = normalise(core.ln_f, stream)
        logits = self.linear("lm_head", read)
        relevance = torch.zeros_like(logits)
        relevance[-1, logits[-1].argmax()] = logits[-1].max()
        relevance = normalise_back(core.ln_f, stream, self.back("lm_head", read, relevance))
        for name, block, start, read, mixed, attended, middle, read_ffn, units, written in reversed(seen):
            kept, ffn = split_sum(middle, written, relevance)
            of_units = self.back(f"{name}.mlp.c_proj", units, ffn)
            self.neurons[f"{name}.mlp.c_proj"] = of_units.sum(dim=0)
            of_read = self.back(f"{name}.mlp.c_fc", read_ffn, of_units)
            relevance = kept + normalise_back(block.ln_2, middle, of_read)
            kept, attention = split_sum(start, attended, relevance)
            of_mixed = self.back(f"{name}.attn.c_proj", mixed, attention)
            relevance = kept + normalise_back(block.ln_1, start, self.attention_back(f"{name}.attn", read, of_mixed))
        return logits[-1].max(), *split_sum(words, positions, relevance)


@pytest.mark.parametrize(("rule", "epsilon"), [("attnlrp", 0.0), ("cp", 0.0), ("attnlrp", 0.05)])
def test_gpt2(rule, epsilon):
    """LayerNorm with a bias, queries, keys and values in one matrix, an FFN without gates, learned positions."""
    config = GPT2Config(vocab_size=23, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).double().eval()
    randomise(model, seed=1)
    by_hand = GPT2(model, epsilon, rule)
    explained, words, positions = by_hand.explain(IDS[0])
    result = hfc.relevance(model, IDS, weights=True, composite=rule, epsilon=epsilon)
    near(result.inputs["transformer.wte"][0], words)
    near(result.inputs["transformer.wpe"][0], positions)
    near(result.tokens[0], words.sum(dim=1))
    compare(result, by_hand, explained)
    compare_weights(result, by_hand)


def test_the_rules_are_told_apart():
    """By more than what is allowed for rounding, or the comparisons above would show nothing."""
    model = tiny_llama()
    full, cp = (hfc.relevance(model, IDS, composite=rule).tokens for rule in ("attnlrp", "cp"))
    assert float((full - cp).abs().max()) > 0.05 * float(full.abs().max())
