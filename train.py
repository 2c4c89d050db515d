"""
Train a FELA language model: one process, one machine or a cluster.

    python train.py                              the default: Python's standard library as bytes, on a laptop
    python train.py config/fela_109m.py --chunk_size=128
    torchrun --standalone --nproc_per_node=8 train.py config/fela_1b.py

Ctrl-C or SIGTERM finishes the step, saves and exits with code 0; a second one leaves at once. The same
command goes on from the newest checkpoint. Exit code 2: the input was wrong; 1: the run failed.
"""

import json
import math
import os
import signal
import sys
from contextlib import nullcontext, suppress
from datetime import timedelta
from time import perf_counter
from types import SimpleNamespace

import torch
import torch.distributed as dist

from configurator import broadcast_json, configure, die, find_ranks, given, lock_folder, pick_device, require
from model import FELA, CheckpointError, FELAConfig, list_checkpoints, load_model, load_optim, save_checkpoint
from prepare import DataError, TokenData, compressed_bpb, ensure_pysrc, get_tokenizer

# -----------------------------------------------------------------------------------------------------------
# data and model
dataset = 'pysrc'  # a folder under data/, made by prepare.py, or a path to one
block_size = 256  # tokens of context in training
n_layer = 4  # layers
n_head = 4  # heads of an A layer
gla_heads = 1  # heads of an L layer
n_embd = 96  # channels
n_modes = 64  # taps of an S layer
pattern = 'SSSL'  # S: FNO, L: GLA, A: softmax attention; repeated over the layers
chunk_size = 64  # of GLA; a speed knob, never changes the function
mlp_hidden = 0  # 0: 2 * n_embd
# budget: the run ends at whichever comes first (0: off); max_iters alone makes a run exactly reproducible
max_iters = 0  # optimizer steps
max_tokens = 0  # training tokens
max_seconds = 240.0  # by the clock, over all resumed parts, pauses included; 0 where another one is given
# batch and optimizer
batch_tokens = 2048  # tokens per optimizer step, over all ranks; accumulation follows from it
micro_batch_size = 8  # sequences per forward pass and rank
optimizer = 'muon'  # adamw, muon (matrices by Muon, the rest by AdamW)
learning_rate = 2.5e-2  # peak
schedule = 'cosine'  # cosine, wsd (warmup, stable, decay), constant
warmup_iters = 30  # steps of linear warmup
decay_frac = 0.3  # wsd: last part of the run, where the learning rate falls
min_lr_frac = 0.0  # the learning rate falls to this fraction of its peak
weight_decay = 0.1  # of matrices and the embedding
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW
grad_clip = 1.0  # largest gradient norm; 0: off
seed = 1337  # of the initial weights and the order of the data
# evaluation and log
eval_interval = 500  # steps between evaluations; 0: only at the end
eval_tokens = 65536  # tokens of an evaluation (a fixed random part of the validation split); 0: all
final_eval_tokens = 0  # the same for the last one
log_interval = 50  # steps between log lines; on a slow machine there is one every 30 seconds, too
sample_tokens = 400  # length of the sample at the end; 0: none
wandb_log = False  # also log to Weights & Biases, where WANDB_PROJECT and WANDB_NAME say
# checkpoints
out_dir = 'out'  # checkpoints and metrics.jsonl
init_from = 'auto'  # auto: go on if out_dir has checkpoints; scratch; or a checkpoint: its weights and shape
save_interval = 0  # steps between checkpoints; 0: off
save_seconds = 600.0  # seconds between checkpoints; 0: off
keep_checkpoints = 2  # the last so many are kept, and the best; 0: all
# system
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16: of matrix products; weights stay float32
compile = 'auto'  # auto (on for CUDA), on, off: torch.compile
checkpoint_activations = False  # recompute blocks in the backward pass: less memory, a third more time
config = configure(globals())
globals().update(config)
# -----------------------------------------------------------------------------------------------------------
LINE_SECONDS = 30  # a slow machine is not silent for longer
rank, local_rank, world, ddp = find_ranks()
master, stop_signals = rank == 0, []  # when they came
# What a resumed run must know besides weights and optimizers. position: windows read so far, by all ranks;
# warm: progress at the end of warmup; bad: skipped steps in a row; losses: not yet logged; metrics: file size
run = SimpleNamespace(step=0, tokens=0, position=0, elapsed=0.0, warm=0.0, bad=0, losses=[], metrics=0)


def log(line):
    if master:
        try:
            print(line, flush=True)
        except OSError:  # whoever read this is gone, or the log's disk is full: no reason to lose the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def one_line(kind, error, trace):
    """What a user, a disk or a device can cause ends in one line, not in a traceback."""
    if isinstance(error, (CheckpointError, DataError, OSError)):
        die(f'{error}{"; line 1 of a config file has the commands" if isinstance(error, DataError) else ""}')
    if isinstance(error, ImportError):
        die(f'{error}: pip install it')
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        die(f'{device} is out of memory: lower micro_batch_size or set --checkpoint_activations=True', code=1)
    if ddp and ('gloo' in str(error) or isinstance(error, dist.DistError)):
        die(f'rank {rank} of {world} has lost another one: {error!s:.200}', code=1)
    sys.__excepthook__(kind, error, trace)


def on_signal(number, frame):
    stop_signals.append(perf_counter())
    if stop_signals[-1] - stop_signals[0] > 0.5 * ddp:  # torchrun passes on what the terminal sends anyway
        os._exit(128 + number)


def refuse_other(theirs, keys, where):
    if wrong := [f'{key} is {theirs[key]!r} in {where} and {config[key]!r} here'
                 for key in keys if theirs.get(key, config[key]) != config[key]]:
        die('; '.join(wrong))


def progress():
    """0 to 1, by the budget of which most is used, and its name"""
    used = {'max_iters': run.step, 'max_tokens': run.tokens, 'max_seconds': run.elapsed}
    return max((min(1, n / config[key]), key) for key, n in used.items() if config[key])


signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)
sys.excepthook = one_line
require(config, **dict.fromkeys('block_size batch_tokens micro_batch_size log_interval'.split(), (1, 1e15)),
        decay_frac=(0, 1), min_lr_frac=(0, 1), beta1=(0, 0.99999), beta2=(0, 0.99999), compile='auto on off',
        optimizer='adamw muon', schedule='cosine wsd constant', dtype='auto float32 bfloat16 float16')
if 'max_seconds' not in given and (max_iters or max_tokens):
    config['max_seconds'] = 0.0
elif not (max_iters or max_tokens or max_seconds):
    die('max_iters, max_tokens and max_seconds are all 0: the run would never end')
unit = block_size * micro_batch_size * world
if batch_tokens % unit:
    die(f'batch_tokens={batch_tokens:,}: expected a multiple of block_size {block_size:,} x micro_batch_size '
        f'{micro_batch_size:,} x {world} ranks = {unit:,}, as {-(-batch_tokens // unit) * unit:,}')
accumulation, batch_windows = batch_tokens // unit, batch_tokens // block_size

# -- device, data
device, dtype, why = pick_device(device, dtype, local_rank)
device_type = device.partition(':')[0]
compile = compile == 'on' or compile == 'auto' and device_type == 'cuda'
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
data_dir = dataset if '/' in dataset else f'data/{dataset}'
if dataset == 'pysrc':
    ensure_pysrc(data_dir)
train_data = TokenData(data_dir, 'train', block_size, seed)
val_data = TokenData(data_dir, 'val', block_size)  # its order depends on no knob
tokenizer, splits = get_tokenizer(train_data.meta['tokenizer']), train_data.meta['splits']
config |= dict(tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size,
               data_sha256=splits['train']['sha256'], val_sha256=splits['val']['sha256'])
if ddp:
    dist.init_process_group('nccl' if device_type == 'cuda' else 'gloo')
    sys.excepthook = one_line  # torch has wrapped it, and would swallow the line

# -- start, or go on from the newest checkpoint
resume, shape = False, vars(FELAConfig()).keys() - {'chunk_size'}
if master:
    lock_folder(out_dir or die('out_dir is empty: expected a folder'))
    resume = bool(list_checkpoints(out_dir))
    if resume and (init_from == 'scratch' or init_from != 'auto' and not os.path.exists(init_from)):
        die(f'{init_from=}, but {out_dir} has checkpoints: --init_from=auto goes on, another --out_dir '
            'leaves them alone')
if ddp:  # rank 0 decides: one that does not see the folder must not start anew beside others that go on
    resume, theirs = broadcast_json([resume, config], device)
    refuse_other(theirs, sorted(config.keys() - {'dataset', 'device', 'out_dir'}), 'rank 0')
torch.manual_seed(seed)
if resume or init_from not in ('auto', 'scratch'):  # the shape is the checkpoint's
    source = out_dir if resume else init_from
    model, state, manifest = load_model(source, device, chunk_size=chunk_size)
    if ddp and broadcast_json(manifest['sha256'], device) != manifest['sha256']:
        die(f'rank {rank} finds another checkpoint in {source} than rank 0: all need the same files')
    theirs = {**state['config'], **vars(model.config)}
    same = 'tokenizer data_sha256 val_sha256 block_size seed optimizer'.split() if resume else ['tokenizer']
    refuse_other(theirs, sorted(shape & given) + same, source)
    config |= vars(model.config)
    changed = [f'{key} {theirs.get(key)!r} -> {n!r}' for key, n in config.items() if theirs.get(key) != n]
    log(f'going on from {source}, step {manifest["step"]}, with {", ".join(changed) or "the same knobs"}')
else:
    try:
        with torch.device(device):  # on a CPU the initial weights of a billion parameters take half a minute
            model = FELA(FELAConfig(**{key: config[key] for key in config.keys() & {*shape, 'chunk_size'}}))
    except ValueError as e:
        die(e)
model.checkpoint_activations = checkpoint_activations
optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
log(f'device {device} | dtype {dtype} ({why}) | compile {compile} | {model.num_parameters():,} parameters | '
    f'{data_dir}: {len(train_data.tokens):,} training tokens ({tokenizer.name}) | {batch_tokens:,} tokens a '
    f'step = {block_size} x {micro_batch_size} x {world} ranks x {accumulation} accumulated')
if resume:
    try:
        for opt, saved in zip(optimizers, state['optimizer'], strict=True):
            load_optim(opt, saved)  # its knobs are those of this command
        scaler.load_state_dict(state['scaler'])
        torch.set_rng_state(state['training']['rng'].cpu())
        run = SimpleNamespace(**{key: type(n)(state['training'][key]) for key, n in vars(run).items()})
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        die(f'{out_dir} is of another version or program: {e!r:.200}')
    done, budget = progress()
    if done == 1 and manifest['final']:
        log(f'finished: {budget}={config[budget]} is used up, a larger --{budget} trains on')
        sys.exit(0)
    del state
if wandb_log and master:
    import wandb
    wandb.init(config=config)
if compile:
    torch._dynamo.config.optimize_ddp = False  # it cuts graphs at DDP's buckets: every block is one already
    model.compile_blocks()
net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if ddp else model


def get_batch(data, position):
    cuda, parts = device_type == 'cuda', map(torch.from_numpy, data.batch(position, micro_batch_size))
    return [(part.pin_memory() if cuda else part).to(device, non_blocking=cuda) for part in parts]


def learning_rate_now():
    if run.step <= warmup_iters or run.warm > progress()[0]:  # the latter if the budget was made larger
        run.warm = progress()[0]  # known only when it is reached, if the budget is a time
    if run.step < warmup_iters:
        return learning_rate * (run.step + 1) / (warmup_iters + 1)
    left = (1 - progress()[0]) / max(1 - run.warm, 1e-9)
    height = {'cosine': 0.5 - 0.5 * math.cos(math.pi * left), 'wsd': min(1, left / max(decay_frac, 1e-9)),
              'constant': 1}[schedule]
    return learning_rate * (min_lr_frac + (1 - min_lr_frac) * height)


@torch.no_grad()
def evaluate(tokens, final=False):
    """Loss in nats and bits per byte over the first windows of the validation order, each rank its part. A
    signal breaks off the final one, which may be long: the loss is -inf then, on all ranks."""
    count = min(val_data.n_windows, -(-tokens // block_size) or val_data.n_windows)
    first, last = count * rank // world, count * (rank + 1) // world
    total, line = torch.zeros((), dtype=torch.float64), perf_counter()
    model.eval()
    for i in range(first, last, micro_batch_size):
        with autocast:
            _, losses = model(*get_batch(val_data, i), reduction='none')
        total += losses[:last - i].cpu().double().sum()
        if perf_counter() - line > LINE_SECONDS:
            line = perf_counter()
            log(f'step {run.step:6} | evaluation, {(i - first) / (last - first):.0%} done')
        if final and stop_signals:
            total -= math.inf
            break
    model.train()
    if ddp:
        dist.all_reduce(total := total.to(device))
    loss = total.item() / (count * block_size)
    return loss, loss / math.log(2) / val_data.bytes_per_token


def metric(**values):
    values = {key: n if math.isfinite(n) else None for key, n in values.items()}  # JSON has no NaN
    if master:
        row = {'step': run.step, 'tokens': run.tokens, 'elapsed': run.elapsed, **values}
        with suppress(OSError), open(f'{out_dir}/metrics.jsonl', 'a') as file:
            file.truncate(min(run.metrics, file.tell()))  # what follows is torn, or of steps that were lost
            file.write(json.dumps(row) + '\n')
            run.metrics = file.tell()
        if wandb_log:
            wandb.log(row, step=run.step)


@torch.no_grad()
def save(final=False, **losses):
    """Rank 0 writes, and only weights that give a finite loss on the next batch. -> whether it succeeded"""
    if not master:
        return True
    lock_folder(out_dir)  # it may have been removed, and be another run's now
    state = dict(model=model.state_dict(), scaler=scaler.state_dict(), config=config,
                 optimizer=[opt.state_dict()['state'] for opt in optimizers],
                 training=dict(vars(run), rng=torch.get_rng_state()))
    manifest = dict(tokens=run.tokens, losses=losses, config=config, tokenizer=tokenizer.name)
    with autocast:
        _, ahead = model(x, y)
    try:
        if run.bad or not ahead.isfinite():
            raise CheckpointError('its loss or gradients are not finite')
        log(f'saved {save_checkpoint(out_dir, run.step, state, manifest, final, keep_checkpoints)}')
        return True
    except (CheckpointError, OSError) as e:
        log(f'warning: step {run.step} is not saved: {e}')
        return False


# -- the loop
last_line = last_save = perf_counter()
stopping, busy, steps, clock = False, 0.0, 0, last_save - run.elapsed
x, y = get_batch(train_data, run.position + rank * micro_batch_size)
while progress()[0] < 1 and not stopping:
    start, lr, loss = perf_counter(), learning_rate_now(), 0.0
    for group in (group for opt in optimizers for group in opt.param_groups):
        group['lr'] = lr * group['lr_scale']
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
    shared = torch.tensor([loss.item() / world, (perf_counter() - clock) * master, bool(stop_signals)],
                          dtype=torch.float64, device=device if ddp else 'cpu')
    if ddp:  # all ranks agree on the loss, the clock (rank 0's) and the stop
        dist.all_reduce(shared)
    loss, run.elapsed, stopping = shared.tolist()
    run.step, run.tokens, run.position = run.step + 1, run.tokens + batch_tokens, run.position + batch_windows
    if math.isfinite(loss) and math.isfinite(norm):
        for opt in optimizers:
            scaler.step(opt)
        run.bad, run.losses = 0, [*run.losses, loss]
    else:
        run.bad += scaler.get_scale() <= 1  # float16 finds its scale by overflowing: no fault of the run
        log(f'step {run.step}: skipped, loss {loss}, gradient norm {norm}, lr {lr:.3g}')
        if run.bad == 10:
            die(f'stopped at step {run.step}: 10 in a row were not finite; the checkpoints are good', code=1)
    scaler.update()
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    step, now, done, losses = run.step, perf_counter(), progress()[0], {}
    busy, steps, due = busy + now - start, steps + 1, step % log_interval == 0 or step == 1
    if due or now - last_line > LINE_SECONDS:
        mean, speed = sum(run.losses) / (len(run.losses) or math.nan), steps * batch_tokens / busy
        log(f'step {step:6} | {done:4.0%} | loss {mean:.4f} | lr {lr:.2e} | norm {norm:.2f} | {speed:,.0f} '
            f'tok/s | {speed * model.flops_per_token(block_size) / 1e12:.3g} TFLOP/s'
            f' | ETA {timedelta(seconds=round(min(run.elapsed / done - run.elapsed, 1e9)))}')
        last_line, busy, steps = now, 0.0, 0
    if due:
        metric(loss=mean, lr=lr, grad_norm=norm, tokens_per_second=speed)
        run.losses = []
    if eval_interval and step % eval_interval == 0:
        losses['val'], bpb = evaluate(eval_tokens)
        log(f'step {step:6} | validation loss {losses["val"]:.4f} | {bpb:.4f} bits per byte')
        metric(val_loss=losses['val'], val_bpb=bpb)
    due = save_seconds and perf_counter() - last_save > save_seconds
    if due or save_interval and step % save_interval == 0:
        save(**losses)
        last_save = perf_counter()

# -- the end
loss, bpb = (-math.inf, 0) if stopping else evaluate(final_eval_tokens, final=True)
if loss == -math.inf:
    if not save():
        die(f'stopped at step {run.step}, not saved', code=1)
    log(f'stopped at step {run.step}; the same command goes on from there')
else:
    metric(final_val_loss=loss, final_val_bpb=bpb)
    if not save(final=True, final_val=loss, final_val_bpb=bpb):
        die('the last step is not saved', code=1)
    log(f'{run.step:,} steps, {run.tokens:,} tokens, {timedelta(seconds=round(run.elapsed))} (the end by '
        f'{progress()[1]}): validation loss {loss:.4f}, {bpb:.4f} bits per byte')
    if master and splits['val']['bytes'] < 2 ** 25:  # xz takes a second per megabyte
        sizes = ', '.join(f'{name} {value:.4f}' for name, value in compressed_bpb(data_dir).items())
        log(f'general compressors on the same bytes: {sizes} bits per byte')
    if master and sample_tokens:
        ids = model.eval().generate(torch.tensor([[tokenizer.eot]], device=device), sample_tokens, top_p=0.95,
                                    temperature=0.8, generator=torch.Generator(device).manual_seed(seed))
        log(tokenizer.decode(ids[0, 1:].tolist()))
if ddp:
    dist.destroy_process_group()
