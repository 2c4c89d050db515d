"""
Five suites over one checkpoint: tables, pictures and protocols in a folder of results/.

    python eval.py                                     all suites, the newest checkpoint of the default run
    python eval.py --suite=lm --tasks=boolq,piqa --checkpoint=out_gpt --out=results/gpt
    python eval.py --suite=speed --model_config=config/fela_109m.py --out=results/cpu    needs no checkpoint
    python eval.py --make_passkey=data/passkey         text for config/passkey_tiny.py

The same command again goes on where it was interrupted. The folder of the results gets README.md with every
table, picture and protocol, and meta.json with the checkpoint's sha256, commit, hardware, versions and knobs.
"""
import ast
import gc
import glob
import json
import logging
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from configurator import configure, die, pick_device, require, sha256_of, write_whole
from model import FELA, MIXERS, CheckpointError, FELAConfig, load_model, repeat_state
from prepare import DataError, TokenData, ensure_pysrc, get_tokenizer

checkpoint = 'out'  # a folder of checkpoints (the newest is taken), or one checkpoint
suite = 'all'  # lm, longctx, needle, interpret, speed; several with commas, or all
out = ''  # folder of the results; '': results/<dataset>_default, or results/<folder of the checkpoint>
overwrite = False  # measure again what is there already
plots = True  # draw PNGs (needs matplotlib)
seed = 1337  # of everything drawn at random
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16: of matrix products
batch_size = 16  # lm, longctx: sequences in a pass
text_file = ''  # longctx, interpret: this text ('': the validation split of the checkpoint's dataset)
# lm
tasks = 'wikitext,boolq,hellaswag,arc_easy,piqa,winogrande'  # any tasks of lm-eval
task_data = ''  # folder of <task>*.jsonl in lm-eval's schema ('': the hub); tasks without a file are left out
limit = 0  # documents of a task (0: all)
max_length = 2048  # tokens a model may see, context and continuation (0: whole documents); changes the score
# longctx
contexts = '256,512,1024,2048,4096,8192,16384,32768,65536'  # tokens read before a block of targets
blocks = 32  # blocks of targets, the same ones after every context
block_tokens = 256  # targets in a block
# needle
needle_lengths = '256,512,1024,2048,4096'  # tokens of a prompt
needle_depths = '0,0.25,0.5,0.75,1'  # where the passkey stands; 0: at the start
needle_seeds = 20  # prompts of a cell
haystack = ''  # a text file to hide the passkey in ('': a few sentences over and over)
make_passkey = ''  # write a dataset of passkey text to this folder, and end
# speed; rows of earlier commands in the folder stay, of one shape, dtype, machine and model.py
model_config = ''  # a config of train.py: its shape instead of a checkpoint's
vocab_size = 50257  # with model_config
kinds = 'train,prefill,decode'  # what is timed; recompute: train with checkpoint_activations
arms = 'FELA,A'  # FELA: the pattern as it is; others are patterns, A: softmax attention in every layer
compile = 'off'  # off, on or off,on: torch.compile
lengths = '256,1024,4096,16384'  # tokens in a sequence; decode: read before
batches = '1'  # sequences at once
repetitions = 5  # of every timing; median and quartiles are kept
max_cell_seconds = 10.0  # repetitions end after this time

SUITES = {'lm': 'tasks task_data limit max_length', 'longctx': 'text_file contexts blocks block_tokens',
          'needle': 'needle_lengths needle_depths needle_seeds haystack', 'interpret': 'text_file',
          'speed': 'model_config vocab_size repetitions max_cell_seconds'}  # and what changes their results
_HERE = os.path.dirname(os.path.abspath(__file__))
_FILLER = 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. '
_NEEDLE = 'The pass key is {0}. Remember it. {0} is the pass key. '
_QUESTION = 'What is the pass key? The pass key is'
_STEPS = 16  # decoded in a repetition


def write(name, value):
    text = value if isinstance(value, str) else json.dumps(value, indent=1)
    write_whole(os.path.join(out, name), lambda file: file.write(text.encode()))


def write_csv(name, rows, columns):
    lines = [columns.split(), *([str(row.get(key, '')) for key in columns.split()] for row in rows)]
    write(name, '\n'.join(map(','.join, lines)) + '\n')


def table_lines(rows):
    """Rows as a table in markdown, for the page and for the terminal"""
    def show(v):
        return str(v) if not isinstance(v, float) else f'{v:,.0f}' if v >= 1000 else f'{v:.4g}'
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([show(row.get(key, '')) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    return ['| ' + ' | '.join(map(str.ljust, line, widths)) + ' |' for line in lines]


def numbers(knob, kind=int, least=1):
    with suppress(ValueError):
        if min(found := [kind(part) for part in globals()[knob].split(',')]) >= least:
            return found
    die(f'{knob}={globals()[knob]!r}: expected numbers of at least {least}, separated by commas')


def picture(name, *panels):
    """Panels of (data, options of axes.set) -> [name of the PNG]. Data: lines {label: (x, y)} or
    {label: (x, y, low, high)}, or an image {label of its colours: (array, lowest, highest)}"""
    if not plots or not panels:
        return []
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows, columns = -(-len(panels) // 3), min(len(panels), 3)
    fig = plt.figure(figsize=(4.8 * columns, 3.8 * rows), layout='constrained')
    for i, (data, options) in enumerate(panels, 1):
        ax = fig.add_subplot(rows, columns, i)
        for (label, (x, y, *band)), marker in zip(data.items(), 'osD^vP*X' * 9):
            if np.ndim(x) == 2:
                fig.colorbar(ax.imshow(x, vmin=y, vmax=band[0], cmap='Wistia', aspect='auto'), label=label)
                for (row, column), v in np.ndenumerate(x):
                    ax.text(column, row, f'{round(v, 2) + 0:g}', ha='center', va='center')
            else:
                ax.plot(x, y, marker=marker, markersize=4, label=label)
                ax.fill_between(x, *(band or (y, y)), alpha=0.15, linewidth=0)
                ax.grid(alpha=0.25)
                ax.legend(frameon=False)
        ax.set(**options)
        if 'xscale' in options:  # a tick at every length
            ticks = sorted({n for x, *_ in data.values() for n in x})
            ax.set_xticks(ticks, [f'{n / 1024:.4g}K' if n >= 1024 else n for n in ticks])
        ax.set_xticks([], minor=True)
    fig.savefig(os.path.join(out, name), dpi=120)
    plt.close(fig)
    return [name]


def read_text(path):
    try:
        with open(path, encoding='utf-8', newline='') as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as e:
        die(f'{path}: expected UTF-8 text: {e}')


def text_tokens(run):
    """-> (tokens of the text that longctx and interpret read, its name)"""
    if text_file:
        return np.array(run.tokenizer.encode(read_text(text_file))), os.path.basename(text_file)
    name = run.config['dataset']
    folder = name if os.path.dirname(name) else os.path.join('data', name)
    if name == 'pysrc':
        ensure_pysrc(folder)
    data = TokenData(folder, 'val', 1)
    if data.meta['splits']['train']['sha256'] != run.config.get('data_sha256'):
        print(f'warning: {folder} is not the data of this checkpoint', file=sys.stderr)
    return np.array(data.tokens, np.int64), f'validation split of {os.path.basename(name)}'


def autocast():
    return torch.autocast(device.split(':')[0], getattr(torch, dtype), enabled=dtype != 'float32')


@torch.inference_mode()
def score(model, idx, targets, state=None):
    """idx, targets (B,T), -1: none -> log-probability of each target (B,T), and whether it is the most likely
    token. Logits are made at targets only, a few at a time, as they are large."""
    idx, targets = idx.to(device), targets.to(device)
    with autocast():
        h, _ = model.hidden(model.embedding(idx), state)
    wanted, parts = targets >= 0, []
    for x, t in zip(h[wanted].float().split(256), targets[wanted].split(256)):
        logits = model.logits(x)
        parts.append((-F.cross_entropy(logits, t, reduction='none'), logits.argmax(-1) == t))
    return [torch.zeros(targets.shape, dtype=part.dtype).masked_scatter(wanted.cpu(), part.cpu())
            for part in map(torch.cat, zip(*parts))]


# -- lm: the tasks of lm-eval
FIELDS = {'wikitext': 'page', 'boolq': 'passage question label', 'piqa': 'goal sol1 sol2 label',
          'hellaswag': 'activity_label ctx_a ctx_b endings label', 'arc_easy': 'question choices answerKey',
          'winogrande': 'sentence option1 option2 answer'}


def lm_adapter(model, tokenizer):
    """lm-eval's interface on anything with hidden, logits and stream"""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
    longest, generator = max_length or 1 << 60, torch.Generator(device).manual_seed(seed)

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.eot

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, **kwargs):
            """Padded on the right, which a causal model does not see; the longest rows first"""
            results, rows = [None] * len(requests), []
            for i, (_, context, continuation) in enumerate(requests):
                n = len(continuation)
                tokens = ((context or [tokenizer.eot]) + continuation)[-max(longest, n) - 1:]
                rows.append((i, torch.tensor(tokens), slice(len(tokens) - 1 - n, len(tokens) - 1)))
            rows.sort(key=lambda row: -len(row[1]))
            for start in tqdm(range(0, len(rows), batch_size), 'log-likelihoods', disable=None, leave=False):
                part = rows[start:start + batch_size]
                idx = torch.nn.utils.rnn.pad_sequence([tokens for _, tokens, _ in part], batch_first=True)
                targets = torch.full_like(idx, -1)
                for row, (_, tokens, place) in zip(targets, part):
                    row[place] = tokens.roll(-1)[place]
                for (i, _, place), log_probs, greedy in zip(part, *score(model, idx, targets)):
                    results[i] = log_probs[place].double().numpy().sum().item(), greedy[place].all().item()
            return results

        def loglikelihood_rolling(self, requests, **kwargs):
            """Every token once, in windows of max_length; with max_length=0 in one go"""
            sums, pairs = [0.0] * len(requests), []
            for i, tokens in enumerate(tokenizer.encode(request.args[0]) for request in requests):
                split = get_rolling_token_windows(tokens, tokenizer.eot, min(longest, len(tokens) + 1), 1)
                pairs += [(i, *make_disjoint_window(pair)) for pair in split]
            for (i, *_), (value, _) in zip(pairs, self._loglikelihood_tokens(pairs)):
                sums[i] += value
            return sums

        def generate_until(self, requests, **kwargs):
            rows = tqdm(requests, 'generation', disable=None, leave=False)
            return [generate(row.args[0], **normalize_gen_kwargs(row.args[1])) for row in rows]

    def generate(text, until, max_gen_toks, do_sample, temperature=1.0, top_k=0, top_p=1.0):
        if max_gen_toks >= longest:
            raise ValueError(f'max_gen_toks={max_gen_toks}: expected less than max_length={max_length}')
        made, prompt = [], tokenizer.encode(text)[max_gen_toks - longest:] or [tokenizer.eot]
        with autocast():
            for token in model.stream(
                    torch.tensor([prompt], device=device), max_gen_toks, top_k=top_k, top_p=top_p,
                    temperature=temperature if do_sample else 0.0, generator=generator):
                if token.item() == tokenizer.eot:
                    break
                made.append(token.item())
                text = tokenizer.decode(made)
                if ends := [text.find(stop) for stop in until if stop and stop in text]:
                    return text[:min(ends)]
        return tokenizer.decode(made)
    return Adapter()


def local_task(task):
    """-> lm-eval's config of a task whose documents are in task_data, checked; None: no such file"""
    found = sorted(glob.glob(os.path.join(glob.escape(task_data), f'{task}*.jsonl')))
    if not found:
        return print(f'left out, for lack of {task}*.jsonl: {task}')
    for i, line in enumerate(read_text(found[0]).splitlines() or [''], 1):
        wanted, missing = FIELDS.get(task, ''), ['JSON object']
        with suppress(ValueError, TypeError):
            missing = set(wanted.split()) - dict(json.loads(line)).keys()
        if missing:
            die(f'{found[0]}, line {i}: no {missing.pop()!r}; expected {wanted or "an object"}')
    return {'task': task, 'dataset_path': 'json', 'dataset_name': None, 'training_split': None,
            'test_split': None, 'validation_split': 'v', 'dataset_kwargs': {'data_files': {'v': found[0]}}}


def lm(run):
    """lm-eval, zero-shot. wikitext: each token once, in windows of max_length tokens. Published on other
    data, for wikitext, BoolQ, HellaSwag, ARC-E, PIQA, WinoGrande: GPT-2 124M 37.37, -, 0.311, 0.438, -,
    0.516; Mamba-130M (its table 3) -, -, 0.353, 0.480, 0.645, 0.519; GLA-340M (its table 2) 28.65, 0.587,
    0.345, 0.451, 0.648, 0.514; FELA-1.13B BoolQ 0.614."""
    import datasets
    import lm_eval
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    members, left_out, results, rows = tasks.split(','), [], {}, []
    if task_data:
        local = {name: local_task(name) for name in members}
        left_out = [name for name in local if not local[name]]
        members = [{'group': 'local', 'task': [task for task in local.values() if task]}]
        if len(left_out) == len(local):
            die(f'task_data={task_data!r}: no file there for {tasks}, as boolq.jsonl for boolq')
    try:
        got = lm_eval.simple_evaluate(
            lm_adapter(run.model, run.tokenizer), tasks=members, limit=limit or None, bootstrap_iters=0,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed)
    except Exception as e:  # whatever a task, its data or the hub leads it to
        hint = '' if task_data else '; without the hub, --task_data=DIR takes local files'
        die(f'lm-eval: {type(e).__name__}: {" ".join(str(e).split())[:160]}{hint}', 1)
    for task, samples in got['samples'].items():
        scores = {k.removesuffix(',none'): v for k, v in got['results'][task].items() if isinstance(v, float)}
        metric = {'wikitext': 'word_perplexity', 'hellaswag': 'acc_norm'}.get(task) or next(iter(scores))
        results[task], n, value = scores, got['n-samples'][task]['effective'], scores[metric]
        rows.append({'task': task, 'documents': n, 'metric': metric, 'value': value})
        if task in FIELDS and 'acc' in scores:
            labels = [sample['doc'][FIELDS[task].split()[-1]] for sample in samples]
            if task == 'arc_easy':  # the key of the answer is one of its own keys
                labels = [s['doc']['choices']['label'].index(key) for s, key in zip(samples, labels)]
            majority = max(map(labels.count, labels)) / n
            rows[-1] |= {'error': math.sqrt(value * (1 - value) / n), 'majority': majority}
    note = {'lm_eval': lm_eval.__version__, 'tokenizer': run.tokenizer.name, 'max_length': max_length,
            'limit': limit, 'left_out': left_out}
    write('lm_eval_results.json', {'results': results, 'table': rows, 'config': note})
    return {'table': rows, 'pictures': [], 'note': note}


# -- longctx: bits per byte of the same targets after more and more context
def longctx(run):
    """Blocks of targets, spread over a text; the same at every context. The model reads exactly the context,
    from a fresh state, then the block with its true tokens. 95% intervals: 10,000 paired bootstrap draws.
    The paper: 1.78 bits per byte at 256, 1.49 at 32K (1.13B parameters, WikiText-103)."""
    (tokens, source), sizes, need = text_tokens(run), sorted(set(numbers('contexts'))), block_tokens * blocks
    if sizes[0] < 2 or len(tokens) < sizes[-1] + need:
        fit = ','.join(str(c) for c in sizes if 2 <= c <= len(tokens) - need)
        die(f'{source} has {len(tokens):,} tokens; contexts={contexts!r} and {blocks} x {block_tokens} need '
            f'{sizes[-1] + need:,}: expected a longer text or --contexts={fit}')
    starts = np.linspace(sizes[-1], len(tokens) - block_tokens, blocks).astype(int)
    text = [[t for t in tokens[s:s + block_tokens] if t != run.tokenizer.eot] for s in starts]
    size = np.array([len(run.tokenizer.decode_bytes(block)) for block in text])  # bytes
    draws = np.random.default_rng(seed).integers(blocks, size=(10000, blocks))  # at every context: paired
    found, rows, base = {}, [], max([c for c in sizes if c <= run.block_size], default=sizes[0])
    for c in sizes:
        bits, at_once = [], max(1, min(batch_size, (1 << 18) // c))
        for i in range(0, blocks, at_once):
            texts = np.stack([tokens[s - c:s + block_tokens] for s in starts[i:i + at_once]])
            idx = torch.tensor(texts, device=device)
            with autocast():
                _, state = run.model.prefill(idx[:, :c - 1])
            log_probs, _ = score(run.model, idx[:, c - 1:-1], idx[:, c:], state)
            bits += (-log_probs.double().sum(1) / math.log(2)).tolist()
        bits = np.array(bits)
        found[c] = np.array([bits.sum() / size.sum(), *bits[draws].sum(1) / size[draws].sum(1)])
    for c in sizes:
        rows.append({'context_tokens': c, 'beyond_training': c > run.block_size})
        for key, values in (('bpb', found[c]), ('change', found[c] - found[base])):
            low, high = np.quantile(values[1:], (0.025, 0.975)).tolist()
            rows[-1] |= {key: values[0].item(), f'{key}_low': low, f'{key}_high': high}
    write_csv('longctx_bpb.csv', rows, ' '.join(rows[0]))
    panels, axis = [], {'xscale': 'log', 'xlabel': 'context (tokens, K = 1,024)'}
    for key, label in (('bpb', 'bits per byte'), ('change', f'bits per byte - those after {base:,} tokens')):
        line = sizes, *([row[key + end] for row in rows] for end in ('', '_low', '_high'))
        panels.append(({f'trained with {run.block_size:,} tokens': line}, axis | {'ylabel': label}))
    note = f'{source}, {size.sum():,} bytes; trained with {run.block_size:,} tokens; change: against {base:,}'
    return {'table': rows, 'pictures': picture('longctx_bpb.png', *panels), 'note': note}


# -- needle: passkey retrieval
def passkey_prompt(tokenizer, hay, length, depth, rng, needle=True):
    """-> (prompt of `length` tokens, tokens of the answer)"""
    key = rng.integers(10000, 100000)
    before, question, answer = map(tokenizer.encode, (_NEEDLE.format(key), _QUESTION, f' {key}'))
    before = before if needle else []
    n, start = length - len(before) - len(question), rng.integers(len(hay))
    rest = np.take(hay, np.arange(start, start + n), mode='wrap').tolist()
    cut = round(depth * n)
    return rest[:cut] + before + rest[cut:] + question, answer


def needle(run):
    """A five-digit passkey in repeated sentences, or in a text: the share of prompts where greedy decoding
    says all its digits, by depth (0: at the start). control: the same questions, where nothing tells it."""
    tok, sizes = run.tokenizer, sorted(set(numbers('needle_lengths')))
    depths, hay = numbers('needle_depths', float, 0), tok.encode(read_text(haystack) if haystack else _FILLER)
    least = len(tok.encode(_NEEDLE + _QUESTION)) + 8
    if sizes[0] < least or max(depths) > 1 or not hay:
        die(f'needle_lengths={needle_lengths!r}, needle_depths={needle_depths!r}, haystack={haystack!r}: '
            f'expected at least {least} tokens, depths of 0 to 1 and some text')
    cells, rows = [], []
    for n in sizes:
        rows.append({'length': n, 'beyond_training': n > run.block_size})
        for d in [None, *depths]:  # None: the control, without a needle
            found = []
            for s in range(needle_seeds):
                rng = np.random.default_rng((seed, n, s))
                prompt, answer = passkey_prompt(tok, hay, n, d or 0, rng, d is not None)
                idx = torch.tensor([prompt + answer[:-1]], device=device)
                with autocast():
                    _, state = run.model.prefill(idx[:, :n - 1])
                log_probs, greedy = score(run.model, idx[:, n - 1:], torch.tensor([answer]), state)
                found.append((greedy.all(), log_probs.sum()))  # greedy decoding says it: each token is on top
            exact, log_prob = np.mean(found, 0).tolist()
            if d is None:
                rows[-1]['control'], control = exact, log_prob
            else:
                rows[-1][f'depth {d}'] = exact
                cells.append({'length': n, 'depth': d, 'exact': exact, 'log_prob': log_prob,
                              'bits_told': (log_prob - control) / math.log(2)})
    write('needle_heatmap.json', {'cells': cells, 'trained_length': run.block_size, 'needle': _NEEDLE})
    axes = {'xlabel': 'length of the prompt (tokens)', 'xticks': range(len(sizes)), 'xticklabels': sizes,
            'ylabel': 'depth of the passkey (share)', 'yticks': range(len(depths)), 'yticklabels': depths}
    panels = [({label: (np.reshape([cell[key] for cell in cells], (len(sizes), -1)).T, 0, most)}, axes)
              for key, most, label in (('exact', 1, 'share of passkeys found'),
                                       ('bits_told', 16.5, 'bits that the needle tells of a passkey'))]
    note = f'trained with {run.block_size:,} tokens; {needle_seeds} prompts a cell'
    return {'table': rows, 'pictures': picture('needle_heatmap.png', *panels), 'note': note}


def write_passkeys():
    """Passkey text as a dataset: documents of 128 to 512 bytes (of one size, their end would be learnt), a
    needle, then its key again and again, mostly soon (learnt first), at times after many sentences."""
    rng, path = np.random.default_rng(seed), os.path.join(make_passkey, 'passkey.jsonl')
    os.makedirs(make_passkey, exist_ok=True)
    with open(path, 'w') as file:
        for key in rng.integers(10000, 100000, 20000).tolist():
            told = [_NEEDLE, *rng.choice(['The pass key is {0}. ', _QUESTION + ' {0}. '], 32, p=[0.7, 0.3])]
            starts, sizes = rng.integers(len(_FILLER), size=33), 156 ** rng.random(33)
            between = [(_FILLER * 3)[start:start + int(size) - 1] for start, size in zip(starts, sizes)]
            text = ''.join(map(str.__add__, between, told)).format(key)
            file.write(json.dumps({'text': text[:rng.integers(128, 512)]}) + '\n')
    command = [sys.executable, os.path.join(_HERE, 'prepare.py'), '--dataset=passkey', '--tokenizer=bytes',
               f'--data_files={path}', '--val_fraction=0.02', f'--out_dir={make_passkey}']
    sys.exit(subprocess.run(command).returncode)


# -- speed: train, prefill and decode, FELA beside softmax attention of the same shape
def speed_call(cell, shape):
    """-> what is timed, a function without arguments; the cell learns how much it holds"""
    torch.manual_seed(seed)
    with torch.device(device):
        model = FELA(FELAConfig(**shape | ({} if cell['arm'] == 'FELA' else {'pattern': cell['arm']})))
        x, y = torch.randint(shape['vocab_size'], (2, cell['batch'], cell['length']))
    [optimizer], state, kind = model.configure_optimizers('adamw', 1e-4), [], cell['kind']
    model.checkpoint_activations = kind == 'recompute'
    if kind in ('prefill', 'decode'):
        model.to(getattr(torch, dtype)).requires_grad_(False)
        state = repeat_state(model.prefill(x[:1])[1], len(x))
    cell |= {'weight_bytes': sum(p.nbytes for p in model.parameters()),
             'held_bytes': sum(t.nbytes for layer in state for t in sum(layer, ()) if torch.is_tensor(t))}
    state = model.make_room(state, _STEPS * (repetitions + 3)) if kind == 'decode' else []
    if cell['compile'] == 'on':
        model.compile_blocks()
    token, step = x[:, 0].clone(), None if device.startswith('cuda') else model.step
    def train():
        with autocast():
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def decode():
        nonlocal state, step
        step = step or model.capture_step(token, state)
        for _ in range(_STEPS):
            logits, state = step(token, state)
            token.copy_(logits.argmax(-1))
    return {'prefill': lambda: model.prefill(x), 'decode': decode}.get(kind, train)


def timed(call):
    synchronize = getattr(torch, device.split(':')[0]).synchronize
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measure(cells, shape, bandwidth):
    """The cells of one case, an arm each: first calls, which compile, then repetitions in turn"""
    calls, times, cuda = {}, [[] for _ in cells], device.startswith('cuda')
    torch.compiler.reset()
    for turn in range(1 + repetitions):
        for i, cell in enumerate(cells):
            try:
                if turn == 0:
                    gc.collect()  # compiled models hold themselves in cycles
                    calls[i] = speed_call(cell, shape)
                    cell |= {'first_call_seconds': timed(calls[i]), 'status': 'ok'}
                elif i in calls and sum(times[i]) < max_cell_seconds:
                    rest = torch.cuda.memory_allocated() if cuda else 0
                    torch.cuda.reset_peak_memory_stats() if cuda else None
                    times[i].append(timed(calls[i]))
                    cell |= {'peak_bytes': torch.cuda.max_memory_allocated() - rest} if cuda else {}
            except Exception as e:  # a row as well
                calls.pop(i, None)
                reason = ' '.join(str(e).replace(',', ';').split())[:120]
                full = isinstance(e, (torch.OutOfMemoryError, MemoryError)) or 'allocate memory' in reason
                cell['status'] = 'out of memory' if full else f'{type(e).__name__}: {reason}'
    for i, cell in [(i, cells[i]) for i in calls]:
        tokens, n = (1, _STEPS) if cell['kind'] == 'decode' else (cell['length'], 1)
        q1, seconds, q3 = (np.quantile(times[i], (0.25, 0.5, 0.75)) / n).tolist()
        cell |= {'tokens_per_second': cell['batch'] * tokens / seconds, 'seconds': seconds, 'q1': q1,
                 'q3': q3, 'repetitions': len(times[i])}
        cell |= {'times_as_long': seconds / cells[0]['seconds']} if 0 in calls else {}
        cell |= {'floor_seconds': (cell['weight_bytes'] + cell['held_bytes']) / bandwidth} if n > 1 else {}


def speed(run, cells):
    """Arms take turns in one process, the first call apart; median and quartiles. train: forward, backward,
    clip, AdamW; fp32 weights, autocast. prefill: weights in dtype, logits of the last position. decode:
    greedy steps after really reading so many tokens, A with a KV cache of fixed size; on CUDA each is one
    graph, and filters in bf16 are compiled always. times_as_long: as the first arm. held: state or KV cache;
    floor: it and the weights over the measured bandwidth. peak: above rest; left out where CUDA is not."""
    names, shape, order = arms.split(','), vars(run.model.config) if run else {}, 'kind compile batch length'
    if model_config:
        path, knobs = os.path.join(_HERE, 'train.py'), {}
        for node in ast.parse(read_text(path)).body:
            with suppress(AttributeError, ValueError):
                knobs[node.targets[0].id] = ast.literal_eval(node.value)
        knobs = configure(dict(knobs, __file__=path), [model_config]) | {'vocab_size': vocab_size}
        shape = {f.name: knobs[f.name] for f in fields(FELAConfig) if f.name in knobs}
    a = torch.ones(1 << (30 if device.startswith('cuda') else 27), device=device)
    bandwidth, a = a.nbytes / min(timed(a.sum) for _ in range(6)), None
    for c, k, b, n in product(compile.split(','), kinds.split(','), numbers('batches'), numbers('lengths')):
        now, panels = [dict(kind=k, length=n, batch=b, compile=c, arm=arm) for arm in names], {}
        known = [cell for cell in cells if any(new.items() <= cell.items() for new in now)]
        if len(known) == len(now):
            continue
        measure(now, shape, bandwidth)
        print(k, n, b, c, [(cell['arm'], cell['status'], cell.get('seconds')) for cell in now], flush=True)
        cells = [cell for cell in cells if cell not in known] + now
        cells.sort(key=lambda cell: [cell[key] for key in order.split()])
        for cell in [cell for cell in cells if 'seconds' in cell]:
            lines = panels.setdefault(f'{cell["kind"]}, compile {cell["compile"]}', {})
            x, y = lines.setdefault(f'{cell["arm"]}, rows: {cell["batch"]}', ([], []))
            x.append(cell['length'])
            y.append(cell['tokens_per_second'])
        axis = {'xscale': 'log', 'xlabel': 'length (tokens, K = 1,024)', 'ylabel': 'tokens per second'}
        parts = [(lines, axis | {'title': title, 'yscale': 'log'}) for title, lines in panels.items()]
        ids = 'kind length batch compile arm status '
        write_csv('throughput.csv', cells, ids + 'tokens_per_second seconds q1 q3 repetitions floor_seconds')
        write_csv('wallclock.csv', cells, ids + 'seconds times_as_long first_call_seconds')
        write_csv('vram.csv', cells, ids + 'weight_bytes held_bytes peak_bytes')
        keys = f'{ids}tokens_per_second seconds times_as_long floor_seconds held_bytes peak_bytes'.split()
        yield {'table': [{key: cell[key] for key in keys if key in cell} for cell in cells], 'cells': cells,
               'pictures': picture('speed.png', *parts), 'note': f'{bandwidth / 1e9:.1f} GB/s; {shape}'}


# -- interpret: filters, gates, logit lens
@torch.inference_mode()
def interpret(run):
    """centroid: of the spectra of the effective taps, in cycles per token, median and quartiles of channels.
    gate: the share of the state that a token keeps, mean over 8 x 1,024 tokens. Logit lens on the same: last
    norm and output weights after every layer; committed: the share of final predictions on top from here on.
    The paper (12 layers): mean gate 0.65-0.72 early, 0.91 deep; predictions commit by layer 6."""
    model, (tokens, source), tops = run.model, text_tokens(run), []
    if len(tokens) < 512:
        die(f'{source} has {len(tokens)} tokens: expected at least 512')
    idx = torch.tensor(tokens[:len(tokens) // 8 * 8].reshape(8, -1)[:, :1024], device=device)  # (8,T)
    layers, keys = range(len(model.blocks) + 1), 'centroid centroid_q1 centroid_q3 gate committed'.split()
    rows = [{'layer': i} for i in layers]
    with autocast():
        x = model.embedding(idx)
        for row, block in zip(rows, [None, *model.blocks]):
            mixer = block and block.mixer
            if hasattr(mixer, 'effective_taps'):
                power = torch.fft.rfft(mixer.effective_taps().float().cpu(), 16384, 0).abs().square()
                centroid = torch.linspace(0, 0.5, len(power)) @ power / power.sum(0)  # (C,)
                row |= zip(keys, centroid.quantile(torch.tensor((0.5, 0.25, 0.75))).tolist())
            if hasattr(mixer, 'decay_up'):
                decay = mixer.decay_up(mixer.decay_down(block.norm1(x))).float().sigmoid()
                row['gate'] = (mixer.floor * decay).exp().mean().item()
            x = block(x)[0] if block else x
            said = torch.cat([model.logits(h) for h in x[:, :-1]])  # if this were the last layer
            row['lens_bits_per_token'] = F.cross_entropy(said, idx[:, 1:].flatten()).item() / math.log(2)
            tops.append(said.argmax(-1))
    final = torch.stack([top == tops[-1] for top in tops]).flip(0).cumprod(0).flip(0)  # from this layer on
    for row, share in zip(rows, final.float().mean(1).tolist()):
        row['committed'] = share
    centroid, low, high, gate, committed = ([row.get(key, math.nan) for row in rows] for key in keys)
    shares = {'predictions that are final': (layers, committed), 'mean gate': (layers, gate)}
    panels = [(shares, {'xlabel': 'layer (0: embedding)', 'ylabel': 'share', 'xticks': layers}),
              ({'median filter, and half of all filters': (layers, centroid, low, high)},
               {'xlabel': 'layer', 'ylabel': 'spectral centroid (cycles per token)', 'xticks': layers})]
    return {'table': rows, 'pictures': picture('interpret.png', *panels), 'note': source}


# -- the run
def page(meta):
    """README.md of the results: tables, pictures and protocols"""
    lines = ['# Results', '', 'Written by `eval.py`; hashes and knobs: meta.json.']
    for name, record in meta.items():
        lines += ['', f'## {name}', '', *table_lines(record['table']), '']
        lines += [f'![{picture}]({picture})' for picture in record['pictures']] + ['', record['protocol'], '']
        lines += ['{note}; {source}; {hardware}; torch {torch}; {dtype}; {commit}; {date}'.format(**record)]
        lines += ['', *(f'    {command}' for command in record['command'].split('\n'))]
    return '\n'.join(lines) + '\n'


def main():
    global device, dtype, out
    words = dict(suite=' '.join(['all', *SUITES]), kinds='train recompute prefill decode', compile='off on')
    for key, word in [(key, word) for key in words for word in globals()[key].split(',')]:
        require({key: word}, **{key: words[key]})
    if '' in arms.split(',') or set(arms.replace('FELA', '')) - {*MIXERS, ','}:
        die(f'arms={arms!r}: expected FELA or patterns of {", ".join(MIXERS)}, with commas')
    counts = 'batch_size block_tokens needle_seeds repetitions max_cell_seconds vocab_size'.split()
    require(globals(), dtype='auto float32 bfloat16 float16', blocks=(2, 1 << 60), **dict.fromkeys(
        counts, (1, 1 << 60)), **dict.fromkeys(('limit', 'max_length', 'seed'), (0, 1 << 60)))
    device, dtype, _ = pick_device(device, dtype)
    names = list(SUITES) if suite == 'all' else suite.split(',')
    if plots:
        import matplotlib  # noqa: F401
    run, source, folder = None, model_config, model_config.removesuffix('.py')
    if names != ['speed'] or not model_config:
        model, state, manifest = load_model(checkpoint, device)
        config, source = state['config'], f'step {manifest["step"]}, sha256 {manifest["sha256"]}'
        if missing := {'tokenizer', 'block_size', 'dataset'} - config.keys():
            raise CheckpointError(f'{checkpoint}: its config has no {missing.pop()}')
        run = SimpleNamespace(model=model.eval().requires_grad_(False), config=config,
                              tokenizer=get_tokenizer(config['tokenizer']), block_size=config['block_size'])
        print(f'{checkpoint}: {source}, {model.num_parameters():,} parameters')
        folder = os.path.abspath(checkpoint if os.path.isdir(checkpoint) else os.path.dirname(checkpoint))
        folder = f'{config["dataset"]}_default' if checkpoint == 'out' else folder
    out = out or os.path.join('results', os.path.basename(folder))
    os.makedirs(out, exist_ok=True)
    meta, machine, commit = {}, 'unknown', 'unknown'
    try:
        if set(os.listdir(out)) - {'unfinished.tmp'}:
            with open(os.path.join(out, 'meta.json'), encoding='utf-8') as file:
                page(meta := json.load(file))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        die(f'{out} holds something else than results of this eval.py: expected another --out')
    write('meta.json', meta)  # from here on the folder is ours
    with suppress(OSError, subprocess.CalledProcessError):
        command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
        commit = subprocess.check_output(command, cwd=_HERE, text=True, stderr=subprocess.DEVNULL).strip()
    with suppress(OSError, StopIteration), open('/proc/cpuinfo') as file:
        machine = next(line.partition(': ')[2].strip() for line in file if line.startswith('model name'))
    machine = torch.cuda.get_device_name() if device.startswith('cuda') else machine
    where = {'hardware': machine, 'torch': torch.__version__, 'model.py': sha256_of(f'{_HERE}/model.py')}

    def keep(record):
        meta[name] = record
        write('meta.json', meta)
        write('README.md', page(meta))
    for name in names:
        knobs = {k: globals()[k] for k in SUITES[name].split()}
        hashes = [sha256_of(v) for v in knobs.values() if os.path.isfile(str(v))]
        key = json.dumps([source, seed, dtype, knobs, hashes, where if name == 'speed' else None])
        old = {} if overwrite or meta.get(name, {}).get('key') != key else meta[name]
        command = ' '.join(['python eval.py', *sys.argv[1:]])
        commands = '\n'.join(dict.fromkeys([*old.get('command', command).split('\n'), command]))
        record = {'key': key, 'source': source, 'command': commands, 'dtype': dtype, 'knobs': knobs, **where,
                  'commit': commit, 'date': time.strftime('%Y-%m-%d'),
                  'protocol': ' '.join(globals()[name].__doc__.split())}
        print(f'\n-- {name}', flush=True)
        if old and name != 'speed':
            print('done before with this checkpoint and these knobs (--overwrite=True measures again)')
        else:
            for result in speed(run, old.get('cells', [])) if name == 'speed' else [globals()[name](run)]:
                keep(record | result)
        print('\n'.join([*table_lines(meta[name]['table']), meta[name]['protocol']]))


if __name__ == '__main__':
    globals().update(configure(globals()))
    try:
        write_passkeys() if make_passkey else main()
    except (DataError, CheckpointError) as e:
        die(f'{e}' + ('' if os.path.exists(checkpoint) else '; train one with `python train.py`'))
    except ImportError as e:
        die(f'{e.name} is not installed: pip install {e.name} (or --plots=False, or another --suite)')
    except OSError as e:
        die(f'{e.filename or out}: {e.strerror or e}', 1)
    except torch.OutOfMemoryError:
        die(f'{device} is out of memory: a smaller batch_size than {batch_size} may do', 1)
    except KeyboardInterrupt:
        die('interrupted: the same command keeps what is finished and goes on', 130)
