"""
Train a FELA language model: one process, one machine or a cluster.

    python train.py                                  the default: Python's standard library, byte by byte, on a laptop
    python train.py config/fela_109m.py --chunk_size=128
    torchrun --standalone --nproc_per_node=8 train.py config/fela_1b.py

Ctrl-C or SIGTERM finishes the step, saves and exits with code 0 (a second one leaves at once, with 130 or 143).
The same command again goes on from the newest checkpoint. Exit code 2: the input was wrong; 1: the run failed.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, die
from model import (FELA, CheckpointError, FELAConfig, list_checkpoints, load_checkpoint, open_folder, save_checkpoint,
                   tidy_folder)
from prepare import DataError, TokenData, compressed_bpb, ensure_pysrc, get_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# data and model
dataset = 'pysrc'  # a folder under data/, made by prepare.py, or a path to one
block_size = 512  # tokens of context in training
n_layer = 4  # layers
n_head = 4  # heads of an L or A layer
n_embd = 128  # channels
n_modes = 64  # taps of an S layer
pattern = 'SSSL'  # S: FNO, L: GLA, A: softmax attention; repeated over the layers
chunk_size = 64  # of GLA; a speed knob, never changes the function
mlp_hidden = 0  # 0: 2 * n_embd
# budget: the run ends at whichever comes first (0: off); max_iters alone makes a run exactly reproducible
max_iters = 0  # optimizer steps
max_tokens = 0  # training tokens
max_seconds = 240.0  # training time, over all resumed parts
# batch
batch_tokens = 2048  # tokens per optimizer step, over all ranks; accumulation follows from it
micro_batch_size = 4  # sequences per forward pass and rank
# optimizer
optimizer = 'muon'  # adamw, muon (matrices by Muon, the rest by AdamW)
learning_rate = 1.5e-2  # peak
schedule = 'cosine'  # cosine, wsd (warmup, stable, decay), constant
warmup_iters = 30  # steps of linear warmup
decay_frac = 0.3  # wsd: last part of the run, where the learning rate falls
min_lr_frac = 0.0  # the learning rate falls to this fraction of its peak
weight_decay = 0.1  # matrices only
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW
grad_clip = 1.0  # largest gradient norm; 0: off
max_bad_steps = 10  # a step whose loss or gradient is not finite is skipped; so many in a row stop the run
seed = 1337  # of the initial weights and the order of the data
# evaluation and log
eval_interval = 500  # steps between evaluations; 0: only at the end
eval_tokens = 65536  # tokens of an evaluation (a fixed random part of the validation split); 0: all
final_eval_tokens = 0  # the same for the last one
log_interval = 50  # steps between log lines
sample_tokens = 400  # length of the sample at the end; 0: none
wandb_log = False  # also log to Weights & Biases
wandb_project = 'fela'  # its project
wandb_run_name = ''  # its run name; '': chosen by wandb
# checkpoints
out_dir = 'out'  # checkpoints and metrics.jsonl
init_from = 'auto'  # auto: go on if out_dir has checkpoints; scratch; resume; or a checkpoint to take the weights from
overwrite = False  # a fresh start deletes the checkpoints in out_dir
save_interval = 0  # steps between checkpoints; 0: off
save_seconds = 600.0  # seconds between checkpoints; 0: off
keep_checkpoints = 2  # the last so many are kept, and the best; 0: all
on_save_error = 'stop'  # stop, continue (train on and try again at the next checkpoint)
# system
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16: of matrix products; weights stay float32
compile = 'auto'  # auto, on, off: torch.compile of the MLPs and the L layers
checkpoint_activations = False  # recompute each block in the backward pass: less memory, about a third more time
config = configure(globals())
globals().update(config)
# ---------------------------------------------------------------------------------------------------------------------

# dense bf16 peak in TFLOP/s by name of the device, the first that fits (the makers' data sheets)
PEAK_TFLOPS = {'GB200': 2500, 'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'A100': 312,
               'L40S': 362, 'L40': 181, 'L4': 121, 'A10G': 70, 'A10': 125, 'RTX 6000 Ada': 364, 'RTX A6000': 155,
               'RTX 5090': 209, 'RTX 4090': 165, 'RTX 3090': 71}

rank, local_rank, world = (int(os.environ.get(k, n)) for k, n in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
ddp, master = 'RANK' in os.environ, rank == 0  # torchrun sets these


def log(line):
    if master:
        try:
            print(line, flush=True)
        except OSError:  # whoever read this is gone, or the log's disk is full: no reason to lose the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def one_line(kind, error, trace):
    """What a user, a disk or a device can cause ends in one line, not in a traceback."""
    if issubclass(kind, (DataError, CheckpointError)):
        die(error)
    if issubclass(kind, OSError):
        die(f'{error.filename or out_dir}: {error.strerror}' if error.errno else error)
    if issubclass(kind, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        die(f'{device} is out of memory: lower micro_batch_size={micro_batch_size} (batch_tokens can stay), or set '
            f'--checkpoint_activations=True', code=1)
    if issubclass(kind, KeyboardInterrupt):
        die('interrupted before the first step', code=130)
    if ddp and ('gloo' in str(error) or issubclass(kind, dist.DistError)):
        die(f'rank {rank} of {world} has lost another one: {str(error)[:200]}', code=1)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line

# -- check the knobs
compile = {'true': 'on', 'false': 'off'}.get(compile.lower(), compile)  # as nanoGPT users type it
for key, allowed in (('optimizer', 'adamw muon'), ('schedule', 'cosine wsd constant'), ('compile', 'auto on off'),
                     ('dtype', 'auto float32 bfloat16 float16'), ('on_save_error', 'stop continue')):
    if globals()[key] not in allowed.split():
        die(f'{key}={config[key]!r}: expected one of {allowed}')
for keys, low, high in (('block_size batch_tokens micro_batch_size log_interval max_bad_steps', 1, 2 ** 53),
                        ('max_iters max_tokens warmup_iters seed eval_interval eval_tokens final_eval_tokens '
                         'sample_tokens save_interval keep_checkpoints', 0, 2 ** 53), ('decay_frac min_lr_frac', 0, 1),
                        ('learning_rate weight_decay grad_clip max_seconds save_seconds', 0, math.inf),
                        ('beta1 beta2', 0, 0.999999)):
    for key in keys.split():
        if not low <= config[key] <= high:
            die(f'{key}={config[key]}: expected {low} to {high}')
if not (max_iters or max_tokens or max_seconds):
    die('max_iters, max_tokens and max_seconds are all 0: the run would never end')
unit = block_size * micro_batch_size * world
if batch_tokens % unit:
    near = sorted({max(1, batch_tokens // unit) * unit, (batch_tokens // unit + 1) * unit})
    die(f'batch_tokens={batch_tokens:,} does not divide: block_size {block_size:,} x micro_batch_size '
        f'{micro_batch_size:,} x {world} rank{"s" * (world > 1)} = {unit:,} tokens at a time, and {batch_tokens:,} / '
        f'{unit:,} = {batch_tokens / unit:.2f}; try --batch_tokens={" or ".join(map(str, near))}')
accumulation, batch_windows = batch_tokens // unit, batch_tokens // block_size

# -- device, dtype, compile: choose, and say why
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
device_type, _, index = device.partition(':')
if device_type not in ('cpu', 'cuda', 'mps') or not getattr(torch, device_type).is_available() \
        or not (index or '0').isdigit():
    die(f'device={device!r}: not available here (auto, cpu, cuda, cuda:1, mps)')
if device_type == 'cuda':
    index = local_rank if ddp else int(index or 0)
    device = f'cuda:{index}'
    if index >= torch.cuda.device_count():
        die(f'{device} is not there: this machine has {torch.cuda.device_count()} of them, and each rank needs one')
    torch.cuda.set_device(index)
dtype_why = compile_why = 'as asked'
if dtype == 'auto':
    dtype, dtype_why = 'float32', 'no fast bfloat16 here'
    if device_type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, dtype_why = 'bfloat16', 'this GPU has it'
    elif device_type == 'cuda':
        dtype, dtype_why = 'float16', 'this GPU has no bfloat16; with loss scaling'
    elif device_type == 'cpu' and os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            found = sorted({'avx512_bf16', 'amx_bf16'} & set(file.read().split()))
        dtype, dtype_why = ('bfloat16', f'this CPU has {found[0]}') if found else (dtype, dtype_why)
if compile == 'auto':
    compile = 'on' if device_type == 'cuda' else 'off'
    compile_why = {'on': 'a minute, then faster', 'off': f'gains little on {device_type}'}[compile]
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
log(f'device {device} | dtype {dtype} ({dtype_why}) | compile {compile} ({compile_why})')

# -- data, model, optimizers
data_dir = dataset if os.path.dirname(dataset) else os.path.join('data', dataset)
if dataset == 'pysrc' and not os.path.exists(os.path.join(data_dir, 'meta.json')):
    log(f'{data_dir} is not there yet: making it from the standard library of Python {sys.version.split()[0]}')
    ensure_pysrc(data_dir)
train_data = TokenData(data_dir, 'train', block_size, seed)
val_data = TokenData(data_dir, 'val', block_size)  # its order depends on no knob
tokenizer = get_tokenizer(train_data.meta['tokenizer'])
torch.manual_seed(seed)
try:
    model_config = FELAConfig(vocab_size=tokenizer.vocab_size,
                              **{f.name: config[f.name] for f in fields(FELAConfig) if f.name in config})
except ValueError as e:
    die(e)
with torch.device(device):  # on a CPU the initial weights of a billion parameters take half a minute
    model = FELA(model_config)
model.checkpoint_activations = checkpoint_activations
optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
config |= asdict(model_config)
config |= {'tokenizer': tokenizer.name, 'data_sha256': train_data.meta['splits']['train']['sha256']}
log(f'{model.num_parameters():,} parameters | {data_dir}: {len(train_data.tokens):,} training and '
    f'{len(val_data.tokens):,} validation tokens ({tokenizer.name}) | {batch_tokens:,} tokens a step = {block_size} x '
    f'{micro_batch_size} x {world} rank{"s" * (world > 1)} x {accumulation} accumulated')
if ddp:
    dist.init_process_group('nccl' if device_type == 'cuda' else 'gloo')
    sys.excepthook = one_line  # torch has wrapped it, and would swallow the line

# what a resumed run must know besides weights, optimizers and loss scale. position: windows read so far, by all ranks;
# warm: progress at the end of warmup; bad: skipped steps in a row; mean, var: of the loss, over the last 50 steps or so
run = SimpleNamespace(step=0, tokens=0, position=0, elapsed=0.0, warm=0.0, best_val=None, skipped=0, bad=0,
                      loss_sum=0.0, loss_count=0, mean=0.0, var=0.0, seen=0)


def progress():
    """0 to 1, by the budget of which most is used"""
    budgets = (run.step, max_iters), (run.tokens, max_tokens), (run.elapsed, max_seconds)
    return min(1, max(used / limit for used, limit in budgets if limit))


# -- start, or go on
def refuse_other(theirs, where, keys, advice):
    for key in keys:
        if theirs.get(key) != config[key]:
            key = 'dataset' if key == 'data_sha256' and theirs.get('dataset') != dataset else key
            die(f'{key} is {theirs.get(key)!r} in {where} and {config[key]!r} here: {advice}')


MODEL_KEYS = ['tokenizer'] + [f.name for f in fields(FELAConfig) if f.name not in ('chunk_size', 'segment')]


def logged_step(line):
    try:
        return int(json.loads(line)['step'])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # torn by a full disk, or damaged: dropped
        return math.inf


resume = None
if init_from not in ('auto', 'scratch', 'resume'):
    state, _ = load_checkpoint(init_from)
    refuse_other(state['config'], init_from, MODEL_KEYS, 'weights fit only the model that they are of')
    model.load_state_dict(state['model'])
if master:
    if stale := open_folder(out_dir):
        log(f'{out_dir}/lock is stale: the run of {stale}, did not end by itself')
    there = list_checkpoints(out_dir)
    if init_from == 'resume' or init_from == 'auto' and there and not overwrite:
        state, manifest = load_checkpoint(out_dir)
        resume = os.path.join(out_dir, f'step_{manifest["step"]:06d}{"_final" * manifest["final"]}.pt')
    elif there and not overwrite:
        die(f'out_dir={out_dir!r} has checkpoints: --init_from=resume goes on, --overwrite=True deletes them, another '
            f'--out_dir leaves them alone')
    need, free = 12 * model.num_parameters(), shutil.disk_usage(out_dir).free  # weights and two moments
    if free < need:
        die(f'out_dir={out_dir!r}: no space left: a checkpoint takes about {need:,} bytes, and {free:,} are free')
if ddp:  # rank 0 decides: one that does not see the folder must not start from scratch beside others that go on
    box = [resume, config]
    dist.broadcast_object_list(box, src=0)
    resume, theirs = box
    refuse_other(theirs, 'rank 0', sorted(config.keys() - {'dataset', 'device', 'out_dir'}), 'all ranks need the same')
if resume:
    if not master:
        state, manifest = load_checkpoint(resume)
    refuse_other(state['config'], resume, MODEL_KEYS + ['data_sha256', 'block_size', 'seed', 'optimizer'],
                 'choose another --out_dir, or delete that run with --init_from=scratch --overwrite=True')
    try:
        model.load_state_dict(state['model'])
        for opt, saved in zip(optimizers, state['optimizer'], strict=True):
            opt.load_state_dict(saved)
        if scaler.is_enabled() and state['scaler']:
            scaler.load_state_dict(state['scaler'])
        torch.set_rng_state(state['training'].pop('rng'))
        run = SimpleNamespace(**{name: state['training'][name] for name in vars(run)})
        wrong = {k: v for k, v in vars(run).items() if k != 'best_val' and not isinstance(v, (int, float))}
        if wrong:
            raise TypeError(f'expected numbers, found {wrong}')
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        die(f'{resume} is no checkpoint that train.py wrote, or of another version: {type(e).__name__}: {e}')
    if manifest['final'] and progress() >= 1:
        log(f'{resume}: this run is finished. Its text: python sample.py --out_dir={out_dir}. To train on: a larger '
            f'--max_iters, --max_tokens or --max_seconds. To start anew: --init_from=scratch --overwrite=True')
        sys.exit(0)
    changed = [f'{k} {state["config"].get(k)!r} -> {v!r}' for k, v in config.items() if state['config'].get(k) != v]
    log(f'going on from {resume}' + (f' with {", ".join(changed)}' if changed else ''))
    del state
if master:
    tidy_folder(out_dir, go_on=bool(resume))
    path, lines = os.path.join(out_dir, 'metrics.jsonl'), []
    if resume and os.path.exists(path):  # the steps after this one were lost with the process that logged them
        with open(path, errors='replace') as file:
            lines = [line for line in file if line.endswith('\n') and logged_step(line) <= run.step]
    with open(path + '.tmp', 'w') as file:
        file.writelines(lines)
    os.replace(path + '.tmp', path)
    metrics_file = open(path, 'a', buffering=1)
if wandb_log and master:
    try:
        import wandb
    except ImportError:
        die('wandb_log=True needs wandb: pip install wandb')
    wandb.init(project=wandb_project, name=wandb_run_name or None, config=config)
if compile == 'on':
    torch._dynamo.config.optimize_ddp = False  # it cuts compiled graphs at DDP's buckets: here every block is a graph already
    model.compile_blocks()
sync = 'forward_sync_buffers' if torch.__version__ >= (2, 13) else 'broadcast_buffers'  # ours are constants
net = DistributedDataParallel(model, device_ids=[index] if device_type == 'cuda' else None, **{sync: False},
                              gradient_as_bucket_view=True) if ddp else model


def get_batch(data, position):
    x, y = (torch.from_numpy(part) for part in data.batch(position, micro_batch_size))
    if device_type == 'cuda':
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


def learning_rate_now():
    if run.step <= warmup_iters:
        run.warm = progress()  # known only when it is reached, if the budget is a time
    if run.step < warmup_iters:
        return learning_rate * (run.step + 1) / (warmup_iters + 1)
    done = (progress() - run.warm) / max(1 - run.warm, 1e-9)
    shape = {'cosine': 0.5 * (1 + math.cos(math.pi * done)), 'wsd': min(1, (1 - done) / max(decay_frac, 1e-9)),
             'constant': 1}[schedule]
    return learning_rate * (min_lr_frac + (1 - min_lr_frac) * shape)


@torch.no_grad()
def evaluate(tokens, breakable=False):
    """Loss in nats and bits per byte over the first windows of the validation order, each rank its part. The last
    evaluation is long: a signal breaks it off, and the loss is -inf, on all ranks."""
    count = min(val_data.n_windows, max(1, tokens // block_size)) if tokens else val_data.n_windows
    first, last = count * rank // world, count * (rank + 1) // world
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    for i in range(first, last, micro_batch_size):
        if breakable and signals:
            total -= math.inf
            break
        with autocast:
            _, losses = model(*get_batch(val_data, i), reduction='none')
        total += losses[:last - i].cpu().double().sum()
    model.train()
    if ddp:
        total = total.to(device)
        dist.all_reduce(total)
    loss = total.item() / (count * block_size)
    return loss, loss / math.log(2) / val_data.bytes_per_token


def finite(values):
    """NaN and infinity are not JSON"""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def metric(**values):
    if master:
        try:
            metrics_file.write(json.dumps({'step': run.step} | finite(values)) + '\n')
        except OSError as e:
            log(f'warning: {out_dir}/metrics.jsonl: {e.strerror}')
        if wandb_log:
            wandb.log(values, step=run.step)


@torch.no_grad()
def save(final=False, **losses):
    """True when the checkpoint is on the disk and verified. Rank 0 writes, and only weights that give a finite loss."""
    global last_save, saved_step
    last_save = time.perf_counter()
    if not master:
        return True
    with autocast:
        _, ahead = model(x, y, reduction='none')  # of the batch that comes next
    if run.bad or not ahead.sum().isfinite():
        log(f'step {run.step}: not saved, its loss or gradients are not finite')
        return False
    state = {'model': model.state_dict(), 'optimizer': [opt.state_dict() for opt in optimizers], 'config': config,
             'scaler': scaler.state_dict(), 'training': vars(run) | {'rng': torch.get_rng_state()}}
    manifest = {'tokens': run.tokens, 'tokenizer': tokenizer.name, 'config': config, 'torch': torch.__version__,
                'losses': finite({'train': run.mean, 'val': None} | losses)}
    try:
        log(f'saved {save_checkpoint(out_dir, run.step, state, manifest, final, keep_checkpoints)}')
        saved_step = run.step
        return True
    except CheckpointError as e:
        if on_save_error == 'stop':
            die(e, code=1)
        log(f'warning: {e}; training goes on (on_save_error=continue)')
        return False


signals = []


def on_signal(number, frame):
    now = time.monotonic()
    if signals and now - signals[0][1] > 0.5 * ddp:  # torchrun may pass on what the terminal has sent already
        os._exit(128 + number)
    signals.append((signal.Signals(number).name, now))
    if master:
        with suppress(OSError):  # whoever read this is gone, or its disk is full
            os.write(2, b'finishing this step, then saving; once more leaves at once\n')


for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    if hasattr(signal, name) and (name != 'SIGHUP' or signal.getsignal(signal.SIGHUP) == signal.SIG_DFL):  # not nohup
        signal.signal(getattr(signal, name), on_signal)

# -- the loop
model.train()
flops_per_token = model.flops_per_token(block_size)
peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None) \
    if device_type == 'cuda' and dtype != 'float32' else None
stopping, val, first_step, last_save = False, None, run.step, time.perf_counter()
saved_step = run.step if resume else None
clock = last_save - run.elapsed
timed_tokens = timed_seconds = 0  # since the last log line, without evaluations, checkpoints, this process's first step
x, y = get_batch(train_data, run.position + rank * micro_batch_size)
while progress() < 1 and not stopping:
    step_start = time.perf_counter()
    if run.step == first_step + 1:
        eta_start = step_start, progress()
    lr = learning_rate_now()
    for group in (group for opt in optimizers for group in opt.param_groups):
        group['lr'] = lr * group['lr_scale']

    loss = 0.0
    for micro in range(accumulation):
        with net.no_sync() if ddp and micro + 1 < accumulation else nullcontext():
            with autocast:
                _, micro_loss = net(x, y)
            # a step's windows are position ... position + batch_windows - 1, whatever the number of ranks
            x, y = get_batch(train_data, run.position + ((micro + 1) * world + rank) * micro_batch_size)
            loss = loss + micro_loss.detach() / accumulation
            scaler.scale(micro_loss / accumulation).backward()
    for opt in optimizers:
        scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    loss, run.elapsed, stopping = loss.item(), time.perf_counter() - clock, bool(signals)
    if ddp:  # all ranks agree on the loss, the clock (rank 0's) and the stop
        shared = torch.tensor([loss / world, run.elapsed * master, stopping], dtype=torch.float64, device=device)
        dist.all_reduce(shared)
        loss, run.elapsed, stopping = shared[0].item(), shared[1].item(), shared[2].item() > 0
    if good := math.isfinite(loss) and math.isfinite(norm):
        for opt in optimizers:
            scaler.step(opt)
    scaler.update()
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    if run.step > first_step:
        timed_tokens, timed_seconds = timed_tokens + batch_tokens, timed_seconds + time.perf_counter() - step_start
    run.step, run.tokens, run.position = run.step + 1, run.tokens + batch_tokens, run.position + batch_windows

    if good:
        sigma = max(math.sqrt(run.var), 0.01)
        if run.seen >= 50 and loss > run.mean + 6 * sigma:
            log(f'step {run.step}: loss spike, {loss:.4f} after {run.mean:.4f} +- {sigma:.4f}')
            metric(spike=loss)
        run.seen, run.bad = run.seen + 1, 0
        rate, jump = max(0.02, 1 / run.seen), loss - run.mean
        run.mean, run.var = run.mean + rate * jump, (1 - rate) * (run.var + rate * jump ** 2)
        run.loss_sum, run.loss_count = run.loss_sum + loss, run.loss_count + 1
    else:
        run.skipped += 1
        run.bad += scaler.get_scale() <= 1  # float16 finds its scale by overflowing: no fault of the run
        log(f'step {run.step}: skipped, loss {loss}, gradient norm {norm} ({run.skipped} skipped so far)')
        metric(skipped=run.skipped)
        if run.bad >= max_bad_steps:
            newest = [path[:-5] + '.pt' for path in list_checkpoints(out_dir)[:1]] or ['none']
            die(f'loss or gradients were not finite in {run.bad} steps in a row: stopped at step {run.step}, '
                f'lr {lr:.3g}, loss {loss}, gradient norm {norm}, data windows from {run.position - batch_windows}; '
                f'last good checkpoint: {newest[0]}', code=1)

    if run.step % log_interval == 0 or run.step == 1:
        mean = run.loss_sum / run.loss_count if run.loss_count else math.nan
        line = f'step {run.step:6} | {progress():4.0%} | loss {mean:.4f} | lr {lr:.2e} | norm {norm:.2f}'
        speed = timed_tokens / timed_seconds if timed_seconds else None
        if speed:
            tflops = speed * flops_per_token / 1e12
            eta = (1 - progress()) / max(progress() - eta_start[1], 1e-9) * (time.perf_counter() - eta_start[0])
            line += f' | {speed:,.0f} tok/s | '
            line += f'MFU {tflops / peak / world:.1%}' if peak else f'{tflops:.3g} TFLOP/s'
            line += f' | ETA {timedelta(seconds=round(max(eta, 0)))}'
        log(line)
        metric(tokens=run.tokens, loss=mean, lr=lr, grad_norm=norm, tokens_per_second=speed, elapsed=run.elapsed)
        run.loss_sum = run.loss_count = timed_tokens = timed_seconds = 0

    val = None
    if eval_interval and run.step % eval_interval == 0:
        val, bpb = evaluate(eval_tokens)
        if math.isfinite(val):
            run.best_val = val if run.best_val is None else min(val, run.best_val)
        log(f'step {run.step:6} | validation loss {val:.4f} | {bpb:.4f} bits per byte')
        metric(tokens=run.tokens, val_loss=val, val_bpb=bpb)
    due = save_interval and run.step % save_interval == 0
    if (due or save_seconds and time.perf_counter() - last_save > save_seconds) and not stopping and not run.bad:
        save(val=val)

# -- the end: stopped by a signal, or the whole validation split and a sample
if not stopping:
    loss, bpb = evaluate(final_eval_tokens, breakable=True)
    stopping = loss == -math.inf
if stopping:
    if run.step != saved_step and not save(val=val):
        die(f'stopped at step {run.step}, not saved', code=1)
    log(f'stopped by {signals[0][0] if signals else "a signal"} at step {run.step}; the same command '
        + 'with --init_from=resume ' * (init_from != 'auto' or overwrite) + 'goes on from there')
else:
    metric(tokens=run.tokens, final_val_loss=loss, final_val_bpb=bpb, elapsed=run.elapsed)
    if not save(final=True, final_val=loss, final_val_bpb=bpb):
        die('the last checkpoint is not saved', code=1)
    log(f'{run.step:,} steps, {run.tokens:,} tokens, {timedelta(seconds=round(run.elapsed))}: validation loss '
        f'{loss:.4f}, {bpb:.4f} bits per byte')
    if master and val_data.meta['splits']['val']['bytes'] < 2 ** 25:  # xz takes a second per megabyte
        sizes = ', '.join(f'{name} {value:.4f}' for name, value in compressed_bpb(data_dir).items())
        log(f'general compressors on the same bytes: {sizes} bits per byte')
    if master and sample_tokens:
        text = model.eval().generate(torch.tensor([[tokenizer.eot]], device=device), sample_tokens, temperature=0.8,
                                     top_p=0.95, generator=torch.Generator(device).manual_seed(seed))
        log(f'{"-" * 80}\n{tokenizer.decode([token.item() for token in text])}\n{"-" * 80}')
if wandb_log and master:
    wandb.finish()
if ddp:
    dist.destroy_process_group()
