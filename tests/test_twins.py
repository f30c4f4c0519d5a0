"""The two trainers are one: the same logits, the same loss, the same step, the same training."""

import ast
import importlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

mx = pytest.importorskip("mlx.core")
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

ROOT = __import__("prepare").ROOT
SIZE = dict(vocab_size=97, seq_len=48, n_layer=3, n_embd=64, head_dim=32, window_pattern="SL", short_window=16)


@pytest.fixture
def trainers(house, monkeypatch):
    """Both trainers' modules, in the tiny house, computing in float32 on the CPU."""
    monkeypatch.setenv("AUTORESEARCH_PLATFORM", "mlx-cpu")
    mx.set_default_device(mx.cpu)
    cuda, mlx = (importlib.reload(importlib.import_module(name)) for name in ("train_cuda", "train_mlx"))
    return cuda, mlx


def pair(trainers, seed=0, **changes):
    """A model of each with the same weights, none of them zero."""
    cuda, mlx = trainers
    size = {**SIZE, **changes}
    a, b = cuda.GPT(cuda.Config(**size), "cpu", torch.float32), mlx.GPT(mlx.Config(**size), mx.float32)
    rng = np.random.default_rng(seed)
    weights = {name: (rng.normal(size=p.shape) * (1.0 if name == "wte" else 0.15)).astype(np.float32) for name, p in a.named_parameters()}
    assert weights.keys() == dict(tree_flatten(b.parameters())).keys()
    a.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()})
    b.update(tree_unflatten([(name, mx.array(w)) for name, w in weights.items()]))
    return a, b


def batch(seed=0, B=4):
    tokens = np.random.default_rng(seed).integers(0, SIZE["vocab_size"], (B, SIZE["seq_len"] + 1))
    return tokens[:, :-1], tokens[:, 1:]


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("changes", [{}, {"window_pattern": "L"}, {"window_pattern": "S"}, {"n_layer": 1}, {"n_layer": 4}, {"short_window": 13}])
def test_logits_agree(trainers, changes):
    a, b = pair(trainers, **changes)
    x, _ = batch()
    with torch.no_grad():
        ours = a(torch.from_numpy(x)).numpy()
    assert relative(np.array(b(mx.array(x))), ours) < 1e-4


def naive_attention(q, k, v, window):
    """Every score, in float64. q, k, v: [B, T, H, D]."""
    T = q.shape[1]
    scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    scores = np.where((j <= i) & (j > i - window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("window", [1, 5, 16, 47, 48, 100])
def test_every_attention_path_is_the_naive_one(trainers, window):
    cuda, mlx = trainers
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(2, 48, 3, 8)) for _ in range(3))
    expected = naive_attention(q, k, v, window)
    as_torch = [torch.from_numpy(t) for t in (q, k, v)]
    as_mlx = [mx.array(t.astype(np.float32)).swapaxes(1, 2) for t in (q, k, v)]
    results = {
        "torch blocks": cuda.block_attention(*as_torch, window, block=16),
        "torch blocks, uneven": cuda.block_attention(*as_torch, window, block=20),
        "torch chosen": cuda.attention_kernel(window, 48, "cpu", torch.float32)(*as_torch),
        "mlx chosen": np.array(mlx.attention_kernel(min(window, 48), 48)(*as_mlx).swapaxes(1, 2)),
        "mlx blocks": np.array(mlx.block_attention(*as_mlx, window).swapaxes(1, 2)),
    }
    if window >= 48:
        results["torch sdpa"] = cuda.sdpa_attention(*as_torch)
    for name, y in results.items():
        assert relative(y, expected) < 1e-5, name


def test_flex_attention_is_the_naive_one(trainers):
    cuda, _ = trainers
    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(1, 256, 2, 16)).astype(np.float32) for _ in range(3))
    with torch.no_grad():
        y = cuda.flex_attention(100, 256, "cpu")(*(torch.from_numpy(t) for t in (q, k, v)))
    assert relative(y, naive_attention(q, k, v, 100)) < 1e-5


def test_loss_and_gradients_are_those_of_plain_cross_entropy(trainers, monkeypatch):
    cuda, mlx = trainers
    monkeypatch.setattr(cuda, "LOSS_CHUNK", 97 * 30)  # several chunks, the last one short
    monkeypatch.setattr(mlx, "LOSS_CHUNK", 97 * 30)
    rng = np.random.default_rng(5)
    x, w, y = rng.normal(size=(4, 25, 16)), rng.normal(size=(97, 16)), rng.integers(0, 97, (4, 25))
    tx, tw = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (x, w))
    logits = 15 * torch.tanh(tx @ tw.T / 15)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
    expected.backward()

    fx, fw = (torch.tensor(t, dtype=torch.float32, requires_grad=True) for t in (x, w))
    loss = cuda.linear_cross_entropy(fx, fw, torch.from_numpy(y))
    (3 * loss).backward()
    assert relative(loss.item(), expected.item()) < 1e-6
    assert relative(fx.grad / 3, tx.grad) < 1e-5 and relative(fw.grad / 3, tw.grad) < 1e-5

    value, grads = mx.value_and_grad(lambda a, b: 3 * mlx.linear_cross_entropy(a, b, mx.array(y)), argnums=(0, 1))(
        mx.array(x.astype(np.float32)), mx.array(w.astype(np.float32)))
    assert relative(value.item() / 3, expected.item()) < 1e-6
    assert relative(np.array(grads[0]) / 3, tx.grad) < 1e-5 and relative(np.array(grads[1]) / 3, tw.grad) < 1e-5


def test_the_loss_of_a_sure_prediction_is_not_negative_in_bfloat16(trainers):
    cuda, _ = trainers
    w = F.normalize(torch.randn(128, 256, generator=torch.Generator().manual_seed(6)), dim=1)
    x, targets = (22 * w[:64, None, None]).bfloat16(), torch.arange(64)
    losses = [cuda.linear_cross_entropy(a, w, t.view(1, 1)).item() for a, t in zip(x, targets)]
    assert -1e-5 < min(losses) and max(losses) < 0.01  # the sum of z holds the one that it divides


def test_orthogonalize_makes_singular_values_one(trainers):
    cuda, mlx = trainers
    for shape in ((2, 24, 24), (3, 16, 64), (1, 64, 16)):
        g = np.random.default_rng(6).normal(size=shape).astype(np.float32)
        for u in (cuda.orthogonalize(torch.from_numpy(g), torch.bfloat16).float().numpy(),
                  np.array(mlx.orthogonalize(mx.array(g), mx.bfloat16).astype(mx.float32))):
            values = np.linalg.svd(u, compute_uv=False)
            assert values.min() > 0.6 and values.max() < 1.3, (shape, values.min(), values.max())


def grads_like(model, seed):
    rng = np.random.default_rng(seed)
    return {name: (0.1 * rng.normal(size=p.shape)).astype(np.float32) for name, p in model.named_parameters()}


def test_optimizer_steps_agree(trainers):
    cuda, mlx = trainers
    a, b = pair(trainers)
    oa, ob = cuda.Optimizer(a), mlx.Optimizer(b)
    for step, progress in enumerate((0.0, 0.2, 0.7)):
        grads = grads_like(a, step)
        for name, p in a.named_parameters():
            p.grad = torch.from_numpy(grads[name].copy())
        oa.step(progress)
        ob.step(tree_unflatten([(n, mx.array(g)) for n, g in grads.items()]), ob.schedule(progress))
    theirs = dict(tree_flatten(b.parameters()))
    for name, p in a.named_parameters():
        assert relative(np.array(theirs[name]), p.detach().numpy()) < 2e-4, name


@pytest.mark.slow
def test_ten_steps_of_training_agree(trainers, monkeypatch):
    cuda, mlx = trainers
    for module in trainers:
        monkeypatch.setattr(module, "DEVICE_BATCH_SIZE", 4)
        monkeypatch.setattr(module, "TOTAL_BATCH_SIZE", 8 * SIZE["seq_len"])  # two micro-steps
        monkeypatch.setattr(module, "MATRIX_LR", 0.01)
    a, b = pair(trainers)
    oa, ob = cuda.Optimizer(a), mlx.Optimizer(b)
    step_b, losses = mlx.make_train_step(b, ob), []
    for step in range(10):
        batches = [batch(2 * step), batch(2 * step + 1)]
        next_a, next_b = iter(batches), iter(batches)
        loss_a = cuda.train_step(a, a.trunk, oa, lambda n: tuple(map(torch.from_numpy, next(next_a))), step / 10)
        loss_b = step_b(lambda n: tuple(mx.array(t.astype(np.int32)) for t in next(next_b)), step / 10)
        losses.append((float(loss_a), loss_b.item()))
    assert losses[-1][0] != losses[0][0]
    assert max(abs(x - y) for x, y in losses) < 1e-3, losses


def test_activations_stay_in_bfloat16(trainers, monkeypatch):
    """No silent promotion of the residual stream to float32, in either."""
    cuda, mlx = trainers
    a, b = cuda.GPT(cuda.Config(**SIZE), "cpu", torch.bfloat16), mlx.GPT(mlx.Config(**SIZE), mx.bfloat16)
    a.init_weights()
    b.init_weights()
    for module, model, kind, tokens in ((cuda, a, torch.bfloat16, torch.zeros(1, 48, dtype=torch.long)), (mlx, b, mx.bfloat16, mx.zeros((1, 48), mx.int32))):
        seen, honest_norm, honest_linear = [], module.norm, module.linear
        monkeypatch.setattr(module, "norm", lambda x, f=honest_norm: seen.append((x.dtype, f(x).dtype)) or f(x))
        monkeypatch.setattr(module, "linear", lambda x, w, f=honest_linear: seen.append((x.dtype, f(x, w).dtype)) or f(x, w))
        assert model.trunk(tokens).dtype == kind
        assert len(seen) > 10 and all(pair == (kind, kind) for pair in seen), seen
    assert a.wte.dtype == torch.bfloat16 and b.wte.dtype == mx.bfloat16
    assert a.lm_head.dtype == torch.float32 and b.blocks[0].attn.qkv.dtype == mx.float32


def test_both_score_one_model_identically(trainers, monkeypatch):
    from backends import cuda as cuda_backend
    from backends import mlx as mlx_backend

    a, b = pair(trainers)
    x, y = batch(9)
    results = []
    for backend, model in ((cuda_backend, a), (mlx_backend, b)):
        exp = object.__new__(backend.Experiment)
        exp.track = type("T", (), {"vocab_size": SIZE["vocab_size"]})
        exp.torch_device, exp._events = torch.device("cpu"), None
        results.append(exp._nats(model, x, y))
    assert results[0].shape == y.shape and np.abs(results[0] - results[1]).max() < 1e-4
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(a(torch.from_numpy(x)).flatten(0, 1).double(), torch.from_numpy(y).flatten(), reduction="none")
    assert np.abs(results[0].reshape(-1) - expected.numpy()).max() < 1e-5


def test_flops_per_token_agree_and_are_the_formula(trainers):
    a, b = pair(trainers)
    assert a.flops_per_token() == b.flops_per_token()
    D, V = SIZE["n_embd"], SIZE["vocab_size"]
    matrices = 3 * 12 * D * D + 2 * (D // 32) * 32 + V * D  # gates on layers 0 and 2
    assert a.flops_per_token() == 6 * matrices + 12 * D * (16 + 48 + 48)


def outline(name):
    """Section headings, constants with their values, and top-level names of a trainer."""
    text = (ROOT / name).read_text()
    headings = re.findall(r"^# -+\n# (.+)\n# -+$", text, re.M)
    constants = dict(re.findall(r"^([A-Z][A-Z_0-9]+) = (.+?)(?:\s+#.*)?$", text, re.M))
    return headings, constants, {n.name for n in ast.parse(text).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}


def test_they_read_side_by_side():
    (ours, ours_constants, ours_names), (theirs, theirs_constants, theirs_names) = outline("train_cuda.py"), outline("train_mlx.py")
    assert ours == theirs
    assert ours_constants.keys() == theirs_constants.keys()
    assert {k for k in ours_constants if ours_constants[k] != theirs_constants[k]} <= {"LOSS_CHUNK"}
    assert {"GPT", "Attention", "MLP", "Block", "Config", "Optimizer", "build_model", "main", "warm_up", "attention_kernel"} <= ours_names & theirs_names
    assert max(len((ROOT / n).read_text().splitlines()) for n in ("train_cuda.py", "train_mlx.py")) < 700
