"""
Every number and picture in results/: five suites over one checkpoint, each with its table, files and protocol.

    python eval.py                                              all suites, the newest checkpoint of the default run
    python eval.py --suite=lm --tasks=boolq,piqa --checkpoint=out_gpt --out=results/gpt
    python eval.py --suite=speed --model_config=config/fela_109m.py --out=results/cpu        needs no checkpoint
    python eval.py --make_passkey=data/passkey                 text for config/passkey_tiny.py

The same command again goes on where it was interrupted. The folder of the results gets README.md with tables and
pictures, and meta.json with the checkpoint's sha256, commit, hardware, torch, dtype, seeds and protocol of every suite.
(Longer than its sisters: five suites and their pictures share one frame, so that there is one place to look.)
"""

import ast
import contextlib
import csv
import difflib
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from configurator import configure, die
from model import FELA, CheckpointError, FELAConfig, load_checkpoint, repeat_state
from prepare import DataError, TokenData, ensure_pysrc, get_tokenizer, load_meta, make

# ---------------------------------------------------------------------------------------------------------------------
checkpoint = 'out'  # a folder of checkpoints (the newest is taken), or one checkpoint
suite = 'all'  # lm, longctx, needle, speed, interpret; several with commas, or all
out = ''  # folder of the results; '': results/<dataset>_default, or results/<folder of the checkpoint>
overwrite = False  # measure again what is there already
plots = True  # draw PNGs (needs matplotlib)
seed = 1337  # of everything drawn at random
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto (bfloat16 on CUDA, else float32), float32, bfloat16; speed takes both with a comma
batch_size = 16  # lm, longctx: sequences in a pass
text_file = ''  # longctx, interpret: this text ('': the validation split of the checkpoint's dataset)
# lm
tasks = 'wikitext,boolq,hellaswag,arc_easy,piqa,winogrande'  # any tasks of lm-eval
task_data = ''  # folder of <task>*.jsonl in lm-eval's schema ('': the hub); tasks without a file there are left out
limit = 0  # documents a task (0: all)
max_length = 2048  # tokens a model may see, context and continuation (0: whole documents); changes the score
# longctx
contexts = '256,512,1024,2048,4096,8192,16384,32768,65536'  # tokens read before a block of targets
blocks = 32  # blocks of targets, the same ones after every context
block_tokens = 256  # targets in a block
# needle
needle_lengths = '256,512,1024,2048,4096'  # tokens of a prompt
needle_depths = '0,0.25,0.5,0.75,1'  # where the passkey stands; 0: at the start
needle_seeds = 20  # prompts a cell
haystack = ''  # a text file to hide the passkey in ('': a few sentences over and over)
make_passkey = ''  # write a dataset of passkey text to this folder, and end
# speed
model_config = ''  # a config of train.py: its shape with random weights instead of a checkpoint
vocab_size = 0  # with model_config; 0: as its dataset has it, else GPT-2's
kinds = 'train,prefill,decode'  # what is timed; '': only draw tables and pictures again from cells.jsonl
arms = 'FELA,A'  # A: attention in every layer; A-math: without fused SDPA, not compiled; A-recompute: decode without a cache
compile = 'off'  # off, on or off,on: torch.compile
checkpoint_activations = False  # train: every block again in backward, for lengths that do not fit
lengths = '256,1024,4096,16384'  # tokens in a sequence
batch_tokens = '0'  # sequences in a call: so many tokens / length, at least one; several with commas
positions = '1,1024,16384,65536'  # decode: tokens read before
decode_batches = '1,16'  # decode: sequences
repetitions = 7  # of every timing; median and quartiles are kept
measure_memory = True  # on a CPU one more process for every cell of train and prefill
max_cell_seconds = 60.0  # the repetitions of a cell end after this time, and it is not begun when one call would take longer
max_minutes = 0.0  # no cell of speed is begun after this time (0: off)
# ---------------------------------------------------------------------------------------------------------------------

KNOBS = {k: v for k, v in globals().items() if type(v) in (int, float, str, bool) and not k.startswith('_')}
SUITES = {  # and the knobs that change their results; speed also keeps its own account, cell by cell
    'lm': 'tasks task_data limit max_length', 'longctx': 'text_file contexts blocks block_tokens',
    'needle': 'needle_lengths needle_depths needle_seeds haystack', 'interpret': 'text_file',
    'speed': 'model_config vocab_size kinds arms compile checkpoint_activations lengths batch_tokens positions '
             'decode_batches repetitions measure_memory max_cell_seconds max_minutes'}
RED, BLUE, GREY = '#c0392b', '#2c5f8a', '#8a8a8a'
HERE = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------------------------------------------------------------
# the frame


def write(name, value):
    path = os.path.join(out, name)
    with open(path + '.tmp', 'w', newline='') as file:
        file.write(value if isinstance(value, str) else json.dumps(value, indent=1) + '\n')
    os.replace(path + '.tmp', path)


def write_csv(name, rows, columns=None):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator='\n', extrasaction='ignore')
    writer.writeheader()
    writer.writerows({k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write(name, text.getvalue())


def numbers(text, kind=int):
    try:
        values = [kind(float(part)) for part in text.split(',')]
        assert all(0 <= v < math.inf for v in values)
        return values
    except (ValueError, AssertionError, OverflowError):
        die(f'{text!r}: expected numbers of at least 0, separated by commas')


def progress(iterable, what):
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, what, disable=None, leave=False)  # None: only on a terminal


def table_lines(rows, markdown=False):
    def show(v):
        if isinstance(v, float):
            return f'{v:,.0f}' if abs(v) >= 1000 else f'{v:.4g}'
        return '' if v is None else ('no', 'yes')[v] if isinstance(v, bool) else f'{v:,}' if isinstance(v, int) else v
    lines = [list(rows[0])] + [[show(v) for v in row.values()] for row in rows]
    if markdown:
        return ['| ' + ' | '.join(line) + ' |' for line in [lines[0], ['---'] * len(lines[0]), *lines[1:]]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ['  '.join(v.rjust(w) if i else v.ljust(w) for i, (v, w) in enumerate(zip(line, widths))) for line in lines]


def environment():
    def git(*args):
        return subprocess.run(['git', '-C', HERE, *args], capture_output=True, text=True).stdout.strip()
    commit, name = 'none', platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        commit = git('rev-parse', '--verify', 'HEAD') or commit
        commit += '+changes' * bool(git('status', '--porcelain', '--untracked-files=no'))
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        name = next((line.partition(':')[2].strip() for line in file if line.startswith('model name')), name)
    hardware = f'{name}, {torch.get_num_threads()} thread{"s" * (torch.get_num_threads() > 1)}'
    if device.startswith('cuda'):
        gpu = torch.cuda.get_device_properties(device)
        hardware = f'{gpu.name}, {gpu.total_memory / 2 ** 30:.0f} GiB, CUDA {torch.version.cuda}'
    with open(os.path.join(HERE, 'model.py'), 'rb') as file:
        code = hashlib.sha256(file.read()).hexdigest()[:12]
    return {'hardware': hardware, 'torch': torch.__version__, 'python': platform.python_version(), 'commit': commit,
            'model.py': code}


def figure(columns=1, rows=1, width=5.6, height=4.0):
    """-> (figure, axes) in the one style of all pictures"""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.rcParams.update({'font.size': 9.5, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
                         'axes.titlesize': 10.5, 'grid.alpha': 0.25, 'grid.linewidth': 0.6, 'legend.frameon': False,
                         'lines.linewidth': 1.8, 'lines.markersize': 4.5, 'axes.axisbelow': True})
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout='constrained')


def save_figure(fig, name):
    import matplotlib.pyplot as plt
    fig.savefig(os.path.join(out, name), dpi=130)
    plt.close(fig)
    return name


def brief(n):
    return f'{n >> 20}M' if n and n % (1 << 20) == 0 else f'{n >> 10}K' if n and n % 1024 == 0 else f'{n:,}'


def token_axis(ax, values, label, labels=None):
    ax.set_xscale('log', base=2)
    ax.set_xticks(sorted(values), labels or [brief(n) for n in sorted(values)])
    ax.minorticks_off()
    ax.set_xlabel(label)


def plain_log(ax):
    from matplotlib.ticker import LogLocator
    ax.set_yscale('log')
    ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    ax.yaxis.set_major_formatter('{x:,g}')
    ax.yaxis.set_minor_formatter('')


def shape_of(config):
    return {f.name: config[f.name] for f in fields(FELAConfig) if f.name in config}


def load():
    """The checkpoint: model, tokenizer, config of the run, sha256, step, block_size it was trained with"""
    state, manifest = load_checkpoint(checkpoint)
    config = state['config']
    try:
        model = FELA(FELAConfig(**shape_of(config)))
        model.load_state_dict(state['model'])
        tokenizer, block_size = get_tokenizer(config['tokenizer']), config['block_size']
    except (ValueError, TypeError, RuntimeError, KeyError) as e:
        reason = ' '.join(str(e).split())[:160]
        raise CheckpointError(f'{checkpoint}: its weights do not fit its config: {reason}') from None
    return SimpleNamespace(model=model.to(device).eval().requires_grad_(False), tokenizer=tokenizer, config=config,
                           sha256=manifest['sha256'], step=manifest['step'], block_size=block_size)


def data_dir(config):
    folder = config['dataset'] if os.path.dirname(config['dataset']) else os.path.join('data', config['dataset'])
    if config['dataset'] == 'pysrc' and not os.path.exists(os.path.join(folder, 'meta.json')):
        ensure_pysrc(folder)
    return folder


def read_text(path):
    try:
        with open(path, 'rb') as file:
            data = file.read()
        data.decode()
        return data
    except OSError as e:
        die(f'{path}: {e.strerror}')
    except UnicodeDecodeError as e:
        die(f'{path}: expected UTF-8 text, found byte 0x{data[e.start]:02x} at offset {e.start:,}')


def text_tokens(run):
    """-> (tokens of the text that longctx and interpret read, its name)"""
    if text_file:
        return np.array(run.tokenizer.encode_bytes(read_text(text_file)), dtype=np.int64), os.path.basename(text_file)
    data = TokenData(data_dir(run.config), 'val', 1)
    if data.meta['splits']['train']['sha256'] != run.config.get('data_sha256'):
        print(f'warning: {data.data_dir} is not the data of this checkpoint', file=sys.stderr)
    return np.array(data.tokens, dtype=np.int64), f'validation split of {os.path.basename(run.config["dataset"])}'


def windows(tokens, starts, length):
    return torch.tensor(np.stack([tokens[s:s + length] for s in starts]), device=device)


def autocast():
    return torch.autocast(device.split(':')[0], getattr(torch, dtype), enabled=dtype != 'float32')


@torch.inference_mode()
def score(model, idx, targets, state=None):
    """idx, targets (B,T), -1: none -> log-probability of each target, whether it is the most probable token, and the
    state. Logits exist at targets only and for 1,024 at a time, their softmax for what fits a CPU's cache."""
    idx, targets = idx.to(device), targets.to(device)
    with autocast():
        h, state = model.hidden(model.embedding(idx), model.init_state(len(idx)) if state is None else state)
    wanted, parts = targets >= 0, []
    for x, t in zip(h[wanted].split(1024), targets[wanted].split(1024)):
        logits = model.logits(x.float())
        rows = max(1, (1 << 20) // logits.shape[-1]) if device == 'cpu' else 1024
        parts += [(-F.cross_entropy(a, b, reduction='none'), a.argmax(-1) == b)
                  for a, b in zip(logits.split(rows), t.split(rows))]
    log_probs, greedy = map(torch.cat, zip(*parts))
    return (log_probs.new_zeros(targets.shape).masked_scatter(wanted, log_probs),
            greedy.new_zeros(targets.shape).masked_scatter(wanted, greedy), state)


# ---------------------------------------------------------------------------------------------------------------------
# lm: the tasks of lm-eval

FIELDS = {'wikitext': 'page', 'boolq': 'passage question label', 'piqa': 'goal sol1 sol2 label',
          'hellaswag': 'activity_label ctx_a ctx_b endings label', 'arc_easy': 'question choices answerKey',
          'winogrande': 'sentence option1 option2 answer'}
METRICS = {'wikitext': 'word_perplexity', 'boolq': 'acc', 'hellaswag': 'acc_norm', 'arc_easy': 'acc', 'piqa': 'acc',
           'winogrande': 'acc'}
PUBLISHED = {  # wikitext: word perplexity; the rest: accuracy in %
    'GPT-2 124M (lm-eval 0.4)': {'wikitext': 37.37, 'hellaswag': 31.1, 'arc_easy': 43.8, 'winogrande': 51.6},
    'GPT-2 XL 1.5B (GPT-Neo README)': {'piqa': 70.8, 'winogrande': 59.4},
    'Pythia-160M (Mamba, table 3)': {'hellaswag': 30.2, 'arc_easy': 43.2, 'piqa': 61.4, 'winogrande': 51.9},
    'Pythia-1B (Mamba, table 3)': {'hellaswag': 47.2, 'arc_easy': 57.0, 'piqa': 70.7, 'winogrande': 53.5},
    'Mamba-130M (Mamba, table 3)': {'hellaswag': 35.3, 'arc_easy': 48.0, 'piqa': 64.5, 'winogrande': 51.9},
    'GLA-340M (GLA, table 2)': {'wikitext': 28.65, 'boolq': 58.7, 'hellaswag': 34.5, 'arc_easy': 45.1, 'piqa': 64.8,
                                'winogrande': 51.4},
    'FELA-1.13B (FELA)': {'boolq': 61.4}}


def lm_adapter(model, tokenizer):
    """lm-eval's interface on anything with hidden, logits, init_state, prefill and step"""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    longest = max_length or 1 << 60

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.eot
        tokenizer_name = tokenizer.name

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            """Padded on the right, which a causal model does not see; the longest first, results in the order asked"""
            results, rows = [None] * len(requests), []
            for i, (_, context, continuation) in enumerate(requests):
                rows.append(((context + continuation)[-max(longest, len(continuation)) - 1:], len(continuation), i))
            rows.sort(key=lambda row: -len(row[0]))
            for start in progress(range(0, len(rows), batch_size), 'log-likelihoods'):
                part = rows[start:start + batch_size]
                idx = torch.zeros(len(part), len(part[0][0]) - 1, dtype=torch.long)
                targets = torch.full_like(idx, -1)
                for b, (tokens, n, _) in enumerate(part):
                    idx[b, :len(tokens) - 1] = torch.tensor(tokens[:-1])
                    targets[b, len(tokens) - 1 - n:len(tokens) - 1] = torch.tensor(tokens[len(tokens) - n:])
                log_probs, greedy, _ = score(model, idx, targets)
                greedy = (greedy.cpu() | (targets < 0)).all(1).tolist()
                for (tokens, n, i), values, same in zip(part, log_probs.cpu().double().numpy(), greedy):
                    end = len(tokens) - 1  # sums do not depend on the padding: equal continuations tie
                    results[i] = float(values[end - n:end].sum()), same
            return results

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """Every token once, in windows of max_length; with max_length=0 in one go"""
            sums, pairs = [0.0] * len(requests), []
            for i, tokens in enumerate(tokenizer.encode(request.args[0]) for request in requests):
                split = get_rolling_token_windows(tokens, tokenizer.eot, min(longest, len(tokens) + 1), 1)
                pairs += [(i, *make_disjoint_window(pair)) for pair in split]
            for (i, _, _), (value, _) in zip(pairs, self._loglikelihood_tokens([(None, a, b) for _, a, b in pairs])):
                sums[i] += value
            return sums

        def generate_until(self, requests, disable_tqdm=False):
            """One prefill a prompt; then the rows of a batch decode together, at constant cost a token"""
            results, rows = [None] * len(requests), []
            for i, (text, options) in enumerate(request.args for request in requests):
                until = options.get('until') or []
                warmth = options.get('temperature', 0.0) if options.get('do_sample') else 0.0
                until = [until] if isinstance(until, str) else until
                prompt = tokenizer.encode(text)[-longest:] or [tokenizer.eot]
                rows.append((prompt, until, options.get('max_gen_toks', 256), warmth, i))
            rows.sort(key=lambda row: -len(row[0]))
            size = 1 if getattr(model, 'attention', False) else batch_size  # KV caches of unequal length do not stack
            for start in progress(range(0, len(rows), size), 'generation'):
                for row, text in zip(rows[start:start + size], decode(rows[start:start + size])):
                    results[row[-1]] = text
            return results

    @torch.inference_mode()
    def decode(rows):
        generator, made, texts = torch.Generator(device).manual_seed(seed), [[] for _ in rows], [None] * len(rows)
        warmth = torch.tensor([[row[3]] for row in rows], device=device)
        with autocast():
            logits, states = zip(*(model.prefill(torch.tensor([ids], device=device)) for ids, *_ in rows))
            logits, state = torch.cat(logits), stack_states(states)
            while True:
                drawn = torch.multinomial((logits / warmth.clamp(min=1e-6)).softmax(-1), 1, generator=generator)
                tokens = torch.where(warmth > 0, drawn, logits.argmax(-1, True)).squeeze(1)
                for b, (t, (_, until, most, *_)) in enumerate(zip(tokens.tolist(), rows)):
                    if texts[b] is None:
                        made[b] += [t] * (t != tokenizer.eot)
                        text = tokenizer.decode(made[b])
                        ends = [text.find(stop) for stop in until if stop in text]
                        if ends or t == tokenizer.eot or len(made[b]) >= most:
                            texts[b] = text[:min(ends)] if ends else text
                if None not in texts:
                    return texts
                logits, state = model.step(tokens, state)
    return Adapter()


def stack_states(states):
    """States of single rows as one state of many; what has no batch dimension (taps, position) is the same in all."""
    def stack(*ts):
        return torch.cat(ts) if ts[0].dim() > 2 else ts[0]
    return [tuple(map(stack, *layer)) if isinstance(layer[0], tuple) else stack(*layer) for layer in zip(*states)]


def local_task(task):
    """-> lm-eval's config of a task whose documents are in task_data, checked; None: no such file"""
    found, line = sorted(glob.glob(os.path.join(glob.escape(task_data), f'{task}*.jsonl'))), 0
    if not found:
        return None
    for line, text in enumerate(read_text(found[0]).splitlines(), 1):
        try:
            missing = [field for field in FIELDS.get(task, '').split() if field not in json.loads(text)]
        except (ValueError, TypeError):
            die(f'{found[0]}, line {line}: expected a JSON object')
        if missing:
            die(f'{found[0]}, line {line}: no field {missing[0]!r}; {task} has {", ".join(FIELDS[task].split())}')
    if not line:
        die(f'{found[0]} is empty: expected a JSON object a line')
    return {'task': task, 'dataset_path': 'json', 'dataset_name': None, 'training_split': None, 'test_split': None,
            'dataset_kwargs': {'data_files': {'validation': found[0]}}, 'validation_split': 'validation'}


def run_lm(model, tokenizer, names):
    """-> {task: scores, with the majority baseline}, tasks left out for lack of a file"""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager, members, left_out = TaskManager(), names, []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            die(f'unknown task {name!r}: expected one of lm-eval, as {", ".join(near or FIELDS)}')
    if task_data:
        members = [local_task(name) for name in names]
        left_out = [name for name, member in zip(names, members) if member is None]
        members = [{'group': 'local', 'task': [member for member in members if member]}]
        if len(left_out) == len(names):
            die(f'task_data={task_data!r}: no file there for {" or ".join(f"{name}*.jsonl" for name in names)}')
        if left_out:
            print(f'left out, for lack of {", ".join(f"{name}*.jsonl" for name in left_out)}')
    try:
        loaded = lm_eval.simple_evaluate(lm_adapter(model, tokenizer), tasks=members, task_manager=manager,
                                         limit=limit or None, bootstrap_iters=0, random_seed=seed,
                                         numpy_random_seed=seed, torch_random_seed=seed)
    except (OSError, ValueError, RuntimeError) as e:
        if isinstance(e, OSError) or 'hub' in str(e).lower() or 'offline' in str(e).lower():
            die(f'lm-eval has no data ({" ".join(str(e).split())[:120]}); --task_data=DIR takes local files', 1)
        raise
    results = {}
    for name, samples in loaded['samples'].items():
        scores = {k.removesuffix(',none'): v for k, v in loaded['results'][name].items() if isinstance(v, float)}
        results[name] = scores | {'documents': len(samples)}
        if name in METRICS and name != 'wikitext':
            labels = [s['doc']['choices']['label'].index(s['doc']['answerKey']) if name == 'arc_easy' else
                      s['doc'][FIELDS[name].split()[-1]] for s in samples]
            results[name]['majority'] = max(map(labels.count, set(labels))) / len(labels)
    return results, left_out


def lm(run):
    results, left_out = run_lm(run.model, run.tokenizer, [name for name in tasks.split(',') if name])
    note = {'max_length': max_length or 'whole documents', 'limit': limit or 'all', 'tokenizer': run.tokenizer.name,
            'lm_eval': importlib.metadata.version('lm_eval'), 'data': 'local files' if task_data else 'hub',
            'left_out': left_out}
    write('lm_eval_results.json', {'results': results, 'config': note, 'published': PUBLISHED})
    known, ours, errors, majority = [task for task in METRICS if task in results], {}, {}, {}
    for task in known:
        ours[task], n = results[task][METRICS[task]], results[task]['documents']
        if task != 'wikitext':
            errors[task] = 100 * math.sqrt(ours[task] * (1 - ours[task]) / n)
            majority[task], ours[task] = 100 * results[task]['majority'], 100 * ours[task]
    lines = {'this checkpoint': ours, 'its standard error': errors, 'majority class': majority} | PUBLISHED
    rows = [{'': name} | {t: f'{scores[t]:,.{1 + (t == "wikitext")}f}' if t in scores else None for t in known}
            for name, scores in lines.items()]
    rows += [{'': f'{name}: ' + ', '.join(f'{k} {v:.4g}' for k, v in results[name].items())} | dict.fromkeys(known)
             for name in results if name not in METRICS]
    if 'wikitext' in results:
        note['wikitext_bits_per_byte'] = results['wikitext']['bits_per_byte']
    few = f' (with --limit={limit} the standard error of an accuracy is up to {50 / math.sqrt(limit):.1f} points: ' \
          'smaller differences than three times that say nothing)' if limit else ''
    return {'table': rows, **note, 'protocol': (
        f'lm-eval {note["lm_eval"]}, zero-shot, at most {max_length or "all"} tokens ({run.tokenizer.name}) of context '
        f'and continuation, {limit or "all"} documents a task{few}. wikitext: word perplexity, each token once in '
        'windows of that length; the rest: accuracy in %, HellaSwag by acc_norm. Published: other data, contexts.')}


# ---------------------------------------------------------------------------------------------------------------------
# longctx: bits per byte of the same targets after more and more context


def longctx(run):
    tokens, source = text_tokens(run)
    sizes = sorted(set(numbers(contexts)))
    need = block_tokens * blocks
    if sizes[0] < 1 or len(tokens) < sizes[-1] + need:
        fit = ','.join(str(c) for c in sizes if 1 <= c <= len(tokens) - need)
        die(f'{source} has {len(tokens):,} tokens, contexts={contexts!r} and {blocks} blocks of {block_tokens} need '
            f'{sizes[-1] + need:,}: ' + (f'--contexts={fit} is possible' if fit else 'expected a longer text'))
    starts = np.linspace(sizes[-1], len(tokens) - block_tokens, blocks).astype(int)
    size_of = np.array([len(run.tokenizer.decode_bytes([t])) * (t != run.tokenizer.eot)
                        for t in range(run.tokenizer.vocab_size)])  # bytes of text in a token
    block_bytes = np.array([size_of[tokens[s:s + block_tokens]].sum() for s in starts])
    draws = np.random.default_rng(seed).integers(blocks, size=(10000, blocks))  # the same at every context: paired
    found, speeds = {}, {}
    for c in sizes:
        bits, began, at_once = [], time.perf_counter(), max(1, min(batch_size, (1 << 18) // c))
        for i in progress(range(0, blocks, at_once), f'context {c:,}'):
            idx, state = windows(tokens, starts[i:i + at_once] - c, c + block_tokens), None
            if c > 1:
                with autocast():
                    _, state = run.model.prefill(idx[:, :c - 1])
            log_probs, _, _ = score(run.model, idx[:, c - 1:-1], idx[:, c:], state)
            bits += (-log_probs.double().sum(1) / math.log(2)).tolist()
        bits, speeds[c] = np.array(bits), blocks * (c + block_tokens) / (time.perf_counter() - began)
        found[c] = bits.sum() / block_bytes.sum(), bits[draws].sum(1) / block_bytes[draws].sum(1)
    base = max([c for c in sizes if c <= run.block_size], default=sizes[0])
    rows, in_bytes, change = [], [], f'change_from_{base}'
    for c, (bpb, drawn) in found.items():
        low, high, d_low, d_high = map(float, (*np.quantile(drawn, (0.025, 0.975)),
                                               *np.quantile(drawn - found[base][1], (0.025, 0.975))))
        in_bytes.append(round(np.mean([size_of[tokens[s - c:s]].sum() for s in starts])))
        rows.append({'context_tokens': c, 'context_bytes': in_bytes[-1], 'bpb': float(bpb), 'bpb_low': low,
                     'bpb_high': high, change: float(bpb - found[base][0]), 'change_low': d_low,
                     'change_high': d_high, 'beyond_training': c > run.block_size})
    write_csv('longctx_bpb.csv', [row | {'tokens_per_second': speeds[row['context_tokens']]} for row in rows])
    if plots:
        same, (fig, ((left, right),)) = in_bytes[-1] > 0.99 * sizes[-1], figure(2)
        for ax, key, low, high in ((left, 'bpb', 'bpb_low', 'bpb_high'), (right, change, 'change_low', 'change_high')):
            ax.fill_between(sizes, [r[low] for r in rows], [r[high] for r in rows], color=RED, alpha=0.15, linewidth=0)
            ax.plot(sizes, [r[key] for r in rows], color=RED)
            for far, label in ((False, 'up to the training context'), (True, 'beyond the training context')):
                part = [r for r in rows if r['beyond_training'] == far]
                ax.plot([r['context_tokens'] for r in part], [r[key] for r in part], 'o', color=RED, label=label,
                        markerfacecolor='white' if far else RED)
            token_axis(ax, sizes, f'context before the targets (tokens{" = bytes" if same else ", bytes below them"})',
                       [brief(n) + f'\n{b / 1000:,.3g}k' * (not same) for n, b in zip(sizes, in_bytes)])
        right.axhline(0, color=GREY, linewidth=1)
        left.set(ylabel='bits per byte', title='The same targets after more and more context')
        right.set(ylabel=f'bits per byte, less those after {brief(base)}', title='Paired difference, 95% interval')
        left.legend()
        save_figure(fig, 'longctx_bpb.png')
    state_bytes = sum(t.nbytes for t in tree_leaves(run.model.init_state(1)) if isinstance(t, torch.Tensor))
    state = 'a KV cache' if run.model.attention else f'{state_bytes:,} bytes whatever the context'
    return {'table': rows, 'pictures': ['longctx_bpb.png'], 'protocol': (
        f'{blocks} blocks of {block_tokens} targets ({block_bytes.sum():,} bytes), spread over the {source} from token '
        f'{sizes[-1]:,} on. The model reads exactly the context, from a fresh state, then the block with its true '
        'tokens; the targets are the same at every context. 95% intervals of 10,000 paired bootstrap draws of blocks. '
        f'Trained with {run.block_size:,} tokens of context. The state: {state}. '
        'The paper: 1.78 bits per byte at 256, 1.49 at 32K (1.13B parameters, WikiText-103).')}


# ---------------------------------------------------------------------------------------------------------------------
# needle: passkey retrieval

FILLER = 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. '
NEEDLE = 'The pass key is {0}. Remember it. {0} is the pass key. '
QUESTION = 'What is the pass key? The pass key is'


def passkey_prompt(tokenizer, hay, length, depth, rng, needle=True):
    """-> (prompt of `length` tokens, tokens of the answer)"""
    key = rng.integers(10000, 100000)
    before, question, answer = (tokenizer.encode(text) for text in (NEEDLE.format(key), QUESTION, f' {key}'))
    before = before if needle else []
    n, start = length - len(before) - len(question), rng.integers(len(hay))
    rest = np.take(hay, np.arange(start, start + n), mode='wrap').tolist()
    cut = round(depth * n)
    return rest[:cut] + before + rest[cut:] + question, answer


def needle(run):
    tok, sizes, depths = run.tokenizer, sorted(set(numbers(needle_lengths))), numbers(needle_depths, float)
    hay = np.array(tok.encode_bytes(read_text(haystack) if haystack else FILLER.encode()))
    least = len(tok.encode(NEEDLE.format(12345) + QUESTION)) + 8
    if sizes[0] < least or max(depths) > 1 or not len(hay):
        die(f'needle_lengths={needle_lengths!r}, needle_depths={needle_depths!r}, haystack={haystack!r}: expected at '
            f'least {least} tokens, depths of 0 to 1 and some text')

    def ask(length, depth, with_needle):
        """-> share of keys found, mean log-probability of the key"""
        hits, log_probs, at_once = 0, [], max(1, (1 << 18) // length)
        prompts = [passkey_prompt(tok, hay, length, depth, np.random.default_rng((seed, length, s)), with_needle)
                   for s in range(needle_seeds)]
        for part in (prompts[i:i + at_once] for i in range(0, needle_seeds, at_once)):
            idx, width = torch.tensor([prompt for prompt, _ in part], device=device), max(len(a) for _, a in part)
            targets = torch.tensor([answer + [-1] * (width - len(answer)) for _, answer in part], device=device)
            with autocast():
                _, state = run.model.prefill(idx[:, :-1])
            values, top, _ = score(run.model, torch.cat((idx[:, -1:], targets[:, :-1].clamp(min=0)), 1), targets, state)
            hits += int((top | (targets < 0)).all(1).sum())  # greedy decoding says the key just if each token is on top
            log_probs += values.sum(1).tolist()
        return hits / needle_seeds, statistics.fmean(log_probs)
    grid = np.array([[ask(n, d, True) + ask(n, d, False) for d in depths] for n in progress(sizes, 'passkeys')])
    cells = [{'length': n, 'depth': d, 'seeds': needle_seeds} | dict(zip(
        ('exact', 'log_prob', 'control_exact', 'control_log_prob'), grid[x, y].tolist())) |
        {'beyond_training': n > run.block_size} for x, n in enumerate(sizes) for y, d in enumerate(depths)]
    write('needle_heatmap.json', {'cells': cells, 'trained_length': run.block_size, 'needle': NEEDLE,
                                  'question': QUESTION, 'haystack': os.path.basename(haystack) or FILLER})
    found, log_prob, control, control_log_prob = grid.T  # (depths,lengths)
    if plots:
        fig, axes = figure(2, height=3.4)
        top, inside = math.log2(90000), sum(n <= run.block_size for n in sizes)
        for ax, values, cmap, low, high, form, title in (
                (axes[0, 0], 100 * found, 'viridis', 0, 100, '{:.0f}', 'Passkeys found (%)'),
                (axes[0, 1], (log_prob - control_log_prob) / math.log(2), 'RdBu_r', -top, top, '{:.1f}',
                 'What the needle tells of a passkey (of 16.5 bits)')):
            image = ax.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect='auto')
            for y, x in np.ndindex(values.shape):
                dark = values[y, x] < 60 if low == 0 else abs(values[y, x]) > 0.6 * high
                ax.text(x, y, form.format(values[y, x]), ha='center', va='center', color='white' if dark else 'black')
            ax.set(xlabel='length of the prompt (tokens)', ylabel='depth of the passkey in it')
            ax.set_title(title, pad=18 if 0 < inside < len(sizes) else None)
            ax.set_xticks(range(len(sizes)), [brief(n) for n in sizes])
            ax.set_yticks(range(len(depths)), [f'{100 * d:.0f}%' for d in depths])
            ax.grid(False)
            if 0 < inside < len(sizes):
                ax.axvline(inside - 0.5, color='black', linewidth=2)
                ax.text(inside - 0.45, -0.55, 'longer than in training', fontsize=8, va='bottom')
            fig.colorbar(image, ax=ax)
        save_figure(fig, 'needle_heatmap.png')
    rows = [{'length': n, 'beyond_training': n > run.block_size, 'found (%)': 100 * found[:, x].mean().item(),
             'worst depth (%)': 100 * found[:, x].min().item(), 'log-probability': log_prob[:, x].mean().item(),
             'found without needle (%)': 100 * control[:, x].mean().item(),
             'log-probability without': control_log_prob[:, x].mean().item()} for x, n in enumerate(sizes)]
    return {'table': rows, 'pictures': ['needle_heatmap.png'], 'protocol': (
        f'A five-digit passkey in {"a text" if haystack else "repeated sentences"}; {needle_seeds} prompts for each '
        'length and depth. Found: greedy decoding says all five digits. Log-probability: of the true passkey, in nats '
        f'(guessing: {-math.log(90000):.1f}). Without needle: the same questions where nothing tells the key. Trained '
        f'with {run.block_size:,} tokens of context.')}


def write_passkeys():
    """Passkey text as a dataset: documents of 128 to 512 bytes (of one size, their end would be learnt first), a needle
    and then its key told again and again, mostly soon (learnt first), at times after many sentences."""
    rng, path = np.random.default_rng(seed), os.path.join(make_passkey, 'passkey.jsonl')
    os.makedirs(make_passkey, exist_ok=True)
    with open(path, 'w') as file:
        for _ in progress(range(20000), 'documents'):
            key, size, text, told = rng.integers(10000, 100000), rng.integers(128, 512), '', NEEDLE
            while len(text) < size:
                start, n = rng.integers(len(FILLER)), int(156 ** rng.random()) - 1
                text += (FILLER * (2 + n // len(FILLER)))[start:start + n] + told.format(key)
                told = (QUESTION if rng.random() < 0.3 else 'The pass key is') + ' {0}. '
            file.write(json.dumps({'text': text[:size]}) + '\n')
    meta = make({'dataset': 'passkey', 'data_files': path, 'tokenizer': 'bytes', 'val_fraction': 0.02,
                 'out_dir': make_passkey, 'num_proc': 1})
    print(f'{make_passkey}: {meta["splits"]["train"]["tokens"]:,} tokens to train on')


# ---------------------------------------------------------------------------------------------------------------------
# speed: train, prefill and decode beside softmax attention of the same shape

SPEED_PROTOCOL = (
    'Arms take turns, repetition by repetition, in one process; the first call (with compilation, if on) is kept apart '
    'as first_call_seconds; median and quartiles of the others. train: forward, backward, clip, AdamW; fp32 weights, '
    'autocast. prefill: inference mode, weights in dtype, logits of the last position. decode: greedy; FELA from its '
    'state after really reading so many tokens, A from a cache of random numbers of that length (with CUDA graphs at '
    'the same position again and again). Memory: peak above what is held at rest (weights, in training AdamW moments '
    'too), gradients included; on a CPU peak resident memory of a process of its own for each cell, on CUDA the '
    "allocator's. of_floor: the time to move weights, ring, taps, GLA state (in and out) or KV cache once at the "
    'measured read bandwidth, over the time it takes. ')
NAMES = {'FELA': 'FELA', 'A': 'attention', 'A-math': 'attention, math SDPA', 'A-recompute': 'attention without cache'}
COLOURS = dict(zip(NAMES, (RED, BLUE, '#8fb3d1', GREY)))
DECODED = 32  # tokens in a repetition


def speed_shape(run):
    """-> (fields of FELAConfig, weights or None, name)"""
    if not model_config:
        weights = {name: t.cpu() for name, t in run.model.state_dict().items()}
        return asdict(run.model.config), weights, f'checkpoint {run.sha256[:8]}'
    path, vocab = os.path.join(HERE, 'train.py'), vocab_size
    with open(path) as file:
        knobs = {node.targets[0].id: node.value.value for node in ast.parse(file.read()).body
                 if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}
    knobs = configure(dict(knobs, __file__=path), [model_config])
    with contextlib.suppress(DataError):
        vocab = vocab or load_meta(data_dir(knobs))['vocab_size']
    return shape_of({'vocab_size': vocab or 50257} | knobs), None, os.path.basename(model_config).removesuffix('.py')


def speed_model(arm, shape, kind):
    torch.manual_seed(seed)
    with torch.device(device):
        model = FELA(FELAConfig(**dict(shape[0], pattern=shape[0]['pattern'] if arm == 'FELA' else 'A')))
    model.checkpoint_activations = checkpoint_activations
    if shape[1] and arm == 'FELA':
        model.load_state_dict(shape[1])
    return model if kind == 'train' else model.to(getattr(torch, dtype)).requires_grad_(False)


def speed_call(kind, arm, model, length, batch, compiled, state=None):
    """-> what is timed, a function without arguments; state: of one row after `length` tokens, for decode"""
    model.__dict__.pop('norm_logits', None)  # as it was before it was compiled
    for block in model.blocks:
        block._compiled_call_impl = None
        block.__dict__.pop('step', None)
    if compiled:
        model.compile_step(batch) if kind == 'decode' else model.compile_blocks()
    if kind == 'decode' and arm != 'A-recompute':
        return decode_call(model, state or random_cache(model.config, length, batch), batch)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(model.config.vocab_size, (2, batch, length), generator=generator).to(device)

    def prefill():
        model.prefill(x)

    def train():
        with autocast():
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in model.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    if kind == 'train' and not hasattr(model, 'optimizers'):
        model.optimizers = model.configure_optimizers('adamw', 1e-4, 0.1, (0.9, 0.95))
    call = train if kind == 'train' else prefill
    return sdpa_kernel(SDPBackend.MATH)(call) if arm == 'A-math' else call


def random_cache(c, position, batch):
    """A KV cache after `position` tokens, with room for all that follow"""
    shape = batch, c.n_head, position + DECODED * (repetitions + 3), c.n_embd // c.n_head
    cache = {'dtype': getattr(torch, dtype), 'device': device}
    if 2 * c.n_layer * math.prod(shape) * cache['dtype'].itemsize > available_memory():
        raise MemoryError
    return [(torch.randn(shape, **cache), torch.randn(shape, **cache), position) for _ in range(c.n_layer)]


def decode_call(model, state, batch):
    token = torch.ones(batch, dtype=torch.long, device=device)
    step = model.capture_step(token, state) if device.startswith('cuda') else None

    @torch.inference_mode()
    def call():
        nonlocal state
        for _ in range(DECODED):
            if step:
                logits = step(token)
            else:
                logits, state = model.step(token, state)
            token.copy_(logits.argmax(-1))
    return call


def decode_bytes(model, position, batch):
    """The least that a token must move, (weights, state): weights once, but for the learned taps, which the state has
    in their effective form; ring and taps once; GLA state in and out; KV cache once"""
    c, weights = model.config, sum(p.nbytes for name, p in model.named_parameters() if not name.endswith('taps'))
    size, state = model.norm.weight.element_size(), 0
    for kind in (c.pattern * c.n_layer)[:c.n_layer]:
        state += (c.n_embd * size * {'S': c.n_modes * (batch + 1), 'A': 2 * batch * position}[kind] if kind != 'L' else
                  2 * batch * 4 * c.n_embd * c.n_embd // c.n_head)
    return weights, state


def available_memory():
    with contextlib.suppress(OSError), open('/proc/meminfo') as file:
        if device == 'cpu':
            return 0.9 * 1024 * next(int(line.split()[1]) for line in file if line.startswith('MemAvailable'))
    return math.inf


def process_memory(field):
    """A line of this process's status in bytes (Linux), or the highest resident memory so far"""
    with contextlib.suppress(OSError, StopIteration), open('/proc/self/status') as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def prepare_process():
    """Little noise; and an allocation beyond what is free fails here, instead of the kernel ending some process."""
    warnings.filterwarnings('ignore', module='torch')
    torch._logging.set_logs(all=logging.ERROR)
    if device == 'cpu' and os.path.exists('/proc/self/status'):
        import resource
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(process_memory('VmData') + available_memory()), hard))


def out_of_memory(e):
    kinds = (torch.OutOfMemoryError, MemoryError, BrokenProcessPool)
    return isinstance(e, kinds) or 'allocate memory' in str(e) or 'bad_alloc' in str(e)


def timed(call):
    synchronize = getattr(torch, device.split(':')[0]).synchronize
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def memory_cell(knobs, shape, kind, arm, length, batch, compiled):
    """In a process of its own -> memory before a call and at its peak. A short call comes before (libraries, thread
    pools, in training the optimizer's moments), and one that compiles."""
    globals().update(knobs)
    prepare_process()
    model = speed_model(arm, shape, kind)
    speed_call(kind, arm, model, min(length, 64), 1, False)()
    call = speed_call(kind, arm, model, length, batch, compiled)
    if compiled:
        call()
    gc.collect()
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # Linux: the peak starts anew
    before = process_memory('VmHWM')
    call()
    return before, process_memory('VmHWM')


def ceilings():
    """What this machine can do, the best of several: matrix products, reading and copying memory"""
    found, big = {}, device.startswith('cuda')
    n = 8192 if big else 2048
    for name in dtype.split(','):  # not both: a CPU without bfloat16 takes minutes for it
        a, b = torch.randn(2, n, n, device=device).to(getattr(torch, name))
        found[f'matmul_{name}_tflops'] = 2 * n ** 3 / min(timed(lambda: a @ b) for _ in range(8)) / 1e12
    a = torch.randn(1 << (30 if big else 27), device=device)
    b = torch.empty_like(a)
    found['read_gbytes_per_second'] = a.nbytes / min(timed(f) for f in [a.sum, a.max] * 6) / 1e9
    found['copy_gbytes_per_second'] = 2 * a.nbytes / min(timed(lambda: b.copy_(a)) for _ in range(8)) / 1e9
    return found


def sdpa_backend(config, name):
    with contextlib.suppress(Exception):  # a private function of torch: what it would choose
        q = torch.randn(1, config['n_head'], 1024, config['n_embd'] // config['n_head'], device=device)
        q = q.to(getattr(torch, name))
        return SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True)).name.lower()
    return 'unknown'


class Skipped(Exception):
    """Why a cell is not measured"""


class Bench:
    """The cells of cells.jsonl: finished ones are kept, new ones written the moment they are measured."""
    CASE = ('kind', 'arm', 'length', 'batch', 'dtype', 'compile', 'mode')
    SOURCE = ('model', 'code', 'torch', 'hardware')

    def __init__(self, run):
        self.path, self.cells, self.pace, self.start = os.path.join(out, 'cells.jsonl'), [], {}, time.monotonic()
        if os.path.exists(self.path) and not (overwrite and kinds):
            with open(self.path) as file:
                self.cells = [json.loads(line) for line in file if line.endswith('}\n')]
        if not kinds:
            return
        env, self.shape = environment(), speed_shape(run)
        shape_id = hashlib.sha256(json.dumps(self.shape[0], sort_keys=True).encode()).hexdigest()[:8]
        source = f'{self.shape[2]} {shape_id}', env['model.py'], env['torch'], env['hardware']
        self.source = dict(zip(self.SOURCE, source))
        same = [c for c in self.cells if all(c[k] == v for k, v in self.source.items())]
        if same != self.cells:
            print(f'{self.path}: dropped {len(self.cells) - len(same)} cells of other hardware, torch, code or shape')
        self.cells, self.limits = same, ceilings()
        write('cells.jsonl', ''.join(json.dumps(cell) + '\n' for cell in same))
        prepare_process()

    def add(self, cell, **values):
        cell |= values
        self.cells.append(cell)
        with open(self.path, 'a') as file:
            file.write(json.dumps(cell) + '\n')
        speed_tables(self.cells)
        what = cell['status']
        if what == 'ok':
            what = f'{cell["tokens_per_second"]:,.0f} tokens/s, {cell["repetitions"]} repetitions'
            if cell['kind'] == 'decode':
                what += f', {cell["ms_per_token"]:.3f} ms a token, {cell["of_floor"]:.0%} of the floor'
            elif cell['above_bytes'] is not None:
                what += f', {cell["above_bytes"] / 2 ** 20:,.0f} MiB'
        print(f'{cell["kind"]:7} {cell["arm"]:11} {cell["length"]:9,} x {cell["batch"]:<3} {cell["dtype"]} compile '
              f'{cell["compile"]}: {what}', flush=True)

    def not_too_long(self, key, work):
        """By the pace of the last call of its kind"""
        if (seconds := self.pace.get((*key, dtype, compile), 0) * work) > max_cell_seconds:
            raise Skipped(f'about {seconds:.0f} s a call')

    def reached(self, model, states, position):
        """The state after `position` tokens"""
        if position not in states:
            self.not_too_long(('read',), position)
            idx = torch.randint(model.config.vocab_size, (1, position), device=device)
            model.prefill(idx[:, :1024])  # libraries set themselves up
            seconds = timed(lambda: states.update({position: model.prefill(idx)[1]}))
            if position >= 1024:
                self.pace['read', dtype, compile] = seconds / position
        return states[position]

    def begin(self, kind, arm, length, batch, model, states):
        """-> [what is timed, times (that of the first call), memory before and at the peak]"""
        memory, state, case = (None, None), None, (kind, arm, length, batch, compile == 'on')
        if arm == 'A-math' and compile == 'on':
            raise Skipped('compiled, it would be the fused kernels of A once more')
        if kind != 'decode':
            self.not_too_long((kind, arm), length * batch * model.flops_per_token(length))
            if device == 'cpu' and measure_memory:
                with ProcessPoolExecutor(1, get_context('spawn')) as pool:
                    memory = pool.submit(memory_cell, {k: globals()[k] for k in KNOBS}, self.shape, *case).result()
        elif arm == 'FELA':
            state = repeat_state(self.reached(model, states, length), batch)
        call = speed_call(kind, arm, model, *case[2:], state)
        return [call, [timed(call)], memory]

    def measure(self, kind, length, batch, group, models, states):
        """A group of cells, one for each arm: first calls, then repetitions in turn"""
        begun, cuda = {}, device.startswith('cuda')
        torch._dynamo.reset()
        for arm, cell in group.items():
            try:
                begun[arm] = self.begin(kind, arm, length, batch, models[arm[0]], states)
            except Exception as e:
                reason = ' '.join(str(e).split())[:150]
                self.add(cell, status='oom' if out_of_memory(e) else f'skipped: {e}' if isinstance(e, Skipped) else
                         f'failed: {type(e).__name__}: {reason}')
        for i in range(repetitions):
            for row in begun.values():
                if i == 0 or sum(row[1][1:]) < max_cell_seconds:  # without the first call, which may compile
                    torch.cuda.reset_peak_memory_stats() if cuda else None
                    row[1].append(timed(row[0]))
                    if cuda:  # after a call gradients and outputs are gone, the moments are not
                        row[2] = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        for arm, (_, times, memory) in begun.items():
            self.add(group[arm], status='ok', **self.values(kind, arm, models[arm[0]], length, batch, times, memory))

    def values(self, kind, arm, model, length, batch, times, memory):
        first, *times = times
        q1, median, q3 = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
        values = {'seconds': median, 'seconds_q1': q1, 'seconds_q3': q3, 'repetitions': len(times),
                  'first_call_seconds': first}
        if kind == 'decode':
            n, (weights, state) = 1 if arm == 'A-recompute' else DECODED, decode_bytes(model, length, batch)
            floor = (weights + state) / self.limits['read_gbytes_per_second'] / 1e6
            return values | {'ms_per_token': 1e3 * median / n, 'ms_q1': 1e3 * q1 / n, 'ms_q3': 1e3 * q3 / n,
                             'floor_ms': floor, 'of_floor': floor * n / (1e3 * median),
                             'tokens_per_second': batch * n / median, 'state_bytes': state}
        tokens, flops, (before, peak) = length * batch, model.flops_per_token(length), memory
        self.pace[kind, arm, dtype, compile] = median / (tokens * flops)
        if kind == 'prefill':  # forward is a third of it, and logits are those of the last position only
            flops = flops / 3 - 2 * model.embedding.weight.numel()
        tflops = flops * tokens / median / 1e12
        return values | {'tokens_per_second': tokens / median, 'tokens_per_second_q1': tokens / q3,
                         'tokens_per_second_q3': tokens / q1, 'tflops': tflops,
                         'of_matmul_ceiling': tflops / self.limits[f'matmul_{dtype}_tflops'], 'before_bytes': before,
                         'peak_bytes': peak, 'above_bytes': peak and peak - before}

    def measure_all(self):
        """All cells that are not there yet -> how many are left for lack of time"""
        global dtype, compile
        left, asked, there = 0, (dtype, compile), {tuple(c[k] for k in self.CASE) for c in self.cells}
        for dtype, kind in itertools.product(asked[0].split(','), kinds.split(',')):
            models, states = {}, {}
            sizes = sorted({(n, max(1, t // n)) for n in numbers(lengths) for t in numbers(batch_tokens)},
                           key=lambda size: (math.prod(size), size))
            if kind == 'decode':
                sizes = [(p, b) for b in numbers(decode_batches) for p in numbers(positions)]
            mode = {'decode': ('eager', 'graph')[device.startswith('cuda')], 'prefill': '',
                    'train': 'recomputed' * checkpoint_activations}[kind]
            for compile, (length, batch) in itertools.product(asked[1].split(','), sizes):
                group = {arm: dict(zip(self.CASE, (kind, arm, length, batch, dtype, compile, mode))) | self.source
                         for arm in arms.split(',') if arm != ('A-math' if kind == 'decode' else 'A-recompute')}
                group = {arm: cell for arm, cell in group.items() if tuple(cell[k] for k in self.CASE) not in there}
                if max_minutes and time.monotonic() - self.start > 60 * max_minutes:
                    left += len(group)
                elif group:
                    for arm in {arm[0] for arm in group} - models.keys():
                        models[arm] = speed_model({'F': 'FELA'}.get(arm, arm), self.shape, kind)
                    self.measure(kind, length, batch, group, models, states)
                    gc.collect()
                    torch.cuda.empty_cache() if device.startswith('cuda') else None
        dtype, compile = asked
        return left


def speed(run=None):
    bench, record = Bench(run), {'protocol': SPEED_PROTOCOL}
    if kinds:
        left, backends = bench.measure_all(), {name: sdpa_backend(bench.shape[0], name) for name in dtype.split(',')}
        record |= {'ceilings': bench.limits, 'sdpa_backend': backends, 'shape': bench.shape[0], 'cells_left': left}
        record['protocol'] += f'Measured ceilings: {", ".join(f"{k} {v:.4g}" for k, v in bench.limits.items())}. ' \
                              f'SDPA backend: {", ".join(f"{v} ({k})" for k, v in backends.items())}.'
        if left:
            print(f'max_minutes={max_minutes} is over: the same command goes on with the {left} cells that are left')
    elif not bench.cells:
        die(f'{bench.path}: no cells there')
    pairs, rows = speed_tables(bench.cells), []
    compared = [(f, a) for f, a in pairs if a['status'] == 'ok']
    alone = [(c, {}) for c in bench.cells if c['arm'] == 'FELA' and c['status'] == 'ok' and all(c is not f for f, _ in compared)]
    for f, a in sorted(compared + alone, key=lambda pair: bench.cells.index(pair[0])):
        what = 'ms_per_token' if f['kind'] == 'decode' else 'tokens_per_second'
        mib = [c['above_bytes'] / 2 ** 20 if c.get('above_bytes') else None for c in (f, a)]
        ratio = a and (a['seconds'] / f['seconds'] if a['arm'] != 'A-recompute' else a[what] / f[what])
        rows.append({k: f[k] for k in ('kind', 'length', 'batch', 'dtype', 'compile', 'mode')} | {
            'against': a.get('arm'), 'unit': what.replace('_', ' '), 'FELA': f[what], 'attention': a.get(what),
            'times as fast': ratio or None, 'of the floor': f.get('of_floor'), 'FELA MiB': mib[0], 'attention MiB': mib[1]})
    return record | {'table': rows, 'pictures': draw_speed(bench.cells, pairs) if plots and bench.cells else []}


def speed_tables(cells):
    """The four CSV files -> pairs of cells (FELA, another arm) of the same case"""
    for name, kinds, columns in (
            ('throughput.csv', 'train prefill', 'tokens_per_second tokens_per_second_q1 tokens_per_second_q3 seconds '
             'first_call_seconds repetitions tflops of_matmul_ceiling'),
            ('vram.csv', 'train prefill', 'above_bytes peak_bytes before_bytes'),
            ('decode.csv', 'decode', 'ms_per_token ms_q1 ms_q3 tokens_per_second floor_ms of_floor state_bytes '
             'first_call_seconds repetitions')):
        if rows := [c for c in cells if c['kind'] in kinds.split()]:
            write_csv(name, rows, [*Bench.CASE, 'status', *columns.split(), *Bench.SOURCE])
    same = ('kind', 'length', 'batch', 'dtype', 'compile', 'mode', *Bench.SOURCE)
    ours = {tuple(c[k] for k in same): c for c in cells if c['arm'] == 'FELA' and c['status'] == 'ok'}
    pairs = [(ours[key], c) for c in cells if c['arm'] != 'FELA' and (key := tuple(c[k] for k in same)) in ours]
    if rows := [f | {'against': a['arm'], 'status': a['status'], 'fela_seconds': f['seconds'], 'against_seconds':
                a.get('seconds'), 'ratio': a['seconds'] / f['seconds'] if a['status'] == 'ok' else None}
                for f, a in pairs if f['kind'] != 'decode']:
        write_csv('wallclock.csv', rows, [*same[:6], 'against', 'status', 'fela_seconds', 'against_seconds', 'ratio',
                                          *Bench.SOURCE])
    return pairs


def draw_speed(cells, pairs):
    cells = [c | {'above_mib': (c.get('above_bytes') or 0) / 2 ** 20} for c in cells]
    for f, a in pairs:
        if a['status'] == 'ok' and f['kind'] != 'decode':
            cells.append(a | {'ratio': a['seconds'] / f['seconds']})
    pictures = []
    for name, kinds, value, label, *band in (
            ('throughput.png', 'train prefill', 'tokens_per_second', 'tokens per second', 'tokens_per_second_q1',
             'tokens_per_second_q3'),
            ('wallclock.png', 'train prefill', 'ratio', 'time of attention / time of FELA'),
            ('vram.png', 'train prefill', 'above_mib', 'peak memory above the weights (MiB)'),
            ('decode.png', 'decode', 'ms_per_token', 'milliseconds per token', 'ms_q1', 'ms_q3')):
        found = [c for kind in kinds.split() for c in cells if c['kind'] == kind and c.get(value)]
        cases = list(dict.fromkeys((c['kind'], c['dtype']) for c in found))
        fig, axes = figure(len(cases)) if cases else (None, [[]])
        for ax, case in zip(axes[0], cases):
            inside, lines = [c for c in found if (c['kind'], c['dtype']) == case], {}
            batches = sorted({c['batch'] for c in inside}) if case[0] == 'decode' else [0]
            for c in sorted(inside, key=lambda c: c['tokens_per_second']):  # of several batch sizes the fastest
                key = list(NAMES).index(c['arm']), c['arm'], c['compile'], c['mode'], c['batch'] if case[0] == 'decode' else 0
                lines.setdefault(key, {})[c['length']] = c
            for (_, arm, compiled, mode, batch), line in sorted(lines.items()):
                xs, best = sorted(line), [line[n] for n in sorted(line)]
                ax.plot(xs, [c[value] for c in best], '-' if compiled == 'off' else '--', color=COLOURS[arm],
                        marker='osD^v'[batches.index(batch) % 5], label=NAMES[arm] + ', compiled' * (compiled == 'on')
                        + ', recomputed' * (mode == 'recomputed') + f', batch {batch}' * bool(batch))
                if band:
                    low, high = ([c[key] for c in best] for key in band)
                    ax.fill_between(xs, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
            token_axis(ax, {c['length'] for c in inside},
                       'tokens read before' if case[0] == 'decode' else 'length of the sequence (tokens)')
            plain_log(ax)
            if value == 'ratio':
                ax.axhline(1, color='0.4', linewidth=1)
            ax.set(ylabel=label, title=', '.join(case))
            ax.legend(fontsize=8, framealpha=0.8, frameon=True, edgecolor='none')
        if cases:
            fig.suptitle(f'{cells[0]["model"].rpartition(" ")[0]} on {cells[0]["hardware"]}', fontsize=9, color='0.35')
            pictures.append(save_figure(fig, name))
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# interpret: filters, gates, logit lens


@torch.inference_mode()
def interpret(run):
    model, (tokens, source) = run.model, text_tokens(run)
    width = min(1024, len(tokens) // 8)
    if width < 64:
        die(f'{source} has {len(tokens)} tokens: expected at least 512')
    idx = windows(tokens, np.linspace(0, len(tokens) - width, 8).astype(int), width)  # (8,T)
    layers = range(1, len(model.blocks) + 1)
    outputs, decays, hooks = {i: [] for i in layers}, {i: [] for i in layers}, []
    for i, block in zip(layers, model.blocks):
        hooks.append(block.register_forward_hook(lambda m, args, result, i=i: outputs[i].append(result[0].float())))
        if hasattr(block.mixer, 'gate_up'):
            hooks.append(block.mixer.gate_up.register_forward_hook(
                lambda m, args, gate, i=i, mixer=block.mixer: decays[i].append(mixer.log_decay(gate).cpu())))
    with autocast():
        model.hidden(model.embedding(idx))
    for hook in hooks:
        hook.remove()
    gates = {i: torch.cat(parts, 1).exp() for i, parts in decays.items() if parts}  # (B,T,H,K)
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    responses, filters, memory = {}, {}, {}
    for i, block in zip(layers, model.blocks):
        if hasattr(block.mixer, 'effective_taps'):  # (M,C); frequency in cycles a token, 0.5 is the fastest
            taps = block.mixer.effective_taps().float().cpu()
            power = torch.fft.rfft(taps, n=max(1024, taps.shape[0]), dim=0).abs().square()
            centroid = (torch.linspace(0, 0.5, len(power)).unsqueeze(1) * power).sum(0) / power.sum(0)
            energy = taps.square() / taps.square().sum(0)
            half = (energy.cumsum(0) < 0.5).sum(0, keepdim=True)  # the tap that passes half of the energy, and how far
            lag = (half - 0.5 + (0.5 - (energy.cumsum(0) - energy).gather(0, half)) / energy.gather(0, half))[0]
            responses[i] = power[:, centroid.argsort()], centroid.sort().values
            filters[i] = {'centroid_quartiles': centroid.quantile(quartiles).tolist(),
                          'half_energy_lag_quartiles': lag.quantile(quartiles).tolist(),
                          'mean_response_db': (10 * power.mean(1).log10())[::len(power) // 32].tolist()}
    for i, g in gates.items():
        tokens_kept = 1 / (1 - g.double()).clamp(min=1e-6)
        memory[i] = {'mean': g.mean().item(), 'mean_by_head': g.mean((0, 1, 3)).tolist(), 'memory_by_head': [
            np.quantile(tokens_kept[:, :, h].numpy(), (0.1, 0.5, 0.9)).tolist() for h in range(g.shape[2])]}

    # logit lens: what each layer would say by the last norm and the output weights
    targets, tops, bits = idx[:, 1:].flatten(), [], []
    for x in [model.embedding(idx).float(), *(torch.cat(parts, 1) for parts in outputs.values())]:
        parts = [(F.cross_entropy(logits, t, reduction='none'), logits.argmax(-1))
                 for h, t in zip(x[:, :-1].flatten(0, 1).split(1024), targets.split(1024))
                 for logits in [model.logits(model.norm(h)).float()]]
        losses, top = (torch.cat(part) for part in zip(*parts))
        tops.append(top)
        bits.append(losses.mean().item() / math.log(2))
    agree = torch.stack([top == tops[-1] for top in tops])  # (layers + 1, N)
    commit = (len(tops) - agree.flip(0).cumprod(0).sum(0)).float()  # from this layer on the final prediction is on top
    share = [(commit == i).float().mean().item() for i in range(len(tops))]
    lens = {'commit_share': share, 'commit_median': commit.median().item(), 'bits_per_token': bits}
    write('interpret.json', {'text': source, 'filters': filters, 'gates': memory, 'logit_lens': lens})
    rows = [{'layer': f'{i} {(model.config.pattern * i)[i - 1]}',
             'centroid (cycles/token)': filters[i]['centroid_quartiles'][1] if i in filters else None,
             'half-energy lag (tokens)': filters[i]['half_energy_lag_quartiles'][1] if i in filters else None,
             'mean gate': memory[i]['mean'] if i in memory else None,
             'memory (tokens)': statistics.median(m[1] for m in memory[i]['memory_by_head']) if i in memory else None,
             'committed (%)': 100 * sum(share[:i + 1]), 'lens (bits/token)': bits[i]} for i in layers]
    pictures = []
    if plots:
        pictures += draw_filters(responses, filters) if filters else []
        pictures += [draw_gates(gates, memory)] if gates else []
        pictures += [draw_lens(lens)]
    return {'table': rows, 'pictures': pictures, 'commit_median': lens['commit_median'], 'protocol': (
        'Filters: rfft of the effective taps of every channel; centroid and half-energy lag are medians over channels. '
        f'Gates and logit lens on 8 x {width} tokens of the {source}. Memory: 1 / (1 - gate), median over tokens and '
        'channels, then over heads. Logit lens: last norm and output weights after every layer; committed: the final '
        'prediction is on top from this layer on, or from an earlier one. The paper (12 layers): mean gate 0.65-0.72 '
        'early, 0.91 deep; predictions commit by layer 6.')}


def draw_filters(responses, filters):
    columns = min(4, len(responses))
    fig, axes = figure(columns, -(-len(responses) // columns), 3.4, 2.9)
    for ax in axes.flat[len(responses):]:
        ax.axis('off')
    for ax, (i, (power, centroid)) in zip(axes.flat, responses.items()):  # power (F,C), in 32 groups of like channels
        groups = torch.stack([part.mean(1) for part in (power / power.sum(0)).tensor_split(min(32, power.shape[1]), 1)])
        gain = 10 * (groups / groups.amax(1, True)).clamp(min=1e-6).log10().numpy()  # dB
        image = ax.imshow(gain, aspect='auto', origin='lower', extent=(0, 0.5, 0, 100), cmap='magma', vmin=-20, vmax=0)
        ax.plot(centroid, np.linspace(0, 100, len(centroid)), color='white', linewidth=1.2, label='centroid')
        ax.set(title=f'layer {i}', xlabel='frequency (cycles per token)')
        ax.grid(False)
    for ax in axes[:, 0]:
        ax.set_ylabel('channels, slow to fast (%)')
    axes[0, 0].legend(labelcolor='white', loc='lower right')
    fig.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.01, label='gain below the peak (dB)')
    fig.suptitle('Magnitude response of the filters of every S layer', fontsize=11)
    done = [save_figure(fig, 'filters.png')]
    fig, axes = figure(2)
    for ax, key, label, title in (
            (axes[0, 0], 'centroid', 'spectral centroid (cycles per token)', 'Frequency of the filters by depth'),
            (axes[0, 1], 'half_energy_lag', 'lag of half the energy (tokens)', 'Reach of the filters by depth')):
        low, middle, high = zip(*(f[f'{key}_quartiles'] for f in filters.values()))
        ax.fill_between(list(filters), low, high, color=RED, alpha=0.15, linewidth=0, label='half of the channels')
        ax.plot(list(filters), middle, 'o-', color=RED, label='median channel')
        ax.set(xlabel='layer', ylabel=label, title=title)
        ax.set_xticks(list(filters))
        ax.set_ylim(bottom=0)
        ax.legend()
    return done + [save_figure(fig, 'filters_by_depth.png')]


def draw_gates(gates, memory):
    import matplotlib
    fig, ((left, right),) = figure(2)
    colours, heads = matplotlib.colormaps['viridis'](np.linspace(0.1, 0.8, len(gates))), []
    for (i, g), colour in zip(gates.items(), colours):
        density, edges = np.histogram(g.numpy().ravel(), 50, (0, 1), density=True)
        left.stairs(density, edges, color=colour, linewidth=1.6, fill=len(gates) == 1,
                    label=f'layer {i}: mean {g.mean():.2f}')
        first = len(heads)
        for h, (low, middle, high) in enumerate(memory[i]['memory_by_head'], 1):
            right.plot([len(heads)] * 2, [low, high], color=colour, linewidth=5, alpha=0.35, solid_capstyle='butt')
            right.plot(len(heads), middle, 'o', color=colour)
            heads.append(f'{h}')
        right.text((first + len(heads) - 1) / 2, 1.01, f'layer {i}', transform=right.get_xaxis_transform(), ha='center',
                   color=colour)
    left.set(xlabel='gate: share of the state that a token keeps', ylabel='density', title='GLA gates on real text')
    left.legend()
    right.set_xticks(range(len(heads)), heads, fontsize=9 if len(heads) < 30 else 5)
    right.set(xlabel='head', ylabel='effective memory, 1 / (1 - gate) (tokens)')
    right.set_title('Memory of every head: median, and 10% to 90%', pad=18)
    plain_log(right)
    return save_figure(fig, 'gates.png')


def draw_lens(lens):
    fig, ((left, right),) = figure(2)
    xs = range(len(lens['bits_per_token']))
    left.bar(xs, [100 * s for s in lens['commit_share']], color=RED, alpha=0.7, label='commit at this layer')
    left.plot(xs, 100 * np.cumsum(lens['commit_share']), 'o-', color=BLUE, label='have committed')
    left.set(xlabel='layer (0: embedding)', ylabel='tokens (%)', ylim=(0, 104),
             title='When the final prediction comes to the top for good')
    left.legend(loc='upper left')
    right.plot(xs, lens['bits_per_token'], 'o-', color=RED)
    right.set(xlabel='layer (0: embedding)', ylabel='loss (bits per token)', title='Loss if the network ended there')
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xticks(xs)
    return save_figure(fig, 'logit_lens.png')


# ---------------------------------------------------------------------------------------------------------------------
# the run


def check():
    """Chooses what is on auto, refuses what cannot work before anything is measured -> names of the suites"""
    global device, dtype
    names = list(SUITES) if suite == 'all' else suite.split(',')
    for key, allowed in (('suite', ('all', *SUITES)), ('arms', COLOURS), ('compile', ('on', 'off')),
                         ('kinds', ('', 'train', 'prefill', 'decode')), ('dtype', ('auto', 'float32', 'bfloat16'))):
        wrong = [name for name in globals()[key].split(',') if name not in allowed]
        if wrong:
            die(f'{key}: {wrong[0]!r} is none of {", ".join(filter(None, allowed))}')
    for keys, least in (('blocks', 2), ('batch_size block_tokens needle_seeds repetitions', 1),
                        ('limit max_length seed vocab_size max_cell_seconds max_minutes', 0)):
        for key in keys.split():
            if not globals()[key] >= least:
                die(f'{key}={globals()[key]}: expected at least {least}')
    for text in (contexts, needle_lengths, lengths, batch_tokens, positions, decode_batches):
        numbers(text)
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind = device.split(':')[0]
    if kind not in ('cpu', 'cuda', 'mps') or not getattr(torch, kind).is_available():
        die(f'device={device!r}: not available here (auto, cpu, cuda, cuda:1, mps)')
    if kind == 'cuda':
        torch.cuda.set_device(torch.device(device).index or 0)
    if dtype == 'auto':
        dtype = 'bfloat16' if kind == 'cuda' else 'float32'
    if ',' in dtype and names != ['speed']:
        die(f'dtype={dtype!r}: expected one, for suites other than speed')
    if 'lm' in names and task_data and not os.path.isdir(task_data):
        die(f'task_data={task_data!r}: no such folder')
    for name, needed in (('matplotlib', plots), ('lm_eval', 'lm' in names)):
        if needed and importlib.util.find_spec(name) is None:
            hint = ', or --plots=False' * (name == 'matplotlib')
            die(f'{name} is not installed: pip install {name.replace("_", "-")}{hint}')
    return names


def write_page(meta):
    """README.md of the results: every suite's table, pictures and protocol"""
    lines = [f'# {os.path.basename(os.path.abspath(out))}', '', 'Written by `eval.py`; knobs and hashes: meta.json.']
    for name, record in meta.items():
        lines += ['', f'## {name}', '', *(table_lines(record['table'], markdown=True) if record['table'] else ()), '']
        lines += [f'![{picture}]({picture})' for picture in record.get('pictures', ())]
        lines += ['', record['protocol'], '', f'{record["source"]}; {record["hardware"]}; torch {record["torch"]}; '
                  f'{record["dtype"]}; commit {record["commit"]}; {record["date"]}.', '', f'    {record["command"]}']
    write('README.md', '\n'.join(lines) + '\n')


def main():
    global out
    if make_passkey:
        return write_passkeys()
    names, run, meta = check(), None, {}
    folder = os.path.basename(os.path.abspath(checkpoint if os.path.isdir(checkpoint) else os.path.dirname(checkpoint)))
    if names != ['speed'] or kinds and not model_config:
        run = load()
        print(f'{checkpoint}: step {run.step:,}, {run.model.num_parameters():,} parameters, trained with '
              f'{run.block_size:,} tokens of context')
    out = out or os.path.join('results', os.path.basename(model_config).removesuffix('.py') if not run else
                              f'{os.path.basename(run.config["dataset"])}_default' if checkpoint == 'out' else folder)
    os.makedirs(out, exist_ok=True)
    with contextlib.suppress(FileNotFoundError, ValueError), open(os.path.join(out, 'meta.json')) as file:
        meta = json.load(file)
    for name in names:
        knobs = {k: globals()[k] for k in SUITES[name].split()}
        key = hashlib.sha256(json.dumps([run and run.sha256, seed, dtype, knobs]).encode()).hexdigest()[:16]
        print(f'\n-- {name}', flush=True)
        if name != 'speed' and meta.get(name, {}).get('key') == key and not overwrite:
            print('done before with this checkpoint and these knobs (--overwrite=True measures again)')
        else:
            result = {'lm': lm, 'longctx': longctx, 'needle': needle, 'speed': speed, 'interpret': interpret}[name](run)
            if name == 'speed' and not kinds and name in meta:  # measured before, maybe elsewhere; only drawn again
                meta[name] |= {k: result[k] for k in ('table', 'pictures')}
            else:
                changed = {k: globals()[k] for k in (*'checkpoint out seed dtype batch_size plots'.split(), *knobs)}
                changed = {k: os.path.basename(v) if isinstance(v, str) and os.path.isabs(v) else v
                           for k, v in changed.items() if v != KNOBS[k]}
                meta[name] = {
                    'key': key, 'source': f'{folder}, step {run.step}, sha256 {run.sha256}' if run else model_config,
                    'command': f'python eval.py --suite={name}' + ''.join(f' --{k}={v}' for k, v in changed.items()),
                    'date': time.strftime('%Y-%m-%d'), 'device': device, 'dtype': dtype, 'compile': compile,
                    'seed': seed, 'knobs': {k: changed.get(k, v) for k, v in knobs.items()}} | environment() | result
            write('meta.json', meta)
            write_page(meta)
        print('\n'.join([*(table_lines(meta[name]['table']) if meta[name]['table'] else ()), meta[name]['protocol']]))


if __name__ == '__main__':
    globals().update(configure(globals()))
    try:
        main()
    except DataError as e:
        die(e)
    except CheckpointError as e:
        die(f'{e}' + '; train one with `python train.py`' * (checkpoint == 'out' and not os.path.exists('out')))
    except OSError as e:
        die(f'{e.filename or out}: {e.strerror or e}', 1)
    except torch.OutOfMemoryError:
        die(f'{device} is out of memory: a smaller batch_size than {batch_size} may do', 1)
    except KeyboardInterrupt:
        die('interrupted: the same command keeps what is finished and goes on', 130)
