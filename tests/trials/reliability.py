"""kill -9 of train.py at random instants while it saves every step; results/reliability.md has the figures of one machine.

    python tests/trials/reliability.py kill 200 [seed] [ranks] [--knob=value ...]
"""
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runs import make_data, start, train_ranks  # noqa: E402  it puts the project's root on the path

import torch  # noqa: E402

from model import load_checkpoint  # noqa: E402


def kill(folder, knobs, kills=200, seed=0, ranks=1):
    """Each restart goes on from a whole checkpoint, not older than the last one that was reported as saved; nothing
    piles up; and in the end the run has the weights, bit for bit, of one that was never killed."""
    rng, counts, reported, most, out = random.Random(seed), Counter(), 0, 0, os.path.join(folder, 'out')
    args = ['--dataset=' + make_data(folder), '--schedule=constant', '--save_interval=1', '--eval_interval=7', '--n_embd=64', *knobs]
    go = lambda *more: train_ranks(folder, ranks, *args, *more, code=None) if ranks > 1 else [start(folder, *args, *more)]
    for _ in range(kills):
        run, *_ = runs = go('--max_iters=1000000')
        if rng.random() < 0.8:  # mostly while it trains and saves, sometimes while it starts
            run.until('saved', 300)
        time.sleep(rng.random() * 0.25)
        for each in rng.sample(runs, ranks):
            each.kill()
        for each in runs:
            assert each.wait().code in ((-9,) if ranks == 1 else (-9, 1)), (each.code, each.err)
            assert 'Traceback' not in each.err and 'STEPPING BACK' not in each.err, each.err
        if going_on := re.search(r'going on from out, step (\d+)', run.out):
            counts['restarts that went on'] += 1
            assert int(going_on[1]) >= reported, f'went on from step {going_on[1]}, but {reported} had been saved'
        saved = [int(step) for step in re.findall(r'saved out/step_(\d+)\.pt\n', run.out)]
        reported, names = max([reported, *saved]), os.listdir(out) if os.path.isdir(out) else []
        counts['checkpoints written'] += len(saved)
        counts['killed while a file was being written'] += 'unfinished.tmp' in names
        counts['killed where a .pt had no manifest'] += any(
            name.endswith('.pt') and name[:-2] + 'json' not in names for name in names)
        most = max(most, len(names))
    steps = reported + 5
    for last in ([], ['--out_dir=never_killed', '--save_interval=0']):
        runs = go(f'--max_iters={steps}', *last)
        assert all(run.wait().code == 0 for run in runs) and ('going on from out' in runs[0].out) == (not last)
    a, b = (load_checkpoint(os.path.join(folder, name))[0] for name in ('out', 'never_killed'))
    assert all(torch.equal(a['model'][name], p) for name, p in b['model'].items())
    assert a['training']['position'] == b['training']['position']
    assert most <= 10 and 'unfinished.tmp' not in (names := os.listdir(out)) and len(names) <= 2 + 2 * 3, (most, names)
    print('\n'.join(f'{n:10,}  {name}' for name, n in counts.items()))
    print(f'{steps} steps, at most {most} files at once; final weights and position equal those of a run never killed')


if __name__ == '__main__':
    if sys.argv[1:2] != ['kill']:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        kill(folder, [word for word in sys.argv[2:] if word[0] == '-'], *(int(word) for word in sys.argv[2:] if word[0] != '-'))
        print(f'{time.time() - begin:.0f} s')
