"""eval.py: known scores to the last digit, the same targets at every context, finished cells that stay finished."""
import csv
import json
import math
import os
import re
import shutil
import signal
import types

import numpy as np
import pytest
import torch

import eval as ev
from model import FELA, FELAConfig, save_checkpoint
from prepare import ByteTokenizer, get_tokenizer, load_meta
from runs import REPO, Run, fails, make_data

SHARED = os.path.join(REPO, '..', 'shared', 'data')
needs_data = pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, 'lm_eval')), reason='no ../shared/data here')


@pytest.fixture(autouse=True)
def knobs(monkeypatch, tmp_path):
    """Every test starts from the defaults on a CPU."""
    for key, value in (ev.KNOBS | {'device': 'cpu', 'dtype': 'float32', 'plots': False, 'out': str(tmp_path)}).items():
        monkeypatch.setattr(ev, key, value)
    return lambda **values: [monkeypatch.setattr(ev, key, value) for key, value in values.items()]


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    config = FELAConfig(vocab_size=261, n_layer=4, n_head=2, n_embd=32, n_modes=16, pattern='SSSL')
    model = FELA(config).requires_grad_(False)
    for block in model.blocks:  # logits that matter
        block.mixer.output.weight.mul_(20)
    model.embedding.weight.mul_(20)
    return types.SimpleNamespace(model=model.eval(), tokenizer=get_tokenizer('bytes'), block_size=64)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory, tiny):
    """A folder with data and a checkpoint in out/, as train.py leaves them."""
    folder = tmp_path_factory.mktemp('run')
    data = make_data(folder)
    config = {f: getattr(tiny.model.config, f) for f in tiny.model.config.__dataclass_fields__} | {
        'tokenizer': 'bytes', 'block_size': 64, 'dataset': data,
        'data_sha256': load_meta(data)['splits']['train']['sha256']}
    (folder / 'out').mkdir()
    state = {'model': tiny.model.state_dict(), 'optimizer': [], 'config': config, 'training': {}}
    save_checkpoint(str(folder / 'out'), 1, state, {'config': config, 'losses': {}}, final=True)
    return folder


def evaluate(folder, *args, code=0):
    run = Run(folder, 'eval.py', ['--device=cpu', *args], env={'HF_HOME': str(folder / 'hf')}).wait()
    assert run.code == code, (run.out, run.err)
    return run


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------- scoring


def test_score_is_the_forward_pass_whatever_the_split(tiny):
    idx = torch.randint(256, (3, 70), generator=torch.Generator().manual_seed(1))
    targets = torch.roll(idx, -1, 1)
    targets[1, 5:40] = -1
    logits = tiny.model(idx)[0].double().log_softmax(-1)
    expected = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets >= 0)
    whole, greedy, _ = ev.score(tiny.model, idx, targets)
    assert torch.allclose(whole.double(), expected, atol=1e-4)
    assert torch.equal(greedy, (logits.argmax(-1) == targets) & (targets >= 0))
    first, _, state = ev.score(tiny.model, idx[:, :33], targets[:, :33])
    second, _, _ = ev.score(tiny.model, idx[:, 33:], targets[:, 33:], state)
    assert torch.allclose(torch.cat((first, second), 1), whole, atol=1e-4)


class Unigram:
    """The same distribution whatever came before."""
    attention = False

    def __init__(self, weights):
        self.log_weights = torch.tensor(np.log(np.array(weights) / np.sum(weights)))

    def init_state(self, batch_size):
        return []

    def embedding(self, idx):
        return idx.unsqueeze(-1)

    def hidden(self, x, state):
        return torch.zeros(*x.shape[:2], 1), state

    def logits(self, h):
        return self.log_weights.expand(len(h), -1)


class Renamed:
    """GPT-2's tokens under the names of their counts in a text: all that an add-one model wants to know of them."""
    name = 'gpt2'

    def __init__(self, tokenizer, text):
        self.tokenizer, counts = tokenizer, np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size) + 1
        kinds, self.names = np.unique(counts, return_inverse=True)
        self.weights = [*kinds, counts.sum() - kinds.sum()]  # one token of each count, and all others together
        self.eot = len(kinds)

    def encode(self, text):
        return self.names[self.tokenizer.encode(text)].tolist()


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    pytest.importorskip('tiktoken')
    if not os.path.isdir(os.path.join(SHARED, 'tokenizer')):
        pytest.skip('no ../shared/data here')
    folder = tmp_path_factory.mktemp('tiktoken')
    for name, digest in (('vocab.bpe', '6d1cbeee0f20b3d9449abfede4726ed8212e3aee'),
                         ('encoder.json', '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6')):
        shutil.copy(os.path.join(SHARED, 'tokenizer', name), folder / digest)
    before = os.environ.get('TIKTOKEN_CACHE_DIR')
    os.environ['TIKTOKEN_CACHE_DIR'] = str(folder)
    yield get_tokenizer('gpt2')
    os.environ.pop('TIKTOKEN_CACHE_DIR') if before is None else os.environ.update(TIKTOKEN_CACHE_DIR=before)


@needs_data
def test_known_scores_of_a_unigram_model(gpt2, knobs, monkeypatch, tmp_path, capsys):
    """Through the adapter, lm-eval and the local files: to all digits of ../shared/data/README.md."""
    pytest.importorskip('lm_eval')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    with open(os.path.join(SHARED, 'text', 'tinyshakespeare.txt')) as file:
        tokenizer = Renamed(gpt2, file.read())
    knobs(task_data=os.path.join(SHARED, 'lm_eval'), batch_size=64)
    results, left_out = ev.run_lm(Unigram(tokenizer.weights), tokenizer, ev.tasks.split(','))
    assert left_out == ['hellaswag'] and 'hellaswag*.jsonl' in capsys.readouterr().out
    found = {task: {k: v for k, v in scores.items() if isinstance(v, float)} for task, scores in results.items()}
    assert round(found['wikitext']['word_perplexity'], 4) == 25415.2275
    assert round(found['wikitext']['bits_per_byte'], 5) == 2.73652
    assert {task: round(found[task]['acc'], 4) for task in ('arc_easy', 'boolq', 'piqa', 'winogrande')} == {
        'arc_easy': 0.2605, 'boolq': 0.3783, 'piqa': 0.5201, 'winogrande': 0.4957}
    assert [round(found[task]['acc_norm'], 4) for task in ('piqa', 'arc_easy')] == [0.5016, 0.2609]
    assert round(found['boolq']['majority'], 3) == 0.622


# --------------------------------------------------------------------------------------------------------- the adapter


def requests(*args):
    return [types.SimpleNamespace(args=a) for a in args]


def adapter(tiny, knobs, **values):
    pytest.importorskip('lm_eval')
    knobs(**values)
    return ev.lm_adapter(tiny.model, tiny.tokenizer)


def test_batch_of_1_is_batch_of_16(tiny, knobs):
    text = 'It was the best of times, it was the worst of times. ' * 3
    asked = requests(*((text[:n], text[n:n + 1 + n % 7]) for n in range(1, 120, 5)), ('', 'abc'), ('a ', 'b'))
    many = adapter(tiny, knobs, batch_size=16).loglikelihood(asked)
    one = adapter(tiny, knobs, batch_size=1).loglikelihood(asked)
    assert [g for _, g in one] == [g for _, g in many]
    assert np.allclose([v for v, _ in one], [v for v, _ in many], atol=1e-3)
    for request, (value, _) in zip(asked, one):  # and each is the forward pass
        ids = [256 if not request.args[0] else None] + tiny.tokenizer.encode(''.join(request.args))
        ids = torch.tensor([[t for t in ids if t is not None]])
        context = request.args[0]
        n = len(request.args[1]) + len(context) - len(context.rstrip())  # lm-eval moves last spaces
        losses = tiny.model(ids[:, :-1], ids[:, 1:], reduction='none')[1]
        assert math.isclose(value, -losses[0, -n:].sum(), abs_tol=1e-3)


def test_rolling_is_carrying_the_state(tiny, knobs):
    text = 'All happy families are alike. ' * 20
    ids = torch.tensor([[256, *tiny.tokenizer.encode(text)]])
    expected = -tiny.model(ids[:, :-1], ids[:, 1:], reduction='none')[1].double().sum().item()
    for longest in (0, 2048, len(text)):
        (value,) = adapter(tiny, knobs, max_length=longest).loglikelihood_rolling(requests((text,)))
        assert math.isclose(value, expected, rel_tol=1e-5)
    (windows,) = adapter(tiny, knobs, max_length=100).loglikelihood_rolling(requests((text,)))
    by_hand = 0
    for start in range(0, len(text), 100):
        part = ids[:, start:start + 101]
        by_hand -= tiny.model(part[:, :-1], part[:, 1:], reduction='none')[1].double().sum().item()
    assert math.isclose(windows, by_hand, rel_tol=1e-5) and not math.isclose(windows, expected, rel_tol=1e-5)


def test_max_length_cuts_the_context_not_the_continuation(tiny, knobs):
    lm = adapter(tiny, knobs, max_length=20)
    (cut, _), (short, _), (long, _) = lm.loglikelihood(requests(('x' * 50 + 'abcdefghijklmnop', 'yes'),
                                                                ('xxabcdefghijklmnop', 'yes'), ('a', 'b' * 40)))
    assert math.isclose(cut, short, abs_tol=1e-4) and math.isfinite(long)


def test_generate_until(tiny, knobs):
    prompts = ['def f(', 'class', 'x = 1\nfor i in', 'é']
    free = [(text, {'until': [], 'max_gen_toks': 12}) for text in prompts]
    many = adapter(tiny, knobs, batch_size=16).generate_until(requests(*free))
    one = adapter(tiny, knobs, batch_size=1).generate_until(requests(*free))
    assert many == one
    for text, made in zip(prompts, many):  # greedy, by the model's own generator
        ids = torch.tensor([tiny.tokenizer.encode(text)])
        expected = [t.item() for t in tiny.model.generate(ids, 12, temperature=0)]
        expected = expected[:expected.index(256)] if 256 in expected else expected
        assert made == tiny.tokenizer.decode(expected)
    stop = next(text for text in many if len(text) > 4)[3]
    asked = requests(*((text, {'until': stop, 'max_gen_toks': 12}) for text in prompts))
    assert adapter(tiny, knobs).generate_until(asked) == [text.split(stop)[0] for text in many]


# ------------------------------------------------------------------------------------------------------------- longctx


def test_longctx_reads_exactly_the_context(checkpoint, tiny):
    run = evaluate(checkpoint, '--suite=longctx', '--contexts=1,16,100,700', '--blocks=6', '--block_tokens=40',
                   '--batch_size=4', '--out=long')
    table = rows(checkpoint / 'long' / 'longctx_bpb.csv')
    assert [row['beyond_training'] for row in table] == ['False', 'False', 'True', 'True']
    tokens = np.fromfile(os.path.join(checkpoint, 'data', 'mini', 'val.bin'), np.uint16).astype(np.int64)
    starts = np.linspace(700, len(tokens) - 40, 6).astype(int)
    for row in table:
        c, bits, size = int(row['context_tokens']), 0, 0
        for s in starts:
            ids = torch.tensor(tokens[s - c:s + 40])[None]
            losses = tiny.model(ids[:, :-1], ids[:, 1:], reduction='none')[1][0, -40:]
            bits += losses.double().sum().item() / math.log(2)
            size += int((tokens[s:s + 40] < 256).sum())
        assert math.isclose(float(row['bpb']), bits / size, rel_tol=1e-4)
        assert float(row['bpb_low']) <= float(row['bpb']) <= float(row['bpb_high'])
    assert float(table[1]['change_from_16']) == 0 == float(table[1]['change_low'])
    assert (checkpoint / 'long' / 'longctx_bpb.png').stat().st_size > 5000 and 'paper' in run.out


@pytest.mark.parametrize('pattern', ['SL', 'A'])
def test_longctx_of_either_arm(pattern, knobs, tmp_path):
    (tmp_path / 'text.txt').write_text('one two three four ' * 60)
    knobs(text_file=str(tmp_path / 'text.txt'), contexts='10,20', blocks=4, block_tokens=50)
    model = FELA(FELAConfig(vocab_size=257, n_layer=2, n_head=2, n_embd=16, n_modes=8, pattern=pattern))
    result = ev.longctx(types.SimpleNamespace(model=model, tokenizer=ByteTokenizer(), block_size=10))
    assert len(result['table']) == 2 and ('KV cache' in result['protocol']) == (pattern == 'A')


def test_longctx_of_a_text_in_gpt2_tokens_counts_bytes(gpt2, knobs, tmp_path):
    (tmp_path / 'text.txt').write_text('Größe: naïve café — ünïcödé. ' * 60)
    model = Unigram(np.ones(gpt2.vocab_size))
    model.prefill = lambda idx, state=None: (None, [])
    knobs(text_file=str(tmp_path / 'text.txt'), contexts='10,20', blocks=4, block_tokens=50)
    result = ev.longctx(types.SimpleNamespace(model=model, tokenizer=gpt2, block_size=10))
    ids = np.array(gpt2.encode((tmp_path / 'text.txt').read_text()))
    starts = np.linspace(20, len(ids) - 50, 4).astype(int)
    size = sum(len(gpt2.decode_bytes(ids[s:s + 50])) for s in starts)
    assert math.isclose(result['table'][0]['bpb'], 200 * math.log2(gpt2.vocab_size) / size, rel_tol=1e-6)


# -------------------------------------------------------------------------------------------------------------- needle


def test_passkey_prompts(tiny):
    tok, hay = tiny.tokenizer, np.arange(97, 123)
    for depth, n in ((0, 300), (0.3, 300), (1, 200)):
        prompt, answer = ev.passkey_prompt(tok, hay, n, depth, np.random.default_rng(5))
        text, key = tok.decode(prompt), tok.decode(answer)
        assert len(prompt) == n and text.endswith(ev.QUESTION) and text.count(key.strip()) == 2 and len(key) == 6
        at = text.index('The pass key')
        assert at == round(depth * (n - len(ev.NEEDLE.format(12345)) - len(ev.QUESTION)))
        control, same = ev.passkey_prompt(tok, hay, n, depth, np.random.default_rng(5), needle=False)
        assert same == answer and len(control) == n and key.strip() not in tok.decode(control)


def test_needle_sees_success_and_failure(tiny, knobs):
    """A model that looks the key up in its prompt finds all; without the needle, none."""
    class Oracle:
        def prefill(self, idx, state=None):
            texts = [tiny.tokenizer.decode(row) for row in idx.tolist()]
            return None, [f' {t.split("The pass key is ")[1][:5]}' if 'Remember' in t else ' 0 0 0' for t in texts]

        def embedding(self, idx):
            return idx

        def hidden(self, x, state):
            ids = torch.tensor([tiny.tokenizer.encode(key) for key in state])
            return torch.nn.functional.one_hot(ids, 261) * 50.0, state

        def logits(self, h):
            return h
    run = types.SimpleNamespace(model=Oracle(), tokenizer=tiny.tokenizer, block_size=200)
    knobs(needle_lengths='150,260', needle_depths='0,0.5,1', needle_seeds=5, plots=True)
    result = ev.needle(run)
    assert [row['found (%)'] for row in result['table']] == [100, 100]
    assert [row['found without needle (%)'] for row in result['table']] == [0, 0]
    with open(os.path.join(ev.out, 'needle_heatmap.json')) as file:
        cells = json.load(file)['cells']
    assert len(cells) == 6 and all(c['log_prob'] > -1e-3 and c['control_log_prob'] < -50 for c in cells)
    assert os.path.getsize(os.path.join(ev.out, 'needle_heatmap.png')) > 5000


def test_make_passkey(tmp_path):
    pytest.importorskip('datasets')  # which prepare.py reads jsonl with
    evaluate(tmp_path, '--make_passkey=data/passkey')
    meta = load_meta(str(tmp_path / 'data' / 'passkey'))
    tokens = np.fromfile(tmp_path / 'data' / 'passkey' / 'val.bin', np.uint16)
    sizes = np.diff(np.flatnonzero(tokens == 256)) - 1
    assert meta['tokenizer'] == 'bytes' and sizes.min() >= 128 and 400 < sizes.max() < 512
    for document in get_tokenizer('bytes').decode(tokens).split('<|endoftext|>')[1:-1]:
        keys = re.findall(r' (\d{5})', document)
        assert len(set(keys)) <= 1 and (len(document) < 256 or ev.NEEDLE.format(keys[0]) in document)


# --------------------------------------------------------------------------------------------------------------- speed

QUICK = ['--suite=speed', '--repetitions=2', '--out=speed']


def test_speed_keeps_finished_cells_and_draws_them_again(checkpoint):
    args = [*QUICK, '--kinds=train,prefill,decode', '--lengths=32,64', '--batch_tokens=0,128', '--positions=1,300',
            '--decode_batches=2', '--arms=FELA,A,A-math,A-recompute', '--measure_memory=False', '--plots=False']
    assert 'cells that are left' in evaluate(checkpoint, *args, '--max_minutes=1e-9').out
    assert not (checkpoint / 'speed' / 'throughput.csv').exists()
    evaluate(checkpoint, *args)
    folder = checkpoint / 'speed'
    throughput, decode, wall = (rows(folder / f'{name}.csv') for name in ('throughput', 'decode', 'wallclock'))
    assert len(throughput) == 2 * 4 * 3 and len(decode) == 2 * 3 and len(wall) == 2 * 4 * 2
    assert {row['status'] for row in throughput + decode} == {'ok'}
    assert {row['repetitions'] for row in throughput + decode} == {'2'}
    with open(folder / 'meta.json') as file:
        meta = json.load(file)['speed']
    assert {'hardware', 'torch', 'commit', 'sdpa_backend', 'ceilings', 'protocol', 'seed', 'compile'} <= meta.keys()
    before = (folder / 'cells.jsonl').read_text()
    with open(folder / 'cells.jsonl', 'w') as file:  # as a power cut may leave it
        file.writelines(before.splitlines(True)[:-2] + ['{"kind": "dec'])
    evaluate(checkpoint, *args)
    cells = [json.loads(line) for line in (folder / 'cells.jsonl').read_text().splitlines()]
    before = [json.loads(line) for line in before.splitlines()]
    assert cells[:-2] == before[:-2] and len(cells) == len(before)
    evaluate(checkpoint, '--suite=speed', '--kinds=', '--out=speed', '--model_config=config/anything.py')
    assert all((folder / f'{name}.png').stat().st_size > 5000 for name in ('throughput', 'wallclock', 'decode'))


def test_speed_without_a_checkpoint_and_what_does_not_fit(tmp_path, knobs, monkeypatch):
    (tmp_path / 'mine.py').write_text('n_layer, n_head, n_embd, n_modes = 2, 2, 16, 8\npattern = "SL"\n')
    knobs(model_config=str(tmp_path / 'mine.py'), vocab_size=100, kinds='prefill', lengths='16,64', repetitions=1,
          measure_memory=False)

    def call(kind, arm, *rest, real=ev.speed_call):
        if arm == 'A' and rest[1] == 64:
            raise RuntimeError('DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 1 byte')
        if arm == 'A':
            raise ValueError('something\nelse')
        return real(kind, arm, *rest)
    monkeypatch.setattr(ev, 'speed_call', call)
    ev.speed()
    found = {(row['arm'], row['length']): row['status'] for row in rows(tmp_path / 'throughput.csv')}
    assert found == {('FELA', '16'): 'ok', ('FELA', '64'): 'ok', ('A', '64'): 'oom',
                     ('A', '16'): 'failed: ValueError: something else'}


def test_math_is_not_compiled(tmp_path, knobs):
    (tmp_path / 'mine.py').write_text('n_layer, n_head, n_embd, n_modes = 1, 2, 16, 8\n')
    knobs(model_config=str(tmp_path / 'mine.py'), vocab_size=100, kinds='prefill', lengths='16', compile='on', arms='A-math')
    ev.speed()
    (row,) = rows(tmp_path / 'throughput.csv')
    assert row['status'].startswith('skipped: compiled')


def test_memory_of_a_process_of_its_own(tmp_path, knobs):
    (tmp_path / 'mine.py').write_text('n_layer, n_head, n_embd, n_modes = 2, 2, 64, 8\npattern = "SL"\n')
    knobs(model_config=str(tmp_path / 'mine.py'), vocab_size=100, kinds='train', lengths='4096', repetitions=1,
          arms='FELA')
    (alone,) = ev.speed()['table']
    assert alone['FELA'] > 0 and alone['attention'] is None
    (row,) = rows(tmp_path / 'vram.csv')
    assert row['status'] == 'ok' and 2e6 < float(row['above_bytes']) < 1e9


def test_decode_bytes(tiny):
    c = tiny.model.config
    weights, state = ev.decode_bytes(tiny.model, 1000, 3)
    assert weights == sum(p.nbytes for n, p in tiny.model.named_parameters() if not n.endswith('taps'))
    assert state == 3 * (3 + 1) * c.n_modes * c.n_embd * 4 + 3 * 2 * c.n_embd * (c.n_embd // c.n_head) * 4


# ----------------------------------------------------------------------------------------------------------- interpret


def test_interpret_of_known_filters_and_gates(checkpoint, knobs):
    knobs(checkpoint=str(checkpoint / 'out'), plots=True)
    run = ev.load()
    with torch.no_grad():
        for layer, lag in ((0, 0), (1, 3)):  # a delay: flat spectrum, all energy at one lag
            mixer = run.model.blocks[layer].mixer
            mixer.direct.zero_()
            mixer.taps.zero_()
            mixer.taps[lag] = 1 / mixer.window[lag]
        gla = run.model.blocks[3].mixer
        gla.gate_up.weight.zero_()
        gla.gate_up.bias.fill_(torch.logit(torch.tensor(math.log(0.75) / gla.floor)))
    result = ev.interpret(run)
    with open(os.path.join(ev.out, 'interpret.json')) as file:
        found = json.load(file)
    assert [found['filters'][i]['half_energy_lag_quartiles'][1] for i in '12'] == [0, 3]
    assert all(abs(found['filters'][i]['centroid_quartiles'][1] - 0.25) < 1e-3 for i in '12')
    assert abs(found['gates']['4']['mean'] - 0.75) < 1e-4
    assert np.allclose(found['gates']['4']['memory_by_head'], 4, rtol=1e-3)
    lens = found['logit_lens']
    assert abs(sum(lens['commit_share']) - 1) < 1e-6 and len(lens['bits_per_token']) == 5
    assert all(os.path.getsize(os.path.join(ev.out, name)) > 5000 for name in result['pictures'])


# ----------------------------------------------------------------------------------------------------------- the frame


def test_finished_suites_stay_and_the_page_shows_all(checkpoint):
    args = ['--suite=longctx,needle', '--contexts=16,32', '--blocks=2', '--block_tokens=8', '--needle_lengths=150',
            '--needle_seeds=2', '--needle_depths=0.5', '--out=results']
    evaluate(checkpoint, *args)
    folder = checkpoint / 'results'
    stamp = (folder / 'longctx_bpb.csv').stat().st_mtime_ns
    again = evaluate(checkpoint, *args, '--needle_seeds=3')
    assert again.out.count('done before') == 1 and (folder / 'longctx_bpb.csv').stat().st_mtime_ns == stamp
    run = Run(checkpoint, 'eval.py', ['--device=cpu', *args[:-1], '--out=cut', '--needle_seeds=100000'])
    run.until('-- needle').kill(signal.SIGINT).wait()
    assert run.code == 130 and run.err.splitlines()[-1].startswith('error: interrupted') and 'Traceback' not in run.err
    assert evaluate(checkpoint, *args[:-1], '--out=cut').out.count('done before') == 1
    page = (folder / 'README.md').read_text()
    assert '## longctx' in page and '## needle' in page and '![needle_heatmap.png](needle_heatmap.png)' in page
    assert '--needle_seeds=3' in page and str(checkpoint) not in page + (folder / 'meta.json').read_text()
    with open(folder / 'meta.json') as file:
        assert all(len(record['source'].split('sha256 ')[1]) == 64 for record in json.load(file).values())


@needs_data
def test_the_six_tasks_on_local_files(checkpoint, tmp_path):
    pytest.importorskip('lm_eval')
    for name in os.listdir(os.path.join(SHARED, 'lm_eval')):
        shutil.copy(os.path.join(SHARED, 'lm_eval', name), tmp_path / name)
    document = {'activity_label': 'Cooking', 'ctx_a': 'A man cuts bread.', 'ctx_b': 'he', 'label': '2',
                'endings': ['eats it [step] now.', 'runs.', 'puts it on a plate.', 'sleeps.']}
    (tmp_path / 'hellaswag.jsonl').write_text(''.join(json.dumps(document | {'ind': i}) + '\n' for i in range(3)))
    run = evaluate(checkpoint, '--suite=lm', '--limit=2', '--out=lm', f'--task_data={tmp_path}')
    with open(checkpoint / 'lm' / 'lm_eval_results.json') as file:
        found = json.load(file)
    assert set(found['results']) == set(ev.METRICS) and found['config']['max_length'] == 2048
    assert found['results']['hellaswag']['majority'] == 1 and 'acc_norm' in found['results']['hellaswag']
    assert 'GLA-340M' in run.out and 'majority class' in run.out and str(tmp_path) not in run.out


def test_bad_input_is_one_line(checkpoint, tmp_path, monkeypatch):
    def refused(*args):
        return fails(checkpoint, '--device=cpu', '--out=bad', *args, script='eval.py')
    (tmp_path / 'latin.txt').write_bytes('é'.encode('latin-1') * 9)
    (tmp_path / 'short.txt').write_text('short ' * 100)
    good = {'passage': 'a', 'question': 'b', 'label': 0}
    (tmp_path / 'boolq.jsonl').write_text(f'{json.dumps(good)}\n{{"passage": "a", "label": 0}}\n')
    (tmp_path / 'piqa.jsonl').write_text('[1]\nno\n')
    assert 'longctxx' in refused('--suite=longctxx') and 'interpret' in refused('--suite=longctxx')
    assert 'out2: no such checkpoint' in refused('--suite=needle', '--checkpoint=out2')
    line = refused('--suite=longctx', f'--text_file={tmp_path}/short.txt', '--contexts=64,128,512,1024', '--blocks=2')
    assert '600 tokens' in line and '--contexts=64 is possible' in line
    assert 'UTF-8' in refused('--suite=longctx', f'--text_file={tmp_path}/latin.txt')
    assert 'nothere.txt' in refused('--suite=needle', f'--haystack={tmp_path}/nothere.txt')
    assert "'x'" in refused('--suite=needle', '--needle_lengths=x') and 'depths' in refused(
        '--suite=needle', '--needle_depths=2')
    assert 'repetitions=0' in refused('--suite=speed', '--repetitions=0')
    assert "'B' is none of" in refused('--suite=speed', '--arms=FELA,B')
    assert 'did you mean contexts' in refused('--context=5')
    if ev.importlib.util.find_spec('lm_eval'):
        line = refused('--suite=lm', '--tasks=boolq', f'--task_data={tmp_path}')
        assert 'line 2' in line and "'question'" in line
        assert 'line 1' in refused('--suite=lm', '--tasks=piqa', f'--task_data={tmp_path}')
        assert 'boolqq' in (line := refused('--suite=lm', '--tasks=boolqq')) and 'boolq' in line
        assert 'no such folder' in refused('--suite=lm', '--task_data=nowhere')


def test_what_is_not_installed_has_its_install_line(knobs, monkeypatch, capsys):
    monkeypatch.setattr(ev.importlib.util, 'find_spec', lambda name: None)
    for values, line in (({'plots': True}, 'pip install matplotlib'), ({'plots': False}, 'pip install lm-eval')):
        knobs(**values)
        with pytest.raises(SystemExit) as e:
            ev.check()
        assert e.value.code == 2 and line in capsys.readouterr().err
