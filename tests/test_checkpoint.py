"""Checkpoints survive kills, full disks and damage; what is damaged or foreign is named, never used, never executed.
Elsewhere: resuming and what it refuses, two runs in a folder (test_train.py); the lock (test_configurator.py)."""
import ast
import glob
import json
import os
import pickle
import random
import re
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import model
from model import FELA, CheckpointError, FELAConfig, list_checkpoints, load_checkpoint, load_model, read_manifest, save_checkpoint
from runs import REPO, fails, metrics, train, write

SMALL = FELAConfig(vocab_size=7, n_layer=2, n_embd=8, n_head=1, gla_heads=1, n_modes=4, pattern='SL')

read = lambda path: Path(path).read_bytes()
loaded = lambda path: load_checkpoint(str(path))[0]['training']['step']


def state(step, **changes):
    weight = torch.randn(10, generator=torch.Generator().manual_seed(step))
    return {'model': {'w': weight}, 'optimizer': [], 'config': vars(SMALL), 'training': {'step': step}, **changes}


def save(folder, step, val=None, text='', **options):
    return save_checkpoint(str(folder), step, state(step), {'losses': {'val': val}, 'text': text}, **options)


def steps(folder):
    """The steps of the checkpoints in a folder, where there is nothing else: no litter, no half of one."""
    names = sorted(os.listdir(folder))
    assert names[1::2] == [name[:-4] + 'pt' for name in names[::2]]
    return [int(name[5:11]) for name in names[::2]]


def refused(path, load=load_checkpoint):
    """The one line."""
    with pytest.raises(CheckpointError) as e:
        load(str(path))
    assert '\n' not in str(e.value) and len(str(e.value)) < 400
    return str(e.value)


def forge(folder, number, **changes):
    """A manifest that fits the .pt beside it, whatever that is."""
    path = f'{folder}/step_{number:06d}'
    manifest = {**json.loads(read(path + '.json')), 'sha256': configurator.sha256_of(path + '.pt'), **changes}
    write(path + '.json', json.dumps({**manifest, 'check': model._check(manifest)}).encode())


def test_round_trip(tmp_path):
    path = save(tmp_path, 5, 1.5)
    assert sorted(os.listdir(tmp_path)) == ['step_000005.json', 'step_000005.pt'] and path.endswith('step_000005.pt')
    for source in (str(tmp_path), path, path[:-3] + '.json'):
        got, manifest = load_checkpoint(source)
        assert torch.equal(got.pop('model')['w'], state(5)['model']['w']) and state(5, model=0) == got | {'model': 0}
        assert (manifest['step'], manifest['losses'], manifest['final']) == (5, {'val': 1.5}, False)
    save(tmp_path, 5, final=True)
    save(tmp_path, 4)
    os.utime(tmp_path / 'step_000004.json', (2e9, 2e9))  # steps decide, no clock does
    assert [os.path.basename(p)[7:-5] for p in list_checkpoints(str(tmp_path))] == ['0005_final', '0005', '0004']
    assert load_checkpoint(str(tmp_path))[1]['final']


def test_names_of_wrappers_are_left_out_and_fields_have_defaults(tmp_path):
    net, prefixes = FELA(SMALL), ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.']
    weights = {prefixes[i % 4] + name: p for i, (name, p) in enumerate(net.state_dict().items())}
    config = {key: value for key, value in vars(SMALL).items() if key not in ('chunk_size', 'mlp_hidden')}
    save_checkpoint(str(tmp_path), 1, state(1, model=weights, config={**config, 'seed': 3}), {})
    again, saved, _ = load_model(str(tmp_path))
    assert again.config == SMALL and all(torch.equal(p, saved['model'][name]) for name, p in again.state_dict().items())


def test_retention_keeps_the_last_and_the_best(tmp_path):
    for step, val in enumerate((5.0, 1.0, None, 3.0, 2.0, None, 4.0), start=1):
        save(tmp_path, step, val, keep=2)
    assert steps(tmp_path) == [2, 6, 7]
    forge(tmp_path, 6, losses={'val': 'x'})
    save(tmp_path, 5, 2.5, keep=1)  # 6 and 7 are steps that a run has stepped back over: they are left for a look
    assert steps(tmp_path) == [2, 5, 6, 7]
    os.remove(tmp_path / 'step_000007.pt')
    save(tmp_path, 8, 0.5, keep=1)
    assert steps(tmp_path) == [8]
    save(tmp_path, 9, 0.7)
    assert steps(tmp_path) == [8, 9]


def test_kill_before_each_line(tmp_path, monkeypatch):
    """kill -9 in saving and retention: the new checkpoint or the one before, the best one always; the next clears up."""
    monkeypatch.setattr(os, 'fsync', lambda fd: None)  # against power cuts, not kills; and slow
    found, line, status = [], 0, 9
    while status:  # until it lives to the end
        line, left, folder = line + 1, line, tmp_path / f'{line}'
        folder.mkdir()
        for old in (1, 3):
            save(folder, old, float(old))

        def trace(frame, event, arg):
            nonlocal left
            left -= event == 'line'
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace if frame.f_code.co_filename in (model.__file__, configurator.__file__) else None
        if not (child := os.fork()):
            try:
                sys.settrace(trace)
                for _ in range(2):  # as when a run is stopped in the step in which it saves
                    save(folder, 4, 4.0, keep=1)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        found.append(loaded(folder))
        assert status in (0, signal.SIGKILL) and loaded(folder / 'step_000001.pt') == 1
        save(folder, 5, 5.0, keep=1)
        assert steps(folder) == [1, 5]
    assert found == sorted(found) and set(found) == {3, 4} and line > 120


def test_flushed_before_renamed_and_the_manifest_last(tmp_path, monkeypatch):
    """What a power cut leaves is what the order of these calls allows."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: calls.append(os.readlink(f'/proc/self/fd/{fd}')) or fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda old, new: calls.append((old, new)) or replace(old, new))
    path, tmp = save(tmp_path, 1), f'{tmp_path}/unfinished.tmp'
    assert calls == [tmp, (tmp, path), str(tmp_path), tmp, (tmp, path[:-2] + 'json'), str(tmp_path)]


def test_a_full_disk_leaves_nothing_and_spoils_nothing(tmp_path):
    """By a quota, which stands for it: in the middle of a .pt; and where that just fits, but not its manifest."""
    save(tmp_path, 1)
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), list(map(read, sorted(tmp_path.iterdir())))
    for step, text in ((2, ''), (2, 'x' * 9000), (1, 'x' * 9000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000 if text else 500, limits[1]))
        try:
            line = refused(tmp_path, lambda folder: save(folder, step, text=text, keep=1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f'step_00000{step}.{"json" if text else "pt"} was not written, others are whole: ' in line
        assert 'File too large' in line and before == list(map(read, sorted(tmp_path.iterdir())))


@pytest.mark.parametrize('name', ['step_000001.pt', 'step_000001.json', 'unfinished.tmp'])
def test_links_lead_nowhere(tmp_path, name):
    """A folder from elsewhere may hold links under the names that we write to."""
    (tmp_path / 'out').mkdir()
    write(tmp_path / 'precious', b'as it was')
    os.symlink(tmp_path / 'precious', tmp_path / 'out' / name)
    save(tmp_path / 'out', 1)
    assert steps(tmp_path / 'out') == [1] and loaded(tmp_path / 'out') == 1
    assert read(tmp_path / 'precious') == b'as it was'


@pytest.mark.parametrize('ext', ['pt', 'json'])
def test_every_byte_is_checked(tmp_path, capsys, ext):
    save(tmp_path, 1)
    path, rng = save(tmp_path, 2)[:-2] + ext, random.Random(0)
    whole = read(path)
    lengths = {0, 1, 63, 64, len(whole) // 2, len(whole) - 22, len(whole) - 1}
    flips = [bytes([*whole[:i], whole[i] ^ 1 << rng.randrange(8), *whole[i + 1:]]) for i in range(len(whole))]
    for i, bad in enumerate([*(whole[:n] for n in lengths), whole + b'x', *flips]):
        write(path, bad)
        if ext == 'json' and i > len(lengths) and bad.split() == whole.split():
            continue  # another kind of white space
        assert 'step_000002' in refused(tmp_path / 'step_000002.pt')
        assert i % 20 or loaded(tmp_path) == 1 and re.fullmatch('.*step_000002.*STEPPING BACK\n', capsys.readouterr().err)


def test_nothing_is_executed(tmp_path):
    """Pickle bombs under a perfect manifest."""
    class Bomb:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/boom',)
    for bomb in (lambda file: torch.save(state(3, training=Bomb()), file), lambda file: pickle.dump(Bomb(), file)):
        path = save(tmp_path, 3)
        with open(path, 'wb') as file:
            bomb(file)
        assert 'damaged' in refused(path)
        forge(tmp_path, 3)
        assert 'step_000003.pt is refused: Weights only load failed' in refused(path)
        assert 'no whole checkpoint' in refused(tmp_path)
    assert not os.path.exists(tmp_path / 'boom')


def test_foreign_files(tmp_path):
    path, json_path = save(tmp_path, 1), tmp_path / 'step_000001.json'
    for step in ('x', None, [], 1e300, 1):
        forge(tmp_path, 1, step=step, sha256='5')
        assert 'is refused' in refused(path)
    for content in ([1, 2], {'weights': torch.ones(1)}, 3, torch.ones(3)):
        torch.save(content, path)
        forge(tmp_path, 1)
        assert 'is refused' in refused(path)
    for text in (b'[]', b'3', b'null', b'{}', b'[' * 100000, b'{"step": 1}', b'\0', b'{"check": 1}', b'\xff'):
        write(json_path, text)
        assert 'step_000001.json is missing, damaged' in refused(path)
    for changes in ({'config': 3}, {'config': {'n_layer': 'x'}}, {'model': {'embedding.weight': 3}}, {'model': {}}):
        save_checkpoint(str(tmp_path), 1, state(1, **changes), {})
        assert 'step_000001.pt does not fit its config' in refused(path, load_model)
    # as the first edition wrote them; its layers had other names and weights
    save_checkpoint(str(tmp_path), 1, state(1, model={'blocks.0.mixer.input.weight': torch.ones(2)}), {})
    write(json_path, read(json_path).replace(b'"check"', b'"manifest_sha256"'))
    assert 'step_000001.json is of the first edition of FELA (commit 710124b)' in refused(path, load_model)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
anything = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x), max_leaves=6)


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.none() | st.binary(max_size=40), whole=st.binary(max_size=40),
       key=st.sampled_from('step final sha256 config losses training text'.split()), value=anything)
def test_any_manifest_and_any_bytes(tmp_path, data, whole, key, value):
    """Read, or refused in one line, also where the checksums fit, as a forger writes them."""
    save(tmp_path, 1)
    for forgery in (lambda: forge(tmp_path, 1, **{key: value}), lambda: data is None or write(tmp_path / 'step_000001.pt', data),
                    lambda: forge(tmp_path, 1), lambda: write(tmp_path / 'step_000001.json', whole)):
        forgery()
        for load in (read_manifest, load_checkpoint):
            try:
                load(str(tmp_path / 'step_000001.json'))
            except CheckpointError as e:
                assert '\n' not in str(e)


def test_what_is_not_there(tmp_path):
    assert f'{tmp_path}: no whole checkpoint there (expected step_NNNNNN.pt' in refused(tmp_path)
    for name in ('no', 'step_000001.pt'):
        assert f'{name} is not there: expected a folder of checkpoints, or one of them' in refused(tmp_path / name)
    for ext in ('pt', 'json'):
        os.rename(save(tmp_path, 1)[:-2] + ext, tmp_path / f'step_000007.{ext}')
    assert 'misnamed, its manifest is of step 1' in refused(tmp_path / 'step_000007.pt')
    forge(tmp_path, 7, step=7, file='../step_000001.pt')  # a name that we do not follow
    os.remove(tmp_path / 'step_000007.pt')
    assert 'step_000007.pt is refused: ' in refused(tmp_path / 'step_000007.json')


def test_training_writes_no_secrets_and_steps_back_loudly(tmp_path, data):
    args = data, '--max_iters=6', '--save_interval=2', '--keep_checkpoints=0'
    train(tmp_path, *args, env=dict.fromkeys(('WANDB_API_KEY', 'HF_TOKEN', 'AWS_SECRET_ACCESS_KEY'), 'swordfish'))
    for path in filter(os.path.isfile, glob.glob(f'{tmp_path}/**', recursive=True)):  # what it printed is there, too
        assert b'swordfish' not in read(path), path
    for name in ('step_000006_final.pt', 'step_000006.json'):
        write(tmp_path / 'out' / name, read(tmp_path / 'out' / name).replace(b'a', b'b'))
    run = train(tmp_path, *args)
    assert run.err.count('STEPPING BACK') == 2 and 'going on from out, step 4' in run.out
    assert list(metrics(tmp_path / 'out', 'loss')) == [1, 2, 3, 4, 5, 6]
    for path in glob.glob(f'{tmp_path}/out/*.pt'):
        os.truncate(path, 5)
    assert 'out: no whole checkpoint there' in fails(tmp_path, *args)  # never from scratch beside them


FORBIDDEN = '''eval exec compile __import__ import_module importlib.import_module runpy.run_path os.system os.popen
    shelve.open yaml.load joblib.load torch.hub.load torch.jit.load tarfile.open zipfile.ZipFile shutil.unpack_archive'''.split()
ALLOWED = {'configurator.py': ['compile', 'exec'], 'prepare.py': ['import_module'] * 3}  # the user's config file; gzip, bz2, lzma


@pytest.mark.parametrize('path', glob.glob(f'{REPO}/*.py'), ids=os.path.basename)
def test_no_text_becomes_code(path):
    source, found = read(path).decode(), []
    assert '_object(' not in source and '_object_list(' not in source  # collectives that unpickle
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not {'pickle', 'marshal', 'dill'} & {getattr(node, 'module', ''), *(n.name for n in node.names)}
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            found += [name] * (name in FORBIDDEN)
            assert not name.endswith('torch.load') or options.get('weights_only') == 'True', ast.unparse(node)
            assert {options.get(key, 'False') for key in ('allow_pickle', 'shell', 'trust_remote_code')} == {'False'}
    assert sorted(found) == ALLOWED.get(os.path.basename(path), []), found
