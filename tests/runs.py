"""Real processes for tests, quickly: forked from a server that has imported torch, they start in 0.1 s."""
import atexit
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time

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
        except SystemExit:
            raise
        except BaseException:
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
        try:
            with open(self.output + ext, errors='replace') as file:
                return file.read(1 << 20)
        except FileNotFoundError:
            return ''

    def until(self, text, seconds=60):
        """Wait until `text` was printed (or the process has ended)."""
        end = time.monotonic() + seconds
        while text not in self.out and self.process.exitcode is None:
            assert time.monotonic() < end, (text, self.out, self.err)
            time.sleep(0.002)
        return self

    def kill(self, number=signal.SIGKILL):
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass
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


def fails(folder, *args, code=2, script='train.py', **kwargs):
    """The one line that it ends with."""
    run = Run(folder, script, [*(TINY if script == 'train.py' else ()), *args], **kwargs).wait()
    lines = run.err.splitlines()
    assert run.code == code and lines and lines[-1].startswith('error: '), (run.code, run.out, run.err)
    assert 'Traceback' not in run.err and sum(line.startswith('error:') for line in lines) == 1, run.err
    return lines[-1]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def train_ranks(folder, ranks, *args, code=0, last=()):
    """What torchrun does, without its start-up time; `last`: more arguments for the last rank."""
    env = {'WORLD_SIZE': str(ranks), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    runs = [start(folder, *args, *(last if i + 1 == ranks else ()), env=env | {'RANK': str(i), 'LOCAL_RANK': str(i)})
            for i in range(ranks)]
    for run in runs:
        if code is not None:
            assert run.wait().code == code, (run.code, run.out, run.err)
    return runs


def metrics(out_dir, key):
    """{step: value} of metrics.jsonl"""
    with open(os.path.join(str(out_dir), 'metrics.jsonl')) as file:
        found = [(row['step'], row[key]) for row in map(json.loads, file) if key in row]
    assert len(dict(found)) == len(found), 'a step was logged twice'
    return dict(found)


def values(out_dir, key):
    return list(metrics(out_dir, key).values())


def make_data(folder, name='mini', text=None):
    """A byte dataset of this repository's own text, made by prepare.py."""
    source, out_dir = os.path.join(str(folder), f'{name}.txt'), os.path.join(str(folder), 'data', name)
    with open(source, 'w') as file:
        for script in ('train.py', 'prepare.py') if text is None else ():
            with open(os.path.join(REPO, script)) as other:
                file.write(other.read())
        file.write(text or '')
    run = Run(folder, 'prepare.py', [f'--data_files={source}', '--tokenizer=bytes', f'--out_dir={out_dir}']).wait()
    assert run.code == 0, run.err
    return out_dir
