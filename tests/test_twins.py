"""The two trainers are one: the same page, logits, loss, step and training."""

import ast
import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

mx = pytest.importorskip("mlx.core")
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from prepare import ROOT  # noqa: E402

SIZE = dict(
    vocab_size=97,
    seq_len=48,
    n_layer=3,
    n_embd=64,
    head_dim=32,
    window_pattern="SL",
    short_window=16,
    value_pattern="BT",
    bigram_rows=0,
    bos=93,
)


@pytest.fixture
def trainers(house, monkeypatch):
    """Both trainers' modules, in the tiny house, computing in float32 on the CPU."""
    monkeypatch.setenv("AUTORESEARCH_PLATFORM", "mlx-cpu")
    mx.set_default_device(mx.cpu)
    return tuple(importlib.reload(importlib.import_module(name)) for name in ("train_cuda", "train_mlx"))


def config(module, **changes):
    """The Config of a trainer, in float32 unless said otherwise."""
    dtype = torch.float32 if module.__name__ == "train_cuda" else mx.float32
    return module.Config(**{**SIZE, "dtype": dtype, **changes})


def pair(trainers, seed=0, **changes):
    """A model of each with the same weights, none of them zero."""
    a, b = (module.GPT(config(module, **changes)) for module in trainers)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, p in a.named_parameters():
        scale = 1.0 if name == "wte" else 0.15
        weights[name] = (scale * rng.normal(size=p.shape)).astype(np.float32)
    assert weights.keys() == dict(tree_flatten(b.parameters())).keys()
    a.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()})
    b.update(tree_unflatten([(name, mx.array(w)) for name, w in weights.items()]))
    return a, b


def batch(seed=0, B=4):
    tokens = np.random.default_rng(seed).integers(0, SIZE["vocab_size"], (B, SIZE["seq_len"] + 1))
    return tokens[:, :-1], tokens[:, 1:]


def on_device(module, tokens):
    """(x, y) as a trainer takes them."""
    if module.__name__ == "train_cuda":
        return tuple(torch.from_numpy(np.ascontiguousarray(t)) for t in tokens)
    return tuple(mx.array(t.astype(np.int32)) for t in tokens)


def weights_of(model):
    """{name: float32 numpy} of a model of either trainer."""
    if isinstance(model, torch.nn.Module):
        return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return {name: np.array(p) for name, p in tree_flatten(model.parameters())}


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# --- the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_pattern": "L"},
        {"window_pattern": "S"},
        {"n_layer": 1},
        {"n_layer": 4},
        {"short_window": 13},
        {"bigram_rows": 64},
        {"bigram_rows": 64, "n_layer": 4},
        {"bigram_rows": 64, "n_layer": 5, "value_pattern": "G-BT"},
    ],
)
def test_logits_agree(trainers, changes):
    a, b = pair(trainers, **changes)
    x, _ = batch()
    with torch.no_grad():
        ours = a(torch.from_numpy(x)).numpy()
    assert relative(np.array(b(mx.array(x))), ours) < 1e-4


@pytest.mark.parametrize("bigram_rows", [0, 64])
def test_gradients_agree(trainers, bigram_rows):
    cuda, mlx = trainers
    a, b = pair(trainers, bigram_rows=bigram_rows)
    x, y = on_device(cuda, batch())
    cuda.linear_cross_entropy(a.trunk(x), a.lm_head, y).backward()
    x, y = on_device(mlx, batch())
    grads = nn.value_and_grad(b, lambda: mlx.linear_cross_entropy(b.trunk(x), b.lm_head, y))()[1]
    theirs = dict(tree_flatten(grads))
    for name, p in a.named_parameters():
        assert p.grad.norm() > 0 and relative(np.array(theirs[name]), p.grad) < 1e-4, name


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("rows", [1, 2, 2048, 65536, 2**20])
def test_ngrams_have_the_same_row_in_both(trainers, rows, n):
    cuda, mlx = trainers
    tokens = np.random.default_rng(1).integers(0, 65536, (8, 512))
    tokens[0] = 65535  # the largest product
    tokens[:, 100] = 7
    ours = cuda.hash_ngrams(torch.from_numpy(tokens), n, 7, rows)
    theirs = mlx.hash_ngrams(mx.array(tokens.astype(np.int32)), n, 7, rows)
    assert ours.dtype == torch.int64 and (ours.numpy() == np.array(theirs)).all()
    for row, hashed in zip(tokens.tolist(), ours.tolist(), strict=True):
        for i, found in enumerate(hashed):
            seen = row[max(0, i - n + 1) : i + 1]
            borders = [k for k, token in enumerate(seen) if token == 7]
            seen = [7] * n + seen[borders[-1] if borders else 0 :]
            total = sum(token * m for token, m in zip(seen[::-1], cuda.HASH_MULTIPLIERS[:n], strict=False))
            assert found == total % 2**32 * rows // 2**32


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("which", [0, 1], ids=["torch", "mlx"])
def test_an_ngram_never_crosses_the_border_of_a_document(trainers, which, n):
    module = trainers[which]
    bos = 7
    one, other, alone = [[3, 5, bos, 20, 21], [4, 6, bos, 20, 21], [20, 21, bos, bos, 20]]
    x, _ = on_device(module, (np.array([one, other, alone]), np.zeros((3, 5), int)))
    one, other, alone = module.hash_ngrams(x, n, bos, 2**20).tolist()
    assert one[2:] == other[2:] and one[0] != other[0] and one[1] != other[1]
    assert alone == [one[3], one[4], one[2], one[2], one[3]]  # a row begins as after BOS


@pytest.mark.parametrize("which", [0, 1], ids=["torch", "mlx"])
def test_bigrams_fill_their_table(trainers, which):
    module = trainers[which]
    tokens = np.random.default_rng(2).integers(0, 1000, (4, 65536))
    x, _ = on_device(module, (tokens, tokens))
    used = set(module.hash_ngrams(x, 2, 0, 65536).flatten().tolist())
    assert len(used) / 65536 == pytest.approx(1 - np.exp(-4), abs=0.02)  # as if drawn: 4 bigrams a row


@pytest.mark.parametrize("which", [0, 1], ids=["torch", "mlx"])
def test_bigram_tables_are_of_the_layers_without_a_row_a_token(trainers, which):
    module = trainers[which]
    none, some = (module.GPT(config(module, n_layer=4, bigram_rows=rows)) for rows in (0, 64))
    shapes = [{name: w.shape for name, w in weights_of(model).items()} for model in (none, some)]
    assert [name for name in shapes[0] if "value_embeds" in name] == [
        f"value_embeds.layer{i}" for i in (1, 3)
    ]
    assert {name: shape for name, shape in shapes[1].items() if name not in shapes[0]} == {
        "value_embeds.layer0": (64, 64),
        "value_embeds.layer2": (64, 64),
        "blocks.0.attn.gate": (2, 32),
        "blocks.2.attn.gate": (2, 32),
    }
    assert shapes[0].items() <= shapes[1].items()
    # A gate is a matrix product, a table is looked up.
    assert some.flops_per_token() - none.flops_per_token() == 6 * 2 * 2 * 32
    optimizer = module.Optimizer(some)
    assert optimizer.adamw["value_embeds.layer0"] == optimizer.adamw["value_embeds.layer1"]


def test_rotary_embeddings_agree_to_the_end_of_a_long_row(trainers):
    cuda, mlx = trainers
    a, b = (module.GPT(config(module, seq_len=2048)) for module in trainers)
    x = np.random.default_rng(2).normal(size=(1, 2048, 2, 32)).astype(np.float32)
    ours = cuda.rotate(torch.from_numpy(x), a.rotary).numpy()
    theirs = np.array(mlx.rotate(mx.array(x).swapaxes(1, 2), b._rotary).swapaxes(1, 2))
    assert relative(theirs, ours) < 1e-4 and relative(theirs[:, -8:], ours[:, -8:]) < 1e-4
    assert relative(ours[:, 1:], x[:, 1:]) > 0.1


def naive_attention(q, k, v, window):
    """Every score, in float64. q, k, v: [B, T, H, D]."""
    T = q.shape[1]
    scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    scores = np.where((j <= i) & (j > i - window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    "T, window",
    # The CPU's blocks are of 128 queries: one, two, and two with a short third.
    [
        *((48, window) for window in (1, 5, 16, 47, 48, 100)),
        *((256, window) for window in (1, 100, 128, 255, 256)),
        *((300, window) for window in (1, 5, 127, 128, 129, 299, 300, 400)),
    ],
)
def test_every_attention_path_is_the_naive_one(trainers, T, window):
    cuda, mlx = trainers
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(2, T, 3, 8)) for _ in range(3))
    expected = naive_attention(q, k, v, window)
    as_torch = [torch.from_numpy(t) for t in (q, k, v)]
    as_mlx = [mx.array(t.astype(np.float32)).swapaxes(1, 2) for t in (q, k, v)]
    ours, theirs = (
        config(module, n_layer=2, window_pattern="S", short_window=window, seq_len=T) for module in trainers
    )
    results = {
        "torch blocks": cuda.block_attention(*as_torch, window),
        "torch chosen": cuda.attention_kernel(ours, 0)(*as_torch),
        "mlx chosen": np.array(mlx.attention_kernel(theirs, 0)(*as_mlx).swapaxes(1, 2)),
        "mlx blocks": np.array(mlx.block_attention(*as_mlx, window).swapaxes(1, 2)),
    }
    if window >= T:
        results["torch sdpa"] = cuda.sdpa_attention(*as_torch)
        results["mlx sdpa"] = np.array(mlx.sdpa_attention(*as_mlx).swapaxes(1, 2))
    for name, y in results.items():
        assert relative(y, expected) < 1e-5, name


def test_the_last_layer_attends_to_the_whole_row(trainers):
    for module in trainers:
        short = config(module, n_layer=2, window_pattern="S")
        assert [short.window(layer) for layer in (0, 1)] == [16, 48]


def test_flex_attention_is_the_naive_one(trainers):
    cuda, _ = trainers
    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(1, 256, 2, 16)).astype(np.float32) for _ in range(3))
    with torch.no_grad():
        attend = cuda.flex_attention(100, 256, torch.device("cpu"))
        y = attend(*(torch.from_numpy(t) for t in (q, k, v)))
    assert relative(y, naive_attention(q, k, v, 100)) < 1e-5


def test_activations_stay_in_bfloat16(trainers, monkeypatch):
    """No silent promotion of the residual stream to float32, in either."""
    cuda, mlx = trainers
    a = cuda.GPT(config(cuda, dtype=torch.bfloat16))
    b = mlx.GPT(config(mlx, dtype=mx.bfloat16))
    a.init_weights()
    b.init_weights()
    cases = (
        (cuda, a, torch.bfloat16, torch.zeros(1, 48, dtype=torch.long)),
        (mlx, b, mx.bfloat16, mx.zeros((1, 48), mx.int32)),
    )
    for module, model, kind, tokens in cases:
        seen = watch_dtypes(module, monkeypatch)
        assert model.trunk(tokens).dtype == kind
        assert len(seen) > 10 and all(pair == (kind, kind) for pair in seen), seen
    assert a.wte.dtype == torch.bfloat16 and b.wte.dtype == mx.bfloat16
    assert a.lm_head.dtype == torch.float32 and b.blocks[0].attn.qkv.dtype == mx.float32


def watch_dtypes(module, monkeypatch):
    """A list that grows by (dtype that comes in, dtype that goes out) with each norm and linear."""
    seen = []
    honest_norm, honest_linear = module.norm, module.linear

    def norm(x):
        y = honest_norm(x)
        seen.append((x.dtype, y.dtype))
        return y

    def linear(x, weight):
        y = honest_linear(x, weight)
        seen.append((x.dtype, y.dtype))
        return y

    monkeypatch.setattr(module, "norm", norm)
    monkeypatch.setattr(module, "linear", linear)
    return seen


def test_flops_per_token_agree_and_are_the_formula(trainers):
    a, b = pair(trainers)
    assert a.flops_per_token() == b.flops_per_token()
    D, V = SIZE["n_embd"], SIZE["vocab_size"]
    matrices = 3 * 12 * D * D + 2 * (D // 32) * 32 + V * D  # gates on layers 0 and 2
    assert a.flops_per_token() == 6 * matrices + 12 * D * (16 + 48 + 48)


def test_both_score_one_model_identically(trainers, monkeypatch):
    from backends import cuda as cuda_backend
    from backends import mlx as mlx_backend

    a, b = pair(trainers)
    x, y = batch(9)
    results = []
    for backend, model in ((cuda_backend, a), (mlx_backend, b)):
        device = object.__new__(backend.Experiment.device_class)
        device.vocab_size = SIZE["vocab_size"]
        device.torch_device = torch.device("cpu")
        results.append(device.nats(model, np.concatenate([x, y[:, -1:]], axis=1)))
    assert results[0].shape == y.shape and np.abs(results[0] - results[1]).max() < 1e-4
    with torch.no_grad():
        logits = a(torch.from_numpy(x)).flatten(0, 1).double()
        expected = F.cross_entropy(logits, torch.from_numpy(y).flatten(), reduction="none")
    assert np.abs(results[0].reshape(-1) - expected.numpy()).max() < 1e-5


# The number of elements over DRAWN_SAMPLE is 3, 16 and 10: each has a factor in common with the columns.
@pytest.mark.parametrize(("rows", "columns"), [(1024, 192), (1400, 768), (640, 1024)])
def test_both_see_whether_a_model_was_drawn_with_another_seed(trainers, rows, columns):
    from backends import cuda as cuda_backend
    from backends import mlx as mlx_backend

    def torch_model(values):
        return torch.nn.ParameterDict({"w": torch.from_numpy(values), "zeros": torch.zeros(9)})

    def mlx_model(values):
        model = nn.Module()
        model.w = mx.array(values)
        model.zeros = mx.zeros(9)
        return model

    def drawn(seed):
        values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
        values[:, :-1] = 0.0  # the sample comes to every column, also to the only one that was drawn
        return values

    for backend, build in ((cuda_backend, torch_model), (mlx_backend, mlx_model)):
        device = object.__new__(backend.Experiment.device_class)
        seen = [device.drawn(build(drawn(seed))) for seed in (1, 1, 2)]
        assert seen[0] == seen[1] != seen[2] and all(seen)
        assert device.drawn(build(np.ones((rows, columns), np.float32))) == ""


# --- the loss -----------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_plain_cross_entropy(trainers, monkeypatch):
    cuda, mlx = trainers
    for module in trainers:  # several chunks, the last one short
        monkeypatch.setattr(module, "LOSS_CHUNK_CPU", 97 * 30)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4, 25, 16))
    w = rng.normal(size=(97, 16))
    y = rng.integers(0, 97, (4, 25))
    tx, tw = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (x, w))
    logits = 15 * torch.tanh(tx @ tw.T / 15)
    expected = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
    expected.backward()

    fx, fw = (torch.tensor(t, dtype=torch.float32, requires_grad=True) for t in (x, w))
    loss = cuda.linear_cross_entropy(fx, fw, torch.from_numpy(y))
    (3 * loss).backward()
    assert relative(loss.item(), expected.item()) < 1e-6
    assert relative(fx.grad / 3, tx.grad) < 1e-5 and relative(fw.grad / 3, tw.grad) < 1e-5

    def three_losses(x, w):
        return 3 * mlx.linear_cross_entropy(x, w, mx.array(y))

    value, grads = mx.value_and_grad(three_losses, argnums=(0, 1))(
        mx.array(x.astype(np.float32)), mx.array(w.astype(np.float32))
    )
    assert relative(value.item() / 3, expected.item()) < 1e-6
    assert relative(np.array(grads[0]) / 3, tx.grad) < 1e-5
    assert relative(np.array(grads[1]) / 3, tw.grad) < 1e-5


def test_the_loss_holds_as_many_logits_as_its_constant_says(trainers, monkeypatch):
    cuda, _ = trainers
    monkeypatch.setattr(cuda, "LOSS_CHUNK_CPU", 97 * 30)
    sizes = []
    honest = cuda.softcap_exp
    monkeypatch.setattr(cuda, "softcap_exp", lambda logits: sizes.append(logits.shape) or honest(logits))
    x, w = torch.randn(4, 25, 16), torch.randn(97, 16)
    cuda.linear_cross_entropy(x, w, torch.zeros(4, 25, dtype=torch.long))
    assert sizes == [(30, 97)] * 3 + [(10, 97)]


def test_the_loss_of_a_sure_prediction_is_not_negative_in_bfloat16(trainers):
    cuda, _ = trainers
    w = F.normalize(torch.randn(128, 256, generator=torch.Generator().manual_seed(6)), dim=1)
    x = (22 * w[:64, None, None]).bfloat16()
    targets = torch.arange(64).view(64, 1, 1)
    losses = [cuda.linear_cross_entropy(a, w, t).item() for a, t in zip(x, targets, strict=True)]
    assert min(losses) > -1e-5 and max(losses) < 0.01  # the sum of z holds the one that it divides


# --- the optimizer ------------------------------------------------------------------------------------------


def test_orthogonalize_makes_singular_values_one(trainers):
    cuda, mlx = trainers
    for shape in ((2, 24, 24), (3, 16, 64), (1, 64, 16)):
        g = np.random.default_rng(6).normal(size=shape).astype(np.float32)
        for u in (
            cuda.orthogonalize(torch.from_numpy(g), torch.bfloat16).float().numpy(),
            np.array(mlx.orthogonalize(mx.array(g), mx.bfloat16).astype(mx.float32)),
        ):
            values = np.linalg.svd(u, compute_uv=False)
            assert values.min() > 0.6 and values.max() < 1.3, (shape, values.min(), values.max())


def grads_like(model, seed):
    rng = np.random.default_rng(seed)
    return {name: (0.1 * rng.normal(size=p.shape)).astype(np.float32) for name, p in model.named_parameters()}


@pytest.mark.parametrize("bigram_rows", [0, 64])
def test_optimizer_steps_agree(trainers, bigram_rows):
    cuda, mlx = trainers
    a, b = pair(trainers, bigram_rows=bigram_rows)
    oa, ob = cuda.Optimizer(a), mlx.Optimizer(b)
    for step, progress in enumerate((0.0, 0.2, 0.7)):
        grads = grads_like(a, step)
        oa.step({name: torch.from_numpy(g.copy()) for name, g in grads.items()}, oa.schedule(progress))
        ob.step({name: mx.array(g) for name, g in grads.items()}, ob.schedule(progress))
    theirs = weights_of(b)
    for name, ours in weights_of(a).items():
        assert relative(theirs[name], ours) < 2e-4, name


@pytest.mark.parametrize("which", [0, 1], ids=["torch", "mlx"])
def test_the_learning_rate_rises_stays_and_falls(trainers, monkeypatch, which):
    module = trainers[which]
    for name, value in {"WARMUP_RATIO": 0.1, "WARMDOWN_RATIO": 0.6, "FINAL_LR_FRAC": 0.2}.items():
        monkeypatch.setattr(module, name, value)
    assert module.lr_scale(0.0) == 0.0
    assert module.lr_scale(0.05) == pytest.approx(0.5)
    assert module.lr_scale(0.1) == 1.0 and module.lr_scale(0.25) == 1.0 and module.lr_scale(0.4) == 1.0
    assert module.lr_scale(0.7) == pytest.approx(0.6)  # halfway from 1 to 0.2
    assert module.lr_scale(1.0) == pytest.approx(0.2)
    assert module.lr_scale(1.01) == pytest.approx(0.2) and module.lr_scale(2.0) == pytest.approx(0.2)


@pytest.mark.parametrize("which", [0, 1], ids=["torch", "mlx"])
def test_the_learning_rate_without_warmup_begins_in_full(trainers, monkeypatch, which):
    module = trainers[which]
    monkeypatch.setattr(module, "WARMUP_RATIO", 0.0)
    monkeypatch.setattr(module, "WARMDOWN_RATIO", 1.0)
    monkeypatch.setattr(module, "FINAL_LR_FRAC", 0.0)
    assert [module.lr_scale(progress) for progress in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("which", [0, 1], ids=["torch", "mlx"])
def test_momentum_rises_and_stays(trainers, which):
    module = trainers[which]
    assert module.muon_momentum(0.0) == pytest.approx(0.85)
    assert module.muon_momentum(module.MOMENTUM_RATIO / 2) == pytest.approx(0.90)
    for progress in (module.MOMENTUM_RATIO, 0.9, 1.0, 1.5):
        assert module.muon_momentum(progress) == pytest.approx(0.95)


@pytest.mark.parametrize("which", [0, 1], ids=["torch", "mlx"])
def test_schedules_do_not_jump(trainers, which):
    module = trainers[which]
    steps = 10_000
    progress = [1.1 * i / steps for i in range(steps + 1)]
    steepest = max(1 / module.WARMUP_RATIO, 1 / module.WARMDOWN_RATIO)
    for schedule, slope in ((module.lr_scale, steepest), (module.muon_momentum, 0.1 / module.MOMENTUM_RATIO)):
        values = [schedule(p) for p in progress]
        jump = max(abs(b - a) for a, b in zip(values, values[1:], strict=False))
        assert jump < 1.01 * slope * 1.1 / steps
        assert min(values) >= 0 and max(values) <= 1


@pytest.mark.parametrize("which", [0, 1], ids=["torch", "mlx"])
def test_a_step_is_given_rate_momentum_and_decay(trainers, which):
    module = trainers[which]
    for progress in (0.0, 0.02, 0.5, 1.0):
        values = [value.item() for value in module.Optimizer.schedule(progress)]
        expected = module.lr_scale(progress), module.muon_momentum(progress), 0.2 * (1 - progress)
        assert values == pytest.approx(expected)


# --- training -----------------------------------------------------------------------------------------------


def two_micro_steps(trainers, monkeypatch):
    for module in trainers:
        monkeypatch.setattr(module, "DEVICE_BATCH_SIZE", 4)
        monkeypatch.setattr(module, "TOTAL_BATCH_SIZE", 8 * SIZE["seq_len"])


def train(module, train_step, steps, first=0):
    """The losses of a few steps, each on two batches."""
    losses = []
    for step in range(first, first + steps):
        batches = iter([batch(2 * step), batch(2 * step + 1)])
        loss = train_step(lambda rows, batches=batches: on_device(module, next(batches)), 0.1 * step)
        losses.append(loss.item())
    return losses


def test_what_compiles_is_not_imported_where_nothing_is_compiled():
    """It takes seconds, in each process of a run."""
    code = "import sys, train_cuda; sys.exit('torch._dynamo' in sys.modules)"
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "AUTORESEARCH_PLATFORM": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == 0


@pytest.mark.slow
def test_ten_steps_of_training_agree(trainers, monkeypatch):
    two_micro_steps(trainers, monkeypatch)
    losses = []
    for module, model in zip(trainers, pair(trainers, bigram_rows=64), strict=True):
        monkeypatch.setattr(module, "MATRIX_LR", 0.01)
        losses.append(train(module, module.make_train_step(model, module.Optimizer(model)), 10))
    ours, theirs = losses
    assert ours[-1] != ours[0]
    assert max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) < 1e-3, losses


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["torch", "mlx"])
def test_warm_up_leaves_weights_and_optimizer_as_they_were(trainers, monkeypatch, which):
    two_micro_steps(trainers, monkeypatch)
    module = trainers[which]
    fresh, warm = pair(trainers)[which], pair(trainers)[which]
    seen = []
    optimizers = []
    honest = module.Optimizer

    def dummy_batch(rows):
        seen.append(rows)
        return on_device(module, batch(99, rows))

    def optimizer_of(model):
        optimizers.append(honest(model))
        return optimizers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "Optimizer", optimizer_of)
        exp = SimpleNamespace(dummy_batch=dummy_batch, check_memory=lambda rows: None)
        train_step = module.warm_up(warm, exp)
    assert seen.count(4) == 2 * module.WARMUP_STEPS
    expected = weights_of(fresh)
    assert all((w == expected[name]).all() for name, w in weights_of(warm).items())

    [used], unused = optimizers, honest(fresh)
    states = [dict(tree_flatten(optimizer.state)) for optimizer in (used, unused)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 10
    assert all(states[0][name].tolist() == states[1][name].tolist() for name in states[0])

    # And what the returned function trains is this model, with this optimizer.
    ours = train(module, train_step, 3, first=1)
    theirs = train(module, module.make_train_step(fresh, unused), 3, first=1)
    assert ours == pytest.approx(theirs, abs=1e-5) and ours[0] != ours[-1]
    moved = weights_of(warm)
    for name, w in weights_of(fresh).items():
        assert relative(moved[name], w) < 1e-5 and not (w == expected[name]).all(), name


# --- the page -----------------------------------------------------------------------------------------------

# What only one of them has, because its framework needs it.
OWN = {
    "train_cuda.py": {
        "compiled",
        "flex_attention",
        "LinearCrossEntropy",
        "loss_chunk",
        "softcap_exp",
        "target_terms",
        "scaled",
    },
    "train_mlx.py": {"compiled_with", "one_block_later", "frobenius", "cross_entropy_and_gradients"},
}
OWN_VALUE = {"LOSS_CHUNK_GPU"}  # a constant of both, whose value differs
OWN_RESULT = {"muon_update", "adamw_update"}  # PyTorch updates in place, MLX returns what is new
SAME = {"mx.array": "Tensor", "mx.Dtype": "torch.dtype", "__call__": "forward"}


def as_torch(text):
    for theirs, ours in SAME.items():
        text = text.replace(theirs, ours)
    return text


def outline(text):
    """(section headings, {constant: value}, {function, method or field: signature}), in the file's order."""
    headings = re.findall(r"^# -+\n# (.+)\n# -+$", text, re.M)
    constants, signatures = {}, {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = as_torch(ast.unparse(node.value))
        elif isinstance(node, ast.FunctionDef) and node.name != "_":
            signatures[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            signatures[node.name] = f"class({', '.join(ast.unparse(base) for base in node.bases)})"
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    signatures[as_torch(f"{node.name}.{item.name}")] = signature(item)
                elif isinstance(item, ast.Assign | ast.AnnAssign):
                    name = ast.unparse(getattr(item, "target", None) or item.targets[0])
                    signatures[f"{node.name}.{name}"] = as_torch(ast.unparse(item))
    return headings, constants, signatures


def signature(node):
    """Parameters with order, annotations and defaults, result, and what kind of method it is."""
    kinds = [ast.unparse(d) for d in node.decorator_list]
    kinds = [kind for kind in kinds if kind in ("staticmethod", "classmethod", "property")]
    result = "" if node.name in OWN_RESULT else f" -> {ast.unparse(node.returns) if node.returns else ''}"
    return " ".join([*kinds, as_torch(f"({ast.unparse(node.args)}){result}")])


def differences(ours, theirs):
    """What is not the same in the sources of train_cuda.py and train_mlx.py, a line each."""
    headings, constants, signatures = outline(ours)
    their_headings, their_constants, their_signatures = outline(theirs)
    found = []
    if headings != their_headings:
        found.append(f"sections: {headings} and {their_headings}")
    if list(constants) != list(their_constants):
        found.append(f"constants: {list(constants)} and {list(their_constants)}")
    for name in constants.keys() & their_constants.keys() - OWN_VALUE:
        if constants[name] != their_constants[name]:
            found.append(f"{name}: {constants[name]} and {their_constants[name]}")

    def shared(signatures, own):
        return {name: text for name, text in signatures.items() if name.split(".")[0] not in own}

    left = shared(signatures, OWN["train_cuda.py"])
    right = shared(their_signatures, OWN["train_mlx.py"])
    if list(left) != list(right):
        lone = left.keys() ^ right.keys()
        found.append(f"names: {lone} in only one" if lone else f"order: {list(left)} and {list(right)}")
    for name in left.keys() & right.keys():
        if left[name] != right[name]:
            found.append(f"{name}: {left[name]} and {right[name]}")
    return found


def sources():
    return [(ROOT / name).read_text() for name in ("train_cuda.py", "train_mlx.py")]


def test_they_read_side_by_side():
    ours, theirs = sources()
    assert differences(ours, theirs) == []
    for text in (ours, theirs):
        headings, constants, signatures = outline(text)
        assert len(headings) >= 8 and len(constants) >= 30 and len(signatures) >= 50
        assert {"GPT.forward", "Optimizer.step", "Config.dtype", "warm_up", "main"} <= signatures.keys()
        assert len(text.splitlines()) < 720


def test_what_only_one_of_them_has_is_there():
    for name, text in zip(OWN, sources(), strict=True):
        assert OWN[name] <= set(outline(text)[2]), name


@pytest.mark.parametrize(
    "old, new",
    [
        ("# Loss\n", "# Losses\n"),
        ("MATRIX_LR = 0.04", "MATRIX_LR = 0.05"),
        ("VALUE_DECAY = 0.003", "VALUE_DECAYS = 0.003"),
        ("def lr_scale(progress: float)", "def lr_scale(share: float)"),
        ("def muon_momentum(progress: float)", "def muon_momentum(progress: float = 0.0)"),
        ("def micro_steps(seq_len: int)", "def micro_steps(seq_len: float)"),
        ("def warm_up(model: GPT, exp: Experiment)", "def warm_up(exp: Experiment, model: GPT)"),
        ("    def reset(self) -> None:", "    def restart(self) -> None:"),
        ("    short_window: int\n", "    short_window: float\n"),
        ("    @property\n    def n_head", "    def n_head"),
        ("def main() -> None:", "def helper() -> None:\n    pass\n\n\ndef main() -> None:"),
        ("    decay: float = 0.0\n", "    decay: float = 0.1\n"),
    ],
)
def test_any_difference_between_them_is_noticed(old, new):
    ours, theirs = sources()
    assert theirs.count(old) == 1 and ours.count(old) == 1
    assert len(differences(ours, theirs.replace(old, new))) >= 1
    assert len(differences(ours.replace(old, new), theirs)) >= 1
