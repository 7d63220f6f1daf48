"""What a step of the engine asks of one process: products, attention, bytes moved, and what the processes exchange.

The closed form of what `inference` computes, whose products the tests compare with a recorded step of the engine. As
there, every process of a replica keeps all tokens; partial outputs are gathered and added in the order of ranks.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from liaoyuan.compute.plan.program.work import Work, product, stream
from liaoyuan.compute.plan.serving.experts import busiest
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.cache import cached_layers
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import Layout, check_inference
from liaoyuan.parallel.inference import SPREAD_BYTES

BITS = {"int8": 8.0, "fp8": 8.0, "int4": 4.5}  # of a weight, scales included (of int4: 16 bits for 32 weights)
DRAWN = 12  # bytes for each logit of a row that is drawn from: fp32, read and written, and its sum of exponentials

Sending = tuple[str, float]  # a collective, and the bytes that a process sends


@dataclass(frozen=True)
class Served:
    """A model as a replica of `tp` processes serves it; experts over `ep` of them.

    bits: of its weights, a key of `BITS`; None: as they are. shares: of the rows of experts, those that come to each
    process of ep, in any order; (): equal ones. copies: further slots for experts in each process and layer.
    """

    model: ModelConfig
    tp: int = 1
    ep: int = 1
    bits: str | None = None
    shares: tuple[float, ...] = ()
    copies: int = 0

    @cached_property
    def size(self) -> int:
        """Bytes of a number of activations."""
        return self.model.torch_dtype.itemsize

    @cached_property
    def weight_size(self) -> float:
        """Bytes of a weight of a projection."""
        return BITS[self.bits] / 8 if self.bits else float(self.size)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in one process."""
        model = self.model
        heads = model.num_key_value_heads // self.tp
        return cached_layers(model) * heads * (model.head_dim + model.value_head_dim) * self.size

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of the weights in one process."""
        model = self.model
        tables = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
        inner = model.num_parameters(embedding=False)
        copies = 0.0
        if model.experts:
            sparse = sum(map(model.is_sparse, range(model.num_hidden_layers)))
            expert = 3 * model.hidden_size * model.experts.moe_intermediate_size * self.ep / self.tp
            copies = sparse * self.copies * expert
        return (inner / self.tp + copies) * self.weight_size + tables / self.tp * self.size

    def imbalance(self, tokens: int) -> float:
        """Return the rows of experts of the busiest process of ep over the mean in a step of so many tokens.

        The fewer tokens a step has, the more is chance; see `experts.busiest`.
        """
        if not self.model.experts or self.ep == 1:
            return 1.0
        shares = self.shares or (1 / self.ep,) * self.ep
        return busiest(shares, tokens * self.model.experts.num_experts_per_tok)

    def step_bytes(self, tokens: int, rows: int) -> float:
        """Return bytes of what a step of so many tokens and drawn rows holds beside weights and cache, at most."""
        model = self.model
        width = max(2 * model.intermediate_size, model.experts.moe_intermediate_size * 2 if model.experts else 0)
        per_token = 6 * model.hidden_size + 2 * width / self.tp
        if model.experts:
            per_token += model.experts.num_experts_per_tok * 3 * model.hidden_size
        return tokens * per_token * self.size + rows * model.vocab_size * (self.size + 8)

    def products(self, tokens: int, rows: int) -> list[tuple[int, Work]]:
        """Return how often each product comes in a step of so many tokens, of which `rows` give logits."""
        model, found = self.model, list[tuple[int, Work]]()
        layers = model.num_hidden_layers
        for n, k in self._attention_shapes():
            found.append((layers, self._product(tokens, n, k)))
        sparse = sum(map(model.is_sparse, range(layers)))
        if layers > sparse:
            found += [(layers - sparse, work) for work in self._dense(tokens, model.intermediate_size)]
        if sparse and model.experts:
            found.append((sparse, product(tokens, model.experts.num_experts, model.hidden_size, model.dtype)))
            found += [(sparse, work) for work in self._experts(tokens)]
            if shared := model.experts.shared_intermediate_size:
                found += [(sparse, work) for work in self._dense(tokens, shared)]
        if rows:
            found.append((1, self._product(rows, math.ceil(model.vocab_size / self.tp), model.hidden_size, head=True)))
        return found

    def streams(self, tokens: int, rows: int) -> list[tuple[int, Work]]:
        """Return how often each piece of work that moves bytes alone comes in such a step."""
        model, size = self.model, self.size
        hidden, dtype = tokens * model.hidden_size * size, model.dtype
        heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim // self.tp
        layers, sparse = model.num_hidden_layers, sum(map(model.is_sparse, range(model.num_hidden_layers)))
        found = [
            (2 * layers + 1, stream(2.0 * hidden, dtype)),  # norms
            (2 * layers, stream(3.0 * hidden, dtype)),  # the residual stream
            (2 * layers, stream(2.0 * tokens * heads * size, dtype)),  # rotation; into the cache
        ]
        if layers > sparse:
            width = model.intermediate_size // self.tp
            found.append((layers - sparse, stream(3.0 * tokens * width * size, dtype)))
        if sparse and model.experts:
            chosen = tokens * model.experts.num_experts_per_tok
            width = model.experts.moe_intermediate_size
            found.append((2 * sparse, stream(2.0 * chosen * model.hidden_size * size, dtype)))  # there, and back
            found.append((sparse, stream(3.0 * chosen / self.ep * self.imbalance(tokens) * width * size, dtype)))
        if rows:
            found.append((2, stream(float(rows * model.vocab_size * DRAWN) / 2, "float32")))
        return found

    def attention(self, pairs: float, tokens: int, read: float) -> Work:
        """Return attention of one layer: `pairs` of tokens and what they see, keys and values of `read` tokens."""
        model = self.model
        heads = model.num_attention_heads / self.tp
        width = model.head_dim + model.value_head_dim
        flops = 2.0 * pairs * heads * width
        traffic = read * self.token_bytes / cached_layers(model) + tokens * heads * width * self.size
        return Work("attention", model.dtype, flops, traffic)

    def sent(self, tokens: int, rows: int) -> list[tuple[int, Sending]]:
        """Return how often each collective of the replica's processes comes in such a step, and what each sends."""
        if self.tp == 1:
            return []
        model, layers = self.model, self.model.num_hidden_layers
        sparse = sum(map(model.is_sparse, range(layers)))
        placed = sparse if self.ep > 1 and model.experts else 0
        sums = 1 + 2 * layers - placed
        if placed and model.experts and model.experts.shared_intermediate_size:
            sums += placed
        found = [(sums * times, one) for times, one in self._summed(tokens * model.hidden_size * self.size)]
        if placed:
            found += [(placed * times, one) for times, one in self._joined(tokens)]
        if rows:
            logits = rows * math.ceil(model.vocab_size / self.tp) * self.size
            found.append((1, ("all-gather", float((self.tp - 1) * logits))))
        found.append((1, ("broadcast", 8.0 * (8 + 4 * tokens))))  # the announcement of the call
        return found

    def _summed(self, part: int) -> list[tuple[int, Sending]]:
        """See `parallel.inference.ordered_sum`; part: bytes of one process's partial output."""
        if self.tp == 2 or part * self.tp < SPREAD_BYTES:
            return [(1, ("all-gather", float((self.tp - 1) * part)))]
        share = part * (self.tp - 1) / self.tp
        return [(1, ("all-to-all", share)), (1, ("all-gather", share))]

    def _joined(self, tokens: int) -> list[tuple[int, Sending]]:
        """See `parallel.inference._to_slots`: rows of the experts' results, padded to those of the busiest process."""
        assert self.model.experts
        row = self.model.hidden_size * self.size
        chosen = tokens * self.model.experts.num_experts_per_tok
        if chosen * row < SPREAD_BYTES:
            return [(1, ("all-gather", (self.tp - 1) * chosen / self.ep * self.imbalance(tokens) * row))]
        own = chosen / self.ep * self.imbalance(tokens) * row * (self.tp - 1) / self.tp
        return [(1, ("all-to-all", own)), (1, ("all-gather", tokens * row * (self.tp - 1) / self.tp))]

    def _attention_shapes(self) -> list[tuple[int, int]]:
        """Return (outputs, inputs) of attention's projections in one process."""
        model, tp = self.model, self.tp
        out = (model.hidden_size, model.num_attention_heads * model.value_head_dim // tp)
        if not (latent := model.latent):
            heads = model.num_attention_heads + 2 * model.num_key_value_heads
            return [(heads * model.head_dim // tp, model.hidden_size), out]
        queries = model.num_attention_heads * model.head_dim // tp
        keys = model.num_attention_heads * (latent.qk_nope_head_dim + latent.v_head_dim) // tp
        shapes = [(latent.kv_lora_rank + latent.qk_rope_head_dim, model.hidden_size), (keys, latent.kv_lora_rank), out]
        if latent.q_lora_rank is None:
            return [(queries, model.hidden_size), *shapes]
        return [(latent.q_lora_rank, model.hidden_size), (queries, latent.q_lora_rank), *shapes]

    def _dense(self, tokens: int, width: int) -> list[Work]:
        hidden = self.model.hidden_size
        return [
            self._product(tokens, 2 * width // self.tp, hidden),
            self._product(tokens, hidden, width // self.tp),
        ]

    def _experts(self, tokens: int) -> list[Work]:
        """Return the products of the busiest process's experts: as many weights are read as experts are chosen."""
        experts, hidden = self.model.experts, self.model.hidden_size
        assert experts
        here = experts.num_experts / self.ep
        rows = tokens * experts.num_experts_per_tok / self.ep * self.imbalance(tokens)
        asked = here * (1 - (1 - experts.num_experts_per_tok / experts.num_experts) ** tokens)
        count = max(1, round(min(asked, rows, here)))
        width = experts.moe_intermediate_size * self.ep // self.tp
        return [self._grouped(rows, count, 2 * width, hidden), self._grouped(rows, count, hidden, width)]

    def _grouped(self, rows: float, count: int, n: int, k: int) -> Work:
        traffic = count * n * k * self.weight_size + rows * (n + k) * self.size
        m = max(1, math.ceil(rows / count))
        return Work("product", self.model.dtype, 2.0 * rows * n * k, traffic, m, n, k, count)

    def _product(self, m: int, n: int, k: int, head: bool = False) -> Work:
        weight = self.size if head and not self.bits else self.weight_size
        traffic = n * k * weight + m * (n + k) * self.size
        return Work("product", self.model.dtype, 2.0 * m * n * k, float(traffic), m, n, k)


def check_served(served: Served) -> None:
    """Raise LiaoyuanError if a replica cannot be cut so, as the engine refuses it."""
    if served.bits is not None and served.bits not in BITS:
        raise LiaoyuanError(f"Weights cannot be planned in '{served.bits}'; there are {', '.join(BITS)}.")
    if served.tp > 1 or served.ep > 1:
        check_inference(Layout(tp=served.tp, ep=served.ep), served.model, None, served.copies)
