"""
Where the time of a training step goes, beside the least it could take: for each part of the network the operations and the bytes,
the time at the two ceilings measured on this machine, and the time it takes alone, forward and backward. Prints the table of
results/cpu/FLOOR.md.

    python tests/floor.py [tokens=2048] [bfloat16|float32]
"""

import math
import os
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import FELA, FELAConfig, _fft_size, _LinearCrossEntropy, causal_fir, gated_linear_attention  # noqa: E402

T = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
dtype = getattr(torch, sys.argv[2] if len(sys.argv) > 2 else 'bfloat16')
config = FELAConfig()  # the 109M shape of config/fela_109m.py
C, M, L, V = config.n_embd, config.n_modes, config.n_layer, 50304
K, size = C // config.n_head, dtype.itemsize
S_layers, L_layers = L * 3 // 4, L // 4


def seconds(f, n=5):
    times = []
    for _ in range(n + 1):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[n // 2]


def both_ways(f, *inputs):
    """-> forward and backward of f(*inputs), as a call"""
    inputs = [t.requires_grad_() for t in inputs]
    w = torch.randn_like(f(*inputs))
    return lambda: torch.autograd.grad(f(*inputs), inputs, w)


def tensor(*shape, dtype=dtype):
    return torch.randn(*shape, dtype=dtype)


def linear(n_in, n_out):
    return both_ways(F.linear, tensor(T, n_in), tensor(n_out, n_in) * 0.02)


a, b, big = tensor(2048, 2048), tensor(2048, 2048), torch.randn(1 << 27)
flops = 2 * 2048 ** 3 / min(seconds(lambda: a @ b) for _ in range(3))
bandwidth = big.nbytes / min(seconds(big.sum), seconds(big.max))
out = torch.empty_like(big)
bandwidth = max(bandwidth, 2 * big.nbytes / seconds(lambda: out.copy_(big)))
del big, out

model = FELA(config)
optimizer, = model.configure_optimizers()
idx = torch.randint(50257, (2, T))


def gradients():
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        model(idx[:1], idx[1:])[1].backward()


def update():
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def step():
    gradients()
    update()
    optimizer.zero_grad(set_to_none=True)


whole = seconds(step, 3)
gradients()
optimizer_time = seconds(update)
optimizer.zero_grad(set_to_none=True)
n, P = _fft_size(T, M), model.num_parameters()
x, taps = tensor(1, T, C), tensor(M, C, dtype=torch.float32)
gate = -1.25 * torch.rand(1, config.n_head, T, K)
q, k, v = (tensor(1, config.n_head, T, K) for _ in range(3))
h, weight = tensor(T, C), torch.randn(V, C) * 0.02
y = idx[0]
matrices = {(C, 2 * C): S_layers, (C, C): L, (C, 4 * C): L_layers, (2 * C, C): L}
projections = sum(count * seconds(linear(*shape)) for shape, count in matrices.items()) + L * seconds(linear(C, 4 * C))
rows = [  # part, operations and bytes a token, seconds
    ('projections and MLP', 6 * sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2 and p.shape[0] != M),
     L * size * 3 * 26 * C, projections),
    ('head and loss', 6 * V * C, 3 * 4 * V * size, seconds(both_ways(lambda h, w: _LinearCrossEntropy.apply(h, w, y, 50257), h, weight))),
    ('FIR, S layers', S_layers * C * (5 * 2.5 * n * math.log2(n) + 30 * n) / (n - M + 1),
     S_layers * C * 44 * 4 * n / (n - M + 1), S_layers * seconds(both_ways(causal_fir, x, taps))),
    ('GLA, L layers', L_layers * 4 * (4 * C * K + 2 * 2 * C * config.chunk_size), L_layers * C * 3 * (6 * 4 + 8 * size),
     L_layers * seconds(both_ways(lambda *t: gated_linear_attention(*t, None, config.chunk_size, -1.25)[0], q, k, v, gate))),
    ('clip and AdamW', 0, 40 * P / T, optimizer_time)]
print(f'{T:,} tokens, {str(dtype)[6:]}, {torch.get_num_threads()} threads, torch {torch.__version__}: '
      f'{flops / 1e9:,.0f} GFLOP/s in matrix products, {bandwidth / 1e9:.1f} GB/s of memory\n')
print('| part | MFLOP a token | KB a token | floor, us a token | alone, us a token | of the whole step |\n|---|---|---|---|---|---|')
total = 0.0
for name, operations, moved, taken in rows:
    floor = max(operations / flops, moved / bandwidth)
    total += floor
    print(f'| {name} | {operations / 1e6:.1f} | {moved / 1e3:,.0f} | {floor * 1e6:,.0f} | {taken / T * 1e6:,.0f} | {taken / whole:.0%} |')
rest = whole - sum(row[3] for row in rows)
print(f'| rest: norms, gates, residuals, casts of weights and gradients | | | | {rest / T * 1e6:,.0f} | {rest / whole:.0%} |')
print(f'| **the step** | | | **{total * 1e6:,.0f}** | **{whole / T * 1e6:,.0f}** ({T / whole:,.0f} tokens/s) | floor {total / whole * T:.0%} |')
