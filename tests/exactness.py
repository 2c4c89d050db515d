"""
How exact the fast paths are at the published widths, on this machine's device: relative errors (norm of the difference over the
norm) against fp64, for filters, gated linear attention (every chunk size, gates down to the floor), and the network as it trains
and generates. The tests assert the same properties on small shapes; this one is for a GPU, where the kernels are others.

    python tests/exactness.py [fela_109m|fela_1b] [cuda|cpu] [layers=4] [fir,gla,network,steps,compiled]
"""

import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import FELA, FELAConfig, GLAMixer, _TritonFIR, causal_fir, gated_linear_attention  # noqa: E402

name = sys.argv[1] if len(sys.argv) > 1 else 'fela_109m'
device = sys.argv[2] if len(sys.argv) > 2 else 'cuda' if torch.cuda.is_available() else 'cpu'
layers = int(sys.argv[3]) if len(sys.argv) > 3 else 4
parts = sys.argv[4].split(',') if len(sys.argv) > 4 else ['fir', 'gla', 'network', 'steps', 'compiled']
shape = dict(fela_109m=dict(n_embd=768, n_head=12), fela_1b=dict(n_embd=2048, n_head=16, mlp_hidden=4416))[name]
C, H, M = shape['n_embd'], shape['n_head'], 512
start = time.perf_counter()
torch.manual_seed(0)


def error(actual, expected):
    """The largest relative error of pairs of tensors"""
    pairs = [(a.double(), b.double()) for a, b in zip(actual, expected, strict=True)]
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)


def row(what, dtype, *errors):
    print(f'| {what} | {dtype} | ' + ' | '.join(f'{e:.1e}' for e in errors) + ' |', flush=True)


def with_gradients(f, inputs, *weights):
    """-> outputs of f(*inputs), and the gradients of their weighted sum"""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return out, torch.autograd.grad(out, inputs, [w.to(o.dtype) for w, o in zip(weights, out)])


def direct(x, taps):
    """The filter in fp64 as one long product of spectra, without blocks"""
    n = x.shape[1] + M
    return torch.fft.irfft(torch.fft.rfft(x, n=n, dim=1) * torch.fft.rfft(taps, n=n, dim=0), n=n, dim=1)[:, :x.shape[1]]


def recurrence(q, k, v, g, S):
    out = []
    for q, k, v, g in zip(*(t.unbind(2) for t in (q, k, v, g))):
        S = g.exp().unsqueeze(-1) * S + k.unsqueeze(-1) * v.unsqueeze(-2)
        out.append((q.unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(out, 2), S


def products(x, taps):
    return _TritonFIR.apply(x.new_zeros(C, len(x), M), x.permute(2, 0, 1), taps.t()).permute(1, 2, 0)


print(f'{name} on {torch.cuda.get_device_name() if device == "cuda" else "a CPU"}, torch {torch.__version__}\n')
torch.set_default_device(device)
if 'fir' in parts:
    print('| filters, T = 16,384, against one fp64 FFT | dtype | y | gradients |\n|---|---|---|---|')
    x, dy, taps = torch.randn(1, 16384, C), torch.randn(1, 16384, C), torch.randn(M, C) * 0.05
    for dtype in (torch.float32, torch.bfloat16):
        inputs = x.to(dtype), taps
        expected = with_gradients(direct, [t.double() for t in inputs], dy.to(dtype))
        compiled = torch.compile(products, dynamic=False)
        for what, f in (('FFT', causal_fir), ('matrix products', products), ('matrix products, compiled', compiled)):
            if dtype == torch.bfloat16 or what == 'FFT':
                actual = with_gradients(f, inputs, dy.to(dtype))
                row(what, dtype, *map(error, actual, expected))

if 'gla' in parts:
    print('\n| gated linear attention, T = 1,024 | dtype | o and state | gradients |\n|---|---|---|---|')
    K = C // H
    q, k, v, do = (torch.randn(1, H, 1024, K) for _ in range(4))
    S, dS = torch.randn(2, 1, H, K, K)
    for gate, floor in (('random', GLAMixer.floor), ('at the floor', GLAMixer.floor), ('random', -20.0), ('at the floor', -20.0)):
        g = floor * (torch.rand(1, H, 1024, K) if gate == 'random' else torch.ones(1, H, 1024, K))
        for dtype in (torch.float32, torch.bfloat16):
            inputs = *(t.to(dtype) for t in (q, k, v)), g, S
            expected = with_gradients(recurrence, [t.double() for t in inputs], do.to(dtype), dS)
            # the gradient of a gate at e^-20 nearly vanishes beside the two terms it is the difference of: it is measured by them
            size = [g.norm() for g in expected[1]]
            size[3] += (expected[1][0] * q.double()).norm()
            errors = []
            for c in (64, 128, 256, 512, 1024):
                out, grads = with_gradients(lambda *a: gated_linear_attention(*a, c, floor), inputs, do.to(dtype), dS)
                errors.append((error(out, expected[0]), max(((a - b).norm() / n).item() for a, b, n in zip(grads, expected[1], size))))
            row(f'gates {gate}, {floor}; the worst of chunk sizes 64 to 1,024', dtype, *map(max, zip(*errors)))

print(f'\n| network, {layers} layers, 2 x 2,048 tokens | dtype | loss | gradients |\n|---|---|---|---|')
model = FELA(FELAConfig(vocab_size=50257, n_layer=layers, **shape))
idx, targets = torch.randint(50257, (2, 2, 2048))


def loss_and_gradients(dtype):
    model.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
        loss = model(idx, targets)[1]
    loss.backward()
    return [loss.detach().clone()], [p.grad.clone() for p in model.parameters()]


def worst(what, dtype, actual, expected):
    row(what, dtype, error(actual[0], expected[0]), error(actual[1], expected[1]))
    errors = {n: error([a], [b]) for (n, _), a, b in zip(model.named_parameters(), actual[1], expected[1])}
    print('the largest: ' + ', '.join(f'{n} {errors[n]:.1e}' for n in sorted(errors, key=errors.get)[:-5:-1]))


def second_run(what, first, second):
    differ = [n for (n, _), a, b in zip(model.named_parameters(), first, second) if not torch.equal(a, b)]
    print(f'a second run, {what}: gradients with other bits: {", ".join(differ) or "none"}; largest error {error(second, first):.1e}')


exact = loss_and_gradients(torch.float32)
if 'network' in parts:
    eager = loss_and_gradients(torch.bfloat16)
    worst('eager in bf16 against fp32', torch.bfloat16, eager, exact)
    again = loss_and_gradients(torch.bfloat16)
    second_run('eager', eager[1], again[1])
if 'steps' in parts:
    half = FELA(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    for dtype, m in ((torch.float32, model), (torch.bfloat16, half)):
        with torch.inference_mode():
            full = m(idx[:, :1100])[0][:, 1031:].float()
            logits, state = m.prefill(idx[:, :1032])
            steps = [logits]
            for t in range(1032, 1100):
                logits, state = m.step(idx[:, t], state)
                steps.append(logits)
            logits = torch.stack(steps[:-1], 1)
            row('prefill and 68 steps against the whole forward: logits', dtype, error([logits], [full[:, :-1]]))
    if device == 'cuda':
        many = torch.randint(50257, (64, 1532))
        for rows in (1, 2, 16, 64):  # one has kernels of its own, a filter takes 16 at once
            with torch.inference_mode():
                eager = half.prefill(many[:rows, :1032])[1]
                graph = half.capture_step(many[:rows, 1032], eager)
                torch._dynamo.reset()
                half.compile_step(rows)
                compiled = half.capture_step(many[:rows, 1032], eager)
                del half.norm_logits
                for block in half.blocks:
                    del block.step
                errors = [[], []]
                for t in range(1032, 1532):
                    expected, eager = half.step(many[:rows, t], eager)
                    for step, found in zip((graph, compiled), errors):
                        found.append(error([step(many[:rows, t])], [expected]))
                for what, found in zip(('eager', 'compiled'), errors):
                    row(f'500 {what} steps, {rows} rows, as a CUDA graph against eager steps: logits, first and worst',
                        torch.bfloat16, found[0], max(found))
if 'compiled' in parts:
    model.compile_blocks()
    for dtype in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        compiled = loss_and_gradients(dtype)
        worst('compiled against fp32', dtype, compiled, exact)
        if dtype == torch.bfloat16:
            again = loss_and_gradients(dtype)
            second_run('compiled', compiled[1], again[1])
print(f'\n{time.perf_counter() - start:.0f} s')
