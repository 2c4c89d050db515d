"""train.py as people meet it: real processes, real signals, real files."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from runs import REPO, TINY, Run, fails, make_data, metrics, start, train, train_ranks, values


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return '--dataset=' + make_data(tmp_path_factory.mktemp('data'))


def weights(folder, name):
    return torch.load(os.path.join(str(folder), name + '.pt'), weights_only=True)


def same(a, b):
    """Equal bit for bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b, but=('elapsed',)):
    a, b = dict(a), dict(b)
    for state in (a, b):
        state.pop('config')  # out_dir differs
        state['training'] = {k: v for k, v in state['training'].items() if k not in but}
    return same(a, b)


# ---------------------------------------------------------------------------------------------------------- it trains


def test_end_to_end(tmp_path, data):
    run = train(tmp_path, data, '--max_iters=60', '--learning_rate=1e-2', '--sample_tokens=20', '--eval_interval=20')
    assert 'bits per byte' in run.out and 'gzip' in run.out and 'xz' in run.out and 'float32 (as asked)' in run.out
    loss, bpb = metrics(tmp_path / 'out', 'loss'), metrics(tmp_path / 'out', 'val_bpb')
    assert list(loss) == list(range(1, 61)) and list(bpb) == [20, 40, 60]
    assert loss[60] < loss[1] - 1 and bpb[60] < bpb[20]
    manifest = json.load(open(tmp_path / 'out' / 'step_000060_final.json'))
    assert manifest['tokens'] == 60 * 256 and manifest['tokenizer'] == 'bytes' and manifest['config']['n_embd'] == 16
    assert math.isclose(manifest['losses']['final_val_bpb'], manifest['losses']['final_val'] / math.log(2))
    files = ['lock', 'metrics.jsonl', 'step_000060_final.json', 'step_000060_final.pt']
    assert sorted(os.listdir(tmp_path / 'out')) == files
    again = train(tmp_path, data, '--max_iters=60', '--learning_rate=1e-2')
    assert 'finished' in again.out and '--max_iters' in again.out and '--overwrite' in again.out


def test_speed_is_not_claimed_before_it_is_measured(tmp_path, data):
    lines = train(tmp_path, data, '--max_iters=3').out.splitlines()
    first, second = (next(line for line in lines if line.startswith(f'step      {i}')) for i in (1, 2))
    assert 'tok/s' not in first and 'ETA' not in first and 'tok/s' in second and 'ETA' in second and 'FLOP/s' in second
    assert metrics(tmp_path / 'out', 'tokens_per_second')[1] is None


def test_schedules(tmp_path, data):
    args = (data, '--max_iters=20', '--warmup_iters=4', '--learning_rate=1.0', '--min_lr_frac=0.1', '--eval_interval=0',
            '--grad_clip=1e-9', '--weight_decay=0')
    lr = {}
    for name in ('cosine', 'wsd', 'constant'):
        train(tmp_path, *args, f'--schedule={name}', f'--out_dir={name}', '--decay_frac=0.5')
        lr[name] = values(tmp_path / name, 'lr')
        assert lr[name][:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr['constant'][4:] == pytest.approx([1] * 16)
    done = [i / 16 for i in range(16)]
    assert lr['cosine'][4:] == pytest.approx([0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * d)) for d in done])
    assert lr['wsd'][4:] == pytest.approx([0.1 + 0.9 * min(1, 2 * (1 - d)) for d in done])


def test_budgets(tmp_path, data):
    train(tmp_path, data, '--max_iters=50', '--max_tokens=1300')
    assert max(metrics(tmp_path / 'out', 'loss')) == 6  # 6 * 256 is the first to reach 1300
    run = train(tmp_path, data, '--max_seconds=0.3', '--out_dir=b')
    assert metrics(tmp_path / 'b', 'final_val_loss') and '100%' in run.out


def test_more_of_a_finished_run(tmp_path, data):
    train(tmp_path, data, '--max_iters=4')
    run = train(tmp_path, data, '--max_iters=8', '--learning_rate=0.001')
    assert 'going on from out/step_000004_final.pt with' in run.out and 'max_iters 4 -> 8' in run.out
    assert list(metrics(tmp_path / 'out', 'loss')) == list(range(1, 9))


# ------------------------------------------------------------------------------------------------------ exact resuming


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_resume_is_exact(tmp_path, data, optimizer, dtype):
    """2N steps = N + kill -9 + resume + N, bit for bit; evaluations and checkpoints change nothing."""
    args = (data, '--max_iters=16', f'--optimizer={optimizer}', f'--dtype={dtype}', '--log_interval=3')
    train(tmp_path, *args, '--out_dir=a')
    start(tmp_path, *args, '--out_dir=b', '--save_interval=8').until('step_000008.pt').kill().wait()
    run = train(tmp_path, *args, '--out_dir=b', '--save_interval=8')
    assert 'going on from b/step_000008.pt' in run.out or 'b/step_000016' in run.out
    assert same_run(weights(tmp_path / 'a', 'step_000016_final'), weights(tmp_path / 'b', 'step_000016_final'))
    for key in ('loss', 'lr', 'grad_norm', 'val_loss', 'final_val_loss'):
        assert metrics(tmp_path / 'a', key) == metrics(tmp_path / 'b', key)
    if optimizer == 'adamw' and dtype == 'float32':
        train(tmp_path, *args, '--out_dir=c', '--eval_interval=0')
        a, c = (weights(tmp_path / name, 'step_000016_final') for name in 'ac')
        assert same_run(a, c, but=('elapsed', 'best_val'))


def test_two_ranks_equal_one(tmp_path, data):
    args = (data, '--max_iters=6', '--batch_tokens=512')
    train(tmp_path, *args, '--out_dir=one')  # 4 x 4 windows a step, here one after the other, there 2 x 2 at a time
    train_ranks(tmp_path, 2, *args, '--out_dir=two')
    one, two = weights(tmp_path / 'one', 'step_000006_final'), weights(tmp_path / 'two', 'step_000006_final')
    assert one['training']['position'] == two['training']['position'] == 96
    for name, p in one['model'].items():
        torch.testing.assert_close(p, two['model'][name], rtol=1e-4, atol=2e-5)
    for key in ('loss', 'val_loss', 'final_val_loss', 'grad_norm'):
        assert values(tmp_path / 'one', key) == pytest.approx(values(tmp_path / 'two', key), 1e-4)


@pytest.mark.parametrize('optimizer,dtype', [('adamw', 'float32'), ('muon', 'bfloat16')])
def test_resume_is_exact_with_two_ranks(tmp_path, data, optimizer, dtype):
    args = (data, '--max_iters=8', f'--optimizer={optimizer}', f'--dtype={dtype}', '--save_interval=4',
            '--keep_checkpoints=0')
    train_ranks(tmp_path, 2, *args, '--out_dir=a')
    runs = train_ranks(tmp_path, 2, *args, '--out_dir=b', code=None)
    runs[0].until('step_000004.pt')
    for run in runs:
        run.kill().wait()
    train_ranks(tmp_path, 2, *args, '--out_dir=b')
    assert same_run(weights(tmp_path / 'a', 'step_000008_final'), weights(tmp_path / 'b', 'step_000008_final'))
    # and from 2 ranks to 1: the same windows, the same result within rounding
    for name in os.listdir(tmp_path / 'a'):
        if name.startswith('step_000008'):
            os.remove(tmp_path / 'a' / name)
    before = values(tmp_path / 'a', 'loss')
    train(tmp_path, *args, '--out_dir=a')
    assert weights(tmp_path / 'a', 'step_000008_final')['training']['position'] == 64
    assert values(tmp_path / 'a', 'loss') == pytest.approx(before, 1e-2 if dtype == 'bfloat16' else 1e-4)


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='torch.compile needs a C++ compiler')
def test_two_compiled_ranks(tmp_path, data):
    """torch.compile inside DDP: the same training (a model this small is one bucket, which torch would not cut anyway)"""
    for out_dir, compiled in ('a', 'off'), ('b', 'on'):
        train_ranks(tmp_path, 2, data, '--max_iters=3', '--pattern=S', '--n_layer=1', f'--compile={compiled}', f'--out_dir={out_dir}')
    assert values(tmp_path / 'a', 'loss') == pytest.approx(values(tmp_path / 'b', 'loss'), 1e-5)


# ------------------------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_stop_saves(tmp_path, data, number):
    args = (data, '--max_iters=3000', '--log_interval=1')
    if number == signal.SIGINT:  # even when stderr cannot be written to
        os.symlink('/dev/full', tmp_path / f'run{Run.count + 1}.err')
    run = start(tmp_path, *args).until('step      3').kill(number).wait()
    assert run.code == 0 and f'stopped by {number.name} at step' in run.out and 'goes on from there' in run.out
    step = max(metrics(tmp_path / 'out', 'loss'))
    assert os.path.exists(tmp_path / 'out' / f'step_{step:06d}.json') and 'final' not in run.out
    run = start(tmp_path, *args).until(f'step {step + 1:6}').kill(number).kill(number).wait()
    assert run.code in (0, 128 + number) and f'going on from out/step_{step:06d}.pt' in run.out
    assert torch.load(tmp_path / 'out' / f'step_{step:06d}.pt', weights_only=True)['training']['step'] == step


@pytest.mark.parametrize('ranks', [1, 2])
def test_stop_in_the_last_evaluation(tmp_path, ranks):
    """The whole validation split takes long: a signal breaks it off, and the same command evaluates again."""
    args = ('--dataset=' + make_data(tmp_path, text='some words, a number: 123\n' * 8000), '--max_iters=4',
            '--eval_interval=0', '--final_eval_tokens=0', '--micro_batch_size=1')
    runs = train_ranks(tmp_path, 2, *args, code=None) if ranks == 2 else [start(tmp_path, *args)]
    runs[0].until('step      4')
    runs[-1].kill(signal.SIGTERM)
    assert [run.wait().code for run in runs] == [0] * ranks, runs[0].err
    assert 'saved out/step_000004.pt' in runs[0].out and 'at step 4; the same command goes on' in runs[0].out
    assert sorted(os.listdir(tmp_path / 'out'))[2:] == ['step_000004.json', 'step_000004.pt']
    assert 'going on from out/step_000004.pt' in train(tmp_path, *args, '--final_eval_tokens=512').out
    assert 4 in metrics(tmp_path / 'out', 'final_val_loss')


def test_a_rank_is_killed(tmp_path, data):
    runs = train_ranks(tmp_path, 2, data, '--max_iters=3000', '--save_interval=2', code=None)
    runs[0].until('saved')
    runs[1].kill()
    run = runs[0].wait()
    assert run.code == 1 and 'error: rank 0 of 2 has lost another one' in run.err and 'Traceback' not in run.err
    again = start(tmp_path, data, '--max_iters=3000').until('step  ').kill().wait()
    assert 'going on from out/step_' in again.out


def test_ranks_that_differ_are_refused(tmp_path, data):
    one, two = train_ranks(tmp_path, 2, data, '--max_iters=3', code=None, last=['--seed=5'])
    assert two.wait().code == 2 and 'error: seed is 1337 in rank 0 and 5 here: all ranks need the same' in two.err
    assert one.wait().code == 1 and 'lost another one' in one.err and 'step  ' not in one.out


def test_all_ranks_stop_at_the_same_step(tmp_path, data):
    runs = train_ranks(tmp_path, 2, data, '--max_iters=3000', code=None)
    runs[0].until('step      3')
    runs[1].kill(signal.SIGTERM)
    assert [run.wait().code for run in runs] == [0, 0] and 'stopped by' in runs[0].out and not runs[1].out


def test_bad_numbers_are_skipped_then_stop_the_run(tmp_path, data):
    run = start(tmp_path, data, '--max_iters=50', '--learning_rate=1e30', '--max_bad_steps=4', '--warmup_iters=0',
                '--save_interval=1').wait()
    line = run.err.splitlines()[-1]
    assert run.code == 1 and run.out.count('skipped, loss') == 4, (run.out, run.err)
    for part in ('4 steps in a row', 'lr 9.86e+29', 'gradient norm', 'data windows from', 'last good checkpoint'):
        assert part in line
    saved = [name for name in os.listdir(tmp_path / 'out') if name.endswith('.pt')]
    for name in saved:
        assert all(p.isfinite().all() for p in weights(tmp_path / 'out', name[:-3])['model'].values())


def test_torchrun(tmp_path, data):
    """The command of the README, and the signal of a scheduler, which torchrun passes on."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    with open(tmp_path / 'log', 'w+') as output:
        process = subprocess.Popen([*command, f'{REPO}/train.py', *TINY, data, '--max_iters=100000'], cwd=tmp_path, stdout=output, stderr=output,
                                   env=os.environ | {'OMP_NUM_THREADS': '1'})
        while 'step      3' not in (tmp_path / 'log').read_text():
            assert process.poll() is None, (tmp_path / 'log').read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert 'stopped by SIGTERM at step' in (tmp_path / 'log').read_text()
    step = max(metrics(tmp_path / 'out', 'loss'))
    assert f'going on from out/step_{step:06d}.pt' in train(tmp_path, data, f'--max_iters={step + 1}').out


def test_loss_spike_is_logged(tmp_path, data):
    args = (data, '--schedule=constant', '--eval_interval=0', '--warmup_iters=0', '--learning_rate=1e-4')
    train(tmp_path, *args, '--max_iters=60')
    run = train(tmp_path, *args, '--max_iters=63', '--learning_rate=3', '--grad_clip=0')
    assert 'loss spike' in run.out and 'skipped' not in run.out and metrics(tmp_path / 'out', 'spike')


@pytest.mark.parametrize('args', ['--checkpoint_activations=True', '--dtype=float16', '--dtype=bfloat16'])
def test_the_same_training_within_rounding(tmp_path, data, args):
    train(tmp_path, data, '--max_iters=3', '--out_dir=a')
    train(tmp_path, data, '--max_iters=3', '--out_dir=b', args)
    a, b = (values(tmp_path / name, 'loss') for name in 'ab')
    assert a == pytest.approx(b, 1e-2 if 'dtype' in args else 1e-5)


# ------------------------------------------------------------------------------------------------------- one at a time


def test_second_run_in_a_folder_is_refused(tmp_path, data):
    first = start(tmp_path, data, '--max_iters=3000').until('step      2')
    line = fails(tmp_path, data, '--max_iters=3000')
    assert f'in use by another run: pid {first.pid}, started 20' in line
    first.until('step      3').kill().wait()
    run = start(tmp_path, data, '--max_iters=3000').until('step      2')
    assert f'stale: the run of pid {first.pid}' in run.out
    run.kill(signal.SIGTERM).wait()
    assert 'stale' not in train(tmp_path, data, '--max_iters=1').out


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_input(tmp_path, data):
    def says(*parts, args=(), first=data, **kwargs):
        line = fails(tmp_path, first, '--max_iters=2', *args, **kwargs)
        assert all(part in line for part in parts), line

    says('batch_sise', 'batch', args=['--batch_sise=3'])
    says('n_layer', "'four'", args=['--n_layer=four'])
    says('nope.py', args=['nope.py'])
    says('batch_tokens=1,000', '= 128', '7.81', '896 or 1024', args=['--batch_tokens=1000'])
    says('n_embd=15', 'n_head=2', args=['--n_embd=15'])
    says('pattern', 'SXL', args=['--pattern=SXL'])
    says('schedule', 'linear', 'cosine', args=['--schedule=linear'])
    says('optimizer', 'sgd', 'muon', args=['--optimizer=sgd'])
    says('device', 'tpu', args=['--device=tpu'])
    says('micro_batch_size=0', args=['--micro_batch_size=0'])
    says('would never end', args=['--max_iters=0'])
    says('block_size', args=['--block_size=1000000', '--batch_tokens=4000000'])
    says('missing', 'prepare.py', first='--dataset=' + str(tmp_path / 'missing'))
    says('nothing', 'no such checkpoint', args=['--init_from=nothing.pt'])
    assert sorted(n for n in os.listdir(tmp_path) if not n.startswith('run')) == []  # nothing was written
    says('no checkpoint', args=['--init_from=resume'])
    (tmp_path / 'file').write_text('')
    says('file/out', 'Not a directory', args=['--out_dir=file/out'])


def test_damaged_data(tmp_path):
    folder = make_data(tmp_path)
    with open(os.path.join(folder, 'train.bin'), 'r+b') as file:
        file.truncate(1000)
    assert 'train.bin' in fails(tmp_path, '--dataset=' + folder, '--max_iters=2')
    os.remove(os.path.join(folder, 'meta.json'))
    line = fails(tmp_path, '--dataset=' + folder, '--max_iters=2')
    assert 'half made' in line and 'prepare.py' in line and not os.path.exists(tmp_path / 'out')


def test_other_model_or_data_is_refused(tmp_path, data):
    train(tmp_path, data, '--max_iters=2')
    before = sorted(os.listdir(tmp_path / 'out'))
    other = make_data(tmp_path, 'other', 'import this\n' * 999)
    for args, parts in (((data, '--n_embd=32'), ('n_embd is 16', '32 here')),
                        ((data, '--seed=7'), ('seed is 1337', '7 here')),
                        ((data, '--optimizer=muon'), ("'adamw'", "'muon'")),
                        (('--dataset=' + other,), ('dataset is', 'other')),
                        ((data, '--init_from=scratch'), ('has checkpoints', '--overwrite=True'))):
        line = fails(tmp_path, *args, '--max_iters=4')
        assert all(part in line for part in parts), line
    new = (data, '--init_from=out/step_000002_final.pt', '--out_dir=new', '--max_iters=1')
    assert 'n_embd' in fails(tmp_path, *new, '--n_embd=32')
    assert sorted(os.listdir(tmp_path / 'out')) == before and not os.path.exists(tmp_path / 'new')
    train(tmp_path, *new)
    assert metrics(tmp_path / 'new', 'loss').keys() == {1}
    run = train(tmp_path, data, '--init_from=scratch', '--overwrite=True', '--max_iters=1', '--n_embd=32')
    assert 'going on' not in run.out and 'step_000002_final.pt' not in os.listdir(tmp_path / 'out')
