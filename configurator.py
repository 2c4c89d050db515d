"""
What all scripts share: knobs, one-line errors, ranges, the device, a lock on a folder, an atomic write.

A script's knobs are a block of assignments with a comment each; a config file, then --key=value change them.
A config file is the user's own Python: it sees the knobs and sets some; names that begin with _ are its own.
"""
import ast
import difflib
import hashlib
import json
import os
import sys
from contextlib import suppress

NANOGPT = dict(batch_size='see micro_batch_size, and batch_tokens for a whole step', min_lr='see min_lr_frac',
               gradient_accumulation_steps='it follows from batch_tokens', dropout='there is none',
               eval_iters='see eval_tokens', decay_lr='see schedule', start='see prompt')
given = set()  # the knobs that a config file or the command line has set
locks = {}  # folder: its open lock


def die(message, code=2):
    """End the script with one line on stderr: code 2 for bad input, 1 for a failure."""
    line = ' '.join(str(message).splitlines())
    print('error: ' + ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    sys.exit(code)


def configure(namespace, argv=None):
    """The knobs of a script, `namespace` its globals(), as a config file and the command line set them."""
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors='backslashreplace')  # for what a terminal cannot show
    argv, comments, file, line = sys.argv[1:] if argv is None else argv, _comments(namespace), {}, {}
    knobs = {k: namespace[k] for k in comments if type(namespace.get(k)) in (int, float, str, bool)
             and k[0] != '_' and not (k.isupper() and k[1:])}  # neither private nor a CONSTANT
    if '--help' in argv or '-h' in argv:
        lines = [f'  {f"--{key}={value!r}":30} {comments[key]}\n' for key, value in knobs.items()]
        with suppress(OSError):  # a reader that has seen enough, a full disk: nothing stays in a buffer
            os.write(1, ''.join([namespace['__doc__'] or '', '\n', *lines]).encode())
        sys.exit(0)
    for arg in argv:
        key, equals, text = arg.lstrip('-').partition('=')
        if arg.startswith('--') and equals:
            line[key] = _convert(key, text, knobs, 'the command line', parse=True)
        elif arg.endswith('.py') and not file:
            file = _read_config(arg, knobs)
        else:
            hint = f', as in --{key}={knobs[key]}' if key in knobs else ', or one config file, name.py'
            die(f'{arg!r:.100}: expected --key=value{hint}')
    given.update(file, line)
    return {**knobs, **file, **line}


def _convert(key, value, knobs, where, parse=False):
    """`value` in the type of knob `key`: an int stands for a float, 5e8 for an int, 0 and 1 for a bool."""
    if key not in knobs:
        near = difflib.get_close_matches(key, knobs, 1, 0.5)
        hint = f'did you mean {near[0]}?' if near else '--help lists them'
        die(f'unknown knob {key!r:.100} in {where}: {NANOGPT.get(key, hint)}')
    kind, new = type(knobs[key]), value
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        if parse and kind is bool:
            new = {'true': True, 'True': True, '1': True, 'false': False, 'False': False, '0': False}[value]
        elif parse:
            new = float(value) if kind is int and not value.lstrip('+-').isdecimal() else kind(value)
        if type(new) is kind if isinstance(new, (str, bool)) or kind is str else kind(new) == new:
            return kind(new)  # not 0.5 for an int, not 2 for a bool, never nan
    die(f'{key} in {where} is {value!r:.100}: expected {kind.__name__}, as its default {knobs[key]!r:.100}')


def _read_config(path, knobs):
    where, scope = f'config file {path!r:.100}', dict(knobs, __file__=path, __name__='config')
    try:
        with open(path, 'rb') as file:
            tree = ast.parse(file.read(), path)
        exec(compile(tree, path, 'exec'), scope)  # the user's own file, and the only text run as code
    except (Exception, SystemExit) as e:
        inside = e.__traceback__.tb_next  # None: it could not be read
        line = getattr(e, 'lineno', None) or (inside.tb_lineno if inside else 0)
        die(f'{where}, line {line}: {type(e).__name__}: {getattr(e, "msg", None) or e}')
    return {n.id: _convert(n.id, scope[n.id], knobs, where) for n in ast.walk(tree) if isinstance(n, ast.Name)
            and isinstance(n.ctx, ast.Store) and n.id in scope and n.id[0] != '_'}


def _comments(namespace):
    """{name: comment} of the first block of assignments in a script that begins with a commented one."""
    with open(namespace['__file__'], encoding='utf-8') as file:
        source, comments = file.read(), {}
    for node in ast.parse(source).body:
        comment = source.split('\n')[node.end_lineno - 1].partition('  # ')[2]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and (comment or comments):
            comments.update((n.id, comment) for n in ast.walk(node)
                            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        elif comments:
            break
    return comments


def require(config, **rules):
    """Every knob must keep its rule: 'a b c' (one of these words), (least, most); other numbers 0 to 1e18."""
    for key, rule in ({k: (0, 1e18) for k, n in config.items() if type(n) in (int, float)} | rules).items():
        words = isinstance(rule, str)
        if not (config[key] in rule.split() if words else rule[0] <= config[key] <= rule[1]):
            die(f'{key}={config[key]!r:.100}: expected {"one of " + rule if words else "%s to %s" % rule}')


def find_ranks():
    """-> rank, local rank, number of ranks and whether torchrun started it, from what torchrun sets"""
    found = {n: os.environ.get(n, '') for n in 'RANK LOCAL_RANK WORLD_SIZE MASTER_PORT MASTER_ADDR'.split()}
    if not found['RANK'] + found['WORLD_SIZE']:
        return 0, 0, 1, False
    with suppress(ValueError):
        rank, local_rank, world, port = map(int, list(found.values())[:4])
        if 0 <= rank < world > local_rank >= 0 < port < 65536 and found['MASTER_ADDR']:
            return rank, local_rank, world, True
    die(f'expected ranks below WORLD_SIZE, a port, an address, as torchrun sets them, but there is {found}')


def pick_device(device, dtype, local_rank=0):
    """-> device, dtype with 'auto' resolved, and why that dtype. 'cuda' is the GPU of this local rank."""
    import torch
    kinds = [kind for kind in ('cuda', 'mps', 'cpu') if getattr(torch, kind).is_available()]
    kind, _, index = (kinds[0] if device == 'auto' else device).partition(':')
    if kind not in kinds or index.strip('0123456789'):
        die(f'device={device!r:.100}: expected auto, {", ".join(kinds)}, or one of several as in cuda:1')
    device, fast, slow = kind, False, 'float32'
    if kind == 'cuda':
        device, count = f'cuda:{index or local_rank}', torch.cuda.device_count()
        if int(index or local_rank) >= count:
            die(f'{device} is not there: this machine has {count}, and each rank needs one')
        torch.cuda.set_device(device)
        fast, slow = torch.cuda.is_bf16_supported(including_emulation=False), 'float16'
        if dtype != 'float32':
            torch.set_float32_matmul_precision('high')  # TF32 for the few products that stay in fp32
    with suppress(OSError), open('/proc/cpuinfo') as file:
        fast |= kind == 'cpu' and not {'avx512_bf16', 'amx_bf16'}.isdisjoint(file.read().split())
    auto = ('bfloat16', 'which is fast here') if fast else (slow, 'no fast bfloat16 here')
    return device, *(auto if dtype == 'auto' else (dtype, 'as asked'))


def broadcast_json(value, device='cpu', source=0):
    """The `value` of rank `source`. JSON in a tensor: nothing that comes from the network is unpickled."""
    import torch
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(size := torch.tensor(len(text), device=device), source)
    torch.distributed.broadcast(text.resize_(int(size)), source)
    return json.loads(bytes(text.tolist()))


def lock_folder(folder):
    """One run a folder, for the life of this process: the kernel ends the lock with it, however it ends. When
    called again it locks a folder that was made anew. Raises BlockingIOError, which names the holder."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'lock')
    with suppress(KeyError, OSError):
        if os.path.samestat(os.stat(path), os.fstat(locks[folder])):
            return
    lock = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666)  # never through a link
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"{folder} is in use by process {os.read(lock, 20).decode('latin')}") from None
    except (ImportError, OSError) as e:  # Windows, or a file system without locks
        print(f'warning: {folder} cannot be locked: {e}', file=sys.stderr)
    locks[folder] = lock
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())


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
