"""Text to tokens on disk, the tokenizers, and reading batches back.

    python prepare.py                                  # OpenWebText, GPT-2 tokens: hours, 84 GB of disk
    python prepare.py --dataset=pysrc                  # Python's standard library, bytes: a second, no download
    python prepare.py --dataset=code --roots=src,/usr/include --suffixes=.py,.h
    python prepare.py --dataset=books --data_files=books.txt,more/ --tokenizer=gpt2
    python prepare.py --dataset=notes --data_files=notes.jsonl.gz --text_column=body
    python prepare.py --hf_dataset=Salesforce/wikitext --hf_config=wikitext-103-raw-v1 --separate=False
    python prepare.py --hf_dataset=HuggingFaceFW/fineweb-edu --hf_config=sample-10BT

make data/<dataset>/{train,val}.bin (uint16 tokens) and, last, meta.json, without which a folder is not a dataset.
The same command again checks every byte, and makes anew what is damaged or whose files have changed.
"""
import csv
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from configurator import configure, die, lock_folder, require, sha256_of, write_whole

# ---- knobs
dataset = ''          # its name; openwebtext and pysrc know their text ('': named after its source, or openwebtext)
data_files = ''       # files of text, json, jsonl, csv, tsv or parquet, or folders of them, separated by commas
roots = ''            # files or folders of plain text whatever their names, such as sources (pysrc: the library)
hf_dataset = ''       # a dataset of the Hugging Face hub, or a local folder of the same form
hf_config = ''        # its configuration
text_column = 'text'  # where json, jsonl, csv, tsv, parquet and hub datasets keep their text
suffixes = ''         # in folders take only files that end so, separated by commas ('': all of text; pysrc: .py)
tokenizer = ''        # bytes or gpt2 ('': gpt2 for hub datasets, bytes for the rest)
separate = True       # <|endoftext|> between documents; False where rows are the lines of one text (WikiText)
val_fraction = -1.0   # share held out (-1: 0.1 of data_files, 0.05 of roots, 0.0005 of hub data without validation)
seed = 2357           # which rows of json, jsonl, csv, tsv, parquet and hub datasets are held out
num_proc = 0          # threads that tokenize, and processes that load hub datasets (0: one for each core)
out_dir = ''          # another folder than data/<dataset>
# ----
_DEFAULTS = {k: v for k, v in globals().items() if not k.startswith('_') and type(v) in (int, float, str, bool)}
_MB = 1 << 20


class DataError(ValueError):
    """Data that is missing, half made, damaged or not as expected: one line that says what to do."""


def _library(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f'{name} is not installed: pip install {name.partition(".")[0]}') from None


# ---- tokenizers
def get_tokenizer(name):
    """'bytes' or 'gpt2', with .name .vocab_size .eot .encode .encode_bytes .decode .decode_bytes"""
    if name not in ('bytes', 'gpt2'):
        raise DataError(f'tokenizer {name!r}: expected bytes or gpt2')
    return ByteTokenizer() if name == 'bytes' else GPT2Tokenizer()


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8, 256 is <|endoftext|>, 257-260 are reserved. Text never gives a special id."""
    name, vocab_size, eot = 'bytes', 261, 256

    def encode(self, text):
        return self.encode_bytes(_utf8(text))

    def encode_bytes(self, data):
        return list(data)

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise DataError(f'tokens {min(ids)} to {max(ids)}: expected 0 to {self.vocab_size - 1} ({self.name})')
        return self._join(ids)

    def _join(self, ids):
        return b''.join(bytes((i,)) if i < 256 else b'<|endoftext|>' * (i == self.eot) for i in ids)


class GPT2Tokenizer(ByteTokenizer):
    """GPT-2's BPE, by tiktoken."""
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self):
        tiktoken = _library('tiktoken')
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as e:  # whatever its downloader raises
            raise OSError(f"cannot download GPT-2's vocabulary ({type(e).__name__}): offline, set "
                          'TIKTOKEN_CACHE_DIR to a folder that has it') from None

    def encode_bytes(self, data):
        ids = []
        for part in _HARD.split(data.decode('utf-8', 'surrogateescape')):
            if '\udc80' <= part[:1] <= '\udcff':
                ids += [self.bpe.encode_single_token(bytes((b,))) for b in _utf8(part)]
            else:
                ids += self.bpe.encode_ordinary(part)
        return ids

    def _join(self, ids):
        return self.bpe.decode_bytes(ids)


# What tiktoken can't take: bytes that are not UTF-8, and white space so long that its regex overflows the stack
# (about 1,000,000 characters). Such a run is cut where GPT-2's own pattern ends it, before its last character.
_HARD = re.compile(r'([\udc80-\udcff]+|(?<!\s)\s{10000,}(?=\s\S))')
# Before an ASCII blank that follows no white space, that pattern always starts a token: texts can be cut there.
_CUT = re.compile(rb'(?<=[!-~])(?=[ \n])')


def _utf8(text):
    """UTF-8 of any str: a surrogate of a raw byte (os.fsdecode) gives that byte, other lone surrogates U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub('[\ud800-\udc7f\udd00-\udfff]', '\ufffd', text).encode('utf-8', 'surrogateescape')


# ---- reading back
class TokenData:
    """One split of a dataset, read in windows of block_size tokens; an epoch is a permutation of all of them."""

    def __init__(self, data_dir, split, block_size, seed=1337):
        self.data_dir, self.split, self.block_size, self.seed = data_dir, split, block_size, seed
        self.meta, self.path, self._epoch = load_meta(data_dir), os.path.join(data_dir, f'{split}.bin'), None
        if split not in self.meta['splits']:
            raise DataError(f'split {split!r}: expected train or val')
        info = self.meta['splits'][split]
        size = os.path.getsize(self.path) if os.path.isfile(self.path) else 0
        if size != 2 * info['tokens']:
            raise DataError(f'{self.path} has {size} bytes, expected {2 * info["tokens"]}: {_remake(data_dir)}')
        if not 1 <= block_size < info['tokens'] or seed < 0:
            raise DataError(f'block_size {block_size}, seed {seed}: expected at least 1 and 0, and that {self.path} '
                            f'({info["tokens"]} tokens) is longer than a block')
        self.tokens = np.memmap(self.path, np.uint16, 'r')
        self.n_windows = (info['tokens'] - 1) // block_size  # - 1: the last target
        self.bytes_per_token = info['bytes'] / info['tokens']
        if size < 64 * _MB:  # so cheap that it is always done
            self.verify()

    def verify(self):
        """Compare every byte with the sha256 in meta.json, every token with the vocabulary."""
        if sha256_of(self.path) != self.meta['splits'][self.split]['sha256']:
            raise DataError(f'{self.path} is damaged (its sha256 is not as in meta.json): {_remake(self.data_dir)}')
        self._check_tokens(self.tokens)

    def _check_tokens(self, tokens):
        most, vocab_size = tokens.max(), self.meta['vocab_size']
        if most >= vocab_size:
            raise DataError(f'{self.path} has token {most}, expected less than {vocab_size}: {_remake(self.data_dir)}')

    def batch(self, position, n):
        """Windows position .. position+n-1 of the endless stream of epochs: x, y (n, block_size) int64."""
        windows = []
        while len(windows) < n:
            epoch, i = divmod(position + len(windows), self.n_windows)
            if self._epoch != epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.n_windows)
                self._epoch, self._order = epoch, order
            windows += self._order[i:i + n - len(windows)].tolist()
        T = self.block_size
        rows = np.stack([self.tokens[w * T:w * T + T + 1] for w in windows]).astype(np.int64)  # (n, T+1)
        self._check_tokens(rows)
        return rows[:, :-1].copy(), rows[:, 1:].copy()


def load_meta(data_dir):
    """meta.json, which carries its own sha256. It names no file: nothing in it leads out of its folder."""
    path = os.path.join(data_dir, 'meta.json')
    try:
        with open(path, 'rb') as f:
            meta = json.loads(f.read(_MB))
        if meta['check'] == _check(meta):
            return meta
    except (FileNotFoundError, NotADirectoryError):
        made = 'only half made' if os.path.exists(os.path.join(data_dir, 'train.bin')) else 'not there'
        raise DataError(f'dataset {data_dir} is {made}: {_remake(data_dir)}') from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise DataError(f'{path} is damaged, or not written by prepare.py: {_remake(data_dir)}')


def _check(meta):
    fields = {k: meta[k] for k in meta if k != 'check'}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _remake(data_dir):
    name = os.path.basename(os.path.abspath(data_dir))
    source = '' if name in ('pysrc', 'openwebtext') else ' --data_files=FILE_OR_FOLDER'
    return f'make it with `python prepare.py --dataset={name}{source} --out_dir={data_dir}`'


def read_bytes(data_dir, split='val'):
    """The text of a split as bytes, without the tokens between documents."""
    data = TokenData(data_dir, split, 1)
    tok = get_tokenizer(data.meta['tokenizer'])
    ids = data.tokens[data.tokens != tok.eot]
    return ids.astype(np.uint8).tobytes() if tok.name == 'bytes' else tok.decode_bytes(ids)


def compressed_bpb(data_dir, split='val'):
    """{'gzip': ..., 'xz': ...}: bits per byte of general compressors, at their strongest, on the text of a split."""
    text = read_bytes(data_dir, split)
    sizes = {'gzip': len(gzip.compress(text, 9))}
    with suppress(ImportError):  # some builds of Python lack it
        import lzma
        sizes['xz'] = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def ensure_pysrc(data_dir=os.path.join('data', 'pysrc')):
    """meta of Python's standard library as bytes, made in a second unless it is there; any number of ranks may call."""
    while True:
        try:
            return _made(data_dir, {}) or make(dict(dataset='pysrc', out_dir=data_dir))
        except BlockingIOError:  # another rank makes it
            time.sleep(0.1)


def _made(data_dir, recipe):
    """meta of a dataset that is whole, and was made by this recipe of the text as it is now; or None."""
    try:
        for split in ('train', 'val'):
            data = TokenData(data_dir, split, 1)
            data.verify()
    except DataError:
        return None
    old = {'source': recipe.get('source'), **data.meta.get('recipe', {})}  # the first edition knew no source
    differs = [key for key in recipe if old.get(key) != recipe[key]]
    if differs == ['source']:
        return print(f'{data_dir} is made anew: its source has changed')
    if differs:
        raise DataError(f'{data_dir} is there, made with another {" and ".join(differs)}: expected another --dataset')
    return data.meta


# ---- sources
_NOT_TEXT = re.compile(rb'(?P<empty>\Z)|(?P<UTF16>\xff\xfe|\xfe\xff)|(?P<PDF>%PDF)|(?P<compressed>\x28\xb5\x2f\xfd|\x1f\x8b|'
                       rb'BZh|\xfd7zXZ|PK\x03\x04|7z\xbc|Rar!|.{257}ustar)|(?P<binary>(?!PAR1).*\x00)', re.S)
_HIDDEN, _TESTS = re.compile(r'(^|[/\\])(\.|__pycache__)'), re.compile(r'(^|[/\\])((idle_)?tests?|[a-z]+-packages)[/\\]')


def _open(path):
    module = {'.gz': 'gzip', '.bz2': 'bz2', '.xz': 'lzma'}.get(os.path.splitext(path)[1])
    return importlib.import_module(module).open(path) if module else open(path, 'rb')


def _find(paths, suffixes, library):
    """{sha256: (path, name)} of files of text; what is left out of folders is counted and named. Of the library, tests
    and generated tables are left out too: they are so alike that they would stand on both sides of the split."""
    found, left_out = {}, {}
    for given in paths:
        walk = sorted(os.walk(given), key=lambda folder: folder[0].split(os.sep))
        for path in [os.path.join(folder, name) for folder, _, names in walk for name in sorted(names)] or [given]:
            name, why = os.path.relpath(path, given if walk else os.path.dirname(given)), ''
            if walk and _HIDDEN.search(name) or library and _TESTS.search(name):
                why = 'hidden'
            elif walk and not name.endswith(suffixes):
                why = 'of another suffix'
            elif not os.path.isfile(path):
                why = 'not a file'
            else:
                try:
                    with _open(path) as file:
                        head = file.read(4096)
                    match, digest = _NOT_TEXT.match(head), sha256_of(path)
                    why = match.lastgroup if match else 'repeated' if digest in found else ''
                    why = 'generated' if library and b'generated' in head[:300] else why
                except (OSError, EOFError):
                    why = 'unreadable'
            if not walk and why not in ('', 'empty', 'repeated', 'binary'):
                raise DataError(f'{path!r} ({why}): expected a folder or UTF-8 text: convert or unpack it first')
            if why and (walk or why != 'binary'):
                left_out.setdefault(why, []).append(path)
            else:
                found[digest] = path, name
    for why, them in left_out.items() if not library else ():
        print(f'left out ({why}): {len(them):,}, such as {", ".join(map(repr, them[:3]))}')
    return found


def _rows(path, column):
    """The rows of a file, as dicts; a text file (where there is no column, any file) is one row."""
    match = column and re.search(r'\.(jsonl?|ndjson|csv|tsv|parquet)(\.(gz|bz2|xz))?$', path)
    with _open(path) as file:
        if not match:
            yield {column: np.memmap(path, np.uint8, 'r').data if type(file) is io.BufferedReader else file.read()}
        elif match[1] == 'parquet':
            for batch in _library('pyarrow.parquet').ParquetFile(file).iter_batches(1000):
                yield from batch.to_pylist()
        else:
            lines = io.TextIOWrapper(file, 'utf-8-sig', 'surrogateescape', newline='')
            csv.field_size_limit(1 << 30)
            first = '' if match[1] in ('csv', 'tsv') else lines.readline()
            if not first:
                yield from csv.DictReader(lines, delimiter=',' if match[1] == 'csv' else '\t')
            elif first.lstrip().startswith('['):
                yield from json.loads(first + lines.read())
            else:  # an object a line
                yield from (json.loads(line) for line in itertools.chain([first], lines) if line.strip())


def _texts(rows, column, where):
    """The text of every row as bytes. A row may lack it, but the first one must know the column."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            text = row.get(column, '' if number > 1 else row) or ''
            if not isinstance(text, (str, bytes, memoryview)):
                columns = [name for name, value in row.items() if isinstance(value, str)]
                raise ValueError(f'no text in column {column!r}, but in {columns}')
            yield _utf8(text) if isinstance(text, str) else text
    except Exception as e:  # whatever the libraries for these formats raise
        line = (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(f'{where}, row {number}: {line}: expected rows with text in --text_column') from None


def _split(documents, config, names=()):
    """{split: documents}: val_fraction of the bytes is held out, whatever their sizes. Whole documents, while they fit:
    files in the order of hashes of their names, so that a new file moves few others, rows in an order that the seed
    gives. What is still missing is the end of the largest document."""
    sizes = np.fromiter(map(len, documents()), np.int64)
    order = np.random.default_rng(config['seed']).permutation(len(sizes))
    if len(names) == len(sizes):
        order = sorted(order, key=lambda i: hashlib.sha256(os.fsencode(names[i])).digest())
    cuts, room = sizes.copy(), config['val_fraction'] * int(sizes.sum())
    enough = 0.1 * room
    for i in order:
        if enough < room >= sizes[i]:
            cuts[i] = 0
            room -= sizes[i]
    if room > enough:
        cuts[cuts.argmax()] -= np.ceil(room)
    print(f'{len(sizes):,} documents ({np.count_nonzero(sizes == 0):,} of them empty) of {sizes.sum() / 1e6:,.0f} MB; '
          f'{shutil.disk_usage(config["out_dir"]).free / 1e6:,.0f} MB of disk are free, and it takes up to twice the text')

    def part(split):
        for text, cut in zip(documents(), cuts.tolist()):
            cut = cut and re.compile(rb'[^\x80-\xbf]|\Z').search(text, cut).start()  # not inside a character
            yield text[:cut] if split == 'train' else text[cut:]
    return {split: part(split) for split in ('train', 'val')}


def _hub(config):
    """{split: documents} of a Hugging Face dataset."""
    datasets, name, column = _library('datasets'), config['hf_dataset'], config['text_column']
    datasets.logging.set_verbosity_error()
    try:
        splits = datasets.load_dataset(name, config['hf_config'] or None, num_proc=config['num_proc'] or os.cpu_count())
    except Exception as e:  # whatever it raises
        raise DataError(f'cannot load {name}: {(str(e).splitlines() or [type(e).__name__])[0]}') from None
    train = splits['train'] if 'train' in splits else next(iter(splits.values()))
    if 'validation' not in splits:
        return _split(lambda: _texts(train, column, name), config)
    return {'train': _texts(train, column, name), 'val': _texts(splits['validation'], column, name)}


# ---- making
def make(config):
    """Prepare the dataset that these knobs describe and return its meta."""
    config = dict(_DEFAULTS, **config)
    if not any(config[k] for k in ('data_files', 'roots', 'hf_dataset')) and config['dataset'] in ('', 'openwebtext'):
        config.update(dataset='openwebtext', hf_dataset='Skylion007/openwebtext')  # a copy that needs no script
    given = [config[k] for k in ('data_files', 'roots', 'hf_dataset') if config[k]]
    if len(given) != (config['dataset'] != 'pysrc'):
        raise DataError(f'dataset {config["dataset"]!r} from {" and ".join(given) or "nothing"}: expected one of '
                        '--data_files=, --roots= and --hf_dataset= (only openwebtext and pysrc know their text)')
    paths = given if not given or os.path.exists(given[0]) else [path for path in given[0].split(',') if path]
    hub, column = config['hf_dataset'], config['data_files'] and config['text_column']
    name = config['dataset'] or os.path.basename(os.path.abspath(paths[0])).strip('.').partition('.')[0] or 'text'
    fraction = 0.0005 if hub else 0.1 if config['data_files'] else 0.05
    config.update(dataset=name, tokenizer=config['tokenizer'] or ('gpt2' if hub else 'bytes'),
                  val_fraction=fraction if config['val_fraction'] == -1 else config['val_fraction'],
                  out_dir=config['out_dir'] or os.path.join('data', name))
    recipe = {k: config[k] for k in _DEFAULTS if k not in ('num_proc', 'out_dir')}  # what changes tokens
    suffixes = tuple((config['suffixes'] if paths else '.py').split(','))
    files = {} if hub else _find(paths or [sysconfig.get_path('stdlib')], suffixes, library=not paths)
    recipe['source'] = _check({name: digest for digest, (_, name) in files.items()})
    texts = lambda: (text for path, _ in files.values() for text in _texts(_rows(path, column), column, path))
    documents = lambda: _hub(config) if hub else _split(texts, config, [name for _, name in files.values()])
    meta = make_from(documents, config['out_dir'], config['tokenizer'], recipe, config['separate'], config['num_proc'])
    for split, info in meta['splits'].items():
        print(f'{config["out_dir"]}/{split}.bin: {info["tokens"]:,} tokens ({config["tokenizer"]}) of {info["bytes"]:,} '
              f'bytes of text in {info["documents"]:,} documents')
    return meta


def make_from(documents, out_dir, tokenizer, recipe, separate=True, num_proc=0):
    """Make a dataset of {'train': documents, 'val': documents}, iterables of str or bytes, or a function that gives
    them, and return its meta. A whole one of the same recipe (a dict that JSON can hold) is kept as it is; any other
    stays until the new one is complete."""
    tok, n_threads, splits = get_tokenizer(tokenizer), num_proc or os.cpu_count(), {}
    recipe, new = {**recipe, 'tokenizer': tokenizer, 'separate': separate}, os.path.join(out_dir, 'unfinished')

    def encode(piece):
        return np.array(np.frombuffer(piece[0], np.uint8) if tokenizer == 'bytes' else tok.encode_bytes(piece[0]), np.uint16)

    def write(file):
        info, pieces = {'bytes': 0, 'documents': 0}, _pieces(documents[split])
        with ThreadPoolExecutor(n_threads) as pool:  # tiktoken frees the interpreter's lock
            while batch := list(itertools.islice(pieces, 16 * n_threads)):  # not all at once: memory stays small
                for (text, first), ids in zip(batch, pool.map(encode, batch)):
                    if separate and first and info['documents']:
                        file.write(np.uint16(tok.eot))
                    file.write(ids)
                    info['documents'] += first
                    info['bytes'] += len(text)
                if sys.stderr.isatty():
                    print(f'\r{split}: {info["bytes"] / 1e6:,.0f} MB', end='\r', file=sys.stderr)
        splits[split] = {**info, 'tokens': file.tell() // 2}
        if file.tell() < 4:
            raise DataError(f'{info["bytes"]} bytes of text in {split}: expected more, for two splits')

    lock_folder(out_dir)
    try:
        if meta := _made(out_dir, recipe):
            return meta
        shutil.rmtree(new, ignore_errors=True)  # of a killed one
        os.mkdir(new)
        documents = documents() if callable(documents) else documents
        for split in ('train', 'val'):
            digest = write_whole(os.path.join(new, f'{split}.bin'), write)
            splits[split]['sha256'] = digest
        meta = {'tokenizer': tokenizer, 'vocab_size': tok.vocab_size, 'dtype': 'uint16', 'splits': splits,
                'recipe': recipe, 'python': sys.version.split()[0], 'time': time.strftime('%Y-%m-%d %H:%M:%S')}
        text = json.dumps({**meta, 'check': _check(meta)}, indent=1).encode()
        with suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, 'meta.json'))
        for name in os.listdir(new):
            os.replace(os.path.join(new, name), os.path.join(out_dir, name))
        write_whole(os.path.join(out_dir, 'meta.json'), lambda file: file.write(text))
        return load_meta(out_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        lock_folder.held.pop(out_dir).close()


def _pieces(documents):
    """(text, whether it starts a document): of about 1 MB, so memory does not depend on the size of a document."""
    for document in documents:
        text, start = _utf8(document) if isinstance(document, str) else document, 0
        while start < len(text):
            cut = _CUT.search(text, start + _MB)
            end = cut.end() if cut else len(text)
            yield bytes(text[start:end]), start == 0
            start = end


if __name__ == '__main__':
    config = configure(globals())
    require(config, num_proc=(0, 1 << 10), seed=(0, 1 << 62))
    try:
        make(config)
    except DataError as e:
        die(e)
    except OSError as e:
        die(f'no dataset is made: {e}', 1)
    except KeyboardInterrupt:
        die('interrupted: no dataset is made', 130)
