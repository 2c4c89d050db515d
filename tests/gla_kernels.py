"""
Our gated_linear_attention beside chunk_gla of flash-linear-attention (Triton), on a GPU: milliseconds, forward and forward with
backward, medians of runs in turn, and the relative error against the recurrence in fp64. Needs the package fla-core.

    python tests/gla_kernels.py [tokens=32768] [length=4096]
"""

import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import GLAMixer, gated_linear_attention  # noqa: E402

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
T = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
H, K, floor = 16, 128, GLAMixer.floor
torch.manual_seed(0)
torch.set_default_device('cuda')
start = time.perf_counter()


def ours(q, k, v, g):
    """All (B,T,H,K), as fla has them"""
    return gated_linear_attention(*(t.transpose(1, 2) for t in (q, k, v, g)), None, 64, floor)[0].transpose(1, 2)


def recurrence(q, k, v, g):
    S, out = torch.zeros(q.shape[0], H, K, K, dtype=q.dtype), []
    for q, k, v, g in zip(*(t.unbind(1) for t in (q, k, v, g))):
        S = g.exp().unsqueeze(-1) * S + k.unsqueeze(-1) * v.unsqueeze(-2)
        out.append((q.unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(out, 1)


def inputs(B, T):
    q, k, v, do = (torch.randn(B, T, H, K, dtype=torch.bfloat16) for _ in range(4))
    return [t.requires_grad_() for t in (q, k, v, floor * torch.rand(B, T, H, K))], do


def timed(f):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


arms = {'ours, eager': ours, 'ours, compiled': torch.compile(ours, dynamic=False)}
try:
    from fla.ops.gla import chunk_gla
    arms['fla chunk_gla'] = lambda *a: chunk_gla(*a, scale=1.0)[0]
except ImportError as e:
    print(f'without flash-linear-attention: {e}')
print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, B {tokens // T}, T {T}, H {H}, K V {K}, bf16, gates to {floor}')
args, do = inputs(tokens // T, T)
for f in arms.values():
    torch.autograd.grad(f(*args), args, do)  # chooses its kernels at the shape that is timed
print(f'set up in {time.perf_counter() - start:.0f} s', flush=True)
args, do = inputs(1, 1024)
expected = recurrence(*(t.detach().double().requires_grad_() for t in args))
exact = [t.detach().double().requires_grad_() for t in args]
exact = [expected.detach(), *torch.autograd.grad(recurrence(*exact), exact, do.double())]
errors = {}
for name, f in arms.items():
    out = f(*args)
    actual = [out, *torch.autograd.grad(out, args, do)]
    errors[name] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, exact)]
    print(f'{name}: errors of o dq dk dv dg {" ".join(f"{e:.1e}" for e in errors[name])}; {time.perf_counter() - start:.0f} s', flush=True)
args, do = inputs(tokens // T, T)


def forward(f):
    with torch.no_grad():
        f(*args)


def both(f):
    torch.autograd.grad(f(*args), args, do)


times = {(name, part): [] for name in arms for part in (forward, both)}
for i in range(13):
    for name, part in times:
        ms = timed(lambda: part(arms[name]))
        if i > 2:
            times[name, part].append(ms)
    print('', end='', flush=True)
for name in arms:
    print(f'{name}: forward {sorted(times[name, forward])[5]:.2f} ms, forward and backward {sorted(times[name, both])[5]:.2f} ms')
print(f'{time.perf_counter() - start:.0f} s')
