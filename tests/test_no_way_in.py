"""Nothing that is read becomes code, no secret is written down: what can be proved by reading our own source, and by runs."""
import ast
import glob
import json
import os

import pytest

from runs import REPO, fails, make_data, train

SCRIPTS = sorted(glob.glob(os.path.join(REPO, '*.py')))
FORBIDDEN = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'pickle.load', 'pickle.loads', 'marshal.load',
             'marshal.loads', 'shelve.open', 'yaml.load', 'dill.load', 'joblib.load', 'runpy.run_path', 'importlib.import_module',
             'torch.hub.load', 'torch.jit.load', 'tarfile.open', 'zipfile.ZipFile', 'shutil.unpack_archive'}


@pytest.mark.parametrize('path', SCRIPTS, ids=os.path.basename)
def test_no_text_becomes_code(path):
    """The one exception is a user's own config file, in configurator.py."""
    with open(path) as file:
        tree, found = ast.parse(file.read()), []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name in FORBIDDEN:
            found.append(name)
        if name.endswith('torch.load'):
            assert options.get('weights_only') == 'True', f'{path}:{call.lineno}'
        if name in ('np.load', 'numpy.load'):
            assert options.get('allow_pickle', 'False') == 'False', f'{path}:{call.lineno}'
        assert options.get('shell', 'False') == 'False', f'{path}:{call.lineno}: a shell'
        assert options.get('trust_remote_code', 'False') == 'False', f'{path}:{call.lineno}'
    assert sorted(found) == (['compile', 'exec'] if path.endswith('configurator.py') else []), found


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return '--dataset=' + make_data(tmp_path_factory.mktemp('data'))


def test_secrets_are_not_written_down(tmp_path, data):
    secrets = {name: f'swordfish-{name}' for name in ('WANDB_API_KEY', 'HF_TOKEN', 'AWS_SECRET_ACCESS_KEY')}
    run = train(tmp_path, data, '--max_iters=2', '--save_interval=1', env=secrets)
    assert 'swordfish' not in run.out + run.err
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            with open(os.path.join(folder, name), 'rb') as file:
                assert b'swordfish' not in file.read(), name


def test_damage_beside_the_checkpoints(tmp_path, data):
    """A lock or a metrics.jsonl of any bytes, and a checkpoint of another program, end in going on or in one line."""
    train(tmp_path, data, '--max_iters=3', '--save_interval=2', '--keep_checkpoints=0')
    out = tmp_path / 'out'
    lines = (out / 'metrics.jsonl').read_bytes()
    os.remove(out / 'step_000003_final.json')
    torn = b'{"step": 1, "lo{"step": 2}\n[[[\n{}\n3\n{"step": "x"}\n{"step": NaN}\n\xff\xfe\0}\n{"step": 1, "tail": '
    (out / 'metrics.jsonl').write_bytes(lines + torn)
    (out / 'lock').write_bytes(b'\xff\xfe\0\n\x1b')
    run = train(tmp_path, data, '--max_iters=3', '--keep_checkpoints=0')
    assert 'going on from out/step_000002.pt' in run.out and 'stale' in run.out
    assert [json.loads(line)['step'] for line in (out / 'metrics.jsonl').read_text().splitlines()]

    from model import load_checkpoint, save_checkpoint
    state, manifest = load_checkpoint(str(out))
    for change in ({'training': {}}, {'optimizer': None}, {'model': {'w': 3}}, {'training': state['training'] | {'mean': 'x'}}):
        save_checkpoint(str(out), 9, state | change, manifest)
        assert 'step_000009.pt is no checkpoint that train.py wrote' in fails(tmp_path, data, '--max_iters=20')
