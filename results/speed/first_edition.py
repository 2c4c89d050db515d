"""
On a CPU: model.py beside that of the first edition (commit 710124b of this repository, another model of nearly the same size), the 109M
shape, arms in turn, median seconds. A case is train:ROWS:TOKENS, prefill:ROWS:TOKENS, decode:ROWS or compiled:ROWS (64 steps).

    OMP_NUM_THREADS=8 python results/speed/first_edition.py bfloat16 train:4:1024 train:1:4096 train:1:16384 prefill:1:1024 \
        prefill:1:16384 decode:1 compiled:1
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, 'first.py'), 'wb') as file:
        file.write(subprocess.check_output(['git', 'show', '710124b:model.py'], cwd=ROOT))
    sys.path.insert(0, folder)
    import first
import model as second  # noqa: E402


def case(edition, kind, rows, tokens, dtype):
    """-> what is timed"""
    heads = dict(n_head=4) if edition is first else dict(n_head=12, gla_heads=1)
    torch.manual_seed(0)
    model = edition.FELA(edition.FELAConfig(chunk_size=64 if edition is first else 128, **heads))
    x, y = torch.randint(50257, (2, rows, tokens))
    if kind == 'train':
        [optimizer] = model.configure_optimizers()

        def train():
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                loss = model(x, y)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return train
    model.to(dtype).requires_grad_(False)
    if kind == 'prefill':
        return lambda: model.prefill(x)
    state, token = model.prefill(x)[1], x[:, 0].clone()
    if kind == 'compiled':
        model.compile_step() if edition is first else model.compile_blocks()

    def decode():
        nonlocal state
        for _ in range(64):
            logits, state = model.step(token, state)
            token.copy_(logits.argmax(-1))
    return decode


for name in sys.argv[2:]:
    kind, rows, tokens = (*name.split(':'), '64')[:3]
    torch._dynamo.reset()
    arms = {edition.__name__: case(edition, kind, int(rows), int(tokens), getattr(torch, sys.argv[1])) for edition in (second, first)}
    times = {arm: [] for arm in arms}
    for turn in range(6):  # the first compiles and fills caches
        for arm, call in arms.items():
            start = time.perf_counter()
            call()
            times[arm].append(time.perf_counter() - start)
    now, then = (statistics.median(times[arm][1:]) for arm in ('model', 'first'))
    print(f'{name}: {now:.3f} s, first edition {then:.3f}, speed {then / now:.3f} of its', flush=True)
