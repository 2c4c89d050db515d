"""train_diloco.py as people meet it: real processes, real torchrun, an S3 on loopback that can fail."""
import copy
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from fake_s3 import FakeS3
from runs import REPO, Run, error, fails, free_port, group, load, make_data, metrics, strict_rows, train
from trials.diloco_nodes import TINY, Node, ledger, newest, rounds, settled, until

DILOCO = [*TINY, '--out_dir=out', '--max_tokens=0']


def start(folder, ranks, *args, env=None, each=None, machines=False):
    """Without torchrun's start-up time and restarts; machines: each rank in a folder of its own, out0 ..."""
    return [Run(folder, 'train_diloco.py', [*DILOCO, *[f'--out_dir=out{i}'] * machines, *args, *(each or {}).get(i, [])],
                env=(env or {}) | ours) for i, ours in enumerate(group(ranks, machines))]


def diloco(folder, ranks, *args, code=0, **kwargs):
    runs = [run.wait(400) for run in start(folder, ranks, *args, **kwargs)]
    assert [run.code for run in runs] == [code] * ranks, [(run.code, run.out, run.err) for run in runs]
    return runs


def final(folder, out='out'):
    return load(max((folder / out).glob('*_final.pt')))


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
def test_one_worker_with_a_plain_outer_step_is_train_py(tmp_path, data, schedule):
    """M=1, H=1, outer lr 1, momentum 0."""
    shape = [a for a in TINY if a.split('=')[0] not in ('--H', '--eval_rounds', '--batch_tokens')]
    args = [data, *shape, '--batch_tokens=256', '--max_tokens=7680', f'--schedule={schedule}', '--out_dir=a']
    train(tmp_path, *args)
    diloco(tmp_path, 1, *args, '--out_dir=b', '--H=1', '--outer_lr=1', '--outer_momentum=0')
    a, b = metrics(tmp_path / 'a', 'loss'), {r: row['loss'] for r, row in rounds(tmp_path / 'b').items()}
    assert list(a) == list(b) == list(range(1, 31)) and list(a.values()) == list(b.values())
    a, b = final(tmp_path, 'a')['model'], final(tmp_path, 'b')['model']
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('slow', [False, True])
def test_rounds_are_as_published(tmp_path, data, slow):
    """Three workers, against the algorithm written down once more, in one process; also where one is too slow for H steps."""
    from model import FELA, FELAConfig
    from prepare import TokenData
    H, M, R, W = 4, 3, 3, 4
    diloco(tmp_path, M, data, f'--H={H}', f'--max_rounds={R}', '--outer_dtype=fp32', '--outer_lr=0.5', '--outer_momentum=0.9',
           '--learning_rate=1e-3', '--schedule=constant', '--warmup_iters=0', '--warmup_rounds=1',
           *['--round_seconds=0.01'] * slow, each={1: ['--micro_batch_size=1']} if slow else {})
    state, rows = final(tmp_path), rounds(tmp_path)
    torch.manual_seed(1337)
    model = FELA(FELAConfig(vocab_size=261, n_layer=2, n_head=2, gla_heads=2, n_embd=16, n_modes=8, pattern='SL'))
    models = [model, *(copy.deepcopy(model) for _ in range(M - 1))]
    opts = [m.configure_optimizers('adamw', 1e-3, 0.1)[0] for m in models]
    for group in (group for opt in opts for group in opt.param_groups):
        group['lr'] *= group['lr_scale']
    source = TokenData(data.partition('=')[2], 'train', 32, 1337)
    theta, left, following = parameters_to_vector(model.parameters()).detach(), [], 0
    momentum = torch.zeros_like(theta)
    for r in range(R):
        dealt = left + list(range(following, following + M * H - len(left)))
        following, done = dealt[-1] + 1, rows[r + 1]['done']
        mine = [dealt[i * H:i * H + done[i]] for i in range(M)]
        left = sorted(set(dealt) - set(sum(mine, [])))
        for h in range(H):
            active = [i for i in range(M) if h < done[i]]
            for i in active:
                models[i](*map(torch.from_numpy, source.batch(mine[i][h] * W, W)))[1].backward()
            for ps in zip(*(m.parameters() for m in models)) if r == 0 else ():  # the first round is plain data parallel
                mean = sum(p.grad for p in ps) / M
                for p in ps:
                    p.grad = mean.clone()
            for i in active:
                clip_grad_norm_(models[i].parameters(), 1.0)
                opts[i].step()
                opts[i].zero_grad()
        after = [parameters_to_vector(m.parameters()).detach() for m in models]
        if r:
            pseudo = sum((theta - vector) * n for vector, n in zip(after, done)) / sum(done)
            momentum = 0.9 * momentum + pseudo
            theta = theta - 0.5 * (pseudo + 0.9 * momentum)
        else:
            theta = after[0]
        for m in models:
            vector_to_parameters(theta.clone(), m.parameters())
    found = parameters_to_vector(state['model'][name] for name, _ in model.named_parameters())
    torch.testing.assert_close(found, theta, rtol=0, atol=1e-5)  # 12 steps of up to 1e-3
    torch.testing.assert_close(state['outer'], momentum, rtol=0, atol=1e-5)
    assert (state['training']['left'], state['training']['next']) == (left, following) and [rows[r]['workers'] for r in rows] == [3] * 3
    assert (left == []) != slow, 'nobody was slow'


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
    assert ledger(rows := rounds(tmp_path)) == list(range(len(ledger(rows))))


def test_budget_in_tokens_and_in_bytes(tmp_path, data):
    """Two rounds, of which the second is short; in one of H=50 a worker sends nearly 100 times less than fp32 gradients."""
    run = diloco(tmp_path, 2, data, '--H=50', '--max_tokens=15000', '--eval_rounds=1')[0]
    rows, state = rounds(tmp_path), final(tmp_path)
    assert [row['done'] for row in rows.values()] == [[50, 50], [9, 9]] and state['training']['tokens'] == 118 * 128
    assert 50 * state['outer'].numel() * 4 / 100 <= rows[1]['bytes'] < 50 * state['outer'].numel() * 4 / 50
    assert 'round     2 | 100%' in run.out and 'val_loss' in rows[1]
    assert (tmp_path / 'out/worker_01/log.txt').read_text().count('| theta') == 2
    run = diloco(tmp_path, 2, data, '--H=50', '--max_tokens=15000', '--eval_rounds=1')[0]
    assert 'finished' in run.out and '--max_tokens' in run.out and len(strict_rows(tmp_path / 'out')) == 2


def test_resume_is_exact(tmp_path, data):
    for out, stop in ('a', 6), ('b', 2), ('b', 6):
        diloco(tmp_path, 2, data, f'--out_dir={out}', f'--max_rounds={stop}', '--schedule=constant', '--optimizer=muon')
    a, b = final(tmp_path, 'a'), final(tmp_path, 'b')
    assert a['training'] == b['training'] and all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])


def test_newest_round_wins_and_a_newcomer_gets_everything(tmp_path, data):
    """Each worker of its own machine: one lost its disk, one missed a round, one has a damaged newest snapshot."""
    diloco(tmp_path, 4, data, '--max_rounds=3', machines=True)
    before = load(tmp_path / 'out1/worker_00/step_000003.pt')
    shutil.rmtree(tmp_path / 'out0')
    for name in ('step_000003.pt', 'step_000003.json'):
        os.remove(tmp_path / 'out2/worker_00' / name)
    (tmp_path / 'out3/worker_00/step_000003.pt').write_bytes(b'damage')
    runs = diloco(tmp_path, 4, data, '--max_rounds=4', machines=True)
    assert 'going on from round 3' in runs[0].out and 'STEPPING BACK' in runs[3].err
    states = [load(tmp_path / f'out{i}/worker_00/step_000004.pt') for i in range(4)]
    for state in states[1:]:
        assert state['training'] == states[0]['training'] and torch.equal(state['outer'], states[0]['outer'])
    steps = {float(state['optimizer'][0]['state'][0]['step']) for state in states}
    assert steps == {float(before['optimizer'][0]['state'][0]['step']) + 5}  # the inner state came along
    assert newest(tmp_path) == 4


def test_a_signal_ends_the_round_early_and_loses_nothing(tmp_path, data):
    runs = start(tmp_path, 2, data, '--H=3000', '--max_rounds=5', '--schedule=constant')
    runs[0].until('from scratch')
    time.sleep(1)
    for run in [run.kill(signal.SIGTERM) for run in runs]:
        assert run.wait().code == 143 and run.err.count('\n') == 1 and 'stopped by SIGTERM' in run.err, (run.code, run.err)
    state, row = load(tmp_path / 'out/worker_01/step_000001.pt')['training'], rounds(tmp_path)[1]
    assert all(0 < n < 3000 for n in row['done']) and state['tokens'] == 128 * sum(row['done'])
    diloco(tmp_path, 2, data, '--H=3000', '--max_rounds=2', '--round_seconds=1', '--schedule=constant')
    rows, state = rounds(tmp_path), final(tmp_path)['training']
    assert sorted(ledger(rows) + state['left']) == list(range(state['next']))
    # one that waits for a neighbour that stands still is gone before torchrun, after 30 s, would kill it
    runs = start(tmp_path, 2, data, '--H=3000', '--max_rounds=100000', '--round_seconds=0.1', '--schedule=constant')
    runs[0].until('round     4')
    runs[1].kill(signal.SIGSTOP)
    time.sleep(1)
    assert runs[0].kill(signal.SIGTERM).wait(28).code == 143 and 'stopped by SIGTERM' in runs[0].err
    runs[1].kill().wait()


def test_second_run_beside_a_living_one_and_beside_orphans(tmp_path, data):
    args = [*DILOCO, data, '--H=20', '--schedule=constant', '--max_rounds=100000', '--dtype=float32']
    node = Node(tmp_path, 'a', free_port(), args, workers=2)
    try:
        until(lambda: newest(tmp_path) >= 5, 90, [node])
        pid, rows = (tmp_path / 'out/worker_00/lock').read_text(), rounds(tmp_path)
        assert int(pid) in node.workers()
        assert f'in use by process {pid}' in error(diloco(tmp_path, 1, data, '--H=20', '--max_rounds=6', code=1)[0])
        assert rows.items() <= rounds(tmp_path).items() and node.workers()
        os.kill(node.process.pid, signal.SIGKILL)
        before = newest(tmp_path)
        run, = start(tmp_path, 1, data, '--H=20', '--schedule=constant', '--max_rounds=100000')
        run.until('going on from round')
        run.kill().wait()  # unless it was refused, as the orphans were still there
        assert 'from scratch' not in run.out and set(range(1, before)) <= set(rounds(tmp_path))
        until(lambda: not node.workers(), 20)
        assert 'torchrun is gone' in node.text
    finally:
        node.kill()


def test_never_from_scratch_beside_snapshots(tmp_path, data):
    """Snapshots that are damaged, or of a worker that is not there: whoever starts alone is told."""
    diloco(tmp_path, 2, data, '--max_rounds=2')
    rows = (tmp_path / 'out/metrics.jsonl').read_bytes()
    shutil.rmtree(tmp_path / 'out/worker_00')
    assert 'step_00000' in error(diloco(tmp_path, 1, data, '--max_rounds=3', code=2)[0])
    for path in (tmp_path / 'out/worker_01').glob('*.pt'):
        path.write_bytes(b'damage')
    runs = diloco(tmp_path, 2, data, '--max_rounds=3', code=2)
    assert 'step_00000' in error(runs[0]) and (tmp_path / 'out/metrics.jsonl').read_bytes() == rows


def test_the_log_has_lost_its_reader(tmp_path, data):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    run = subprocess.Popen([sys.executable, os.path.join(REPO, 'train_diloco.py'), *DILOCO, data, '--max_rounds=12'], cwd=tmp_path,
                           env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert b'parameters' in run.stdout.readline()
    run.stdout.close()
    assert run.wait(100) == 0 and final(tmp_path)['training']['round'] == 12 and newest(tmp_path) == 12


def test_a_full_disk(tmp_path, data):
    """A disk that fills up, and has room again: training goes on, and so does the same command afterwards."""
    args, path = (data, '--H=5', '--schedule=constant'), tmp_path / 'out/metrics.jsonl'
    run, = start(tmp_path, 1, *args, '--max_rounds=100000')
    run.until('round     4')
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, resource.RLIM_INFINITY))
    until(lambda: run.err.count('training goes on') > 3, 60)
    assert run.process.exitcode is None and 'Traceback' not in run.err
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen = newest(tmp_path)
    until(lambda: newest(tmp_path) > seen + 9, 60)
    run.kill().wait()
    last = newest(tmp_path)
    run = diloco(tmp_path, 1, *args, f'--max_rounds={last + 3}')[0]
    rows = [row['round'] for row in strict_rows(tmp_path / 'out')]
    assert rows == sorted(set(rows)) and rows[-1] == last + 3 and 'Traceback' not in run.err


def test_damage_in_metrics_and_a_field_that_a_snapshot_lacks(tmp_path, data):
    from model import load_checkpoint, save_checkpoint
    diloco(tmp_path, 1, data, '--max_rounds=3')
    state, manifest = load_checkpoint(str(tmp_path / 'out/worker_00'))
    del state['config']['mlp_hidden']  # it has its default then
    save_checkpoint(str(tmp_path / 'out/worker_00'), 3, state, manifest)
    path = tmp_path / 'out/metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join(lines[:2]) + b'{"round": 1, "tok{"round": 2}\n[[\n\xff\xfe\0}\n' + lines[2][:-9])
    run = diloco(tmp_path, 1, data, '--max_rounds=4')[0]
    assert 'going on from round 3' in run.out and '2 of 6 lines are whole' in run.out
    assert [row['round'] for row in strict_rows(tmp_path / 'out')] == [1, 2, 4]


@pytest.mark.parametrize('knobs', ['--learning_rate=1e9', '--learning_rate=1e18', '--outer_lr=1e12', '--learning_rate=1e9 --optimizer=muon'])
def test_a_loss_that_is_not_finite(tmp_path, data, knobs):
    run = diloco(tmp_path, 1, data, '--max_rounds=4', *knobs.split(), code=1)[0]
    assert 'is not finite' in error(run) and run.err.count('\n') == 1
    assert all(row['loss'] < 1e9 for row in strict_rows(tmp_path / 'out'))
    assert not list((tmp_path / 'out').rglob('step_*')), 'saved what nobody can go on from'


def test_nothing_from_the_network_is_unpickled(tmp_path, data):
    """A stranger joins the group in the place of worker 1 and sends a pickled command to the first collectives."""
    (tmp_path / 'evil.py').write_text(f'''
import os, torch.distributed as dist
class Bomb:
    def __reduce__(self):
        return os.system, ("echo $PPID >> {tmp_path}/executed",)
dist.init_process_group('gloo')
try: dist.all_gather_object([None, None], Bomb())
except Exception as e: print(e)
os._exit(0)
''')
    honest, stranger = group(2)
    run = Run(tmp_path, 'train_diloco.py', [*DILOCO, data, '--max_rounds=2', '--timeout=5'], env=honest)
    evil = subprocess.run([sys.executable, tmp_path / 'evil.py'], env=os.environ | stranger, capture_output=True)
    assert run.wait(60).code == 1 and 'another worker is gone' in error(run), (run.err, evil)
    executed = tmp_path / 'executed'  # the stranger runs its own bomb where the honest one answers
    assert not executed.exists() or str(run.pid) not in executed.read_text().split()


def test_nodes_come_and_go(tmp_path, data):
    """kill -9 of a worker, a node joins, kill -9 of a node: with real torchrun agents."""
    port, nodes = free_port(), []
    args = [*TINY, data, '--max_tokens=0', '--max_rounds=1000', '--timeout=10', '--H=20']
    try:
        for name in 'ab':
            nodes.append(Node(tmp_path, name, port, [*args, f'--out_dir={name}']))
        settled(tmp_path, 2, nodes)
        nodes[1].signal(signal.SIGKILL, everything=False)
        settled(tmp_path, 2, nodes)
        nodes.append(Node(tmp_path, 'c', port, [*args, '--out_dir=c']))
        settled(tmp_path, 3, nodes)
        nodes[1].kill()
        settled(tmp_path, 2, nodes)
    finally:
        for node in reversed(nodes):
            node.kill()
    rows = rounds(tmp_path)
    assert sorted(rows) == list(range(1, len(rows) + 1)) and rows[len(rows)]['loss'] < rows[1]['loss']
    state = load(max((tmp_path / 'a/worker_00').glob('*.pt')))['training']
    assert sorted(ledger({r: row for r, row in rows.items() if r <= state['round']}) + state['left']) == list(range(state['next']))
    assert 'another worker is gone' in nodes[0].text


def test_bad_input(tmp_path, data):
    diloco(tmp_path, 1, data, '--max_rounds=1')
    for arg, words in {'--batch_tokens=100': 'batch_tokens=100 = 128', '--n_embd=15': 'n_embd=15 gla_heads=2', '--H=6': 'H is 5 6 here',
                       '--outer_dtype=fp8': 'outer_dtype fp8 bf16', '--outer_momentum=1.5': 'outer_momentum=1.5 expected',
                       '--seed=9223372036854775808': 'seed=9223372036854775808 expected', '--timeout=inf': 'timeout=inf expected',
                       '--run_name=../x': 'run_name ../x', '--max_rounds=0': 'would never end',
                       f'--dataset={tmp_path}/missing': 'missing prepare.py'}.items():
        line = fails(tmp_path, *DILOCO, data, '--max_rounds=2', arg, script='train_diloco.py')
        assert all(word in line for word in words.split()), line
    node = Node(tmp_path, 'a', free_port(), [*DILOCO, data, '--max_rounds=5', '--n_embd=15'], workers=2)  # torchrun does not try it again
    assert node.process.wait(60) and node.text.count('error: n_embd=15') == 1, node.text


def test_workers_that_differ(tmp_path, data):
    """Whoever differs from the worker with the newest round is sent away for good, the others may try again."""
    other = '--dataset=' + make_data(tmp_path, 'other', 'import this\n' * 999)
    for each, parts in (({1: ['--H=6']}, ('H is 5 on worker 0', '6 here')), ({1: [other]}, ('data_sha256 is', 'on worker 0'))):
        runs = [run.wait() for run in start(tmp_path, 2, data, '--max_rounds=2', each=each, machines=True)]
        assert [run.code for run in runs] == [1, 2] and all(part in error(runs[1]) for part in parts)
        assert 'another worker is gone' in error(runs[0])
    assert newest(tmp_path) == 0


@pytest.fixture
def s3():
    pytest.importorskip('boto3')
    with FakeS3('runs') as server:
        yield server
        server.shutdown()


def test_s3_upload_prune_resume(tmp_path, data, s3):
    big = ('--n_embd=192', '--n_layer=4', '--micro_batch_size=1', '--batch_tokens=32', '--H=2')  # more than one part of 8 MB
    args = (data, '--s3_bucket=runs', '--run_name=one', '--upload_rounds=1', *big)
    assert 'last uploaded round: 5' in diloco(tmp_path, 2, *args, '--max_rounds=5', env=s3.env)[0].out
    names = s3.names('runs/one/')
    assert 'step_000005.json' in names and 'config.json' in names and 3 <= len(names) <= 7, names
    assert len(s3.objects['runs/one/step_000005.pt']) > 8 << 20 and 'POST' in {verb for verb, _ in s3.requests}
    log = [(verb, name) for verb, name in s3.requests if verb in ('PUT', 'POST', 'DELETE') and 'step_' in name]
    for n, (verb, name) in enumerate(log):  # what exists is whole: its manifest comes last and goes first
        if name.endswith('.json'):
            stem, around = name[:-5], log[n:] if verb == 'PUT' else log[:n]
            assert (verb, stem + '.pt') not in around
    # all disks are lost; the newest round is damaged, and somebody left what is no round of ours
    shutil.rmtree(tmp_path / 'out')
    s3.objects |= {'runs/one/step_000005.pt': b'half', 'runs/one/step_x.json': b'\0\xff', 'runs/one/step_000999.json': b'[3, {"sha256": 7}]'}
    run = diloco(tmp_path, 3, *args, '--max_rounds=6', env=s3.env)[0]
    assert 'STEPPING BACK' in run.err and 'last uploaded round: 6' in run.out
    assert any(f'round {n} comes from s3://runs/one' in run.out for n in (2, 3, 4))  # an upload may outlast a round
    assert 'step_000006.json' in s3.names('runs/one/') and 'Traceback' not in run.err
    # the name is taken
    shutil.rmtree(tmp_path / 'out')
    run = diloco(tmp_path, 1, *args, '--max_rounds=7', '--learning_rate=0.5', env=s3.env, code=2)[0]
    assert "run_name='one' is taken" in error(run) and 'learning_rate is 0.01 there and 0.5 here' in error(run)


def test_s3_bad_input(tmp_path, data, s3):
    nobody = f'http://user:swordfish@127.0.0.1:{free_port()}'
    for change, bucket, part in (({'AWS_ACCESS_KEY_ID': 'nobody'}, 'runs', 'AccessDenied'), (s3.reader, 'runs', 'NoSuchKey'),
                                 ({}, 'not-there', 'NoSuchBucket'), ({'AWS_ENDPOINT_URL': nobody}, 'runs', 'EndpointConnectionError'),
                                 ({'AWS_ENDPOINT_URL': 'swordfish'}, 'runs', 'ValueError')):
        run = diloco(tmp_path, 1, data, f'--s3_bucket={bucket}', '--max_rounds=2', env=s3.env | change, code=2)[0]
        assert f"s3_bucket='{bucket}'" in error(run) and part in error(run)
        assert 'swordfish' not in run.out + run.err and s3.SECRET not in run.out + run.err
    assert newest(tmp_path) == 0


def test_s3_outage_lies_and_kills(tmp_path, data, s3):
    args = (data, '--s3_bucket=runs', '--run_name=two', '--upload_rounds=1', '--H=20')
    run, = start(tmp_path, 1, *args, '--max_rounds=100000', env=s3.env)
    run.until('uploaded round 2')
    for s3.mode, word in (('503', 'SlowDown'), ('garbage', '500; it is tried'), ('truncate', 'did not arrive whole')):
        until(lambda: word in run.out, 60)
        before = newest(tmp_path)
        until(lambda: newest(tmp_path) > before + 10, 30)  # training goes on
    s3.mode = ''
    until(lambda: int(re.findall(r'uploaded round (\d+)', run.out)[-1]) > before, 60)  # the upload catches up
    run.kill().wait()  # and, most likely, in the middle of one
    shutil.rmtree(tmp_path / 'out')
    there = max(int(name[5:11]) for name in s3.names('runs/two/') if re.fullmatch(r'step_\d+\.json', name))
    run = diloco(tmp_path, 1, *args, f'--max_rounds={there + 2}', env=s3.env)[0]
    assert 'comes from s3://runs/two' in run.out and f'last uploaded round: {there + 2}' in run.out


def test_s3_never_answers(tmp_path, data, s3):
    """With snapshots at hand nobody needs S3 to go on; without, nobody starts a second run beside what may be there."""
    args = (data, '--s3_bucket=runs', '--run_name=three', '--upload_rounds=1', '--timeout=8')
    s3.mode = 'hang'
    assert 'does not answer' in error(diloco(tmp_path, 1, *args, '--max_rounds=4', env=s3.env, code=2)[0])
    s3.mode = ''
    diloco(tmp_path, 2, *args, '--max_rounds=4', env=s3.env)
    s3.mode = 'hang'
    runs = start(tmp_path, 2, *args, '--max_rounds=8', env=s3.env)
    runs[0].until('saved out/step_000008_final.pt', 60)
    assert 'does not answer; going on without it' in runs[0].out and newest(tmp_path) == 8
    assert [run.kill().wait().code for run in runs]
