"""Text to tokens on disk, the tokenizers, and reading batches back.

    python prepare.py                                  # OpenWebText, GPT-2 tokens: hours, 84 GB of disk
    python prepare.py --dataset=pysrc                  # Python's standard library, bytes: a second, no download
    python prepare.py --dataset=code --roots=src,/usr/include --suffixes=.py,.h
    python prepare.py --dataset=books --data_files=books.txt,more/ --tokenizer=gpt2
    python prepare.py --dataset=notes --data_files=notes.jsonl --text_column=body
    python prepare.py --hf_dataset=Salesforce/wikitext --hf_config=wikitext-103-raw-v1 --separate=False
    python prepare.py --hf_dataset=HuggingFaceFW/fineweb-edu --hf_config=sample-10BT

make data/<dataset>/{train,val}.bin (uint16 tokens) and, last, meta.json, without which a folder is not a dataset.
The same command again checks every byte of what is there, and makes it anew only when it is damaged.
"""
import concurrent.futures
import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import mmap
import multiprocessing as mp
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time

import numpy as np

# ---- knobs
dataset = ''          # its name; openwebtext and pysrc know their text ('': named after its source, or openwebtext)
data_files = ''       # files of text, json, jsonl or parquet, or folders of them, separated by commas
roots = ''            # folders of source files, separated by commas (pysrc: the standard library)
hf_dataset = ''       # a dataset of the Hugging Face hub, or a local folder of the same form
hf_config = ''        # its configuration
text_column = 'text'  # where json, jsonl, parquet and hub datasets keep their text
suffixes = ''         # in folders take only files that end so, separated by commas ('': every text file; pysrc: .py)
tokenizer = ''        # bytes or gpt2 ('': gpt2 for hub datasets, bytes for the rest)
separate = True       # <|endoftext|> between documents; False where rows are the lines of one text (WikiText)
val_fraction = -1.0   # share held out (-1: 0.1 of data_files, 0.05 of sources, 0.0005 of hub data without validation)
seed = 2357           # which rows of json, jsonl, parquet and hub datasets are held out
num_proc = 0          # processes (0: all cores)
out_dir = ''          # another folder than data/<dataset>
check_disk = True     # refuse to start without the space that is needed (False: part of it is already there)
# ----
_DEFAULTS = {k: v for k, v in globals().items() if not k.startswith('_') and type(v) in (int, float, str, bool)}
_VOCAB = {'bytes': 261, 'gpt2': 50257}
_MB = 1 << 20


class DataError(ValueError):
    """Data that is missing, half made, damaged or not as expected: one line that says what to do."""


# ---- tokenizers
def get_tokenizer(name):
    """'bytes' or 'gpt2', with .name .vocab_size .eot .encode .encode_bytes .decode .decode_bytes"""
    if name not in _VOCAB:
        raise DataError(f'tokenizer {name!r}: expected {" or ".join(_VOCAB)}')
    return ByteTokenizer() if name == 'bytes' else GPT2Tokenizer()


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8, 256 is <|endoftext|>, 257-260 are reserved. Text never gives a special id."""
    name, vocab_size, eot = 'bytes', 261, 256

    def encode(self, text):
        return self.encode_bytes(_utf8(text))

    def encode_bytes(self, data):
        return list(data)

    def encode_array(self, data):
        return np.frombuffer(data, np.uint8).astype(np.uint16)

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
        try:
            import tiktoken
            self.bpe = tiktoken.get_encoding('gpt2')
        except ImportError:
            raise DataError('the gpt2 tokenizer needs tiktoken: pip install tiktoken') from None
        except Exception as e:                                  # whatever its downloader raises
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

    def encode_array(self, data):
        return np.array(self.encode_bytes(data), np.uint16)

    def _join(self, ids):
        return self.bpe.decode_bytes(ids)


# What tiktoken can't take: bytes that are not UTF-8, and white space so long that its regex overflows the stack (about
# 1,000,000 characters). Such a run is cut off where GPT-2's own pattern ends it, before its last character.
_HARD = re.compile(r'([\udc80-\udcff]+|(?<!\s)\s{10000,}(?=\s\S))')
# Just before an ASCII blank that follows no white space, that pattern always starts a token: texts can be cut there.
_CUT = re.compile(rb'(?<=[!-~\x80-\xff])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])'
                  rb'(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?=[ \n])')


def _utf8(text):
    """UTF-8 of any str: a surrogate of a raw byte (os.fsdecode) gives that byte, any other lone surrogate U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub('[\ud800-\udc7f\udd00-\udfff]', '\ufffd', text).encode('utf-8', 'surrogateescape')


# ---- reading back
class TokenData:
    """One split of a dataset, read in windows of block_size tokens; an epoch is a permutation of all of them."""

    def __init__(self, data_dir, split, block_size, seed=1337):
        self.data_dir, self.split, self.block_size, self.seed = data_dir, split, block_size, seed
        self.meta, self._epoch = load_meta(data_dir), None
        if split not in self.meta['splits']:
            raise DataError(f'split {split!r}: expected train or val')
        info, self.path = self.meta['splits'][split], os.path.join(data_dir, f'{split}.bin')
        size = os.path.getsize(self.path) if os.path.isfile(self.path) else 0
        if size != 2 * info['tokens']:
            raise DataError(f'{self.path} has {size} bytes, expected {2 * info["tokens"]}: {_remake(data_dir)}')
        if not 1 <= block_size < info['tokens'] or seed < 0:
            raise DataError(f'block_size {block_size}, seed {seed} for {self.path}: expected a block of 1 to '
                            f'{info["tokens"] - 1} tokens and a seed of 0 or more')
        self.tokens = np.memmap(self.path, np.uint16, 'r')
        self.n_windows = (info['tokens'] - 1) // block_size     # - 1: the last target
        self.bytes_per_token = info['bytes'] / info['tokens']
        if size < 64 * _MB:                                     # so cheap that it is always done
            self.verify()

    def verify(self):
        """Compare every byte with the sha256 in meta.json, every token with the vocabulary."""
        if hashlib.sha256(self.tokens).hexdigest() != self.meta['splits'][self.split]['sha256']:
            raise DataError(f'{self.path} is damaged (its sha256 is not as in meta.json): {_remake(self.data_dir)}')
        self._check_tokens(self.tokens)

    def _check_tokens(self, tokens):
        if tokens.max() >= self.meta['vocab_size']:
            raise DataError(f'{self.path} has token {tokens.max()}, expected less than {self.meta["vocab_size"]}: '
                            f'{_remake(self.data_dir)}')

    def batch(self, position, n):
        """Windows position .. position+n-1 of the endless stream of epochs: x, y (n, block_size) int64, y one later."""
        if position < 0 or n < 1:
            raise DataError(f'batch of {n} at position {position}: expected at least 1, at 0 or later')
        windows = []
        while len(windows) < n:
            epoch, i = divmod(position + len(windows), self.n_windows)
            if self._epoch != epoch:
                self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n_windows)
            windows += self._order[i:i + n - len(windows)].tolist()
        T = self.block_size
        rows = np.stack([self.tokens[w * T:w * T + T + 1] for w in windows]).astype(np.int64)        # (n, T+1)
        self._check_tokens(rows)
        return rows[:, :-1].copy(), rows[:, 1:].copy()


def load_meta(data_dir):
    """meta.json, checked. It carries its own sha256, and it names no file, so nothing in it leads out of its folder."""
    path = os.path.join(data_dir, 'meta.json')
    try:
        with open(path, 'rb') as f:
            meta = json.loads(f.read(_MB))
        train, val = meta['splits']['train'], meta['splits']['val']
        intact = meta['check'] == _check(meta) and repr(meta['vocab_size']) == repr(_VOCAB[meta['tokenizer']])
        for info in train, val:
            intact &= isinstance(info['sha256'], str) and all(type(info[k]) is int and 0 < info[k] < 1 << 60
                                                              for k in ('tokens', 'bytes'))
    except (FileNotFoundError, NotADirectoryError):
        made = 'only half made' if os.path.exists(os.path.join(data_dir, 'train.bin')) else 'not there'
        raise DataError(f'dataset {data_dir} is {made}: {_remake(data_dir)}') from None
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f'{path} is damaged, or not written by prepare.py: {_remake(data_dir)}')
    return meta


def _check(meta):
    return hashlib.sha256(json.dumps({k: meta[k] for k in meta if k != 'check'}, sort_keys=True).encode()).hexdigest()


def _remake(data_dir):
    name = os.path.basename(os.path.abspath(data_dir))
    elsewhere = os.path.abspath(data_dir) != os.path.abspath(os.path.join('data', name))
    return (f'make it with `python prepare.py --dataset={name}' + f' --out_dir={data_dir}' * elsewhere + '`'
            + ' and its source (see --help)' * (name not in ('pysrc', 'openwebtext')))


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
    with contextlib.suppress(ImportError):                      # some builds of Python lack it
        import lzma                                             # -9e, with no larger dictionary than the text needs
        room = min(max(4096, len(text)), 1 << 26)
        best = {'id': lzma.FILTER_LZMA2, 'preset': 9 | lzma.PRESET_EXTREME, 'dict_size': room}
        sizes['xz'] = len(lzma.compress(text, filters=[best]))
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def ensure_pysrc(data_dir=os.path.join('data', 'pysrc')):
    """meta of Python's standard library as bytes, made in a second unless it is there; any number of ranks may call."""
    return _made(data_dir) or make(dict(dataset='pysrc', out_dir=data_dir), wait=True)


def _made(data_dir, recipe=None):
    """meta of a dataset that is there and unharmed, and was made by this recipe; None if there is none."""
    try:
        for split in ('train', 'val'):
            data = TokenData(data_dir, split, 1)
            data.verify()
    except DataError:
        return None
    for key, value in (recipe or {}).items():
        if data.meta.get('recipe', {}).get(key) != value:
            raise DataError(f'{data_dir} is there, made with another {key} than {value!r}: expected another --dataset')
    return data.meta


# ---- sources: {split: an iterator over lists of (bytes, whether they start a document)}, and how many bytes in all
def _find(paths, suffixes, library=False):
    """{path: name}, sorted. In folders hidden, binary, empty and repeated files are left out, in the library tests and
    generated tables too (a sixth of it, and so alike that they would stand on both sides of the split)."""
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'} if library else set()
    found, seen = {}, set()
    for given in paths:
        inside = [given] if os.path.isfile(given) else []
        for folder, folders, names in os.walk(given):
            folders[:] = sorted(name for name in folders if name not in skip | {'__pycache__'} and name[0] != '.')
            inside += [os.path.join(folder, name) for name in sorted(names)
                       if name.endswith(tuple(suffixes) or '') and name[0] != '.']
        if not inside:
            raise DataError(f'{given!r}: expected a file, or a folder of {" or ".join(suffixes) or "text"} files')
        for path in inside:
            if os.path.isfile(path) and os.path.getsize(path):
                data = np.memmap(path, np.uint8, 'r')
                digest, head = hashlib.sha256(data).digest(), data[:4096].tobytes()
                text = b'\0' not in head and not (library and b'generated' in head[:300])
                if digest not in seen and (text or path == given or '.parquet' in path):
                    found[path] = os.path.relpath(path, given if path != given else os.path.dirname(path))
                seen.add(digest)
    return found


def _texts(files, fraction):
    """Each file a document. Several are split by file, in the order of hashes of names; of one the end is held out."""
    sizes = {path: os.path.getsize(path) for path in files}
    held, room = set(), fraction * sum(sizes.values())
    for path in sorted(files, key=lambda path: hashlib.sha256(os.fsencode(files[path])).digest()):
        if sizes[path] <= room and room > 0.1 * fraction * sum(sizes.values()):
            held.add(path)
            room -= sizes[path]
    held = held or {min(sizes, key=sizes.get, default='')}
    cut = {path: size * (path not in held) for path, size in sizes.items()}    # train before, val after
    if len(files) == 1:
        cut = {path: _character_offset(path, 1 - fraction) for path in files}
    pieces = {'train': (piece for path in files for piece in _pieces(path, 0, cut[path])),
              'val': (piece for path in files for piece in _pieces(path, cut[path], sizes[path]))}
    return pieces, sum(sizes.values())


def _character_offset(path, share):
    """Where in a UTF-8 file character int(share * characters) starts."""
    data = np.memmap(path, np.uint8, 'r')
    starts = lambda i: data[i:i + _MB] & 0xC0 != 0x80
    counts = np.cumsum([0] + [np.count_nonzero(starts(i)) for i in range(0, len(data), _MB)])
    block = np.searchsorted(counts, int(share * counts[-1]), 'right') - 1
    return int(block * _MB + np.flatnonzero(starts(block * _MB))[int(share * counts[-1]) - counts[block]])


def _pieces(path, start, stop):
    """Of about 1 MB each: memory does not depend on the size of a file, and all processes share it."""
    first = True
    with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while start < stop:
            cut = _CUT.search(data, min(start + _MB, stop), stop)
            end = cut.end() if cut else stop
            yield [(data[start:end], first)]
            start, first = end, False


def _rows(config, files):
    """Each row of json or parquet files, or of a hub dataset, a document."""
    os.environ.setdefault('HF_HUB_VERBOSITY', 'error')
    try:
        import datasets
    except ImportError:
        raise DataError('json, parquet and hub datasets need datasets: pip install datasets') from None
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, kind, column = config['hf_dataset'], config['hf_config'] or None, config['text_column']
    try:
        if files:
            name, size = config['data_files'], 2 * sum(map(os.path.getsize, files))
            kind = 'parquet' if '.parquet' in next(iter(files)) else 'json'
            load = dict(path=kind, data_files={'train': list(files)})
        else:
            info = datasets.load_dataset_builder(name, kind).info
            load, size = dict(path=name, name=kind), (info.download_size or 0) + 1.5 * (info.dataset_size or 0)
        _check_space(config, size, datasets.config.HF_DATASETS_CACHE)
        splits = datasets.load_dataset(num_proc=config['num_proc'] or os.cpu_count(), **load)
    except Exception as e:                                      # whatever datasets raises
        error = DataError if isinstance(e, (FileNotFoundError, ValueError)) else OSError
        raise error(f'cannot load {name}: {(str(e).splitlines() or [type(e).__name__])[0]}') from None
    train = splits['train'] if 'train' in splits else next(iter(splits.values()))
    if not getattr(train.features.get(column), 'dtype', '').endswith('string'):
        raise DataError(f'{column!r} is no column of text: expected --text_column={"|".join(train.column_names)}')
    if 'validation' in splits:
        splits = {'train': train, 'val': splits['validation']}
    else:
        order = np.random.default_rng(config['seed']).permutation(len(train))
        n = max(1, round(config['val_fraction'] * len(train)))
        splits = {'train': train.select(np.sort(order[n:])), 'val': train.select(np.sort(order[:n]))}
    splits = {split: rows.select_columns([column]) for split, rows in splits.items()}
    return {split: _row_pieces(rows, column) for split, rows in splits.items()}, splits['train'].data.nbytes


def _row_pieces(rows, column):
    for i in range(0, len(rows), 1000):
        yield [(_utf8(text), True) for text in rows[i:i + 1000][column] if text]


# ---- making
def make(config, wait=False):
    """Prepare a dataset and return its meta. All is written under temporary names, and meta.json renamed last."""
    config = _resolve(config)
    out_dir, tok = config['out_dir'], get_tokenizer(config['tokenizer'])
    if tok.vocab_size > 65535:
        raise DataError(f'tokenizer {tok.name} has {tok.vocab_size} ids: expected at most 65535, to fit uint16')
    recipe = {k: config[k] for k in _DEFAULTS if k not in ('num_proc', 'out_dir', 'check_disk')}   # what changes tokens
    if _made(out_dir, recipe):
        return load_meta(out_dir)
    source, size = _source(config)
    _check_space(config, size * (2 if tok.name == 'bytes' else 0.5), out_dir)
    files = {name: os.path.join(out_dir, name + '.tmp') for name in ('train.bin', 'val.bin', 'meta.json')}
    processes = config['num_proc'] or (os.cpu_count() if size > 32 * _MB else 1)
    with _lock(os.path.join(out_dir, '.lock'), wait), contextlib.ExitStack() as cleaning:
        if _made(out_dir, recipe):                              # by another process, while this one waited
            return load_meta(out_dir)
        for path in files.values():
            clean = lambda path=path: os.path.lexists(path) and os.unlink(path)
            clean()                                             # of a killed one, or a link that somebody left there
            cleaning.callback(clean)
        run, worker = map, (tok.name, config['separate'])
        if processes > 1:
            pool = concurrent.futures.ProcessPoolExecutor(processes, mp.get_context('spawn'), _start, worker)
            cleaning.callback(pool.shutdown, wait=False, cancel_futures=True)
            run = pool.map
        _start(*worker)
        splits, progress = {}, lambda n_bytes: None
        with contextlib.suppress(ImportError):
            from tqdm import tqdm
            progress = tqdm(total=size, unit='B', unit_scale=True, disable=None).update    # None: only on a terminal
        for split, pieces in source.items():                    # 16 pieces a process at a time: memory stays small
            batches = iter(lambda: list(itertools.islice(pieces, 16 * processes)), [])
            results = (result for batch in batches for result in run(_encode, batch))
            splits[split] = _write(files[f'{split}.bin'], results, config['separate'], progress)
        if min(info['tokens'] for info in splits.values()) < 2:
            raise DataError(f'{size} bytes of text: expected enough for a train and a val split')
        meta = {'tokenizer': tok.name, 'vocab_size': tok.vocab_size, 'dtype': 'uint16', 'splits': splits,
                'recipe': recipe, 'python': sys.version.split()[0], 'time': time.strftime('%Y-%m-%d %H:%M:%S')}
        with open(files['meta.json'], 'w') as f:
            json.dump(dict(meta, check=_check(meta)), f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(out_dir, 'meta.json'))       # a damaged one
        for name, path in files.items():
            os.rename(path, os.path.join(out_dir, name))
    return load_meta(out_dir)


def _resolve(config):
    """The knobs with what '' and -1 stand for."""
    config = dict(_DEFAULTS, **config)
    given = [k for k in ('data_files', 'roots', 'hf_dataset') if config[k]]
    if not config['dataset']:
        source = config[given[0]].split(',')[0].rstrip('/') if given else 'openwebtext'
        config['dataset'] = os.path.basename(source).partition('.')[0]
    if not given and config['dataset'] == 'openwebtext':
        config['hf_dataset'] = 'Skylion007/openwebtext'         # the parquet copy: datasets no longer runs scripts
    elif len(given) > 1 or not given and config['dataset'] != 'pysrc':
        raise DataError(f'dataset {config["dataset"]!r} from {" and ".join(given) or "nothing"}: expected one of '
                        '--data_files=, --roots= and --hf_dataset= (only openwebtext and pysrc know their text)')
    hub, fraction = bool(config['hf_dataset']), config['val_fraction']
    config['tokenizer'] = config['tokenizer'] or ('gpt2' if hub else 'bytes')
    config['val_fraction'] = fraction if fraction != -1 else 0.0005 if hub else 0.1 if config['data_files'] else 0.05
    config['out_dir'] = config['out_dir'] or os.path.join('data', config['dataset'])
    if not (0 < config['val_fraction'] < 1 and config['num_proc'] >= 0 and config['seed'] >= 0):
        raise DataError(f'val_fraction {fraction}, num_proc {config["num_proc"]}, seed {config["seed"]}: expected '
                        'a fraction between 0 and 1, and no negative numbers')
    return config


def _source(config):
    paths = [path for path in (config['data_files'] or config['roots']).split(',') if path]
    suffixes = [suffix for suffix in config['suffixes'].split(',') if suffix]
    if config['hf_dataset']:
        return _rows(config, None)
    if not paths:
        return _texts(_find([sysconfig.get_path('stdlib')], ['.py'], library=True), config['val_fraction'])
    files = _find(paths, suffixes)
    kinds = {(re.findall(r'\.(json|parquet)l?(?:\.\w+)?$', name) or ['text'])[0] for name in files.values()}
    if config['roots'] or kinds <= {'text'}:
        return _texts(files, config['val_fraction'])
    if len(kinds) > 1:
        raise DataError(f'{config["data_files"]!r} mixes {" and ".join(sorted(kinds))}: expected one kind (--suffixes)')
    return _rows(config, files)


def _check_space(config, need, folder):
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    amount = f'{need / 1e6:,.0f} MB' if need else 'an unknown amount'
    print(f'{folder} needs about {amount} of disk ({free / 1e6:,.0f} MB free); memory: 0.5 GB a process')
    if config['check_disk'] and free < need:
        raise OSError(f'{folder} has {free / 1e6:,.0f} MB free: expected {need / 1e6:,.0f} MB, or --check_disk=False')


@contextlib.contextmanager
def _lock(path, wait):
    """One preparer a folder. The kernel ends the lock with its process: a file left by a killed one locks nothing."""
    try:
        import fcntl
    except ImportError:                                         # Windows
        fcntl = None
    with contextlib.ExitStack() as files:
        while True:                                             # until what is locked still has this name: the one
            try:                                                # before removes it, and the folder if it is empty
                os.makedirs(os.path.dirname(path), exist_ok=True)
                f = files.enter_context(open(path, 'a+', errors='replace', opener=lambda path, flags: os.open(
                    path, flags | getattr(os, 'O_NOFOLLOW', 0), 0o666)))                # it is emptied
                if fcntl:
                    fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if not fcntl or os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                    break
            except FileNotFoundError:
                pass
            except BlockingIOError:
                f.seek(0)
                raise OSError(f'it is being prepared by process {f.read(100) or "?"}') from None
            except OSError as e:
                if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                fcntl = None                                    # a file system without locks
        try:
            f.truncate(0)
            f.write(f'{os.getpid()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}')
            f.flush()
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
                os.rmdir(os.path.dirname(path))                 # if nothing was made in it


def _start(tokenizer, separate):
    global _worker
    _worker = get_tokenizer(tokenizer), separate
    parent = mp.parent_process()
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)            # the parent says what there is to say
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(texts):
    """Tokens, each document led by <|endoftext|>; how many bytes and documents they are."""
    tok, separate = _worker
    parts, size, documents = [np.zeros(0, np.uint16)], 0, 0
    for text, first in texts:
        parts += [np.full(int(separate and first), tok.eot, np.uint16), tok.encode_array(text)]
        size, documents = size + len(text), documents + first
    return np.concatenate(parts), size, documents


def _write(path, results, separate, progress):
    """One split, as a stream: what meta.json says of it."""
    digest, tokens, size, documents = hashlib.sha256(), 0, 0, 0
    with open(path, 'wb') as f:
        for ids, n_bytes, n_documents in results:
            ids = ids[1:] if separate and not tokens else ids   # between documents, not before the first
            f.write(ids)
            digest.update(ids)
            tokens, size, documents = tokens + len(ids), size + n_bytes, documents + n_documents
            progress(n_bytes)
        f.flush()
        os.fsync(f.fileno())
    return {'tokens': tokens, 'bytes': size, 'documents': documents, 'sha256': digest.hexdigest()}


if __name__ == '__main__':
    from configurator import configure, die
    start, config = time.time(), configure(globals())
    try:
        config = _resolve(config)
        for split, info in make(config)['splits'].items():
            print(f'{config["out_dir"]}/{split}.bin: {info["tokens"]:,} tokens ({config["tokenizer"]}) of '
                  f'{info["bytes"]:,} bytes of text in {info["documents"]:,} documents')
        print(f'done in {time.time() - start:.1f} s')
    except DataError as e:
        die(e)
    except (OSError, concurrent.futures.BrokenExecutor) as e:
        die(f'{config["out_dir"]} is not made: {getattr(e, "strerror", None) or e}', 1)
    except KeyboardInterrupt:
        die('interrupted: nothing is left behind', 130)
