"""configurator.py: what overrides what; every mistake is one line and exit code 2; locks and files."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
from configurator import configure, die, find_ranks, lock_folder, pick_device, require
from runs import REPO, Run

SCRIPT = '''"""Toy script."""
from math import pi
from configurator import configure
before = 4
steps = 100  # optimizer steps
rate = 0.5   # learning rate  # peak
name = 'a b'  # any text
fast: bool = False  # annotated
low, high = 1, 2  # two at once
H = 50  # inner steps
RED = '#f00'  # a constant
_private = 3  # not a knob
shape = (1, 2)  # not a knob either
config = configure(globals())
later = 5  # after the call
print({k: config[k] for k in config})
'''
KNOBS = {'steps': 100, 'rate': 0.5, 'name': 'a b', 'fast': False, 'low': 1, 'high': 2, 'H': 50}
ENV = {**os.environ, 'PYTHONPATH': REPO}


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp('script') / 'toy.py'
    path.write_text(SCRIPT)
    return str(path)


def call(script, *argv):
    """configure as the script would call it."""
    others = dict(_private=3, shape=(1, 2), pi=3.14, RED='#f00', before=4, __file__=script, __doc__='Toy script.')
    configurator.given.clear()
    return configure(KNOBS | others, list(argv))


def refused(capsys, call, *args):
    """The one line that ends the script with code 2."""
    with pytest.raises(SystemExit) as e:
        call(*args)
    out, err = capsys.readouterr()
    assert (e.value.code, out) == (2, '') and err.startswith('error: ') and err.find('\n') == len(err) - 1 < 700
    return err


@pytest.mark.parametrize('arg, value', [
    ('--steps=5e8', 500_000_000), ('--steps=-3', -3), ('--steps=1.0', 1), ('--H=6', 6), ('--rate=3', 3.0), ('--rate=1e-4', 1e-4),
    ('--steps=123456789012345678901', 123456789012345678901), ('--rate=inf', float('inf')), ('--name=', ''), ('--name=5', '5'),
    ('--name=x=y --z', 'x=y --z'), ('--fast=True', True), ('--fast=true', True), ('--fast=1', True), ('--fast=0', False)])
def test_command_line(script, arg, value):
    key, result = arg[2:].partition('=')[0], call(script, arg)
    assert result == {**KNOBS, key: value} and type(result[key]) is type(KNOBS[key])
    assert list(result) == list(KNOBS) and configurator.given == {key}


def test_file_then_command_line_in_order(script, tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('import math\n_h = 0.5\nsteps = int(8 * _h) + steps\nrate = 2\nfast = 1\nname = name.upper()\nlow = low\n')
    result = call(script, str(path))
    assert result == {**KNOBS, 'steps': 104, 'rate': 2.0, 'name': 'A B', 'fast': True}
    assert type(result['rate']) is float and configurator.given == {'steps', 'rate', 'fast', 'name', 'low'}
    assert call(script, '--steps=1', str(path), '--steps=2')['steps'] == 2


@pytest.mark.parametrize('mistake, words', [  # str: on the command line
    ('--step=1', 'did you mean steps? command line'), ('--zzzzz=1', 'zzzzz --help'), ('--steps=x', "steps 'x' int 100"),
    ('--steps=0.5', '0.5 int'), ('--steps=' + '9' * 6000, 'int'), ('--rate=nan', 'nan float'), ('--fast=yes', 'yes bool'),
    ('--steps', 'as in --steps=100'), ('-steps=1', 'as in --steps=100'), ('steps=3', 'as in --steps=100'),
    ('1e-3', "'1e-3' --key=value"), ('one.txt', 'one.txt --key=value config file, name.py'), ('--_private=1', '_private'),
    ('--RED=1', 'RED'), ('--shape=1', 'shape'), ('--pi=1', 'pi'), ('--later=1', 'later'), ('--before=1', 'before'),
    ('nowhere.py', 'nowhere.py No such file'), ('\0.py', 'x00'), ('--dropout=0.1', 'dropout there is none'),
    ('--batch_size=3', 'micro_batch_size batch_tokens'), ('--gradient_accumulation_steps=8', 'batch_tokens'),
    # bytes: in a config file
    (b'stepz = 3', 'stepz did you mean steps? config file'), (b'steps = "3"', "'3' int"), (b'rate = 10 ** 400', 'float'),
    (b'steps = True', 'True'), (b'batch_size = 3', 'batch_tokens'), (b'ok = \n', 'line 1 SyntaxError'),
    (b'\n1/0', 'line 2 ZeroDivisionError'), (b'raise SystemExit(0)', 'SystemExit'), (b'import nowhere_at_all', 'nowhere_at_all'),
    (b'raise ValueError("a\\nb\\x1b[31m")', 'a b x1b'), (b'def f(): f()\nf()', 'RecursionError'), (b'\xff\xfe x = 1', 'c.py')])
def test_mistakes(script, capsys, tmp_path, mistake, words):
    path = tmp_path / 'c.py'
    if isinstance(mistake, bytes):
        path.write_bytes(mistake)
        mistake, words = str(path), f'{words} {str(path)[:50]}'
    line = refused(capsys, call, script, mistake, '1e-3')
    assert all(word in line for word in words.split()), line


def test_as_a_script(script):
    """--help names every knob, its default and comment; names of any bytes are shown."""
    done = subprocess.run([sys.executable, script, '--steps=7', '--help'], capture_output=True, env=ENV)
    assert (done.returncode, done.stderr) == (0, b'')
    lines = [line.split(maxsplit=1) for line in done.stdout.decode().splitlines() if line.startswith('  --')]
    assert lines[:2] == [['--steps=100', 'optimizer steps'], ['--rate=0.5', 'learning rate  # peak']]
    assert [line[0].partition('=')[0][2:] for line in lines] == list(KNOBS) and b'Toy script.' in done.stdout
    read, write = os.pipe()  # --help | head: no traceback, whatever is left unread
    os.close(read)
    done = subprocess.run([sys.executable, script, '--help'], stdout=write, stderr=subprocess.PIPE, env=ENV)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b'')
    env = {**ENV, 'PYTHONIOENCODING': 'ascii:strict', 'PYTHONUTF8': '1'}
    done = subprocess.run([sys.executable, script, '--steps=7', b'--name=\xff\xc3\xa9'], capture_output=True, env=env)
    assert done.returncode == 0 and b"'steps': 7" in done.stdout and rb'\udcff\xe9' in done.stdout
    # what is installed puts no module on the path: a script elsewhere must not import this folder's `model`
    assert 'py-modules = []' in Path(REPO, 'pyproject.toml').read_text()


def test_die_require_and_ranks(capsys, monkeypatch):
    assert refused(capsys, die, 'two\nlines \x1b[2J \ud800') == 'error: two lines \\x1b[2J \\ud800\n'
    assert "k='x': expected one of a b" in refused(capsys, lambda: require({'k': 'x'}, k='a b'))
    assert 'k=3: expected 0 to 2' in refused(capsys, lambda: require({'k': 3}, k=(0, 2)))
    require({'k': 'a', 'n': 2, 'm': 1 << 59, 'b': True, 'f': -1.0}, k='a b', n=(0, 2), f=(-1, 1))
    assert all('expected 0 to 1e+18' in refused(capsys, require, {'k': n}) for n in (1 << 63, -1, float('inf')))
    ranks = dict(RANK='2', LOCAL_RANK='0', WORLD_SIZE='3', MASTER_ADDR='x', MASTER_PORT='1')
    for pair in 'RANK=x RANK=3 RANK=-1 RANK= WORLD_SIZE=0 LOCAL_RANK= MASTER_PORT=99999 MASTER_PORT=p MASTER_ADDR='.split():
        monkeypatch.setattr(os, 'environ', ranks | dict([pair.split('=')]))
        assert pair.replace('=', "': '") in refused(capsys, find_ranks)
    assert "device='tpu': expected auto, " in refused(capsys, pick_device, 'tpu', 'auto')
    assert pick_device('cpu', 'bfloat16') == ('cpu', 'bfloat16', 'as asked')


def test_lock(tmp_path):
    """One process a folder, until it ends, however it ends; a folder made anew is locked anew; never a link."""
    (tmp_path / 'hold.py').write_text('import configurator, time\nconfigurator.lock_folder("a/b")\n'
                                      'print("held", flush=True)\ntime.sleep(99)')
    start, folder = lambda: Run(tmp_path, str(tmp_path / 'hold.py'), []), str(tmp_path / 'a/b')
    holder = start().until('held')
    with pytest.raises(BlockingIOError, match=f'{folder} is in use by process {holder.pid}$'):
        lock_folder(folder)
    holder.kill().wait()
    (tmp_path / 'a/b/lock').write_bytes(b'\xff\0')
    lock_folder(folder)
    os.rename(folder, folder + '.old')
    lock_folder(folder)
    lock_folder(folder)
    assert f'in use by process {os.getpid()}' in start().wait().err
    (tmp_path / 'mine').write_text('mine')
    os.symlink(tmp_path / 'mine', tmp_path / 'lock')
    with pytest.raises(OSError):
        lock_folder(str(tmp_path))
    assert (tmp_path / 'mine').read_text() == 'mine'


# Anything at all on the command line or in a file gives the knobs in their types, or one line.
word = st.one_of(st.text(max_size=20), st.sampled_from(['--help', '--', '-', '=', '--=', '--steps', '1e5', 'nan', '0x1']))
key = st.sampled_from([*KNOBS, 'zeta', '_mine', 'stepz'])
line = st.one_of(word, st.builds('--{}={}'.format, st.one_of(key, st.text(max_size=8)), word),
                 st.builds('--{}={}'.format, key, st.one_of(st.integers(), st.floats(), st.booleans())))
value = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=5), st.just([1]))


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(argv=st.lists(line, max_size=4), pairs=st.none() | st.lists(st.tuples(key, value)), tail=st.binary(max_size=12))
def test_anything(capsys, script, tmp_path, argv, pairs, tail):
    if pairs is not None:
        text = ''.join(f'{k} = {ascii(v)}\n' for k, v in pairs).replace('inf', '1e999').replace('nan', '_n')
        (tmp_path / 'c.py').write_bytes(text.encode() + b'#' + tail)  # the tail: bad encodings, NUL, a few statements
        argv = [str(tmp_path / 'c.py'), *argv[:1]]
    capsys.readouterr()
    try:
        result = call(script, *argv)
    except SystemExit as e:
        out, err = capsys.readouterr()
        assert (e.code, out, err) == (0, '', '') or e.code == 2 and err.startswith('error: ') and err.count('\n') == 1
    else:
        assert [type(v) for v in result.values()] == [type(v) for v in KNOBS.values()] and list(result) == list(KNOBS)
        assert all(v == v for v in result.values())
