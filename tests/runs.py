"""Real processes for tests, quickly: forked from a server that has imported torch, they start in 0.1 s."""
import atexit
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
TINY = ('--pattern=SSSL --n_layer=4 --n_embd=16 --n_head=2 --gla_heads=2 --n_modes=16 --block_size=32 '
        '--micro_batch_size=4 --batch_tokens=256 --max_seconds=0 --optimizer=adamw --learning_rate=2e-3 '
        '--schedule=cosine --warmup_iters=3 --min_lr_frac=0.1 --log_interval=1 --eval_interval=5 --eval_tokens=512 '
        '--final_eval_tokens=512 --sample_tokens=0 --device=cpu --compile=off --dtype=float32').split()

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['torch', 'torch.distributed', 'torch.nn.parallel', 'torch.utils.checkpoint',
                                 'torch._dynamo', 'model', 'prepare', 'configurator'])


def _child(script, args, cwd, env, output, fsize, stdin):
    """What `python script args` does, in this process."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    for number, ext in ((1, '.out'), (2, '.err')):
        os.dup2(os.open(output + ext, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    if fsize:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.path[0:0] = [script, *args], [REPO]
    code = 0
    try:
        try:
            runpy.run_path(os.path.join(REPO, script), run_name='__main__')
        except (Exception, KeyboardInterrupt):
            code = 1
            sys.excepthook(*sys.exc_info())
    except SystemExit as e:
        code = e.code or 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Run:
    count = 0

    def __init__(self, folder, script, args, env=None, fsize=0, stdin=os.devnull):
        Run.count += 1
        self.output = os.path.join(str(folder), f'run{Run.count}')
        threads = os.environ.get('OMP_NUM_THREADS')
        os.environ['OMP_NUM_THREADS'] = '1'  # a fork must not inherit a pool of threads
        args = script, list(args), str(folder), env or {}, self.output, fsize, str(stdin)
        self.process = _context.Process(target=_child, args=args, daemon=True)  # ends with the tests, whatever happens
        self.process.start()
        os.environ.pop('OMP_NUM_THREADS') if threads is None else os.environ.update(OMP_NUM_THREADS=threads)
        self.pid = self.process.pid

    out = property(lambda self: self._read('.out'))
    err = property(lambda self: self._read('.err'))

    def _read(self, ext):
        with suppress(FileNotFoundError), open(self.output + ext, errors='replace') as file:
            return file.read(1 << 20)
        return ''

    def until(self, text, seconds=60):
        """Wait until `text` was printed (or the process has ended)."""
        end = time.monotonic() + seconds
        while text not in self.out and self.process.exitcode is None:
            assert time.monotonic() < end, (text, self.out, self.err)
            time.sleep(0.002)
        return self

    def kill(self, number=signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return self

    def wait(self, seconds=120):
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(('still running', self.out, self.err))
        self.code = self.process.exitcode
        return self


def start(folder, *args, **kwargs):
    return Run(folder, 'train.py', [*TINY, *args], **kwargs)


def train(folder, *args, code=0, **kwargs):
    run = start(folder, *args, **kwargs).wait()
    assert run.code == code, (run.code, run.out, run.err)
    return run


def error(run):
    """The one line that it ends with."""
    lines = run.err.splitlines() or ['']
    assert [line for line in lines if line.startswith('error:')] == lines[-1:] and 'Traceback' not in run.err, (run.out, run.err)
    return lines[-1]


def fails(folder, *args, code=2, script='train.py', **kwargs):
    run = Run(folder, script, [*(TINY if script == 'train.py' else ()), *args], **kwargs).wait()
    assert run.code == code, (run.code, run.out, run.err)
    return error(run)


def unread(folder, script, *args):
    """Its reader goes away after the first byte. -> what it says on stderr, and its exit code"""
    process = subprocess.Popen([sys.executable, f'{REPO}/{script}', *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    process.stdout.close()
    return process.stderr.read(), process.wait()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def group(ranks, machines=False):
    """What torchrun tells each rank, without its start-up time; machines: each rank has one of its own."""
    env = {'WORLD_SIZE': str(ranks), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    return [env | {'RANK': str(i), 'LOCAL_RANK': str(0 if machines else i)} for i in range(ranks)] if ranks > 1 else [{}]


def train_ranks(folder, ranks, *args, code=0, last=()):
    """`last`: more arguments for the last rank; code=None: they are not waited for."""
    runs = [start(folder, *args, *(last if i + 1 == ranks else ()), env=env) for i, env in enumerate(group(ranks))]
    for run in runs if code is not None else ():
        assert run.wait().code == code, (run.code, run.out, run.err)
    return runs


def strict_rows(out_dir):
    """Every line of metrics.jsonl, in which NaN is no number: int('NaN') raises."""
    return [json.loads(line, parse_constant=int) for line in Path(out_dir, 'metrics.jsonl').read_text().splitlines()]


def metrics(out_dir, key):
    """{step: value} of metrics.jsonl"""
    found = [(row['step'], row[key]) for row in strict_rows(out_dir) if key in row]
    assert len(dict(found)) == len(found), 'a step was logged twice'
    return dict(found)


def values(out_dir, key):
    return list(metrics(out_dir, key).values())


def load(path):
    return torch.load(str(path), weights_only=True)


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def make_data(folder, name='mini', text=''):
    """A byte dataset of this repository's own text, made by prepare.py."""
    text, out_dir = text or ''.join(Path(REPO, script).read_text() for script in ('train.py', 'prepare.py')), f'{folder}/data/{name}'
    source = write(f'{folder}/{name}.txt', text)
    run = Run(folder, 'prepare.py', [f'--data_files={source}', '--tokenizer=bytes', f'--out_dir={out_dir}']).wait()
    assert run.code == 0, run.err
    return out_dir
