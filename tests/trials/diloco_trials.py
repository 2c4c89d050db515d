"""What it costs a run of train_diloco.py to lose workers and nodes; prints tables as in results/diloco.md.

    python tests/trials/diloco_trials.py kill   # or stop, host: between rounds, inside, in a collective
"""
import os
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runs import free_port  # noqa: E402  it puts the project's root on the path

from diloco_nodes import TINY, Node, ledger, newest, rounds, settled, until  # noqa: E402
from prepare import ensure_pysrc  # noqa: E402


def check(folder):
    """'ok' when the rounds that counted read every step of data once, but for what is left over at the end."""
    rows = rounds(folder)
    read = ledger(rows)
    missing = set(range(len(read))) - set(read)
    whole = len(read) == len(set(read)) and sorted(rows) == list(range(1, len(rows) + 1))
    return f'ok, {len(missing)} steps left over' if whole and len(missing) <= 4 * 200 else 'WRONG'


def failures(folder, kind):
    """Three nodes; the third is lost (kill: kill -9; stop: SIGSTOP; host: the first instead) at three moments, and comes back."""
    data, port, nodes = os.path.join(folder, 'data', 'pysrc'), free_port(), []
    ensure_pysrc(data)
    args = [*TINY, f'--dataset={data}', '--max_tokens=0', '--max_rounds=100000', '--timeout=10', '--H=60', '--run_name=r']

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


if __name__ == '__main__':
    if sys.argv[1:] not in (['kill'], ['stop'], ['host']):
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended'))
    with tempfile.TemporaryDirectory(prefix='fela-diloco-') as tmp:
        failures(tmp, sys.argv[1])
