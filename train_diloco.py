"""
Train one FELA model on many ordinary machines that may come and go, with torchrun: DiLoCo (arXiv:2311.08105).

    torchrun --standalone --nproc_per_node=4 train_diloco.py config/diloco_pysrc.py
    torchrun --nnodes=10 --node_rank=$RANK --nproc_per_node=1 --master_addr=$MASTER_IP --master_port=29500 \
        train_diloco.py config/diloco_109m.py --s3_bucket=my-bucket --run_name=cpu_gpt2     # ten, all needed
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2:10 --rdzv_backend=c10d --rdzv_id=cpu_gpt2 \
        --rdzv_endpoint=HOST:29500 --max_restarts=1000 --nproc_per_node=1 train_diloco.py ...  # come and go

A round: each worker takes H inner steps on windows of its own; the mean of (theta - its weights), weighted by
tokens, is the gradient of an outer SGD with Nesterov momentum. When a worker is lost or joins, torchrun
restarts the others: the newest round on any disk wins, an unfinished one is done again. Losing HOST ends the
run; the same command goes on with it. Exit code 2: the input was wrong; 1: a failure, try again.
torchrun unpickles what is in its own c10d rendezvous: let nobody else reach that port.
"""
import glob
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

import configurator
from configurator import configure, die, find_ranks, lock_folder, pick_device, require, write_whole
from model import (FELA, CheckpointError, FELAConfig, list_checkpoints, load_checkpoint, load_optim,
                   save_checkpoint)
from prepare import DataError, TokenData, ensure_pysrc, get_tokenizer

dataset = 'pysrc'  # a folder under data/, made by prepare.py, or a path to one
block_size = 256  # tokens of context in training
n_layer = 4  # layers
n_head = 4  # heads of an A layer
gla_heads = 4  # heads of an L layer
n_embd = 128  # channels
n_modes = 128  # taps of an S layer
pattern = 'SSSL'  # S: FNO, L: GLA, A: softmax attention; repeated over the layers
chunk_size = 128  # of GLA; a speed knob that never changes the function
mlp_hidden = 0  # 0: 2 * n_embd
max_tokens = 8_000_000  # training tokens, over all workers; 0: off; the run ends by this or the next knob
max_rounds = 0  # rounds; 0: off
H = 50  # inner steps of a worker in a round
batch_tokens = 2048  # tokens of one worker in one inner step
round_seconds = 0.0  # a worker that has computed for so long ends its round with fewer than H steps; 0: off
warmup_rounds = 0  # first rounds of plain data parallel: gradients averaged in every step
micro_batch_size = 8  # sequences per forward pass
outer_lr = 0.8  # of the outer SGD
outer_momentum = 0.8  # Nesterov; 0: off; with muon 0.7 is better (results/diloco.md)
outer_dtype = 'bf16'  # fp32, bf16: of pseudo-gradients on the wire
optimizer = 'adamw'  # adamw, muon (matrices by Muon, the rest by AdamW)
learning_rate = 2e-3  # peak
schedule = 'cosine'  # cosine, wsd (the last 30% decay), constant; the end is at a tenth of the peak
warmup_iters = 50  # inner steps of linear warmup
weight_decay = 0.1  # of matrices and the embedding
seed = 1337  # of the initial weights and the order of the data
eval_rounds = 5  # rounds between evaluations; 0: only at the end
eval_tokens = 65536  # tokens of an evaluation (a fixed random part of the validation split); 0: all
final_eval_tokens = 0  # the same for the last one
run_name = 'diloco'  # its name in S3 and under out/; the same name goes on with the same run
out_dir = ''  # logs, metrics.jsonl, snapshots of the workers of this machine; '': out/<run_name>
timeout = 600.0  # seconds, slightly above the slowest round: a worker that is silent for so long is lost
snapshot_rounds = 1  # rounds between snapshots on every worker's disk
s3_bucket = ''  # '': off; needs boto3; endpoint, region and credentials are in the usual AWS variables
upload_rounds = 10  # rounds between uploads
device = 'auto'  # auto, cpu, cuda (one GPU per worker)
dtype = 'auto'  # auto, float32, bfloat16: of matrix products; weights stay float32

# -- what is said, and how a worker ends
def say(line, *files):
    """To rank 0's screen and every worker's log. A reader that has gone or a full disk costs lines only."""
    for file in files or logs:
        with suppress(OSError):
            print(line, file=file, flush=True)


def leave(message, code=2, retry=False):
    """End this worker with one line. Unless a retry may help, torchrun is told not to start it again."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if local_rank and not retry:  # worker 0 of this machine says it first, and torchrun ends this one
        os._exit(code) if stopped else time.sleep(10)
    with suppress(SystemExit, OSError):
        die(' '.join(str(message).split()))
    if torchrun and not retry:
        os.kill(torchrun, signal.SIGTERM)
    os._exit(code)  # a broken process group can make an orderly exit hang


def excepthook(kind, error, trace):
    """What a user, a disk or a network can cause ends in one line, not in a traceback."""
    if isinstance(error, (DataError, CheckpointError, OSError, torch.OutOfMemoryError)):
        leave(error, 1 if isinstance(error, OSError) else 2)
    if 'gloo' in str(error) or isinstance(error, (dist.DistError, json.JSONDecodeError, UnicodeDecodeError)):
        leave(f'worker {rank}, round {run.round + 1}: another worker is gone, or silent for {timeout=:g} s; '
              f'those present do the round again ({error!s:.160})', 1, retry=True)
    sys.__excepthook__(kind, error, trace)
    os._exit(1)


def on_signal(number, frame):
    """The round ends with the steps that are done, unless that takes so long that torchrun would kill us."""
    if number != signal.SIGALRM:
        stopped.append(number)
        return signal.alarm(20)
    say(f'worker {rank}: stopped by {signal.Signals(stopped[0]).name}; the same command goes on', sys.stderr)
    os._exit(128 + stopped[0])


# knobs that may differ between machines, and knobs that may change when a run goes on
PER_MACHINE = 'dataset out_dir device dtype micro_batch_size chunk_size timeout'.split()
MAY_CHANGE = ('max_tokens max_rounds round_seconds eval_rounds eval_tokens final_eval_tokens s3_bucket '
              'snapshot_rounds upload_rounds').split()
rank, local_rank, world, _ = find_ranks()
torchrun = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
logs, stopped, sent = [], [], []  # where lines go; the signal that ends this run; bytes of every message
sys.excepthook = excepthook
configurator.die = leave  # what configure, require or pick_device refuses ends a worker like anything else
config = configure(globals())
globals().update(config)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
    signal.signal(number, on_signal)

# -- check the knobs
positive = 'block_size H batch_tokens micro_batch_size snapshot_rounds upload_rounds timeout'.split()
require(config, **dict.fromkeys(positive, (1, 1e9)), outer_momentum=(0, 1), outer_dtype='fp32 bf16',
        optimizer='adamw muon', schedule='cosine wsd constant', dtype='auto float32 bfloat16')
if not (max_tokens or max_rounds):
    leave('max_tokens and max_rounds are both 0: the run would never end')
if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}', run_name):
    leave(f'run_name={run_name!r}: expected letters, digits and . _ -, at most 100')
accumulation, rest = divmod(batch_tokens, unit := block_size * micro_batch_size)
if rest:
    leave(f'{batch_tokens=}: expected a multiple of {block_size=} x {micro_batch_size=}, which is = {unit}')
last_token, last_round = max_tokens or math.inf, max_rounds or math.inf

# -- device, data, model, optimizers
if device == 'auto' and not torch.cuda.is_available():
    device = 'cpu'  # gloo does not speak mps
device, dtype, why = pick_device(device, dtype, local_rank)
device_type, dtype = torch.device(device).type, 'float32' if dtype == 'float16' else dtype  # no scaler
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
data_dir = dataset if os.path.dirname(dataset) else os.path.join('data', dataset)
if dataset == 'pysrc':
    ensure_pysrc(data_dir)
train_data, val_data = TokenData(data_dir, 'train', block_size, seed), TokenData(data_dir, 'val', block_size)
tokenizer = get_tokenizer(train_data.meta['tokenizer'])
config |= dict(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.name,
               data_sha256=train_data.meta['splits']['train']['sha256'])
shared = {k: v for k, v in config.items() if k not in PER_MACHINE}
identity = {k: v for k, v in shared.items() if k not in MAY_CHANGE}
torch.manual_seed(seed)
try:
    with torch.device(device):
        model = FELA(FELAConfig(**{key: config[key] for key in vars(FELAConfig()).keys() & config.keys()}))
except ValueError as e:
    leave(e)
if device_type == 'cuda':
    model.compile_blocks()
optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay)
weights = list(model.parameters())
agreed = torch.zeros(2, sum(p.numel() for p in weights), device=device)  # the same on all workers:
theta, momentum = agreed  # (P,) each: the global model, and the momentum of the outer optimizer
theta.copy_(parameters_to_vector(weights).detach())
# What all workers know. Data is read in steps of batch_tokens / block_size windows; next: the first step that
# nobody was given; left: steps before it that a slow worker did not do
run = SimpleNamespace(round=0, tokens=0, next=0, left=[])
sum((0 * p).sum() for p in weights).backward()  # gradients of zero
for opt in optimizers:  # a step makes the tensors of its state; what it does to the weights is not kept
    opt.step()
    opt.zero_grad()
    for value in (value for entry in opt.state.values() for value in entry.values()):
        value.zero_()


# -- snapshots
def snapshot(where, final=False, **losses):
    lock_folder(folder)  # where it was removed meanwhile, another run may have it
    state = dict(model=model.state_dict(), optimizer=[opt.state_dict() for opt in optimizers],
                 outer=momentum.clone(), config=config, training=vars(run))
    manifest = dict(tokens=run.tokens, tokenizer=tokenizer.name, losses=losses, config=config)
    try:
        return save_checkpoint(where, run.round, state, manifest, final, keep=2)
    except (CheckpointError, OSError) as e:
        say(f'warning: worker {rank}: {e}; training goes on', sys.stderr)


def difference(theirs, where, mine):
    """Why their config is of another run, or ''. A field that their model does not know has its default."""
    theirs = vars(FELAConfig()) | theirs
    return next((f'{key} is {theirs.get(key)!r} {where} and {value!r} here'
                 for key, value in sorted(mine.items()) if theirs.get(key) != value), '')


def restore(folder):
    state, _ = load_checkpoint(folder)
    if other := difference(state['config'], f'in {folder}', identity):
        leave(f'{other}: another --run_name (or --out_dir) starts another run')
    for opt, inner in zip(optimizers, state['optimizer']):  # first: what is refused changes nothing
        load_optim(opt, inner['state'])
    model.load_state_dict(state['model'])
    theta.copy_(parameters_to_vector(weights).detach())
    momentum.copy_(state['outer'])
    vars(run).update(state['training'])


out_dir = out_dir or os.path.join('out', run_name)
folder, problem = os.path.join(out_dir, f'worker_{local_rank:02}'), ''
lock_folder(folder)  # a second run in it ends here
logs += [sys.stdout] * (rank == 0) + [open(os.path.join(folder, 'log.txt'), 'a')]
try:
    restore(folder)
except CheckpointError:  # another worker may have what is missing or damaged here
    for path in glob.iglob(os.path.join(glob.escape(out_dir), '**', 'step_*.json'), recursive=True):
        problem = f'{path}: nobody here can go on from it; another --run_name or --out_dir starts anew'


# -- talking to the other workers
def all_reduce(tensor, op=dist.ReduceOp.SUM):
    if world > 1:
        work = dist.all_reduce(tensor, op, async_op=True)
        while not work.is_completed():
            time.sleep(0.001)  # Python runs signal handlers here, and not inside of wait()
        work.wait()
        sent.append(tensor.nbytes)
    return tensor


def gather(value):
    """[value of worker 0, of worker 1, ...] everywhere, as JSON: what a stranger sends is not executed."""
    text = json.dumps(value).encode()
    size = all_reduce(torch.tensor(len(text)), dist.ReduceOp.MAX)
    rows = torch.zeros(world, size, dtype=torch.uint8)
    rows[rank] = torch.tensor(list(text.ljust(size)))
    return [json.loads(bytes(row.tolist())) for row in all_reduce(rows)]


# -- S3: <run_name>/step_000120.pt, then its .json, which is what makes it exist: as on disk
class S3(threading.Thread):  # of rank 0; whatever S3 does, training goes on
    newest, problem, folder = None, f's3_bucket={s3_bucket!r} does not answer', os.path.join(folder, 's3')
    answered, closing = threading.Event(), threading.Event()

    def keys(self):  # oldest round first, and of each round the manifest first
        keys = (item.key for item in self.bucket.objects.filter(Prefix=f'{run_name}/step_'))
        return sorted(key for key in keys if re.fullmatch(r'.*/step_\d{6}\.(json|pt)', key))

    def open(self):
        """Is this run name ours? The last three rounds, if newer than any disk's, come into self.folder."""
        import boto3
        from botocore.config import Config
        self.bucket = boto3.resource('s3', config=Config(
            connect_timeout=5, read_timeout=20, retries={'mode': 'adaptive', 'total_max_attempts': 2},
            s3={'addressing_style': 'path'})).Bucket(s3_bucket)
        claim = self.bucket.Object(f'{run_name}/config.json')
        with suppress(Exception):  # it is there, or getting it fails as well
            claim.put(Body=json.dumps(identity, indent=1), IfNoneMatch='*')
        if other := difference(json.load(claim.get()['Body']), 'there', identity):
            raise CheckpointError(f'run_name={run_name!r} is taken by a run with another config: {other}')
        keys, ours = self.keys(), f'{run_name}/step_{max(worker["round"] for worker in there):06d}'
        for key in [key for key in keys if key > ours + '.pt' and not self.answered.is_set()][-6:]:
            os.makedirs(self.folder, exist_ok=True)
            self.bucket.download_file(key, os.path.join(self.folder, os.path.basename(key)))
        self.newest = int(ours[-6:]) if ours + '.json' in keys else 0

    def upload(self, path):
        key = f'{run_name}/{os.path.basename(path)[:-5]}'
        with open(path[:-5] + '.pt', 'rb') as state, open(path, 'rb') as manifest:
            size = os.fstat(state.fileno()).st_size
            self.bucket.upload_fileobj(state, key + '.pt')
            if self.bucket.Object(key + '.pt').content_length != size:
                raise CheckpointError(f'{key}.pt did not arrive whole')
            self.bucket.upload_fileobj(manifest, key + '.json')
        self.newest = int(key[-6:])
        for old in [old for old in self.keys() if old < key][:-4]:  # three rounds stay
            self.bucket.Object(old).delete()

    def run(self):
        ending = False
        while not ending:
            ending = self.closing.is_set()
            try:
                if self.newest is None:
                    self.open()
                for path in list_checkpoints(folder)[:1]:
                    if int(path[-11:-5]) - self.newest >= (1 if ending else upload_rounds):
                        self.upload(path)
                self.problem = ''
            except Exception as e:  # its text may hold secrets, of an endpoint or repeated by a server
                code = getattr(e, 'response', {}).get('Error', {}).get('Code', type(e).__name__)
                code = e if isinstance(e, (CheckpointError, ImportError)) else code
                self.problem = f's3_bucket={s3_bucket!r}: {code}'
                say(f'warning: {self.problem}; it is tried again')
            self.answered.set()
            self.closing.wait(5 if self.problem else 0.5)


# -- form the group: the same config everywhere, and the newest round that anyone holds
if world > 1:
    dist.init_process_group('cpu:gloo,cuda:nccl' if device_type == 'cuda' else 'gloo',
                            timeout=timedelta(seconds=timeout))
    sys.excepthook = excepthook  # torch has wrapped it, and would swallow the line
there = gather({'config': shared, 'round': run.round})
newest = max(range(world), key=lambda i: there[i]['round'])
if other := difference(there[newest]['config'], f'on worker {newest}', shared):
    leave(f'worker {rank}: {other}: all workers need the same')
s3 = S3(daemon=True) if s3_bucket and rank == 0 else None
if s3:
    s3.start()
    s3.answered.wait(timeout / 2)
    s3.answered.set()
    problem = s3.problem
    if list_checkpoints(s3.folder):
        try:
            restore(s3.folder)
            say(f'round {run.round} comes from s3://{s3_bucket}/{run_name}')
        except CheckpointError as e:
            problem = str(e)
        shutil.rmtree(s3.folder)
there = gather(dict(round=run.round, problem=problem, hash=hashlib.sha256(agreed.cpu().numpy()).hexdigest()))
problems, hashes = [w['problem'] for w in there if w['problem']], [w['hash'] for w in there]
if problems and not any(w['round'] for w in there):
    leave(problems[0])  # never from scratch beside what may be a run
if len(set(hashes)) > 1:  # who lacks the newest round (the version that more workers hold) gets it
    source = max(range(world), key=lambda i: (there[i]['round'], hashes.count(hashes[i])))
    vars(run).update(gather(vars(run))[source])
    inner = [value for opt in optimizers for entry in opt.state.values() for value in entry.values()]
    for tensor in (agreed, *inner):  # and an inner state, whose moments are warm
        dist.broadcast(tensor.clone() if hashes[rank] == hashes[source] else tensor, source)


def progress(done=0):
    """0 to 1, by the budget of which more is used up, when every worker has done so many steps more."""
    return max((run.tokens + done * world * batch_tokens) / last_token, run.round / last_round)


def learning_rate_now(done):  # the schedule of train.py, after so many steps of this round
    if run.round * H + done < warmup_iters:
        return learning_rate * (run.round * H + done + 1) / (warmup_iters + 1)
    warm = max(warmup_iters * world * batch_tokens / last_token, warmup_iters // H / last_round)
    part = (min(1, progress(done)) - warm) / max(1 - warm, 1e-9)
    shape = {'cosine': 0.5 * (1 + math.cos(math.pi * part)), 'wsd': min(1, (1 - part) / 0.3),
             'constant': 1}[schedule]
    return learning_rate * (0.1 + 0.9 * shape)


def get_batch(data, position):
    return [torch.from_numpy(part).to(device) for part in data.batch(position, micro_batch_size)]


@torch.no_grad()
def evaluate(tokens):
    """Load theta. -> its loss in nats and bits per byte, over the first windows of the validation order"""
    for p, part in zip(weights, theta.split([p.numel() for p in weights])):
        p.copy_(part.view_as(p))
    count = min(val_data.n_windows, -(-tokens // block_size) or val_data.n_windows)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(rank * micro_batch_size, count, world * micro_batch_size):
        with autocast:
            _, losses = model(*get_batch(val_data, i), reduction='none')
        total += losses[:count - i].cpu().double().sum()
    loss = all_reduce(total).item() / (count * block_size)
    if not math.isfinite(loss):
        leave(f'round {run.round}: the loss is not finite; the snapshots before it are good. Try a smaller '
              f'learning_rate than {learning_rate} or outer_lr than {outer_lr}, under another --run_name', 1)
    return loss, loss / math.log(2) / val_data.bytes_per_token


# -- the loop
state = ('finished: a larger --max_tokens or --max_rounds goes on with it' if progress() >= 1 else
         f'going on from round {run.round}' if run.round else 'from scratch')
say(f'{model.num_parameters():,} parameters | {world} workers | round: {H} steps of {batch_tokens:,} tokens '
    f'each | data {data_dir} ({tokenizer.name}) | device {device}, {dtype} ({why}) | {state}')
for line in problems:
    say(f'warning: {line}; going on without it')
if rank == 0:
    path = os.path.join(out_dir, 'metrics.jsonl')
    with suppress(OSError), open(path, errors='replace') as file:
        found = [re.fullmatch(r'{"round": (\d+), [^{}]*}\n', line) for line in file]
        kept = [match[0] for match in found if match and int(match[1]) <= run.round]
        say(f'{path}: {len(kept)} of {len(found)} lines are whole; lost rounds come again')
        write_whole(path, lambda file: file.write(''.join(kept).encode()))
    metrics = open(path, 'a')
evaluate(1)  # loads theta
while progress() < 1 and not stopped:
    start = time.perf_counter()
    # deal the data: what was left over, then what comes next; at the end of the run only what is missing
    steps = math.ceil(min(H, (last_token - run.tokens) / (world * batch_tokens)))
    fresh = max(0, world * steps - len(run.left))
    dealt = run.left + list(range(run.next, run.next + fresh))
    plain, losses = run.round < warmup_rounds, []
    for step in dealt[rank * steps:(rank + 1) * steps]:  # the inner steps of this worker
        if torchrun and os.getppid() != torchrun:
            leave(f'worker {rank}: torchrun is gone, and so is who would start this one again', 1, retry=True)
        for group in (group for opt in optimizers for group in opt.param_groups):
            group['lr'] = learning_rate_now(len(losses)) * group['lr_scale']
        loss = 0.0
        for micro in range(step * accumulation, (step + 1) * accumulation):
            with autocast:
                _, micro_loss = model(*get_batch(train_data, micro * micro_batch_size))
            (micro_loss / accumulation).backward()
            loss = loss + micro_loss.detach() / accumulation
        losses.append(loss.item())
        for p in weights if plain else ():
            all_reduce(p.grad.div_(world))
        norm = clip_grad_norm_(weights, 1.0)
        for opt in optimizers:
            if norm.isfinite():  # one bad batch is skipped
                opt.step()
            opt.zero_grad()
        if not plain and (stopped or 0 < round_seconds < time.perf_counter() - start):
            break
    local, loss = parameters_to_vector(weights).detach(), torch.tensor(losses).nanmean().item()
    report = gather(dict(done=len(losses), loss=loss, seconds=time.perf_counter() - start))
    total = sum(w['done'] for w in report)
    loss = sum(w['loss'] * w['done'] for w in report) / total
    if not math.isfinite(loss):
        theta.fill_(math.nan)  # its evaluation ends the run
    elif plain:
        theta.copy_(local)
    else:  # in double, so that lr 1 without momentum gives the weights of a single worker to the last bit
        pseudo = (theta.double() - local) * (len(losses) / total)
        if world > 1:
            pseudo = all_reduce(pseudo.to(torch.bfloat16 if outer_dtype == 'bf16' else torch.float32))
        momentum.mul_(outer_momentum).add_(pseudo)  # SGD with Nesterov momentum
        theta.copy_(theta.double() - outer_lr * (pseudo.double() + outer_momentum * momentum))
    read = {step for i, w in enumerate(report) for step in dealt[i * steps:i * steps + w['done']]}
    run.left, run.next, run.round = sorted(set(dealt) - read), run.next + fresh, run.round + 1
    run.tokens += len(read) * batch_tokens
    hashes = gather(hashlib.sha256(agreed.cpu().numpy()).hexdigest())
    if len(set(hashes)) > 1:
        leave(f'round {run.round}: theta differs, it is done again ({hashes})', 1, retry=True)
    shown = eval_rounds and run.round % eval_rounds == 0 and progress() < 1
    val, bpb = evaluate(eval_tokens if shown else 1)  # what is saved has a finite loss
    if run.round % snapshot_rounds == 0 or progress() >= 1 or stopped:
        snapshot(folder)
    row = dict(round=run.round, tokens=run.tokens, workers=world, done=[w['done'] for w in report],
               loss=loss, seconds=time.perf_counter() - start, compute=[w['seconds'] for w in report],
               bytes=sum(sent), theta=hashes[0],
               read=list(zip(sorted(read - {s + 1 for s in read}), sorted(read - {s - 1 for s in read}))))
    row |= {'val_loss': val, 'val_bpb': bpb} if shown else {}
    say(f'round {run.round:5} | {min(1, progress()):4.0%} | {run.tokens:,} tokens | loss {row["loss"]:.4f} | '
        f'{world} workers | {len(read) * batch_tokens / row["seconds"]:,.0f} tok/s | compute '
        f'{max(row["compute"]):.2f} s, communicate {row["seconds"] - max(row["compute"]):.2f} s | '
        f'theta {hashes[0][:8]}' + (f' | uploaded round {s3.newest}' if s3 else '') +
        (f' | validation loss {val:.4f}, {bpb:.4f} bits per byte' if shown else ''))
    if rank == 0:
        say(json.dumps(row), metrics)
if stopped:
    on_signal(signal.SIGALRM, None)

# -- the end
loss, bpb = evaluate(final_eval_tokens)
say(f'{run.round:,} rounds, {run.tokens:,} tokens: validation loss {loss:.4f}, {bpb:.4f} bits per byte')
if rank == 0:
    if path := snapshot(out_dir, final=True, val=loss, val_bpb=bpb):
        say(f'saved {path}')
    if s3:
        s3.closing.set()
        s3.join()
        say(f'last uploaded round: {s3.newest} of {run.round} {s3.problem}')
os._exit(0)  # a reader of the log that has gone would make an orderly exit fail
