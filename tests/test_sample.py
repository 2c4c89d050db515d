"""sample.py as people meet it."""
import json
import os
import re
import signal
import threading

import pytest
import torch

from model import load_model
from runs import Run, fails, make_data, train, unread

TEXT = 'Größe: 日本語 🙂 naïve café — ünïcödé. ' * 600


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model that has learnt one line of many-byte characters by heart (or nearly so)."""
    folder = tmp_path_factory.mktemp('model')
    data = '--dataset=' + make_data(folder, text=TEXT)
    train(folder, data, '--max_iters=60', '--learning_rate=2e-2', '--eval_interval=0')
    return folder


def sample(folder, *args, **kwargs):
    run = Run(folder, 'sample.py', [f'--out_dir={folder}/out', '--device=cpu', *args], **kwargs).wait()
    assert run.code == 0, (run.out, run.err)
    with open(run.output + '.out', 'rb') as file:
        run.text = file.read().decode()[:-1]  # strict: what is shown is UTF-8, whatever the model says
    assert re.fullmatch(r'prefill: [\d,]+ tokens, [\d.]+ s; decode: [\d,]+ tokens, [\d,]+ tok/s\n', run.err), run.err
    return run


def test_prompts(folder):
    (folder / 'prompt.txt').write_text('Größe: 日')
    greedy = ['--temperature=0', '--max_new_tokens=40']
    text = sample(folder, '--prompt=Größe: 日', *greedy).text
    assert text.startswith('Größe: 日') and len(text) > 12
    assert sample(folder, '--prompt_file=prompt.txt', *greedy).text == text
    os.mkfifo(folder / 'pipe')
    threading.Thread(target=(folder / 'pipe').write_text, args=['Größe: 日']).start()
    assert sample(folder, '--prompt=-', *greedy, stdin=folder / 'pipe').text == text
    # a prompt that ends inside a character, of any bytes, and far longer than the training context
    (folder / 'half.bin').write_bytes('Größe: 日'.encode()[:-1])
    assert sample(folder, '--prompt_file=half.bin', *greedy).text.startswith('Größe: ')
    (folder / 'bytes.bin').write_bytes(bytes(range(256)) * 40)
    assert 'prefill: 10,240 tokens' in sample(folder, '--prompt_file=bytes.bin', '--max_new_tokens=5').err
    # one that is long is not shown unless asked
    for prompt, enough in (('x' * 1001, '--echo=1e6'), ('xyz', '--echo=3')):
        hidden = sample(folder, f'--prompt={prompt}', *greedy, *['--echo=2'] * (prompt == 'xyz')).text
        assert not hidden.startswith('x') and sample(folder, f'--prompt={prompt}', enough, *greedy).text == prompt + hidden


def test_greedy_text_is_the_argmax_of_whole_forward_passes(folder):
    """<|endoftext|> in a prompt is the token between documents, wherever it stands; the start of one is not shown."""
    model, _, _ = load_model(str(folder / 'out'))
    (folder / 'two.txt').write_text('a<|endoftext|>Gr')
    for args, ids, shown in ((['--prompt=Größe: 日本'], [*'Größe: 日本'.encode()], 'Größe: 日本'), ([], [256], ''),
                             (['--prompt=<|endoftext|>Gr'], [256, *b'Gr'], 'Gr'),
                             (['--prompt_file=two.txt'], [*b'a', 256, *b'Gr'], 'a<|endoftext|>Gr')):
        n = len(ids)
        with torch.no_grad():
            for _ in range(20):
                ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        text = sample(folder, *args, '--temperature=0', '--max_new_tokens=20', '--stop_at_end=False').text
        assert text == shown + bytes(i for i in ids[n:] if i < 256).decode(errors='replace')
    assert 'in it is the token between documents' in Run(folder, 'sample.py', ['--help']).wait().out


def test_stdout_that_takes_no_more(folder):
    """A full disk is one line, a reader that has seen enough is none."""
    os.symlink('/dev/full', folder / f'run{Run.count + 1}.out')
    assert fails(folder, '--max_new_tokens=5', code=1, script='sample.py') == 'error: stdout: No space left on device'
    assert unread(folder, 'sample.py', '--max_new_tokens=100000', '--stop_at_end=False') == (b'', -signal.SIGPIPE)


def test_sampling(folder):
    args = ['--prompt=G', '--max_new_tokens=60', '--temperature=2', '--top_p=1']
    one = sample(folder, *args, '--seed=1').text
    assert one == sample(folder, *args, '--seed=1').text != sample(folder, *args, '--seed=2').text
    greedy = sample(folder, *args, '--temperature=0').text
    assert greedy == sample(folder, *args, '--top_k=1').text == sample(folder, *args, '--top_p=1e-6').text
    assert greedy == sample(folder, *args, '--temperature=1e-30').text
    sample(folder, *args, '--dtype=bfloat16')


def test_several_samples_from_one_prefill(folder):
    args = '--prompt=Größe', '--max_new_tokens=30'
    run, one = sample(folder, *args, '--num_samples=3', '--temperature=0'), sample(folder, *args, '--temperature=0').text
    assert re.split(r'-{40} \d of 3\n', run.text + '\n') == ['', *[one + '\n'] * 3]
    assert 'prefill: 7 tokens' in run.err and 'decode: 90' in run.err
    run = sample(folder, *args, '--num_samples=3', '--temperature=3')
    assert len(set(re.split(r'-{40} \d of 3\n', run.text))) == 4


def test_stop(folder):
    args = ['--prompt=aab', '--max_new_tokens=120', '--temperature=1.5', '--seed=3', '--stop_at_end=False']
    text = sample(folder, *args).text[3:]
    for i, n in ((0, 1), (5, 3), (11, 7), (20, 12)):  # each byte is a token, so all but the first go over their borders
        stop = text[i:i + n]
        assert sample(folder, *args, '--stop=' + stop).text == 'aab' + text[:text.index(stop)]
    stops = [text[30:34], text[8:11], 'never seen']
    end = min(text.index(stops[0]), text.index(stops[1]))
    assert sample(folder, *args, '--stop=' + json.dumps(stops)).text == 'aab' + text[:end]
    # what only begins like a stop is shown, at the end too; the prompt does not count
    assert sample(folder, *args, '--stop=' + text[-1] + 'never').text == 'aab' + text
    assert sample(folder, *args, '--stop=aab').text.startswith('aab')
    assert sample(folder, *args, '--stop=[').text.startswith('aab')


def test_bad_input(folder, tmp_path):
    (tmp_path / 'step_000001.pt').write_bytes(b'x')
    for arg, words in {'--out_dir=out': 'python train.py', f'--out_dir={tmp_path}/step_000001.pt': 'manifest',
                       f'--out_dir={tmp_path}': 'no whole checkpoint', '--prompt=': 'empty', '--prompt=-': 'empty', '--prompt_file=/dev/null': 'empty', '--start=x': 'see prompt',
                       '--prompt_file=nope': 'No such file', '--top_p=2': 'top_p=2', '--temperature=-1': 'temperature=-1',
                       '--num_samples=0': 'num_samples=0', '--max_tokens=0': 'max_new_tokens', '--dtype=int8': 'dtype',
                       '--device=tpu': 'device', '--seed=1e19': 'seed=1'}.items():
        assert words in fails(tmp_path, f'--out_dir={folder}/out', arg, script='sample.py')
