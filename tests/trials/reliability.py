"""The long versions of the reliability tests. Each prints its figures; results/reliability.md has those of one machine.

    python tests/trials/reliability.py kill 200 [seed]    kill -9 of train.py while it saves
    python tests/trials/reliability.py damage 1000        bit flips of, and truncated, checkpoint, manifest and data
    python tests/trials/reliability.py fuzz manifests 40  random bytes as metas, manifests or checkpoints, for 40 seconds
"""
import contextlib
import io
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runs import make_data, start, train  # noqa: E402  it puts the project's root on the path

import torch  # noqa: E402

from configurator import sha256_of  # noqa: E402
from model import CheckpointError, _check, load_checkpoint, read_manifest  # noqa: E402
from prepare import DataError, TokenData, _check as check_of_meta  # noqa: E402

SMALL = '--pattern=SL --n_layer=2 --n_modes=8 --block_size=16 --micro_batch_size=1 --batch_tokens=16'.split()


def read(path):
    with open(path, 'rb') as file:
        return file.read()


def write(path, data):
    with open(path, 'wb') as file:
        file.write(data)


def report(counts):
    for name, n in counts.items():
        print(f'{n:10,}  {name}')


def same(a, b):
    return all(torch.equal(a['model'][name], p) for name, p in b['model'].items())


def kill(folder, kills=200, seed=0):
    """Each restart goes on from a whole checkpoint, not older than the last one that was reported as saved; nothing
    piles up; and in the end the run has the weights, bit for bit, of one that was never killed."""
    rng, counts, reported, most, out = random.Random(seed), Counter(), 0, 0, os.path.join(folder, 'out')
    args = ['--dataset=' + make_data(folder), '--schedule=constant', '--save_interval=1', '--eval_interval=7', '--n_embd=64']
    for _ in range(kills):
        run = start(folder, *args, '--max_iters=1000000')
        if rng.random() < 0.8:  # mostly while it trains and saves, sometimes while it starts
            run.until('saved', 300)
        time.sleep(rng.random() * 0.25)
        run.kill().wait()
        assert run.code == -9 and 'Traceback' not in run.err and 'STEPPING BACK' not in run.err, (run.code, run.err)
        if going_on := re.search(r'going on from out, step (\d+)', run.out):
            counts['restarts that went on'] += 1
            assert int(going_on[1]) >= reported, f'went on from step {going_on[1]}, but {reported} had been saved'
        saved = [int(step) for step in re.findall(r'saved out/step_(\d+)\.pt\n', run.out)]
        reported, names = max([reported, *saved]), os.listdir(out) if os.path.isdir(out) else []
        counts['checkpoints written'] += len(saved)
        counts['killed while a file was being written'] += 'unfinished.tmp' in names
        counts['killed where a .pt had no manifest'] += any(name.endswith('.pt') and name[:-2] + 'json' not in names for name in names)
        most = max(most, len(names))
    steps = reported + 5
    assert 'going on from out' in train(folder, *args, f'--max_iters={steps}').out
    train(folder, *args, f'--max_iters={steps}', '--out_dir=never_killed', '--save_interval=0')
    a, b = (load_checkpoint(os.path.join(folder, name))[0] for name in ('out', 'never_killed'))
    assert same(a, b) and a['training']['position'] == b['training']['position']
    assert most <= 10 and 'unfinished.tmp' not in (names := os.listdir(out)) and len(names) <= 2 + 2 * 3, (most, names)
    report(counts)
    print(f'{steps} steps, at most {most} files at once; final weights and position equal those of a run never killed')


def damage(folder, flips=1000):
    """Each damaged file must give a clean error, or exactly what it gave whole."""
    rng, data, out = random.Random(0), make_data(folder), os.path.join(folder, 'out')
    train(folder, '--dataset=' + data, *SMALL, '--max_iters=4', '--save_interval=3', '--eval_interval=0')
    (good, manifest), (older, _) = (load_checkpoint(f'{out}/step_00000{name}.pt') for name in ('4_final', '3'))
    tokens = TokenData(data, 'train', 16)
    meta, batch = tokens.meta, tokens.batch(0, 99)[0]

    def checkpoint():
        with contextlib.redirect_stderr(err := io.StringIO()):
            state, found = load_checkpoint(out)
        if found == manifest and same(state, good):
            return 'harmless: read as when it was whole'  # such as another kind of white space
        assert found['step'] == 3 and same(state, older) and err.getvalue().count('\n') == 1
        assert 'STEPPING BACK' in err.getvalue() and 'step_000004_final' in err.getvalue()
        return 'named, and the one before it used'

    def dataset():
        try:
            again = TokenData(data, 'train', 16)
            assert again.meta == meta and (again.batch(0, 99)[0] == batch).all()
            return 'harmless: read as when it was whole'
        except DataError as e:
            assert '\n' not in str(e) and ('train.bin' in str(e) or 'meta.json' in str(e)), e
            return 'refused in one line'

    for path, result in ((f'{out}/step_000004_final.pt', checkpoint), (f'{out}/step_000004_final.json', checkpoint),
                         (f'{data}/train.bin', dataset), (f'{data}/meta.json', dataset)):
        whole, counts = read(path), Counter()
        n = len(whole)
        for length in sorted({*range(min(n, 300)), *range(max(0, n - 300), n), *range(0, n, 512)}):
            write(path, whole[:length])
            counts['truncations ' + result()] += 1
        for _ in range(flips):
            at = rng.randrange(n)
            write(path, whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
            counts['flips ' + result()] += 1
        write(path, whole)
        print(f'{os.path.basename(path)}, {n:,} bytes')
        report(counts)


def targets(folder):
    """{name: function of bytes}; anything but a clean error comes out as an exception."""
    for name in ('train.bin', 'val.bin', 'step_000001.pt'):
        write(f'{folder}/{name}', b'\1\0' * 50)
    sha256 = sha256_of(f'{folder}/train.bin')
    split, manifest = {'tokens': 50, 'bytes': 50, 'sha256': sha256}, {'step': 1, 'final': False, 'sha256': sha256}
    meta = {'tokenizer': 'bytes', 'vocab_size': 261, 'splits': {'train': split, 'val': split}}

    def one_line(error, call, *args):
        try:
            call(*args)
        except error as e:
            assert '\n' not in str(e), e

    def forgeries(path, data, check, base):  # the bytes, and what they say with a checksum that fits, as a forger writes it
        yield write(path, data)
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(data), dict):
                for rest in ({}, base):
                    found = {**rest, **found}
                    yield write(path, json.dumps({**found, 'check': check(found)}).encode())

    def metas(data):
        for _ in forgeries(f'{folder}/meta.json', data, check_of_meta, meta):
            one_line(DataError, TokenData, folder, 'train', 8)

    def manifests(data):
        for _ in forgeries(f'{folder}/step_000001.json', data, _check, manifest):
            one_line(CheckpointError, read_manifest, f'{folder}/step_000001.json')
            one_line(CheckpointError, load_checkpoint, f'{folder}/step_000001.json')

    def checkpoints(data):  # under a manifest that fits
        write(f'{folder}/step_000001.pt', data)
        found = {**manifest, 'sha256': sha256_of(f'{folder}/step_000001.pt')}
        write(f'{folder}/step_000001.json', json.dumps({**found, 'check': _check(found)}).encode())
        one_line(CheckpointError, load_checkpoint, f'{folder}/step_000001.pt')

    return {f.__name__: f for f in (metas, manifests, checkpoints)}


def fuzz(folder, name='manifests', seconds=40):
    seeds = [b'{"splits": {"train": {}}, "step": 1e9}', b'{"tokenizer": "bytes", "step": 1, "final": null}', b'{"sha256": 1}',
             b'{"vocab_size": "261"}', b'a\xff\xc3', b'[' * 3000, b'PK\x03\x04', b'\x80\x02}q\x00.']
    target, rng, count, end = targets(folder)[name], random.Random(0), 0, time.time() + seconds
    while time.time() < end:
        data = bytearray(rng.choice(seeds)) if rng.random() < 0.7 else bytearray()
        for _ in range(rng.randrange(8)):
            at = rng.randrange(len(data) + 1)
            data[at:at + rng.randrange(3)] = rng.randbytes(rng.randrange(6))
        target(bytes(data))
        count += 1
    print(f'{name}: {count:,} random inputs, no exception')


if __name__ == '__main__':
    name, *rest = sys.argv[1:] or ['']
    if name not in ('kill', 'damage', 'fuzz'):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        globals()[name](folder, *(int(arg) if arg.isdigit() else arg for arg in rest))
        print(f'{" ".join(sys.argv[1:])}: {time.time() - begin:.0f} s')
