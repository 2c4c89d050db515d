"""configurator.py: what overrides what; every mistake is one line and exit code 2; locks and files."""
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
from configurator import configure, die, lock_folder, pick_device, require, write_whole
from runs import REPO

SCRIPT = '''"""Toy script."""
from math import pi
from configurator import configure
worker = None
before = 4  
def helper(): pass
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
if __name__ == '__main__':
    print({k: config[k] for k in config})
'''
KNOBS = {'steps': 100, 'rate': 0.5, 'name': 'a b', 'fast': False, 'low': 1, 'high': 2, 'H': 50}
relaxed = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp('script') / 'toy.py'
    path.write_text(SCRIPT)
    return str(path)


def call(script, *argv):
    """configure as the script would call it."""
    others = dict(_private=3, shape=(1, 2), pi=3.14, RED='#f00', before=4)
    configurator.given.clear()
    return configure(dict(KNOBS, **others, __file__=script, __doc__='Toy script.'), list(argv))


def refused(capsys, script, *argv):
    """The one line that ends the script with code 2."""
    with pytest.raises(SystemExit) as e:
        call(script, *argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ''
    assert err.startswith('error: ') and err.count('\n') == 1 and err.endswith('\n') and len(err) < 700
    return err


def run(script, *argv, **env):
    return subprocess.run([sys.executable, script, *argv], capture_output=True, env={**os.environ, 'PYTHONPATH': REPO, **env})


def test_only_the_block_of_knobs_is_knobs(script):
    assert call(script) == KNOBS and list(call(script)) == list(KNOBS) and not configurator.given


@pytest.mark.parametrize('arg, key, value', [
    ('--steps=7', 'steps', 7), ('--steps=5e8', 'steps', 500_000_000), ('--steps=-3', 'steps', -3), ('--steps=1.0', 'steps', 1),
    ('--steps=123456789012345678901', 'steps', 123456789012345678901), ('--rate=3', 'rate', 3.0), ('--rate=1e-4', 'rate', 1e-4),
    ('--rate=inf', 'rate', float('inf')), ('--name=', 'name', ''), ('--name=x=y --z', 'name', 'x=y --z'), ('--name=5', 'name', '5'),
    ('--fast=True', 'fast', True), ('--fast=true', 'fast', True), ('--fast=1', 'fast', True), ('--fast=0', 'fast', False)])
def test_command_line(script, arg, key, value):
    result = call(script, arg)
    assert result == {**KNOBS, key: value} and type(result[key]) is type(KNOBS[key]) and configurator.given == {key}


def test_file_then_command_line_in_order(script, tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('import math\n_half = 0.5\nsteps = int(8 * _half) + steps\nrate = 2\nfast = 1\n'
                    'name = name.upper()\nlow = low\ndef helper(): pass\n')
    assert call(script, str(path)) == {**KNOBS, 'steps': 104, 'rate': 2.0, 'name': 'A B', 'fast': True}
    assert configurator.given == {'steps', 'rate', 'fast', 'name', 'low'}
    assert call(script, '--steps=1', str(path), '--steps=2')['steps'] == 2
    assert type(call(script, str(path))['rate']) is float and call(script, str(path))['fast'] is True


@pytest.mark.parametrize('argv, words', [
    (['--step=1'], ['step', 'did you mean steps?', 'command line']), (['--zzzzz=1'], ['zzzzz', '--help']),
    (['--steps=x'], ['steps', "'x'", 'int', '100']), (['--steps=0.5'], ['0.5', 'int']), (['--steps=True'], ['int']),
    (['--steps=inf'], ['inf']), (['--steps=' + '9' * 6000], ['int']), (['--steps='], ["''"]),
    (['--rate=nan'], ['nan', 'float']), (['--rate=fast'], ['float']), (['--fast=yes'], ['yes', 'bool']), (['--fast=2'], ['bool']),
    (['--steps'], ['--key=value', '--steps=100']), (['--rate', '1e-3'], ['--key=value', 'as in --rate=0.5']), (['-s'], ['-s']),
    (['--'], ['--']), (['-steps=1'], ['as in --steps=100']), (['steps=3'], ['as in --steps=100']), (['1e-3'], ["'1e-3'", '--key=value']),
    (['one.txt'], ['one.txt', '--key=value', 'config file, name.py']), (['--_private=1'], ['_private']), (['--RED=1'], ['RED']),
    (['--shape=1'], ['shape']), (['--pi=1'], ['pi']), (['--later=1'], ['later']), (['--before=1'], ['before']),
    (['nowhere.py'], ['nowhere.py', 'No such file']), (['\0.py'], ['x00']), (['/.py'], ['No such file']),
    (['--dropout=0.1'], ['dropout', 'there is none']), (['--batch_size=3'], ['micro_batch_size', 'batch_tokens']),
    (['--gradient_accumulation_steps=8'], ['batch_tokens'])])
def test_mistakes_on_the_command_line(script, capsys, argv, words):
    line = refused(capsys, script, *argv)
    assert all(word in line for word in words), line


@pytest.mark.parametrize('source, words', [
    ('stepz = 3', ['stepz', 'did you mean steps?', 'config file']), ('other = None', ['other']), ('x = [1]', ["'x'"]),
    ('steps = "3"', ["'3'", 'int']), ('steps = 2.5', ['2.5']), ('steps = True', ['True']), ('steps = None', ['None']),
    ('rate = True', ['True', 'float']), ('rate = 10 ** 400', ['float']), ('name = 3', ['str']), ('name = b"x"', ['str']),
    ('fast = 2', ['bool']), ('fast = "True"', ['bool']), ('batch_size = 3', ['batch_tokens']), ('STEPS = 3', ['STEPS']),
    ('ok = \n', ['line 1', 'SyntaxError']), ('\n1/0', ['line 2', 'ZeroDivisionError']), ('raise SystemExit(0)', ['SystemExit']),
    ('import nowhere_at_all', ['nowhere_at_all']), ('\0', ['line']), ('raise ValueError("a\\nb\\x1b[31m")', ['a b', 'x1b']),
    ('def f(): f()\nf()', ['RecursionError']), (b'\xff\xfe steps = 1', ['c.py'])])
def test_mistakes_in_a_config_file(script, capsys, tmp_path, source, words):
    path = tmp_path / 'c.py'
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    line = refused(capsys, script, str(path))
    assert all(word in line for word in [*words, str(path)[:50]]), line


def test_one_config_file(script, capsys, tmp_path):
    for name in 'ab':
        (tmp_path / f'{name}.py').write_text('steps = 1\n')
    assert 'b.py' in refused(capsys, script, str(tmp_path / 'a.py'), str(tmp_path / 'b.py'))


def test_help_names_every_knob_its_default_and_comment(script):
    done = run(script, '--steps=7', '--help')
    assert (done.returncode, done.stderr) == (0, b'')
    lines = [line.split(maxsplit=1) for line in done.stdout.decode().splitlines() if line.startswith('  --')]
    assert lines[:2] == [['--steps=100', 'optimizer steps'], ['--rate=0.5', 'learning rate  # peak']]
    assert [line[0].partition('=')[0][2:] for line in lines] == list(KNOBS) and b'Toy script.' in done.stdout
    read, write = os.pipe()  # --help | head: no traceback, whatever is left unread
    os.close(read)
    done = subprocess.run([sys.executable, script, '--help'], stdout=write, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': REPO})
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b'')


def test_as_a_script(script):
    done = run(script, '--steps=7', b'--name=\xff\xc3\xa9', PYTHONIOENCODING='ascii:strict', PYTHONUTF8='1')
    assert done.returncode == 0 and b"'steps': 7" in done.stdout and rb'\udcff\xe9' in done.stdout
    done = run(script, b'--steps=\xff\n\x1b')
    assert done.returncode == 2 and done.stderr.count(b'\n') == 1 and done.stdout == b''


def test_die_and_require(capsys):
    for call, code, line in ((lambda: die('two\nlines \x1b[2J \ud800', code=1), 1, 'two lines \\x1b[2J \\ud800'),
                             (lambda: require({'k': 'x'}, k='a b'), 2, "k='x': expected one of a b"),
                             (lambda: require({'k': 3}, k=(0, 2)), 2, 'k=3: expected 0 to 2'),
                             (lambda: pick_device('tpu', 'auto'), 2, "device='tpu': expected auto, ")):
        with pytest.raises(SystemExit) as e:
            call()
        assert e.value.code == code and capsys.readouterr().err.startswith(f'error: {line}')
    require({'k': 'a', 'n': 2}, k='a b', n=(0, 2))
    assert pick_device('cpu', 'bfloat16') == ('cpu', 'bfloat16', 'as asked') and pick_device('cpu', 'auto')[1] != 'auto'


def test_lock(tmp_path):
    """One process a folder, until it ends, however it ends; a folder made anew is locked anew; a link is not followed."""
    folder, code = str(tmp_path / 'a' / 'b'), 'import sys; from configurator import lock_folder; lock_folder(sys.argv[1]); '
    start = lambda more: subprocess.Popen([sys.executable, '-c', code + more, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                          env={**os.environ, 'PYTHONPATH': REPO})
    holder = start('print(flush=True); input()')
    holder.stdout.readline()
    with pytest.raises(BlockingIOError, match=f'{folder} is in use by process {holder.pid}$'):
        lock_folder(folder)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (tmp_path / 'a' / 'b' / 'lock').write_bytes(b'\xff\0')
    lock_folder(folder)
    os.rename(folder, folder + '.old')
    lock_folder(folder)
    lock_folder(folder)
    assert f'in use by process {os.getpid()}' in start('').communicate()[1].decode()
    (tmp_path / 'mine').write_text('mine')
    os.mkdir(tmp_path / 'c')
    os.symlink(tmp_path / 'mine', tmp_path / 'c' / 'lock')
    with pytest.raises(OSError):
        lock_folder(str(tmp_path / 'c'))
    assert (tmp_path / 'mine').read_text() == 'mine'


def test_write_whole(tmp_path):
    path = str(tmp_path / 'x')
    assert write_whole(path, lambda file: file.write(b'abc')) == configurator.sha256_of(path)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda file: (file.write(b'half'), 1 / 0))
    assert os.listdir(tmp_path) == ['x'] and (tmp_path / 'x').read_bytes() == b'abc'


# ---- anything at all on the command line or in a file: the knobs in their types, or one line
word = st.one_of(st.text(max_size=20), st.sampled_from(['--help', '-h', '--', '-', '=', '--=', '--steps', '1e5', 'nan', '0x1']))
line = st.one_of(word, st.builds('--{}={}'.format, st.one_of(st.sampled_from(sorted(KNOBS)), st.text(max_size=8)), word),
                 st.builds('--{}={}'.format, st.sampled_from(sorted(KNOBS)), st.one_of(st.integers(), st.floats(), st.booleans())))


def settle(capsys, script, argv):
    capsys.readouterr()
    try:
        result = call(script, *argv)
    except SystemExit as e:
        out, err = capsys.readouterr()
        helped = e.code == 0 and err == ''
        assert helped or e.code == 2 and err.startswith('error: ') and err.count('\n') == 1 and out == ''
    else:
        assert [type(v) for v in result.values()] == [type(v) for v in KNOBS.values()] and list(result) == list(KNOBS)
        assert all(v == v for v in result.values())


@relaxed
@given(argv=st.lists(line, max_size=4))
def test_any_command_line(capsys, script, argv):
    settle(capsys, script, argv)


@relaxed
@given(value=st.one_of(st.text(), st.integers(), st.floats()), key=st.sampled_from(sorted(KNOBS)))
def test_values_come_back_as_they_were_written(script, capsys, value, key):
    if type(value) is type(KNOBS[key]) and value == value:
        assert call(script, f'--{key}={value}')[key] == value
    else:
        settle(capsys, script, [f'--{key}={value}'])


values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=5)),
                      lambda inner: st.lists(inner, max_size=2), max_leaves=3)


@relaxed
@given(pairs=st.lists(st.tuples(st.sampled_from([*KNOBS, 'zeta', '_mine', 'stepz']), values), max_size=4), tail=st.binary(max_size=12))
def test_any_config_file(capsys, script, tmp_path, pairs, tail):
    head = ''.join(f'{key} = {ascii(value)}\n' for key, value in pairs).replace('inf', '1e999').replace('nan', '_n')
    (tmp_path / 'c.py').write_bytes(head.encode() + b'#' + tail)  # the tail: bad encodings, NUL, a few statements
    settle(capsys, script, [str(tmp_path / 'c.py')])
