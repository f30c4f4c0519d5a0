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
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from backends.mlx import Experiment, compute_dtype, current_platform

# ---------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------

START = current_platform().start  # sizes for this hardware, from platforms.yaml; an experiment writes a number instead

# Model
N_LAYER = START["n_layer"]
N_EMBD = START["n_embd"]
HEAD_DIM = START["head_dim"]
WINDOW_PATTERN = START["window_pattern"]  # a letter per layer, repeated: L sees the whole row, S the short window; the last layer is L
SHORT_WINDOW = START["short_window"]      # tokens, the position itself included
ROPE_BASE = 200_000
SOFTCAP = 15.0                            # logits are squashed to (-SOFTCAP, SOFTCAP)

# Batch
TOTAL_BATCH_SIZE = START["total_batch_size"]    # tokens an optimizer step
DEVICE_BATCH_SIZE = START["device_batch_size"]  # rows a forward and backward pass; lower it when memory runs out
EVAL_BATCH_SIZE = START["eval_batch_size"]      # rows a forward pass when scoring

# Optimizer
MATRIX_LR = 0.04         # Muon, all matrices of the blocks
EMBEDDING_LR = 0.6       # AdamW, token and value embeddings
UNEMBEDDING_LR = 0.004   # AdamW, lm_head
SCALAR_LR = 0.5          # AdamW, residual and x0 scalars
ADAM_BETAS = (0.8, 0.95)
MUON_BETA2 = 0.95        # of NorMuon's second moment
WEIGHT_DECAY = 0.2       # Muon, cautious; falls to 0 over the run
EMBEDDING_DECAY = 0.0    # AdamW, embeddings
WARMUP_RATIO = 0.05      # share of the time budget over which the learning rate rises
WARMDOWN_RATIO = 0.7     # share over which it falls
FINAL_LR_FRAC = 0.0      # of the full rate, at the end
MOMENTUM_RATIO = 0.3     # share over which Muon's momentum rises from 0.85 to 0.95

# Machine
COMPILE = True
WARMUP_STEPS = 3         # on random tokens, before the clock starts; their updates are thrown away
LOSS_CHUNK = 2**26       # logits held at a time by the loss (see linear_cross_entropy)

# ---------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------

def compiled(function, state=None):
    """mx.compile; `state`: arrays (in lists and dicts) that the function reads and replaces."""
    return mx.compile(function, inputs=state, outputs=state) if COMPILE else function


# ---------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------

def attention_kernel(window, seq_len):
    """Causal attention as f(q, k, v), over the last `window` positions, the own one included.

    q, k, v: [B, n_head, seq_len, head_dim]; f returns the same shape. On Metal the fused kernel has no backward
    pass (mlx 0.32: pull requests 2995 and 3241 are not in it), so that a gradient stores all scores: windows
    are computed in blocks, where they are few.
    """
    if window < seq_len:
        return partial(block_attention, window=window)
    return sdpa_attention


def sdpa_attention(q, k, v):
    """MLX's scaled_dot_product_attention, over the whole row."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")


def block_attention(q, k, v, window):
    """A block of `window` queries at a time against its own keys and those of the block before: T x 2W scores, not T x T."""
    B, H, T, D = q.shape
    n = -(-T // window)
    q, k, v = (mx.pad(t, ((0, 0), (0, 0), (0, n * window - T), (0, 0))).reshape(B, H, n, window, D) for t in (q, k, v))
    k, v = (mx.concatenate([mx.pad(t, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1], t], axis=3) for t in (k, v))
    query, key = mx.arange(window)[:, None] + window, mx.arange(2 * window)[None, :]
    seen = (key <= query) & (key > query - window) & ((mx.arange(n)[:, None, None] > 0) | (key >= window))
    scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32) * D**-0.5
    weights = mx.softmax(mx.where(seen, scores, -math.inf), axis=-1).astype(q.dtype)
    return (weights @ v).reshape(B, H, n * window, D)[:, :, :T]


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

    @property
    def n_head(self):
        return self.n_embd // self.head_dim

    def window(self, layer):
        """Positions that a layer attends to."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer < self.n_layer - 1
        return min(self.short_window, self.seq_len) if short else self.seq_len

    def has_value_embedding(self, layer):
        """Alternating layers, the last one included."""
        return layer % 2 == (self.n_layer - 1) % 2


def norm(x):
    return mx.fast.rms_norm(x, None, 1e-6)


@mx.custom_function
def linear(x, weight):
    """x [..., in] times weight [out, in] transposed, in the dtype of x.

    The weight is laid out anew, and the gradients are written so that no large product has a transposed right-hand
    side: MLX's CPU build takes 1.4 times as long for one, and the copy costs Metal next to nothing.
    """
    return x @ mx.contiguous(weight.astype(x.dtype).T)


@linear.vjp
def _(primals, cotangent, output):
    x, weight = primals
    dw = cotangent.reshape(-1, cotangent.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return cotangent @ weight.astype(x.dtype), dw.astype(weight.dtype)


def rotate(x):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the halves of head_dim as the pair. x: [B, H, T, D]."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=ROPE_BASE, scale=1.0, offset=0)


class Attention(nn.Module):
    GATE_CHANNELS = 32  # of the input, that decide how much value embedding a head takes

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.attend = attention_kernel(config.window(layer), config.seq_len)
        D = config.n_embd
        self.qkv = mx.zeros((3, D, D))
        self.proj = mx.zeros((D, D))
        self.gate = mx.zeros((self.n_head, min(self.GATE_CHANNELS, D))) if config.has_value_embedding(layer) else None

    def __call__(self, x, ve):
        B, T, D = x.shape
        q, k, v = linear(x, self.qkv.flatten(0, 1)).reshape(B, T, 3, self.n_head, self.head_dim).transpose(2, 0, 3, 1, 4)
        if ve is not None:
            # Value embeddings (a table [V, D] and idx [B, T]), gated per head (after ResFormer, Zhou et al. 2024, arXiv:2410.17897).
            table, idx = ve
            gate = 2 * mx.sigmoid(linear(x[..., : self.gate.shape[1]], self.gate))
            v = v + gate.swapaxes(1, 2)[..., None] * table[idx].reshape(B, T, self.n_head, self.head_dim).swapaxes(1, 2)
        q, k = norm(rotate(q)), norm(rotate(k))
        return linear(self.attend(q, k, v).swapaxes(1, 2).reshape(B, T, D), self.proj)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = mx.zeros((4 * config.n_embd, config.n_embd))
        self.proj = mx.zeros((config.n_embd, 4 * config.n_embd))

    def __call__(self, x):
        return linear(mx.square(mx.maximum(linear(x, self.fc), 0)), self.proj)  # ReLU squared: So et al. 2021, arXiv:2109.08668


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def __call__(self, x, ve):
        x = x + self.attn(norm(x), ve)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config, dtype):
        super().__init__()
        self.config = config
        V, D, L = config.vocab_size, config.n_embd, config.n_layer
        self.wte = mx.zeros((V, D), dtype)
        self.value_embeds = {f"layer{i}": mx.zeros((V, D), dtype) for i in range(L) if config.has_value_embedding(i)}
        self.blocks = [Block(config, i) for i in range(L)]
        self.lm_head = mx.zeros((V, D))
        self.resid_lambdas = mx.zeros((L,))
        self.x0_lambdas = mx.zeros((L,))

    def init_weights(self):
        bound = (3 / self.config.n_embd) ** 0.5  # uniform with standard deviation n_embd ** -0.5
        uniform = lambda like: mx.random.uniform(-bound, bound, like.shape).astype(like.dtype)
        self.wte = mx.random.normal(self.wte.shape).astype(self.wte.dtype)
        self.lm_head = 0.001 * mx.random.normal(self.lm_head.shape)
        for name, table in self.value_embeds.items():
            self.value_embeds[name] = uniform(table)
        for block in self.blocks:
            block.attn.qkv = uniform(block.attn.qkv)
            block.mlp.fc = uniform(block.mlp.fc)
        self.resid_lambdas = mx.ones_like(self.resid_lambdas)
        self.x0_lambdas = mx.full(self.x0_lambdas.shape, 0.1)
        mx.eval(self.parameters())

    def trunk(self, idx):
        """int32 [B, T] -> hidden states [B, T, n_embd] in the compute dtype, normalised."""
        x = x0 = norm(self.wte[idx])
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].astype(x.dtype) * x + self.x0_lambdas[i].astype(x.dtype) * x0
            ve = (self.value_embeds[f"layer{i}"], idx) if self.config.has_value_embedding(i) else None
            x = block(x, ve)
        return norm(x)

    def __call__(self, idx):
        """int32 [B, T] -> logits [B, T, vocab_size] in the compute dtype."""
        return (SOFTCAP * mx.tanh(linear(self.trunk(idx), self.lm_head).astype(mx.float32) / SOFTCAP)).astype(self.wte.dtype)

    def flops_per_token(self):
        """Floating-point operations of forward and backward per token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B):
        6 for each weight of a matrix, 12 times head_dim for each head and attended position."""
        c = self.config
        weights = sum(p.size for block in self.blocks for _, p in tree_flatten(block.parameters())) + self.lm_head.size
        return 6 * weights + 12 * c.n_embd * sum(c.window(i) for i in range(c.n_layer))


def build_model(track, platform):
    """A new model, initialised from the seed in force."""
    config = Config(track.vocab_size, track.seq_len, N_LAYER, N_EMBD, HEAD_DIM, WINDOW_PATTERN, SHORT_WINDOW)
    model = GPT(config, compute_dtype(platform))
    model.init_weights()
    return model


# ---------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------

@mx.custom_function
def cross_entropy_and_gradients(x, weight, targets):
    """(mean cross-entropy of softcapped logits, its gradients by x and weight), without ever storing all logits.

    x: [N, D] compute dtype; weight: float32 [V, D]; targets: int32 [N]. The logits of a chunk of tokens are made
    in the compute dtype, and its gradients at once (as in Liger, Hsu et al. 2024, arXiv:2410.10989). The softmax
    is divided by its sum on the narrow side of the matrix products, so that logits are read and written once.
    """
    w, dx, dw, loss = weight.astype(x.dtype), [], mx.zeros_like(weight), mx.array(0.0)
    rows = max(1, LOSS_CHUNK // len(w))
    for i in range(0, len(x), rows):
        part, target = x[i : i + rows], targets[i : i + rows, None]
        squashed = mx.tanh((part @ mx.contiguous(w.T)).astype(mx.float32) / SOFTCAP)
        z = mx.exp(SOFTCAP * squashed)  # exp(15) is far from overflow: no maximum is needed
        total, dlogits = z.sum(axis=1, keepdims=True), (z * (1 - mx.square(squashed))).astype(x.dtype)
        at_target = mx.take_along_axis(squashed, target, axis=1)
        correct = (mx.exp(SOFTCAP * at_target) - total) * (1 - mx.square(at_target))
        dlogits = mx.put_along_axis(dlogits, target, correct.astype(x.dtype), axis=1)
        loss = loss + (mx.log(total) - SOFTCAP * at_target).sum()
        share = 1 / (total * len(x))
        dx.append(((dlogits @ w) * share).astype(x.dtype))
        dw = dw + dlogits.T @ (part * share).astype(x.dtype)
    return loss / len(x), mx.concatenate(dx), dw


@cross_entropy_and_gradients.vjp
def _(primals, cotangents, outputs):
    scale, (_, dx, dw) = cotangents[0], outputs
    return dx * scale.astype(dx.dtype), dw * scale, mx.zeros_like(primals[2])


def linear_cross_entropy(x, weight, targets):
    """Mean nats. x: [B, T, D], weight: [V, D], targets: int32 [B, T]."""
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


def frobenius(x):
    return mx.sqrt(mx.square(x.astype(mx.float32)).sum(axis=(-2, -1), keepdims=True))


def orthogonalize(g, dtype):
    """The nearest (semi-)orthogonal matrices to g [n, rows, cols], in the compute dtype."""
    x = g.astype(dtype)
    x = x / (frobenius(x) * 1.02 + 1e-6).astype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ mx.contiguous(x.swapaxes(-1, -2))
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if tall else x


def muon_update(p, g, m, v, lr, momentum, decay, dtype):
    """Muon (Jordan et al. 2024) for stacked matrices [n, rows, cols]. Returns new (p, m, v).

    Nesterov momentum, Polar Express, NorMuon's variance normalisation (Li et al. 2025, arXiv:2510.05491) along
    the longer side, and cautious weight decay (Chen et al. 2025, arXiv:2510.12402): only where update and weight agree.
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


def adamw_update(p, g, m, v, lr, betas, decay, step):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), computed in float32. Returns new (p, m, v)."""
    g, (beta1, beta2) = g.astype(mx.float32), betas
    m = m + (g - m) * (1 - beta1)
    v = v + (mx.square(g) - v) * (1 - beta2)
    update = (m / (1 - beta1**step)) / (mx.sqrt(v / (1 - beta2**step)) + 1e-10)
    return (p.astype(mx.float32) * (1 - lr * decay) - lr * update).astype(p.dtype), m, v


class Optimizer:
    """Muon for the matrices of the blocks, those of one shape stacked; AdamW for everything else.

    `state` holds every array that a step replaces, for mx.compile to capture.
    """

    def __init__(self, model):
        scale = (model.config.n_embd / 768) ** -0.5  # AdamW's rates were tuned at width 768
        self.model, params = model, dict(tree_flatten(model.parameters()))
        self.adamw, shapes = {}, {}
        for name, p in params.items():
            if name.startswith("blocks."):
                shapes.setdefault(p.shape[-2:], []).append(name)
            elif name == "lm_head":
                self.adamw[name] = UNEMBEDDING_LR * scale, ADAM_BETAS, 0.0
            elif name == "resid_lambdas":
                self.adamw[name] = SCALAR_LR * 0.01, ADAM_BETAS, 0.0
            elif name == "x0_lambdas":
                self.adamw[name] = SCALAR_LR, (0.96, 0.95), 0.0
            else:
                self.adamw[name] = EMBEDDING_LR * scale, ADAM_BETAS, EMBEDDING_DECAY
        self.muon = list(shapes.values())
        self.state = {"step": mx.array(0.0)}
        for name in self.adamw:
            self.state[name] = {"m": mx.zeros(params[name].shape), "v": mx.zeros(params[name].shape)}
        for names in self.muon:
            p = self.stacked(params, names)
            v = mx.zeros_like(p.mean(axis=-1 if p.shape[-2] >= p.shape[-1] else -2, keepdims=True))
            self.state[names[0]] = {"m": mx.zeros_like(p), "v": v}
        mx.eval(self.state)

    @staticmethod
    def stacked(arrays, names):
        return mx.concatenate([arrays[n].reshape(-1, *arrays[n].shape[-2:]) for n in names])

    @staticmethod
    def schedule(progress):
        """What changes over a run, as arrays, so that a new value does not compile anew."""
        return [mx.array(value) for value in (lr_scale(progress), muon_momentum(progress), WEIGHT_DECAY * (1 - progress))]

    def step(self, grads, schedule):
        """Update the model from a tree of gradients. schedule: what `schedule(progress)` returned."""
        rate, momentum, decay = schedule
        params, grads, new = dict(tree_flatten(self.model.parameters())), dict(tree_flatten(grads)), {}
        self.state["step"] = count = self.state["step"] + 1
        for name, (lr, betas, fixed_decay) in self.adamw.items():
            s = self.state[name]
            new[name], s["m"], s["v"] = adamw_update(params[name], grads[name], s["m"], s["v"], lr * rate, betas, fixed_decay, count)
        for names in self.muon:
            s = self.state[names[0]]
            p, s["m"], s["v"] = muon_update(self.stacked(params, names), self.stacked(grads, names), s["m"], s["v"], MATRIX_LR * rate, momentum, decay,
                                              self.model.wte.dtype)
            at = 0
            for name in names:
                count_of = params[name].shape[0] if params[name].ndim == 3 else 1
                new[name] = p[at : at + count_of].reshape(params[name].shape)
                at += count_of
        self.model.update(tree_unflatten(list(new.items())))


# ---------------------------------------------------------------------------
# Schedules, as functions of the share of the time budget used
# ---------------------------------------------------------------------------

def lr_scale(progress):
    """Warmup, constant, linear warmdown."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    left = max(0.0, 1.0 - progress)
    if left >= WARMDOWN_RATIO:
        return 1.0
    return FINAL_LR_FRAC + (1.0 - FINAL_LR_FRAC) * left / WARMDOWN_RATIO


def muon_momentum(progress):
    return 0.85 + 0.10 * min(1.0, progress / MOMENTUM_RATIO)


# ---------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------

def micro_steps(seq_len):
    """Batches that make up TOTAL_BATCH_SIZE."""
    tokens = DEVICE_BATCH_SIZE * seq_len
    assert TOTAL_BATCH_SIZE % tokens == 0, f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of DEVICE_BATCH_SIZE * seq_len = {tokens}"
    return TOTAL_BATCH_SIZE // tokens


def make_train_step(model, optimizer):
    """train_step(next_batch, progress): one optimizer step on TOTAL_BATCH_SIZE tokens. Returns the mean loss, not yet computed.

    Forward, backward and update are one compiled graph; with several micro-steps the gradients are summed as
    they come, and no micro-batch's graph outlives it.
    """
    n = micro_steps(model.config.seq_len)
    loss_and_grads = nn.value_and_grad(model, lambda x, y: linear_cross_entropy(model.trunk(x), model.lm_head, y) / n)
    state = [model.state, optimizer.state]

    @partial(compiled, state=state)
    def last(x, y, sums, schedule):
        loss, grads = loss_and_grads(x, y)
        if sums:
            loss, grads = loss + sums[0], tree_map(mx.add, grads, sums[1])
        optimizer.step(grads, schedule)
        return loss

    @partial(compiled, state=[model.state])
    def accumulate(x, y, sums):
        loss, grads = loss_and_grads(x, y)
        return [loss + sums[0], tree_map(mx.add, grads, sums[1])] if sums else [loss, grads]

    def train_step(next_batch, progress):
        sums = []
        for _ in range(n - 1):
            sums = accumulate(*next_batch(DEVICE_BATCH_SIZE), sums)
            mx.async_eval(sums)
        loss = last(*next_batch(DEVICE_BATCH_SIZE), sums, optimizer.schedule(progress))
        mx.async_eval(loss, state)  # the next step is built while this one runs
        return loss

    return train_step


def warm_up(model, exp):
    """Compile everything on throwaway state: random tokens, an optimizer of its own; the weights are put back."""
    initial = tree_map(lambda p: mx.array(p), model.parameters())
    x, y = exp.dummy_batch(1)
    mx.eval(nn.value_and_grad(model, lambda: linear_cross_entropy(model.trunk(x), model.lm_head, y))())
    exp.check_memory(DEVICE_BATCH_SIZE)
    optimizer = Optimizer(model)
    train_step = make_train_step(model, optimizer)
    for _ in range(WARMUP_STEPS):
        mx.eval(train_step(exp.dummy_batch, 0.5), model.state, optimizer.state)
    model.update(initial)
    fresh = Optimizer(model)
    optimizer.state.update(fresh.state)  # in place: the compiled step captured this state
    mx.eval(model.state, optimizer.state)
    return train_step


def main():
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
    exp.finish(model, EVAL_BATCH_SIZE)


if __name__ == "__main__":
    main()
