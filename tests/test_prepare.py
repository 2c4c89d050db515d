"""Text in, tokens out and back: exact, each window once an epoch, never a dataset that looks finished and is not."""
import bz2
import contextlib
import gzip
import json
import lzma
import os
import random
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import prepare
from prepare import DataError, TokenData, compressed_bpb, ensure_pysrc, get_tokenizer, load_meta, make_from, read_bytes
from runs import REPO, Run, write

relaxed = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
DATASET = ['lock', 'meta.json', 'train.bin', 'val.bin']


def start(folder, *args, script='prepare.py', **options):
    """Without a network or what earlier downloads left."""
    offline = {'HF_HOME': f'{folder}/hf', 'HF_HUB_OFFLINE': '1', 'TIKTOKEN_CACHE_DIR': f'{folder}/empty',
               'HTTPS_PROXY': 'http://127.0.0.1:9'}
    return Run(folder, script, args, env=offline, **options)


def run(folder, *args, code=0, **options):
    """What prepare.py prints: all is well, or the one line that says what is not."""
    done = start(folder, *args, **options).wait()
    assert done.code == code and done.err.count('\n') == (code > 0) and done.err.startswith('error: ' * (code > 0)), done.err
    return done.err or done.out


def make(tmp_path, **knobs):
    return prepare.make({'out_dir': str(tmp_path / 'made'), **knobs}), str(tmp_path / 'made')


def counting(tmp_path, n):
    """Training data of the tokens 0 to n - 1."""
    make_from({'train': [bytes(range(n))], 'val': ['some text']}, str(tmp_path / f'{n}'), 'bytes', {})
    return str(tmp_path / f'{n}')


def documents(folder, *splits):
    tok, tokens = get_tokenizer(load_meta(folder)['tokenizer']), []
    for split in splits or ('train', 'val'):
        tokens += [*TokenData(folder, split, 1).tokens.tolist(), tok.eot]
    ends = np.flatnonzero(np.array(tokens) == tok.eot).tolist()
    return sorted(tok.decode(tokens[a + 1:b]) for a, b in zip([-1, *ends], ends))


spaces = st.text(st.sampled_from(' \n\t\r\x0b\x1c\x85\xa0\u1680\u2003\u2028\u3000ab1é漢.\'s'))
texts = st.one_of(spaces, st.text(st.characters(exclude_categories=['Cs'])))


@relaxed
@given(text=texts, data=st.binary(), odd=st.text(st.characters()), size=st.integers(1, 5))
@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_tokenizers_round_trip(gpt2, name, text, data, odd, size):
    """Any text and any bytes; lone surrogates of raw bytes give their bytes, any other U+FFFD; nothing raises."""
    tok = get_tokenizer('bytes') if name == 'bytes' else gpt2
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.encode_bytes(text.encode()) == ids
    assert all(type(i) is int and 0 <= i < tok.vocab_size and i != tok.eot for i in ids)
    assert tok.decode_bytes(tok.encode_bytes(data)) == tok.decode_bytes(tok.encode(os.fsdecode(data))) == data
    expected = ''.join('\ufffd' if '\ud800' <= c < '\udc80' or '\udcff' < c <= '\udfff' else c for c in odd)
    assert tok.decode_bytes(tok.encode(odd)) == os.fsencode(expected)
    assert name == 'bytes' or ids == tok.bpe.encode_ordinary(text)
    pieces = list(prepare._pieces([text], size))                               # a long text in parts: the same tokens
    assert [i for part, _ in pieces for i in tok.encode_bytes(part)] == ids


def test_specials_and_white_space(gpt2):
    for tok, size, eot in (get_tokenizer('bytes'), 261, 256), (gpt2, 50257, 50256):
        assert (tok.vocab_size, tok.eot) == (size, eot)
        assert eot not in tok.encode('<|endoftext|>') and tok.decode([eot]) == '<|endoftext|>' and tok.decode([]) == ''
        assert tok.decode(np.array(tok.encode('é'), np.uint16)) == 'é'
    assert get_tokenizer('bytes').decode([257, 97, 260]) == 'a'
    # more than a million blanks before a word end in a panic of tiktoken: they are cut where the pattern cuts them
    text = 'a' + ' ' * 1_500_000 + 'b\n' + '\n' * 20_000
    assert gpt2.decode(gpt2.encode(text)) == text
    text = 'word ' * 200_000 + ' ' * 20_000 + 'b c' + '\n' * 20_000 + 'd'
    assert gpt2.encode(text) == gpt2.bpe.encode_ordinary(text)


def test_tinyshakespeare_has_nanogpts_token_counts(gpt2, shared, tmp_path):
    """With any number of threads."""
    source = shared('text', 'tinyshakespeare.txt')
    meta, folder = make(tmp_path, data_files=source, tokenizer='gpt2', num_proc=1)
    assert make(tmp_path / 'again', data_files=source, tokenizer='gpt2', num_proc=2)[0]['splits'] == meta['splits']
    assert [meta['splits'][split]['tokens'] for split in ('train', 'val')] == [301_966, 36_059]
    with open(source, 'rb') as f:
        text = f.read()
    assert read_bytes(folder, 'train') == text[:1_003_854] and read_bytes(folder, 'val') == text[1_003_854:]
    assert TokenData(folder, 'val', 8).bytes_per_token == 111_540 / 36_059


def test_pysrc(tmp_path):
    """Several ranks at once, as torchrun starts them: one makes it, the others wait for it."""
    script, folder = write(tmp_path / 'rank.py', 'import prepare\nprepare.ensure_pysrc("pysrc")'), str(tmp_path / 'pysrc')
    ranks = [Run(tmp_path, script, []) for _ in range(4)]
    assert [rank.wait().code for rank in ranks] == [0] * 4
    meta = load_meta(folder)
    train, val = meta['splits']['train'], meta['splits']['val']                # tests and installed packages would be more
    assert 300_000 < val['bytes'] < 700_000 < 4_000_000 < train['bytes'] < 14_000_000 and val['documents'] > 20
    assert meta['tokenizer'] == 'bytes' and meta['vocab_size'] == 261 and sorted(os.listdir(folder)) == DATASET
    for split, info in meta['splits'].items():
        text, tokens = read_bytes(folder, split), TokenData(folder, split, 1).tokens
        assert len(text) == info['bytes'] == info['tokens'] - np.count_nonzero(tokens == 256)
        assert tokens[0] != 256 != tokens[-1] and np.count_nonzero(tokens == 256) == info['documents'] - 1
    assert compressed_bpb(folder) == {'gzip': 8 * len(gzip.compress(text, 9)) / len(text),
                                      'xz': 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)}
    before = os.stat(os.path.join(folder, 'train.bin')).st_mtime_ns            # made once, and always the same
    assert ensure_pysrc(folder) == meta and os.stat(os.path.join(folder, 'train.bin')).st_mtime_ns == before
    assert make(tmp_path, dataset='pysrc')[0]['splits'] == meta['splits']


def test_folders_are_split_by_file_and_what_is_left_out_is_said(tmp_path, capsys):
    src, texts = tmp_path / 'src', {f'{i:02d}/x{i}.c': f'{i} text ' * (i + 1) for i in range(60)}
    for name, data in {**texts, 'again.c': texts['05/x5.c'], 'program.c': b'\x7fELF\0\0', 'nothing.c': '', '.git/x.c': 'x',
                       'x.o': 'other', 'windows.c': 'text'.encode('utf-16'), 'zip.c': b'PK\3\4', 'p.c': b'%PDF',
                       'zst.c': b'\x28\xb5\x2f\xfdx', 'cut.c': gzip.compress(b'text'), 'bad.c.gz': 'text',
                       'packed.c.gz': gzip.compress(b'packed text ')}.items():
        write(src / name, data)
    os.mkfifo(src / 'pipe.c')
    knobs = dict(dataset='code', roots=str(src), suffixes='.c,.c.gz', val_fraction=0.2)
    meta, folder = make(tmp_path, **knobs)
    assert documents(folder) == sorted([*texts.values(), 'packed text '])
    said = capsys.readouterr().out
    for line in ("repeated: 1 files, such as '*/05/x5.c'", "binary: 1 files, such as '*/program.c'", "UTF16: 1 files, ",
                 "empty: 1 files, such as '*/nothing.c'", 'packed: 4 files, such as ', 'hidden or of another kind: 2 files, ',
                 "unreadable: 2 files, such as '*/bad.c.gz', '*/pipe.c'", 'taken: 61 files, '):
        assert line.replace('*', str(src)) in said, (line, said)
    held = set(documents(folder, 'val'))
    write(src / 'new.c', 'new')                                                # a new file moves few others across
    assert len(held & set(documents(make(tmp_path / 'again', **knobs)[1], 'val'))) > len(held) / 2


@relaxed
@given(texts=st.lists(st.text(st.characters(exclude_categories=['Cs'])), min_size=1, max_size=20), rows=st.booleans(),
       sizes=st.lists(st.integers(1, 50_000), max_size=20), fraction=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9]))
@example(texts=['é' * 150], rows=False, sizes=[190_000], fraction=0.1)
def test_held_out_is_what_the_knob_says_and_no_character_is_cut(texts, sizes, fraction, rows):
    texts = [text.encode() for text in texts] + [b'x' * size for size in sizes]
    names = () if rows else [str(i) for i in range(len(texts))]
    splits = prepare._split(lambda: texts, {'val_fraction': fraction, 'seed': 1}, names)
    parts = {split: [part.decode() for part in splits[split]] for split in ('train', 'val')}
    assert [a + b for a, b in zip(*parts.values())] == [text.decode() for text in texts]
    size, held = sum(map(len, texts)), len(''.join(parts['val']).encode())
    assert 0.9 * fraction * size - 4 <= held <= fraction * size + 1


def test_a_changed_source_is_noticed(tmp_path):
    write(tmp_path / 'mine.txt', 'some text ' * 100)
    run(tmp_path, '--data_files=mine.txt')
    assert 'made anew' not in run(tmp_path, '--data_files=mine.txt', '--num_proc=1')
    assert 'another val_fraction' in run(tmp_path, '--data_files=mine.txt', '--val_fraction=0.3', code=2)
    write(tmp_path / 'mine.txt', 'some more ' * 100)                           # of the same size
    assert 'data/mine is made anew: its source has changed' in run(tmp_path, '--data_files=mine.txt')
    write(tmp_path / 'mine.txt', 'a')                                          # a failure keeps what is there
    assert '0 bytes of text in train' in run(tmp_path, '--data_files=mine.txt', code=2)
    assert read_bytes(str(tmp_path / 'data' / 'mine'), 'train') == b'some more ' * 90


ROWS = [f'row {i}: ' + 'some text ' * (i % 7) for i in range(2500)] + ['', 'é\n"漢",', '\ud83d lone']


def rows(path, texts=ROWS, column='text'):
    """A file of these rows, in the format that its name says."""
    table, (name, *packed) = [{'n': i, column: text} for i, text in enumerate(texts)], path.suffixes
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == '.parquet':
        table = [{**row, column: row[column].replace('\ud83d', '\ufffd')} for row in table]
        pytest.importorskip('pyarrow.parquet').write_table(sys.modules['pyarrow'].Table.from_pylist(table), str(path))
    else:
        data = (json.dumps(table, indent=1) if name == '.json' else ''.join(json.dumps(row) + '\n' for row in table)).encode()
        write(path, {'.gz': gzip, '.bz2': bz2, '.xz': lzma}[packed[0]].compress(data) if packed else data)
    return str(path)


@pytest.mark.parametrize('name', ['a[1].jsonl', 'x*.parquet', 'x.json', 'X.JSONL.gz', 'x.json.bz2', 'a,b.jsonl.xz'])
def test_rows(tmp_path, capsys, name):
    """Names are names, not patterns: a[1].jsonl is a file."""
    os.rename(rows(tmp_path / name.lower(), column='body'), tmp_path / name)
    made = [make(tmp_path / str(seed), data_files=str(tmp_path / name), text_column='body', seed=seed)[1] for seed in (0, 1)]
    assert documents(made[0]) == sorted(text.replace('\ud83d', '\ufffd') for text in ROWS if text)
    assert documents(made[0], 'val') != documents(made[1], 'val')
    assert '2,503 documents (1 empty)' in capsys.readouterr().out


def test_rows_of_other_columns_and_kinds(tmp_path):
    write(tmp_path / 'd' / 'a.jsonl', '{"text": "one", "n": 1}\n{"text": null}\n\n')
    write(tmp_path / 'd' / 'b.jsonl', '\ufeff{"m": [], "text": "two"}\r\n')
    write(tmp_path / 'd' / 'c.txt', 'three')
    odd = write(tmp_path / 'odd.bin', bytes(range(1, 256)))                    # taken as it is where it is named
    folder = make(tmp_path, data_files=f'{tmp_path}/d,{odd}', val_fraction=0.5)[1]
    assert sorted(read_bytes(folder, 'train') + read_bytes(folder, 'val')) == sorted(b'onetwothree' + bytes(range(1, 256)))


def test_local_copy_of_a_hub_dataset(gpt2, tmp_path, monkeypatch):
    """The form of WikiText-103: lines of one text, its own validation split, GPT-2 tokens; and one without it."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    lines = [' = Title = \n', '', ' Some text . \n', ' More of it , é . \n'] * 300
    rows(tmp_path / 'wiki' / 'train-00000-of-00001.parquet', lines)
    rows(tmp_path / 'wiki' / 'validation-00000-of-00001.parquet', lines[:8])
    meta, folder = make(tmp_path, hf_dataset=str(tmp_path / 'wiki'), separate=False)
    assert read_bytes(folder, 'val') == ''.join(lines[:8]).encode()
    assert read_bytes(folder, 'train') == ''.join(lines).encode()
    assert meta['tokenizer'] == 'gpt2' and gpt2.eot not in TokenData(folder, 'train', 1).tokens
    rows(tmp_path / 'plain' / 'data.jsonl', ROWS[:-1])
    _, folder = make(tmp_path / 'b', hf_dataset=str(tmp_path / 'plain'), tokenizer='bytes', val_fraction=0.1)
    assert documents(folder) == sorted(filter(None, ROWS[:-1]))


@pytest.mark.parametrize('text, words', [
    ('{"body": "x", "n": 1}\n', "KeyError('text'), {'body': 'x', 'n': 1}"), ('{"text": ["a"]}\n', "not 'list'"),
    ('{"text": "a"}\n{"text": 5}\n', "near row 2: "), ('{"text": "a"}\n[1]\n', 'near row 2: '), ('{"text": ', 'near row 0: '),
    ('["a"]', 'near row 1: '), ('{\n"text": "a"}', 'near row 0: '), (b'{"text": "\xff"}', 'near row 0: ')])
def test_rows_that_are_none(tmp_path, text, words):
    """The file, the row, the column and what was expected."""
    good, bad = rows(tmp_path / 'a.jsonl'), write(tmp_path / 'b.jsonl', text)
    with pytest.raises(DataError, match="expected .* text in column 'text'") as e:
        make(tmp_path, data_files=f'{good},{bad}')
    assert str(e.value).startswith(bad) and words in str(e.value) and '\n' not in str(e.value)


@relaxed
@given(data=st.data(), n_tokens=st.integers(2, 200), block=st.integers(1, 20), seed=st.integers(0, 1 << 40),
       ranks=st.integers(1, 5))
def test_every_epoch_reads_every_window_once(tmp_path, data, n_tokens, block, seed, ranks):
    block, folder = min(block, n_tokens - 1), counting(tmp_path, n_tokens)
    tokens = TokenData(folder, 'train', block, seed)
    assert tokens.n_windows == (n_tokens - 1) // block and tokens.bytes_per_token == 1.0
    epoch, n = data.draw(st.integers(0, 3)), tokens.n_windows
    x, y = tokens.batch(epoch * n, n)
    assert x.shape == y.shape == (n, block) and x.dtype == y.dtype == np.int64
    assert (y == x + 1).all() and sorted(x.ravel()) == list(range(n * block))
    # any number of ranks, each its share of every batch, reads what one rank reads; so does one that resumes anywhere
    at, share = data.draw(st.integers(0, 3 * n)), data.draw(st.integers(1, 7))
    stream = np.concatenate([tokens.batch(e * n, n)[0] for e in range((at + share * ranks) // n + 1)])
    for order in (range(ranks), reversed(range(ranks))):
        fresh = TokenData(folder, 'train', block, seed)
        for start in (at + rank * share for rank in order):
            assert (fresh.batch(start, share)[0] == stream[start:start + share]).all()
    first = TokenData(counting(tmp_path, 250), 'train', 1, 0).batch(0, 6)[0]
    assert first.ravel().tolist() == [141, 174, 109, 246, 242, 111]            # what a checkpoint's position means


def test_damage_is_found_and_repaired(tmp_path, capsys):
    """Truncations and bit flips of the tokens and of meta.json, one by one."""
    knobs, chance = dict(data_files=write(tmp_path / 'x.txt', 'some text ' * 100)), random.Random(1)
    meta, folder = make(tmp_path, **knobs)
    path, meta_path = tmp_path / 'made' / 'train.bin', tmp_path / 'made' / 'meta.json'
    whole, whole_meta = path.read_bytes(), meta_path.read_bytes()
    flipped = lambda data: bytes([*data[:(i := chance.randrange(len(data)))], data[i] ^ 1 << chance.randrange(8), *data[i + 1:]])
    for data in [whole[:n] for n in (0, 1, 2, 1798, 1799)] + [whole + b'x', whole * 2] + [flipped(whole) for _ in range(300)]:
        write(path, data)
        with pytest.raises(DataError, match='is damaged'):
            TokenData(folder, 'train', 8)
    assert make(tmp_path, **knobs)[0]['splits'] == meta['splits'] and path.read_bytes() == whole
    assert 'is made anew: it is damaged' in capsys.readouterr().out
    cut = [whole_meta[:chance.randrange(len(whole_meta))] for _ in range(100)]
    forged = [b'', b'\xff', b'[' * 100_000, b'[]', b'{"check": 1, "splits": null}']
    for odd in ({}, {'splits': {}}, {**meta, 'splits': {'train': 1}}, {**meta, 'vocab_size': '261'}):
        forged.append(json.dumps({**odd, 'check': prepare._check(odd)}).encode())  # with a checksum that fits
    for data in forged + cut + [flipped(whole_meta) for _ in range(500)]:
        write(meta_path, data)
        with contextlib.suppress(DataError):
            assert load_meta(folder) == json.loads(whole_meta)                 # white space may change, and no more
    assert make(tmp_path, **knobs)[0]['splits'] == meta['splits']
    tokens = TokenData(folder, 'train', 1)                                     # of a large file not every byte is verified:
    with open(tokens.path, 'r+b') as file:                                     # such a token is found in its batch
        file.write(np.uint16(261).tobytes())
    with pytest.raises(DataError, match='it has a token 261'):
        tokens.batch(0, tokens.n_windows)


def test_what_does_not_fit(tmp_path):
    for block in (-1, 0, 9):
        with pytest.raises(DataError, match=f'block_size {block}: expected 1 to 8'):
            TokenData(counting(tmp_path, 9), 'train', block)
    with pytest.raises(DataError, match='not there, or only half made: .*--dataset=pysrc --out_dir=.*/pysrc --data_files='):
        TokenData(f'{tmp_path}/pysrc', 'train', 8)


@pytest.mark.parametrize('args, words', [
    ('--dataset=books', ["'books'", '--data_files=']), ('--roots=,', ["','", 'not there']), ('--data_files=nowhere.txt', ['nowhere.txt', 'not there']),
    ('--data_files=empty.txt', ['0 bytes of text']), ('--data_files=tiny.txt', ['0 bytes of text in train']),
    ('--data_files=x.txt --roots=.', ['use one of']), ('--roots=. --suffixes=.zig', ['0 bytes of text']),
    ('--dataset=pysrc --tokenizer=gpt5', ['gpt5', 'bytes or gpt2']), ('--dataset=pysrc --num_proc=-1', ['num_proc']),
    ('--data_files=x.txt --val_fraction=1', ['val_fraction']), ('--dataset=pysrc --sed=1', ['did you mean seed?']),
    ('--data_files=utf16.txt', ['utf16.txt', 'UTF16', 'convert']), ('--data_files=x.zip', ['packed', 'unpack']),
    ('--data_files=x.tar.gz', ['packed', 'unpack']), ('--data_files=x.txt.zst', ['packed', 'unpack']),
    ('--data_files=cut.gz', ['cut.gz, near row 0: EOFError']), ('--data_files=bad.xz', ['bad.xz', 'Input format']),
    ('--data_files=bad.parquet', ['bad.parquet, near row 0']), ('--tokenizer=bytes', ['Skylion007/openwebtext']),
    ('--data_files=x.csv', ['x.csv', 'expected json or parquet', '--roots= in place']),
    ('--data_files=pipe', ['pipe', 'no regular file']), ('--data_files=le.txt', ['binary', 'convert']),
    ('--data_files=x.txt --tokenizer=gpt2', ['TIKTOKEN_CACHE_DIR'])])
def test_mistakes(tmp_path, args, words):
    packed = gzip.compress(random.Random(0).randbytes(9000).hex().encode())
    for name, text in {'x.txt': 'text ' * 9, 'empty.txt': '', 'tiny.txt': 'a', 'utf16.txt': 'text'.encode('utf-16'),
                       'x.zip': b'PK\3\4\0', 'x.txt.zst': b'\x28\xb5\x2f\xfdabc', 'cut.gz': packed[:-1000],
                       'x.tar.gz': gzip.compress(bytes(257) + b'ustar'), 'bad.xz': b'text', 'bad.parquet': 'text',
                       'x.csv': 'n,text\n1,some text\n', 'le.txt': 'text'.encode('utf-16-le')}.items():
        write(tmp_path / name, text)
    os.mkfifo(tmp_path / 'pipe')
    line = run(tmp_path, *args.split(), code=2)
    assert all(word in line for word in words), line
    assert not [name for _, _, names in os.walk(tmp_path / 'data') for name in names if name != 'lock']


def test_missing_packages(tmp_path):
    """The pip line of each; local text as bytes needs none of them."""
    for name, text in {'x.txt': 'text ' * 99, 'x.parquet': 'PAR1', 'x.jsonl': '{"text": "xxxxxxxxxxxxxxx"}\n'}.items():
        write(tmp_path / name, text)
    script = write(tmp_path / 'without.py', f"""import runpy, sys
sys.modules.update(dict.fromkeys(('datasets', 'tiktoken', 'pyarrow')))
runpy.run_path({REPO + '/prepare.py'!r}, run_name='__main__')""")
    for package, args in (('pyarrow', ['--data_files=x.parquet']), ('datasets', ['--tokenizer=bytes']),
                          ('tiktoken', ['--data_files=x.txt', '--tokenizer=gpt2'])):
        assert f'pip install {package}' in run(tmp_path, *args, code=2, script=script)
    run(tmp_path, '--data_files=x.txt,x.jsonl', script=script)


def test_killed_interrupted_two_at_once_and_without_space(tmp_path):
    """kill -9 before, during and after the writing. A limit on the size of files stands for a full disk."""
    args, folder, seen, chance = ['--data_files=big.txt', '--num_proc=1'], tmp_path / 'data' / 'big', [], random.Random(3)
    write(tmp_path / 'big.txt', b'some words and a number 123\n' * 640_000)

    def whole():
        return (folder / 'meta.json').exists() and all(TokenData(str(folder), split, 1) for split in ('train', 'val'))

    def begin(path):
        process = start(tmp_path, *args)
        while not os.path.exists(folder / path) and process.process.exitcode is None:
            time.sleep(0.001)
        return process
    for attempt in range(8):
        shutil.rmtree(folder, ignore_errors=True)
        process = begin('lock' if attempt % 2 else 'unfinished/train')
        time.sleep(chance.random() * 0.06)
        process.kill().wait()
        seen.append(whole())                                                   # or this says that it is damaged
    assert False in seen
    for name in ('unfinished/train', 'unfinished/x', 'unfinished.tmp', 'train.bin'):           # litter of every kind
        write(folder / name, 'litter')
    run(tmp_path, *args)
    assert whole() and sorted(os.listdir(folder)) == DATASET
    shutil.rmtree(folder)
    first = begin('unfinished/unfinished.tmp').kill(signal.SIGSTOP)
    try:
        assert f'in use by process {first.pid}' in run(tmp_path, *args, code=1) and not whole()
    finally:
        first.kill(signal.SIGINT).kill(signal.SIGCONT).wait()
    assert first.code == 130 and first.err.count('\n') == 1 and 'interrupted' in first.err and os.listdir(folder) == ['lock']
    assert 'too large' in run(tmp_path, *args, code=1, fsize=1 << 20) and os.listdir(folder) == ['lock']
