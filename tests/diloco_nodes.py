"""Nodes of a DiLoCo run for tests: a torchrun agent each, with one worker, on this machine."""
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ('--n_embd=16 --n_head=2 --n_layer=2 --n_modes=8 --pattern=SL --block_size=32 --micro_batch_size=4 --batch_tokens=128 --H=5 '
        '--eval_tokens=512 --final_eval_tokens=512 --warmup_iters=5 --eval_rounds=0 --learning_rate=1e-2 --device=cpu').split()


def first_node(*args, **kwargs):
    """The node that hosts the rendezvous: on one machine that is whoever comes first."""
    node = Node(*args, **kwargs)
    def listening():
        try:
            socket.create_connection((kwargs.get('host', '127.0.0.1'), args[2]), 1).close()
            return True
        except OSError:
            return False
    until(listening, 60, [node])
    return node


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Node:
    """torchrun with one worker, in a session of its own."""

    def __init__(self, folder, name, port, args, nnodes='1:10', netns='', host='127.0.0.1', env=(), agent=()):
        self.folder, self.name = str(folder), name
        command = [sys.executable, '-m', 'torch.distributed.run', f'--nnodes={nnodes}', '--nproc_per_node=1', '--max_restarts=1000',
                   '--rdzv_backend=c10d', f'--rdzv_endpoint={host}:{port}', '--rdzv_id=test', '--monitor_interval=0.1',
                   '--rdzv_conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3', *agent,
                   os.path.join(REPO, 'train_diloco.py'), *args]
        if netns:
            command = ['ip', 'netns', 'exec', netns, *command]
        self.output = os.path.join(self.folder, f'node_{name}.txt')
        with open(self.output, 'a') as file:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL), env={
                **os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1', **dict(env)})

    @property
    def text(self):
        with open(self.output, errors='replace') as file:
            return file.read()

    def pids(self):
        """The processes of this node, the agent first. They are remembered: a killed agent leaves its worker an orphan."""
        parents = {}
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                with open(f'/proc/{pid}/stat') as file:
                    state, parent = file.read().rpartition(')')[2].split()[:2]
                if state != 'Z':
                    parents[int(pid)] = int(parent)
            except (OSError, ValueError):
                pass
        self.known = [pid for pid in getattr(self, 'known', [self.process.pid]) if pid in parents]
        while new := [pid for pid, parent in parents.items() if parent in self.known and pid not in self.known]:
            self.known += new
        return self.known

    def worker(self):
        """pid of the training process"""
        for pid in self.pids():
            try:
                with open(f'/proc/{pid}/cmdline') as file:
                    if os.path.join(REPO, 'train_diloco.py') in file.read().split('\0')[1:3]:
                        return pid
            except OSError:
                pass

    def signal(self, number, everything=True):
        for pid in self.pids() if everything else [self.worker()]:
            try:
                os.kill(pid, number)
            except (ProcessLookupError, TypeError):
                pass

    def kill(self):
        for _ in range(20):
            self.signal(signal.SIGKILL)
            if not self.pids():
                break
            time.sleep(0.05)
        self.process.wait(10)

    def wait(self, seconds):
        return self.process.wait(seconds)


def rounds(folder):
    """Rows of every metrics.jsonl under a folder, by round; a round that was lost and done again only in its last version."""
    rows = {}
    for path, _, names in os.walk(str(folder)):
        if 'metrics.jsonl' in names:
            with open(os.path.join(path, 'metrics.jsonl')) as file:
                for line in file:
                    if line.endswith('}\n'):
                        row = json.loads(line)
                        rows[row['round']] = row
    return rows


def until(condition, seconds, nodes=()):
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError('\n'.join(f'--- {node.name}\n{node.text[-3000:]}' for node in nodes) or 'too late')
        time.sleep(0.05)
    return value


def newest(folder):
    return max(rounds(folder), default=0)


def ledger(rows):
    """Every step of data that a run read, in order: [0, 1, 2, ...] if none is missing and none came twice."""
    return sorted(s for row in rows.values() for a, b in row['read'] for s in range(a, b + 1))
