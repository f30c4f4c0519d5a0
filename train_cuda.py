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
import shutil
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from backends import kernels
from backends.cuda import Experiment, compute_dtype, current_platform

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
LOSS_CHUNK = 2**22       # logits held at a time by the loss (see linear_cross_entropy); GPUs take 64 times as many

# ---------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------

def compiled(function):
    """torch.compile, where it can work: on the CPU it needs a C++ compiler."""
    if not COMPILE or not (torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")):
        return function
    return torch.compile(function, dynamic=False)


# ---------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------

def attention_kernel(window, seq_len, device, dtype):
    """The fastest causal attention present, as f(q, k, v), over the last `window` positions, the own one included.

    q, k, v: [B, seq_len, n_head, head_dim]; f returns the same shape. On a GPU that is FlashAttention (Hopper
    and newer), else FlexAttention for windows and PyTorch's own for whole rows; on the CPU plain matrix
    products in blocks. It is chosen when the model is built, so that the compiler sees one path.
    """
    window = min(window, seq_len)
    if device == "cpu":
        return partial(block_attention, window=window)
    if dtype != torch.float32 and torch.cuda.get_device_capability()[0] >= 9:
        kernel = kernels.flash4() or kernels.flash3()
        if kernel:
            return partial(kernel, window=window)
    if window == seq_len:
        return sdpa_attention
    if seq_len % 128 == 0:
        return flex_attention(window, seq_len, device)
    return partial(block_attention, window=window)


def sdpa_attention(q, k, v):
    """PyTorch's scaled_dot_product_attention, over the whole row."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)


def block_attention(q, k, v, window, block=128):
    """A block of queries at a time against the keys it can see, and no others.

    On the CPU this is over twice as fast, forward and backward, as scaled_dot_product_attention.
    """
    B, T, H, D = q.shape
    q, k, v = (t.transpose(1, 2).reshape(B * H, T, D) for t in (q, k, v))
    out = []
    for start in range(0, T, block):
        end = min(start + block, T)
        first = max(0, start - window + 1)
        query, key = torch.arange(start, end, device=q.device)[:, None], torch.arange(first, end, device=q.device)[None, :]
        seen = (key <= query) & (key > query - window)
        scores = (q[:, start:end] @ k[:, first:end].mT).float() * D**-0.5
        weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1).to(q.dtype)
        out.append(weights @ v[:, first:end])
    return torch.cat(out, dim=1).view(B, H, T, D).transpose(1, 2)


def flex_attention(window, seq_len, device):
    """FlexAttention, which skips the blocks outside the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - window), None, None, seq_len, seq_len, device=device)
    return lambda q, k, v: flex_attention(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=blocks).transpose(1, 2)


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
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def linear(x, weight):
    return F.linear(x, weight.to(x.dtype))


def rotate(x, rotary):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the halves of head_dim as the pair. x: [B, T, H, D]; rotary: float32 [T, D]."""
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = rotary.view(x.shape[1], 1, -1, 2).unbind(-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    GATE_CHANNELS = 32  # of the input, that decide how much value embedding a head takes

    def __init__(self, config, layer, device, dtype):
        super().__init__()
        self.n_head, self.head_dim, self.window = config.n_head, config.head_dim, config.window(layer)
        self.attend = attention_kernel(self.window, config.seq_len, device, dtype)
        D = config.n_embd
        self.qkv = nn.Parameter(torch.empty(3, D, D))
        self.proj = nn.Parameter(torch.empty(D, D))
        self.gate = nn.Parameter(torch.empty(self.n_head, min(self.GATE_CHANNELS, D))) if config.has_value_embedding(layer) else None

    def forward(self, x, ve, rotary):
        B, T, D = x.shape
        q, k, v = linear(x, self.qkv.flatten(0, 1)).view(B, T, 3, self.n_head, self.head_dim).unbind(2)
        if ve is not None:
            # Value embeddings (a table [V, D] and idx [B, T]), gated per head (after ResFormer, Zhou et al. 2024, arXiv:2410.17897).
            table, idx = ve
            gate = 2 * torch.sigmoid(linear(x[..., : self.gate.shape[1]], self.gate))
            v = v + gate.unsqueeze(-1) * F.embedding(idx, table).view(v.shape)
        q, k = norm(rotate(q, rotary)), norm(rotate(k, rotary))
        return linear(self.attend(q, k, v).reshape(B, T, D), self.proj)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Parameter(torch.empty(4 * config.n_embd, config.n_embd))
        self.proj = nn.Parameter(torch.empty(config.n_embd, 4 * config.n_embd))

    def forward(self, x):
        return linear(F.relu(linear(x, self.fc)).square(), self.proj)  # ReLU squared: So et al. 2021, arXiv:2109.08668


class Block(nn.Module):
    def __init__(self, config, layer, device, dtype):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer, device, dtype), MLP(config)
        self.fused = False  # see fuse

    def forward(self, x, ve, rotary):
        if self.fused:
            y = kernels.fused_attention(norm(x), self.attn.qkv, rotary, self.attn.window, self.attn.gate, *(ve or (None, None)))
            return kernels.fused_mlp(x, y, self.attn.proj, self.mlp.fc, self.mlp.proj)
        x = x + self.attn(norm(x), ve, rotary)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config, device, dtype):
        super().__init__()
        self.config = config
        V, D, L = config.vocab_size, config.n_embd, config.n_layer
        self.wte = nn.Parameter(torch.empty(V, D, dtype=dtype))
        self.value_embeds = nn.ParameterDict(
            {f"layer{i}": nn.Parameter(torch.empty(V, D, dtype=dtype)) for i in range(L) if config.has_value_embedding(i)})
        self.blocks = nn.ModuleList(Block(config, i, device, dtype) for i in range(L))
        self.lm_head = nn.Parameter(torch.empty(V, D))
        self.resid_lambdas = nn.Parameter(torch.empty(L))
        self.x0_lambdas = nn.Parameter(torch.empty(L))
        angle = torch.arange(config.seq_len)[:, None] * ROPE_BASE ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        self.register_buffer("rotary", torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1), persistent=False)  # [seq_len, head_dim]

    @torch.no_grad()
    def init_weights(self):
        bound = (3 / self.config.n_embd) ** 0.5  # uniform with standard deviation n_embd ** -0.5
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
        self.x0_lambdas.fill_(0.1)

    def trunk(self, idx):
        """int64 [B, T] -> hidden states [B, T, n_embd] in the compute dtype, normalised."""
        B, T = idx.shape
        rotary = self.rotary[:T].half().repeat(B, 1) if self.blocks[0].fused else self.rotary[:T]  # fused: once for every row
        x = x0 = norm(F.embedding(idx, self.wte))
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            ve = (self.value_embeds[f"layer{i}"], idx) if self.config.has_value_embedding(i) else None
            x = block(x, ve, rotary)
        return norm(x)

    def forward(self, idx):
        """int64 [B, T] -> logits [B, T, vocab_size] in the compute dtype."""
        return (SOFTCAP * torch.tanh(linear(self.trunk(idx), self.lm_head).float() / SOFTCAP)).to(self.wte.dtype)

    def flops_per_token(self):
        """Floating-point operations of forward and backward per token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B):
        6 for each weight of a matrix, 12 times head_dim for each head and attended position."""
        c = self.config
        weights = sum(p.numel() for p in self.blocks.parameters()) + self.lm_head.numel()
        return 6 * weights + 12 * c.n_embd * sum(c.window(i) for i in range(c.n_layer))


def build_model(track, platform):
    """A new model on the platform's device, initialised from the seed in force."""
    config = Config(track.vocab_size, track.seq_len, N_LAYER, N_EMBD, HEAD_DIM, WINDOW_PATTERN, SHORT_WINDOW)
    device = "cuda" if platform.backend == "cuda" else "cpu"
    with torch.device(device):
        model = GPT(config, device, compute_dtype(platform))
    model.init_weights()
    fuse(model)
    return model


@torch.no_grad()
def fuse(model):
    """Run the blocks in the kernels of backends/kernels.py, if those compute what Block computes: after a change to it they may not."""
    c, device, dtype = model.config, model.wte.device, model.wte.dtype
    if not (kernels.available(device, dtype) and kernels.fit(c.n_embd, c.head_dim, c.seq_len)):
        return
    random, agree = torch.Generator(device).manual_seed(0), True
    x, table = (torch.randn(1, c.seq_len, c.n_embd, device=device, generator=random).to(dtype) for _ in range(2))
    ve = table[0], torch.randint(c.seq_len, (1, c.seq_len), device=device, generator=random)

    def added(block, i, fused):
        block.fused = fused
        return block(x, ve if c.has_value_embedding(i) else None, model.rotary.half() if fused else model.rotary) - x

    for i, block in enumerate(model.blocks):
        kept = [p.clone() for p in block.parameters()]
        for p in block.parameters():
            p.copy_(0.05 * torch.randn(p.shape, device=device, generator=random))
        agree = agree and kernels.agree("Block", partial(added, block, i, True), partial(added, block, i, False))
        for p, value in zip(block.parameters(), kept):
            p.copy_(value)
    for block in model.blocks:
        block.fused = agree


# ---------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------

class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softcapped logits, without ever storing them all.

    The logits of a chunk of tokens are made in the compute dtype, and its gradients at once, in the forward
    pass: the backward pass only scales them (as in Liger, Hsu et al. 2024, arXiv:2410.10989). The softmax is
    divided by its sum on the narrow side of the matrix products, so that logits are read and written once.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        # x: [N, D] compute dtype; weight: float32 [V, D]; targets: int64 [N]
        w, dx, dw = weight.to(x.dtype), torch.empty_like(x), torch.zeros_like(weight)
        fused = len(w) % 128 == 0 and fused_softcap_exp(x.device, x.dtype)
        rows = max(1, LOSS_CHUNK * (64 if x.is_cuda else 1) // len(w))
        loss = torch.zeros((), device=x.device)
        for i in range(0, len(x), rows):
            part, target = x[i : i + rows], targets[i : i + rows]
            each = torch.arange(len(part), device=x.device)
            if fused:
                (dlogits, total), chosen = kernels.product("softcap_exp", part, w, softcap=SOFTCAP), row_dots(part, w, target)
            else:  # the logits are rounded: the target's has to be the one that is in the sum
                logits = part @ w.T
                (dlogits, total), chosen = softcap_exp(logits), logits[each, target].float()
            nats, at_target, share, shared = target_terms(part, chosen, total, len(x))
            dlogits[each, target] = at_target
            loss += nats
            if fused:
                kernels.product("scale", dlogits, w.T, scale=share, out=dx[i : i + rows])
                kernels.product("accumulate", dlogits.T, shared.T, dw, out=dw)
            else:
                torch.mul(dlogits @ w, share[:, None], out=dx[i : i + rows])
                dw += dlogits.T @ shared
        ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        return times(dx, scale), times(dw, scale), None


@compiled
def softcap_exp(logits):
    """(Derivative of z = exp(softcapped logits) by the logits, in their dtype; sum of z float32 [N]). logits: [N, V]."""
    squashed = 1 - 2 / (torch.exp(logits.float() * (2 / SOFTCAP)) + 1)  # tanh, by the exponential that vectorises better
    z = torch.exp(SOFTCAP * squashed)  # exp(15) is far from overflow: no maximum is needed
    return (z * (1 - squashed.square())).to(logits.dtype), z.sum(dim=1)


@cache
def fused_softcap_exp(device, dtype):
    """Whether there is a kernel that computes softcap_exp with the product before it: after a change to it there may not be."""
    if not kernels.available(device, dtype):
        return False
    x, w = (torch.randn(128, 128, device=device, generator=torch.Generator(device).manual_seed(i)).to(dtype) for i in range(2))
    return kernels.agree("softcap_exp", lambda: kernels.product("softcap_exp", x, w, softcap=SOFTCAP)[0], lambda: softcap_exp(x @ w.T)[0])


@compiled
def target_terms(x, logits, total, count):
    """What the targets' logits [N] add to the sums of z [N]: (sum of the losses, d logits there, share = 1 / (total * count), x * share)."""
    squashed = torch.tanh(logits / SOFTCAP)
    at_target = (torch.exp(SOFTCAP * squashed) - total) * (1 - squashed.square())
    share = 1 / (total * count)
    return (total.log() - SOFTCAP * squashed).sum(), at_target.to(x.dtype), share, (x * share[:, None]).to(x.dtype)


@compiled
def row_dots(x, w, rows):
    """Each x [N, D] times its row of w [V, D], float32 [N]."""
    return (x.float() * w[rows].float()).sum(dim=1)


@compiled
def times(t, scale):
    return (t * scale).to(t.dtype)


def linear_cross_entropy(x, weight, targets):
    """Mean nats. x: [B, T, D], weight: [V, D], targets: int64 [B, T]."""
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


def orthogonalize(g, dtype):
    """The nearest (semi-)orthogonal matrices to g [n, rows, cols], in the compute dtype."""
    x = g.to(dtype)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


@compiled
def muon_update(p, g, m, v, lr, momentum, decay, dtype):
    """Muon (Jordan et al. 2024) for stacked matrices [n, rows, cols]; m and v are updated in place, new p is returned.

    Nesterov momentum, Polar Express, NorMuon's variance normalisation (Li et al. 2025, arXiv:2510.05491) along
    the longer side, and cautious weight decay (Chen et al. 2025, arXiv:2510.12402): only where update and weight agree.
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


@compiled
def adamw_update(p, g, m, v, lr, beta1, beta2, decay, step):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), computed in float32 and in place."""
    g = g.float()
    m.lerp_(g, 1 - beta1)
    v.lerp_(g.square(), 1 - beta2)
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-10)
    p.copy_(p.float() * (1 - lr * decay) - lr * update)


class Optimizer:
    """Muon for the matrices of the blocks, those of one shape stacked; AdamW for everything else."""

    def __init__(self, model):
        scale = (model.config.n_embd / 768) ** -0.5  # AdamW's rates were tuned at width 768
        self.adamw = [
            self.adamw_group(model.wte, EMBEDDING_LR * scale, decay=EMBEDDING_DECAY),
            *(self.adamw_group(table, EMBEDDING_LR * scale, decay=EMBEDDING_DECAY) for table in model.value_embeds.values()),
            self.adamw_group(model.lm_head, UNEMBEDDING_LR * scale),
            self.adamw_group(model.resid_lambdas, SCALAR_LR * 0.01),
            self.adamw_group(model.x0_lambdas, SCALAR_LR, betas=(0.96, 0.95)),
        ]
        shapes = {}
        for p in model.blocks.parameters():
            shapes.setdefault(p.shape[-2:], []).append(p)
        self.muon, self.dtype = [self.muon_group(params) for params in shapes.values()], model.wte.dtype
        self.step_count = 0

    def adamw_group(self, p, lr, betas=ADAM_BETAS, decay=0.0):
        m, v = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
        return dict(p=p, lr=lr, betas=betas, decay=decay, m=m, v=v)

    def muon_group(self, params):
        p = self.stacked(params)
        v = torch.zeros_like(p.mean(dim=-1 if p.shape[-2] >= p.shape[-1] else -2, keepdim=True))
        return dict(params=params, m=torch.zeros_like(p), v=v)

    @staticmethod
    def stacked(tensors):
        return torch.cat([t.reshape(-1, *t.shape[-2:]) for t in tensors])

    @torch.no_grad()
    def step(self, progress):
        """Update from the gradients, which are then dropped. progress: share of the time budget used."""
        self.step_count += 1
        rate = lr_scale(progress)
        number = torch.tensor  # 0-dimensional, so that a new value does not compile anew
        for g in self.adamw:
            adamw_update(g["p"], g["p"].grad, g["m"], g["v"], number(g["lr"] * rate), number(g["betas"][0]), number(g["betas"][1]),
                         number(g["decay"]), number(float(self.step_count)))
            g["p"].grad = None
        for g in self.muon:
            new = muon_update(self.stacked(g["params"]), self.stacked([p.grad for p in g["params"]]), g["m"], g["v"],
                              number(MATRIX_LR * rate), number(muon_momentum(progress)), number(WEIGHT_DECAY * (1 - progress)), self.dtype)
            counts = [p.shape[0] if p.ndim == 3 else 1 for p in g["params"]]
            torch._foreach_copy_(g["params"], [n.view(p.shape) for n, p in zip(new.split(counts), g["params"])])
            for p in g["params"]:
                p.grad = None


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


def train_step(model, trunk, optimizer, next_batch, progress):
    """One optimizer step on TOTAL_BATCH_SIZE tokens. Returns the mean loss, on the device."""
    n, total = micro_steps(model.config.seq_len), 0.0
    for _ in range(n):
        x, y = next_batch(DEVICE_BATCH_SIZE)
        loss = linear_cross_entropy(trunk(x), model.lm_head, y) / n
        loss.backward()
        total = total + loss.detach()
    optimizer.step(progress)
    return total


def warm_up(model, trunk, dummy_batch):
    """Compile everything on throwaway state: random tokens, an optimizer of its own; the weights are put back."""
    initial = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = Optimizer(model)
    for _ in range(WARMUP_STEPS):
        train_step(model, trunk, optimizer, dummy_batch, 0.5)
    model.load_state_dict(initial)


def main():
    exp = Experiment()
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    model = build_model(exp.track, exp.platform)
    trunk, model.forward = compiled(model.trunk), compiled(model.forward)  # to train with, to score with
    warm_up(model, trunk, exp.dummy_batch)
    optimizer = Optimizer(model)

    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the loop costs up to half a second

    exp.start(model, depth=N_LAYER, flops_per_token=model.flops_per_token())
    step = 0
    while exp.progress < 1.0:
        loss = train_step(model, trunk, optimizer, exp.batch, exp.progress)
        exp.log(step, loss)
        step += 1
    exp.finish(model, EVAL_BATCH_SIZE)


if __name__ == "__main__":
    main()
