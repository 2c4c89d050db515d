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
adapter = lambda run: pytest.importorskip('lm_eval') and ev.lm_adapter(run.model, run.tokenizer)
lm = lambda run: pytest.importorskip('lm_eval') and ev.lm(run) and read(os.path.join(ev.out, 'lm_eval_results.json'))
requests = lambda *args: [SimpleNamespace(args=a) for a in args]
SPEED = ['--suite=speed', '--repetitions=2', '--lengths=32,64', '--batches=1,2', '--out=speed']
QUICK = ['--suite=longctx,needle', '--contexts=16,32', '--blocks=2', '--block_tokens=8', '--needle_lengths=150', '--needle_seeds=2']


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


def unigram(weights):
    """A model with the same distribution whatever came before."""
    log_weights = torch.tensor(np.log(np.array(weights) / np.sum(weights)))
    return SimpleNamespace(embedding=lambda idx: idx.unsqueeze(-1), logits=lambda h: log_weights.expand(len(h), -1),
                           hidden=lambda x, state: (torch.zeros(*x.shape[:2], 1), state))


def test_known_scores_of_a_unigram_model(gpt2, shared, knobs, capsys):
    """Through the adapter, lm-eval and the local files: to all digits of ../shared/data/README.md."""
    with open(shared('text', 'tinyshakespeare.txt')) as file:
        counts = np.bincount(gpt2.encode(file.read()), minlength=gpt2.vocab_size) + 1
    kinds, names = np.unique(counts, return_inverse=True)  # an add-one model wants to know no more of a token than its count
    tokenizer = SimpleNamespace(name='gpt2', eot=len(kinds), encode=lambda text: names[gpt2.encode(text)].tolist())
    knobs(task_data=shared('lm_eval'), batch_size=64)
    found = lm(SimpleNamespace(model=unigram([*kinds, counts.sum() - kinds.sum()]), tokenizer=tokenizer))
    assert found['config']['left_out'] == ['hellaswag'] and 'hellaswag*.jsonl' in capsys.readouterr().out
    results, majority = found['results'], {row['task']: row.get('majority') for row in found['table']}
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
        eot_token_id, tok_encode = eot, lambda self, text, **kwargs: encode(text)

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

        def generate_until(self, asked):
            ids = [torch.tensor([encode(request.args[0])[-(longest - 256):]]) for request in asked]
            texts = [run.tokenizer.decode(run.model.generate(i, 256, temperature=0)[0, i.shape[1]:].tolist()) for i in ids]
            return [re.split(r'[\n.,]|<\|endoftext\|>', text)[0] for text in texts]
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
    def made(some=prompts, size=16, **options):
        knobs(batch_size=size)
        return adapter(tiny).generate_until(requests(*((text, {'max_new_tokens': 12, **options}) for text in some)))

    def own(some=prompts, **options):
        ids = [torch.tensor([tiny.tokenizer.encode(text) or [256]]) for text in some]
        tokens = (takewhile(lambda t: t != 256, map(int, tiny.model.stream(idx, 12, **options))) for idx in ids)
        return [tiny.tokenizer.decode([*row]) for row in tokens]
    greedy = made()
    stop = next(text for text in greedy if len(text) > 4)[3]
    assert greedy == own(temperature=0) == made(until=['']) == made(until=None) == made(temperature=2.0, top_k=1)
    assert greedy == made(do_sample=False, temperature=0.7) and made(max_gen_toks=0) == [''] * len(prompts)
    assert made(until=stop) == [text.split(stop)[0] for text in greedy]
    for options in ({'temperature': 1.0}, {'temperature': 3.0, 'top_p': 0.9}, {'temperature': 2.0, 'top_k': 3}):
        draws = made(['x'] * 6, 1, **options)
        assert len(set(draws)) > 3 and draws == own(['x'] * 6, **options, generator=torch.manual_seed(ev.seed))
        assert draws == made(['x'] * 6, 4, do_sample=True, **options)
    knobs(max_length=16)
    assert made(['x' * 9 + 'class']) == made(['lass']) and made(['class'], do_sample=True) != made(['class'])
    with pytest.raises(ValueError, match='max_length=16'):
        made(max_gen_toks=16)


@pytest.mark.parametrize('pattern, name', [('A', 'bytes'), ('SSSL', 'gpt2')])
def test_tasks_are_those_of_a_plain_adapter(pattern, name, gpt2, shared, knobs, tmp_path, monkeypatch):
    """The six of the paper, and one that generates, which gets two of three answers right."""
    run = small(pattern, 261 if name == 'bytes' else 50257, name)
    knobs(task_data=str(tmp_path), limit=3, max_length=300, tasks=KNOBS['tasks'] + ',triviaqa')
    said = straight(run).generate_until(requests(*((f'Question: {i}?\nAnswer:',) for i in range(2)))) + ['another']
    for file in os.listdir(shared('lm_eval')):
        os.symlink(os.path.abspath(shared('lm_eval', file)), tmp_path / file)
    (tmp_path / 'hellaswag.jsonl').write_text(json.dumps({
        'activity_label': 'Cooking', 'ctx_a': 'A man cuts bread.', 'ctx_b': 'he', 'label': '2', 'ind': 0,
        'endings': ['eats it [step] now.', 'runs.', 'puts it on a plate.', 'sleeps.']}))
    (tmp_path / 'triviaqa.jsonl').write_text('\n'.join(
        json.dumps({'question': f'{i}', 'answer': {'aliases': [text.strip()]}}) for i, text in enumerate(said)))
    found = lm(run)['results']
    monkeypatch.setattr(ev, 'lm_adapter', lambda *args: straight(run))
    for task, key, value in [(task, *score) for task, scores in lm(run)['results'].items() for score in scores.items()]:
        assert math.isclose(found[task][key], value, rel_tol=0.02 if 'perplexity' in key else 1e-4), (task, key)
    assert set(found) == {*ev.FIELDS, 'triviaqa'} and list(found['triviaqa'].values()) == [2 / 3]


def test_longctx_reads_exactly_the_context(tiny, knobs, tmp_path):
    text = 'é' + ''.join(chr(97 + i * i % 26) for i in range(1998)) + 'é'  # the last target block has 40 bytes, but 39 signs
    (tmp_path / 'text.txt').write_text(text)
    knobs(text_file=str(tmp_path / 'text.txt'), contexts='2,16,100,700', blocks=6, block_tokens=40, batch_size=4, plots=True)
    ev.longctx(tiny)
    table, tokens = read(tmp_path / 'longctx_bpb.csv'), list(text.encode())
    for row in table:
        c, bits = int(row['context_tokens']), 0
        for s in np.linspace(700, len(tokens) - 40, 6).astype(int):
            ids = torch.tensor(tokens[s - c:s + 40])[None]
            bits += tiny.model(ids[:, :-1], ids[:, 1:], reduction='none')[1][0, -40:].sum().item() / math.log(2)
        assert math.isclose(float(row['bpb']), bits / 240, rel_tol=1e-4) and row['beyond_training'] == str(c > 64)
        assert float(row['bpb_low']) <= float(row['bpb']) <= float(row['bpb_high'])
    assert float(table[1]['change']) == 0 == float(table[1]['change_low']) and (tmp_path / 'longctx_bpb.png').stat().st_size > 5000


def test_needle_sees_success_and_failure(knobs, tmp_path):
    """A model that looks the key up in the first 140 bytes finds what stands there; without the needle, none."""
    def prefill(idx):
        text = bytes(idx[0].tolist()).decode()
        return None, f' {text.split("The pass key is ")[1][:5]}' if 'Remember' in text[:140] else ' 0 0 0'
    oracle = SimpleNamespace(prefill=prefill, embedding=lambda idx: idx, logits=lambda h: h, hidden=lambda x, key: (
        torch.nn.functional.one_hot(torch.tensor([[*key.encode()]]), 261) * 50.0, key))
    knobs(needle_lengths='150,260', needle_depths='0,0.5,1', needle_seeds=5, plots=True)
    table = ev.needle(SimpleNamespace(model=oracle, tokenizer=get_tokenizer('bytes'), block_size=200))['table']
    assert [[*row.values()][2:] for row in table] == [[0, 1, 1, 1], [0, 1, 1, 0]]  # control, depths
    cells = json.loads((tmp_path / 'needle_heatmap.json').read_text())['cells']
    assert len(cells) == 6 and all(c['log_prob'] > -1e-3 and c['bits_told'] > 50 for c in cells[:-1])
    assert (tmp_path / 'needle_heatmap.png').stat().st_size > 5000


def test_make_passkey(tmp_path):
    evaluate(tmp_path, '--make_passkey=data/passkey')
    tokens = np.fromfile(tmp_path / 'data' / 'passkey' / 'val.bin', np.uint16)
    for document in get_tokenizer('bytes').decode(tokens).split('<|endoftext|>')[1:-1]:
        keys = set(re.findall(r' (\d{5})', document))
        assert 128 <= len(document) < 512 and len(keys) <= 1 and (len(document) < 256 or ev._NEEDLE.format(*keys) in document)


def test_speed_keeps_finished_cells_whatever_commands_they_are_of(checkpoint):
    evaluate(checkpoint, *SPEED, '--plots=False')
    folder, first = checkpoint / 'speed', read(checkpoint / 'speed' / 'meta.json')['speed']
    throughput, wall, vram = (read(folder / f'{name}.csv') for name in ('throughput', 'wallclock', 'vram'))
    assert len(throughput) == len(wall) == len(vram) == 3 * 2 * 2 * 2 and {row['status'] for row in wall} == {'ok'}
    assert all(float(row['times_as_long']) == 1 for row in wall if row['arm'] == 'FELA')
    held = {(row['arm'], row['length'], row['batch']): int(row['held_bytes']) for row in vram if row['kind'] == 'decode'}
    assert held['A', '64', '2'] == 2 * 2 * 64 * 32 * 4 * 4 and held['FELA', '64', '1'] == held['FELA', '32', '1']
    assert all((row['floor_seconds'] != '') == (row['kind'] == 'decode') for row in throughput)
    (folder / 'meta.json').write_text(json.dumps({'speed': first | {'cells': first['cells'][:-2]}}))  # interrupted
    evaluate(checkpoint, *SPEED)
    evaluate(checkpoint, *SPEED, '--kinds=recompute,decode', '--lengths=64', '--batches=2')
    now = read(folder / 'meta.json')['speed']
    old, commands = [cell for cell in now['cells'] if cell['kind'] != 'recompute'], now['command'].splitlines()
    assert old[:-2] == first['cells'][:-2] and old[-1]['seconds'] != first['cells'][-1]['seconds']
    assert len(now['table']) == 26 and len(commands) == 3 and commands[2] in (folder / 'README.md').read_text()
    assert os.path.getsize(folder / 'speed.png') > 5000 and len(os.listdir(folder)) == 6


def test_speed_without_a_checkpoint_and_what_does_not_fit(tmp_path, knobs, monkeypatch):
    (tmp_path / 'mine.py').write_text('n_layer, n_head, n_embd, n_modes = 2, 2, 16, 8\npattern = "SL"\n')
    knobs(model_config=str(tmp_path / 'mine.py'), vocab_size=100, kinds='prefill,decode', lengths='16,64', compile='on', plots=True)
    compiled = []
    def call(cell, shape, real=ev.speed_call):
        now, fits = (cell['kind'], cell['arm'], cell['length']), [True]
        if now[:2] == ('prefill', 'A') or now[::2] == ('prefill', 16):
            raise RuntimeError("can't allocate memory") if cell['length'] == 64 else ValueError('a\nb')
        return (lambda: fits.pop() if fits else torch.empty(1 << 60)) if now == ('decode', 'FELA', 64) else real(cell, shape)
    knobs(speed_call=call, timed=lambda call: (call(), 1.6)[1])
    monkeypatch.setattr(FELA, 'compile_blocks', lambda self: compiled.append(self))
    *_, result = ev.speed(None, [])
    rows = [' '.join(row[key] for key in 'kind arm length status tokens_per_second'.split()) for row in read(tmp_path / 'throughput.csv')]
    assert rows == ['decode FELA 16 ok 10.0', 'decode A 16 ok 10.0', 'decode FELA 64 out of memory ', 'decode A 64 ok 10.0',
                    'prefill FELA 16 ValueError: a b ', 'prefill A 16 ValueError: a b ', 'prefill FELA 64 ok 40.0', 'prefill A 64 out of memory ']
    assert 'times_as_long' not in result['cells'][3] and len(compiled) == 4


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
    loss, shares = run.model(ids[:, :-1], ids[:, 1:].contiguous())[1].item(), [row['committed'] for row in table]
    assert math.isclose(table[4]['lens_bits_per_token'], loss / math.log(2), rel_tol=1e-4)
    assert shares == sorted(shares) and shares[-1] == 1 and os.path.getsize(tmp_path / 'interpret.png') > 5000


def test_finished_suites_stay_and_the_page_shows_all(checkpoint):
    evaluate(checkpoint, *QUICK, '--out=results')
    folder, stamp = checkpoint / 'results', (checkpoint / 'results' / 'longctx_bpb.csv').stat().st_mtime_ns
    assert evaluate(checkpoint, *QUICK, '--needle_seeds=3', '--out=results').out.count('done before') == 1
    run = Run(checkpoint, 'eval.py', ['--device=cpu', '--dtype=float32', *QUICK, '--out=cut', '--needle_seeds=100000'])
    run.until('-- needle').kill(signal.SIGINT).wait()
    assert run.code == 130 and run.err.splitlines()[-1].startswith('error: interrupted') and 'Traceback' not in run.err
    assert evaluate(checkpoint, *QUICK, '--out=cut').out.count('done before') == 1
    assert (folder / 'longctx_bpb.csv').stat().st_mtime_ns == stamp
    page, meta = (folder / 'README.md').read_text(), read(folder / 'meta.json')
    assert '## longctx' in page and '![needle_heatmap.png](needle_heatmap.png)' in page and '--needle_seeds=3' in page
    assert str(checkpoint) not in page and len(meta['needle']['source'].split('sha256 ')[1]) == 64


def test_bad_input_is_one_line_and_a_folder_that_holds_something_else_is_left_alone(checkpoint):
    (checkpoint / 'other').mkdir()
    for body in ('mine', 'no JSON', '[]', '{"longctx": 3}', '{"longctx": {}}', '{"needle": {"key": 1, "table": []}}'):
        path = checkpoint / 'other' / ('README.md' if body == 'mine' else 'meta.json')
        path.write_text(body)
        assert 'holds something else' in fails(checkpoint, '--device=cpu', *QUICK, '--out=other', script='eval.py')
        assert path.read_text() == body
    for name, body in (('latin.txt', 'é'.encode('latin-1') * 9), ('short.txt', b'short ' * 100), ('piqa.jsonl', b'[1]\nno\n'),
                       ('boolq.jsonl', b'{"passage": "a", "question": "b", "label": 0}\n{"passage": "a", "label": 0}\n'),
                       ('without.py', b'import runpy, sys\nsys.modules["matplotlib"] = None\n'
                                      b'runpy.run_path(sys.path[0] + "/eval.py", run_name="__main__")')):
        (checkpoint / name).write_bytes(body)
    for args, *words in (('longctxx', 'longctxx', 'interpret'), ('needle --checkpoint=out2', 'out2'), ('speed --arms=FELA,B', 'FELA,B'),
                         ('longctx --text_file=short.txt --contexts=64,512 --blocks=2', '600 tokens', '--contexts=64'),
                         ('longctx --text_file=latin.txt', 'latin.txt', 'UTF-8'), ('speed --lengths=64,0', 'lengths', '64,0', '1'),
                         ('needle --haystack=nothere.txt', 'nothere.txt'), ('needle --needle_depths=2', 'depths'),
                         ('lm --task_data=nowhere', 'nowhere', 'no file there'), ('lm --tasks=piqa --task_data=.', 'line 1', 'piqa.jsonl'),
                         ('lm --tasks=boolq --task_data=.', 'line 2', "'question'")):
        line = fails(checkpoint, '--device=cpu', '--out=bad', *f'--suite={args}'.split(), script='eval.py')
        assert all(word in line for word in words), line
    assert 'boolqq' in fails(checkpoint, '--device=cpu', '--suite=lm', '--tasks=boolqq', script='eval.py', code=1)
    assert 'pip install matplotlib' in fails(checkpoint, '--device=cpu', '--suite=needle', script=str(checkpoint / 'without.py'))


def test_help_lists_knobs_and_nothing_else(checkpoint):
    shown, used = re.findall(r'^  --(\w+)=', evaluate(checkpoint, '--help').out, re.M), ' '.join(ev.SUITES.values()).split()
    others = 'suite checkpoint out overwrite plots seed device dtype batch_size make_passkey kinds arms compile lengths batches'
    assert len(shown) == len(set(shown)) and set(shown) == {*used, *others.split()}
