"""train_diloco.py as people meet it: real processes, real torchrun, a real S3 server."""
import json
import os
import re
import shutil
import signal
import socket

import pytest
import torch

from diloco_nodes import TINY, Node, first_node, free_port, ledger, newest, rounds, until
from runs import Run, fails, make_data, metrics, train

DILOCO = [*TINY, '--out_dir=out', '--max_tokens=0']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return '--dataset=' + make_data(tmp_path_factory.mktemp('data'))


def start(folder, ranks, *args, env=None, each=None, one_machine=False):
    """What torchrun does, without its start-up time and its restarts; one_machine: each rank comes again to its own folder."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    group = {'WORLD_SIZE': str(ranks), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port} if ranks > 1 else {}
    return [Run(folder, 'train_diloco.py', [*DILOCO, *args, *(each or {}).get(i, [])],
                env={**(env or {}), **group, **({'RANK': str(i)} if ranks > 1 else {}),
                     **({'LOCAL_RANK': str(i)} if one_machine else {})}) for i in range(ranks)]


def diloco(folder, ranks, *args, code=0, **kwargs):
    runs = [run.wait(400) for run in start(folder, ranks, *args, **kwargs)]
    assert [run.code for run in runs] == [code] * ranks, [(run.code, run.out, run.err) for run in runs]
    return runs


def errors(runs):
    """The one line of each."""
    for run in runs:
        lines = run.err.splitlines()
        assert lines and lines[-1].startswith('error: ') and 'Traceback' not in run.err, run.err
    return [run.err.splitlines()[-1] for run in runs]


def final(folder, out='out'):
    name = max(name for name in os.listdir(os.path.join(str(folder), out)) if name.endswith('_final.pt'))
    return torch.load(os.path.join(str(folder), out, name), weights_only=True)


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
def test_one_worker_with_a_plain_outer_step_is_train_py(tmp_path, data, schedule):
    """M=1, H=1, outer lr 1, momentum 0."""
    shape = [a for a in TINY if a.split('=')[0] not in ('--H', '--eval_rounds', '--batch_tokens')]
    args = [data, *shape, '--batch_tokens=256', '--max_tokens=7680', f'--schedule={schedule}', '--out_dir=a']
    train(tmp_path, *args, '--pattern=SL', '--n_layer=2', '--n_modes=8')
    diloco(tmp_path, 1, *args, '--out_dir=b', '--H=1', '--outer_lr=1', '--outer_momentum=0')
    a, b = metrics(tmp_path / 'a', 'loss'), {r: row['loss'] for r, row in rounds(tmp_path / 'b').items()}
    assert list(a) == list(b) == list(range(1, 31))
    assert list(a.values()) == list(b.values())
    a, b = final(tmp_path, 'a')['model'], final(tmp_path, 'b')['model']
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('slow', [False, True])
def test_rounds_are_as_published(tmp_path, data, slow):
    """Three workers, against the algorithm written down once more, in one process; also with a worker that is too slow for H steps."""
    from model import FELA, FELAConfig
    from prepare import TokenData
    H, M, R, W = 4, 3, 3, 4
    diloco(tmp_path, M, data, f'--H={H}', f'--max_rounds={R}', '--outer_dtype=fp32', '--outer_lr=0.5', '--outer_momentum=0.9',
           '--learning_rate=1e-3',  # at 1e-2 rounding grows: fp32 and fp64 part by up to 5e-2, depending on the text
           '--schedule=constant', '--warmup_iters=0', '--warmup_rounds=1', *['--round_seconds=0.03'] * slow,
           each={1: ['--micro_batch_size=1']} if slow else {})
    state, rows = final(tmp_path), rounds(tmp_path)
    torch.manual_seed(1337)
    config = state['config']
    models = [FELA(FELAConfig(vocab_size=261, n_layer=2, n_head=2, n_embd=16, n_modes=8, pattern='SL')) for _ in range(M)]
    for m in models[1:]:
        m.load_state_dict(models[0].state_dict())
    opts = [m.configure_optimizers('adamw', config['learning_rate'], config['weight_decay'], (0.9, 0.95))[0] for m in models]
    source = TokenData(data.partition('=')[2], 'train', 32, 1337)
    theta = [p.detach().clone() for p in models[0].parameters()]
    momentum = [torch.zeros_like(p) for p in theta]
    left, following = [], 0
    for r in range(R):
        dealt = left + list(range(following, following + M * H - len(left)))
        following, done = dealt[-1] + 1, rows[r + 1]['done']
        mine = [dealt[i * H:i * H + done[i]] for i in range(M)]
        left = sorted(set(dealt) - set(sum(mine, [])))
        for h in range(H):
            active = [i for i in range(M) if h < done[i]]
            for i in active:
                x, y = map(torch.from_numpy, source.batch(mine[i][h] * W, W))
                models[i](x, y)[1].backward()
            if r == 0:  # the first round is plain data parallel
                for ps in zip(*(m.parameters() for m in models)):
                    mean = sum(p.grad for p in ps) / M
                    for p in ps:
                        p.grad = mean.clone()
            for i in active:
                for group in opts[i].param_groups:
                    group['lr'] = config['learning_rate'] * group['lr_scale']
                torch.nn.utils.clip_grad_norm_(models[i].parameters(), 1.0)
                opts[i].step()
                opts[i].zero_grad()
        for j, ps in enumerate(zip(*(m.parameters() for m in models))):
            if r == 0:
                theta[j] = ps[0].detach().clone()
            else:
                pseudo = sum((theta[j] - p.detach()) * n for p, n in zip(ps, done)) / sum(done)
                momentum[j] = 0.9 * momentum[j] + pseudo
                theta[j] = theta[j] - 0.5 * (pseudo + 0.9 * momentum[j])
            for p in ps:
                p.data.copy_(theta[j])
    for (name, _), p in zip(models[0].named_parameters(), theta):
        torch.testing.assert_close(state['model'][name], p, rtol=0, atol=1e-5)  # 12 steps of up to 1e-3
    torch.testing.assert_close(state['outer'], torch.cat([m.flatten() for m in momentum]), rtol=0, atol=1e-5)
    assert (state['training']['left'], state['training']['next']) == (left, following) and [rows[r]['workers'] for r in rows] == [3] * 3
    assert (left == []) != slow, 'nobody was slow'


def test_communication_is_counted(tmp_path, data):
    run = diloco(tmp_path, 2, data, '--H=50', '--max_rounds=2')[0]
    line = next(line for line in run.out.splitlines() if line.startswith('communication'))
    less = float(line.rpartition(': ')[2].split()[0])
    assert 50 < less <= 100, line
    text = (tmp_path / 'out' / 'worker_01' / 'log.txt').read_text()
    assert text.count('theta') == 4 and 'worker 0 of 2: steps of data [[' in text or 'worker 1 of 2: steps of data [[' in text


# ---------------------------------------------------------------------------------------------------------- the ledger


def test_ledger_over_changing_worker_counts(tmp_path, data):
    """3, then 2, then 4 workers, the last of them slow; nothing is read twice, nothing left out."""
    diloco(tmp_path, 3, data, '--max_rounds=2')
    diloco(tmp_path, 2, data, '--max_rounds=4')
    run = diloco(tmp_path, 4, data, '--max_rounds=7', '--round_seconds=0.02')[0]
    assert 'going on from round 4' in run.out
    rows, state = rounds(tmp_path), final(tmp_path)['training']
    assert [rows[r]['workers'] for r in range(1, 8)] == [3, 3, 2, 2, 4, 4, 4]
    assert any(min(row['done']) < 5 for row in rows.values()), 'nobody was slow'
    assert sorted(ledger(rows) + state['left']) == list(range(state['next']))
    assert state['tokens'] == 128 * len(ledger(rows)) == rows[7]['tokens']
    diloco(tmp_path, 2, data, '--max_rounds=9')  # the steps left over come first
    rows = rounds(tmp_path)
    assert ledger(rows) == list(range(len(ledger(rows))))


def test_budget_in_tokens_and_a_finished_run(tmp_path, data):
    run = diloco(tmp_path, 2, data, '--max_tokens=3000')[0]  # rounds of 1280, 1280 and 512
    assert final(tmp_path)['training']['tokens'] == 3072 and 'round     3 | 100%' in run.out
    run = diloco(tmp_path, 2, data, '--max_tokens=3000')[0]
    assert 'finished' in run.out and '--max_tokens' in run.out and len(rounds(tmp_path)) == 3


def test_resume_is_exact(tmp_path, data):
    for out, stops in (('a', [6]), ('b', [2, 6])):
        for stop in stops:
            diloco(tmp_path, 2, data, f'--out_dir={out}', f'--max_rounds={stop}', '--schedule=constant', '--warmup_iters=0',
                   one_machine=True)
    a, b = final(tmp_path, 'a'), final(tmp_path, 'b')
    assert a['training'] == b['training'] and all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])


def test_newest_round_wins_and_a_newcomer_gets_everything(tmp_path, data):
    """Each worker of its own machine: one lost its disk, one missed a round, one has a damaged newest snapshot."""
    places = {i: [f'--out_dir=m{i}'] for i in range(4)}
    diloco(tmp_path, 4, data, '--max_rounds=3', each=places)
    before = torch.load(tmp_path / 'm1/worker_00/step_000003.pt', weights_only=True)
    shutil.rmtree(tmp_path / 'm0')
    for name in ('step_000003.pt', 'step_000003.json'):
        os.remove(tmp_path / 'm2/worker_00' / name)
    with open(tmp_path / 'm3/worker_00/step_000003.pt', 'r+b') as file:
        file.seek(1000)
        file.write(b'damage')
    runs = diloco(tmp_path, 4, data, '--max_rounds=4', each=places)
    assert 'going on from round 3' in runs[0].out and 'STEPPING BACK' in runs[3].err
    states = [torch.load(tmp_path / f'm{i}/worker_00/step_000004.pt', weights_only=True) for i in range(4)]
    for state in states[1:]:
        assert state['training'] == states[0]['training'] and torch.equal(state['outer'], states[0]['outer'])
    steps = {float(state['optimizer'][0]['state'][0]['step']) for state in states}
    assert steps == {float(before['optimizer'][0]['state'][0]['step']) + 5}  # the inner state came along
    assert sorted(s for i in range(4) for s in ledger(rounds(tmp_path / f'm{i}'))) and newest(tmp_path) == 4


# --------------------------------------------------------------------------------------------------- torchrun, elastic


def test_nodes_come_and_go(tmp_path, data):
    """kill -9 of a worker, a node joins, kill -9 of a node: with real torchrun agents."""
    port = free_port()
    args = [*TINY, data, '--max_tokens=0', '--max_rounds=1000', '--timeout=10', '--H=20']
    nodes = []
    def progress(workers):
        before = newest(tmp_path)
        until(lambda: any(row['workers'] == workers for r, row in rounds(tmp_path).items() if r > before + 1), 240, nodes)
    try:
        for name in 'ab':
            nodes.append((Node if nodes else first_node)(tmp_path, name, port, [*args, f'--out_dir={name}']))
        progress(2)
        nodes[1].signal(signal.SIGKILL, everything=False)
        progress(2)
        nodes.append(Node(tmp_path, 'c', port, [*args, '--out_dir=c']))
        progress(3)
        nodes[1].kill()
        progress(2)
    finally:
        for node in reversed(nodes):
            node.kill()
    rows = rounds(tmp_path)
    assert list(sorted(rows)) == list(range(1, len(rows) + 1)) and ledger(rows) == list(range(len(ledger(rows))))
    assert 'another worker is gone' in nodes[0].text and rows[len(rows)]['loss'] < rows[1]['loss']
    shown = [line for line in nodes[0].text.splitlines() if line.startswith('round ')]
    assert all('tok/s' in line and 'compute' in line and 'communicate' in line for line in shown if 'validation' not in line)


def test_torchrun_does_not_repeat_wrong_input(tmp_path, data):
    node = first_node(tmp_path, 'a', free_port(), [*TINY, data, '--max_tokens=0', '--max_rounds=5', '--n_embd=15'])
    assert node.wait(60) and node.text.count('error: n_embd=15') == 1, node.text


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_input(tmp_path, data):
    def says(*parts, args=(), first=data):
        line = fails(tmp_path, *DILOCO, first, '--max_rounds=2', *args, script='train_diloco.py')
        assert all(part in line for part in parts), line

    says('outer_lrr', 'outer_lr', args=['--outer_lrr=3'])
    says('round_tokens=1,001', 'H=5', '200.20', args=['--round_tokens=1001'])
    says('batch_tokens=200 = round_tokens 1,000 / H 5', '= 128', '1.56', args=['--round_tokens=1000'])
    says('batch_tokens=100', '= 128', '0.78', args=['--batch_tokens=100'])
    says('n_embd=15', 'n_head=2', args=['--n_embd=15'])
    says('outer_dtype', 'fp8', 'bf16', args=['--outer_dtype=fp8'])
    says('outer_momentum', args=['--outer_momentum=1.5'])
    says('run_name', '../x', args=['--run_name=../x'])
    says('would never end', args=['--max_rounds=0'])
    says('missing', 'prepare.py', first='--dataset=' + str(tmp_path / 'missing'))
    diloco(tmp_path, 1, data, '--max_rounds=1')
    says('H is 5', '6 here', args=['--H=6'])
    says('seed is 1337', args=['--seed=1'])


def test_workers_that_differ(tmp_path, data):
    other = '--dataset=' + make_data(tmp_path, 'other', 'import this\n' * 999)
    for each, parts in (({1: ['--H=6']}, ('H is 6 on worker 1', 'and 5 on worker 0')), ({2: [other]}, ('data_sha256 is', 'on worker 2'))):
        runs = diloco(tmp_path, 3, data, '--max_rounds=2', each=each, code=2)
        assert len(set(errors(runs))) == 1 and all(part in errors(runs)[0] for part in parts), errors(runs)
    diloco(tmp_path, 2, data, '--max_rounds=2')  # a run that goes on: only whoever differs is sent away for good
    runs = [run.wait(400) for run in start(tmp_path, 3, data, '--max_rounds=4', each={2: ['--outer_momentum=0.7', '--out_dir=far']})]
    assert [run.code for run in runs] == [1, 1, 2] and 'outer_momentum is 0.7 on worker 2' in errors(runs)[2]
    assert newest(tmp_path) == 2


# ------------------------------------------------------------------------------------------------------------------ S3


@pytest.fixture(scope='module')
def swift(tmp_path_factory):
    pytest.importorskip('boto3')
    from swift_server import CannotInstall, Swift
    try:
        server = Swift(tmp_path_factory.mktemp('swift'))
    except CannotInstall as e:
        pytest.skip(f'no S3 server here: {e}')
    try:
        server.create_bucket('runs')
        yield server
    finally:
        server.stop()


def keys(swift, prefix):
    found = swift.client().list_objects_v2(Bucket='runs', Prefix=prefix + '/').get('Contents', [])
    return sorted(item['Key'].removeprefix(prefix + '/') for item in found)


def test_s3_upload_prune_resume(tmp_path, data, swift):
    args = (data, '--s3_bucket=runs', '--run_name=one', '--upload_rounds=1', '--s3_keep=2', '--n_embd=192', '--n_layer=4', '--s3_part_mb=5',
            '--micro_batch_size=1', '--batch_tokens=32', '--H=2')
    run = diloco(tmp_path, 2, *args, '--max_rounds=5', env=swift.env)[0]
    assert 'last uploaded round: 5' in run.out
    names = keys(swift, 'one')
    whole = [name for name in names if name.endswith('manifest.json')]
    assert whole[-1] == 'round_000005/manifest.json' and len(whole) <= 2 and 'config.json' in names, names
    for name in whole:
        manifest = json.loads(swift.client().get_object(Bucket='runs', Key='one/' + name)['Body'].read())
        head = swift.client().head_object(Bucket='runs', Key=f'one/{name.partition("/")[0]}/{manifest["sha256"]}.pt')
        assert head['Metadata']['sha256'] == manifest['sha256'] and head['ContentLength'] == manifest['bytes'] > 6 << 20
        assert '-' in head['ETag'], 'not in parts'
    with open(os.path.join(swift.folder, 'proxy.log')) as file:  # what exists is whole: its manifest comes last and goes first
        log = re.findall(r'(PUT|DELETE) \S*/runs/one/(round_\d+)/([^\s?]+)', file.read())
    for n, (verb, name, file) in enumerate(log):
        if file == 'manifest.json':
            assert verb not in [v for v, r, f in (log[n:] if verb == 'PUT' else log[:n]) if r == name and f != file], log
    assert {verb for verb, _, _ in log} == {'PUT', 'DELETE'}, log
    # all disks are lost
    shutil.rmtree(tmp_path / 'out')
    runs = diloco(tmp_path, 3, *args, '--max_rounds=6', env=swift.env)
    assert 'round 5 comes from s3://runs/one' in runs[0].out and 'going on from round 5' in runs[0].out
    # half-made: the newest has a manifest and a damaged file, a newer one no manifest
    shutil.rmtree(tmp_path / 'out')
    manifest = json.loads(swift.client().get_object(Bucket='runs', Key='one/round_000006/manifest.json')['Body'].read())
    swift.client().put_object(Bucket='runs', Key=f'one/round_000006/{manifest["sha256"]}.pt', Body=b'half')
    swift.client().put_object(Bucket='runs', Key=f'one/round_000009/{manifest["sha256"]}.pt', Body=b'half')
    run = diloco(tmp_path, 1, *args, '--max_rounds=7', env=swift.env)[0]
    assert 'round 6 in S3 is not whole, STEPPING BACK' in run.out and 'going on from round 5' in run.out and 'round 9' not in run.out
    # the name is taken
    shutil.rmtree(tmp_path / 'out')
    runs = diloco(tmp_path, 2, *args, '--max_rounds=7', '--learning_rate=0.5', env=swift.env, code=2)
    assert all("run_name='one' is taken" in line and 'learning_rate is 0.01 there and 0.5 here' in line for line in errors(runs))


def test_s3_bad_input(tmp_path, data, swift):
    secret = 'swordfish'
    nobody = f'http://user:{secret}@127.0.0.1:{free_port()}'
    for change, bucket, parts in (({'AWS_SECRET_ACCESS_KEY': secret}, 'runs', ('403', 'wrong credentials or no permission')),
                                  (swift.reader, 'runs', ('403', 'no permission')),
                                  ({}, 'not-there', ('404', 'NoSuchBucket')),
                                  ({'AWS_ENDPOINT_URL': nobody}, 'runs', ('127.0.0.1', 'EndpointConnectionError'))):
        runs = diloco(tmp_path, 2, data, f'--s3_bucket={bucket}', '--max_rounds=2', env=swift.env | change, code=2)
        for line, run in zip(errors(runs), runs):
            assert f"s3_bucket='{bucket}'" in line and all(part in line for part in parts), line
            assert secret not in run.out + run.err and swift.env['AWS_SECRET_ACCESS_KEY'] not in run.out + run.err
    assert newest(tmp_path) == 0


def test_s3_outage_and_kill_during_upload(tmp_path, data, swift):
    args = (data, '--s3_bucket=runs', '--run_name=two', '--upload_rounds=1', '--H=2')
    run, = start(tmp_path, 1, *args, '--max_rounds=100000', env=swift.env)
    run.until('uploaded round 2')
    swift.stop(['proxy'])
    run.until('warning: upload of')
    before = newest(tmp_path)
    until(lambda: newest(tmp_path) > before + 10, 30)  # training goes on
    swift.start(['proxy'])
    until(lambda: max(row['uploaded'] for row in rounds(tmp_path).values()) > before, 60)  # the upload catches up
    run.kill().wait()  # and, most likely, in the middle of one
    last = newest(tmp_path)
    shutil.rmtree(tmp_path / 'out')
    run = diloco(tmp_path, 1, *args, f'--max_rounds={last + 2}', env=swift.env)[0]
    assert 'comes from s3://runs/two' in run.out and 'not whole' not in run.out and f'last uploaded round: {last + 2}' in run.out
    swift.stop(['proxy'])  # with snapshots at hand nobody needs S3 to go on
    try:
        run, = start(tmp_path, 1, *args, f'--max_rounds={last + 4}', env=swift.env)
        run.until(f'saved out/step_{last + 4:06d}')
        assert 'going on without it' in run.out
        run.kill().wait()
    finally:
        swift.start(['proxy'])
