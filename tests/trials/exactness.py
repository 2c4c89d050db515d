"""
On a GPU: the fast paths beside slow ones. Filters and attention against fp64 on a CPU, generation against the whole forward, eager steps
beside a captured graph, compiled beside eager.

    python tests/trials/exactness.py
"""
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import FELA, FELAConfig, GLAMixer, causal_fir, gated_linear_attention, repeat_state  # noqa: E402


def error(actual, expected):
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def compare(name, f, arguments, exact, bound):
    """f of bf16 on the GPU beside f of the same numbers in fp64: outputs, and the gradients of a sum of squares"""
    results = []
    for device, dtypes in (('cuda', [torch.float32 if e else torch.bfloat16 for e in exact]), ('cpu', [torch.double] * len(exact))):
        leaves = [(a if e else a.bfloat16()).to(device, d).requires_grad_() for a, d, e in zip(arguments, dtypes, exact)]
        out = f(*leaves)
        results.append((out, *torch.autograd.grad(out.double().square().sum(), leaves)))
    errors = [error(a, b) for a, b in zip(*results)]
    print(f'{name}: ' + ', '.join(f'{e:.1e}' for e in errors), flush=True)
    assert max(errors) < bound, name


def main():
    torch.manual_seed(0)
    for B, T, C, M in ((2, 1024, 64, 512), (1, 16384, 32, 512), (3, 512, 16, 64), (2, 1000, 16, 128)):
        compare(f'FIR {(B, T, C, M)}, y dx dtaps', causal_fir, (torch.randn(B, T, C), torch.randn(M, C) / M ** 0.5), (False, True), 1e-2)
    for chunk in (64, 128, 512):
        qkv, g = torch.randn(3, 2, 2, 1024, 64), GLAMixer.floor * torch.rand(2, 2, 1024, 64) ** 8
        compare(f'GLA, chunk {chunk}, o dq dk dv dg', lambda *a: gated_linear_attention(*a, None, chunk, GLAMixer.floor)[0], (*qkv, g),
                (False, False, False, True), 1e-2)
    for pattern in ('SSSL', 'A', 'SLA'):
        torch.manual_seed(0)
        model = FELA(FELAConfig(vocab_size=261, n_layer=4, n_head=4, gla_heads=2, n_embd=256, n_modes=128, pattern=pattern)).cuda()
        idx = torch.randint(261, (2, 1300)).cuda()
        with torch.no_grad():
            whole = model(idx)[0]
        logits, state = model.prefill(idx[:, :1200])
        errors, captured = [error(logits, whole[:, 1199])], 0.0
        state = model.make_room(state, 100)
        eager, step = repeat_state(state, 1), model.capture_step(idx[:, 1200], state)
        for t in range(1200, 1300):
            logits, state = step(idx[:, t], state)
            expected, eager = model.step(idx[:, t], eager)
            errors.append(error(logits, whole[:, t]))
            captured = max(captured, (logits - expected).abs().max().item())
        print(f'{pattern}: prefill and steps {max(errors):.1e}, captured beside eager {captured:.1e}', flush=True)
        assert max(errors) < 1e-4 and captured == 0
        model.bfloat16()
        eager = copy.deepcopy(model)
        model.compile_blocks()
        with torch.no_grad():
            forward = error(model(idx[:, :1024])[0], whole[:, :1024])
        prefill = error(model.prefill(idx[:, :1024])[0], whole[:, 1023])
        print(f'{pattern} compiled in bf16: forward {forward:.1e}, prefill {prefill:.1e}', flush=True)
        assert max(forward, prefill) < 5e-2
        for rows in (1, 2, 16):  # kernels that start before the last one has written would show here
            tokens = torch.randint(261, (rows, 300), device='cuda')
            state = eager.make_room(eager.prefill(tokens[:, :100])[1], 200)
            step, states, worst = model.capture_step(tokens[:, 100], state), repeat_state(state, 1), 0.0
            for t in range(100, 300):
                expected, states = eager.step(tokens[:, t], states)
                worst = max(worst, error(step(tokens[:, t], None)[0], expected))
            print(f'{pattern} compiled and captured, {rows} rows, 200 steps beside eager ones: {worst:.1e}', flush=True)
            assert worst < 5e-2
        assert model.generate(idx[:, :64], 40, temperature=0).shape == (2, 104)


if __name__ == '__main__':
    main()
