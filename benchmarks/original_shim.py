"""
What the original's train.py imports, over our prepared rows: rows, validation set and bytes are ours.

benchmarks/versus.py makes a copy of it import this module in place of its own prepare.py and its attention.
The environment says the rest: VERSUS_TRACK, VERSUS_BUDGET (seconds), VERSUS_SEED.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prepare
import train_cuda_kernels as kernels

TRACK = prepare.load_track(os.environ["VERSUS_TRACK"])
ROWS = prepare.Prepared(TRACK)
MAX_SEQ_LEN = ROWS.seq_len
TIME_BUDGET = float(os.environ["VERSUS_BUDGET"])
SEED = int(os.environ["VERSUS_SEED"])


def missing_attention(*arguments: Any) -> Tensor:
    """Stand for FlashAttention where there is none.

    Raises:
        SystemExit: always.
    """
    raise SystemExit("versus: FlashAttention is needed: uv sync --extra flash")


class fa3:
    """The attention of our trainer on this GPU, by the name that the original calls."""

    # Chosen here, once: a choice inside the compiled model would cut its graph at every layer.
    attend = staticmethod(kernels.flash_attention() or missing_attention)

    @staticmethod
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window_size: tuple[int, int] = (-1, 0)
    ) -> Tensor:
        """Return causal attention [B, T, H, D]. window_size[0]: tokens that it sees before its own."""
        left = window_size[0]
        return fa3.attend(q, k, v, q.shape[1] if left < 0 else left + 1)


class Tokenizer:
    """Enough of a tokenizer for train.py, which asks for its size."""

    @classmethod
    def from_directory(cls) -> "Tokenizer":
        return cls()

    def get_vocab_size(self) -> int:
        return ROWS.vocab_size


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield (x, y, epoch) for ever: int64 [B, T] on the GPU, in a new order in every epoch."""
    rows = ROWS.rows(split)
    rng = np.random.default_rng(SEED)
    host = torch.empty((B, T + 1), dtype=torch.long, pin_memory=True)
    device = torch.empty((2, B, T), dtype=torch.long, device="cuda")
    epoch = 1
    while True:
        order = rng.permutation(len(rows))
        for i in range(0, len(rows) - B + 1, B):
            picked = np.sort(order[i : i + B])
            host.copy_(torch.from_numpy(rows[picked].astype(np.int64)))
            device[0].copy_(host[:, :-1], non_blocking=True)
            device[1].copy_(host[:, 1:], non_blocking=True)
            yield device[0], device[1], epoch
        epoch += 1


@torch.no_grad()
def evaluate_bpb(model: Any, tokenizer: Tokenizer, batch_size: int) -> float:
    """Return bits per byte over the validation rows. Tokens of no bytes do not count."""
    sizes = torch.from_numpy(ROWS.token_bytes().astype(np.int64)).cuda()
    rows = ROWS.rows("val")[: TRACK.val_tokens // MAX_SEQ_LEN]
    nats = 0.0
    num_bytes = 0
    for i in range(0, len(rows), batch_size):
        batch = torch.from_numpy(rows[i : i + batch_size].astype(np.int64)).cuda()
        count = len(batch)
        filler = batch[:1].expand(batch_size - count, -1)  # one shape: nothing is compiled anew
        batch = torch.cat([batch, filler])
        x = batch[:, :-1].contiguous()
        y = batch[:, 1:].contiguous()
        losses = model(x, y, reduction="none").view(batch_size, -1)[:count].double()
        size = sizes[y[:count]]
        nats += (losses * (size > 0)).sum().item()
        num_bytes += int(size.sum().item())
    return nats / (math.log(2) * num_bytes)
