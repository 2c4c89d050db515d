"""Text in, tokens out and back: exact, each window once an epoch, never a dataset that looks finished and is not."""
import contextlib
import gzip
import json
import lzma
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, '..', 'shared', 'data')
sys.path.insert(0, ROOT)
import prepare  # noqa: E402
from prepare import (DataError, TokenData, compressed_bpb, ensure_pysrc, get_tokenizer, load_meta,  # noqa: E402
                     read_bytes)

relaxed = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
FINISHED = ['meta.json', 'train.bin', 'val.bin']


# ---- help
def start(*args, cwd, **options):
    env = {**os.environ, 'HF_HOME': str(cwd / 'hf'), 'HF_HUB_OFFLINE': '1', **options.pop('env', {})}
    return subprocess.Popen([sys.executable, os.path.join(ROOT, 'prepare.py'), *map(str, args)], cwd=cwd, env=env,
                            text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(*args, cwd, code=0, **options):
    """What prepare.py prints: all is well, or the one line that says what is not."""
    process = start(*args, cwd=cwd, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert (err == '') if code == 0 else (err.startswith('error: ') and err.count('\n') == 1), err
    return out if code == 0 else err


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def make(tmp_path, **knobs):
    return prepare.make({'out_dir': str(tmp_path / 'made'), **knobs}), str(tmp_path / 'made')


def by_hand(folder, train, val=(1, 2, 3), **fields):
    """A dataset of given tokens, as a foreign program might write it, with a sound checksum."""
    folder.mkdir(exist_ok=True)
    meta = {'tokenizer': 'bytes', 'vocab_size': 261, 'splits': {}}
    for split, ids in (('train', train), ('val', val)):
        data = np.array(ids, np.uint16).tobytes()
        (folder / f'{split}.bin').write_bytes(data)
        meta['splits'][split] = {'tokens': len(ids), 'bytes': len(ids),
                                 'sha256': prepare.hashlib.sha256(data).hexdigest()}
    meta.update(fields)
    (folder / 'meta.json').write_text(json.dumps({**meta, 'check': prepare._check(meta)}))
    return str(folder)


def listing(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def is_dataset(folder):
    with contextlib.suppress(DataError):
        return [TokenData(folder, split, 1) for split in ('train', 'val')]


@pytest.fixture(scope='session')
def vocabulary(tmp_path_factory):
    """GPT-2's tokenizer without a network: tiktoken reads its cache, and deletes what it doesn't like: a copy."""
    pytest.importorskip('tiktoken')
    source = os.path.join(SHARED, 'tokenizer')
    if not os.path.isdir(source):
        pytest.skip("GPT-2's vocabulary is not at hand (../shared/data/tokenizer)")
    cache = tmp_path_factory.mktemp('tiktoken')
    shutil.copyfile(os.path.join(source, 'vocab.bpe'), cache / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee')
    shutil.copyfile(os.path.join(source, 'encoder.json'), cache / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6')
    before = os.environ.get('TIKTOKEN_CACHE_DIR')
    os.environ['TIKTOKEN_CACHE_DIR'] = str(cache)
    yield get_tokenizer('gpt2')
    os.environ.pop('TIKTOKEN_CACHE_DIR')
    if before is not None:
        os.environ['TIKTOKEN_CACHE_DIR'] = before


@pytest.fixture(scope='session')
def pysrc(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('data') / 'pysrc')
    ensure_pysrc(folder)
    return folder


# ---- tokenizers
unicode_text = st.text(st.characters(exclude_categories=['Cs']))
spaces = st.text(st.sampled_from(' \n\t\r\x0b\x1c\x85\xa0\u1680\u2003\u2028\u3000ab1é漢.\'s'))


def check_text(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.encode_bytes(text.encode()) == ids
    assert tok.encode_array(text.encode()).tolist() == ids and tok.encode_array(text.encode()).dtype == np.uint16
    assert all(type(i) is int and 0 <= i < tok.vocab_size and i != tok.eot for i in ids)


def check_bytes(tok, data):
    assert tok.decode_bytes(tok.encode_bytes(data)) == data
    text = os.fsdecode(data)                                                   # as in argv: raw bytes as surrogates
    assert tok.decode_bytes(tok.encode(text)) == data


@relaxed
@given(text=unicode_text, data=st.binary())
def test_bytes_round_trip(text, data):
    check_text(get_tokenizer('bytes'), text)
    check_bytes(get_tokenizer('bytes'), data)


@relaxed
@given(text=st.one_of(unicode_text, spaces), data=st.binary())
def test_gpt2_round_trip(vocabulary, text, data):
    check_text(vocabulary, text)
    check_bytes(vocabulary, data)
    assert vocabulary.encode(text) == vocabulary.bpe.encode_ordinary(text)


@relaxed
@given(text=st.text(st.characters()))
def test_lone_surrogates(text):
    """Those of raw bytes give their bytes, any other becomes U+FFFD; nothing ever raises."""
    expected = ''.join('\ufffd' if '\ud800' <= c < '\udc80' or '\udcff' < c <= '\udfff' else c for c in text)
    assert get_tokenizer('bytes').decode_bytes(get_tokenizer('bytes').encode(text)) == os.fsencode(expected)


def test_specials(vocabulary):
    for tok in (get_tokenizer('bytes'), vocabulary):
        assert tok.eot not in tok.encode('<|endoftext|>') and tok.decode([tok.eot]) == '<|endoftext|>'
        assert tok.decode(np.array(tok.encode('é'), np.uint16)) == 'é' and tok.decode([]) == ''
        assert tok.decode(tok.encode('é')[:1]) in ('\ufffd', 'é')
        for wrong in (-1, tok.vocab_size, 1 << 70):
            with pytest.raises(DataError):
                tok.decode([wrong])
    assert get_tokenizer('bytes').vocab_size == 261 and get_tokenizer('bytes').eot == 256
    assert vocabulary.vocab_size == 50257 and vocabulary.eot == 50256
    with pytest.raises(DataError, match='gpt3'):
        get_tokenizer('gpt3')


def test_white_space_that_overflows_tiktoken(vocabulary):
    """More than a million blanks before a word end in a panic there; here they are cut where the pattern cuts them."""
    text = 'a' + ' ' * 1_500_000 + 'b\n' + '\n' * 20_000
    assert vocabulary.decode(vocabulary.encode(text)) == text
    text = 'a' + ' ' * 20_000 + 'b c' + '\n' * 20_000 + 'd'
    assert vocabulary.encode(text) == vocabulary.bpe.encode_ordinary(text)


@relaxed
@given(text=st.one_of(spaces, unicode_text), size=st.integers(1, 5))
def test_pieces_change_no_token(vocabulary, tmp_path, text, size):
    path = str(write(tmp_path / 'x', text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, '_MB', size)
        pieces = list(prepare._pieces(path, 0, os.path.getsize(path))) if text else []
    data = [part for piece in pieces for part in piece]
    assert b''.join(part for part, _ in data) == text.encode()
    assert [first for _, first in data] == [True, *[False] * (len(data) - 1)][:len(data)]
    assert [i for part, _ in data for i in vocabulary.encode_bytes(part)] == vocabulary.bpe.encode_ordinary(text)


# ---- datasets from files
def test_tinyshakespeare_has_nanogpts_token_counts(vocabulary, tmp_path):
    source = os.path.join(SHARED, 'text', 'tinyshakespeare.txt')
    if not os.path.exists(source):
        pytest.skip('tinyshakespeare is not at hand (../shared/data/text)')
    meta, folder = make(tmp_path, data_files=source, tokenizer='gpt2')
    assert [meta['splits'][split]['tokens'] for split in ('train', 'val')] == [301_966, 36_059]
    with open(source, 'rb') as f:
        text = f.read()
    assert read_bytes(folder, 'train') == text[:1_003_854] and read_bytes(folder, 'val') == text[1_003_854:]
    assert TokenData(folder, 'val', 8).bytes_per_token == 111_540 / 36_059


def test_pysrc(pysrc):
    meta = load_meta(pysrc)
    train, val = meta['splits']['train'], meta['splits']['val']
    assert 300_000 < val['bytes'] < 700_000 < 4_000_000 < train['bytes'] and val['documents'] > 20
    assert meta['tokenizer'] == 'bytes' and meta['vocab_size'] == 261 and listing(pysrc) == FINISHED
    for split, info in meta['splits'].items():
        assert info['tokens'] == info['bytes'] + info['documents'] - 1         # <|endoftext|> stands between documents
        text = read_bytes(pysrc, split)
        assert len(text) == info['bytes'] and b'import' in text
        tokens = TokenData(pysrc, split, 1).tokens
        assert tokens[0] != 256 and tokens[-1] != 256 and np.count_nonzero(tokens == 256) == info['documents'] - 1
    text = read_bytes(pysrc)
    assert compressed_bpb(pysrc) == {'gzip': 8 * len(gzip.compress(text, 9)) / len(text),
                                     'xz': 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)}


def test_pysrc_is_made_once_and_always_the_same(pysrc, tmp_path):
    before = os.stat(os.path.join(pysrc, 'train.bin')).st_mtime_ns
    assert ensure_pysrc(pysrc) == load_meta(pysrc) and os.stat(os.path.join(pysrc, 'train.bin')).st_mtime_ns == before
    meta, _ = make(tmp_path, dataset='pysrc')
    assert meta['splits'] == load_meta(pysrc)['splits']


def test_the_library_without_its_tests(tmp_path):
    for name in ('a.py', 'test/b.py', 'x/tests/c.py', 'site-packages/d.py', 'e/f.py', 'e/f.txt', '.hidden/g.py',
                 '__pycache__/h.py'):
        write(tmp_path / name, name)
    write(tmp_path / 'table.py', '# generated from a table')
    assert list(prepare._find([str(tmp_path)], ['.py'], library=True).values()) == ['a.py', 'e/f.py']


def test_folders_are_split_by_file(tmp_path):
    texts = {f'{i:02d}/x{i}.c': f'{i} text ' * (i + 1) for i in range(60)}
    for name, text in texts.items():
        write(tmp_path / 'src' / name, text)
    write(tmp_path / 'src' / 'again.c',
          texts['05/x5.c'])                      # a repeated, a binary, an empty, a hidden file,
    write(tmp_path / 'src' / 'program.c', b'\x7fELF\0\0')                      # and another kind: all left out
    write(tmp_path / 'src' / 'nothing.c', b'')
    write(tmp_path / 'src' / '.git' / 'x.c', 'hidden')
    write(tmp_path / 'src' / 'x.o', 'other')
    meta, folder = make(tmp_path, dataset='code', roots=str(tmp_path / 'src'), suffixes='.c,.h', val_fraction=0.2)
    parts = {}
    for split, info in meta['splits'].items():
        tokens = TokenData(folder, split, 1).tokens
        parts[split] = bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8)).decode().split('\0')
        assert len(parts[split]) == info['documents']
    assert sorted(parts['train'] + parts['val']) == sorted(texts.values())
    assert 0.15 < meta['splits']['val']['bytes'] / sum(map(len, texts.values())) <= 0.2
    held = set(parts['val'])
    write(tmp_path / 'src' / 'new.c', 'new')                                   # a new file moves few others across
    _, folder = make(tmp_path / 'again', dataset='code', roots=str(tmp_path / 'src'), suffixes='.c,.h',
                     val_fraction=0.2)
    again = set(read_bytes(folder, 'train').decode().split())
    assert len([text for text in held if text.split()[0] not in again]) > len(held) / 2


@relaxed
@given(text=st.text(st.characters(exclude_categories=['Cs']), min_size=5), fraction=st.floats(0.01, 0.99),
       size=st.integers(1, 9))
def test_one_file_is_split_by_characters(tmp_path, text, fraction, size):
    path = str(write(tmp_path / 'x', text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, '_MB', size)
        cut = prepare._character_offset(path, 1 - fraction)
    assert text.encode()[:cut].decode() == text[:int((1 - fraction) * len(text))]


def test_one_binary_file(tmp_path):
    data = random.Random(0).randbytes(10_000)
    write(tmp_path / 'x.bin', data)
    _, folder = make(tmp_path, data_files=str(tmp_path / 'x.bin'))
    assert read_bytes(folder, 'train') + read_bytes(folder, 'val') == data


def test_several_files_and_processes(tmp_path):
    for name in 'abcd':
        write(tmp_path / f'{name}.txt', f'{name} text\n' * 50_000)
    files = f'{tmp_path}/a.txt,{tmp_path}/b.txt,{tmp_path}/c.txt,{tmp_path}/d.txt'
    for n in (1, 2):
        run(f'--data_files={files}', '--dataset=x', f'--out_dir={n}', f'--num_proc={n}', '--val_fraction=0.3',
            cwd=tmp_path)
    assert load_meta(str(tmp_path / '1'))['splits'] == load_meta(str(tmp_path / '2'))['splits']
    assert load_meta(str(tmp_path / '1'))['splits']['val']['documents'] == 1


# ---- datasets of rows
ROWS = [f'row {i}: ' + 'some text ' * (i % 7) for i in range(2500)] + ['', 'é\n漢']


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    return datasets


def rows(datasets, path, column='text', texts=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({'n': list(range(len(texts))), column: texts})
    if path.suffix == '.parquet':
        table.to_parquet(str(path))
    else:
        write(path, ''.join(json.dumps(row) + '\n' for row in table))
    return path


def documents(folder, split):
    tok = get_tokenizer(load_meta(folder)['tokenizer'])
    tokens = TokenData(folder, split, 1).tokens
    return [tok.decode(part[part != tok.eot]) for part in np.split(tokens, np.flatnonzero(tokens == tok.eot))]


@pytest.mark.parametrize('name, column', [('x.jsonl', 'text'), ('x.parquet', 'body')])
def test_json_and_parquet(tmp_path, datasets, name, column):
    rows(datasets, tmp_path / name, column)
    meta, folder = make(tmp_path, data_files=name, text_column=column)
    assert sorted(documents(folder, 'train') + documents(folder, 'val')) == sorted(filter(None, ROWS))
    assert 0.05 < meta['splits']['val']['documents'] / len(ROWS) < 0.15 and listing(folder) == FINISHED
    _, other = make(tmp_path / 'other', data_files=name, text_column=column, seed=1)
    assert set(documents(other, 'val')) != set(documents(folder, 'val'))
    run(f'--data_files={name}', f'--text_column={column}', '--num_proc=2', cwd=tmp_path)       # the same by the command
    assert load_meta('data/x')['splits'] == meta['splits']


def test_local_copy_of_a_hub_dataset(vocabulary, datasets, tmp_path):
    """The form of WikiText-103: lines of one text, its own validation split, GPT-2 tokens."""
    lines = [' = Title = \n', '', ' Some text . \n', ' More of it , é . \n'] * 300
    rows(datasets, tmp_path / 'wiki' / 'train-00000-of-00001.parquet', texts=lines)
    rows(datasets, tmp_path / 'wiki' / 'validation-00000-of-00001.parquet', texts=lines[:8])
    meta, folder = make(tmp_path, hf_dataset=str(tmp_path / 'wiki'), separate=False)
    assert read_bytes(folder, 'val') == ''.join(lines[:8]).encode()
    assert read_bytes(folder, 'train') == ''.join(lines).encode()
    assert meta['tokenizer'] == 'gpt2' and meta['splits']['train']['bytes'] == len(''.join(lines).encode())
    assert vocabulary.eot not in TokenData(folder, 'train', 1).tokens


def test_json_array(tmp_path, datasets):
    write(tmp_path / 'x.json', json.dumps([{'text': text} for text in ROWS]))
    _, folder = make(tmp_path, data_files='x.json')
    assert len(documents(folder, 'train')) > 2000


def test_wrong_column(tmp_path, datasets):
    rows(datasets, tmp_path / 'x.jsonl', 'body')
    for column in ('text', 'n'):
        with pytest.raises(DataError, match=rf"'{column}' .*--text_column=n|body"):
            make(tmp_path, data_files='x.jsonl', text_column=column)


def test_rows_that_are_no_rows(tmp_path, datasets):
    for name in ('x.json', 'x.parquet', 'x.jsonl'):
        write(tmp_path / name, '{"text": ')
        with pytest.raises((DataError, OSError), match='cannot load x.'):
            make(tmp_path, data_files=name)


# ---- reading back
@relaxed
@given(data=st.data(), n_tokens=st.integers(2, 200), block=st.integers(1, 20), seed=st.integers(0, 1 << 40),
       ranks=st.integers(1, 5))
def test_every_epoch_reads_every_window_once(tmp_path, data, n_tokens, block, seed, ranks):
    block = min(block, n_tokens - 1)
    folder = by_hand(tmp_path / 'd', np.arange(n_tokens))
    tokens = TokenData(folder, 'train', block, seed)
    assert tokens.n_windows == (n_tokens - 1) // block and tokens.bytes_per_token == 1.0
    epoch, n = data.draw(st.integers(0, 3)), tokens.n_windows
    x, y = tokens.batch(epoch * n, n)
    assert x.shape == y.shape == (n, block) and x.dtype == y.dtype == np.int64
    assert x.flags.c_contiguous and y.flags.c_contiguous
    assert (y == x + 1).all() and sorted(x.ravel()) == list(range(n * block))
    # any number of ranks, each its share of every batch, reads what one rank reads; so does one that resumes anywhere
    at, size = data.draw(st.integers(0, 3 * n)), data.draw(st.integers(1, 7)) * ranks
    whole = tokens.batch(at, size)[0]
    share = size // ranks
    for order in (range(ranks), reversed(range(ranks))):
        fresh = TokenData(folder, 'train', block, seed)
        assert all((fresh.batch(at + rank * share,
                                share)[0] == whole[rank * share:(rank + 1) * share]).all() for rank in order)
    stream = np.concatenate([tokens.batch(e * n, n)[0] for e in range((at + size) // n + 1)])
    assert (stream[at:at + size] == whole).all()


def test_the_order_depends_on_seed_and_epoch(tmp_path):
    folder = by_hand(tmp_path / 'd', np.arange(250))
    first = [tuple(TokenData(folder, 'train', 1, seed).batch(epoch * 249, 249)[0].ravel()) 
             for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(first)) == 6


@pytest.mark.parametrize('split, block, seed, words', [
    ('train', 10, 0, 'block_size 10'), ('train', 0, 0, 'block_size 0'), ('train', -1, 0, 'block_size -1'),
    ('train', 4, -1, 'seed -1'),
    ('test', 4, 0, "'test'")])
def test_what_does_not_fit(tmp_path, split, block, seed, words):
    with pytest.raises(DataError, match=words):
        TokenData(by_hand(tmp_path / 'd', range(10)), split, block, seed)


def test_bad_batches(tmp_path):
    data = TokenData(by_hand(tmp_path / 'd', range(10)), 'train', 3)
    for position, n in ((-1, 1), (0, 0), (0, -1)):
        with pytest.raises(DataError, match='position'):
            data.batch(position, n)


def test_tokens_outside_the_vocabulary(tmp_path, monkeypatch):
    """Found whatever the checksums say: at once, or if there are many tokens in the first batch that holds one."""
    folder = by_hand(tmp_path / 'd', [1, 2, 3, 4, 5, 261, 7, 8, 9])
    with pytest.raises(DataError, match='token 261, expected less than 261'):
        TokenData(folder, 'train', 1)
    monkeypatch.setattr(TokenData, 'verify', lambda self: None)                # as if it had more than 64 MB
    data = TokenData(folder, 'train', 1)
    with pytest.raises(DataError, match='token 261, expected less than 261'):
        data.batch(0, 8)


def test_missing_and_half_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r'not there: make it with `python prepare.py --dataset=pysrc`'):
        TokenData('data/pysrc', 'train', 8)
    with pytest.raises(DataError, match=r'--dataset=x --out_dir=some/x` and its source'):
        TokenData('some/x', 'train', 8)
    write(tmp_path / 'data' / 'pysrc' / 'train.bin', b'1234')
    with pytest.raises(DataError, match='half made'):
        TokenData('data/pysrc', 'train', 8)
    with pytest.raises(DataError):
        TokenData('data/pysrc/train.bin', 'train', 8)


def test_damage_is_found_and_repaired(tmp_path):
    """Every kind of truncation and 300 bit flips of the tokens, one by one."""
    write(tmp_path / 'x.txt', 'some text ' * 100)
    knobs = dict(data_files=str(tmp_path / 'x.txt'))
    meta, folder = make(tmp_path, **knobs)
    path = os.path.join(folder, 'train.bin')
    with open(path, 'rb') as f:
        whole = f.read()
    chance = random.Random(1)
    for length in (0, 1, 2, len(whole) - 2, len(whole) - 1, len(whole) + 1, len(whole) * 2):
        write(tmp_path / 'made' / 'train.bin', (whole * 2)[:length])
        with pytest.raises(DataError, match='make it with'):
            TokenData(folder, 'train', 8)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        write(tmp_path / 'made' / 'train.bin', bytes(damaged))
        with pytest.raises(DataError, match='sha256'):
            TokenData(folder, 'train', 8)
    os.unlink(path)
    with pytest.raises(DataError):
        TokenData(folder, 'train', 8)
    assert make(tmp_path, **knobs)[0]['splits'] == meta['splits'] and is_dataset(folder) and listing(folder) == FINISHED


def test_damage_of_meta(tmp_path):
    write(tmp_path / 'x.txt', 'some text ' * 100)
    meta, folder = make(tmp_path, data_files=str(tmp_path / 'x.txt'))
    with open(os.path.join(folder, 'meta.json'), 'rb') as f:
        whole = f.read()
    chance = random.Random(2)
    for i in range(600):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        write(tmp_path / 'made' / 'meta.json', bytes(damaged) if i < 500 else whole[:chance.randrange(len(whole))])
        with contextlib.suppress(DataError):
            assert load_meta(folder) == meta                                   # white space may change, and no more
    assert make(tmp_path, data_files=str(tmp_path / 'x.txt'))[0]['splits'] == meta['splits']


@pytest.mark.parametrize('fields', [
    {'tokenizer': 'gpt3'}, {'tokenizer': None}, {'tokenizer': ['bytes']}, {'tokenizer': '../x'}, {'vocab_size': 260},
    {'vocab_size': 261.0}, {'vocab_size': '261'}, {'vocab_size': None}, {'splits': None}, {'splits': []},
    {'splits': {}},
    {'splits': {'train': 1, 'val': 2}}, {'splits': {'../../train': {}}}])
def test_foreign_meta(tmp_path, fields):
    folder = by_hand(tmp_path / 'd', range(10), **fields)
    with pytest.raises(DataError, match='meta.json is damaged'):
        load_meta(folder)


@pytest.mark.parametrize('key', ['tokens', 'bytes', 'sha256'])
@pytest.mark.parametrize('value', [-1, 0, True, 1.5, '9', None, [], {}, 1 << 80])
def test_foreign_counts(tmp_path, key, value):
    splits = load_meta(by_hand(tmp_path / 'd', range(10)))['splits']
    splits['train'][key] = value
    with pytest.raises(DataError):
        TokenData(by_hand(tmp_path / 'd', range(10), splits=splits), 'train', 2)


json_values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
                           lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(st.sampled_from(['tokenizer', 'splits', 'train', 'val', 'tokens', 'check']), inner)))


@relaxed
@given(content=st.one_of(st.binary(), json_values.map(lambda value: json.dumps(value).encode()),
                         st.just(b'[' * 100_000)))
def test_anything_as_meta(tmp_path, content):
    write(tmp_path / 'd' / 'meta.json', content)
    with pytest.raises(DataError) as e:
        TokenData(str(tmp_path / 'd'), 'train', 8)
    assert len(str(e.value).splitlines()) == 1


# ---- bad input
@pytest.mark.parametrize('args, words', [
    (['--dataset=books'], ['books', '--data_files=']),
    (['--data_files=nowhere.txt'], ['nowhere.txt', 'expected a file']),
    (['--data_files=empty.txt'], ['0 bytes of text']), (['--data_files=tiny.txt'], ['1 bytes of text']),
    (['--data_files=x.txt', '--roots=.'], ['data_files and roots']), (['--roots=.', '--suffixes=.zig'], ['.zig']),
    (['--dataset=pysrc', '--tokenizer=gpt5'], ['gpt5', 'bytes or gpt2']),
    (['--dataset=pysrc', '--val_fraction=1'], ['val_fraction 1']),
    (['--dataset=pysrc', '--num_proc=-1'], ['num_proc -1']), (['--dataset=pysrc', '--sed=1'], ['did you mean seed?']),
    (['--data_files=.'], ['mixes', 'json and text'])])
def test_mistakes(tmp_path, args, words):
    for name, text in (('x.txt', 'text ' * 9), ('empty.txt', ''), ('tiny.txt', 'a'), ('x.json', '{"text": "x"}')):
        write(tmp_path / name, text)
    line = run(*args, cwd=tmp_path, code=2)
    assert all(word in line for word in words), line
    assert listing(tmp_path / 'data') == []


def test_another_recipe_is_not_overwritten(tmp_path):
    write(tmp_path / 'x.txt', 'some text ' * 100)
    run('--data_files=x.txt', cwd=tmp_path)
    assert 'val_fraction than 0.3' in run('--data_files=x.txt', '--val_fraction=0.3', cwd=tmp_path, code=2)
    assert 'needs about' not in run('--data_files=x.txt', '--num_proc=1', cwd=tmp_path)    # the same: nothing to do


@pytest.mark.parametrize('package, args',
                         [('datasets', ['--data_files=x.jsonl']),
                          ('tiktoken', ['--data_files=x.txt', '--tokenizer=gpt2']),
                                           ('datasets', ['--tokenizer=bytes'])])
def test_missing_packages(tmp_path, package, args):
    write(tmp_path / 'none' / f'{package}.py', 'raise ImportError')
    write(tmp_path / 'x.txt', 'text ' * 99)
    write(tmp_path / 'x.jsonl', '{"text": "x"}\n')
    env = {'PYTHONPATH': str(tmp_path / 'none')}
    assert f'pip install {package}' in run(*args, cwd=tmp_path, code=2, env=env)
    for name in ('datasets', 'tiktoken', 'tqdm', 'pyarrow'):                    # local text as bytes needs none of them
        write(tmp_path / 'none' / f'{name}.py', 'raise ImportError')
    run('--data_files=x.txt', cwd=tmp_path, env=env)


def test_without_a_network(tmp_path):
    pytest.importorskip('datasets')
    line = run('--tokenizer=bytes', cwd=tmp_path, code=1)
    assert 'Skylion007/openwebtext' in line
    write(tmp_path / 'x.txt', 'text ' * 99)
    pytest.importorskip('tiktoken')
    env = {'TIKTOKEN_CACHE_DIR': str(tmp_path / 'empty'), 'https_proxy': 'http://127.0.0.1:9',
           'HTTPS_PROXY': 'http://127.0.0.1:9'}
    assert 'TIKTOKEN_CACHE_DIR' in run('--data_files=x.txt', '--tokenizer=gpt2', cwd=tmp_path, code=1, env=env)


def test_too_many_ids_for_uint16(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.ByteTokenizer, 'vocab_size', 100_277)
    with pytest.raises(DataError, match='100277 ids: expected at most 65535'):
        make(tmp_path, dataset='pysrc')


# ---- never a dataset that looks finished and is not
BIG = ['--data_files=big.txt', '--dataset=big', '--num_proc=1', '--val_fraction=0.5']


def big_file(tmp_path, megabytes=48):
    return write(tmp_path / 'big.txt', b'some words and a number 123\n' * (megabytes * 40_000))


def wait_for(path, process):
    while not os.path.exists(path) and process.poll() is None:
        time.sleep(0.001)


def stopped(*args, cwd, folder, **options):
    """A preparation that stands still in the middle of its writing."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        process = start(*args, cwd=cwd, **options)
        wait_for(folder / 'train.bin.tmp', process)
        process.send_signal(signal.SIGSTOP)
        if os.path.exists(folder / 'train.bin.tmp'):
            return process
        process.send_signal(signal.SIGCONT)                                    # too late: a busy machine
        process.communicate(timeout=60)
    raise AssertionError('it was never seen at work')


def test_kill_anywhere(tmp_path):
    """kill -9 at many instants, before, during and after the writing: afterwards no dataset, or a whole one."""
    big_file(tmp_path, 16)
    folder = tmp_path / 'data' / 'big'
    seen, chance = set(), random.Random(3)
    for attempt in range(8):
        shutil.rmtree(folder, ignore_errors=True)
        process = start(*BIG, cwd=tmp_path)
        wait_for(folder / ('.lock' if attempt % 2 else 'val.bin.tmp'), process)
        time.sleep(chance.random() * 0.06)
        process.kill()
        process.communicate()
        whole = is_dataset(folder)
        assert whole or not os.path.exists(folder / 'meta.json')
        seen.add(bool(whole))
    assert False in seen
    for name in ('train.bin.tmp', 'val.bin.tmp', 'meta.json.tmp',
                 'train.bin'):  # litter of every kind, and a stale lock
        write(folder / name, 'litter')
    write(folder / '.lock', '999999999, since long ago')
    run(*BIG, cwd=tmp_path)
    assert is_dataset(folder) and listing(folder) == FINISHED


def test_killed_workers_and_orphans(tmp_path):
    """Worker processes end with their parent, and do not keep its lock."""
    big_file(tmp_path)
    folder, args = tmp_path / 'data' / 'big', [*BIG[:2], '--num_proc=2']
    process = stopped(*args, cwd=tmp_path, folder=folder)
    process.kill()
    process.communicate(timeout=60)                                            # to the end of its last worker's pipe
    assert not is_dataset(folder)
    run(*args, cwd=tmp_path)
    assert is_dataset(folder) and listing(folder) == FINISHED


def test_two_at_once(tmp_path):
    big_file(tmp_path)
    folder = tmp_path / 'data' / 'big'
    first = stopped(*BIG, cwd=tmp_path, folder=folder)
    try:
        line = run(*BIG, cwd=tmp_path, code=1)
        assert f'being prepared by process {first.pid}, since 20' in line and not is_dataset(folder)
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.communicate(timeout=60)[1] == '' and is_dataset(folder) and listing(folder) == FINISHED


def test_many_ranks_at_once(tmp_path, pysrc):
    """ensure_pysrc in several processes, as torchrun starts them: one makes it, the others wait for it."""
    code = f'import sys; sys.path.insert(0, {ROOT!r}); import prepare; print(prepare.ensure_pysrc("d/pysrc")["check"])'
    ranks = [subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, text=True,
                              stdout=subprocess.PIPE) for _ in range(4)]
    said = {rank.communicate(timeout=60)[0].splitlines()[-1] for rank in ranks}
    assert len(said) == 1 and [rank.returncode for rank in ranks] == [0] * 4
    assert listing(tmp_path / 'd' / 'pysrc') == FINISHED


def test_interrupted(tmp_path):
    big_file(tmp_path)
    folder = tmp_path / 'data' / 'big'
    process = stopped(*BIG, cwd=tmp_path, folder=folder)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count('\n') == 1 and 'interrupted' in err
    assert not os.path.exists(folder)


def test_no_space_left(tmp_path):
    """A limit on the size of files stands for a quota; then, where it can be mounted, a small file system."""
    big_file(tmp_path, 4)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    line = run(*BIG, cwd=tmp_path, code=1, preexec_fn=limit)
    assert 'data/big is not made' in line and 'large' in line and listing(tmp_path / 'data') == []
    run(*BIG, cwd=tmp_path)
    assert listing(tmp_path / 'data' / 'big') == FINISHED

    small = tmp_path / 'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', str(small)], capture_output=True).returncode:
        pytest.skip('no right to mount a small file system: only the limit was tried')
    try:
        assert 'MB free: expected' in run(*BIG, '--out_dir=small/d', cwd=tmp_path, code=1)
        line = run(*BIG, '--out_dir=small/d', '--check_disk=False', cwd=tmp_path, code=1)
        assert 'No space left' in line and 'small/d' in line and listing(small) == []
    finally:
        subprocess.run(['umount', str(small)], check=True)


def test_no_right_to_write(tmp_path):
    write(tmp_path / 'x.txt', 'text ' * 99)
    write(tmp_path / 'file', '')
    assert 'file/d is not made' in run('--data_files=x.txt', '--out_dir=file/d', cwd=tmp_path, code=1)
