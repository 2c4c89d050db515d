"""train.py as people meet it: real processes, real signals, real files."""
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.run

from model import load_checkpoint, save_checkpoint
from runs import REPO, TINY, Run, fails, load, make_data, metrics, start, strict_rows, train, train_ranks, unread, values


def same_run(a, b):
    """The same checkpoint bit for bit, but for out_dir, the time it took and the digits of that in metrics.jsonl."""
    for state in (a, b):
        del state['config'], state['training']['elapsed'], state['training']['metrics']
    return len({json.dumps(x, sort_keys=True, default=lambda tensor: (str(tensor.dtype), tensor.tolist())) for x in (a, b)}) == 1


def test_end_to_end(tmp_path, data):
    run = train(tmp_path, data, '--max_iters=60', '--learning_rate=1e-2', '--sample_tokens=20', '--eval_interval=20')
    for words in ('bits per byte', 'gzip', 'xz', 'float32 (as asked)', 'tok/s', 'FLOP/s', 'ETA', '(the end by max_iters)'):
        assert words in run.out, run.out
    loss, bpb = metrics(tmp_path / 'out', 'loss'), metrics(tmp_path / 'out', 'val_bpb')
    assert list(loss) == list(range(1, 61)) and list(bpb) == [20, 40, 60]
    assert loss[60] < loss[1] - 1 and bpb[60] < bpb[20]
    manifest = json.load(open(tmp_path / 'out' / 'step_000060_final.json'))
    assert manifest['tokens'] == 60 * 256 and manifest['tokenizer'] == 'bytes' and manifest['config']['n_embd'] == 16
    assert math.isclose(manifest['losses']['final_val_bpb'], manifest['losses']['final_val'] / math.log(2))
    files = ['lock', 'metrics.jsonl', 'step_000060_final.json', 'step_000060_final.pt']
    assert sorted(os.listdir(tmp_path / 'out')) == files


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
    """What ended a run is said, and the advice names it. A budget that is given switches the default time off."""
    run = train(tmp_path, data, '--max_iters=50', '--max_tokens=1300')
    assert max(metrics(tmp_path / 'out', 'loss')) == 6 and '(the end by max_tokens)' in run.out  # 6 * 256 reach 1300
    train(tmp_path, data, '--max_iters=50', '--max_tokens=12800')  # a larger budget: from its peak the rate falls once
    assert (rates := values(tmp_path / 'out', 'lr')[6:]) == sorted(rates, reverse=True) and rates[0] > 2 * rates[-1]
    run = train(tmp_path, data, '--max_iters=100000', '--max_seconds=0.3', '--out_dir=b')
    assert '(the end by max_seconds)' in run.out and '100%' in run.out
    run = train(tmp_path, data, '--max_iters=100000', '--max_seconds=0.3', '--out_dir=b')
    assert 'finished: max_seconds=0.3 is used up, a larger --max_seconds' in run.out
    assert 'going on from b, step ' in run.out and 'loss' not in run.out
    steps, args = max(metrics(tmp_path / 'b', 'loss')), [arg for arg in TINY if 'max_seconds' not in arg]
    run = Run(tmp_path, 'train.py', [*args, data, f'--max_iters={steps + 2}', '--out_dir=b']).wait()
    assert 'max_seconds 0.3 -> 0.0' in run.out and '(the end by max_iters)' in run.out
    assert 'pauses included' in Run(tmp_path, 'train.py', ['--help']).wait().out


@pytest.mark.parametrize('args', ['--checkpoint_activations=True', '--dtype=float16', '--dtype=bfloat16'])
def test_the_same_training_within_rounding(tmp_path, data, args):
    train(tmp_path, data, '--max_iters=3', '--out_dir=a')
    run = train(tmp_path, data, '--max_iters=3', '--out_dir=b', args)
    a, b = (metrics(tmp_path / name, 'loss') for name in 'ab')
    skipped = {i: None for i in (1, 2, 3) if f'step {i}: skipped' in run.out}  # float16 may find its scale by overflowing
    assert len(skipped) <= ('float16' in args) and {**b, **skipped} == b
    done, tolerance = b.keys() - skipped, 1e-2 if 'dtype' in args else 1e-5
    assert [a[i] for i in done] == pytest.approx([b[i] for i in done], tolerance)


def test_a_slow_machine_is_not_silent(tmp_path, data):
    """A line by time as well as by steps, and evaluations say how far they are."""
    source = Path(REPO, 'train.py').read_text()
    assert 'LINE_SECONDS = 30' in source
    (tmp_path / 'slow.py').write_text(source.replace('LINE_SECONDS = 30', 'LINE_SECONDS = 0'))
    run = Run(tmp_path, str(tmp_path / 'slow.py'), [*TINY, data, '--max_iters=3', '--log_interval=100']).wait()
    assert [line[:11] for line in run.out.splitlines() if 'tok/s' in line] == [f'step{i:7}' for i in (1, 2, 3)]
    assert 'step      3 | evaluation, 75% done' in run.out and list(metrics(tmp_path / 'out', 'loss')) == [1]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_resume_is_exact(tmp_path, data, optimizer, dtype):
    """2N steps = N + kill -9 + resume + N, bit for bit; evaluations and checkpoints change nothing."""
    args = (data, '--max_iters=16', f'--optimizer={optimizer}', f'--dtype={dtype}', '--log_interval=3')
    train(tmp_path, *args, '--out_dir=a')
    for name, saved in (('b', 'step_000008.pt'), ('d', 'step_000016.pt')):  # the second in the last evaluation
        out = f'--out_dir={name}', '--save_interval=8', '--final_eval_tokens=' + ('512' if name == 'b' else '0')
        start(tmp_path, *args, *out).until(saved).kill().wait()
        run = train(tmp_path, *args, *out)
        assert f'going on from {name}, step {int(saved[5:11])}' in run.out, run.out
        assert same_run(*(load(tmp_path / folder / 'step_000016_final.pt') for folder in ('a', name)))
        for key in ('loss', 'lr', 'grad_norm', 'val_loss'):
            assert metrics(tmp_path / 'a', key) == metrics(tmp_path / name, key)
    assert metrics(tmp_path / 'a', 'final_val_loss') == metrics(tmp_path / 'b', 'final_val_loss')
    if optimizer == 'adamw' and dtype == 'float32':
        train(tmp_path, *args, '--out_dir=c', '--eval_interval=0')
        assert same_run(*(load(tmp_path / name / 'step_000016_final.pt') for name in 'ac'))


@pytest.mark.parametrize('optimizer,dtype', [('adamw', 'float32'), ('muon', 'bfloat16')])
def test_resume_is_exact_with_two_ranks_and_they_equal_one(tmp_path, data, optimizer, dtype):
    args = (data, '--max_iters=8', f'--optimizer={optimizer}', f'--dtype={dtype}', '--save_interval=4',
            '--keep_checkpoints=0', '--batch_tokens=512')
    train_ranks(tmp_path, 2, *args, '--out_dir=a')
    runs = train_ranks(tmp_path, 2, *args, '--out_dir=b', code=None)
    runs[0].until('step_000004.pt')
    for run in runs:
        run.kill().wait()
    train_ranks(tmp_path, 2, *args, '--out_dir=b')
    two = load(tmp_path / 'a/step_000008_final.pt')
    # from 2 ranks to 1: the same windows, 4 x 4 a step and not 2 x 2 at a time, the same result within rounding
    shutil.copytree(tmp_path / 'a', tmp_path / 'one', ignore=shutil.ignore_patterns('step_000008*'))
    train(tmp_path, *args, '--out_dir=one')
    one, bf16 = load(tmp_path / 'one/step_000008_final.pt'), dtype == 'bfloat16'
    assert one['training']['position'] == two['training']['position'] == 128
    for key in ('loss', 'val_loss', 'final_val_loss', 'grad_norm'):
        assert values(tmp_path / 'one', key) == pytest.approx(values(tmp_path / 'a', key), 1e-2 if bf16 else 1e-4)
    for name, p in one['model'].items() if not bf16 else ():
        torch.testing.assert_close(p, two['model'][name], rtol=1e-4, atol=2e-5)
    assert same_run(two, load(tmp_path / 'b/step_000008_final.pt'))


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='torch.compile needs a C++ compiler')
def test_two_compiled_ranks(tmp_path, data):
    """torch.compile inside DDP: the same training"""
    for name in ('on', 'off'):
        train_ranks(tmp_path, 2, data, '--max_iters=3', '--pattern=S', '--n_layer=1', f'--compile={name}', f'--out_dir={name}')
    assert values(tmp_path / 'on', 'loss') == pytest.approx(values(tmp_path / 'off', 'loss'), 1e-5)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_knobs_of_the_optimizer_are_used_after_a_resume(tmp_path, data, optimizer):
    """What is logged is what is used: weights that differ by lr * (difference of decay) * weight, after one step."""
    args = (data, f'--optimizer={optimizer}', '--schedule=constant', '--grad_clip=0')
    train(tmp_path, *args, '--max_iters=4')
    states = {}
    for name, knob in {'same': '', 'decay': '--weight_decay=0.6', 'beta': '--beta1=0.7', 'clip': '--grad_clip=1e-3'}.items():
        shutil.copytree(tmp_path / 'out', tmp_path / name)
        run = train(tmp_path, *args, '--max_iters=5', f'--out_dir={name}', *knob.split())
        states[name] = load(tmp_path / name / 'step_000005_final.pt')['model']
        assert f'{knob[2:].partition("=")[0]} ' in run.out.splitlines()[0]
    before, name = load(tmp_path / 'out/step_000004_final.pt')['model'], 'blocks.0.mlp.out_proj.weight'
    torch.testing.assert_close(states['same'][name] - states['decay'][name], 2e-3 * 0.5 * before[name], rtol=1e-3, atol=1e-8)
    assert not torch.equal(states['same']['norm.weight'], states['beta']['norm.weight'])
    assert not torch.equal(states['same']['norm.weight'], states['clip']['norm.weight'])


def test_init_from_takes_the_shape_too(tmp_path, data):
    train(tmp_path, data, '--max_iters=2', '--n_embd=32', '--pattern=SL')
    shape = [arg for arg in TINY if not arg.startswith(('--n_', '--gla_heads', '--pattern'))]
    new = [*shape, data, '--init_from=out/step_000002_final.pt', '--out_dir=new', '--max_iters=1']
    assert "n_embd is 32" in (line := fails(tmp_path, *new, '--n_embd=8', '--pattern=S', '--n_modes=16', script='train.py')), line
    assert "pattern is 'SL' in out/step_000002_final.pt and 'S' here" in line and 'n_modes' not in line
    run = Run(tmp_path, 'train.py', new).wait()
    assert run.code == 0 and metrics(tmp_path / 'new', 'loss').keys() == {1}, run.err
    config = load(tmp_path / 'new/step_000001_final.pt')['config']
    assert (config['n_embd'], config['pattern'], config['n_layer'], config['gla_heads']) == (32, 'SL', 4, 2)
    run = Run(tmp_path, 'train.py', [*new[:-1], '--max_iters=2']).wait()  # the same command goes on in its own folder
    assert run.code == 0 and 'going on from new, step 1' in run.out and metrics(tmp_path / 'new', 'loss').keys() == {1, 2}


@pytest.mark.parametrize('ranks, number', [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_stop_saves(tmp_path, data, ranks, number):
    """A signal to one rank stops all of them at the same step."""
    args = (data, '--max_iters=3000', '--log_interval=1')
    runs = train_ranks(tmp_path, ranks, *args, code=None)
    runs[0].until('step      3')
    runs[-1].kill(number)
    assert [run.wait().code for run in runs] == [0] * ranks
    out, step = runs[0].out, max(metrics(tmp_path / 'out', 'loss'))
    assert 'stopped at step' in out and 'goes on from there' in out and 'final' not in out
    assert os.path.exists(tmp_path / 'out' / f'step_{step:06d}.json')
    run = start(tmp_path, *args).until(f'step {step + 1:6}').kill(number).kill(number).wait()
    assert run.code in (0, 128 + number) and f'going on from out, step {step}, with the same knobs' in run.out
    assert load(tmp_path / f'out/step_{step:06d}.pt')['training']['step'] == step


@pytest.mark.parametrize('ranks', [1, 2])
def test_stop_in_the_last_evaluation(tmp_path, ranks):
    """The whole validation split takes long: a signal breaks it off, and the same command evaluates again."""
    args = ('--dataset=' + make_data(tmp_path, text='some words, a number: 123\n' * 8000), '--max_iters=4',
            '--eval_interval=0', '--final_eval_tokens=0', '--micro_batch_size=1')
    runs = train_ranks(tmp_path, ranks, *args, code=None)
    runs[0].until('step      4')
    runs[-1].kill(signal.SIGTERM)
    assert [run.wait().code for run in runs] == [0] * ranks, runs[0].err
    assert 'saved out/step_000004.pt' in runs[0].out and 'at step 4; the same command goes on' in runs[0].out
    assert sorted(os.listdir(tmp_path / 'out'))[2:] == ['step_000004.json', 'step_000004.pt']
    assert 'going on from out, step 4' in train(tmp_path, *args, '--final_eval_tokens=512').out
    assert 4 in metrics(tmp_path / 'out', 'final_val_loss')


def test_a_rank_is_killed(tmp_path, data):
    runs = train_ranks(tmp_path, 2, data, '--max_iters=3000', '--save_interval=2', code=None)
    runs[0].until('saved')
    runs[1].kill()
    run = runs[0].wait()
    assert run.code == 1 and 'error: rank 0 of 2 has lost another one' in run.err and 'Traceback' not in run.err
    again = start(tmp_path, data, '--max_iters=3000').until('step  ').kill().wait()
    assert 'going on from out, step ' in again.out


def test_ranks_that_differ_are_refused(tmp_path, data):
    """In their knobs, or in what a checkpoint of the same name holds."""
    train(tmp_path, data, '--max_iters=2', '--out_dir=a')
    train(tmp_path, data, '--max_iters=2', '--out_dir=b', '--learning_rate=1e-3')
    for last, line in ((['--seed=5', '--grad_clip=2'], 'grad_clip is 1.0 in rank 0 and 2.0 here; seed is 1337'),
                       (['--out_dir=b'], 'rank 1 finds another checkpoint in b than rank 0')):
        one, two = train_ranks(tmp_path, 2, data, '--max_iters=4', '--out_dir=a', code=None, last=last)
        assert two.wait().code == 2 and f'error: {line}' in two.err
        assert one.wait().code == 1 and 'lost another one' in one.err and 'step      3' not in one.out


def test_torchrun(tmp_path, data):
    """The command of the README, and the signal of a scheduler, which torchrun passes on."""
    args = '--standalone', '--nproc_per_node=2', f'{REPO}/train.py', *TINY, data, '--max_iters=100000'
    run = Run(tmp_path, torch.distributed.run.__file__, args).until('step      3').kill(signal.SIGTERM).wait()
    step = max(metrics(tmp_path / 'out', 'loss'))
    assert f'stopped at step {step}' in run.out
    assert f'going on from out, step {step}' in train(tmp_path, data, f'--max_iters={step + 1}').out


def test_bad_numbers_are_skipped_then_stop_the_run(tmp_path, data):
    run = start(tmp_path, data, '--max_iters=50', '--learning_rate=1e18', '--warmup_iters=0', '--save_interval=1').wait()
    assert run.code == 1 and run.out.count('skipped, loss') == 10 and 'lr 9.' in run.out, (run.out, run.err)
    assert '10 in a row were not finite' in run.err and 'is not saved: its loss or gradients' in run.out
    assert not [name for name in os.listdir(tmp_path / 'out') if name.endswith('.pt')]  # step 1 made the weights what they are
    assert strict_rows(tmp_path / 'out')


def test_the_logs_reader_is_gone(tmp_path, data):
    assert unread(tmp_path, 'train.py', *TINY, data, '--max_iters=30') == (b'', 0)
    assert os.path.exists(tmp_path / 'out' / 'step_000030_final.pt')


def test_a_full_disk(tmp_path, data):
    """Lines and checkpoints are lost, training goes on; what was torn is mended when there is room again."""
    run = start(tmp_path, data, '--max_iters=20', '--save_interval=4', fsize=2000).wait()
    assert run.code == 1 and 'error: the last step is not saved' in run.err and 'Traceback' not in run.err
    assert os.path.getsize(tmp_path / 'out' / 'metrics.jsonl') == 2000 and 'warning: step 4 is not saved' in run.out
    train(tmp_path, data, '--max_iters=20')
    with open(tmp_path / 'out' / 'metrics.jsonl', 'ab') as file:
        file.write(b'{"step": 21, "lo\xff\0')
    train(tmp_path, data, '--max_iters=22')
    assert list(metrics(tmp_path / 'out', 'loss')) == list(range(1, 23))


def test_second_run_in_a_folder_is_refused(tmp_path, data):
    """A run takes a folder that was made anew again when it saves, or stops when another has it by then (it stands still until then)."""
    first = start(tmp_path, data, '--max_iters=30000', '--save_interval=20').until('step     25')
    os.rename(tmp_path / 'out', tmp_path / 'one')
    first.until('saved out/step_000040')
    assert f'in use by process {first.kill(signal.SIGSTOP).pid}' in fails(tmp_path, data, '--max_iters=3000')
    os.rename(tmp_path / 'out', tmp_path / 'two')
    second = start(tmp_path, data, '--max_iters=30000').until('step      2')
    assert first.kill(signal.SIGCONT).wait().code == 2 and f'error: out is in use by process {second.pid}' in first.err
    assert f'in use by process {second.pid}' in fails(tmp_path, data, '--max_iters=3000')
    second.kill().wait()
    train(tmp_path, data, '--max_iters=1')


def test_bad_input(tmp_path, data):
    (tmp_path / 'file').write_text('')
    for arg, words in {'--batch_tokens=1000': 'batch_tokens=1,000 = 128 1,024', '--n_embd=15': 'n_embd=15 gla_heads=2',
                       '--pattern=SXL': 'pattern SXL', '--schedule=linear': 'schedule linear cosine', '--beta2=1': 'beta2=1',
                       '--optimizer=sgd': 'optimizer sgd muon', '--device=tpu': 'device tpu', '--max_iters=0': 'would never end',
                       '--micro_batch_size=0': 'micro_batch_size=0', '--warmup_iters=-1': 'warmup_iters=-1', '--seed=1e19': 'seed=1',
                       '--block_size=65536': 'block_size 65536', f'--dataset={tmp_path}/missing': 'missing prepare.py',
                       '--init_from=nothing.pt': 'nothing', '--learning_rate=inf': 'rate=inf', '--out_dir=': 'out_dir is empty',
                       '--out_dir=file/out': 'file/out Not a directory',
                       f'{REPO}/config/shakespeare.py': 'data/shakespeare first prepare.py line 1 of a config file'}.items():
        first = [data] if 'shakespeare' not in arg else []  # that one as in a fresh clone
        line = fails(tmp_path, '--max_iters=2', '--batch_tokens=262144', *first, arg)
        assert all(word in line for word in words.split()), line


def test_other_model_or_data_is_refused(tmp_path, data):
    train(tmp_path, data, '--max_iters=2')
    before = sorted(os.listdir(tmp_path / 'out'))
    text = Path(data[10:]).parent.with_name('mini.txt').read_text()
    other, changed = make_data(tmp_path, 'other', 'import this\n' * 999), make_data(tmp_path, 'changed', text[:-100] + 'x' * 100)
    for args, parts in (((data, '--n_embd=32', '--seed=7'), ('n_embd is 16 in out and 32 here', 'seed is 1337')),
                        ((data, '--optimizer=muon'), ("'adamw'", "'muon'")),
                        (('--dataset=' + other,), ('data_sha256 is', 'val_sha256 is')),
                        (('--dataset=' + changed,), ('error: val_sha256 is',)),  # its end is held out
                        ((data, '--init_from=scratch'), ('has checkpoints', '--init_from=auto')),
                        ((data, '--init_from=nonsense'), ("init_from='nonsense'", 'has checkpoints'))):
        line = fails(tmp_path, *args, '--max_iters=4')
        assert all(part in line for part in parts), line
    assert sorted(os.listdir(tmp_path / 'out')) == before


def test_a_checkpoint_of_another_version_or_program(tmp_path, data):
    """A field that it lacks has its default; else one line."""
    train(tmp_path, data, '--max_iters=2', '--out_dir=a')
    changes = {'training': {}}, {'optimizer': None}, {'model': {'w': 3}}, {'optimizer': []}, {}, {'optimizer': [{0: {'exp_avg': torch.ones(())}}]}
    for i, change in enumerate(changes):
        state, manifest = load_checkpoint(shutil.copytree(tmp_path / 'a', folder := f'{tmp_path}/{i}'))
        state.update(change)
        del state['config']['mlp_hidden']
        save_checkpoint(folder, 2, state, manifest, final=True)
        assert not change or f'error: {i} ' in fails(tmp_path, data, '--max_iters=4', f'--out_dir={i}')
    for name in 'a4':
        train(tmp_path, data, '--max_iters=4', f'--out_dir={name}')
    assert same_run(*(load(tmp_path / name / 'step_000004_final.pt') for name in 'a4'))
    assert 'mlp_hidden is 0 in 4 and 48 here' in fails(tmp_path, data, '--max_iters=8', '--out_dir=4', '--mlp_hidden=48')
