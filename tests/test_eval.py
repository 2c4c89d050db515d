"""eval.py: known scores to the last digit, the same targets at every context, what is finished stays finished."""
import csv
import json
import math
import os
import re
import signal
from itertools import takewhile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as ev
from configurator import configure
from model import FELA, FELAConfig
from prepare import get_tokenizer
from runs import Run, fails, make_data, train

KNOBS = configure(vars(ev), [])
SPEED = ['--suite=speed', '--repetitions=2', '--lengths=32,64', '--batches=1,2', '--out=speed']
QUICK = ['--suite=longctx,needle', '--contexts=16,32', '--blocks=2', '--block_tokens=8', '--needle_lengths=150',
         '--needle_depths=0.5', '--needle_seeds=2']


@pytest.fixture(autouse=True)
def knobs(monkeypatch, tmp_path):
    """Every test starts from the defaults on a CPU."""
    for key, value in (KNOBS | {'device': 'cpu', 'dtype': 'float32', 'plots': False, 'out': str(tmp_path)}).items():
        monkeypatch.setattr(ev, key, value)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    return lambda **values: [monkeypatch.setattr(ev, key, value) for key, value in values.items()]


def small(pattern='SSSL', vocab_size=261, tokenizer='bytes'):
    torch.manual_seed(0)
    model = FELA(FELAConfig(vocab_size=vocab_size, n_layer=4, n_head=2, gla_heads=2, n_embd=32, n_modes=16,
                            pattern=pattern)).eval().requires_grad_(False)
    for block in model.blocks:  # logits that matter
        block.mixer.out_proj.weight.mul_(20)
    model.embedding.weight.mul_(5)
    return SimpleNamespace(model=model, tokenizer=get_tokenizer(tokenizer), block_size=64)


@pytest.fixture(params=['SSSL', 'A'])
def tiny(request):
    return small(request.param)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A folder with data and a checkpoint in out/, as train.py leaves them."""
    folder = tmp_path_factory.mktemp('run')
    train(folder, '--dataset=' + make_data(folder), '--max_iters=1', '--n_embd=32', '--block_size=64')
    return folder


def evaluate(folder, *args):
    run = Run(folder, 'eval.py', ['--device=cpu', '--dtype=float32', *args], env={'HF_HOME': str(folder / 'hf')}).wait()
    assert run.code == 0, (run.out, run.err)
    return run


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file)) if str(path).endswith('csv') else json.load(file)


class Unigram:
    """The same distribution whatever came before."""
    attention, init_state, prefill = False, None, lambda self, idx, state=None: (None, [])

    def __init__(self, weights):
        self.log_weights = torch.tensor(np.log(np.array(weights) / np.sum(weights)))
        self.embedding = lambda idx: idx.unsqueeze(-1)

    def hidden(self, x, state):
        return torch.zeros(*x.shape[:2], 1), state

    def logits(self, h):
        return self.log_weights.expand(len(h), -1)


def lm(run):
    pytest.importorskip('lm_eval')
    ev.lm(run)
    return read(os.path.join(ev.out, 'lm_eval_results.json'))


def adapter(run):
    pytest.importorskip('lm_eval')
    return ev.lm_adapter(run.model, run.tokenizer)


def requests(*args):
    return [SimpleNamespace(args=a) for a in args]


def test_known_scores_of_a_unigram_model(gpt2, shared, knobs, capsys):
    """Through the adapter, lm-eval and the local files: to all digits of ../shared/data/README.md."""
    with open(shared('text', 'tinyshakespeare.txt')) as file:
        counts = np.bincount(gpt2.encode(file.read()), minlength=gpt2.vocab_size) + 1
    kinds, names = np.unique(counts, return_inverse=True)  # an add-one model wants to know no more of a token than its count
    tokenizer = SimpleNamespace(name='gpt2', eot=len(kinds), encode=lambda text: names[gpt2.encode(text)].tolist())
    knobs(task_data=shared('lm_eval'), batch_size=64)
    found = lm(SimpleNamespace(model=Unigram([*kinds, counts.sum() - kinds.sum()]), tokenizer=tokenizer))
    results, majority = found['results'], {row['task']: row.get('majority') for row in found['table']}
    assert found['config']['left_out'] == ['hellaswag'] and 'hellaswag*.jsonl' in capsys.readouterr().out
    assert round(results['wikitext']['word_perplexity'], 4) == 25415.2275
    assert round(results['wikitext']['bits_per_byte'], 5) == 2.73652 and round(majority['boolq'], 3) == 0.622
    assert {task: round(results[task]['acc'], 4) for task in ('arc_easy', 'boolq', 'piqa', 'winogrande')} == {
        'arc_easy': 0.2605, 'boolq': 0.3783, 'piqa': 0.5201, 'winogrande': 0.4957}
    assert [round(results[task]['acc_norm'], 4) for task in ('piqa', 'arc_easy')] == [0.5016, 0.2609]


def straight(run):
    """A plain adapter: one row at a time, one forward pass each"""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    longest, eot, encode = ev.max_length or 1 << 60, run.tokenizer.eot, run.tokenizer.encode

    class Straight(TemplateLM):
        eot_token_id, generate_until, tok_encode = eot, None, lambda self, text, **kwargs: encode(text)

        def _loglikelihood_tokens(self, asked, **kwargs):
            values = []
            for _, context, continuation in asked:
                n = len(continuation)
                ids = torch.tensor([((context or [eot]) + continuation)[-max(longest, n) - 1:]])
                logits = run.model(ids[:, :-1])[0][0, -n:].double().log_softmax(-1)
                values.append((logits.gather(1, ids[0, -n:, None]).sum().item(), logits.argmax(-1).equal(ids[0, -n:])))
            return values

        def loglikelihood_rolling(self, asked, **kwargs):
            windows = lambda text: map(make_disjoint_window, get_rolling_token_windows(encode(text), eot, longest, 1))
            scores = lambda text: self._loglikelihood_tokens([('', *window) for window in windows(text)])
            return [sum(value for value, _ in scores(request.args[0])) for request in asked]
    return Straight()


def test_log_likelihoods_are_those_of_a_plain_adapter(tiny, knobs):
    text = 'It was the best of times, it was the worst of times. ' * 3
    asked = requests(*((text[:n], text[n:n + 1 + n % 7]) for n in range(1, 120, 5)), ('', 'abc'), ('a ', 'b'),
                     (' \n ', 'xy'), ('a', 'b' * 40), ('x' * 50, 'yes'))
    for size, longest in ((1, 20), (4, 100), (64, 0)):
        knobs(batch_size=size, max_length=longest)
        lm = adapter(tiny)
        assert np.allclose(lm.loglikelihood(asked), straight(tiny).loglikelihood(asked), atol=1e-3)
        texts = requests((text,), ('short',), ('',), (text * 2,))
        assert np.allclose(lm.loglikelihood_rolling(texts), straight(tiny).loglikelihood_rolling(texts), rtol=1e-5)
    assert lm.loglikelihood(requests(('a', ''))) == [(0, True)]


def test_generation_is_the_models_own_and_options_are_lm_evals(tiny, knobs):
    prompts = ['def f(', 'class', 'x = 1\nfor i in', 'é', '', '  ']

    def made(options, size=16, some=prompts):
        knobs(batch_size=size)
        return adapter(tiny).generate_until(requests(*((text, options) for text in some)))

    def own(some=prompts, **options):
        ids = [torch.tensor([tiny.tokenizer.encode(text) or [256]]) for text in some]
        tokens = (takewhile(lambda t: t != 256, map(int, tiny.model.stream(idx, 12, **options))) for idx in ids)
        return [tiny.tokenizer.decode([*row]) for row in tokens]
    greedy = made({'until': [], 'max_gen_toks': 12})
    stop = next(text for text in greedy if len(text) > 4)[3]
    assert greedy == own(temperature=0) and made({'max_gen_toks': 0}) == [''] * len(prompts)
    assert made({'until': stop, 'max_new_tokens': 12}) == [text.split(stop)[0] for text in greedy]
    for options in ({'until': ['']}, {'until': None}, {'do_sample': False, 'temperature': 0.7}, {'temperature': 2.0, 'top_k': 1}):
        assert made({'max_new_tokens': 12, **options}) == greedy
    for options in ({'temperature': 1.0}, {'temperature': 3.0, 'top_p': 0.9}, {'temperature': 2.0, 'top_k': 3}):
        draws = made({'max_gen_toks': 12, **options}, 1, ['x'] * 6)
        assert len(set(draws)) > 3 and draws == own(['x'] * 6, **options, generator=torch.manual_seed(ev.seed))
        assert draws == made({'max_gen_toks': 12, 'do_sample': True, **options}, 4, ['x'] * 6)
    knobs(max_length=16)
    assert made({'max_gen_toks': 12}, some=['x' * 9 + 'class']) == made({'max_gen_toks': 12}, some=['lass'])
    with pytest.raises(ValueError, match='max_length=16'):
        made({'max_gen_toks': 16})


def test_a_task_that_generates(tiny, knobs, tmp_path):
    """Two of three answers are those that the model gives."""
    asked = requests(*((f'Question: {i}?\nAnswer:', {'until': ['\n', '.', ',']}) for i in range(3)))
    answers = [[text.strip()] for text in adapter(tiny).generate_until(asked)[:2]] + [['another']]
    rows = [json.dumps({'question': f'{i}', 'answer': {'value': '', 'aliases': a}}) for i, a in enumerate(answers)]
    (tmp_path / 'triviaqa.jsonl').write_text('\n'.join(rows))
    knobs(tasks='triviaqa', task_data=str(tmp_path))
    [row] = lm(tiny)['table']
    assert row == {'task': 'triviaqa', 'documents': 3, 'metric': 'exact_match,remove_whitespace', 'value': 2 / 3}


@pytest.mark.parametrize('pattern, name', [('A', 'bytes'), ('SSSL', 'gpt2')])
def test_the_six_tasks_are_those_of_a_plain_adapter(pattern, name, gpt2, shared, knobs, tmp_path, monkeypatch):
    document = {'activity_label': 'Cooking', 'ctx_a': 'A man cuts bread.', 'ctx_b': 'he', 'label': '2', 'ind': 0,
                'endings': ['eats it [step] now.', 'runs.', 'puts it on a plate.', 'sleeps.']}
    (tmp_path / 'hellaswag.jsonl').write_text(json.dumps(document))
    for file in os.listdir(shared('lm_eval')):
        os.symlink(os.path.abspath(shared('lm_eval', file)), tmp_path / file)
    run = small(pattern, 261 if name == 'bytes' else 50257, name)
    knobs(task_data=str(tmp_path), limit=3, max_length=300)
    found = lm(run)['results']
    monkeypatch.setattr(ev, 'lm_adapter', lambda *args: straight(run))
    for task, scores in lm(run)['results'].items():
        for key, value in scores.items():  # a perplexity is the exponential of a sum
            same = found[task][key] / value if value else 1.0
            assert abs(math.log(same)) < 0.02 if 'perplexity' in key else abs(same - 1) < 1e-4, (task, key)
    assert set(found) == set(ev.FIELDS)


def test_longctx_reads_exactly_the_context(tiny, knobs, tmp_path):
    (tmp_path / 'text.txt').write_text(''.join(chr(97 + i * i % 26) for i in range(2000)))
    knobs(text_file=str(tmp_path / 'text.txt'), contexts='2,16,100,700', blocks=6, block_tokens=40, batch_size=4, plots=True)
    ev.longctx(tiny)
    table, tokens = read(tmp_path / 'longctx_bpb.csv'), tiny.tokenizer.encode((tmp_path / 'text.txt').read_text())
    assert [row['beyond_training'] for row in table] == ['False', 'False', 'True', 'True']
    for row in table:
        c, bits = int(row['context_tokens']), 0
        for s in np.linspace(700, len(tokens) - 40, 6).astype(int):
            ids = torch.tensor(tokens[s - c:s + 40])[None]
            losses = tiny.model(ids[:, :-1], ids[:, 1:], reduction='none')[1][0, -40:]
            bits += losses.double().sum().item() / math.log(2)
        assert math.isclose(float(row['bpb']), bits / 240, rel_tol=1e-4)
        assert float(row['bpb_low']) <= float(row['bpb']) <= float(row['bpb_high'])
    assert float(table[1]['change']) == 0 == float(table[1]['change_low'])
    assert os.path.getsize(tmp_path / 'longctx_bpb.png') > 5000


def test_needle_sees_success_and_failure(knobs, tmp_path):
    """A model that looks the key up in its prompt finds all; without the needle, none."""
    tok = get_tokenizer('bytes')

    class Oracle(Unigram):
        def prefill(self, idx, state=None):
            text = tok.decode(idx[0].tolist())
            return None, f' {text.split("The pass key is ")[1][:5]}' if 'Remember' in text else ' 0 0 0'

        def hidden(self, x, state):
            return torch.nn.functional.one_hot(torch.tensor([tok.encode(state)]), 261) * 50.0, state

        def logits(self, h):
            return h
    knobs(needle_lengths='150,260', needle_depths='0,0.5,1', needle_seeds=5, plots=True)
    table = ev.needle(SimpleNamespace(model=Oracle([1]), tokenizer=tok, block_size=200))['table']
    assert [row['depth 0.5'] for row in table] == [1, 1] and [row['control'] for row in table] == [0, 0]
    cells = json.loads((tmp_path / 'needle_heatmap.json').read_text())['cells']
    assert len(cells) == 6 and all(c['log_prob'] > -1e-3 and c['bits_told'] > 50 for c in cells)
    assert os.path.getsize(tmp_path / 'needle_heatmap.png') > 5000


def test_make_passkey(tmp_path):
    evaluate(tmp_path, '--make_passkey=data/passkey')
    tokens = np.fromfile(tmp_path / 'data' / 'passkey' / 'val.bin', np.uint16)
    for document in get_tokenizer('bytes').decode(tokens).split('<|endoftext|>')[1:-1]:
        keys = set(re.findall(r' (\d{5})', document))
        assert 128 <= len(document) < 512 and len(keys) <= 1
        assert len(document) < 256 or ev._NEEDLE.format(*keys) in document


def test_speed_keeps_finished_cells_whatever_commands_they_are_of(checkpoint):
    evaluate(checkpoint, *SPEED, '--plots=False')
    folder, first = checkpoint / 'speed', read(checkpoint / 'speed' / 'meta.json')['speed']
    throughput, wall, vram = (read(folder / f'{name}.csv') for name in ('throughput', 'wallclock', 'vram'))
    assert len(throughput) == len(wall) == len(vram) == 3 * 2 * 2 * 2 and {row['status'] for row in wall} == {'ok'}
    assert all(float(row['times_as_long']) == 1 for row in wall if row['arm'] == 'FELA')
    held = {(row['arm'], row['length'], row['batch']): int(row['held_bytes']) for row in vram if row['kind'] == 'decode'}
    assert held['A', '64', '2'] == 2 * 2 * 64 * 32 * 4 * 4  # k and v, rows, tokens, channels, layers, bytes
    assert held['FELA', '64', '1'] == held['FELA', '32', '1']
    assert all((row['floor_seconds'] != '') == (row['kind'] == 'decode') for row in throughput)
    (folder / 'meta.json').write_text(json.dumps({'speed': first | {'cells': first['cells'][:-2]}}))  # interrupted
    evaluate(checkpoint, *SPEED)
    evaluate(checkpoint, *SPEED, '--kinds=recompute,decode', '--lengths=64', '--batches=2')
    now = read(folder / 'meta.json')['speed']
    assert [cell for cell in now['cells'] if cell['kind'] != 'recompute'][:-2] == first['cells'][:-2]
    assert now['cells'][-1]['seconds'] != first['cells'][-1]['seconds'] and len(now['command'].splitlines()) == 3
    assert len(now['table']) == len(read(folder / 'vram.csv')) == 26 and now['command'].splitlines()[2] in (folder / 'README.md').read_text()
    assert os.path.getsize(folder / 'speed.png') > 5000 and len(os.listdir(folder)) == 6


def test_speed_without_a_checkpoint_and_what_does_not_fit(tmp_path, knobs, monkeypatch):
    (tmp_path / 'mine.py').write_text('n_layer, n_head, n_embd, n_modes = 2, 2, 16, 8\npattern = "SL"\n')
    knobs(model_config=str(tmp_path / 'mine.py'), vocab_size=100, kinds='prefill,decode', lengths='16,64', compile='on')

    def call(cell, shape, real=ev.speed_call):
        if cell['arm'] == 'A' and cell['kind'] == 'prefill':
            raise RuntimeError("can't allocate memory") if cell['length'] == 64 else ValueError('a\nb')
        if (cell['arm'], cell['kind'], cell['length']) != ('FELA', 'decode', 64):
            return real(cell, shape)
        return lambda first=[1]: first.pop() if first else torch.empty(1 << 60)  # its repetitions do not fit
    monkeypatch.setattr(ev, 'speed_call', call)
    monkeypatch.setattr(FELA, 'compile_blocks', lambda self: None)
    *_, result = ev.speed(None, [])
    found = {(row['kind'], row['arm'], row['length']): row for row in read(tmp_path / 'throughput.csv')}
    assert found['prefill', 'FELA', '64']['status'] == found['decode', 'A', '64']['status'] == 'ok'
    assert found['prefill', 'A', '64']['status'] == found['decode', 'FELA', '64']['status'] == 'out of memory'
    assert found['prefill', 'A', '16']['status'] == 'ValueError: a b' and found['decode', 'FELA', '64']['seconds'] == ''
    assert 'times_as_long' not in result['table'][-1] and len(result['cells']) == 8


def test_interpret_of_known_filters_and_gates(knobs, tmp_path):
    run = small()
    for layer, lag in ((0, 0), (1, 3)):  # a delay: a flat spectrum
        mixer = run.model.blocks[layer].mixer
        mixer.direct.zero_()
        mixer.taps.zero_()[lag] = 1 / mixer.window()[lag]
    gla = run.model.blocks[3].mixer
    gla.decay_up.weight.zero_()
    gla.decay_up.bias.fill_(torch.logit(torch.tensor(math.log(0.75) / gla.floor)))
    (tmp_path / 'text.txt').write_text('to be or not to be ' * 64)
    knobs(text_file=str(tmp_path / 'text.txt'), plots=True)
    table, ids = ev.interpret(run)['table'], torch.tensor(list((tmp_path / 'text.txt').read_bytes())).view(8, -1)
    assert all(abs(table[i]['centroid'] - 0.25) < 1e-3 for i in (1, 2)) and abs(table[4]['gate'] - 0.75) < 1e-4
    loss = run.model(ids[:, :-1], ids[:, 1:].contiguous())[1].item()
    assert math.isclose(table[4]['lens_bits_per_token'], loss / math.log(2), rel_tol=1e-4)
    shares = [row['committed'] for row in table]
    assert shares == sorted(shares) and shares[-1] == 1 and os.path.getsize(tmp_path / 'interpret.png') > 5000


def test_finished_suites_stay_and_the_page_shows_all(checkpoint):
    evaluate(checkpoint, *QUICK, '--out=results')
    folder = checkpoint / 'results'
    stamp = (folder / 'longctx_bpb.csv').stat().st_mtime_ns
    assert evaluate(checkpoint, *QUICK, '--needle_seeds=3', '--out=results').out.count('done before') == 1
    assert (folder / 'longctx_bpb.csv').stat().st_mtime_ns == stamp
    run = Run(checkpoint, 'eval.py', ['--device=cpu', '--dtype=float32', *QUICK, '--out=cut', '--needle_seeds=100000'])
    run.until('-- needle').kill(signal.SIGINT).wait()
    assert run.code == 130 and run.err.splitlines()[-1].startswith('error: interrupted') and 'Traceback' not in run.err
    assert evaluate(checkpoint, *QUICK, '--out=cut').out.count('done before') == 1
    page, meta = (folder / 'README.md').read_text(), read(folder / 'meta.json')
    assert '## longctx' in page and '![needle_heatmap.png](needle_heatmap.png)' in page and '--needle_seeds=3' in page
    assert str(checkpoint) not in page and len(meta['needle']['source'].split('sha256 ')[1]) == 64


def test_bad_input_is_one_line_and_a_folder_that_holds_something_else_is_left_alone(checkpoint, tmp_path):
    (checkpoint / 'other').mkdir()
    for body in ('mine', 'no JSON', '[]', '{"longctx": 3}', '{"longctx": {}}', '{"needle": {"key": 1, "table": []}}'):
        path = checkpoint / 'other' / ('README.md' if body == 'mine' else 'meta.json')
        path.write_text(body)
        assert 'other' in fails(checkpoint, '--device=cpu', *QUICK, '--out=other', script='eval.py') and path.read_text() == body
    for name, body in (('latin.txt', 'é'.encode('latin-1') * 9), ('short.txt', b'short ' * 100), ('piqa.jsonl', b'[1]\nno\n'),
                       ('boolq.jsonl', b'{"passage": "a", "question": "b", "label": 0}\n{"passage": "a", "label": 0}\n'),
                       ('without.py', b'import runpy, sys\nsys.modules["matplotlib"] = None\n'
                                      b'runpy.run_path(sys.path[0] + "/eval.py", run_name="__main__")')):
        (tmp_path / name).write_bytes(body)
    cases = [('--suite=longctxx', 'longctxx', 'interpret'), ('--suite=needle --checkpoint=out2', 'out2', ''),
             (f'--suite=longctx --text_file={tmp_path}/short.txt --contexts=64,512 --blocks=2', '600 tokens', '--contexts=64'),
             (f'--suite=longctx --text_file={tmp_path}/latin.txt', 'latin.txt', 'UTF-8'),
             (f'--suite=needle --haystack={tmp_path}/nothere.txt', 'nothere.txt'), ('--suite=needle --needle_depths=2', 'depths'),
             ('--suite=speed --arms=FELA,B', 'FELA,B'), ('--suite=speed --lengths=64,0', 'lengths', '64,0', '1'),
             ('--suite=lm --task_data=nowhere', 'nowhere', 'no file there'),
             (f'--suite=lm --tasks=boolq --task_data={tmp_path}', 'line 2', "'question'"),
             (f'--suite=lm --tasks=piqa --task_data={tmp_path}', 'line 1', 'piqa.jsonl')]
    for args, *words in cases:
        line = fails(checkpoint, '--device=cpu', '--dtype=float32', '--out=bad', *args.split(), script='eval.py')
        assert all(word in line for word in words), line
    assert 'boolqq' in fails(checkpoint, '--device=cpu', '--suite=lm', '--tasks=boolqq', script='eval.py', code=1)
    assert 'pip install matplotlib' in fails(checkpoint, '--device=cpu', '--suite=needle', script=str(tmp_path / 'without.py'))


def test_help_lists_knobs_and_nothing_else(checkpoint):
    shown, used = re.findall(r'^  --(\w+)=', evaluate(checkpoint, '--help').out, re.M), ' '.join(ev.SUITES.values()).split()
    others = 'checkpoint suite out overwrite plots seed device dtype batch_size make_passkey kinds arms compile lengths batches'.split()
    assert len(shown) == len(set(shown)) and set(shown) == {*used, *others}
