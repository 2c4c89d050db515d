"""
The two kernels beside what else there is, on a GPU: milliseconds, forward and forward with backward, medians of runs in turn, and
relative errors against fp64.
    gated_linear_attention beside chunk_gla of flash-linear-attention (Triton; without the package fla-core it is left out)
    causal_fir beside one FFT over the whole length (fla's fft_conv, or the same in torch), and torch's depthwise convolution

    python tests/kernels.py [gla,fir] [tokens=32768] [length=4096]
"""

import os
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import GLAMixer, _TritonFIR, causal_fir, gated_linear_attention  # noqa: E402

what = sys.argv[1].split(',') if len(sys.argv) > 1 else ['gla', 'fir']
tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 32768
T = int(sys.argv[3]) if len(sys.argv) > 3 else 4096
H, K, floor = 16, 128, GLAMixer.floor
C, M = H * K, 512
start = time.perf_counter()
torch.set_default_device('cuda')


def timed(f):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def compare(arms, oracle, inputs, names):
    """inputs(B, T) -> arguments, weights of the output. Times at tokens / T x T, then errors at 1 x 1,024, for which
    torch.compile starts again"""
    torch.manual_seed(0)
    args, do = inputs(tokens // T, T)
    for name, f in list(arms.items()):
        try:
            torch.autograd.grad(f(*args), args, do)  # chooses its kernels at the shape that is timed
            with torch.no_grad():
                f(*args)
        except torch.OutOfMemoryError:
            print(f'{name}: out of memory')
            del arms[name]
    print(f'set up in {time.perf_counter() - start:.0f} s', flush=True)

    def forward(f):
        with torch.no_grad():
            f(*args)

    def both(f):
        torch.autograd.grad(f(*args), args, do)

    times = {(name, part): [] for name in arms for part in (forward, both)}
    for i in range(13):
        for (name, part), found in times.items():
            if sum(found) < 3000:
                ms = timed(lambda: part(arms[name]))
                found += [ms] if i > 2 or ms > 1000 else []
    for name in arms:
        a, b = (sorted(times[name, part]) for part in (forward, both))
        print(f'{name}: forward {a[len(a) // 2]:.2f} ms, forward and backward {b[len(b) // 2]:.2f} ms')
    args, do = inputs(1, 1024)
    exact = [t.detach().double().requires_grad_() for t in args]
    out = oracle(*exact)
    exact = [out.detach(), *torch.autograd.grad(out, exact, do.double())]
    for name, f in arms.items():
        out = f(*args)
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip((out, *torch.autograd.grad(out, args, do)), exact)]
        print(f'{name}: errors of {names} {" ".join(f"{e:.1e}" for e in errors)}', flush=True)
    print(f'{time.perf_counter() - start:.0f} s\n', flush=True)


print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, {tokens // T} x {T:,} tokens, bf16')
if 'gla' in what:
    print(f'gated linear attention: H {H}, K V {K}, gates to {floor}')

    def ours(q, k, v, g):
        """All (B,T,H,K), as fla has them"""
        return gated_linear_attention(*(t.transpose(1, 2) for t in (q, k, v, g)), None, 64, floor)[0].transpose(1, 2)

    def recurrence(q, k, v, g):
        S, out = torch.zeros(q.shape[0], H, K, K, dtype=q.dtype), []
        for q, k, v, g in zip(*(t.unbind(1) for t in (q, k, v, g))):
            S = g.exp().unsqueeze(-1) * S + k.unsqueeze(-1) * v.unsqueeze(-2)
            out.append((q.unsqueeze(-2) @ S).squeeze(-2))
        return torch.stack(out, 1)

    def gla_inputs(B, T):
        q, k, v, do = (torch.randn(B, T, H, K, dtype=torch.bfloat16) for _ in range(4))
        return [t.requires_grad_() for t in (q, k, v, floor * torch.rand(B, T, H, K))], do

    arms = {'ours, eager': ours, 'ours, compiled': torch.compile(ours, dynamic=False)}
    try:
        from fla.ops.gla import chunk_gla
        arms['fla chunk_gla'] = lambda *a: chunk_gla(*a, scale=1.0)[0]
    except ImportError as e:
        print(f'without flash-linear-attention: {e}')
    compare(arms, recurrence, gla_inputs, 'o dq dk dv dg')

if 'fir' in what:
    print(f'causal FIR: {C:,} channels, {M} taps, x (B,C,T) bf16, taps fp32')

    def whole(x, taps):
        n = 2 * x.shape[2]
        return torch.fft.irfft(torch.fft.rfft(x.float(), n=n) * torch.fft.rfft(taps, n=n), n=n)[..., :x.shape[2]].to(x.dtype)

    def depthwise(x, taps):
        return F.conv1d(F.pad(x, (M - 1, 0)), taps.flip(1).unsqueeze(1).to(x.dtype), groups=C)

    def fft(x, taps):
        return causal_fir(x.transpose(1, 2), taps.t()).transpose(1, 2)

    def products(x, taps):
        return _TritonFIR.apply(None, x.transpose(0, 1), taps).transpose(0, 1)

    def direct(x, taps):
        n = 2 * x.shape[2]
        return torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(taps, n=n), n=n)[..., :x.shape[2]]

    def fir_inputs(B, T):
        x, do = torch.randn(2, B, C, T, dtype=torch.bfloat16)
        return [x.requires_grad_(), (0.05 * torch.randn(C, M)).requires_grad_()], do

    arms = {'ours, FFT': fft, 'ours, products, eager': products, 'ours, products, compiled': torch.compile(products, dynamic=False),
            'torch.fft of the whole length': whole, 'torch conv1d, depthwise': depthwise}
    try:
        from fla.modules.long_conv import fft_conv
        arms['fla fft_conv (y + x)'] = lambda x, taps: fft_conv(x, taps, None, gelu=False) - x
    except ImportError:
        pass
    compare(arms, direct, fir_inputs, 'y dx dtaps')
