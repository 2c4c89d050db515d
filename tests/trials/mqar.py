"""
Associative recall (MQAR, arXiv:2312.04927): pairs of a key and a value, then every key again, in another order; what
is trained and counted are the values that follow. A model of few layers and channels shows whether a mixer can look things up.
Training goes through 1/8, 1/4, 1/2 and all of the pairs in turn, as in the paper; what is counted are all pairs.

    python tests/trials/mqar.py                     a table of the patterns SL, SSSL and A, some minutes each on a CPU
    python tests/trials/mqar.py --patterns=SL --pairs=32 --lr=1e-3,3e-3
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import FELA, FELAConfig  # noqa: E402

cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
cli.add_argument('--patterns', default='SL,SSSL,A', help='SSSL has four layers, the others two')
cli.add_argument('--pairs', type=int, default=64)
cli.add_argument('--vocab', type=int, default=512, help='keys are the lower half, values the upper')
cli.add_argument('--n_embd', type=int, default=128)
cli.add_argument('--heads', type=int, default=1, help='of L')
cli.add_argument('--lr', default='3e-3', help='all are tried; the best is in the table')
cli.add_argument('--optimizer', default='muon')
cli.add_argument('--steps', type=int, default=1500)
cli.add_argument('--rows', type=int, default=16, help='sequences a step')
cli.add_argument('--device', default='cpu')
args = cli.parse_args()


def batch(rows, n, generator):
    """-> inputs and targets (rows,4 n - 1) of n pairs: of the second half the values, -1 elsewhere"""
    half = args.vocab // 2
    keys = torch.rand(rows, half, generator=generator).argsort(1)[:, :n]
    values = half + torch.randint(half, keys.shape, generator=generator)
    order = torch.rand(rows, n, generator=generator).argsort(1)
    pairs = torch.stack((keys, values), 2)
    text = torch.cat((pairs, pairs.gather(1, order[..., None].expand_as(pairs))), 1).flatten(1)
    targets = text[:, 1:].clone()
    targets[:, :2 * n] = -1
    targets[:, 1::2] = -1
    return text[:, :-1].to(args.device), targets.to(args.device)


def run(pattern, lr):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    layers = max(2, len(pattern))
    model = FELA(FELAConfig(vocab_size=args.vocab, n_layer=layers, n_head=2, gla_heads=args.heads, n_embd=args.n_embd,
                            n_modes=64, chunk_size=64, pattern=pattern)).to(args.device)
    optimizers, start = model.configure_optimizers(args.optimizer, lr), time.perf_counter()
    for step in range(args.steps):
        now = min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = lr * now * group['lr_scale']
        model(*batch(args.rows, max(1, args.pairs >> 3 - step % 4), generator))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    x, y = batch(128, args.pairs, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = (torch.cat([model(part)[0] for part in x.split(16)]).argmax(-1) == y)[y >= 0].float().mean().item()
    print(f'{pattern:5} {layers} layers, {model.num_parameters():,} parameters, lr {lr:g}: {found:.1%} found, '
          f'{time.perf_counter() - start:.0f} s', flush=True)
    return found


if __name__ == '__main__':
    best = {pattern: max(run(pattern, float(lr)) for lr in args.lr.split(',')) for pattern in args.patterns.split(',')}
    print(f'\n{args.pairs} pairs, {args.n_embd} channels, {args.steps} steps of {args.rows} sequences\n')
    print('| pattern | values found |\n| --- | --- |\n' + '\n'.join(f'| {p} | {found:.1%} |' for p, found in best.items()))
