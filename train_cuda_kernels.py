"""
Kernels for the model of train_cuda.py on recent NVIDIA GPUs, which PyTorch does not have.

The trainer asks for one of them and gets it, or plain PyTorch; it does not know which:

    start_compilers(head_dim, softcap)  processes that compile beside the trainer (any GPU)
    stop_compilers()                    when all is compiled
    flash_attention()                   FlashAttention (Hopper and newer), or None
    fuse_blocks(blocks, wte, rotary)    a faster forward for each Block (Hopper, bfloat16)
    fuse_loss(plain, w, softcap)        a faster function of the loss of a chunk (Hopper, bfloat16)

The last two first compare what the kernels compute with what the trainer computes. An experiment that changed
its Block or its loss runs as it is written, and a line on stderr says so.

The kernels are matrix products that finish their result before they store it: between two products nothing
passes through memory that the backward pass does not need, but for the gated value embedding. They are made
with quack-kernels and the CuTe DSL, which come with the extra `flash` (see pyproject.toml).
"""

# Triton reads its kernels' annotations; their other arguments have none.
# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False

import inspect
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from copy import deepcopy
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children, get_context
from pathlib import Path
from types import MethodType
from typing import IO, Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

try:
    import triton
    import triton.language as tl
except ImportError:  # not on macOS or Windows
    triton = None

Attention = Callable[..., Tensor]  # f(q, k, v, window=), [B, T, H, D] each
LossChunk = Callable[[Tensor, Tensor, Tensor, int, Tensor, Tensor], Tensor]  # loss_chunk of train_cuda.py

HEAD_DIMS = (64, 128)  # that the fused kernels compute
TOLERANCE = 0.03  # relative difference of a fused result; rounding to bfloat16 makes 0.006 in a block


# ---------------------------------------------------------------------------
# What the trainer calls
# ---------------------------------------------------------------------------


def start_compilers(head_dim: int, softcap: float) -> None:
    """Start the processes that compile kernels beside this one, for a model on a GPU.

    The CuTe DSL compiles a kernel when the kernel is first used. So another process compiles all of them now.
    Triton's kernels are compiled by processes of PyTorch. It starts them with its first graph; until they are
    ready, this process compiles one kernel after the other. launcher/walls.py says how they are started.
    """
    if triton is None:
        return
    compile_ahead(head_dim, softcap)
    try:
        from torch._inductor import config
        from torch._inductor.async_compile import AsyncCompile
    except ImportError:  # PyTorch promises neither
        return
    try:
        AsyncCompile.use_process_pool()
    except Exception as error:  # a machine may refuse to fork, or to share locks
        config.compile_threads = 1
        for fork in active_children():  # those that began wait for work that does not come
            fork.kill()
        print(f"Triton's kernels are compiled one by one: {error}", file=sys.stderr, flush=True)


def stop_compilers() -> None:
    """End the processes that compile. In the training they would hold the launcher's socket and the GPU."""
    wait_for_kernels()
    torch_compile = sys.modules.get("torch._inductor.async_compile")  # not there if nothing was compiled
    if torch_compile and hasattr(torch_compile, "shutdown_compile_workers"):
        torch_compile.shutdown_compile_workers()


def flash_attention() -> Attention | None:
    """Return the fastest FlashAttention for this GPU as f(q, k, v, window), or None where there is none."""
    if torch.cuda.get_device_capability()[0] < 9:
        return None
    return flash4() or flash3()


def fuse_blocks(blocks: nn.ModuleList, wte: Tensor, rotary: Tensor) -> bool:
    """Let every block run in the fused kernels, if these compute what its own forward computes.

    blocks: Block of train_cuda.py; wte: [V, D], the embeddings, on the device and in the dtype of the
    activations; rotary: float32 [seq_len, head_dim]. The weights stay as they are. Returns whether the blocks
    are fused now.
    """
    if not (available(wte.device, wte.dtype) and fit(wte.shape[1], rotary.shape[1], len(rotary))):
        return False
    wait_for_kernels()
    with torch.no_grad():
        if not agree("Block", compared_blocks(blocks, wte, rotary)):
            return False
    for block in blocks:
        block.forward = MethodType(fused_block, block)
    return True


def fuse_loss(plain: LossChunk, w: Tensor, softcap: float) -> LossChunk:
    """Return a faster function that computes what `plain` computes, or `plain` where there is none.

    plain: loss_chunk of train_cuda.py; w: [V, D], the weight of lm_head in the compute dtype. The comparison
    is made once a process.
    """
    if len(w) % 128 or not available(w.device, w.dtype):
        return plain
    return checked_loss(plain, w.shape, w.device, w.dtype, softcap)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the fused kernels run on the device, in the dtype."""
    if device.type != "cuda" or dtype != torch.bfloat16 or triton is None:
        return False
    return epilogues() is not None and flash4() is not None


def fit(n_embd: int, head_dim: int, seq_len: int) -> bool:
    """Return whether the fused kernels compute a block of this size."""
    return head_dim in HEAD_DIMS and n_embd % 128 == 0 and seq_len % 128 == 0


# ---------------------------------------------------------------------------
# Fused against plain
# ---------------------------------------------------------------------------


def agree(name: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Return whether each pair (fused, plain) is equal but for rounding; say so on stderr if not.

    pairs: an iterator that computes them. What it raises counts as a difference: an experiment may have
    changed shapes and names as it likes.
    """
    try:
        problem = first_difference(pairs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    if not problem:
        return True
    message = f"{name} is not what the fused kernels compute ({problem}): it runs without them"
    print(message, file=sys.stderr, flush=True)
    return False


def first_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> str:
    """Return how the first pair differs that differs by more than rounding; "" if none does."""
    for fused, plain in pairs:
        expected = plain.float()
        difference = float((fused.float() - expected).norm() / expected.norm())
        if not difference < TOLERANCE:  # NaN is a difference too
            return f"{difference:.3g} of it differs"
    return ""


def compared_blocks(blocks: nn.ModuleList, wte: Tensor, rotary: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what each block, with random weights, adds to a random row: fused and plain, [1, T, D] each."""
    device = wte.device
    generator = torch.Generator(device).manual_seed(0)
    row = (1, len(rotary), wte.shape[1])
    x = torch.randn(row, device=device, generator=generator).to(wte.dtype)
    table = torch.randn(row[1:], device=device, generator=generator).to(wte.dtype)
    idx = torch.randint(len(table), row[:2], device=device, generator=generator)
    for block in blocks:
        if list(inspect.signature(block.forward).parameters) != ["x", "ve", "rotary"]:
            raise TypeError("Block.forward has other arguments")
        block = deepcopy(block)
        for p in block.parameters():
            p.normal_(
                std=0.05, generator=generator
            )  # a new block's projections are zero: it would add nothing
        ve = None if block.attn.gate is None else (table, idx)
        yield fused_block(block, x, ve, rotary) - x, block(x, ve, rotary) - x


@cache
def checked_loss(
    plain: LossChunk, shape: torch.Size, device: torch.device, dtype: torch.dtype, softcap: float
) -> LossChunk:
    """Return fused_loss_chunk if it agrees with `plain` on random weights [V, D], else `plain`."""
    fused = partial(fused_loss_chunk, softcap=softcap)
    with torch.no_grad():
        same = agree("The loss", compared_losses(fused, plain, shape, device, dtype))
    return fused if same else plain


def compared_losses(
    fused: LossChunk, plain: LossChunk, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the loss of two chunks of 128 random tokens, its gradient by x and that by w: fused and plain."""
    generator = torch.Generator(device).manual_seed(0)
    vocab_size, width = shape
    x = torch.randn(256, width, device=device, generator=generator).to(dtype)
    w = torch.randn(shape, device=device, generator=generator) * (5 * width**-0.5)  # logits of about 5
    w = w.to(dtype)
    targets = torch.randint(vocab_size, (256,), device=device, generator=generator)

    def run(chunk: LossChunk) -> tuple[Tensor, Tensor, Tensor]:
        dx = torch.empty_like(x)
        dw = torch.zeros(shape, device=device)
        halves = (slice(0, 128), slice(128, 256))
        losses = [chunk(x[half], w, targets[half], len(x), dx[half], dw) for half in halves]
        return torch.stack(losses), dx, dw

    yield from zip(run(fused), run(plain), strict=True)


# ---------------------------------------------------------------------------
# FlashAttention
# ---------------------------------------------------------------------------


@cache
def flash3() -> Attention | None:
    """Return FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) of the kernels package; Hopper only."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from kernels import get_kernel

        fa3 = get_kernel("varunneal/flash-attention-3").flash_attn_interface
    except Exception:  # not installed, or no network and not in the hub's cache: the next kernel is used
        return None
    return lambda q, k, v, window: fa3.flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))


@cache
def flash4() -> Attention | None:
    """Return FlashAttention-4 (the CuTe DSL kernels of flash-attn-4), opaque to torch.compile."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # on disk: compiled once a machine
    try:
        import flash_attn.cute.interface  # noqa: F401
    except ImportError:
        return None
    return lambda q, k, v, window: flash4_forward(q, k, v, window)[0]


def edges(window: int, seq_len: int) -> tuple[int | None, int | None]:
    """Return how far a position sees to its left and right, as FlashAttention-4 wants it."""
    return (None, None) if window >= seq_len else (window - 1, 0)


def run_flash4_forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the result [B, T, H, D] and the logarithms of the softmax's sums, float32 [B, H, T].

    For fake tensors the kernel is only compiled.
    """
    from flash_attn.cute.interface import flash_attn_func

    size = edges(window, q.shape[1])
    return flash_attn_func(q, k, v, causal=True, window_size=size, return_lse=True)[:2]


flash4_forward = torch.library.custom_op("autoresearch::flash4_forward", run_flash4_forward, mutates_args=())


@flash4_forward.register_fake
def _(q, k, v, window):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), floats(q, B, H, T)


def run_flash4_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, window: int
) -> Tensor:
    """Return the gradients of q, k and v in one tensor, [B, T, 3, H, D].

    For fake tensors the kernels are only compiled.
    """
    from flash_attn.cute.interface import _flash_attn_bwd

    B, T, H, D = q.shape
    left, right = edges(window, T)
    dqkv = q.new_empty(B, T, 3, H, D)
    dq, dk, dv = dqkv.unbind(2)
    _flash_attn_bwd(
        *(q, k, v, out, dout.contiguous(), lse),
        causal=True,
        window_size_left=left,
        window_size_right=right,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dqkv


flash4_backward = torch.library.custom_op(
    "autoresearch::flash4_backward", run_flash4_backward, mutates_args=()
)


@flash4_backward.register_fake
def _(q, k, v, out, lse, dout, window):
    B, T, H, D = q.shape
    return q.new_empty(B, T, 3, H, D)


def keep_for_flash4(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def differentiate_flash4(ctx, dout, dlse):
    dq, dk, dv = flash4_backward(*ctx.saved_tensors, dout, ctx.window).unbind(2)
    return dq, dk, dv, None


flash4_forward.register_autograd(differentiate_flash4, setup_context=keep_for_flash4)


# ---------------------------------------------------------------------------
# Matrix products with an epilogue
# ---------------------------------------------------------------------------


class Tile(NamedTuple):
    """How a product is cut into pieces, one of which a multiprocessor computes at a time."""

    rows: int
    columns: int
    pingpong: bool = True  # two tiles in turn: one is multiplied while the other is finished and stored
    cluster_rows: int = 1  # tiles that are computed together and share what they load
    cluster_columns: int = 2
    loads: int = 4  # loads of c and x that are under way


# The fastest on an H100 of those that `benchmarks/gpu.py --parts tiles` tries.
TILES = {
    "add": Tile(192, 128),
    "add_value": Tile(128, 128, loads=8),
    "accumulate": Tile(128, 128),
    "add_squares": Tile(128, 128),
    "relu_squared": Tile(192, 128),
    "relu_squared_backward": Tile(192, 128, loads=12),
    "add_norm_backward": Tile(192, 128),
    "norm_rotary": Tile(192, 128, loads=8),
    "scale": Tile(128, 256, pingpong=False),
    "softcap_exp": Tile(128, 128),
}


def for_hopper() -> bool:
    """Return whether kernels are made for Hopper. Where there is no GPU, QUACK_ARCH says what for."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] == 9
    return os.environ.get("QUACK_ARCH") == "90"


@cache
def epilogues(softcap: float = 0.0) -> dict[str, Any] | None:
    """Return matrix products that finish their result before they store it, by name.

    Each is a function of an element `acc` of the product and of the operands at its place: c and x [M, N],
    scale [M]. It returns D, what is stored, and may return "sum", which is summed over the columns. Returns
    None without Hopper or quack-kernels.
    """
    if not for_hopper():
        return None
    try:
        return {
            **sum_epilogues(),
            **scale_epilogues(),
            **mlp_epilogues(),
            **attention_epilogues(),
            **loss_epilogues(softcap),
        }
    except ImportError:
        return None


def sum_epilogues() -> dict[str, Any]:
    """Return the products to which another matrix is added. One of them has a tile for each of its uses."""
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecReduce

    @gemm_epilogue()
    def add(acc, c):
        return {"D": acc + c}

    @gemm_epilogue(reduces={"sum": ColVecReduce("sum")})
    def add_squares(acc, c):
        y = acc + c
        return {"D": y, "sum": y * y}

    return {"add": add, "add_value": add, "accumulate": add, "add_squares": add_squares}


def scale_epilogues() -> dict[str, Any]:
    """Return the product whose rows are scaled."""
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad

    @gemm_epilogue(ops={"scale": ColVecLoad("scale")})
    def scale(acc, scale):
        return {"D": acc * scale}

    return {"scale": scale}


def mlp_epilogues() -> dict[str, Any]:
    """Return the products of fused_mlp and of its backward pass."""
    from cutlass.cute import math as element
    from quack.activation import relu
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad, ColVecReduce, TileLoad

    column = ColVecLoad("scale")

    @gemm_epilogue(ops={"scale": column})
    def relu_squared(acc, scale):
        r = relu(acc * scale)
        return {"D": r * r}

    @gemm_epilogue(ops={"scale": column, "x": TileLoad("x")}, reduces={"sum": ColVecReduce("sum")})
    def relu_squared_backward(acc, x, scale):  # x: the squares, whose root is all that the derivative needs
        return {"D": acc * element.sqrt(x, fastmath=True) * 2.0 * scale, "sum": acc * x * 2.0}

    @gemm_epilogue(ops={"scale": column, "x": TileLoad("x")})
    def add_norm_backward(acc, c, x, scale):
        return {"D": acc + c - x * scale}

    return {
        "relu_squared": relu_squared,
        "relu_squared_backward": relu_squared_backward,
        "add_norm_backward": add_norm_backward,
    }


def attention_epilogues() -> dict[str, Any]:
    """Return the product whose heads are normalised and rotated."""
    from quack.epilogue.frontend import gemm_epilogue, pack, unpack
    from quack.epilogue.head_rmsnorm import HeadRstd
    from quack.epilogue.rotary import rotary_cos_sin_load

    rstd = HeadRstd("rstd", eps=1e-6)

    def squares(acc):
        return {"rstd": acc * acc}

    @gemm_epilogue(
        ops={"x": rotary_cos_sin_load("x"), "rstd": rstd},
        prepass=squares,
        prepass_outs=("rstd",),
        extra_ops=(rstd.out("rstd_out"),),
        mode="acc_pair",
    )
    def norm_rotary(acc, x, rstd):  # x: cos and sin of an angle for each pair of neighbours
        a, b = unpack(acc * rstd)
        c, s = unpack(x)
        return {"D": pack(a * c - b * s, a * s + b * c)}

    return {"norm_rotary": norm_rotary}


def loss_epilogues(softcap: float) -> dict[str, Any]:
    """Return the product that gives what softcap_exp in train_cuda.py gives."""
    from cutlass.cute import math as element
    from quack.activation import sigmoid
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecReduce

    @gemm_epilogue(reduces={"sum": ColVecReduce("sum")})
    def softcap_exp(acc):
        # The tanh instruction errs by 2**-11, which softcap would make 0.7% of z.
        t = sigmoid(acc * (2 / softcap)) * 2.0 - 1.0
        z = element.exp(t * softcap, fastmath=True)
        return {"D": z - z * t * t, "sum": z}

    return {"softcap_exp": softcap_exp}


def product(
    name: str,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    scale: Tensor | None = None,
    x: Tensor | None = None,
    out: Tensor | None = None,
    softcap: float = 0.0,
) -> Any:
    """Return a [M, K] @ b.T [K, N] through an epilogue, [M, N] in the dtype of a.

    If the epilogue gives more, return a pair: sums float32 [M], or for norm_rotary rstd float32 [M, heads].
    c, x: [M, N], but for norm_rotary x is float16 [M, head_dim]; scale: float32 [M]; out: where the result
    goes. For fake tensors the kernel is only compiled.
    """
    from quack.gemm_sm90 import GemmSm90

    kernel = epilogues(softcap)[name]  # type: ignore[index]  # available() is true here
    tile = TILES[name]
    M, N = len(a), len(b)
    D = a.new_empty(M, N) if out is None else out
    operands: dict[str, Any] = {}
    if scale is not None:
        operands["scale"] = scale[None]
    if x is not None:
        operands["x"] = x
    if name == "norm_rotary":
        assert x is not None
        head_dim = x.shape[1]
        operands["rstd"] = head_dim
        operands["rstd_out"] = floats(a, M, N // head_dim)
    elif kernel.sinks:
        operands["sum"] = floats(a, M, -(-N // tile.columns))  # of each tile
    # Read when the kernel is compiled; post_init_attrs makes it part of the name in quack's cache on disk.
    GemmSm90.epi_c_stage_base = tile.loads
    kernel.gemm(
        *(a, b, D, c),
        epi_args=operands,
        tile_M=tile.rows,
        tile_N=tile.columns,
        pingpong=tile.pingpong,
        cluster_M=tile.cluster_rows,
        cluster_N=tile.cluster_columns,
        post_init_attrs=(("loads", tile.loads),),
        _launch=not isinstance(a, FakeTensor),
    )
    if "sum" in operands:
        return D, row_sums(operands["sum"])
    if "rstd_out" in operands:
        return D, operands["rstd_out"]
    return D


def floats(like: Tensor, *shape: int) -> Tensor:
    """Return an empty float32 tensor on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)


# ---------------------------------------------------------------------------
# Triton kernels
# ---------------------------------------------------------------------------


def row_sums(values: Tensor) -> Tensor:
    """Return the sums of the rows of float32 [N, n], n small: in a third of the time of PyTorch's sum."""
    N, n = values.shape
    sums = floats(values, N)
    width = triton.next_power_of_2(n)
    rows = 4096 // width
    if not isinstance(values, FakeTensor):
        row_sums_kernel[(triton.cdiv(N, rows),)](values, sums, N, n, WIDTH=width, ROWS=rows)
    return sums


def by_rows(kernel: Any, first: Tensor, *rest: Any, **sizes: int) -> None:
    """Run a kernel over the rows of its first argument [N, ...], 16 in a program: N is a multiple of 128."""
    if not isinstance(first, FakeTensor):
        kernel[(len(first) // 16,)](first, *rest, **sizes, ROWS=16)


if triton:

    @triton.jit
    def row_sums_kernel(values_ptr, sums_ptr, N, n, WIDTH: tl.constexpr, ROWS: tl.constexpr):
        """Store the sums of the rows of values [N, n] to sums [N]."""
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        lane = tl.arange(0, WIDTH)[None, :]
        inside = rows < N
        values = tl.load(values_ptr + rows[:, None] * n + lane, mask=inside[:, None] & (lane < n), other=0.0)
        tl.store(sums_ptr + rows, tl.sum(values, axis=1), mask=inside)

    @triton.jit
    def norm_rotary_backward_kernel(
        dqkv_ptr,
        qk_ptr,
        rstd_ptr,
        rotary_ptr,
        seq_len,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Turn the gradients of the normalised and rotated q and k into those of q and k, in place.

        dqkv: [N, 3, HEADS / 2, HEAD_DIM], whose q and k are read and written; qk: their values [N, HEADS,
        HEAD_DIM], normalised and rotated; rstd: [N, HEADS]; rotary: [seq_len, HEAD_DIM].
        """
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        lane = tl.arange(0, HEAD_DIM)[None, :]
        angles = tl.load(rotary_ptr + rows % seq_len * HEAD_DIM + lane).to(tl.float32)
        c, s = tl.split(angles.reshape(ROWS, HEAD_DIM // 2, 2))
        for head in range(HEADS):
            d_ptr = dqkv_ptr + (rows * (HEADS // 2 * 3) + head) * HEAD_DIM + lane
            d = tl.load(d_ptr).to(tl.float32)
            y = tl.load(qk_ptr + (rows * HEADS + head) * HEAD_DIM + lane).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows * HEADS + head)
            d = (d - y * (tl.sum(d * y, axis=1, keep_dims=True) / HEAD_DIM)) * rstd
            a, b = tl.split(d.reshape(ROWS, HEAD_DIM // 2, 2))
            tl.store(d_ptr, tl.join(a * c + b * s, b * c - a * s).reshape(ROWS, HEAD_DIM))

    @triton.jit
    def gated_kernel(
        h_ptr,
        gate_ptr,
        table_ptr,
        idx_ptr,
        out_ptr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        CHANNELS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Store the gated embedding of fused_attention. h, out: [N, HEADS * HEAD_DIM]; the rest as there."""
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        lane = tl.arange(0, HEAD_DIM)[None, :]
        channel = tl.arange(0, CHANNELS)[None, :]
        token = tl.load(idx_ptr + rows)[:, None]
        x = tl.load(h_ptr + rows[:, None] * (HEADS * HEAD_DIM) + channel).to(tl.float32)
        for head in range(HEADS):
            w = tl.load(gate_ptr + head * CHANNELS + channel)
            g = 2 * tl.sigmoid(tl.sum(x * w, axis=1, keep_dims=True))
            value = tl.load(table_ptr + (token * HEADS + head) * HEAD_DIM + lane).to(tl.float32)
            tl.store(out_ptr + (rows[:, None] * HEADS + head) * HEAD_DIM + lane, g * value)

    @triton.jit
    def gated_backward_kernel(
        dqkv_ptr,
        h_ptr,
        gate_ptr,
        table_ptr,
        idx_ptr,
        dh_ptr,
        dgate_ptr,
        dtable_ptr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        CHANNELS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Add the gradients of gated_kernel to dh, dgate and dtable.

        dqkv: [N, 3, HEADS, HEAD_DIM], whose last third is read; the rest as in gated_kernel.
        """
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        lane = tl.arange(0, HEAD_DIM)[None, :]
        channel = tl.arange(0, CHANNELS)[None, :]
        first = rows[:, None] * (HEADS * HEAD_DIM) + channel
        token = tl.load(idx_ptr + rows)[:, None]
        x = tl.load(h_ptr + first).to(tl.float32)
        dx = tl.load(dh_ptr + first).to(tl.float32)
        for head in range(HEADS):
            w = tl.load(gate_ptr + head * CHANNELS + channel)
            s = tl.sigmoid(tl.sum(x * w, axis=1, keep_dims=True))
            dv = tl.load(dqkv_ptr + ((rows[:, None] * 3 + 2) * HEADS + head) * HEAD_DIM + lane).to(tl.float32)
            entry = (token * HEADS + head) * HEAD_DIM + lane
            value = tl.load(table_ptr + entry).to(tl.float32)
            dlogit = 2 * s * (1 - s) * tl.sum(dv * value, axis=1, keep_dims=True)
            tl.atomic_add(dtable_ptr + entry, 2 * s * dv, sem="relaxed")
            dw = tl.sum(dlogit * x, axis=0, keep_dims=True)
            tl.atomic_add(dgate_ptr + head * CHANNELS + channel, dw, sem="relaxed")
            dx += dlogit * w
        tl.store(dh_ptr + first, dx)


# ---------------------------------------------------------------------------
# Block: the two halves
# ---------------------------------------------------------------------------


def fused_block(block: Any, x: Tensor, ve: tuple[Tensor, Tensor] | None, rotary: Tensor) -> Tensor:
    """Return what Block.forward in train_cuda.py returns."""
    attn = block.attn
    table, idx = ve or (None, None)
    h = F.rms_norm(x, (x.shape[-1],), eps=1e-6)
    y = fused_attention(h, attn.qkv, rotary, attn.window, attn.gate, table, idx)
    return fused_mlp(x, y, attn.proj, block.mlp.fc, block.mlp.proj)


def fused_attention(
    h: Tensor,
    qkv: Tensor,
    rotary: Tensor,
    window: int,
    gate: Tensor | None = None,
    table: Tensor | None = None,
    idx: Tensor | None = None,
) -> Tensor:
    """Return the attention of q, k, v = h @ qkv.T, q and k rotated and normalised, over `window` positions.

    h: bfloat16 [B, T, D]; qkv: [3, D, D] of any dtype; rotary: float32 [T, head_dim], cosines and sines in
    turn. To v is added, for each head, 2 sigmoid(h[..., :C] @ gate.T) times its part of table[idx]; gate:
    float32 [heads, C], C a power of two; table: bfloat16 [V, D]; idx: int64 [B, T]. Returns bfloat16 [B, T,
    D].
    """
    head_dim = rotary.shape[1]
    # The kernel reads a row of angles for each row of h. All blocks make the same: compiled, it is made once.
    angles = rotary.half().repeat(len(h), 1)
    return attention_forward(h, alternate(qkv, head_dim).to(h.dtype), angles, window, gate, table, idx)[0]


def alternate(qkv: Tensor, head_dim: int) -> Tensor:
    """Return [3, D, D] as [3 D, D], the halves of each head of q and k in turn.

    norm_rotary rotates neighbours.
    """
    D = qkv.shape[1]
    qk, v = qkv.flatten(0, 1).split([2 * D, D])
    return torch.cat([qk.view(-1, 2, head_dim // 2, D).transpose(1, 2).reshape(2 * D, D), v])


@torch.library.custom_op("autoresearch::attention_forward", mutates_args=())
def attention_forward(
    h: Tensor,
    w: Tensor,
    rotary: Tensor,
    window: int,
    gate: Tensor | None,
    table: Tensor | None,
    idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result of fused_attention, and for the backward pass (qk, rstd, v, lse).

    w: qkv after `alternate`, in the dtype of h; rotary: float16 [B * T, head_dim].
    """
    B, T, D = h.shape
    head_dim = rotary.shape[1]
    h = h.flatten(0, 1)
    qk, rstd = product("norm_rotary", h, w[: 2 * D], x=rotary)
    if gate is None or table is None or idx is None:
        v = h @ w[2 * D :].T
    else:
        gated = torch.empty_like(h)
        sizes = {"HEADS": len(gate), "HEAD_DIM": head_dim, "CHANNELS": gate.shape[1]}
        by_rows(gated_kernel, h, gate, table, idx.contiguous(), gated, **sizes)
        v = product("add_value", h, w[2 * D :], gated)
    q, k = qk.view(B, T, 2, -1, head_dim).unbind(2)
    out, lse = flash4_forward(q, k, v.view(q.shape), window)
    return out.view(B, T, D), qk, rstd, v, lse


@attention_forward.register_fake
def _(h, w, rotary, window, gate, table, idx):
    B, T, D = h.shape
    heads = D // rotary.shape[1]
    qk = h.new_empty(B * T, 2 * D)
    v = h.new_empty(B * T, D)
    return torch.empty_like(h), qk, floats(h, B * T, 2 * heads), v, floats(h, B, heads, T)


@torch.library.custom_op("autoresearch::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    h: Tensor,
    w: Tensor,
    rotary: Tensor,
    gate: Tensor | None,
    table: Tensor | None,
    idx: Tensor | None,
    out: Tensor,
    qk: Tensor,
    rstd: Tensor,
    v: Tensor,
    lse: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (h, w, gate, table); the last two are empty without a gate."""
    B, T, D = h.shape
    head_dim = rotary.shape[1]
    h = h.flatten(0, 1)
    q, k = qk.view(B, T, 2, -1, head_dim).unbind(2)
    dqkv = flash4_backward(q, k, v.view(q.shape), out.view(q.shape), lse, dout.view(q.shape), window)
    dqkv = dqkv.view(B * T, 3 * D)
    by_rows(
        norm_rotary_backward_kernel, dqkv, qk, rstd, rotary, T, HEADS=2 * D // head_dim, HEAD_DIM=head_dim
    )
    dh = dqkv @ w
    if gate is None or table is None or idx is None:
        return dh.view(B, T, D), dqkv.T @ h, floats(h, 0), floats(h, 0)
    dgate = torch.zeros_like(gate)
    dtable = torch.zeros_like(table, dtype=torch.float32)
    sizes = {"HEADS": len(gate), "HEAD_DIM": head_dim, "CHANNELS": gate.shape[1]}
    by_rows(gated_backward_kernel, dqkv, h, gate, table, idx.contiguous(), dh, dgate, dtable, **sizes)
    return dh.view(B, T, D), dqkv.T @ h, dgate, dtable.to(table.dtype)


@attention_backward.register_fake
def _(dout, h, w, rotary, gate, table, idx, *rest):
    return tuple(floats(h, 0) if t is None else torch.empty_like(t) for t in (h, w, gate, table))


def keep_for_attention(ctx, inputs, output):
    h, w, rotary, ctx.window, *gated = inputs
    ctx.save_for_backward(h, w, rotary, *gated, *output)


def differentiate_attention(ctx, dout, *_):
    dh, dw, dgate, dtable = attention_backward(dout, *ctx.saved_tensors, ctx.window)
    if not ctx.needs_input_grad[4]:  # no gate
        return dh, dw, *[None] * 5
    return dh, dw, None, None, dgate, dtable, None


attention_forward.register_autograd(differentiate_attention, setup_context=keep_for_attention)


def fused_mlp(residual: Tensor, y: Tensor, out: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    """Return x + relu(norm(x) @ fc.T)^2 @ proj.T, where x = residual + y @ out.T.

    residual, y: bfloat16 [B, T, D], and so is the result; out [D, D], fc [4 D, D], proj [D, 4 D]: of any
    dtype. norm(x) is x times a number for each row: it is never stored, the number is applied to the product.
    Of the hidden layer only the squares are stored.
    """
    return mlp_forward(residual, y, out.to(y.dtype), fc.to(y.dtype), proj.to(y.dtype))[0]


@torch.library.custom_op("autoresearch::mlp_forward", mutates_args=())
def mlp_forward(
    residual: Tensor, y: Tensor, out: Tensor, fc: Tensor, proj: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result of fused_mlp, and for the backward pass (x, rstd, squares)."""
    x, sum_of_squares = product("add_squares", y.flatten(0, 1), out, residual.flatten(0, 1))
    rstd = torch.rsqrt(sum_of_squares / x.shape[1] + 1e-6)
    squares = product("relu_squared", x, fc, scale=rstd)
    return product("add", squares, proj, x).view(y.shape), x, rstd, squares


@mlp_forward.register_fake
def _(residual, y, out, fc, proj):
    B, T, D = y.shape
    return torch.empty_like(y), y.new_empty(B * T, D), floats(y, B * T), y.new_empty(B * T, len(fc))


@torch.library.custom_op("autoresearch::mlp_backward", mutates_args=())
def mlp_backward(
    d: Tensor, y: Tensor, x: Tensor, rstd: Tensor, squares: Tensor, out: Tensor, fc: Tensor, proj: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (residual, y, out, fc, proj) from d, that of the result.

    The backward pass of the norm takes sum(d norm(x) * norm(x)) out of each row. That is the sum of dz * z
    over the hidden layer, and so known before the product that gives d norm(x).
    """
    shape = y.shape
    d = d.flatten(0, 1)
    y = y.flatten(0, 1)
    dz, dots = product("relu_squared_backward", d, proj.T, scale=rstd, x=squares)  # dz times rstd
    share = dots * rstd.square() / x.shape[1]
    dx = product("add_norm_backward", dz, fc.T, d, share, x)
    return dx.view(shape), (dx @ out).view(shape), dx.T @ y, dz.T @ x, d.T @ squares


@mlp_backward.register_fake
def _(d, y, x, rstd, squares, out, fc, proj):
    return tuple(torch.empty_like(t) for t in (y, y, out, fc, proj))


def keep_for_mlp(ctx, inputs, output):
    _, y, *weights = inputs
    ctx.save_for_backward(y, *output[1:], *weights)


def differentiate_mlp(ctx, d, *_):
    return mlp_backward(d, *ctx.saved_tensors)


mlp_forward.register_autograd(differentiate_mlp, setup_context=keep_for_mlp)


# ---------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------


def fused_loss_chunk(
    x: Tensor, w: Tensor, targets: Tensor, count: int, dx: Tensor, dw: Tensor, softcap: float
) -> Tensor:
    """Return what loss_chunk in train_cuda.py returns, and write its gradients to dx and dw as it does."""
    dlogits, total = product("softcap_exp", x, w, softcap=softcap)
    at_rows = compiled(row_dots)(x, w, targets)
    nats, at_target, share, shared = compiled(target_terms)(x, at_rows, total, count, softcap)
    dlogits[torch.arange(len(x), device=x.device), targets] = at_target
    product("scale", dlogits, w.T, scale=share, out=dx)
    product("accumulate", dlogits.T, shared.T, dw, out=dw)
    return nats


@cache
def compiled(function: Callable) -> Callable:
    """Return torch.compile of a function. It is asked for late: what compiles takes seconds to import."""
    return torch.compile(function, dynamic=False)


def row_dots(x: Tensor, w: Tensor, rows: Tensor) -> Tensor:
    """Return each x [N, D] times its row of w [V, D], float32 [N]."""
    return (x.float() * w[rows].float()).sum(dim=1)


def target_terms(
    x: Tensor, logits: Tensor, total: Tensor, count: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what target_terms in train_cuda.py returns."""
    squashed = torch.tanh(logits / softcap)
    at_target = (torch.exp(softcap * squashed) - total) * (1 - squashed.square())
    share = 1 / (total * count)
    nats = (total.log() - softcap * squashed).sum()
    return nats, at_target.to(x.dtype), share, (x * share[:, None]).to(x.dtype)


# ---------------------------------------------------------------------------
# Compiled ahead
# ---------------------------------------------------------------------------

COMPILE_WITH = ("flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi")  # packages
LONGEST_WAIT = 120  # seconds that the trainer waits; then it compiles the kernels itself


class Compiler(NamedTuple):
    """A process that compiles kernels, and what it prints."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]


running: list[Compiler] = []  # at most one, until it was waited for


def compile_ahead(head_dim: int, softcap: float) -> None:
    """Start a process that compiles the kernels of the CuTe DSL side by side, unless this machine has them.

    One after the other they take a fresh machine most of a minute. The process needs no GPU, and of the
    model only head_dim and softcap. The kernels go to the caches of quack and of FlashAttention-4 on disk,
    where the trainer finds them.
    """
    if not for_hopper() or head_dim not in HEAD_DIMS:
        return
    done = done_file(head_dim)
    if done is None or is_done(done):
        return
    major, minor = torch.cuda.get_device_capability()
    environment = {
        **os.environ,
        "QUACK_ARCH": f"{major}{minor}",
        "FLASH_ATTENTION_ARCH": f"{major}{minor}",
        "CUTE_DSL_ARCH": f"sm_{major}{minor}a",
        "FLASH_ATTENTION_NUM_SMS": str(torch.cuda.get_device_properties().multi_processor_count),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    # Not run as a script: the name of this module is part of a kernel's name in quack's cache.
    script = f"import {__name__} as kernels; kernels.compile_all({head_dim}, {softcap!r}, {str(done)!r})"
    command = [sys.executable, "-W", "ignore", "-c", script]
    log = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    running.append(Compiler(process, log))


def wait_for_kernels() -> None:
    """Wait for the process that compile_ahead started. If it failed, say so on stderr and go on."""
    while running:
        process, log = running.pop()
        try:
            code = process.wait(LONGEST_WAIT)
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"that took longer than {LONGEST_WAIT} s"
        if problem:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its forks, too
            log.seek(0)
            last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
            print(
                f"Kernels are compiled one by one, not ahead: {problem} {last}", file=sys.stderr, flush=True
            )
        process.wait()
        log.close()


def done_file(head_dim: int) -> Path | None:
    """Return the file that lists the kernels for a head_dim. It is written when all of them are compiled.

    Returns None where nothing is compiled ahead: a package is missing, or no launcher said where kernels go.
    """
    place = os.environ.get("QUACK_CACHE_DIR")
    if not place:
        return None
    try:
        versions = [version(name) for name in COMPILE_WITH]
    except PackageNotFoundError:
        return None
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    name = "-".join([f"head{head_dim}", python, *versions])
    return Path(place, f"{name}.done")


def is_done(done: Path) -> bool:
    """Return whether all kernels that a file lists are there. A cache may have been trimmed."""
    try:
        kernels = done.read_text().splitlines()
    except OSError:
        return False
    return bool(kernels) and all(map(os.path.exists, kernels))


def compile_all(head_dim: int, softcap: float, done: str) -> None:
    """Compile every kernel of the CuTe DSL, as many at a time as there are cores, and then write `done`.

    This process imports what they need and touches no GPU. Then its forks compile.
    """
    import quack.gemm_runtime.host

    flash4()
    # This asks the driver how to launch a kernel. No kernel is launched here.
    quack.gemm_runtime.host.get_max_active_clusters = lambda *size, **options: 1
    jobs = [partial(compile_flash4, window, head_dim) for window in (128, 2048)]
    jobs += [partial(compile_flash4_backward, window, head_dim) for window in (128, 2048)]
    jobs += [partial(compile_product, name, head_dim, softcap) for name in TILES]
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        for job in [pool.submit(job) for job in jobs]:
            job.result()
    places = [os.environ["QUACK_CACHE_DIR"], os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]]
    kernels = [str(path) for place in places for path in Path(place).rglob("[!.]*.o")]  # .*: being written
    new = Path(f"{done}.{os.getpid()}")
    new.write_text("\n".join(kernels))
    new.replace(done)


def compile_flash4(window: int, head_dim: int) -> None:
    """Compile FlashAttention-4 over rows of 2048 positions."""
    with FakeTensorMode():
        q = empty(1, 2048, 4, head_dim)
        run_flash4_forward(q, q, q, window)


def compile_flash4_backward(window: int, head_dim: int) -> None:
    """Compile the backward pass of FlashAttention-4 over rows of 2048 positions."""
    with FakeTensorMode():
        q = empty(1, 2048, 4, head_dim)
        run_flash4_backward(q, q, q, q, floats(q, 1, 4, 2048), q, window)


def compile_product(name: str, head_dim: int, softcap: float) -> None:
    """Compile a product of TILES."""
    with FakeTensorMode():
        product(name, **product_cases(empty, head_dim, softcap)[name])


def empty(*shape: int) -> Tensor:
    """Return a bfloat16 tensor on the GPU, a fake one in FakeTensorMode."""
    return torch.empty(*shape, dtype=torch.bfloat16, device="cuda")


def product_cases(
    tensor: Callable[..., Tensor], head_dim: int = 128, softcap: float = 15.0
) -> dict[str, dict[str, Any]]:
    """Return the operands of every product of TILES, at the shapes of a model of width 512.

    tensor: makes a bfloat16 tensor of a shape
    """
    N = 2**18  # tokens of a pass
    D = 512
    V = 8192
    C = 2**15  # tokens of a chunk of the loss
    x = tensor(N, D)
    hidden = tensor(N, 4 * D)
    logits = tensor(C, V)
    scale = tensor(N).float()
    wide = tensor(4 * D, D)
    narrow = tensor(D, 4 * D)
    square = tensor(D, D)
    head = tensor(V, D)
    dw = tensor(V, D).float()
    return {
        "add": {"a": hidden, "b": narrow, "c": x},
        "add_value": {"a": x, "b": square, "c": x},
        "add_squares": {"a": x, "b": square, "c": x},
        "relu_squared": {"a": x, "b": wide, "scale": scale},
        "relu_squared_backward": {"a": x, "b": narrow.T, "scale": scale, "x": hidden},
        "add_norm_backward": {"a": hidden, "b": wide.T, "c": x, "scale": scale, "x": x},
        "norm_rotary": {"a": x, "b": tensor(2 * D, D), "x": tensor(N, head_dim).half()},
        "softcap_exp": {"a": x[:C], "b": head, "softcap": softcap},
        "scale": {"a": logits, "b": head.T, "scale": scale[:C]},
        "accumulate": {"a": logits.T, "b": x[:C].T, "c": dw, "out": dw},
    }
