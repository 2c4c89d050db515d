"""Checkpoints survive kills, full disks and damage; what is damaged or foreign is named and never used."""
import errno
import glob
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

import model
from model import (CheckpointError, list_checkpoints, load_checkpoint, open_folder, read_manifest, save_checkpoint,
                   tidy_folder)
from reliability_kill import kill_many
from runs import fails, make_data, metrics, start, train


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return '--dataset=' + make_data(tmp_path_factory.mktemp('data'))


def state(step, size=1000):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(step))
    return {'model': {'w': weight}, 'optimizer': [{'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': []}],
            'config': {'n_layer': 2}, 'training': {'step': step}}


def save(folder, step, val=None, **kwargs):
    os.makedirs(folder, exist_ok=True)
    manifest = {'losses': {'val': val}, 'config': {}, 'tokenizer': 'bytes'}
    return save_checkpoint(str(folder), step, state(step), manifest, **kwargs)


def loaded(path):
    return load_checkpoint(str(path))[0]['training']['step']


# --------------------------------------------------------------------------------------------------------- the files


def test_round_trip(tmp_path):
    path = save(tmp_path, 5, 1.5)
    assert sorted(os.listdir(tmp_path)) == ['step_000005.json', 'step_000005.pt'] and path.endswith('step_000005.pt')
    for source in (tmp_path, path, path[:-3] + '.json'):
        got, manifest = load_checkpoint(str(source))
        assert torch.equal(got['model']['w'], state(5)['model']['w']) and got['training'] == {'step': 5}
        assert manifest['step'] == 5 and manifest['losses'] == {'val': 1.5}
        assert manifest['bytes'] == os.path.getsize(path)
    save(tmp_path, 5, final=True)
    save(tmp_path, 4)
    os.utime(tmp_path / 'step_000004.json', (2e9, 2e9))  # steps decide, no clock does
    assert [os.path.basename(p) for p in list_checkpoints(str(tmp_path))] == \
        ['step_000005_final.json', 'step_000005.json', 'step_000004.json']
    assert loaded(tmp_path) == 5 and load_checkpoint(str(tmp_path))[1]['final']


def test_wrappers_leave_no_names(tmp_path):
    inner = state(1)
    inner['model'] = {'module._orig_mod.blocks.0.w': torch.ones(2), '_orig_mod.module.v': torch.ones(2)}
    save_checkpoint(str(tmp_path), 1, inner, {'losses': {}})
    assert set(load_checkpoint(str(tmp_path))[0]['model']) == {'blocks.0.w', 'v'}


def test_retention_keeps_the_best_and_the_last(tmp_path):
    for step, val in enumerate((5.0, 1.0, None, 3.0, 2.0, None, 4.0), start=1):
        save(tmp_path, step, val, keep=2)
    assert sorted(os.listdir(tmp_path)) == [f'step_00000{i}.{e}' for i in (2, 6, 7) for e in ('json', 'pt')]
    save(tmp_path, 8, 0.5, keep=1)
    assert sorted(os.listdir(tmp_path)) == ['step_000008.json', 'step_000008.pt']


def test_nothing_is_deleted_before_the_new_one_is_verified(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = sorted(os.listdir(tmp_path))
    real = open

    def lying_disk(path, mode='r', *args, **kwargs):  # gives back other bytes than it was given
        if 'r' in mode and str(path).endswith('.pt.tmp'):
            with real(path, 'r+b') as file:
                file.seek(100)
                file.write(b'\xff\x00\xff')
        return real(path, mode, *args, **kwargs)
    def full_disk(path, *args, **kwargs):  # the .pt just fits, its manifest does not
        if str(path).endswith('.json.tmp'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        return real(path, *args, **kwargs)
    for disk, says in ((lying_disk, 'gave back something else'), (full_disk, 'step_000002.json: No space left')):
        monkeypatch.setitem(vars(model), 'open', disk)
        with pytest.raises(CheckpointError, match=says):
            save(tmp_path, 2, keep=1)
        assert sorted(os.listdir(tmp_path)) == before and loaded(tmp_path) == 1


def test_kill_at_every_line(tmp_path):
    """kill -9 before each line of saving and of retention: the new checkpoint or the one before, the best one always."""
    for step, val in ((1, 1.0), (2, 2.0), (3, 3.0)):
        save(tmp_path / 'before', step, val)
    places = {f.__code__ for f in (save_checkpoint, model._write_whole, model._prune, model._remove)}
    found, line, status = [], 0, 9
    while status:  # until it lives to the end
        line, left, folder = line + 1, line, tmp_path / 'now'
        shutil.copytree(tmp_path / 'before', folder)

        def trace(frame, event, arg):
            nonlocal left
            left -= event == 'line'
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace if frame.f_code in places else None
        child = os.fork()
        if not child:
            try:
                sys.settrace(trace)
                save(folder, 4, 4.0, keep=1)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        found.append(loaded(folder))
        tidy_folder(str(folder), go_on=True)
        assert loaded(folder) == found[-1] and loaded(folder / 'step_000001.pt') == 1
        assert len(os.listdir(folder)) == 2 * len(list_checkpoints(str(folder)))
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {3, 4} and line > 50


def damaged_one_is_stepped_over(folder, capsys, step=2):
    assert loaded(folder) == 1
    err = capsys.readouterr().err
    assert f'step_{step:06d}' in err and 'STEPPING BACK' in err and 'damaged' in err and len(err.splitlines()) == 1
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(os.path.join(str(folder), f'step_{step:06d}.pt'))
    assert '\n' not in str(e.value) and 'damaged' in str(e.value)


def test_every_class_of_truncation(tmp_path, capsys):
    save(tmp_path, 1)
    for path in (save(tmp_path, 2), str(tmp_path / 'step_000002.json')):
        whole = open(path, 'rb').read()
        for length in (0, 1, 2, 63, 64, len(whole) // 2, len(whole) - 100, len(whole) - 22, len(whole) - 1):
            with open(path, 'wb') as file:
                file.write(whole[:length])
            damaged_one_is_stepped_over(tmp_path, capsys)
        with open(path, 'wb') as file:
            file.write(whole + b'\n')
        if path.endswith('.pt'):
            damaged_one_is_stepped_over(tmp_path, capsys)
        with open(path, 'wb') as file:
            file.write(whole)
    os.remove(tmp_path / 'step_000002.pt')
    assert loaded(tmp_path) == 1 and 'STEPPING BACK' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['step_000002.pt', 'step_000002.json'])
def test_bit_flips(tmp_path, capsys, name):
    save(tmp_path, 1)
    save(tmp_path, 2)
    whole, rng = (tmp_path / name).read_bytes(), random.Random(0)
    for _ in range(200):
        bad = bytearray(whole)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(bad)
        if name.endswith('.pt') or read_whole(tmp_path / name) != json.loads(whole):
            damaged_one_is_stepped_over(tmp_path, capsys)


def read_whole(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_nothing_is_executed(tmp_path):
    """A pickle bomb with a perfect manifest."""
    class Bomb:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/boom',)
    torch.save({**state(3), 'training': Bomb()}, tmp_path / 'bomb.pt')
    with open(tmp_path / 'plain.pt', 'wb') as file:
        pickle.dump(Bomb(), file)
    for bomb in ('bomb.pt', 'plain.pt'):
        folder = tmp_path / bomb[:-3]
        folder.mkdir()
        save(folder, 3)
        shutil.copy(tmp_path / bomb, folder / 'step_000003.pt')
        forge(folder, 3)
        with pytest.raises(CheckpointError, match='refused') as e:
            load_checkpoint(str(folder / 'step_000003.pt'))
        assert '\n' not in str(e.value) and not (tmp_path / 'boom').exists()
        with pytest.raises(CheckpointError):
            load_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match='manifest'):  # no manifest: not even looked at
        load_checkpoint(str(tmp_path / 'bomb.pt'))


def forge(folder, step, **changes):
    """A manifest that fits the .pt, whatever it is."""
    from model import _manifest_sha256, _sha256
    with open(folder / f'step_{step:06d}.pt', 'rb') as file:
        manifest = {**read_manifest(str(folder / f'step_{step:06d}.json')), 'sha256': _sha256(file), **changes}
    manifest['bytes'] = os.path.getsize(folder / f'step_{step:06d}.pt')
    manifest['manifest_sha256'] = _manifest_sha256(manifest)
    (folder / f'step_{step:06d}.json').write_text(json.dumps(manifest))


def test_foreign_files(tmp_path):
    save(tmp_path, 1)
    for content in ([1, 2], {'weights': torch.ones(1)}, 3):
        torch.save(content, tmp_path / 'step_000001.pt')
        forge(tmp_path, 1)
        with pytest.raises(CheckpointError, match='not a FELA checkpoint'):
            load_checkpoint(str(tmp_path / 'step_000001.pt'))
    with zipfile.ZipFile(tmp_path / 'step_000001.pt', 'w') as file:
        file.writestr('../../evil', 'x')
    forge(tmp_path, 1)
    with pytest.raises(CheckpointError, match='refused'):
        load_checkpoint(str(tmp_path / 'step_000001.pt'))
    for text in ('[]', '3', 'null', '{}', '[' * 100000, '{"step": 1}', '\x00', '{"manifest_sha256": 1}'):
        (tmp_path / 'step_000001.json').write_text(text)
        with pytest.raises(CheckpointError, match='step_000001.json'):
            load_checkpoint(str(tmp_path / 'step_000001.pt'))
    save(tmp_path, 1)
    for ext in ('.pt', '.json'):
        os.rename(tmp_path / f'step_000001{ext}', tmp_path / f'step_000007{ext}')
    with pytest.raises(CheckpointError, match='misnamed: it is the manifest of step 1'):
        load_checkpoint(str(tmp_path / 'step_000007.pt'))
    for path, says in ((tmp_path / 'no', 'no such checkpoint'), (tmp_path / 'x', 'no checkpoint there')):
        (tmp_path / 'x').mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=says):
            load_checkpoint(str(path))


def test_manifest_leads_nowhere(tmp_path):
    """Names inside a manifest are not paths that we follow: the .pt is the one beside it."""
    (tmp_path / 'out').mkdir()
    save(tmp_path, 1)
    save(tmp_path / 'out', 2)
    forge(tmp_path / 'out', 2, file='../step_000001.pt', path='/etc/passwd')
    assert loaded(tmp_path / 'out') == 2
    (tmp_path / 'out' / 'step_000002.pt').unlink()
    with pytest.raises(CheckpointError, match='No such file'):
        load_checkpoint(str(tmp_path / 'out' / 'step_000002.json'))


def test_links_lead_nowhere(tmp_path):
    """A folder from elsewhere may hold links under the names that we write to."""
    (tmp_path / 'precious').write_text('as it was')
    for name in ('step_000001.pt', 'step_000001.pt.tmp', 'step_000001.json', 'step_000001.json.tmp', 'lock'):
        os.makedirs(tmp_path / 'out', exist_ok=True)
        os.symlink(tmp_path / 'precious', tmp_path / 'out' / name)
        if name == 'lock':
            with pytest.raises(OSError, match='symbolic link'):
                open_folder(str(tmp_path / 'out'))
        else:
            save(tmp_path / 'out', 1)
            assert loaded(tmp_path / 'out') == 1
        assert (tmp_path / 'precious').read_text() == 'as it was'
        shutil.rmtree(tmp_path / 'out')


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    import fcntl

    def flock(*args):
        raise OSError(errno.ENOSYS, 'Function not implemented')
    monkeypatch.setattr(fcntl, 'flock', flock)
    assert open_folder(str(tmp_path)) == '' and 'cannot be locked' in capsys.readouterr().err


def test_unfinished_ones_do_not_exist(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    os.remove(path[:-3] + '.json')
    shutil.copy(path, tmp_path / 'step_000003.pt.tmp')
    (tmp_path / 'step_000009.json.tmp').write_text('{')
    assert loaded(tmp_path) == 1
    with pytest.raises(CheckpointError, match='never finished'):
        load_checkpoint(path)


# ----------------------------------------------------------------------------------------------------- with processes


def test_kill_anywhere(tmp_path):
    counts = kill_many(tmp_path, 8)
    assert counts['restarts that went on'] >= 3 and counts['torn files met'] == 0


def test_training_steps_back_loudly(tmp_path, data):
    train(tmp_path, data, '--max_iters=6', '--save_interval=2', '--keep_checkpoints=0')
    for name in ('step_000006_final.pt', 'step_000006.json'):
        with open(tmp_path / 'out' / name, 'r+b') as file:
            file.seek(50)
            file.write(b'damage')
    run = train(tmp_path, data, '--max_iters=6', '--save_interval=2', '--keep_checkpoints=0')
    assert run.err.count('STEPPING BACK') == 2 and 'going on from out/step_000004.pt' in run.out
    assert list(metrics(tmp_path / 'out', 'loss')) == [1, 2, 3, 4, 5, 6]
    for path in glob.glob(str(tmp_path / 'out' / '*.pt')):
        os.truncate(path, 5)
    assert 'none of its 4 checkpoints is whole' in fails(tmp_path, data, '--max_iters=6')
    assert len(glob.glob(str(tmp_path / 'out' / '*.pt'))) == 4


def test_quota_in_the_middle_of_a_checkpoint(tmp_path, data):
    """RLIMIT_FSIZE stands for a quota or a full disk: the write fails when part of the file is there."""
    train(tmp_path, data, '--max_iters=2')
    before = sorted(os.listdir(tmp_path / 'out'))
    line = fails(tmp_path, data, '--max_iters=4', fsize=50000, code=1)
    assert 'could not write out/step_000004_final.pt: File too large; earlier checkpoints are as they were' in line
    assert sorted(os.listdir(tmp_path / 'out')) == before and loaded(tmp_path / 'out') == 2
    run = start(tmp_path, data, '--max_iters=6', '--save_interval=2', '--on_save_error=continue', fsize=50000).wait()
    assert run.code == 1 and run.out.count('training goes on') == 3 and 'not saved' in run.err, (run.out, run.err)
    assert sorted(os.listdir(tmp_path / 'out')) == before and loaded(tmp_path / 'out') == 2
    train(tmp_path, data, '--max_iters=6')


def mount(folder, options):
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('no right to mount a small file system here')


def test_full_disk(tmp_path, data):
    mount(tmp_path / 'small', 'size=600k')
    try:
        line = fails(tmp_path, data, '--max_iters=4', '--out_dir=small/a', '--n_embd=128')
        assert 'no space left' in line and 'bytes' in line  # known before the first step
        line = fails(tmp_path, data, '--max_iters=9', '--out_dir=small/b', '--save_interval=1', '--keep_checkpoints=0',
                     code=1)
        assert 'No space left on device; earlier checkpoints are as they were' in line
        assert loaded(tmp_path / 'small' / 'b') >= 1 and not glob.glob(str(tmp_path / 'small' / 'b' / '*.tmp'))
        subprocess.run(['mount', '-o', 'remount,ro', str(tmp_path / 'small')], check=True)
        assert 'Read-only file system' in fails(tmp_path, data, '--max_iters=9', '--out_dir=small/b')
        assert 'Read-only file system' in fails(tmp_path, data, '--max_iters=9', '--out_dir=small/c')
        assert loaded(tmp_path / 'small' / 'b') >= 1
    finally:
        subprocess.run(['umount', str(tmp_path / 'small')])
