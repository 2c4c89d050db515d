"""The long measurements of train_diloco.py, on this machine; each prints the table that results/diloco/ keeps.

    python tests/trials/diloco_trials.py learning        # 4 workers and H=50 against data parallel, at equal tokens
    python tests/trials/diloco_trials.py failures kill   # or stop, host: between rounds, inside, in a collective
    python tests/trials/diloco_trials.py churn           # ten minutes of random kills, stops and joins of four nodes
"""
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from diloco_nodes import REPO, TINY, Node, free_port, ledger, newest, rounds, until

# config/diloco_pysrc.py for train.py
SHAPE = ('--n_embd=64 --gla_heads=4 --n_modes=64 --block_size=128 --micro_batch_size=16 --max_tokens=16384000 --batch_tokens=8192 '
         '--optimizer=adamw --warmup_iters=200 --min_lr_frac=0.1 --eval_interval=0 --sample_tokens=0').split()


def data(folder):
    sys.path.insert(0, REPO)
    from prepare import ensure_pysrc
    path = os.path.join(folder, 'data', 'pysrc')
    ensure_pysrc(path)
    return f'--dataset={path}'


def check(folder):
    """'ok' when the rounds that counted read every step of data once, but for what is left over at the end."""
    rows = rounds(folder)
    read = ledger(rows)
    missing = set(range(len(read))) - set(read)
    whole = len(read) == len(set(read)) and sorted(rows) == list(range(1, len(rows) + 1))
    return f'ok, {len(missing)} steps left over' if whole and len(missing) <= 4 * 200 else 'WRONG'


def learning(folder):
    """About 12 minutes a run on one core, four runs."""
    print('| run | learning rate | validation loss (nats) |\n|---|---|---|')
    for lr in ('4e-3', '8e-3'):
        for kind, args in (('data parallel', ['train.py', *SHAPE]), ('DiLoCo', ['train_diloco.py', 'config/diloco_pysrc.py'])):
            out = os.path.join(folder, f'{kind.split()[0]}{lr}')
            subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4', *args,
                            f'--learning_rate={lr}', data(folder), '--device=cpu', '--dtype=float32', f'--out_dir={out}'],
                           env={**os.environ, 'OMP_NUM_THREADS': '1'}, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
            with open(max(glob.glob(f'{out}/*_final.json'))) as file:
                losses = json.load(file)['losses']
            print(f'| {kind} | {lr} | {losses.get("final_val", losses.get("val")):.4f} |', flush=True)


def settled(folder, workers, nodes):
    before = newest(folder)
    until(lambda: any(row['workers'] == workers for r, row in rounds(folder).items() if r > before + 1), 240, nodes)


def failures(folder, kind='kill'):
    """Three nodes; the third is lost (kill: kill -9; stop: SIGSTOP; host: the first instead) at three moments, and comes back."""
    args, port = [*TINY, data(folder), '--max_tokens=0', '--max_rounds=100000', '--timeout=10', '--H=60', '--run_name=r'], free_port()
    nodes = []

    def node(i):
        return Node(folder, 'abc'[i], port, [*args, f'--out_dir={folder}/{"abc"[i]}'])

    def trial(what, when, action, workers):
        rows = rounds(folder)
        length, before = rows[max(rows)]['seconds'], max(rows)
        until(lambda: newest(folder) > before, 60, nodes)  # a round has just ended
        if when == 'inside a round':
            time.sleep(length / 2)
        if when == 'inside a collective':  # worker 2 is held back, the others wait for it
            nodes[1].signal(signal.SIGSTOP, everything=False)
            time.sleep(2 * length + 0.5)
        before, begin = newest(folder), time.monotonic()
        action()
        if when == 'inside a collective':
            nodes[1].signal(signal.SIGCONT, everything=False)
        settled(folder, workers, nodes)
        rows = rounds(folder)
        first = min(r for r in rows if r > before and all(rows[i]['workers'] == workers for i in range(r, max(rows) + 1)))
        seconds = time.monotonic() - begin - sum(rows[r]['seconds'] for r in range(first + 1, max(rows) + 1))
        print(f'| {what} | {when} | {before} | {workers} | {seconds:.0f} s | {check(folder)} |', flush=True)

    def again():
        nodes[2].kill()
        nodes[2] = node(2)

    def lose_host():
        nodes[0].kill()
        until(lambda: all(node.process.poll() is not None for node in nodes), 200, nodes)  # the others end by themselves
        nodes[:] = [node(i) for i in range(3)]
    print('| what happens | when | rounds before | workers after | first whole round after | ledger |\n|---|---|---|---|---|---|')
    try:
        nodes += [node(i) for i in range(3)]
        settled(folder, 3, nodes)
        for when in ('inside a round',) if kind == 'host' else ('between rounds', 'inside a round', 'inside a collective'):
            if kind == 'kill':
                trial('kill -9 of a worker', when, lambda: nodes[2].signal(signal.SIGKILL, everything=False), 3)
                trial('kill -9 of a node', when, nodes[2].kill, 2)
                trial('the node joins', 'between rounds', again, 3)
            elif kind == 'stop':
                trial('SIGSTOP of a worker', when, lambda: nodes[2].signal(signal.SIGSTOP, everything=False), 3)
                trial('SIGSTOP of a node', when, lambda: nodes[2].signal(signal.SIGSTOP), 2)
                trial('SIGCONT of that node', 'inside a round', lambda: nodes[2].signal(signal.SIGCONT), 3)
            else:
                trial('kill -9 of the node with the rendezvous; the others end; all are started again', when, lose_host, 3)
    finally:
        for node in reversed(nodes):
            node.kill()


def churn(folder, seconds=600, seed=1):
    """Every ten seconds or so one of four nodes (not the host) is killed, stopped, told to end, or comes back."""
    args, rng = [*TINY, data(folder), '--max_tokens=0', '--max_rounds=1000000', '--timeout=10', '--H=40'], random.Random(int(seed))
    port, nodes, end = free_port(), [], time.monotonic() + float(seconds)

    def node(i):
        return Node(folder, 'abcd'[i], port, [*args, f'--out_dir={folder}/{"abcd"[i]}'])
    try:
        nodes += [node(i) for i in range(4)]
        settled(folder, 4, nodes)
        while time.monotonic() < end:
            time.sleep(rng.uniform(2, 20))
            i, what = rng.randrange(1, 4), rng.choice(('worker', 'node', 'TERM', 'STOP', 'join', 'join'))
            print(f'round {newest(folder)}: {what} {i}', flush=True)
            if what == 'worker':
                nodes[i].signal(signal.SIGKILL, everything=False)
            elif what == 'STOP':
                nodes[i].signal(signal.SIGSTOP, everything=False)
            elif what == 'TERM':
                nodes[i].process.terminate()
            else:
                nodes[i].kill()
            if what == 'join':
                nodes[i] = node(i)
        for i in range(1, 4):
            nodes[i].kill()
            nodes[i] = node(i)
        settled(folder, 4, nodes)
    finally:
        for node in reversed(nodes):
            node.kill()
    rows = rounds(folder)
    print(f'{len(rows)} rounds, loss {rows[1]["loss"]:.3f} to {rows[len(rows)]["loss"]:.3f}, ledger: {check(folder)}')


if __name__ == '__main__':
    trials = {f.__name__: f for f in (learning, failures, churn)}
    if len(sys.argv) < 2 or sys.argv[1] not in trials:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended'))
    with tempfile.TemporaryDirectory(prefix='fela-diloco-') as tmp:
        trials[sys.argv[1]](tmp, *sys.argv[2:])
