"""Text to tokens on disk, the tokenizers, and reading batches back.

    python prepare.py                    # OpenWebText, GPT-2 tokens: hours, 84 GB of disk
    python prepare.py --dataset=pysrc    # Python's standard library, bytes: a second, no download
    python prepare.py --dataset=code --roots=src,/usr/include --suffixes=.py,.h
    python prepare.py --dataset=books --data_files=books.txt,more/,notes.jsonl.gz --tokenizer=gpt2
    python prepare.py --hf_dataset=Salesforce/wikitext --hf_config=wikitext-103-raw-v1 --separate=False

make data/<dataset>/{train,val}.bin (uint16 tokens) and, last, meta.json, without which it is no dataset. The
same command again checks every byte, and makes anew what is damaged or whose files have changed.
"""
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module

import numpy as np

from configurator import configure, die, lock_folder, locks, require, sha256_of, write_whole

dataset = ''          # its name; openwebtext and pysrc know their text ('': after its source, or openwebtext)
data_files = ''       # files of text, json, jsonl or parquet, or folders of them, separated by commas
roots = ''            # files or folders of plain text, whatever their names (pysrc: the library, no tests)
hf_dataset = ''       # a dataset of the Hugging Face hub, or a local folder of the same form
hf_config = ''        # its configuration
text_column = 'text'  # where json, jsonl, parquet and hub datasets keep their text
suffixes = ''         # in folders take only files that end so, separated by commas ('': all text; pysrc: .py)
tokenizer = ''        # bytes or gpt2 ('': gpt2 for hub datasets, bytes for the rest)
separate = True       # <|endoftext|> between documents; False where rows are the lines of one text (WikiText)
val_fraction = -1.0   # share held out (-1: 0.1 of data_files, 0.05 of roots, 0.0005 of a hub dataset)
seed = 2357           # which rows of json, jsonl, parquet and hub datasets are held out
num_proc = 0          # threads that tokenize, and processes that load hub datasets (0: one for each core)
out_dir = ''          # another folder than data/<dataset>
_DEFAULTS = {k: v for k, v in globals().items() if k[0] != '_' and type(v) in (int, float, str, bool)}


class DataError(ValueError):
    """Data that is missing, half made, damaged or not as expected: one line that says what to do."""


def get_tokenizer(name):
    """'bytes' or 'gpt2', with .name .vocab_size .eot .encode .encode_bytes .decode .decode_bytes"""
    if name not in ('bytes', 'gpt2'):
        raise DataError(f'tokenizer {name!r}: expected bytes or gpt2')
    return ByteTokenizer() if name == 'bytes' else GPT2Tokenizer()


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8, 256 is <|endoftext|>, 257-260 are reserved; no text gives these."""
    name, vocab_size, eot = 'bytes', 261, 256

    def encode(self, text):
        return self.encode_bytes(_utf8(text))

    def encode_bytes(self, data):
        return list(data)

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        return b''.join(bytes((i,)) if i < 256 else b'<|endoftext|>' if i == self.eot else b'' for i in ids)


class GPT2Tokenizer(ByteTokenizer):  # GPT-2's byte pairs, by tiktoken
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self):
        try:
            import tiktoken
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as e:  # whatever its downloader raises
            raise DataError(f'gpt2: pip install tiktoken, offline TIKTOKEN_CACHE_DIR: {e!r:.60}') from None

    def decode_bytes(self, ids):
        return self.bpe.decode_bytes([int(i) for i in ids])

    def encode_bytes(self, data):
        text, ids = data.decode('utf-8', 'surrogateescape'), []
        hard = len(data) >= 1_000_000 or len(text) > len(data.decode('utf-8', 'ignore'))
        for part in _HARD.split(text) if hard else [text]:
            if '\udc80' <= part[:1] <= '\udcff':
                ids += [self.bpe.encode_single_token(bytes((b,))) for b in _utf8(part)]
            else:
                ids += self.bpe.encode_ordinary(part)
        return ids


# tiktoken can't take bytes that are not UTF-8, or a million blanks on end: cut as GPT-2's own pattern does.
_HARD = re.compile(r'([\udc80-\udcff]+|(?<!\s)\s{10000,}(?=\s\S))')
# Before an ASCII blank after an ASCII letter, that pattern always starts a token: texts can be cut there.
_CUT = re.compile(rb'(?<=[!-~])(?=[ \n])')


def _utf8(text):
    """UTF-8 of any str: a surrogate of a raw byte (os.fsdecode) gives that byte, another lone one U+FFFD."""
    return re.sub('[\ud800-\udc7f\udd00-\udfff]', '\ufffd', text).encode('utf-8', 'surrogateescape')


class TokenData:
    """One split of a dataset, read in windows of block_size tokens; an epoch is a permutation of them all."""
    def __init__(self, data_dir, split, block_size, seed=1337):
        self.data_dir, self.path, self._epoch = data_dir, os.path.join(data_dir, f'{split}.bin'), None
        self.block_size, self.seed, self.meta = block_size, seed, load_meta(data_dir)
        info, size = self.meta['splits'][split], os.path.isfile(self.path) and os.path.getsize(self.path)
        if size != 2 * info['tokens'] or size < 64 << 20 and sha256_of(self.path) != info.get('sha256'):
            raise DataError(f'{self.path} is damaged, it is not as meta.json says: make it again')
        if not 1 <= block_size < info['tokens']:
            raise DataError(f'block_size {block_size}: expected 1 to {info["tokens"] - 1}, for {self.path}')
        self.tokens = np.memmap(self.path, np.uint16, 'r')
        self.n_windows = (info['tokens'] - 1) // block_size  # - 1: the last target
        self.bytes_per_token = info['bytes'] / info['tokens']

    def batch(self, position, n):
        """Windows position .. position+n-1 of the endless stream of epochs: x, y (n, block_size) int64."""
        windows, T, total = [], self.block_size, self.n_windows
        while len(windows) < n:
            epoch, i = divmod(position + len(windows), total)
            if self._epoch != epoch:
                self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(total)
            windows += self._order[i:i + n - len(windows)].tolist()
        rows = np.stack([self.tokens[w * T:w * T + T + 1] for w in windows]).astype(np.int64)  # (n, T+1)
        if rows.max() >= self.meta['vocab_size']:
            raise DataError(f'{self.path} is damaged, it has a token {rows.max()}: make it again')
        return rows[:, :-1].copy(), rows[:, 1:].copy()


def load_meta(data_dir):
    """meta.json, which carries its own sha256. It names no file: nothing in it leads out of its folder."""
    path, name = os.path.join(data_dir, 'meta.json'), os.path.basename(os.path.abspath(data_dir))
    if not os.path.isfile(path):
        raise DataError(f'dataset {data_dir} is not there, or only half made: first `python prepare.py '
                        f'--dataset={name} --out_dir={data_dir} --data_files=FILES` (openwebtext: no files)')
    with suppress(ValueError, KeyError, TypeError, RecursionError), open(path, 'rb') as file:
        meta = json.loads(file.read(1 << 20))
        numbers = [meta['splits'][split][of] for split in ('train', 'val') for of in ('tokens', 'bytes')]
        if meta['check'] == _check(meta) and {type(n) for n in (*numbers, meta['vocab_size'])} == {int}:
            return meta
    raise DataError(f'{path} is damaged, or not written by prepare.py: make it again')


def _check(meta):
    fields = {k: meta[k] for k in meta if k != 'check'}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_bytes(data_dir, split='val'):
    """The text of a split as bytes, without the tokens between documents."""
    data = TokenData(data_dir, split, 1)
    tok = get_tokenizer(data.meta['tokenizer'])
    ids = data.tokens[data.tokens != tok.eot]
    return ids.astype(np.uint8).tobytes() if tok.name == 'bytes' else tok.decode_bytes(ids)


def compressed_bpb(data_dir, split='val'):
    """{'gzip': ..., 'xz': ...}: bits per byte of general compressors at their strongest, on a split."""
    text = read_bytes(data_dir, split)
    sizes = {'gzip': len(import_module('gzip').compress(text, 9))}
    with suppress(ImportError):  # some builds of Python lack it
        sizes['xz'] = len(import_module('lzma').compress(text, preset=9 | 1 << 31))  # xz -9e
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def ensure_pysrc(data_dir=os.path.join('data', 'pysrc')):
    """meta of Python's standard library as bytes, made if it is not there; all ranks may call this."""
    while True:
        with suppress(BlockingIOError):  # another rank makes it
            return _made(data_dir, {}) or make(dict(dataset='pysrc', out_dir=data_dir))
        time.sleep(0.1)


_NOT_TEXT = (rb'(?P<empty>\Z)|(?P<UTF16>\xff\xfe|\xfe\xff)|(?P<packed>\x28\xb5\x2f\xfd|\x1f\x8b|BZh|\xfd7zXZ|'
             rb'\x04"M\x18|\x1f\x9d|PK\x03\x04|7z\xbc|Rar!|%PDF|.{257}ustar)|(?P<binary>(?!PAR1).*\x00)')


def _open(path):
    if not os.path.isfile(path):  # a pipe is waited for, and cannot be read twice
        raise OSError('no regular file, or an empty folder' if os.path.exists(path) else 'it is not there')
    module = {'.gz': 'gzip', '.bz2': 'bz2', '.xz': 'lzma'}.get(os.path.splitext(path.lower())[1])
    return import_module(module).open(path) if module else open(path, 'rb')


def _find(paths, suffixes, library):
    """{sha256: (path, name)} of text files in order; what is left out of folders is counted and named."""
    tests = r'|(idle_)?tests?|(site|dist)-packages' if library else ''
    hidden = re.compile(rf'(^|[/\\])(\.|(__pycache__{tests})[/\\])')
    unfit = re.compile(_NOT_TEXT + (rb'|(?P<generated>.{,291}generated)' if library else b''), re.S)
    found, files, suffixes = {}, {}, '.py' if library else tuple(suffixes.split(','))
    for given in paths:
        walk = sorted(os.walk(given), key=lambda folder: folder[0].split(os.sep))
        inside = [os.path.join(folder, name) for folder, _, names in walk for name in sorted(names)]
        for path in inside or [given]:
            name = os.path.relpath(path, given if inside else os.path.dirname(given))
            why = 'hidden or of another kind'
            try:
                if not inside or not hidden.search(name) and name.endswith(suffixes):
                    with _open(path) as file:
                        why = getattr(unfit.match(file.read(4096)), 'lastgroup', '')
            except Exception as e:  # whatever the libraries for these formats raise
                why = 'unreadable' if inside else e
            if why not in ('', 'empty') and not inside:
                raise DataError(f'{path!r} ({why}): expected a folder or UTF-8 text: convert or unpack it')
            if not why and found.setdefault(sha256_of(path), (path, name))[0] != path:
                why = 'repeated'
            files.setdefault(why or 'taken', []).append(path)
    for why, them in files.items() if not library else ():
        print(f'{why}: {len(them):,} files, such as {", ".join(map(repr, them[:3]))}')
    return found


def _rows(path, column):
    """The rows of a file, as dicts; a text file (where there is no column, any file) is one row."""
    match = column and re.search(r'\.(jsonl?|ndjson|csv|tsv|parquet)(\.(gz|bz2|xz))?$', path.lower())
    with _open(path) as file:
        if not match:
            yield {column: np.memmap(path, np.uint8, 'r') if hasattr(file, 'raw') else file.read()}
        elif match[1] == 'parquet':
            import pyarrow.parquet
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
                yield from batch.to_pylist()
        else:
            for line in file:
                rows = json.loads(line + file.read() if line[:1] == b'[' else line.strip() or b'[]')
                yield from rows if isinstance(rows, list) else [rows]


def _texts(rows, column, where):
    """The text of every row as bytes."""
    number, row = 0, 'nothing read'
    try:
        for number, row in enumerate(rows, 1):
            text = b'' if row[column] is None else row[column]
            yield _utf8(text) if isinstance(text, str) else memoryview(text)
    except Exception as e:  # whatever the libraries for these formats raise
        found = f'pip install {e.name}' if isinstance(e, ImportError) else f'{e!r:.200}, {row!r:.200}'
        raise DataError(f'{where}, near row {number}: {found}: expected json or parquet with text in column '
                        f'{column!r}, or --roots= in place of --data_files= for plain text') from None


def _split(documents, config, names=()):
    """{split: documents}: val_fraction of the bytes is held out, whatever the sizes. Whole documents as they
    fit, files in the order of hashes of their names, rows by the seed, then the end of the largest one."""
    sizes = np.fromiter(map(len, documents()), np.int64)
    print(f'{len(sizes):,} documents ({np.count_nonzero(sizes == 0):,} empty) of {sizes.sum() / 1e6:,.1f} MB')
    order = np.random.default_rng(config['seed']).permutation(len(sizes))
    name_hash = lambda i: hashlib.sha256(os.fsencode(names[i])).digest()
    cuts, room = sizes.copy(), config['val_fraction'] * int(sizes.sum())
    enough = 0.1 * room
    for i in sorted(order, key=name_hash) if len(names) == len(sizes) else order:
        if enough < room >= sizes[i]:
            cuts[i], room = 0, room - sizes[i]
    if room > enough:
        cuts[cuts.argmax()] -= np.ceil(room)
    start = lambda text, i: i and re.compile(rb'[^\x80-\xbf]|\Z').search(text, i).start()  # of a character
    return {'train': (text[:start(text, cut)] for text, cut in zip(documents(), cuts.tolist())),
            'val': (text[start(text, cut):] for text, cut in zip(documents(), cuts.tolist()))}


def _hub(config):
    """{split: documents} of a Hugging Face dataset."""
    name, n = config['hf_dataset'], config['num_proc'] or os.cpu_count()
    try:
        import datasets
        splits = datasets.load_dataset(name, config['hf_config'] or None, num_proc=n)
        train, val = splits['train'], splits.get('validation')
    except Exception as e:  # whatever it raises
        raise DataError(f'cannot load {name} with datasets (pip install datasets): {e!r}') from None
    texts = lambda rows: _texts(rows, config['text_column'], name)
    return {'train': texts(train), 'val': texts(val)} if val else _split(lambda: texts(train), config)


def make(config):
    """Prepare the dataset that these knobs describe and return its meta."""
    config = {**_DEFAULTS, **config}
    given = [config[k] for k in ('data_files', 'roots', 'hf_dataset') if config[k]]
    if len(given) > 1 or not given and config['dataset'] not in ('', 'openwebtext', 'pysrc'):
        raise DataError(f'dataset {config["dataset"]!r}: use one of --data_files=, --roots=, --hf_dataset=')
    if not given and config['dataset'] != 'pysrc':
        config.update(dataset='openwebtext', hf_dataset='Skylion007/openwebtext')  # needs no script
    paths = given if os.path.exists(''.join(given)) else [p for p in ''.join(given).split(',') if p] or given
    name = config['dataset'] or os.path.basename(os.path.abspath(paths[0])).strip('.').partition('.')[0]
    hub, column = config['hf_dataset'], config['data_files'] and config['text_column']
    if config['val_fraction'] == -1:
        config['val_fraction'] = 0.0005 if hub else 0.1 if config['data_files'] else 0.05
    config.update(dataset=name, tokenizer=config['tokenizer'] or ('gpt2' if hub else 'bytes'))
    recipe = {k: config[k] for k in _DEFAULTS if k not in ('num_proc', 'out_dir')}  # what changes tokens
    files = {} if hub else _find(paths or [os.path.dirname(os.__file__)], config['suffixes'], not given)
    recipe['source'] = _check({digest: name for digest, (_, name) in files.items()})
    texts = lambda: (text for path, _ in files.values() for text in _texts(_rows(path, column), column, path))
    documents = lambda: _hub(config) if hub else _split(texts, config, [name for _, name in files.values()])
    return make_from(documents, config['out_dir'] or os.path.join('data', name), config['tokenizer'], recipe,
                     config['separate'], config['num_proc'])


def make_from(documents, out_dir, tokenizer, recipe, separate=True, num_proc=0):
    """Make a dataset of {'train': documents, 'val': documents}, iterables of str or bytes, or a function that
    gives it; return its meta. One that is there, whole and of the same recipe, is kept as it is."""
    tok, n_threads, splits = get_tokenizer(tokenizer), num_proc or os.cpu_count(), {}
    recipe, new = {**recipe, 'tokenizer': tokenizer, 'separate': separate}, f'{out_dir}/unfinished'

    def write(file):
        info, pieces = splits[split], _pieces(documents[split])
        with ThreadPoolExecutor(n_threads) as pool:  # tiktoken frees the interpreter's lock
            while batch := list(itertools.islice(pieces, 8 * n_threads)):  # not all of them: for memory
                for (text, first), ids in zip(batch, pool.map(lambda p: tok.encode_bytes(p[0]), batch)):
                    between = [tok.eot] if separate and first and info['documents'] else []
                    file.write(np.array(between + ids, np.uint16))
                    info['documents'] += first
                    info['bytes'] += len(text)
        info['tokens'] = file.tell() // 2
        if info['tokens'] < 2:
            raise DataError(f'{info["bytes"]} bytes of text in {split}: give more, or another val_fraction')

    lock_folder(out_dir)
    try:
        if not (meta := _made(out_dir, recipe)):
            os.makedirs(new, exist_ok=True)
            documents = documents() if callable(documents) else documents
            for split in ('train', 'val'):
                splits[split] = {'bytes': 0, 'documents': 0}
                splits[split]['sha256'] = write_whole(os.path.join(new, split), write)
            meta = {'tokenizer': tokenizer, 'vocab_size': tok.vocab_size, 'dtype': 'uint16', 'splits': splits,
                    'recipe': recipe, 'python': sys.version.split()[0], 'time': time.strftime('%F %T')}
            meta['check'] = _check(meta)
            with suppress(FileNotFoundError):
                os.remove(os.path.join(out_dir, 'meta.json'))
            for split in splits:
                os.replace(os.path.join(new, split), os.path.join(out_dir, f'{split}.bin'))
            write_whole(f'{out_dir}/meta.json', lambda file: file.write(json.dumps(meta, indent=1).encode()))
        for split, info in meta['splits'].items():
            print(f'{out_dir}/{split}.bin: {info["tokens"]:,} tokens of {info["bytes"]:,} bytes of text')
        return meta
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(locks.pop(out_dir))  # others may wait for it


def _made(data_dir, recipe):
    """meta of a dataset that is whole, and was made by this recipe of the text as it is now; or None."""
    try:
        meta = load_meta(data_dir)
        digests = [sha256_of(os.path.join(data_dir, f'{split}.bin')) for split in meta['splits']]
    except (DataError, OSError):
        return None
    intact = digests == [info['sha256'] for info in meta['splits'].values()]
    old = {'source': recipe.get('source'), **meta.get('recipe', {})}  # the first edition knew no source
    differs = [key for key in recipe if old.get(key) != recipe[key]]
    if differs and differs != ['source']:
        raise DataError(f'{data_dir} is there, of another {" and ".join(differs)}: use another --dataset')
    why = 'its source has changed' if intact else 'it is damaged'
    return meta if intact and not differs else print(f'{data_dir} is made anew: {why}')


def _pieces(documents, limit=900_000):
    """(text, whether it starts a document): of limited size, so memory does not depend on a document's."""
    for document in documents:
        text, start = _utf8(document) if isinstance(document, str) else document, 0
        while start < len(text):
            cut = _CUT.search(text, start + limit)
            end = cut.end() if cut else len(text)
            yield bytes(text[start:end]), start == 0
            start = end


if __name__ == '__main__':
    config = configure(globals())
    require(config, num_proc=(0, 1 << 10), val_fraction=(-1, 1))
    try:
        make(config)
    except (DataError, OSError) as e:
        die(f'no dataset is made: {e}', 2 if isinstance(e, DataError) else 1)
    except KeyboardInterrupt:
        die('interrupted: no dataset is made', 130)
