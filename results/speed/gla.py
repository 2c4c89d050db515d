"""
On a GPU: gated_linear_attention of model.py, compiled, beside chunk_gla of flash-linear-attention (pip install flash-linear-attention),
whose kernels are hand-written. bf16, gates as GLAMixer makes them; forward, then forward and backward, in turn, median milliseconds.

    python results/speed/gla.py 16,1024,16,128 16,1024,4,512     # cases: rows, tokens, heads, width
"""
import os
import statistics
import sys

import torch
from fla.ops.gla import chunk_gla

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from model import GLAMixer, gated_linear_attention  # noqa: E402

floor = GLAMixer.floor


def ours(q, k, v, g):  # both read (B,T,H,K), as a projection leaves it
    o, _ = gated_linear_attention(*(t.transpose(1, 2) for t in (q, k, v, g)), None, 256, floor)
    return o.transpose(1, 2)


def theirs(q, k, v, g):
    return chunk_gla(q, k, v, g, scale=1.0)[0]


def milliseconds(f):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


print(torch.cuda.get_device_name(), 'torch', torch.__version__)
print('| rows x tokens, heads x width | forward, ours | fla | forward and backward, ours | fla | difference of outputs |')
for B, T, H, K in (map(int, case.split(',')) for case in sys.argv[1:] or ['16,1024,16,128']):
    torch.manual_seed(0)
    torch._dynamo.reset()
    q, k, v, do = torch.randn(4, B, T, H, K, device='cuda', dtype=torch.bfloat16).unbind(0)
    g = floor * torch.rand(B, T, H, K, device='cuda') ** 8
    leaves = [t.requires_grad_() for t in (q, k, v, g)]
    arms, results, outputs = {'ours': torch.compile(ours, dynamic=False), 'fla': theirs}, {}, {}
    for kind in ('forward', 'both'):
        def call(f):
            if kind == 'forward':
                with torch.no_grad():
                    return f(*leaves)
            torch.autograd.grad(f(*leaves), leaves, do)
        for name, f in list(arms.items()):
            try:
                for _ in range(3):
                    outputs[name] = call(f) if kind == 'forward' else call(f) or outputs[name]
            except Exception as e:  # a shape that an arm does not take is a row as well
                print(f'{name}: {" ".join(str(e).split())[:200]}')
                arms.pop(name)
        times = {name: [] for name in arms}
        for _ in range(20):
            for name, f in arms.items():
                times[name].append(milliseconds(lambda: call(f)))
        results |= {(kind, name): f'{statistics.median(t):.3f}' for name, t in times.items()}
    a, b = (outputs.get(name) for name in ('ours', 'fla'))
    error = '' if a is None or b is None else f'{((a - b).float().norm() / a.float().norm()).item():.1e}'
    cells = [results.get((kind, name), 'fails') for kind in ('forward', 'both') for name in ('ours', 'fla')]
    print(f'| {B} x {T}, {H} x {K} | ' + ' | '.join([*cells, error]) + ' |', flush=True)
