"""
Trains arms (settings of the model) one after the other for equal steps, on the same text in the same order, and compares them: what
FELA learns beside softmax attention at equal parameters, tokens and optimizer, each at its own learning rate.

    python tests/trials/learn.py data/machine_python --arms='FELA:lr=3e-3;A:pattern=A,lr=1.5e-3'
    python tests/trials/learn.py data/books --arms='FELA:lr=3e-3;A:pattern=A,lr=3e-3' --out=arms.jsonl

An arm is NAME:key=value,... of FELAConfig, and lr. The MLP of an arm is as wide as makes it as large as --parameters. Bits are of tokens.
Classes of validation tokens: `new`, the 7 tokens (3 of GPT-2) that end with it are new in the window; `near`, they stood there at most
256 tokens ago; `far`, only before that. `beyond`: the last T tokens of windows four times as long as those trained on, and `own`: the
same tokens as windows of their own.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import FELA, FELAConfig  # noqa: E402
from prepare import TokenData, get_tokenizer  # noqa: E402

cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
cli.add_argument('data', help='a folder made by prepare.py')
cli.add_argument('--arms', default='FELA:lr=3e-3;A:pattern=A,lr=1.5e-3')
cli.add_argument('--out', default='arms.jsonl', help='a line for each arm is appended')
cli.add_argument('--steps', type=int, default=1000)
cli.add_argument('--T', type=int, default=2048)
cli.add_argument('--rows', type=int, default=16, help='a step')
cli.add_argument('--warmup', type=int, default=60)
cli.add_argument('--n_embd', type=int, default=768)
cli.add_argument('--n_layer', type=int, default=12)
cli.add_argument('--mlp_hidden', type=int, default=1536, help='of an arm of three S and one L, to which others are made equal')
cli.add_argument('--windows', type=int, default=128, help='of validation')
args = cli.parse_args()
device = 'cuda' if torch.cuda.is_available() else 'cpu'
torch.set_float32_matmul_precision('high')
autocast = torch.autocast(device, torch.bfloat16, enabled=device == 'cuda')
train, val, T = TokenData(args.data, 'train', args.T, 1337), TokenData(args.data, 'val', args.T), args.T
tokenizer = get_tokenizer(train.meta['tokenizer'])
starts = np.linspace(0, len(val.tokens) - T - 2, args.windows).astype(np.int64)
text = np.stack([val.tokens[s:s + T + 1] for s in starts]).astype(np.int64)


def classes(x, n, far=256):
    """x (T+1,) -> (T,): 0 new, 1 near, 2 far"""
    grams = [x[i - n + 1:i + 1].tobytes() for i in range(n - 1, T + 1)]
    last, out = {}, np.zeros(T, np.int64)
    for i, gram in enumerate(grams):
        out[i + n - 2] = 0 if gram not in last else 1 if i - last[gram] <= far else 2
        last[gram] = i
    return out


kinds = np.stack([classes(x, 7 if tokenizer.name == 'bytes' else 3) for x in text])


@torch.no_grad()
def bits(model, windows):
    """(n,T'+1) -> (n,T') bits"""
    with autocast:
        parts = [model(part[:, :-1], part[:, 1:], reduction='none')[1].float().cpu()
                 for part in torch.from_numpy(windows).to(device).split(args.rows if windows.shape[1] == T + 1 else 1)]
    return torch.cat(parts).numpy() / math.log(2)


def build(knobs, hidden):
    return FELA(FELAConfig(**{**dict(vocab_size=tokenizer.vocab_size, n_layer=args.n_layer, n_embd=args.n_embd, chunk_size=256,
                                     n_head=max(1, args.n_embd // 64), mlp_hidden=hidden), **knobs}))


def run(name, knobs):
    lr = float(knobs.pop('lr', 3e-3))
    knobs = {k: v if k == 'pattern' else int(v) for k, v in knobs.items()}
    with torch.device('meta'):
        excess = build(knobs, args.mlp_hidden).num_parameters() - build({}, args.mlp_hidden).num_parameters()
    torch.manual_seed(1337)
    torch._dynamo.reset()
    with torch.device(device):
        model = build(knobs, args.mlp_hidden - 32 * round(excess / (3 * args.n_embd * args.n_layer) / 32))
    optimizers, start, lap = model.configure_optimizers('muon', lr), time.perf_counter(), 0
    if device == 'cuda':
        model.compile_blocks()
    for step in range(args.steps):
        done = (step - args.warmup) / max(1, args.steps - args.warmup)
        now = (step + 1) / (args.warmup + 1) if done < 0 else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = lr * now * group['lr_scale']
        x, y = (torch.from_numpy(part).to(device) for part in train.batch(step * args.rows, args.rows))
        with autocast:
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step == 7 or step % 250 == 249:
            print(f'{name} step {step + 1}: {loss.item() / math.log(2):.3f} bits, {time.perf_counter() - start:.0f} s', flush=True)
            lap = lap or time.perf_counter()
    speed = (args.steps - 8) * args.rows * T / (time.perf_counter() - lap)
    each = bits(model, text)
    result = dict(arm=name, data=args.data, lr=lr, **knobs, val=each.mean(), **{kind: each[kinds == i].mean() for i, kind in
                  enumerate(('new', 'near', 'far')) if (kinds == i).any()}, tokens_per_second=round(speed), parameters=model.num_parameters(),
                  device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu', torch=torch.__version__)
    long = np.stack([val.tokens[i * 4 * T:(i + 1) * 4 * T + 1] for i in range(min(8, (len(val.tokens) - 1) // (4 * T)))]).astype(np.int64)
    with torch.compiler.set_stance('force_eager'):
        result |= dict(beyond=bits(model, long)[:, -T:].mean(), own=bits(model, long[:, -T - 1:]).mean())
    result = {k: round(float(v), 4) if isinstance(v, np.floating) else v for k, v in result.items()}
    with open(args.out, 'a') as file:
        file.write(json.dumps(result) + '\n')
    print(json.dumps(result), flush=True)


if __name__ == '__main__':
    for arm in args.arms.split(';'):
        name, _, knobs = arm.partition(':')
        run(name, dict(knob.split('=') for knob in knobs.split(',') if knob))
