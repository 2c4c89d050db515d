"""Nodes of a DiLoCo run for tests and trials: a torchrun agent each, with workers, on this machine."""
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time

from runs import REPO

TINY = ('--n_embd=16 --n_head=2 --gla_heads=2 --n_layer=2 --n_modes=8 --pattern=SL --block_size=32 --micro_batch_size=4 '
        '--batch_tokens=128 --H=5 --eval_tokens=512 --final_eval_tokens=512 --warmup_iters=5 --eval_rounds=0 '
        '--learning_rate=1e-2 --device=cpu --dtype=float32').split()


def until(condition, seconds, nodes=()):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, '\n'.join(f'--- {node.name}\n{node.text[-3000:]}' for node in nodes) or 'too late'
        time.sleep(0.05)
    return value


class Node:
    """torchrun in a session of its own. The first node of a port hosts the rendezvous, and is waited for."""

    def __init__(self, folder, name, port, args, workers=1):
        self.name, self.output, self.known = name, os.path.join(str(folder), f'node_{name}.txt'), []
        command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=1:10', f'--nproc_per_node={workers}', '--max_restarts=1000',
                   '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{port}', '--rdzv_id=test', '--monitor_interval=0.1',
                   '--rdzv_conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3',
                   os.path.join(REPO, 'train_diloco.py'), *args]
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
        with open(self.output, 'a') as file:  # PR_SET_PDEATHSIG: tests that are killed leave nothing running
            self.process = subprocess.Popen(command, cwd=str(folder), stdout=file, stderr=file, start_new_session=True, env=env,
                                            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL))

        def listening():
            with socket.socket() as s:
                return s.connect_ex(('127.0.0.1', port)) == 0
        until(listening, 60, [self])

    @property
    def text(self):
        with open(self.output, errors='replace') as file:
            return file.read()

    def pids(self):
        """The processes of this node, the agent first; remembered, as a killed agent leaves its workers as orphans."""
        parents = {}
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                with open(f'/proc/{pid}/stat') as file:
                    state, parent = file.read().rpartition(')')[2].split()[:2]
                if state != 'Z':
                    parents[int(pid)] = int(parent)
            except (OSError, ValueError):
                pass
        self.known = [pid for pid in self.known or [self.process.pid] if pid in parents]
        while new := [pid for pid, parent in parents.items() if parent in self.known and pid not in self.known]:
            self.known += new
        return self.known

    def workers(self):
        """The pids of the training processes."""
        found = []
        for pid in self.pids():
            try:
                with open(f'/proc/{pid}/cmdline') as file:
                    found += [pid] * any(word.endswith('train_diloco.py') for word in file.read().split('\0')[1:3])
            except OSError:
                pass
        return found

    def signal(self, number, everything=True):
        for pid in self.pids() if everything else self.workers():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def kill(self):
        while self.pids():
            self.signal(signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait(10)


def rounds(folder):
    """Rows of every metrics.jsonl under a folder by round; of a round that was lost and done again the last version."""
    rows = {}
    for path, _, names in os.walk(str(folder)):
        if 'metrics.jsonl' in names:
            with open(os.path.join(path, 'metrics.jsonl')) as file:
                rows.update((row['round'], row) for row in (json.loads(line) for line in file if line.endswith('}\n')))
    return rows


def newest(folder):
    return max(rounds(folder), default=0)


def settled(folder, workers, nodes):
    """Wait for a whole round of so many workers, beyond the one that is under way."""
    before = newest(folder)
    until(lambda: any(row['workers'] == workers for r, row in rounds(folder).items() if r > before + 1), 240, nodes)


def ledger(rows):
    """Every step of data that a run read, in order: [0, 1, 2, ...] if none is missing and none came twice."""
    return sorted(s for row in rows.values() for a, b in row['read'] for s in range(a, b + 1))
