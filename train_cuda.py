"""
The PyTorch trainer: an NVIDIA GPU, or the CPU. Single device, single file; its twin is train_mlx.py.

    python train_cuda.py              # by itself
    autoresearch run -m "what I did"  # as an experiment

An experiment may change anything in this file: the model, the optimizer, the constants, the loop. What it
may not change is what it runs inside: prepare.py and backends/. It must define build_model(track, platform),
which returns a model with model(x) -> logits [B, T, vocab_size], and main().
"""

import gc
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import train_cuda_kernels as kernels
from backends.cuda import Experiment, Platform, compute_dtype, current_platform
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
LOSS_CHUNK_GPU = 2**28  # and on a GPU

# ---------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------


def compiled(function: Callable) -> Callable:
    """Return torch.compile of a function, where it can work: on the CPU it needs a C++ compiler."""
    if not COMPILE or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return function
    if not (torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")):
        return function
    return torch.compile(function, dynamic=False)


# ---------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------


def attention_kernel(config: "Config", layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the fastest causal attention for a layer on the default device, as f(q, k, v).

    q, k, v: [B, seq_len, n_head, head_dim]; f returns the same shape. A position attends to the last
    config.window(layer) positions, its own included. On a GPU that is FlashAttention (Hopper and newer), else
    FlexAttention for windows and PyTorch's own for whole rows; on the CPU plain matrix products in blocks. It
    is chosen when the model is built, so that the compiler sees one path.
    """
    window = config.window(layer)
    device = torch.get_default_device()
    if device.type == "cpu":
        return partial(block_attention, window=window)
    if config.dtype != torch.float32:
        flash = kernels.flash_attention()
        if flash:
            return partial(flash, window=window)
    if window == config.seq_len:
        return sdpa_attention
    if config.seq_len % 128 == 0:
        return flex_attention(window, config.seq_len, device)
    return partial(block_attention, window=window)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return PyTorch's scaled_dot_product_attention over the whole row. q, k, v: [B, T, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def block_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Return attention computed for a block of queries at a time, against the blocks of keys that it can see.

    q, k, v: [B, T, H, D]. On the CPU this is over twice as fast, forward and backward, as
    scaled_dot_product_attention. Positions are relative to the first key: blocks of one shape are one kernel.
    """
    block = 128  # queries
    B, T, H, D = q.shape
    q, k, v = (t.transpose(1, 2).reshape(B * H, T, D) for t in (q, k, v))
    out = []
    for start in range(0, T, block):
        end = min(start + block, T)
        first = max(0, start - window + 1) // block * block
        query = torch.arange(start - first, end - first, device=q.device)[:, None]
        key = torch.arange(end - first, device=q.device)[None, :]
        seen = (key <= query) & (key > query - window)
        scores = (q[:, start:end] @ k[:, first:end].mT).float() * D**-0.5
        weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1).to(q.dtype)
        out.append(weights @ v[:, first:end])
    return torch.cat(out, dim=1).view(B, H, T, D).transpose(1, 2)


def flex_attention(
    window: int, seq_len: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return FlexAttention as f(q, k, v), [B, seq_len, H, D] each. It skips the blocks outside the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    mask = create_block_mask(seen, None, None, seq_len, seq_len, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask).transpose(1, 2)

    return attend


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
    dtype: torch.dtype  # of activations and embeddings; the other weights are float32

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


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., in] times weight [out, in] transposed, in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al. 2021, arXiv:2104.09864), the halves of head_dim as the pair.

    x: [B, T, H, D]; rotary: float32 [T, D], the cosine and sine of each pair's angle in turn.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = rotary.view(x.shape[1], 1, -1, 2).unbind(-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).to(x.dtype)


HASH_MULTIPLIERS = (0x7FEB352D, 0x5BD1E995, 0x2C1B3C6D)  # odd


def hash_ngrams(idx: Tensor, n: int, bos: int, rows: int) -> Tensor:
    """Return the row of a table of n-grams for each token and the n - 1 before it. idx: int64 [B, T].

    rows: a power of two, 0 without a table. Multiply-shift modulo 2^32 (Thorup 2015, arXiv:1504.06804). The
    tables are from public searches on this problem, autoresearch issues 243 and 244.
    """
    token, hashed = idx, idx * HASH_MULTIPLIERS[0]
    for multiplier in HASH_MULTIPLIERS[1:n]:
        token = F.pad(token[:, :-1], (1, 0), value=bos)
        token = torch.where(idx == bos, bos, token)  # no n-gram crosses the border of two documents
        hashed = hashed + token * multiplier
    bits = rows.bit_length() - 1
    return (hashed & 0xFFFFFFFF) >> 32 - bits


class Attention(nn.Module):
    GATE_CHANNELS = 32  # of the input, that decide how much value embedding a head takes

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        D = config.n_embd
        self.n_head = config.n_head
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        self.attend = attention_kernel(config, layer)
        self.qkv = nn.Parameter(torch.empty(3, D, D))
        self.proj = nn.Parameter(torch.empty(D, D))
        self.gate: Any = None
        if config.value_rows(layer):
            self.gate = nn.Parameter(torch.empty(self.n_head, min(self.GATE_CHANNELS, D)))

    def forward(self, x: Tensor, ve: tuple[Tensor, Tensor] | None, rotary: Tensor) -> Tensor:
        """Return [B, T, D]. x: [B, T, D]; ve: a table [rows, D] of value embeddings and its rows [B, T]."""
        B, T, D = x.shape
        qkv = linear(x, self.qkv.flatten(0, 1)).view(B, T, 3, self.n_head, self.head_dim)
        q, k, v = qkv.unbind(2)
        if ve is not None:
            # Gated per head (after ResFormer, Zhou et al. 2024, arXiv:2410.17897).
            table, idx = ve
            gate = 2 * torch.sigmoid(linear(x[..., : self.gate.shape[1]], self.gate))
            v = v + gate.unsqueeze(-1) * F.embedding(idx, table).view(v.shape)
        q = norm(rotate(q, rotary))
        k = norm(rotate(k, rotary))
        return linear(self.attend(q, k, v).reshape(B, T, D), self.proj)


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Parameter(torch.empty(4 * config.n_embd, config.n_embd))
        self.proj = nn.Parameter(torch.empty(config.n_embd, 4 * config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(linear(x, self.fc)).square()  # ReLU squared: So et al. 2021, arXiv:2109.08668
        return linear(hidden, self.proj)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ve: tuple[Tensor, Tensor] | None, rotary: Tensor) -> Tensor:
        x = x + self.attn(norm(x), ve, rotary)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The language model, on the default device. `init_weights` fills the weights."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        V = config.vocab_size
        D = config.n_embd
        L = config.n_layer
        self.config = config
        self.wte = nn.Parameter(torch.empty(V, D, dtype=config.dtype))
        tables = {f"layer{i}": torch.empty(config.value_rows(i), D, dtype=config.dtype) for i in range(L)}
        self.value_embeds = nn.ParameterDict({name: table for name, table in tables.items() if len(table)})
        self.blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.lm_head = nn.Parameter(torch.empty(V, D))
        self.resid_lambdas = nn.Parameter(torch.empty(L))
        self.x0_lambdas = nn.Parameter(torch.empty(L))
        frequency = ROPE_BASE ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle = torch.arange(config.seq_len)[:, None] * frequency
        rotary = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)  # [seq_len, head_dim]
        self.register_buffer("rotary", rotary, persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw new weights from the framework's generator."""
        bound = INIT_SCALE * (3 / self.config.n_embd) ** 0.5  # standard deviation INIT_SCALE * n_embd ** -0.5
        self.wte.normal_()
        self.lm_head.normal_(std=0.001)
        for table in self.value_embeds.values():
            table.uniform_(-bound, bound)
        for block in self.blocks:
            block.attn.qkv.uniform_(-bound, bound)
            block.mlp.fc.uniform_(-bound, bound)
            block.attn.proj.zero_()
            block.mlp.proj.zero_()
            if block.attn.gate is not None:
                block.attn.gate.zero_()
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(X0_START)

    def trunk(self, idx: Tensor) -> Tensor:
        """Return the hidden states [B, T, n_embd] in the compute dtype, normalised. idx: int64 [B, T]."""
        rotary = self.rotary[: idx.shape[1]]
        x = x0 = norm(F.embedding(idx, self.wte))
        c = self.config
        bigrams, trigrams = (hash_ngrams(idx, n, c.bos, c.bigram_rows) for n in (2, 3))
        rows = {"T": idx, "B": bigrams, "G": trigrams}
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            ve = (self.value_embeds[f"layer{i}"], rows[c.value_kind(i)]) if c.value_rows(i) else None
            x = block(x, ve, rotary)
        return norm(x)

    def forward(self, idx: Tensor) -> Tensor:
        """Return logits [B, T, vocab_size] in the compute dtype. idx: int64 [B, T]."""
        logits = linear(self.trunk(idx), self.lm_head).float()
        return (SOFTCAP * torch.tanh(logits / SOFTCAP)).to(self.config.dtype)

    def flops_per_token(self) -> int:
        """Return the floating-point operations of forward and backward per token.

        6 for each weight of a matrix, 12 times head_dim for each head and attended position (Chowdhery et al.
        2022, arXiv:2204.02311, appendix B).
        """
        c = self.config
        weights = sum(p.numel() for p in self.blocks.parameters()) + self.lm_head.numel()
        return 6 * weights + 12 * c.n_embd * sum(c.window(i) for i in range(c.n_layer))


def build_model(track: Prepared, platform: Platform) -> GPT:
    """Return a new model on the platform's device, initialised from the seed in force."""
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
    with torch.device("cuda" if platform.device_kind == "gpu" else "cpu"):
        model = GPT(config)
    model.init_weights()
    kernels.fuse_blocks(model.blocks, model.wte, model.rotary)
    return model


# ---------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softcapped logits, without ever storing them all.

    The logits of a chunk of tokens are made in the compute dtype, and its gradients at once, in the forward
    pass: the backward pass only scales them (as in Liger, Hsu et al. 2024, arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the mean in nats. x: [N, D] compute dtype; weight: float32 [V, D]; targets: int64 [N]."""
        w = weight.to(x.dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight)
        loss = torch.zeros((), device=x.device)
        chunk_loss = kernels.fuse_loss(loss_chunk, w, SOFTCAP)
        rows = max(1, (LOSS_CHUNK_GPU if x.is_cuda else LOSS_CHUNK_CPU) // len(w))
        for i in range(0, len(x), rows):
            chunk = slice(i, i + rows)
            loss += chunk_loss(x[chunk], w, targets[chunk], len(x), dx[chunk], dw)
        ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dw = ctx.saved_tensors
        return scaled(dx, scale), scaled(dw, scale), None


def loss_chunk(x: Tensor, w: Tensor, targets: Tensor, count: int, dx: Tensor, dw: Tensor) -> Tensor:
    """Return the sum of the losses of a chunk of tokens in nats, and compute its share of the gradients.

    x: [n, D] and w: [V, D] in the compute dtype; targets: int64 [n]; count: tokens of all chunks, by which
    the gradients are divided. The gradient by x is written to dx [n, D], that by w is added to dw, float32
    [V, D]. The softmax is divided by its sum on the narrow side of the matrix products, so that logits are
    read and written once.
    """
    each = torch.arange(len(x), device=x.device)
    logits = x @ w.T
    dlogits, total = softcap_exp(logits)
    chosen = logits[each, targets].float()  # rounded as it is in total
    nats, at_target, share, shared = target_terms(x, chosen, total, count)
    dlogits[each, targets] = at_target
    torch.mul(dlogits @ w, share[:, None], out=dx)
    dw += dlogits.T @ shared
    return nats


@compiled
def softcap_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivative of z = exp(softcapped logits) by the logits, in their dtype, and the sums of z.

    logits: [n, V]; the sums are float32 [n].
    """
    # This is tanh, by the exponential, which vectorises better.
    squashed = 1 - 2 / (torch.exp(logits.float() * (2 / SOFTCAP)) + 1)
    z = torch.exp(SOFTCAP * squashed)  # exp(15) is far from overflow: no maximum is needed
    return (z * (1 - squashed.square())).to(logits.dtype), z.sum(dim=1)


@compiled
def target_terms(
    x: Tensor, logits: Tensor, total: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the targets add to the loss and to its gradients.

    x: [n, D]; logits: float32 [n], of the targets; total: float32 [n], the sums of z. Returns the sum of the
    losses, the derivatives by the targets' logits [n], share = 1 / (total * count) [n] and x * share [n, D].
    """
    squashed = torch.tanh(logits / SOFTCAP)
    at_target = (torch.exp(SOFTCAP * squashed) - total) * (1 - squashed.square())
    share = 1 / (total * count)
    nats = (total.log() - SOFTCAP * squashed).sum()
    return nats, at_target.to(x.dtype), share, (x * share[:, None]).to(x.dtype)


@compiled
def scaled(t: Tensor, scale: Tensor) -> Tensor:
    return (t * scale).to(t.dtype)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats. x: [B, T, D]; weight: [V, D]; targets: int64 [B, T]."""
    return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten())


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


def orthogonalize(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest (semi-)orthogonal matrices to g [n, rows, cols], in the compute dtype."""
    x = g.to(dtype)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@compiled
def muon_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Update stacked matrices [n, rows, cols] by Muon (Jordan et al. 2024): m and v in place, returns new p.

    Nesterov momentum, Polar Express, NorMuon's variance normalisation (Li et al. 2025, arXiv:2510.05491)
    along the longer side, and cautious weight decay (Chen et al. 2025, arXiv:2510.12402): only where update
    and weight agree.
    """
    m.lerp_(g, 1 - momentum)
    u = orthogonalize(g.lerp(m, momentum), dtype).float()
    longer = -1 if u.shape[-2] >= u.shape[-1] else -2
    variance = u.square().mean(dim=longer, keepdim=True)
    v.lerp_(variance, 1 - MUON_BETA2)
    scaled = u * (v + 1e-10).rsqrt()
    u = scaled * (u.norm(dim=(-2, -1), keepdim=True) / (scaled.norm(dim=(-2, -1), keepdim=True) + 1e-10))
    lr = lr * max(1.0, u.shape[-2] / u.shape[-1]) ** 0.5
    return p - lr * u - lr * decay * p * (u * p >= 0)


class AdamW(NamedTuple):
    """How AdamW updates a tensor."""

    lr: float
    betas: tuple[float, float] = ADAM_BETAS
    decay: float = 0.0


@compiled
def adamw_update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, how: AdamW, rate: Tensor, step: Tensor) -> None:
    """Update p, m and v in place by AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), in float32."""
    beta1, beta2 = how.betas
    lr = how.lr * rate
    g = g.float()
    m.lerp_(g, 1 - beta1)
    v.lerp_(g.square(), 1 - beta2)
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-10)
    p.copy_(p.float() * (1 - lr * how.decay) - lr * update)


class Optimizer:
    """Muon for the matrices of the blocks, those of one shape stacked; AdamW for everything else.

    adamw: {name of a tensor: its AdamW}. muon: for each stack the names of its matrices. state: the number of
    steps, and the moments m and v of each tensor and stack; a stack's are under its first name.
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
        self.params = dict(model.named_parameters())
        self.adamw: dict[str, AdamW] = {}
        stacks: dict[Any, list[str]] = {}
        for name, p in self.params.items():
            if name.startswith("blocks."):
                stacks.setdefault(p.shape[-2:], []).append(name)
            else:
                self.adamw[name] = others.get(name, value)
        self.muon = list(stacks.values())
        self.state: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        self.state["step"] = torch.zeros(())
        for name in self.adamw:
            zeros = torch.zeros_like(self.params[name], dtype=torch.float32)
            self.state[name] = {"m": zeros, "v": zeros.clone()}
        for names in self.muon:
            stack = self.stacked([self.params[name].detach() for name in names])
            longer = -1 if stack.shape[-2] >= stack.shape[-1] else -2
            v = torch.zeros_like(stack.mean(dim=longer, keepdim=True))
            self.state[names[0]] = {"m": torch.zeros_like(stack), "v": v}

    @staticmethod
    def stacked(matrices: list[Tensor]) -> Tensor:
        """Return [n, rows, cols] from matrices [rows, cols] and stacks of them."""
        return torch.cat([t.reshape(-1, *t.shape[-2:]) for t in matrices])

    @staticmethod
    def schedule(progress: float) -> list[Tensor]:
        """Return learning rate, momentum and decay as arrays: a new value does not compile anew."""
        values = lr_scale(progress), muon_momentum(progress), WEIGHT_DECAY * (1 - progress)
        return [torch.tensor(value) for value in values]

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], schedule: list[Tensor]) -> None:
        """Update the model. grads: {name: gradient}; schedule: what `schedule(progress)` returned."""
        rate, momentum, decay = schedule
        count = self.state["step"]
        count += 1
        for name, how in self.adamw.items():
            s = self.state[name]
            adamw_update(self.params[name], grads[name], s["m"], s["v"], how, rate, count)
        for names in self.muon:
            s = self.state[names[0]]
            params = [self.params[name] for name in names]
            p = self.stacked(params)
            g = self.stacked([grads[name] for name in names])
            dtype = self.model.config.dtype
            p = muon_update(p, g, s["m"], s["v"], MATRIX_LR * rate, momentum, decay, dtype)
            parts = p.split([t.shape[0] if t.ndim == 3 else 1 for t in params])
            new = [part.view(t.shape) for part, t in zip(parts, params, strict=True)]
            torch._foreach_copy_(params, new)


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

NextBatch = Callable[[int], tuple[Tensor, Tensor]]  # rows -> (x, y), [rows, T] each
TrainStep = Callable[[NextBatch, float], Tensor]  # (next_batch, progress) -> mean loss


def micro_steps(seq_len: int) -> int:
    """Return how many batches make up TOTAL_BATCH_SIZE."""
    tokens = DEVICE_BATCH_SIZE * seq_len
    assert TOTAL_BATCH_SIZE % tokens == 0, (
        f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of DEVICE_BATCH_SIZE * seq_len = {tokens}"
    )
    return TOTAL_BATCH_SIZE // tokens


def make_train_step(model: GPT, optimizer: Optimizer) -> TrainStep:
    """Return train_step(next_batch, progress), which makes one optimizer step on TOTAL_BATCH_SIZE tokens.

    It returns the mean loss, on the device.
    """
    n = micro_steps(model.config.seq_len)
    trunk = compiled(model.trunk)

    def train_step(next_batch: NextBatch, progress: float) -> Tensor:
        total = 0.0
        for _ in range(n):
            x, y = next_batch(DEVICE_BATCH_SIZE)
            loss = linear_cross_entropy(trunk(x), model.lm_head, y) / n
            loss.backward()
            total = total + loss.detach()
        grads = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step(grads, optimizer.schedule(progress))
        model.zero_grad()
        return total

    return train_step


def warm_up(model: GPT, exp: Experiment) -> TrainStep:
    """Compile everything on random tokens. Returns train_step; weights and optimizer are as before."""
    initial = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = Optimizer(model)
    train_step = make_train_step(model, optimizer)
    for _ in range(WARMUP_STEPS):
        train_step(exp.dummy_batch, 0.5)
    model.load_state_dict(initial)
    optimizer.reset()
    return train_step


def main() -> None:
    """Run one experiment."""
    exp = Experiment()
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    if COMPILE and exp.platform.device_kind == "gpu":
        kernels.start_compilers(HEAD_DIM, SOFTCAP)
    model = build_model(exp.track, exp.platform)
    train_step = warm_up(model, exp)
    kernels.stop_compilers()

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
