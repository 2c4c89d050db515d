"""kill -9 a training run at random instants while it writes checkpoints.

    python tests/reliability_kill.py [kills [seed [seconds]]]

Each restart must go on from a whole checkpoint, not older than the last one that was reported as saved; nothing piles
up; and in the end the run has the weights, bit for bit, of one that was never killed. Prints the figures; a time limit
(the third number, Ctrl-C, or `timeout --foreground`) only ends it earlier: pieces with other seeds add up."""
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter

import torch

from runs import Run, make_data, start, train

ARGS = ['--schedule=constant', '--save_interval=1', '--eval_interval=7', '--keep_checkpoints=2', '--log_interval=5']


def kill_many(folder, kills, seed=0, extra=(), go_on=lambda: True):
    rng, counts, reported, resumed, files = random.Random(seed), Counter(), 0, 0, 0
    args = ['--dataset=' + make_data(folder), *ARGS, *extra]
    while counts['kills'] < kills and go_on():
        counts['kills'] += 1
        run = start(folder, *args, '--max_iters=1000000')
        if rng.random() < 0.8:  # mostly while it trains and saves, sometimes while it starts
            run.until('step ', 300).until('saved', 300)
        time.sleep(rng.random() * 0.25)
        run.kill().wait()
        assert run.code == -9 and 'Traceback' not in run.err, (run.code, run.err)
        going_on = re.search(r'going on from out/step_(\d+)\.pt', run.out)
        if going_on:
            resumed = int(going_on[1])
            counts['restarts that went on'] += 1
            assert resumed >= reported, f'went on from step {resumed}, but step {reported} had been saved'
        counts['torn files met'] += run.err.count('damaged')
        saved = re.findall(r'saved out/step_(\d+)\.pt', run.out)
        counts['checkpoints written'] += len(saved)
        reported = max([reported, *map(int, saved)])
        names = os.listdir(os.path.join(str(folder), 'out')) if os.path.exists(os.path.join(str(folder), 'out')) else []
        counts['killed while a file was being written'] += any(name.endswith('.tmp') for name in names)
        counts['killed between the .pt and its manifest'] += any(
            name.endswith('.pt') and name[:-3] + '.json' not in names for name in names)
        files = max(files, len(names))
    steps = reported + 5
    last = train(folder, *args, f'--max_iters={steps}')
    names = sorted(os.listdir(os.path.join(str(folder), 'out')))
    assert not [name for name in names if name.endswith('.tmp')] and len(names) <= 2 + 2 * 3, names
    train(folder, *args, f'--max_iters={steps}', '--out_dir=never_killed', '--save_interval=0')
    a, b = (torch.load(os.path.join(str(folder), out, f'step_{steps:06d}_final.pt'), weights_only=True)
            for out in ('out', 'never_killed'))
    assert all(torch.equal(a['model'][name], b['model'][name]) for name in b['model'])
    assert a['training']['position'] == b['training']['position'] and a['training']['mean'] == b['training']['mean']
    counts['steps trained'], counts['most files in the folder at once'] = steps, files
    assert 'going on from' in last.out and counts['torn files met'] == 0
    return counts


if __name__ == '__main__':
    kills, seed, seconds = ([int(arg) for arg in sys.argv[1:]] + [200, 0, 10 ** 9][len(sys.argv) - 1:])
    with tempfile.TemporaryDirectory() as folder:
        begin, signals = time.time(), []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: signals.append(number))
        in_time = lambda: not signals and time.time() < begin + seconds
        counts = kill_many(folder, kills, seed, ['--n_embd=64'], in_time)
        print(f'{counts["kills"]} kills in {time.time() - begin:.0f} s, {Run.count} processes; all restarts went on from '
              'the last checkpoint reported as saved or a newer one; final weights equal those of a run never killed')
        for name, count in counts.items():
            print(f'{count:8,}  {name}')
