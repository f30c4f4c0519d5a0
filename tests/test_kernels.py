"""The fused kernels of backends/kernels.py without a GPU: what stands in for them here is each epilogue's definition in plain
PyTorch, and Triton's interpreter. The model made of them must have the loss and the gradients of the plain one. That
they compile for the real thing needs no GPU either."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import kernels

ROOT = Path(__file__).resolve().parent.parent


def epilogue(name, a, b, c=None, scale=None, x=None, out=None, softcap=15.0):
    """kernels.product in plain PyTorch and in the operands' precision."""
    acc, column = a @ b.T, None if scale is None else scale[:, None]
    if name == "softcap_exp":
        t = torch.tanh(acc / softcap)
        z = torch.exp(softcap * t)
        return z * (1 - t * t), z.sum(dim=1)
    if name == "norm_rotary":
        heads = acc.view(len(acc), -1, x.shape[1])
        rstd = (heads.square().mean(dim=-1) + 1e-6).rsqrt()
        (even, odd), (cos, sin) = ((t[..., ::2], t[..., 1::2]) for t in (heads * rstd[..., None], x[:, None]))
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).view(acc.shape), rstd
    D, other = {
        "add": lambda: (acc + c, None),
        "add_value": lambda: (acc + c, None),
        "accumulate": lambda: (acc + c, None),
        "add_squares": lambda: (acc + c, (acc + c).square().sum(dim=1)),
        "scale": lambda: (acc * column, None),
        "relu_squared": lambda: ((acc * column).relu().square(), None),
        "relu_squared_backward": lambda: (acc * x.sqrt() * 2 * column, (acc * x * 2).sum(dim=1)),
        "add_norm_backward": lambda: (acc + c - x * column, None),
    }[name]()
    D = D if out is None else out.copy_(D)
    return D if other is None else (D, other)


def attention(q, k, v, window):
    """Attention and what its backward pass needs, on any device: (output, logarithm of the sums)."""
    T = q.shape[1]
    i, j = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)[None, :]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill((j > i) | (j <= i - window), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v).contiguous(), scores.logsumexp(dim=-1)


MODEL = """
import sys, types
from functools import partial
import torch, train_cuda
from backends import kernels
sys.path.insert(0, "tests")
from test_kernels import attention, epilogue

def flash(q, k, v, causal, window_size, return_lse):
    return attention(q, k, v, q.shape[1] if window_size[0] is None else window_size[0] + 1)
def flash_backward(q, k, v, out, dout, lse, causal, window_size_left, window_size_right, dq, dk, dv):
    window, scale = q.shape[1] if window_size_left is None else window_size_left + 1, q.shape[-1] ** -0.5
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])[None, :]
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * scale - lse[..., None]).exp().masked_fill((j > i) | (j <= i - window), 0)
    d = torch.einsum("bihd,bjhd->bhij", dout, v)
    d = weights * (d - (d * weights).sum(dim=-1, keepdim=True)) * scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", d, k)); dk.copy_(torch.einsum("bhij,bihd->bjhd", d, q)); dv.copy_(torch.einsum("bhij,bihd->bjhd", weights, dout))
module = types.ModuleType("flash_attn.cute.interface")
module.flash_attn_func, module._flash_attn_bwd = flash, flash_backward
sys.modules.update({"flash_attn": types.ModuleType("flash_attn"), "flash_attn.cute": types.ModuleType("flash_attn.cute"), "flash_attn.cute.interface": module})
kernels.product = epilogue
torch.Tensor.half = lambda self: self  # the rotary table: everything here is float32

config = train_cuda.Config(vocab_size=64, seq_len=128, n_layer=3, n_embd=128, head_dim=64, window_pattern="SL", short_window=32)
def run(fused, compile, flash=False):
    torch.manual_seed(0)
    model = train_cuda.GPT(config, "cpu", torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.ndim > 1 else 1)
    for block in model.blocks:
        block.fused = fused
        if flash:
            block.attn.attend = partial(kernels.flash4(), window=block.attn.window)
    trunk = torch.compile(model.trunk, dynamic=False, fullgraph=True) if compile else model.trunk
    tokens = torch.randint(0, 64, (3, 129))
    loss = train_cuda.linear_cross_entropy(trunk(tokens[:, :-1]), model.lm_head, tokens[:, 1:])
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}

plain = run(False, False)
kernels.available = lambda device, dtype: True  # as on Hopper
def fuses():
    model = train_cuda.GPT(config, "cpu", torch.float32)
    model.init_weights()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_cuda.fuse(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    [answer] = {block.fused for block in model.blocks}
    return answer, train_cuda.fused_softcap_exp(torch.device("cpu"), torch.float32)

for shape in ((5000, 6), (4096, 64), (300, 1)):
    t = torch.rand(shape)
    torch.testing.assert_close(kernels.row_sums(t), t.sum(dim=1))

print(*fuses())
train_cuda.fused_softcap_exp.cache_clear()
train_cuda.MLP.forward, mlp = lambda self, x: train_cuda.linear(torch.nn.functional.gelu(train_cuda.linear(x, self.fc)), self.proj), train_cuda.MLP.forward
train_cuda.softcap_exp, softcap_exp = lambda logits: (logits.exp(), logits.exp().sum(dim=1)), train_cuda.softcap_exp
print(*fuses())
train_cuda.MLP.forward, train_cuda.softcap_exp = mlp, softcap_exp
kernels.fused_mlp, fused_mlp = lambda *tensors: tensors[9], kernels.fused_mlp
print(*fuses())
kernels.fused_mlp = fused_mlp
train_cuda.Block.forward, forward = lambda self, x, ve: x, train_cuda.Block.forward
print(*fuses())
train_cuda.Block.forward = forward

for how in ((True, False), (True, True), (False, False, True)):
    for name, ours in run(*how).items():
        torch.testing.assert_close(ours, plain[name], rtol=2e-4, atol=5e-4 * float(plain[name].abs().max()), msg=lambda m: f"{name}, {how}: {m}")
"""


@pytest.mark.skipif(kernels.triton is None, reason="Triton comes with PyTorch on Linux only")
@pytest.mark.slow
def test_the_fused_model_has_the_loss_and_the_gradients_of_the_plain_one_and_a_changed_one_is_not_fused():
    done = subprocess.run([sys.executable, "-c", MODEL], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["True True", "False False", "False False", "False False"]  # as it is, changed, with a kernel that fails, with other arguments
    for reason in ("Block is not what the fused kernels compute (0.", "softcap_exp is not what", "(IndexError: tuple index out of range)", "(TypeError: "):
        assert reason in done.stderr


COMPILED = """
import os
os.environ.update(QUACK_ARCH="90", CUTE_DSL_ARCH="sm_90a", QUACK_CACHE_ENABLED="0")
from functools import partial
import torch, quack.gemm_runtime.host
from torch._subclasses.fake_tensor import FakeTensorMode
from backends import kernels
from benchmarks.gpu import product_cases

quack.gemm_runtime.host.get_max_active_clusters = lambda *size, **capability: 66  # asks the driver
here, torch.cuda.is_available, torch.cuda.get_device_capability = torch.cuda.is_available, lambda: True, lambda *device: (9, 0)
for kernel in set(kernels.epilogues(15.0).values()):
    kernel.gemm = partial(kernel.gemm, _launch=False)
torch.cuda.is_available = here
kernels.row_sums = lambda sums: sums  # of Triton, the rest is not
with FakeTensorMode():
    empty = lambda dtype: lambda *shape: torch.empty(*shape, dtype=dtype, device="cuda")
    for name, operands in product_cases(empty(torch.bfloat16), empty(torch.float32)).items():
        kernels.product(name, *operands, softcap=15.0)
        print(name)
"""


@pytest.mark.slow
def test_every_product_compiles_for_hopper():
    pytest.importorskip("quack")
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) == set(kernels.TILES), done.stderr[-2000:]


@pytest.mark.skipif(kernels.triton is None, reason="Triton comes with PyTorch on Linux only")
def test_every_triton_kernel_compiles_for_hopper():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gated = {"h": "*bf16", "gate": "*fp32", "table": "*bf16", "idx": "*i64"}
    arguments = {
        "row_sums_kernel": {"t": "*fp32", "sums": "*fp32", "N": "i32", "n": "i32"},
        "norm_rotary_backward_kernel": {"g": "*bf16", "y": "*bf16", "rstd": "*fp32", "rotary": "*fp16", "seq_len": "i32"},
        "gated_kernel": {**gated, "out": "*bf16"},
        "gated_backward_kernel": {**gated, "dqkv": "*bf16", "dh": "*bf16", "dgate": "*fp32", "dtable": "*fp32"},
    }
    constants = {"HEADS": 4, "HEAD_DIM": 128, "CHANNELS": 32, "ROWS": 16, "WIDTH": 16}
    assert {name for name in vars(kernels) if name.endswith("_kernel")} == set(arguments)
    for name, types in arguments.items():
        kernel = getattr(kernels, name)
        source = ASTSource(kernel, {n: types.get(n, "constexpr") for n in kernel.arg_names}, {n: constants[n] for n in kernel.arg_names if n in constants})
        assert kernels.triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"], name
