"""
The MLX trainer: Apple Silicon. Single device, single file; its twin is train_cuda.py.

    python train_mlx.py               # by itself
    autoresearch run -m "what I did"  # as an experiment

An experiment may change anything in this file: the model, the optimizer, the constants, the loop. What it
may not change is what it runs inside: prepare.py and backends/. It must define build_model(track, platform),
which returns a model with model(x) -> logits [B, T, vocab_size], and main().
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from backends.mlx import Experiment, Platform, compute_dtype, current_platform
from prepare import Prepared

# ---------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------

START = current_platform().start  # from platforms.yaml, for this hardware; an experiment writes a number

# Model
N_LAYER = START.n_layer
N_EMBD = START.n_embd
HEAD_DIM = START.head_dim
# A letter per layer, repeated: L sees the whole row, S the short window; the last layer is L.
WINDOW_PATTERN = START.window_pattern
SHORT_WINDOW = START.short_window  # tokens, the position itself included
# Value embeddings. A letter per layer, repeated, its end at the last layer: T has a row for each token,
# B for each hashed bigram, G for each hashed trigram, "-" none.
VALUE_PATTERN = "GTBT"
BIGRAM_ROWS = START.bigram_rows  # of a table of hashed n-grams, a power of two; 0: no such tables
ROPE_BASE = 200_000
SOFTCAP = 15.0  # logits are squashed to (-SOFTCAP, SOFTCAP)
INIT_SCALE = 0.68  # of the initial matrices and value embeddings
X0_START = 0.05  # initial share of the first layer's input in the input of every layer

# Batch
TOTAL_BATCH_SIZE = START.total_batch_size  # tokens an optimizer step
DEVICE_BATCH_SIZE = START.device_batch_size  # rows a forward and backward pass; lower it when memory runs out
EVAL_BATCH_SIZE = START.eval_batch_size  # rows a forward pass when scoring

# Optimizer
MATRIX_LR = 0.04  # Muon, all matrices of the blocks
EMBEDDING_LR = 0.9  # AdamW, token and value embeddings
UNEMBEDDING_LR = 0.005  # AdamW, lm_head
SCALAR_LR = 0.5  # AdamW, residual and x0 scalars
ADAM_BETAS = (0.8, 0.95)
MUON_BETA2 = 0.95  # of NorMuon's second moment
WEIGHT_DECAY = 0.2  # Muon, cautious; falls to 0 over the run
EMBEDDING_DECAY = 0.001  # AdamW, token embeddings
VALUE_DECAY = 0.003  # AdamW, value embeddings
UNEMBEDDING_DECAY = 0.01  # AdamW, lm_head
WARMUP_RATIO = 0.05  # share of the time budget over which the learning rate rises
WARMDOWN_RATIO = 0.8  # share over which it falls
FINAL_LR_FRAC = 0.05  # of the full rate, at the end
MOMENTUM_RATIO = 0.1  # share over which Muon's momentum rises from 0.85 to 0.95

# Machine
COMPILE = True
WARMUP_STEPS = 3  # on random tokens, before the clock starts; their updates are thrown away
LOSS_CHUNK_CPU = 2**22  # logits that the loss holds at a time (see linear_cross_entropy) on the CPU
LOSS_CHUNK_GPU = 2**26  # and on a GPU

# ---------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------


def compiled_with(state: list) -> Callable[[Callable], Callable]:
    """Return mx.compile as a decorator. state: arrays, in lists and dicts, that the function replaces."""
    return partial(mx.compile, inputs=state, outputs=state) if COMPILE else lambda function: function


# ---------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------


def attention_kernel(config: "Config", layer: int) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Return causal attention for a layer, as f(q, k, v).

    q, k, v: [B, n_head, seq_len, head_dim]; f returns the same shape. A position attends to the last
    config.window(layer) positions, its own included. On Metal the fused kernel has no backward pass (mlx
    0.32: pull requests 2995 and 3241 are not in it), so that a gradient stores all scores: windows are
    computed in blocks, where they are few.
    """
    window = config.window(layer)
    if window < config.seq_len:
        return partial(block_attention, window=window)
    return sdpa_attention


def sdpa_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Return MLX's scaled_dot_product_attention over the whole row. q, k, v: [B, H, T, D]."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")


def block_attention(q: mx.array, k: mx.array, v: mx.array, window: int) -> mx.array:
    """Return attention computed for a block of `window` queries at a time.

    q, k, v: [B, H, T, D]. A block meets its own keys and those of the block before: T x 2W scores, not T x T.
    """
    B, H, T, D = q.shape
    n = -(-T // window)
    rest = (0, n * window - T)
    q, k, v = (mx.pad(t, ((0, 0), (0, 0), rest, (0, 0))).reshape(B, H, n, window, D) for t in (q, k, v))
    k, v = (mx.concatenate([one_block_later(t), t], axis=3) for t in (k, v))
    query = mx.arange(window)[:, None] + window
    key = mx.arange(2 * window)[None, :]
    has_before = mx.arange(n)[:, None, None] > 0
    seen = (key <= query) & (key > query - window) & (has_before | (key >= window))
    scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32) * D**-0.5
    weights = mx.softmax(mx.where(seen, scores, -math.inf), axis=-1).astype(q.dtype)
    return (weights @ v).reshape(B, H, n * window, D)[:, :, :T]


def one_block_later(t: mx.array) -> mx.array:
    """Return t [B, H, n, W, D] moved by one along n; the first block is zero."""
    return mx.pad(t, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1]


# ---------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------


@dataclass
class Config:
    vocab_size: int
    seq_len: int
    n_layer: int
    n_embd: int
    head_dim: int
    window_pattern: str
    short_window: int
    value_pattern: str
    bigram_rows: int  # 0: no tables of n-grams
    bos: int  # the token that opens a document
    dtype: mx.Dtype  # of activations and embeddings; the other weights are float32

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_dim

    def window(self, layer: int) -> int:
        """Return how many positions a layer attends to."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer < self.n_layer - 1
        return min(self.short_window, self.seq_len) if short else self.seq_len

    def value_kind(self, layer: int) -> str:
        """Return the letter of a layer in value_pattern."""
        return self.value_pattern[(layer - self.n_layer) % len(self.value_pattern)]

    def value_rows(self, layer: int) -> int:
        """Return the rows of a layer's value embeddings; 0: it has none."""
        kind = self.value_kind(layer)
        return {"T": self.vocab_size, "B": self.bigram_rows, "G": self.bigram_rows, "-": 0}[kind]


def norm(x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, None, 1e-6)


@mx.custom_function
def linear(x: mx.array, weight: mx.array) -> mx.array:
    """Return x [..., in] times weight [out, in] transposed, in the dtype of x.

    The weight is laid out anew, and the gradients are written so that no large product has a transposed
    right-hand side: MLX's CPU build takes 1.4 times as long for one, and the copy costs Metal next to
    nothing.
    """
    return x @ mx.contiguous(weight.astype(x.dtype).T)


@linear.vjp
def _(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    dw = cotangent.reshape(-1, cotangent.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return cotangent @ weight.astype(x.dtype), dw.astype(weight.dtype)


def rotate(x: mx.array, rotary: mx.array) -> mx.array:
    """Apply rotary position embedding (Su et al. 2021, arXiv:2104.09864), the halves of head_dim as the pair.

    x: [B, H, T, D]; rotary: float32 [D / 2], the positions in which each pair's angle grows by 1.
    """
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=0, freqs=rotary)


HASH_MULTIPLIERS = (0x7FEB352D, 0x5BD1E995, 0x2C1B3C6D)  # odd


def hash_ngrams(idx: mx.array, n: int, bos: int, rows: int) -> mx.array:
    """Return the row of a table of n-grams for each token and the n - 1 before it. idx: int32 [B, T].

    rows: a power of two, 0 without a table. Multiply-shift modulo 2^32 (Thorup 2015, arXiv:1504.06804). The
    tables are from public searches on this problem, autoresearch issues 243 and 244.
    """
    token, hashed = idx, idx.astype(mx.uint32) * HASH_MULTIPLIERS[0]
    for multiplier in HASH_MULTIPLIERS[1:n]:
        token = mx.pad(token[:, :-1], ((0, 0), (1, 0)), constant_values=bos)
        token = mx.where(idx == bos, bos, token)  # no n-gram crosses the border of two documents
        hashed = hashed + token.astype(mx.uint32) * multiplier
    bits = rows.bit_length() - 1
    return hashed >> 32 - bits


class Attention(nn.Module):
    GATE_CHANNELS = 32  # of the input, that decide how much value embedding a head takes

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        D = config.n_embd
        self.n_head = config.n_head
        self.head_dim = config.head_dim
        self.attend = attention_kernel(config, layer)
        self.qkv = mx.zeros((3, D, D))
        self.proj = mx.zeros((D, D))
        self.gate: Any = None
        if config.value_rows(layer):
            self.gate = mx.zeros((self.n_head, min(self.GATE_CHANNELS, D)))

    def __call__(self, x: mx.array, ve: tuple[mx.array, mx.array] | None, rotary: mx.array) -> mx.array:
        """Return [B, T, D]. x: [B, T, D]; ve: a table [rows, D] of value embeddings and its rows [B, T]."""
        B, T, D = x.shape
        qkv = linear(x, self.qkv.flatten(0, 1)).reshape(B, T, 3, self.n_head, self.head_dim)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        if ve is not None:
            # Gated per head (after ResFormer, Zhou et al. 2024, arXiv:2410.17897).
            table, idx = ve
            gate = 2 * mx.sigmoid(linear(x[..., : self.gate.shape[1]], self.gate))
            value = table[idx].reshape(B, T, self.n_head, self.head_dim)
            v = v + gate.swapaxes(1, 2)[..., None] * value.swapaxes(1, 2)
        q = norm(rotate(q, rotary))
        k = norm(rotate(k, rotary))
        return linear(self.attend(q, k, v).swapaxes(1, 2).reshape(B, T, D), self.proj)


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = mx.zeros((4 * config.n_embd, config.n_embd))
        self.proj = mx.zeros((config.n_embd, 4 * config.n_embd))

    def __call__(self, x: mx.array) -> mx.array:
        hidden = mx.square(
            mx.maximum(linear(x, self.fc), 0)
        )  # ReLU squared: So et al. 2021, arXiv:2109.08668
        return linear(hidden, self.proj)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, ve: tuple[mx.array, mx.array] | None, rotary: mx.array) -> mx.array:
        x = x + self.attn(norm(x), ve, rotary)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The language model. `init_weights` fills the weights."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        V = config.vocab_size
        D = config.n_embd
        L = config.n_layer
        self.config = config
        self.wte = mx.zeros((V, D), config.dtype)
        tables = {f"layer{i}": mx.zeros((config.value_rows(i), D), config.dtype) for i in range(L)}
        self.value_embeds = {name: table for name, table in tables.items() if len(table)}
        self.blocks = [Block(config, i) for i in range(L)]
        self.lm_head = mx.zeros((V, D))
        self.resid_lambdas = mx.zeros((L,))
        self.x0_lambdas = mx.zeros((L,))
        # Not a weight: the underscore says so to MLX.
        self._rotary = ROPE_BASE ** (mx.arange(0, config.head_dim, 2) / config.head_dim)

    def init_weights(self) -> None:
        """Draw new weights from the framework's generator."""
        bound = INIT_SCALE * (3 / self.config.n_embd) ** 0.5  # standard deviation INIT_SCALE * n_embd ** -0.5

        def uniform(like: mx.array) -> mx.array:
            return mx.random.uniform(-bound, bound, like.shape).astype(like.dtype)

        self.wte = mx.random.normal(self.wte.shape).astype(self.wte.dtype)
        self.lm_head = 0.001 * mx.random.normal(self.lm_head.shape)
        for name, table in self.value_embeds.items():
            self.value_embeds[name] = uniform(table)
        for block in self.blocks:
            block.attn.qkv = uniform(block.attn.qkv)
            block.mlp.fc = uniform(block.mlp.fc)
            block.attn.proj = mx.zeros_like(block.attn.proj)
            block.mlp.proj = mx.zeros_like(block.mlp.proj)
            if block.attn.gate is not None:
                block.attn.gate = mx.zeros_like(block.attn.gate)
        self.resid_lambdas = mx.ones_like(self.resid_lambdas)
        self.x0_lambdas = mx.full(self.x0_lambdas.shape, X0_START)
        mx.eval(self.parameters())

    def trunk(self, idx: mx.array) -> mx.array:
        """Return the hidden states [B, T, n_embd] in the compute dtype, normalised. idx: int32 [B, T]."""
        x = x0 = norm(self.wte[idx])
        c = self.config
        bigrams, trigrams = (hash_ngrams(idx, n, c.bos, c.bigram_rows) for n in (2, 3))
        rows = {"T": idx, "B": bigrams, "G": trigrams}
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].astype(x.dtype) * x + self.x0_lambdas[i].astype(x.dtype) * x0
            ve = (self.value_embeds[f"layer{i}"], rows[c.value_kind(i)]) if c.value_rows(i) else None
            x = block(x, ve, self._rotary)
        return norm(x)

    def __call__(self, idx: mx.array) -> mx.array:
        """Return logits [B, T, vocab_size] in the compute dtype. idx: int32 [B, T]."""
        logits = linear(self.trunk(idx), self.lm_head).astype(mx.float32)
        return (SOFTCAP * mx.tanh(logits / SOFTCAP)).astype(self.config.dtype)

    def flops_per_token(self) -> int:
        """Return the floating-point operations of forward and backward per token.

        6 for each weight of a matrix, 12 times head_dim for each head and attended position (Chowdhery et al.
        2022, arXiv:2204.02311, appendix B).
        """
        c = self.config
        blocks = [p for block in self.blocks for _, p in tree_flatten(block.parameters())]
        weights = sum(p.size for p in blocks) + self.lm_head.size
        return 6 * weights + 12 * c.n_embd * sum(c.window(i) for i in range(c.n_layer))


def build_model(track: Prepared, platform: Platform) -> GPT:
    """Return a new model, initialised from the seed in force."""
    config = Config(
        vocab_size=track.vocab_size,
        seq_len=track.seq_len,
        n_layer=N_LAYER,
        n_embd=N_EMBD,
        head_dim=HEAD_DIM,
        window_pattern=WINDOW_PATTERN,
        short_window=SHORT_WINDOW,
        value_pattern=VALUE_PATTERN,
        bigram_rows=BIGRAM_ROWS,
        bos=track.bos,
        dtype=compute_dtype(platform),
    )
    model = GPT(config)
    model.init_weights()
    return model


# ---------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------


@mx.custom_function
def cross_entropy_and_gradients(
    x: mx.array, weight: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the mean cross-entropy of softcapped logits in nats, and its gradients by x and weight.

    x: [N, D] compute dtype; weight: float32 [V, D]; targets: int32 [N]. All logits are never stored: those of
    a chunk of tokens are made in the compute dtype, and its gradients at once (as in Liger, Hsu et al. 2024,
    arXiv:2410.10989). The softmax is divided by its sum on the narrow side of the matrix products, so that
    logits are read and written once.
    """
    w = weight.astype(x.dtype)
    dx = []
    dw = mx.zeros_like(weight)
    loss = mx.array(0.0)
    rows = max(1, (LOSS_CHUNK_GPU if mx.default_device() == mx.gpu else LOSS_CHUNK_CPU) // len(w))
    for i in range(0, len(x), rows):
        part = x[i : i + rows]
        target = targets[i : i + rows, None]
        squashed = mx.tanh((part @ mx.contiguous(w.T)).astype(mx.float32) / SOFTCAP)
        z = mx.exp(SOFTCAP * squashed)  # exp(15) is far from overflow: no maximum is needed
        total = z.sum(axis=1, keepdims=True)
        dlogits = (z * (1 - mx.square(squashed))).astype(x.dtype)
        chosen = mx.take_along_axis(squashed, target, axis=1)
        at_target = (mx.exp(SOFTCAP * chosen) - total) * (1 - mx.square(chosen))
        dlogits = mx.put_along_axis(dlogits, target, at_target.astype(x.dtype), axis=1)
        share = 1 / (total * len(x))
        loss = loss + (mx.log(total) - SOFTCAP * chosen).sum()
        dx.append(((dlogits @ w) * share).astype(x.dtype))
        dw = dw + dlogits.T @ (part * share).astype(x.dtype)
    return loss / len(x), mx.concatenate(dx), dw


@cross_entropy_and_gradients.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
    scale = cotangents[0]
    _, dx, dw = outputs
    return dx * scale.astype(dx.dtype), dw * scale, mx.zeros_like(primals[2])


def linear_cross_entropy(x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    """Return the mean loss in nats. x: [B, T, D]; weight: [V, D]; targets: int32 [B, T]."""
    return cross_entropy_and_gradients(x.flatten(0, 1), weight, targets.flatten())[0]


# ---------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------

# Polar Express (Amsel et al. 2025, arXiv:2505.16932): the best polynomial for each of five iterations.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def frobenius(x: mx.array) -> mx.array:
    """Return the norms of matrices [n, rows, cols], float32 [n, 1, 1]."""
    return mx.sqrt(mx.square(x.astype(mx.float32)).sum(axis=(-2, -1), keepdims=True))


def orthogonalize(g: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return the nearest (semi-)orthogonal matrices to g [n, rows, cols], in the compute dtype."""
    x = g.astype(dtype)
    x = x / (frobenius(x) * 1.02 + 1e-6).astype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ mx.contiguous(x.swapaxes(-1, -2))  # laid out anew as in linear
        x = mx.addmm(x, mx.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.swapaxes(-1, -2) if tall else x


def muon_update(
    p: mx.array,
    g: mx.array,
    m: mx.array,
    v: mx.array,
    lr: mx.array,
    momentum: mx.array,
    decay: mx.array,
    dtype: mx.Dtype,
) -> tuple[mx.array, mx.array, mx.array]:
    """Update stacked matrices [n, rows, cols] by Muon (Jordan et al. 2024). Returns new (p, m, v).

    Nesterov momentum, Polar Express, NorMuon's variance normalisation (Li et al. 2025, arXiv:2510.05491)
    along the longer side, and cautious weight decay (Chen et al. 2025, arXiv:2510.12402): only where update
    and weight agree.
    """
    m = m + (g - m) * (1 - momentum)
    u = orthogonalize(g + (m - g) * momentum, dtype).astype(mx.float32)
    longer = -1 if u.shape[-2] >= u.shape[-1] else -2
    variance = mx.square(u).mean(axis=longer, keepdims=True)
    v = v + (variance - v) * (1 - MUON_BETA2)
    scaled = u * mx.rsqrt(v + 1e-10)
    u = scaled * (frobenius(u) / (frobenius(scaled) + 1e-10))
    lr = lr * max(1.0, u.shape[-2] / u.shape[-1]) ** 0.5
    return p - lr * u - lr * decay * p * (u * p >= 0), m, v


class AdamW(NamedTuple):
    """How AdamW updates a tensor."""

    lr: float
    betas: tuple[float, float] = ADAM_BETAS
    decay: float = 0.0


def adamw_update(
    p: mx.array, g: mx.array, m: mx.array, v: mx.array, how: AdamW, rate: mx.array, step: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Update p by AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), in float32. Returns new (p, m, v)."""
    beta1, beta2 = how.betas
    lr = how.lr * rate
    g = g.astype(mx.float32)
    m = m + (g - m) * (1 - beta1)
    v = v + (mx.square(g) - v) * (1 - beta2)
    update = (m / (1 - beta1**step)) / (mx.sqrt(v / (1 - beta2**step)) + 1e-10)
    return (p.astype(mx.float32) * (1 - lr * how.decay) - lr * update).astype(p.dtype), m, v


class Optimizer:
    """Muon for the matrices of the blocks, those of one shape stacked; AdamW for everything else.

    adamw: {name of a tensor: its AdamW}. muon: for each stack the names of its matrices. state: the number of
    steps, and the moments m and v of each tensor and stack; a stack's are under its first name.
    mx.compile captures that dict.
    """

    def __init__(self, model: GPT) -> None:
        scale = (model.config.n_embd / 768) ** -0.5  # AdamW's rates were tuned at width 768
        value = AdamW(EMBEDDING_LR * scale, decay=VALUE_DECAY)
        others = {
            "wte": AdamW(EMBEDDING_LR * scale, decay=EMBEDDING_DECAY),
            "lm_head": AdamW(UNEMBEDDING_LR * scale, decay=UNEMBEDDING_DECAY),
            "resid_lambdas": AdamW(SCALAR_LR * 0.01),
            "x0_lambdas": AdamW(SCALAR_LR, betas=(0.96, 0.95)),
        }
        self.model = model
        self.adamw: dict[str, AdamW] = {}
        stacks: dict[Any, list[str]] = {}
        for name, p in tree_flatten(model.parameters()):
            if name.startswith("blocks."):
                stacks.setdefault(p.shape[-2:], []).append(name)
            else:
                self.adamw[name] = others.get(name, value)
        self.muon = list(stacks.values())
        self.state: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        params = dict(tree_flatten(self.model.parameters()))
        self.state["step"] = mx.array(0.0)
        for name in self.adamw:
            shape = params[name].shape
            self.state[name] = {"m": mx.zeros(shape), "v": mx.zeros(shape)}
        for names in self.muon:
            stack = self.stacked([params[name] for name in names])
            longer = -1 if stack.shape[-2] >= stack.shape[-1] else -2
            v = mx.zeros_like(stack.mean(axis=longer, keepdims=True))
            self.state[names[0]] = {"m": mx.zeros_like(stack), "v": v}
        mx.eval(self.state)

    @staticmethod
    def stacked(matrices: list[mx.array]) -> mx.array:
        """Return [n, rows, cols] from matrices [rows, cols] and stacks of them."""
        return mx.concatenate([t.reshape(-1, *t.shape[-2:]) for t in matrices])

    @staticmethod
    def schedule(progress: float) -> list[mx.array]:
        """Return learning rate, momentum and decay as arrays: a new value does not compile anew."""
        values = lr_scale(progress), muon_momentum(progress), WEIGHT_DECAY * (1 - progress)
        return [mx.array(value) for value in values]

    def step(self, grads: dict[str, mx.array], schedule: list[mx.array]) -> None:
        """Update the model. grads: {name: gradient}; schedule: what `schedule(progress)` returned."""
        rate, momentum, decay = schedule
        params = dict(tree_flatten(self.model.parameters()))
        new = {}
        count = self.state["step"] + 1
        self.state["step"] = count
        for name, how in self.adamw.items():
            s = self.state[name]
            new[name], s["m"], s["v"] = adamw_update(
                params[name], grads[name], s["m"], s["v"], how, rate, count
            )
        for names in self.muon:
            s = self.state[names[0]]
            p = self.stacked([params[name] for name in names])
            g = self.stacked([grads[name] for name in names])
            dtype = self.model.config.dtype
            p, s["m"], s["v"] = muon_update(p, g, s["m"], s["v"], MATRIX_LR * rate, momentum, decay, dtype)
            first = 0
            for name in names:
                last = first + (params[name].shape[0] if params[name].ndim == 3 else 1)
                new[name] = p[first:last].reshape(params[name].shape)
                first = last
        self.model.update(tree_unflatten(list(new.items())))


# ---------------------------------------------------------------------------
# Schedules, as functions of the share of the time budget used
# ---------------------------------------------------------------------------


def lr_scale(progress: float) -> float:
    """Return the share of the full learning rate: warmup, constant, linear warmdown."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    left = max(0.0, 1.0 - progress)
    if left >= WARMDOWN_RATIO:
        return 1.0
    return FINAL_LR_FRAC + (1.0 - FINAL_LR_FRAC) * left / WARMDOWN_RATIO


def muon_momentum(progress: float) -> float:
    """Return Muon's momentum: it rises linearly and stays."""
    return 0.85 + 0.10 * min(1.0, progress / MOMENTUM_RATIO)


# ---------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------

NextBatch = Callable[[int], tuple[mx.array, mx.array]]  # rows -> (x, y), [rows, T] each
TrainStep = Callable[[NextBatch, float], mx.array]  # (next_batch, progress) -> mean loss


def micro_steps(seq_len: int) -> int:
    """Return how many batches make up TOTAL_BATCH_SIZE."""
    tokens = DEVICE_BATCH_SIZE * seq_len
    assert TOTAL_BATCH_SIZE % tokens == 0, (
        f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of DEVICE_BATCH_SIZE * seq_len = {tokens}"
    )
    return TOTAL_BATCH_SIZE // tokens


def make_train_step(model: GPT, optimizer: Optimizer) -> TrainStep:
    """Return train_step(next_batch, progress), which makes one optimizer step on TOTAL_BATCH_SIZE tokens.

    It returns the mean loss, not yet computed. Forward, backward and update are one compiled graph; with
    several micro-steps the gradients are summed as they come, and no micro-batch's graph outlives it.
    """
    n = micro_steps(model.config.seq_len)
    state = [model.state, optimizer.state]

    def mean_loss(x: mx.array, y: mx.array) -> mx.array:
        return linear_cross_entropy(model.trunk(x), model.lm_head, y) / n

    loss_and_grads = nn.value_and_grad(model, mean_loss)

    def add_to(sums: list, x: mx.array, y: mx.array) -> list:
        """Return [loss, gradients], added to those of earlier batches."""
        new = list(loss_and_grads(x, y))
        return tree_map(mx.add, new, sums) if sums else new

    accumulate = compiled_with([model.state])(add_to)

    @compiled_with(state)
    def finish(sums: list, x: mx.array, y: mx.array, schedule: list[mx.array]) -> mx.array:
        loss, grads = add_to(sums, x, y)
        optimizer.step(dict(tree_flatten(grads)), schedule)
        return loss

    def train_step(next_batch: NextBatch, progress: float) -> mx.array:
        sums: list = []
        for _ in range(n - 1):
            sums = accumulate(sums, *next_batch(DEVICE_BATCH_SIZE))
            mx.async_eval(sums)
        loss = finish(sums, *next_batch(DEVICE_BATCH_SIZE), optimizer.schedule(progress))
        mx.async_eval(loss, state)  # the next step is built while this one runs
        return loss

    return train_step


def warm_up(model: GPT, exp: Experiment) -> TrainStep:
    """Compile everything on random tokens. Returns train_step; weights and optimizer are as before."""
    initial = tree_map(mx.array, model.parameters())
    x, y = exp.dummy_batch(1)
    mx.eval(nn.value_and_grad(model, lambda: linear_cross_entropy(model.trunk(x), model.lm_head, y))())
    exp.check_memory(DEVICE_BATCH_SIZE)
    optimizer = Optimizer(model)
    train_step = make_train_step(model, optimizer)
    for _ in range(WARMUP_STEPS):
        mx.eval(train_step(exp.dummy_batch, 0.5), model.state, optimizer.state)
    model.update(initial)
    optimizer.reset()
    mx.eval(model.state)
    return train_step


def main() -> None:
    """Run one experiment."""
    exp = Experiment()
    model = build_model(exp.track, exp.platform)
    train_step = warm_up(model, exp)

    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the loop costs up to half a second

    exp.start(model, depth=N_LAYER, flops_per_token=model.flops_per_token())
    step = 0
    while exp.progress < 1.0:
        loss = train_step(exp.batch, exp.progress)
        exp.log(step, loss)
        step += 1
    exp.finish(model)


if __name__ == "__main__":
    main()
