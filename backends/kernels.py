"""
Kernels for recent NVIDIA GPUs that PyTorch does not have, each beside what it replaces in train_cuda.py.

flash3 and flash4 are attention (Hopper and newer). fused_attention and fused_mlp are the two halves of a block, for
bfloat16 on Hopper, made of matrix products that finish their result before they store it: between two products
nothing passes through memory that the backward pass does not need, but for the gated value embedding. They compute
what Block in train_cuda.py computes; a trainer whose Block was changed runs without them (see fuse there).
flash-attn-4 brings what they need: quack-kernels and the CuTe DSL. Without it available() is false.
"""

import os
import sys
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on macOS or Windows
    triton = None


def available(device, dtype):
    """Whether product, fused_attention and fused_mlp run on the device, in the dtype."""
    return device.type == "cuda" and dtype == torch.bfloat16 and triton is not None and epilogues() is not None and flash4() is not None


def fit(n_embd, head_dim, seq_len):
    """Whether fused_attention and fused_mlp compute a model of this size."""
    return head_dim in (64, 128) and n_embd % 128 == 0 and seq_len % 128 == 0


def agree(name, fused, plain):
    """Whether fused(), made of these kernels, gives what plain() gives but for rounding; says so on stderr if not."""
    try:
        expected = plain().float()
        difference = float((fused().float() - expected).norm() / expected.norm())
        if difference < 0.03:  # rounding to bfloat16 makes 0.006 in a block
            return True
        what = f"{difference}"
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # the trainer may have changed shapes and names as it likes
        what = f"{type(e).__name__}: {str(e).strip()}".splitlines()[0]
    print(f"{name} is not what the fused kernels compute ({what}): it runs without them", file=sys.stderr, flush=True)
    return False


# ---------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------

@cache
def flash3():
    """FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) through the kernels package; Hopper only."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from kernels import get_kernel

        fa3 = get_kernel("varunneal/flash-attention-3").flash_attn_interface
    except Exception:  # not installed, or no network and not in the hub's cache: the next kernel is used
        return None
    return lambda q, k, v, window: fa3.flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))


@cache
def flash4():
    """FlashAttention-4 (the CuTe DSL kernels of flash-attn-4), as opaque operations to torch.compile: f(q, k, v, window), f.forward and f.backward."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # on disk: compiled once, not every five minutes
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, flash_attn_func
    except ImportError:
        return None

    def edges(window, T):
        return (None, None) if window >= T else (window - 1, 0)

    @torch.library.custom_op("autoresearch::flash4", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        return flash_attn_func(q, k, v, causal=True, window_size=edges(window, q.shape[1]), return_lse=True)[:2]

    @torch.library.custom_op("autoresearch::flash4_backward", mutates_args=())
    def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, window: int) -> Tensor:
        (B, T, H, D), (left, right) = q.shape, edges(window, q.shape[1])
        dqkv = q.new_empty(B, T, 3, H, D)
        dq, dk, dv = dqkv.unbind(2)
        _flash_attn_bwd(q, k, v, out, dout.contiguous(), lse, causal=True, window_size_left=left, window_size_right=right, dq=dq, dk=dk, dv=dv)
        return dqkv

    @forward.register_fake
    def _(q, k, v, window):
        return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)

    @backward.register_fake
    def _(q, k, v, out, lse, dout, window):
        B, T, H, D = q.shape
        return q.new_empty(B, T, 3, H, D)

    def keep(ctx, inputs, output):
        *tensors, ctx.window = inputs
        ctx.save_for_backward(*tensors, *output)

    def attend(q, k, v, window):
        return forward(q, k, v, window)[0]

    forward.register_autograd(lambda ctx, dout, dlse: (*backward(*ctx.saved_tensors, dout, ctx.window).unbind(2), None), setup_context=keep)
    attend.forward, attend.backward = forward, backward
    return attend


# ---------------------------------------------------------------------------
# Matrix products with an epilogue
# ---------------------------------------------------------------------------

TILES = {  # of a product: rows, columns, pingpong, cluster of rows, of columns, loads of c and x under way; the fastest of those tried on an H100
    "add": (192, 128, True, 1, 2, 4),
    "add_value": (128, 128, True, 1, 2, 8),
    "accumulate": (128, 128, True, 1, 2, 4),
    "add_squares": (128, 128, True, 1, 2, 4),
    "relu_squared": (192, 128, True, 1, 2, 4),
    "relu_squared_backward": (192, 128, True, 1, 2, 12),
    "add_norm_backward": (192, 128, True, 1, 2, 4),
    "norm_rotary": (192, 128, True, 1, 2, 8),
    "scale": (128, 256, False, 1, 2, 4),
    "softcap_exp": (128, 128, True, 1, 2, 4),
}


@cache
def epilogues(softcap=0.0):
    """Matrix products that finish their result before they store it, by name, or None: Hopper, with quack-kernels.

    Each is a function of an element of the product and of the operands at its place: c and x [M, N], scale [M].
    "sum" is summed over the columns. quack-kernels comes with flash-attn-4.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from cutlass.cute import math as element
        from quack.activation import relu, sigmoid
        from quack.epilogue.frontend import gemm_epilogue, pack, unpack
        from quack.epilogue.head_rmsnorm import HeadRstd
        from quack.epilogue.ops import ColVecLoad, ColVecReduce, TileLoad
        from quack.epilogue.rotary import rotary_cos_sin_load
    except ImportError:
        return None
    column, total, rstd = {"scale": ColVecLoad("scale")}, {"sum": ColVecReduce("sum")}, HeadRstd("rstd", eps=1e-6)

    @gemm_epilogue()
    def add(acc, c):
        return {"D": acc + c}

    @gemm_epilogue(reduces=total)
    def add_squares(acc, c):
        y = acc + c
        return {"D": y, "sum": y * y}

    @gemm_epilogue(ops=column)
    def scale(acc, scale):
        return {"D": acc * scale}

    @gemm_epilogue(ops=column)
    def relu_squared(acc, scale):
        r = relu(acc * scale)
        return {"D": r * r}

    @gemm_epilogue(ops={**column, "x": TileLoad("x")}, reduces=total)
    def relu_squared_backward(acc, x, scale):  # x: the squares, whose root is all that the derivative needs
        return {"D": acc * element.sqrt(x, fastmath=True) * 2.0 * scale, "sum": acc * x * 2.0}

    @gemm_epilogue(ops={**column, "x": TileLoad("x")})
    def add_norm_backward(acc, c, x, scale):
        return {"D": acc + c - x * scale}

    def squares(acc):
        return {"rstd": acc * acc}

    @gemm_epilogue(ops={"x": rotary_cos_sin_load("x"), "rstd": rstd}, prepass=squares, prepass_outs=("rstd",), extra_ops=(rstd.out("rstd_out"),), mode="acc_pair")
    def norm_rotary(acc, x, rstd):  # x: cos and sin of an angle for each pair of neighbours
        (a, b), (c, s) = unpack(acc * rstd), unpack(x)
        return {"D": pack(a * c - b * s, a * s + b * c)}

    @gemm_epilogue(reduces=total)
    def softcap_exp(acc):
        t = sigmoid(acc * (2 / softcap)) * 2.0 - 1.0  # the tanh instruction errs by 2**-11, which softcap would make 0.7% of z
        z = element.exp(t * softcap, fastmath=True)
        return {"D": z - z * t * t, "sum": z}

    return dict(add=add, add_value=add, accumulate=add, add_squares=add_squares, scale=scale, relu_squared=relu_squared,
                relu_squared_backward=relu_squared_backward, add_norm_backward=add_norm_backward, norm_rotary=norm_rotary, softcap_exp=softcap_exp)


def product(epilogue, a, b, c=None, scale=None, x=None, out=None, softcap=0.0):
    """a [M, K] @ b.T [K, N] through an epilogue, [M, N] in the dtype of a; or a pair of that and what else it gives, float32: sums [M] or rstd [M, heads].

    c, x: [M, N], but for norm_rotary x is float16 [M, head_dim]; scale: float32 [M]; out: where the result goes.
    """
    from quack.gemm_sm90 import GemmSm90

    kernel, (M, N), (rows, columns, pingpong, cluster_m, cluster_n, loads) = epilogues(softcap)[epilogue], (len(a), len(b)), TILES[epilogue]
    D, operands = a.new_empty(M, N) if out is None else out, {}
    if scale is not None:
        operands["scale"] = scale[None]
    if x is not None:
        operands["x"] = x
    if epilogue == "norm_rotary":
        operands.update(rstd=x.shape[1], rstd_out=floats(a, M, N // x.shape[1]))
    elif kernel.sinks:
        operands["sum"] = floats(a, M, -(-N // columns))
    GemmSm90.epi_c_stage_base = loads  # read when the kernel is compiled; post_init_attrs makes it part of the name in its cache on disk
    kernel.gemm(a, b, D, c, epi_args=operands, tile_M=rows, tile_N=columns, pingpong=pingpong, cluster_M=cluster_m, cluster_N=cluster_n,
                post_init_attrs=(("loads", loads),))
    if "sum" in operands:
        return D, row_sums(operands["sum"])
    return (D, operands["rstd_out"]) if "rstd_out" in operands else D


def row_sums(t):
    """float32 [N, n], few n -> [N]: in a third of the time that PyTorch's sum takes."""
    sums, (N, n) = floats(t, len(t)), t.shape
    width = triton.next_power_of_2(n)
    rows = 4096 // width
    row_sums_kernel[(triton.cdiv(N, rows),)](t, sums, N, n, WIDTH=width, ROWS=rows)
    return sums


def floats(t, *shape):
    """An empty float32 tensor where t is."""
    return t.new_empty(shape, dtype=torch.float32)


# ---------------------------------------------------------------------------
# The two halves of a block
# ---------------------------------------------------------------------------

def fused_mlp(residual, y, out, fc, proj):
    """x + relu(norm(x) @ fc.T)^2 @ proj.T, where x = residual + y @ out.T.

    residual, y: bfloat16 [B, T, D], and so is the result; out [D, D], fc [4 D, D], proj [D, 4 D]: of any dtype.
    norm(x) is x times a number for each row: it is never stored, the number is applied to the product. Of the hidden
    layer only the squares are stored.
    """
    return mlp_forward(residual, y, *(w.to(y.dtype) for w in (out, fc, proj)))[0]


def fused_attention(h, qkv, rotary, window, gate=None, table=None, idx=None):
    """Attention over the last `window` positions of q, k, v = h @ qkv.T, with q and k rotated and normalised; to v may be added a gated embedding.

    h: bfloat16 [B, T, D]; qkv: [3, D, D] of any dtype; rotary: float16 [B * T, head_dim], cosines and sines in turn. For
    each head, 2 sigmoid(h[..., :C] @ gate.T) times its part of table[idx]; gate: float32 [heads, C], C a power of two;
    table: bfloat16 [V, D]; idx: int64 [B, T]. Returns bfloat16 [B, T, D].
    """
    return attention_forward(h, alternate(qkv, rotary.shape[1]).to(h.dtype), rotary, window, gate, table, idx)[0]


def alternate(qkv, head_dim):
    """[3, D, D] -> [3 D, D], with the halves of each head of q and k in turn: norm_rotary rotates neighbours."""
    qk, v = qkv.flatten(0, 1).split([2 * qkv.shape[1], qkv.shape[1]])
    return torch.cat([qk.view(-1, 2, head_dim // 2, qk.shape[1]).transpose(1, 2).reshape(qk.shape), v])


@torch.library.custom_op("autoresearch::mlp_forward", mutates_args=())
def mlp_forward(residual: Tensor, y: Tensor, out: Tensor, fc: Tensor, proj: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result of fused_mlp, and for the backward pass (x, rstd, squares)."""
    x, sum_of_squares = product("add_squares", y.flatten(0, 1), out, residual.flatten(0, 1))
    rstd = torch.rsqrt(sum_of_squares / x.shape[1] + 1e-6)
    squares = product("relu_squared", x, fc, scale=rstd)
    return product("add", squares, proj, x).view(y.shape), x, rstd, squares


@torch.library.custom_op("autoresearch::mlp_backward", mutates_args=())
def mlp_backward(d: Tensor, y: Tensor, x: Tensor, rstd: Tensor, squares: Tensor, out: Tensor, fc: Tensor,
                 proj: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (residual, y, out, fc, proj) from d, that of the result.

    The backward pass of the norm takes sum(d norm(x) * norm(x)) out of each row. That is the sum of dz * z over the
    hidden layer, and so known before the product that gives d norm(x).
    """
    shape, d, y = y.shape, d.flatten(0, 1), y.flatten(0, 1)
    dz, dots = product("relu_squared_backward", d, proj.T, scale=rstd, x=squares)  # dz times rstd
    dx = product("add_norm_backward", dz, fc.T, d, dots * rstd.square() / x.shape[1], x)
    return dx.view(shape), (dx @ out).view(shape), dx.T @ y, dz.T @ x, d.T @ squares


@torch.library.custom_op("autoresearch::attention_forward", mutates_args=())
def attention_forward(h: Tensor, w: Tensor, rotary: Tensor, window: int, gate: Tensor | None, table: Tensor | None,
                      idx: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result of fused_attention, and for the backward pass (qk, rstd, v, lse). w: qkv after alternate, in the dtype of h."""
    (B, T, D), head_dim, h = h.shape, rotary.shape[1], h.flatten(0, 1)
    qk, rstd = product("norm_rotary", h, w[: 2 * D], x=rotary)
    if gate is None:
        v = h @ w[2 * D :].T
    else:
        gated = torch.empty_like(h)
        by_rows(gated_kernel, h, gate, table, idx.contiguous(), gated, HEADS=len(gate), HEAD_DIM=head_dim, CHANNELS=gate.shape[1])
        v = product("add_value", h, w[2 * D :], gated)
    q, k = qk.view(B, T, 2, -1, head_dim).unbind(2)
    out, lse = flash4().forward(q, k, v.view(q.shape), window)
    return out.view(B, T, D), qk, rstd, v, lse


@torch.library.custom_op("autoresearch::attention_backward", mutates_args=())
def attention_backward(dout: Tensor, h: Tensor, w: Tensor, rotary: Tensor, gate: Tensor | None, table: Tensor | None, idx: Tensor | None, out: Tensor,
                       qk: Tensor, rstd: Tensor, v: Tensor, lse: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (h, w, gate, table); the last two are empty without a gate."""
    (B, T, D), head_dim, h = h.shape, rotary.shape[1], h.flatten(0, 1)
    q, k = qk.view(B, T, 2, -1, head_dim).unbind(2)
    dqkv = flash4().backward(q, k, v.view(q.shape), out.view(q.shape), lse, dout.view(q.shape), window).view(B * T, 3 * D)
    by_rows(norm_rotary_backward_kernel, dqkv, qk, rstd, rotary, T, HEADS=2 * D // head_dim, HEAD_DIM=head_dim)
    dh, dgate, dtable = dqkv @ w, floats(h, 0), floats(h, 0)
    if gate is not None:
        dgate, dtable = torch.zeros_like(gate), torch.zeros_like(table, dtype=torch.float32)
        by_rows(gated_backward_kernel, dqkv, h, gate, table, idx.contiguous(), dh, dgate, dtable, HEADS=len(gate), HEAD_DIM=head_dim, CHANNELS=gate.shape[1])
        dtable = dtable.to(table.dtype)
    return dh.view(dout.shape), dqkv.T @ h, dgate, dtable


def by_rows(kernel, first, *rest, **sizes):
    """Run a kernel over the rows of its first argument [N, ...], 16 in a program: fit() has N a multiple of 128."""
    kernel[(len(first) // 16,)](first, *rest, **sizes, ROWS=16)


if triton:
    @triton.jit
    def row_sums_kernel(t, sums, N, n, WIDTH: tl.constexpr, ROWS: tl.constexpr):
        rows, lane = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, WIDTH)[None, :]
        inside = rows < N
        values = tl.load(t + rows[:, None] * n + lane, mask=inside[:, None] & (lane < n), other=0.0)
        tl.store(sums + rows, tl.sum(values, axis=1), mask=inside)

    @triton.jit
    def norm_rotary_backward_kernel(g, y, rstd, rotary, seq_len, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
        """Turn the gradients of the normalised and rotated q and k into those of q and k, in place. g: [N, 3, HEADS / 2, HEAD_DIM], of which q and k;
        y: their values [N, HEADS, HEAD_DIM]; rstd: [N, HEADS]; rotary: [seq_len, HEAD_DIM]."""
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        lane = tl.arange(0, HEAD_DIM)[None, :]
        c, s = tl.split(tl.load(rotary + rows % seq_len * HEAD_DIM + lane).to(tl.float32).reshape(ROWS, HEAD_DIM // 2, 2))
        for head in range(HEADS):
            at = g + (rows * (HEADS // 2 * 3) + head) * HEAD_DIM + lane
            d, ys = tl.load(at).to(tl.float32), tl.load(y + (rows * HEADS + head) * HEAD_DIM + lane).to(tl.float32)
            d = (d - ys * (tl.sum(d * ys, axis=1, keep_dims=True) / HEAD_DIM)) * tl.load(rstd + rows * HEADS + head)
            a, b = tl.split(d.reshape(ROWS, HEAD_DIM // 2, 2))
            tl.store(at, tl.join(a * c + b * s, b * c - a * s).reshape(ROWS, HEAD_DIM))

    @triton.jit
    def gated_kernel(h, gate, table, idx, out, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
        """The gated embedding of fused_attention. h, out: [N, HEADS * HEAD_DIM]; the rest as there."""
        rows, lane, channel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, HEAD_DIM)[None, :], tl.arange(0, CHANNELS)[None, :]
        chosen, x = tl.load(idx + rows)[:, None], tl.load(h + rows[:, None] * (HEADS * HEAD_DIM) + channel).to(tl.float32)
        for head in range(HEADS):
            g = 2 * tl.sigmoid(tl.sum(x * tl.load(gate + head * CHANNELS + channel), axis=1, keep_dims=True))
            value = tl.load(table + (chosen * HEADS + head) * HEAD_DIM + lane).to(tl.float32)
            tl.store(out + (rows[:, None] * HEADS + head) * HEAD_DIM + lane, g * value)

    @triton.jit
    def gated_backward_kernel(dqkv, h, gate, table, idx, dh, dgate, dtable,
                              HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
        """Add the gradients of gated_kernel to dh, dgate and dtable. dqkv: [N, 3, HEADS, HEAD_DIM], of which the last third."""
        rows, lane, channel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, HEAD_DIM)[None, :], tl.arange(0, CHANNELS)[None, :]
        at = rows[:, None] * (HEADS * HEAD_DIM) + channel
        chosen, x, dx = tl.load(idx + rows)[:, None], tl.load(h + at).to(tl.float32), tl.load(dh + at).to(tl.float32)
        for head in range(HEADS):
            w = tl.load(gate + head * CHANNELS + channel)
            s = tl.sigmoid(tl.sum(x * w, axis=1, keep_dims=True))
            d = tl.load(dqkv + ((rows[:, None] * 3 + 2) * HEADS + head) * HEAD_DIM + lane).to(tl.float32)
            entry = (chosen * HEADS + head) * HEAD_DIM + lane
            dlogit = 2 * s * (1 - s) * tl.sum(d * tl.load(table + entry).to(tl.float32), axis=1, keep_dims=True)
            tl.atomic_add(dtable + entry, 2 * s * d, sem="relaxed")
            tl.atomic_add(dgate + head * CHANNELS + channel, tl.sum(dlogit * x, axis=0, keep_dims=True), sem="relaxed")
            dx += dlogit * w
        tl.store(dh + at, dx)


@mlp_forward.register_fake
def _(residual, y, out, fc, proj):
    N = y.shape[0] * y.shape[1]
    return torch.empty_like(y), y.new_empty(N, y.shape[2]), floats(y, N), y.new_empty(N, len(fc))


@mlp_backward.register_fake
def _(d, y, x, rstd, squares, out, fc, proj):
    return tuple(torch.empty_like(t) for t in (y, y, out, fc, proj))


@attention_forward.register_fake
def _(h, w, rotary, window, gate, table, idx):
    (B, T, D), H = h.shape, h.shape[2] // rotary.shape[1]
    return torch.empty_like(h), h.new_empty(B * T, 2 * D), floats(h, B * T, 2 * H), h.new_empty(B * T, D), floats(h, B, H, T)


@attention_backward.register_fake
def _(dout, h, w, rotary, gate, table, idx, *rest):
    return tuple(floats(h, 0) if t is None else torch.empty_like(t) for t in (h, w, gate, table))


def keep_for_mlp(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], *output[1:], *inputs[2:])


def keep_for_attention(ctx, inputs, output):
    h, w, rotary, ctx.window, *gated = inputs
    ctx.save_for_backward(h, w, rotary, *gated, *output)


def differentiate_attention(ctx, dout, *_):
    dh, dw, dgate, dtable = attention_backward(dout, *ctx.saved_tensors, ctx.window)
    return (dh, dw, None, None, dgate, dtable, None) if ctx.needs_input_grad[4] else (dh, dw, *[None] * 5)


mlp_forward.register_autograd(lambda ctx, d, *_: mlp_backward(d, *ctx.saved_tensors), setup_context=keep_for_mlp)
attention_forward.register_autograd(differentiate_attention, setup_context=keep_for_attention)
