"""Knobs: a script's own top-level block, overridden by a config file, then by --key=value.

A script writes its knobs as top-level assignments with a trailing comment each, then calls `configure`:

    batch_size = 12    # sequences in a batch
    globals().update(configure(globals()))

    python train.py config/small.py --batch_size=32      # the file first, then the command line
    python train.py --help                               # every knob, its default, its comment

A config file is the user's own Python: it sees the knobs, and assigns some of them. Names that begin with _ stay
private to it; any other name it assigns must be a knob. Whatever is wrong ends in one line on stderr and exit code 2.
"""
import ast
import difflib
import hashlib
import io
import os
import sys
import tokenize
import traceback
import types
from contextlib import suppress


def die(message, code=2):
    """End the script with one line on stderr: code 2 for bad input, 1 for a failure."""
    line = ' '.join(str(message).splitlines())
    print('error: ' + ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    sys.exit(code)


def configure(namespace, argv=None):
    """The knobs of the script whose globals() are `namespace`, overridden by `argv` (default: the command line)."""
    if argv is None and hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')        # a character that a terminal lacks must not end a run
    argv = sys.argv[1:] if argv is None else argv
    comments = _comments(namespace.get('__file__'))
    names = namespace if comments is None else comments
    knobs = {k: namespace[k] for k in names
             if not k.startswith('_') and type(namespace.get(k)) in (int, float, str, bool)}
    if '--help' in argv or '-h' in argv:
        _help(namespace, knobs, comments or {})
    files = [arg for arg in argv if not arg.startswith('-')]
    if len(files) > 1:
        die(f'{_show(files[1])}: expected --key=value, after the one config file {_show(files[0])}')
    for path in files:
        knobs.update(_read_config(path, knobs))
    for arg in argv:
        if arg.startswith('-'):
            key, equals, text = arg[2:].partition('=')
            if not (arg.startswith('--') and equals):
                die(f'{_show(arg)}: expected --key=value' + (f', as in --{key}={knobs[key]}' if key in knobs else ''))
            knobs[key] = _convert(key, text, knobs, 'the command line', parse=True)
    return knobs


def _convert(key, value, knobs, where, parse=False):
    """`value` in the type of knob `key`: an int stands for a float, 5e8 for an int, 0 and 1 for a bool."""
    if key not in knobs:
        near = difflib.get_close_matches(key, knobs, 1, 0.5)
        die(f'unknown knob {_show(key)} in {where}: ' + (f'did you mean {near[0]}?' if near else '--help lists them'))
    kind, new = type(knobs[key]), value
    try:
        if parse and kind is bool:
            new = {'true': True, 'True': True, '1': True, 'false': False, 'False': False, '0': False}[value]
        elif parse and kind is int:
            new = int(value) if value.lstrip('+-').isdecimal() else float(value)
        elif parse:
            new = kind(value)
        if isinstance(new, str) or kind is str or isinstance(new, bool):
            fits = isinstance(new, kind) and isinstance(new, bool) == (kind is bool)
        else:
            fits = kind(new) == new                              # not 0.5 for an int, not 2 for a bool, never nan
        if fits:
            return kind(new)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    die(f'knob {key} in {where} is {_show(value)}: expected {kind.__name__}, as its default {_show(knobs[key])}')


def _read_config(path, knobs):
    """What the config file assigns, checked against the knobs."""
    where, scope = f'config file {_show(path)}', dict(knobs, __file__=path, __name__='config')
    try:
        with open(path, 'rb') as f:
            source = f.read()
    except (OSError, ValueError) as e:
        hint = f'; a knob is set by --{path}' if path.partition('=')[0] in knobs else ''
        die(f'cannot read {where}: {getattr(e, "strerror", None) or e}{hint}')
    try:
        exec(compile(source, path, 'exec'), scope)               # the user's own file, and the only text run as code
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = getattr(e, 'lineno', None) or (lines or ['?'])[-1]
        die(f'{where}, line {line}: {type(e).__name__}: {getattr(e, "msg", None) or e}')
    helpers = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: _convert(k, v, knobs, where) for k, v in scope.items()
            if not (k.startswith('_') or k not in knobs and isinstance(v, helpers))}


def _comments(path):
    """{name: trailing comment} of a script's top-level assignments, in their order; None without a source to read."""
    try:
        with tokenize.open(path) as f:
            source = f.read()
    except (OSError, TypeError):
        return None
    notes = {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(io.StringIO(source).readline)
             if t.type == tokenize.COMMENT}
    comments = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, 'targets', None) or [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        comments.setdefault(name.id, notes.get(node.end_lineno, ''))
    return comments


def _help(namespace, knobs, comments):
    script = os.path.basename(namespace.get('__file__') or 'script.py')
    lines = [f'usage: python {script} [config/file.py] [--key=value ...]\n', (namespace.get('__doc__') or '').strip(), '']
    width = max((len(f'{k}={v!r}') for k, v in knobs.items() if len(repr(v)) < 30), default=0)
    for key, value in knobs.items():
        lines.append(f'  --{f"{key}={value!r}":{width}}  {comments.get(key, "")}'.rstrip())
    try:
        print('\n'.join(lines), flush=True)
    except BrokenPipeError:                                      # a reader that has seen enough: head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _show(value):
    """repr, cut short: what a user typed, never more than one line."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + '...'


def require(config, **rules):
    """End with one line unless every knob keeps its rule: 'a b c' (one of these words) or (least, most)."""
    for key, rule in rules.items():
        value = config[key]
        if isinstance(rule, str) and value not in rule.split():
            die(f'{key}={value!r}: expected one of {", ".join(rule.split())}')
        if isinstance(rule, tuple) and not rule[0] <= value <= rule[1]:
            die(f'{key}={value}: expected {rule[0]} to {rule[1]}')


def pick_device(device, dtype, local_rank=0):
    """-> device, dtype with 'auto' resolved, and why that dtype. A plain 'cuda' is the GPU of this local rank."""
    import torch
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind, _, index = device.partition(':')
    if kind not in ('cpu', 'cuda', 'mps') or not getattr(torch, kind).is_available() or not (index or '0').isdigit():
        die(f'device={device!r}: not available here (auto, cpu, cuda, cuda:1, mps)')
    if kind == 'cuda':
        device = f'cuda:{index or local_rank}'
        if int(index or local_rank) >= torch.cuda.device_count():
            die(f'{device} is not there: this machine has {torch.cuda.device_count()}, and each rank needs one')
        torch.cuda.set_device(device)
    if dtype != 'auto':
        return device, dtype, 'as asked'
    if kind == 'cuda':
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return device, *(('bfloat16', 'this GPU has it') if fast else ('float16', 'this GPU has no bfloat16'))
    try:
        with open('/proc/cpuinfo') as file:
            fast = kind == 'cpu' and {'avx512_bf16', 'amx_bf16'} & set(file.read().split())
    except OSError:
        fast = False
    return device, *(('bfloat16', 'this CPU has it') if fast else ('float32', 'no fast bfloat16 here'))


def lock_folder(folder):
    """One run a folder, for the life of this process: the kernel ends the lock with it, however it ends.
    Raises BlockingIOError, in one line that names the holder, where another process has it."""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, 'lock'), 'a+')
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise BlockingIOError(f'{folder} is in use by process {file.read(40) or "?"}') from None
    except (ImportError, OSError) as e:  # Windows, or a file system without locks
        print(f'warning: {folder} cannot be locked: {e}', file=sys.stderr)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    lock_folder.held[folder] = file  # open until the process ends


lock_folder.held = {}


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path, fill):
    """At every instant, power cuts included, `path` is absent, as it was, or complete: fill(file) writes to a
    temporary name, which is flushed and renamed. -> the sha256. Raises OSError; nothing is left then."""
    folder = os.path.dirname(path) or '.'
    tmp = os.path.join(folder, 'unfinished.tmp')  # one name: what a killed run leaves, the next one replaces
    try:
        with suppress(FileNotFoundError):
            os.remove(tmp)
        with open(tmp, 'xb') as file:  # x: never through a link that somebody left there
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        digest = sha256_of(tmp)
        os.replace(tmp, path)
        if os.name == 'posix':  # the new name itself must survive a power cut
            os.fsync(fd := os.open(folder, os.O_RDONLY))
            os.close(fd)
        return digest
    except BaseException:
        with suppress(OSError):
            os.remove(tmp)
        raise
