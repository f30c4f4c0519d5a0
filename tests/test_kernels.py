"""
The kernels of train_cuda_kernels.py, without a GPU, against what the trainer computes.

Some tests need Triton's interpreter, and so an environment of their own from the start of the process. This
file runs itself again for them (see test_interpreted). Epilogues and FlashAttention are plain PyTorch there,
and all is in float32.
"""

import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F

import train_cuda_kernels as kernels

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = "KERNELS_ARE_INTERPRETED" in os.environ  # in the process of the suite they are not
INTERPRETER = {
    "KERNELS_ARE_INTERPRETED": "1",
    "TRITON_INTERPRET": "1",
    "AUTORESEARCH_PLATFORM": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a child")
no_child = pytest.mark.skipif(INTERPRETED, reason="runs in the suite's process")
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton comes with PyTorch on Linux only")


@no_child
@needs_triton
@pytest.mark.slow
def test_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **INTERPRETER}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert re.search(r"^[1-9]\d* passed", done.stdout, re.M), done.stdout


# --- what stands in for a Hopper GPU ------------------------------------------------------------------------


def product_in_pytorch(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    softcap: float = 0.0,
):
    """kernels.product in plain PyTorch and in the operands' precision."""
    acc = a @ b.T
    column = None if scale is None else scale[:, None]
    if name == "softcap_exp":
        t = torch.tanh(acc / softcap)
        z = torch.exp(softcap * t)
        return z * (1 - t * t), z.sum(dim=1)
    if name == "norm_rotary":
        heads = acc.view(len(acc), -1, x.shape[1])
        rstd = (heads.square().mean(dim=-1) + 1e-6).rsqrt()
        normed = heads * rstd[..., None]
        even, odd = normed[..., ::2], normed[..., 1::2]
        cos, sin = x[:, None, ::2], x[:, None, 1::2]
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return rotated.view(acc.shape), rstd
    D, sums = {
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
    return D if sums is None else (D, sums)


def seen(seq_len: int, window: int | None) -> torch.Tensor:
    """Which key (column) a query (row) sees."""
    query = torch.arange(seq_len)[:, None]
    key = torch.arange(seq_len)[None, :]
    return (key <= query) & (key > query - (window or seq_len))


def flash_attn_func(q, k, v, causal, window_size, return_lse):
    """flash-attn-4's attention: (output, logarithm of the softmax's sums)."""
    window = None if window_size[0] is None else window_size[0] + 1
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen(q.shape[1], window), -torch.inf)
    y = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
    return y.contiguous(), scores.logsumexp(dim=-1)


def flash_attn_bwd(q, k, v, out, dout, lse, causal, window_size_left, window_size_right, dq, dk, dv):
    window = None if window_size_left is None else window_size_left + 1
    scale = q.shape[-1] ** -0.5
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * scale - lse[..., None]).exp()
    weights = weights.masked_fill(~seen(q.shape[1], window), 0)
    d = torch.einsum("bihd,bjhd->bhij", dout, v)
    d = weights * (d - (d * weights).sum(dim=-1, keepdim=True)) * scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", d, k))
    dk.copy_(torch.einsum("bhij,bihd->bjhd", d, q))
    dv.copy_(torch.einsum("bhij,bihd->bjhd", weights, dout))


@pytest.fixture
def hopper(monkeypatch):
    """Have kernels.available() say yes, in float32 on the CPU. Returns the trainer's module."""
    import train_cuda

    interface = types.ModuleType("flash_attn.cute.interface")
    interface.flash_attn_func = flash_attn_func
    interface._flash_attn_bwd = flash_attn_bwd
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    monkeypatch.setattr(kernels, "available", lambda device, dtype: True)
    monkeypatch.setattr(kernels, "product", product_in_pytorch)
    monkeypatch.setattr(torch.Tensor, "half", lambda t: t)  # of the table of angles
    kernels.flash4.cache_clear()
    kernels.checked_loss.cache_clear()
    yield train_cuda
    kernels.flash4.cache_clear()
    kernels.checked_loss.cache_clear()


# --- interpreted: fused against plain -----------------------------------------------------------------------


def new_model(trainer, bigram_rows: int = 0):
    """A model whose weights are random, none of them zero."""
    config = trainer.Config(
        vocab_size=128,
        seq_len=128,
        n_layer=3,
        n_embd=128,
        head_dim=64,
        window_pattern="SL",
        short_window=32,
        value_pattern="BT",
        bigram_rows=bigram_rows,
        bos=0,
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    model = trainer.GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.ndim > 1 else 1)
    return model


def loss_and_gradients(trainer, model, trunk) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 128, (3, 129), generator=torch.Generator().manual_seed(1))
    loss = trainer.linear_cross_entropy(trunk(tokens[:, :-1]), model.lm_head, tokens[:, 1:])
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def fuse(model) -> bool:
    return kernels.fuse_blocks(model.blocks, model.wte, model.rotary)


def is_fused(trainer, loss: Callable) -> bool:
    w = torch.zeros(128, 64)
    return kernels.fuse_loss(loss, w, trainer.SOFTCAP) is not loss


@interpreted
@pytest.mark.parametrize("shape", [(5000, 6), (4096, 64), (300, 1)])
def test_row_sums_are_sums(shape: tuple[int, int]) -> None:
    t = torch.rand(shape)
    torch.testing.assert_close(kernels.row_sums(t), t.sum(dim=1))


@interpreted
@pytest.mark.parametrize("bigram_rows", [0, 64])
@pytest.mark.parametrize("how", ["fused", "fused and compiled", "flash attention"])
def test_the_fused_model_has_the_loss_and_the_gradients_of_the_plain_one(
    hopper, monkeypatch, how: str, bigram_rows: int
):
    model = new_model(hopper, bigram_rows)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "fuse_loss", lambda plain, w, softcap: plain)
        expected = loss_and_gradients(hopper, model, model.trunk)
    model = new_model(hopper, bigram_rows)
    if how == "flash attention":
        for block in model.blocks:
            block.attn.attend = partial(kernels.flash4(), window=block.attn.window)
    else:
        assert fuse(model) and is_fused(hopper, hopper.loss_chunk)
    trunk = model.trunk
    if how == "fused and compiled":
        trunk = torch.compile(trunk, dynamic=False, fullgraph=True)
    for name, ours in loss_and_gradients(hopper, model, trunk).items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(ours, expected[name], rtol=2e-4, atol=5e-4 * largest, msg=name)


@interpreted
def test_fusing_leaves_the_weights_and_the_state_dict_as_they_are(hopper, capfd):
    model = new_model(hopper)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert fuse(model) and all("forward" in vars(block) for block in model.blocks)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert is_fused(hopper, hopper.loss_chunk)
    assert capfd.readouterr().err == ""


@interpreted
def test_the_table_of_angles_is_made_once_for_all_blocks(hopper):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    model = new_model(hopper)
    fuse(model)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    trunk = torch.compile(model.trunk, dynamic=False, fullgraph=True, backend=backend)
    trunk(torch.zeros(3, 128, dtype=torch.long)).sum().backward()
    forward, _ = graphs
    calls = [str(node.target) for node in forward.graph.nodes]
    assert sum("repeat" in call for call in calls) == 1
    assert sum("attention_forward" in call for call in calls) == 3


def gelu_mlp(self, x):
    return F.gelu(x @ self.fc.T) @ self.proj.T


def without_rotary(self, x, ve):
    return x


def with_more_arguments(self, x, ve, rotary, mask=None):
    x = x + self.attn(F.rms_norm(x, x.shape[-1:], eps=1e-6), ve, rotary)
    return x + self.mlp(F.rms_norm(x, x.shape[-1:], eps=1e-6))


def fails(*arguments):
    raise IndexError("tuple index out of range")


@interpreted
@pytest.mark.parametrize(
    "owner, name, change, says",
    [
        ("MLP", "forward", gelu_mlp, "(0."),
        ("Block", "forward", without_rotary, "(TypeError: "),
        ("Block", "forward", with_more_arguments, "(TypeError: "),
        ("kernels", "fused_mlp", fails, "(IndexError: tuple index out of range)"),
        ("kernels", "fused_attention", lambda h, *rest: h * float("nan"), "(nan"),
    ],
)
def test_a_changed_block_or_a_failing_kernel_runs_plain_and_says_so(
    hopper, monkeypatch, capfd, owner: str, name: str, change: Callable, says: str
):
    monkeypatch.setattr(getattr(hopper, owner), name, change)
    model = new_model(hopper)
    assert not fuse(model) and not any("forward" in vars(block) for block in model.blocks)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("Block is not what the fused kernels compute " + says)
    assert line.endswith("it runs without them")


@interpreted
@pytest.mark.parametrize(
    "owner, name, change, says",
    [
        ("train_cuda", "softcap_exp", lambda logits: (logits.exp(), logits.exp().sum(dim=1)), "("),
        ("train_cuda", "SOFTCAP", 30.0, "("),
        ("train_cuda", "target_terms", fails, "(IndexError: "),
        ("kernels", "row_dots", fails, "(IndexError: tuple index out of range)"),
    ],
)
def test_a_changed_loss_or_a_failing_kernel_runs_plain_and_says_so(
    hopper, monkeypatch, capfd, owner: str, name: str, change, says: str
):
    softcap = hopper.SOFTCAP
    monkeypatch.setattr(hopper if owner == "train_cuda" else kernels, name, change)
    w = torch.zeros(128, 64)
    assert kernels.fuse_loss(hopper.loss_chunk, w, softcap) is hopper.loss_chunk
    assert kernels.fuse_loss(hopper.loss_chunk, w, softcap) is hopper.loss_chunk
    [line] = capfd.readouterr().err.splitlines()  # once a process
    assert line.startswith("The loss is not what the fused kernels compute " + says)
    assert line.endswith("it runs without them")


# --- without a GPU ------------------------------------------------------------------------------------------


@no_child
def test_on_the_cpu_everything_is_plain_and_nothing_is_said(capfd):
    def plain(*arguments):
        raise AssertionError("not even called")

    w = torch.zeros(128, 64, dtype=torch.bfloat16)
    assert not kernels.fuse_blocks(torch.nn.ModuleList(), w, torch.zeros(128, 64))
    assert kernels.fuse_loss(plain, w, 15.0) is plain
    assert capfd.readouterr().err == ""


# --- compiled beside the trainer, for Hopper ---------------------------------------------------------------


PRETEND = """
import os, sys, types
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: (9, 0)
torch.cuda.get_device_properties = lambda *device: types.SimpleNamespace(multi_processor_count=132)
import train_cuda_kernels as kernels
"""


def pretend(script: str, place: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that takes itself to have a Hopper GPU and keeps its kernels in `place`."""
    environment = {
        **os.environ,
        "QUACK_CACHE_DIR": str(place / "quack"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(place / "flash4"),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        **more,
    }
    command = [sys.executable, "-W", "ignore", "-c", PRETEND + script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def compiled_in(place: Path) -> set[Path]:
    return {path.relative_to(place) for path in place.rglob("*.o")}


@no_child
@needs_triton
@pytest.mark.slow
def test_triton_kernels_are_compiled_by_forks_that_end_before_the_training(tmp_path: Path) -> None:
    script = """
import psutil
import torch._inductor.async_compile as torch_compile
torch_compile.caching_device_properties = lambda: None  # there are none
kernels.compile_ahead = lambda *sizes: None
kernels.start_compilers(128, 15.0)
pool = torch_compile.AsyncCompile.process_pool()
assert pool._mp_context.get_start_method() == "fork"
assert pool.submit(os.getppid).result(timeout=120) == os.getpid()
torch_compile.AsyncCompile.wait_pool_ready()
assert torch_compile.AsyncCompile.use_process_pool()
kernels.stop_compilers()
assert not psutil.Process().children(recursive=True)
"""
    assert pretend(script, tmp_path, TORCHINDUCTOR_WORKER_START="fork").stderr == ""


@no_child
@needs_triton
@pytest.mark.slow
def test_a_machine_that_does_not_fork_compiles_one_by_one(tmp_path: Path) -> None:
    script = """
import torch._inductor.async_compile as torch_compile
def refuse():
    raise BlockingIOError("Resource temporarily unavailable")
torch_compile.caching_device_properties = lambda: None
kernels.compile_ahead = lambda *sizes: None
os.fork = refuse
kernels.start_compilers(128, 15.0)
assert not torch_compile.AsyncCompile.use_process_pool()
kernels.stop_compilers()
"""
    said = pretend(script, tmp_path, TORCHINDUCTOR_WORKER_START="fork").stderr
    assert said == "Triton's kernels are compiled one by one: Resource temporarily unavailable\n"


ASK_FOR_ALL = """
from torch._subclasses.fake_tensor import FakeTensorMode
import quack.gemm_runtime.host
torch.cuda.is_available = lambda: False  # it would be asked for what it cannot say
quack.gemm_runtime.host.get_max_active_clusters = lambda *size, **options: 1
run = lambda operation, *operands: operation._init_fn(*operands)  # not what says the shapes of its results
with FakeTensorMode():
    B, T, D, heads, V = 3, 1024, 640, 5, 1024
    h, residual, dout = (kernels.empty(B, T, D) for _ in range(3))
    out, fc, proj = kernels.empty(D, D), kernels.empty(4 * D, D), kernels.empty(D, 4 * D)
    w, angles = kernels.empty(3 * D, D), kernels.empty(B * T, 128).half()
    gated = kernels.floats(h, heads, 32), kernels.empty(V, D), kernels.empty(B, T).long()
    for window, gate in ((200, gated), (1024, (None, None, None))):
        run(kernels.attention_forward, h, w, angles, window, *gate)
        kept = kernels.attention_forward(h, w, angles, window, *gate)
        run(kernels.attention_backward, dout, h, w, angles, *gate, *kept, window)
    run(kernels.mlp_forward, residual, h, out, fc, proj)
    _, *kept = kernels.mlp_forward(residual, h, out, fc, proj)
    run(kernels.mlp_backward, dout, h, *kept, out, fc, proj)
    x, head, targets = h.flatten(0, 1)[:1024], kernels.empty(V, D), kernels.empty(1024).long()
    kernels.compiled = lambda function: function
    kernels.fused_loss_chunk(x, head, targets, 1024, kernels.empty(1024, D), kernels.floats(h, V, D), 15.0)
"""


@no_child
@needs_triton
@pytest.mark.slow
def test_all_that_a_trainer_asks_for_is_compiled_ahead(tmp_path: Path) -> None:
    """Another model, through the functions that the trainer calls, finds each of its kernels."""
    pytest.importorskip("flash_attn.cute.interface")
    assert pretend("kernels.compile_ahead(128, 15.0); kernels.stop_compilers()", tmp_path).stderr == ""
    ahead = compiled_in(tmp_path)
    products = {path for path in ahead if path.parts[0] == "quack"}
    assert len(products) == len(kernels.TILES)
    assert {path.parts[-2] for path in ahead - products} == {"fwd", "bwd", "bwd_pre", "bwd_post"}

    target = {"QUACK_ARCH": "90", "FLASH_ATTENTION_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a"}
    flash = {"FLASH_ATTENTION_NUM_SMS": "132", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}
    pretend(ASK_FOR_ALL, tmp_path, **target, **flash)
    assert compiled_in(tmp_path) == ahead

    pretend("kernels.compile_ahead(128, 30.0); assert not kernels.running", tmp_path)
    pretend("kernels.compile_ahead(96, 15.0); assert not kernels.running", tmp_path)
    (tmp_path / products.pop()).unlink()  # the cache was trimmed
    again = "kernels.LONGEST_WAIT = 0; kernels.compile_ahead(128, 15.0); assert kernels.running"
    pretend(f"{again}; kernels.stop_compilers()", tmp_path)


@no_child
@pytest.mark.parametrize(
    "ends, says",
    [
        ("sys.exit('no such kernel')", "exit code 1 no such kernel"),
        ("os.kill(os.getpid(), 9)", "exit code -9 "),
        ("time.sleep(60)", "that took longer than 1 s "),
    ],
)
def test_a_compiler_that_fails_ends_with_its_forks_and_is_no_error(
    monkeypatch, capfd, tmp_path: Path, ends: str, says: str
) -> None:
    script = f"""
import os, sys, time
fork = os.fork()
if not fork:
    time.sleep(60)
open("fork", "w").write(str(fork))
{ends}
"""
    monkeypatch.setattr(kernels, "LONGEST_WAIT", 1 if "sleep(60)" in ends else 60)
    with open(tmp_path / "log", "w+b") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
        monkeypatch.setattr(kernels, "running", [kernels.Compiler(process, log)])
        kernels.stop_compilers()
    assert capfd.readouterr().err == f"Kernels are compiled one by one, not ahead: {says}\n"
    assert process.returncode is not None and not kernels.running
    fork = int((tmp_path / "fork").read_text())
    assert ends_soon(fork)


def ends_soon(pid: int) -> bool:
    """Whether a process is gone within ten seconds, or waits only for the one that adopted it."""
    with suppress(psutil.NoSuchProcess):
        for _ in range(1000):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.01)
        return False
    return True


GATED = {"h_ptr": "*bf16", "gate_ptr": "*fp32", "table_ptr": "*bf16", "idx_ptr": "*i64"}
ARGUMENTS = {
    "row_sums_kernel": {"values_ptr": "*fp32", "sums_ptr": "*fp32", "N": "i32", "n": "i32"},
    "norm_rotary_backward_kernel": {
        "dqkv_ptr": "*bf16",
        "qk_ptr": "*bf16",
        "rstd_ptr": "*fp32",
        "rotary_ptr": "*fp16",
        "seq_len": "i32",
    },
    "gated_kernel": {**GATED, "out_ptr": "*bf16"},
    "gated_backward_kernel": {
        **GATED,
        "dqkv_ptr": "*bf16",
        "dh_ptr": "*bf16",
        "dgate_ptr": "*fp32",
        "dtable_ptr": "*fp32",
    },
}
CONSTANTS = {"HEADS": 4, "HEAD_DIM": 128, "CHANNELS": 32, "ROWS": 16, "WIDTH": 16}


@no_child
@needs_triton
def test_every_triton_kernel_is_among_those_compiled_here() -> None:
    assert {name for name in vars(kernels) if name.endswith("_kernel")} == set(ARGUMENTS)


@no_child
@needs_triton
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_triton_kernel_compiles_for_hopper(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    signature = {n: ARGUMENTS[name].get(n, "constexpr") for n in kernel.arg_names}
    constants = {n: CONSTANTS[n] for n in kernel.arg_names if n in CONSTANTS}
    source = ASTSource(kernel, signature, constants)
    assert kernels.triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
