"""
Train one FELA model on many ordinary machines that may come and go: DiLoCo (arXiv:2311.08105), under torchrun.

    torchrun --standalone --nproc_per_node=4 train_diloco.py config/diloco_pysrc.py             one machine
    torchrun --nnodes=10 --node_rank=$RANK --nproc_per_node=1 --master_addr=$MASTER_IP --master_port=29500 \
        train_diloco.py config/diloco_109m.py --s3_bucket=my-bucket --run_name=cpu_gpt2         ten, all of them needed
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2:10 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        --rdzv_id=cpu_gpt2 --max_restarts=1000 --nproc_per_node=1 train_diloco.py ...           they may come and go

A round: each worker takes H inner steps on windows of its own; the mean of (theta - its weights), weighted by tokens,
is the gradient of an outer SGD with Nesterov momentum. Inner optimizer states stay local; a joining worker copies one.
Each worker keeps its own snapshots. When a worker is lost or joins, torchrun restarts the others: the newest round that
anyone holds wins, and an unfinished round is done again by those present. Losing the rendezvous host (HOST above) ends
the run; the same command goes on from the newest round. Exit code 2: the input was wrong; 1: a failure, try again.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import queue
import re
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, fields
from datetime import timedelta
from types import SimpleNamespace
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from configurator import configure
from model import FELA, CheckpointError, FELAConfig, load_checkpoint, open_folder, save_checkpoint
from prepare import DataError, TokenData, ensure_pysrc, get_tokenizer


def leave(message, code):
    """End this worker with one line. Wrong input stays wrong: then torchrun is told not to start the worker again."""
    if code == 2 and int(os.environ.get('LOCAL_RANK', 0)):
        time.sleep(10)  # worker 0 of this machine says it, and torchrun ends this one; else it is about this one alone
    line = f'error: {" ".join(str(message).split())}'
    print(line, file=sys.stderr, flush=True)
    if worker_log:
        print(line, file=worker_log, flush=True)
    if code == 2 and int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)):
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(code)  # a broken process group can make an orderly exit hang


worker_log = None
# ---------------------------------------------------------------------------------------------------------------------
# data and model
dataset = 'pysrc'  # a folder under data/, made by prepare.py, or a path to one
block_size = 256  # tokens of context in training
n_layer = 4  # layers
n_head = 4  # heads of an L or A layer
n_embd = 128  # channels
n_modes = 128  # taps of an S layer
pattern = 'SSSL'  # S: FNO, L: GLA, A: softmax attention; repeated over the layers
chunk_size = 64  # of GLA; a speed knob, never changes the function
mlp_hidden = 0  # 0: 2 * n_embd
# budget: the run ends at whichever comes first (0: off)
max_tokens = 8_000_000  # training tokens, over all workers
max_rounds = 0  # rounds
# a round
H = 50  # inner steps of a worker in a round
batch_tokens = 2048  # tokens of one worker in one inner step
round_tokens = 0  # tokens of one worker in a round; 0: H * batch_tokens, else batch_tokens = round_tokens / H
round_seconds = 0.0  # a worker that computed for so long ends its round with fewer than H steps; 0: off
warmup_rounds = 0  # first rounds of plain data parallel: gradients averaged in every step
micro_batch_size = 8  # sequences per forward pass
# outer optimizer
outer_lr = 0.8  # with momentum 0.8 better than 0.6 and 0.9 for 2, 4 and 8 workers (results/diloco/learning.md)
outer_momentum = 0.8  # Nesterov; 0: off
outer_dtype = 'bf16'  # fp32, bf16: of pseudo-gradients on the wire
# inner optimizer
optimizer = 'adamw'  # adamw, muon (matrices by Muon, the rest by AdamW)
learning_rate = 2e-3  # peak
schedule = 'cosine'  # cosine, wsd (warmup, stable, decay), constant
warmup_iters = 50  # inner steps of linear warmup
decay_frac = 0.3  # wsd: last part of the run, where the learning rate falls
min_lr_frac = 0.1  # the learning rate falls to this fraction of its peak
weight_decay = 0.1  # matrices only
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW
grad_clip = 1.0  # largest inner gradient norm; 0: off
seed = 1337  # of the initial weights and the order of the data
# evaluation, of the global model
eval_rounds = 5  # rounds between evaluations; 0: only at the end
eval_tokens = 65536  # tokens of an evaluation (a fixed random part of the validation split); 0: all
final_eval_tokens = 0  # the same for the last one
# the run and its files
run_name = 'diloco'  # its name in S3 and under out/; the same name goes on with the same run
out_dir = ''  # logs, metrics.jsonl, snapshots of the workers of this machine; '': out/<run_name>
timeout = 600.0  # seconds; slightly above the slowest round: who does not answer for so long is lost
snapshot_rounds = 1  # rounds between snapshots on every worker's disk
keep_snapshots = 2  # the last so many are kept
# S3 (endpoint, region and credentials by the usual AWS variables)
s3_bucket = ''  # '': off
upload_rounds = 10  # rounds between uploads
s3_keep = 3  # uploaded rounds that are kept
s3_part_mb = 64  # a larger file goes up in parts of this size
# system
device = 'auto'  # auto, cpu, cuda (one GPU per worker)
dtype = 'auto'  # auto, float32, bfloat16: of matrix products; weights stay float32
compile = 'auto'  # auto, on, off: torch.compile
said = io.StringIO()
try:
    with contextlib.redirect_stderr(said):
        config = configure(globals())
except SystemExit as e:
    leave(said.getvalue().removeprefix('error: '), e.code) if e.code else sys.exit()
globals().update(config)
# ---------------------------------------------------------------------------------------------------------------------

# knobs that may differ between machines, and knobs that may change when a run goes on
PER_MACHINE = {'dataset', 'out_dir', 'device', 'dtype', 'compile', 'micro_batch_size', 'chunk_size', 'timeout'}
MAY_CHANGE = {'max_tokens', 'max_rounds', 'round_seconds', 'eval_rounds', 'eval_tokens', 'final_eval_tokens',
              's3_bucket', 'snapshot_rounds', 'keep_snapshots', 'upload_rounds', 's3_keep', 's3_part_mb'}

rank, local_rank, world = (int(os.environ.get(k, n)) for k, n in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))


def log(line):
    """Rank 0 says it, every worker keeps it."""
    if rank == 0:
        print(line, flush=True)
    if worker_log:
        print(line, file=worker_log, flush=True)


def one_line(kind, error, trace):
    """What a user, a disk or a network can cause ends in one line, not in a traceback."""
    if issubclass(kind, (DataError, CheckpointError)):
        leave(error, 2)
    if issubclass(kind, KeyboardInterrupt):
        leave(f'interrupted; the same command goes on from {out_dir}', 130)
    if issubclass(kind, OSError):
        leave(f'{error.filename or out_dir}: {error.strerror}' if error.errno else str(error),
              2 if issubclass(kind, (PermissionError, NotADirectoryError, FileExistsError)) else 1)
    if issubclass(kind, torch.OutOfMemoryError):
        leave(f'{device} is out of memory; try a smaller micro_batch_size than {micro_batch_size}', 2)
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


sys.excepthook = one_line

# -- check the knobs
for key, allowed in (('optimizer', 'adamw muon'), ('schedule', 'cosine wsd constant'), ('outer_dtype', 'fp32 bf16'),
                     ('compile', 'auto on off'), ('dtype', 'auto float32 bfloat16')):
    if config[key] not in allowed.split():
        leave(f'{key}={config[key]!r}: expected one of {allowed}', 2)
for keys, low, high in (('block_size H batch_tokens micro_batch_size keep_snapshots snapshot_rounds upload_rounds '
                         's3_keep timeout', 1, math.inf), ('s3_part_mb', 5, 5000),
                        ('outer_momentum decay_frac min_lr_frac beta1 beta2', 0, 1),
                        ('max_tokens max_rounds round_tokens round_seconds warmup_rounds outer_lr learning_rate seed '
                         'warmup_iters weight_decay grad_clip eval_rounds eval_tokens final_eval_tokens', 0, math.inf)):
    for key in keys.split():
        if not low <= config[key] <= high:
            leave(f'{key}={config[key]}: expected {low} to {high}', 2)
if not (max_tokens or max_rounds):
    leave('max_tokens and max_rounds are both 0: the run would never end', 2)
if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}', run_name):
    leave(f'run_name={run_name!r}: expected letters, digits and . _ -, at most 100', 2)
micro_tokens = block_size * micro_batch_size
if round_tokens % H:
    leave(f'round_tokens={round_tokens:,} does not divide by H={H}: {round_tokens / H:.2f} tokens a step; try '
          f'--round_tokens={max(1, round_tokens // H // micro_tokens) * micro_tokens * H}', 2)
batch_tokens = config['batch_tokens'] = round_tokens // H or batch_tokens
if batch_tokens % micro_tokens:
    asked = f' = round_tokens {round_tokens:,} / H {H}' * (round_tokens > 0)
    leave(f'batch_tokens={batch_tokens:,}{asked} does not divide: block_size {block_size:,} x micro_batch_size '
          f'{micro_batch_size} = {micro_tokens:,} tokens at a time, and {batch_tokens:,} / {micro_tokens:,} = '
          f'{batch_tokens / micro_tokens:.2f}', 2)
accumulation = batch_tokens // micro_tokens

# -- device, data, model, optimizers
device = ('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device
if device not in ('cpu', 'cuda') or device == 'cuda' and local_rank >= torch.cuda.device_count():
    leave(f'device={device!r} for local worker {local_rank}: not here (auto, cpu, cuda; one GPU per worker)', 2)
if device == 'cuda':
    torch.cuda.set_device(local_rank)
if dtype == 'auto':
    dtype = 'bfloat16' if device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False) else 'float32'
autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32')
data_dir = dataset if os.path.dirname(dataset) else os.path.join('data', dataset)
if dataset == 'pysrc':
    ensure_pysrc(data_dir)
train_data = TokenData(data_dir, 'train', block_size, seed)
val_data = TokenData(data_dir, 'val', block_size)  # in an order that no knob changes
tokenizer = get_tokenizer(train_data.meta['tokenizer'])
torch.manual_seed(seed)
try:
    model_config = FELAConfig(vocab_size=tokenizer.vocab_size,
                              **{f.name: config[f.name] for f in fields(FELAConfig) if f.name in config})
    with torch.device(device):
        model = FELA(model_config)
except ValueError as e:
    leave(e, 2)
if compile == 'on' or compile == 'auto' and device == 'cuda':
    model.compile_blocks()
optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2))
weights = list(model.parameters())
config |= asdict(model_config)
config |= {'tokenizer': tokenizer.name, 'data_sha256': train_data.meta['splits']['train']['sha256']}
shared = {k: v for k, v in config.items() if k not in PER_MACHINE}
identity = {k: v for k, v in shared.items() if k not in MAY_CHANGE}


def flat():
    return torch.cat([p.detach().flatten() for p in weights])


@torch.no_grad()
def load_theta():
    for p, part in zip(weights, theta.split([p.numel() for p in weights])):
        p.copy_(part.view_as(p))


theta = flat()  # the global model, one vector (P,): the same on all workers after each round
momentum = torch.zeros_like(theta)  # of the outer optimizer

# what all workers know. Data is read in steps: step s is windows s * batch_tokens / block_size ... of the stream.
# next: the first step that nobody was given; left: steps before it that a slow worker did not do; inner: steps so far
run = SimpleNamespace(round=0, tokens=0, inner=0, next=0, left=[])
comm = SimpleNamespace(seconds=0.0, bytes=0, tokens=0)  # of this process


def fingerprint():
    digest = hashlib.sha256(json.dumps(vars(run), sort_keys=True).encode())
    for vector in (theta, momentum):
        digest.update(vector.cpu().numpy())
    return digest.hexdigest()


# -- the folder of this worker: its own when it comes again, else the first that no other process of this machine holds
out_dir = out_dir or os.path.join('out', run_name)
for i in (local_rank, *range(1000)):
    folder = os.path.join(out_dir, f'worker_{i:02}')
    with contextlib.suppress(CheckpointError):
        open_folder(folder)
        break
worker_log = open(os.path.join(folder, 'log.txt'), 'a', buffering=1)


def snapshot(where, final=False, **losses):
    state = {'model': model.state_dict(), 'optimizer': [opt.state_dict() for opt in optimizers], 'outer': momentum,
             'config': config, 'training': vars(run)}
    manifest = {'round': run.round, 'tokens': run.tokens, 'hash': fingerprint(), 'tokenizer': tokenizer.name,
                'losses': losses, 'config': config, 'torch': torch.__version__}
    try:
        return save_checkpoint(where, run.round, state, manifest, final, keep_snapshots)
    except CheckpointError as e:
        print(f'warning: worker {rank}: {e}; training goes on', file=sys.stderr, flush=True)


def difference(theirs, where):
    """Why their config is of another run, or None"""
    return next((f'{key} is {theirs.get(key)!r} {where} and {identity[key]!r} here' for key in sorted(identity)
                 if theirs.get(key) != identity[key]), None)


def restore(path):
    """A snapshot, whole or not at all, into this worker."""
    state, _ = load_checkpoint(path)
    if other := difference(state['config'], f'in {path}'):
        leave(f'{other}: another --run_name (or --out_dir) starts another run', 2)
    model.load_state_dict(state['model'])
    theta.copy_(flat())
    momentum.copy_(state['outer'])
    for opt, saved in zip(optimizers, state['optimizer'], strict=True):
        opt.load_state_dict(saved)
    vars(run).update(state['training'])


# -- talking to the other workers
def together(what, nbytes, function, *args):
    """A collective, timed and counted. When it fails, torchrun forms the group anew."""
    if world > 1:
        start = time.perf_counter()
        try:
            function(*args)
        except (RuntimeError, ValueError) as e:
            leave(f'worker {rank}, round {run.round + 1}, {what}: another worker is gone, or silent for '
                  f'timeout={timeout:g} s; those present do the round again ({str(e).splitlines()[0][:160]})', 1)
        comm.seconds, comm.bytes = comm.seconds + time.perf_counter() - start, comm.bytes + nbytes


def gather(what, value):
    """[value of worker 0, of worker 1, ...], plain values, everywhere."""
    values = [value] * world
    together(what, len(json.dumps(value)), dist.all_gather_object, values, value)
    return values


def all_reduce(what, tensor):
    together(what, tensor.nbytes, dist.all_reduce, tensor)
    return tensor


def take_over(source, mine):
    """All get the newest round from worker `source`; whoever lacks it an inner state too: a copy has warm moments."""
    parameters = [(opt, p) for opt in optimizers for group in opt.param_groups for p in group['params']]
    box = [vars(run), [{k: (tuple(v.shape), v.dtype) for k, v in opt.state[p].items()} for opt, p in parameters]]
    together('handing over', 0, dist.broadcast_object_list, box, source)
    vars(run).update(box[0])
    for vector in (theta, momentum):
        together('handing over', vector.nbytes, dist.broadcast, vector, source)
    for (opt, p), entry in zip(parameters, box[1]):
        for name, (shape, kind) in entry.items():
            value = opt.state[p][name] if rank == source else torch.empty(shape, dtype=kind, device=device)
            together('handing over', value.nbytes, dist.broadcast, value, source)
            if not mine:
                opt.state[p][name] = value


# -- S3: <run_name>/round_000120/<sha256>.pt, then its manifest.json, which is what makes the round exist
class S3:
    """The newest rounds, uploaded by a thread of rank 0: whatever it meets, rounds go on."""

    def __init__(self):
        try:
            import boto3
            from boto3.s3.transfer import TransferConfig
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            leave('s3_bucket needs boto3: pip install boto3', 2)
        self.errors = BotoCoreError, ClientError, boto3.exceptions.Boto3Error, OSError, ValueError, KeyError
        self.client = boto3.client('s3', config=Config(
            connect_timeout=5, read_timeout=60, retries={'mode': 'adaptive', 'total_max_attempts': 4},
            s3={'addressing_style': 'path'}))
        size = s3_part_mb << 20
        self.how = {'Config': TransferConfig(multipart_threshold=size, multipart_chunksize=size)}
        self.newest, self.queue, self.folder = 0, queue.Queue(), os.path.join(folder, 's3')
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        self.thread = threading.Thread(target=self.work, daemon=True)

    def do(self, action, key, **kwargs):
        return getattr(self.client, action)(Bucket=s3_bucket, Key=f'{run_name}/{key}', **kwargs)

    def why(self, e):
        """One line without secrets: an endpoint may carry a password, and a server may repeat a key in its message."""
        where, response = urlsplit(self.client.meta.endpoint_url), getattr(e, 'response', {})
        code = response.get('Error', {}).get('Code')
        code = code or ' '.join(re.findall(r'\((\w+)\)', str(e))[:1]) or type(e).__name__
        status = response.get('ResponseMetadata', {}).get('HTTPStatusCode', '')
        hint = {403: ': wrong credentials or no permission', 404: ': no such bucket or object'}.get(status, '')
        return f's3_bucket={s3_bucket!r} at {where.hostname}:{where.port or where.scheme}: {status} {code}{hint}'

    def put_new(self, key, body):
        """What is there then: ours, or what somebody put there before. (Of two at once both may be told: ours.)"""
        try:
            self.do('put_object', key, Body=body, IfNoneMatch='*')
        except self.errors as e:
            if getattr(e, 'response', {}).get('ResponseMetadata', {}).get('HTTPStatusCode') not in (409, 412):
                raise
        return json.loads(self.do('get_object', key)['Body'].read(1 << 24))

    def whole(self, number, manifest):
        head = self.do('head_object', f'round_{number:06d}/{manifest["sha256"]}.pt')
        return (head['ContentLength'], head['Metadata'].get('sha256')) == (manifest['bytes'], manifest['sha256'])

    def open(self):
        """May we write there, and is this run name ours? If not, why."""
        self.do('put_object', 'writable', Body=b'')
        if other := difference(self.put_new('config.json', json.dumps(identity, indent=1).encode()), 'there'):
            return f'run_name={run_name!r} is taken in s3_bucket={s3_bucket!r} by a run with another config: {other}'
        with contextlib.suppress(*self.errors):  # parts of uploads that were killed cost money, but no more
            for part in self.client.list_multipart_uploads(Bucket=s3_bucket, Prefix=f'{run_name}/').get('Uploads', []):
                self.client.abort_multipart_upload(Bucket=s3_bucket, Key=part['Key'], UploadId=part['UploadId'])

    def rounds(self):
        """{round: its keys}, newest first, the manifest first"""
        found = {}
        pages = self.client.get_paginator('list_objects_v2')
        for page in pages.paginate(Bucket=s3_bucket, Prefix=f'{run_name}/round_'):
            for key in (item['Key'].removeprefix(f'{run_name}/') for item in page.get('Contents', [])):
                if match := re.fullmatch(r'round_(\d{6,})/(manifest\.json|[0-9a-f]{64}\.pt)', key):
                    found.setdefault(int(match[1]), []).append(key)
        return {r: sorted(found[r], key=lambda key: not key.endswith('.json')) for r in sorted(found, reverse=True)}

    def fetch(self, than):
        """The newest round that is whole there, if it is newer `than`, into this worker."""
        for number, (manifest, *_) in self.rounds().items():
            path = os.path.join(self.folder, f'fetched_{number:06d}')
            if number > than and manifest.endswith('.json'):
                try:
                    body = self.do('get_object', manifest)['Body'].read(1 << 24)
                    with open(path + '.json', 'wb') as file:
                        file.write(body)
                    key = f'round_{number:06d}/{json.loads(body)["sha256"]}.pt'
                    self.do('download_file', key, Filename=path + '.pt', **self.how)
                    restore(path + '.pt')  # verifies both
                    snapshot(folder)
                    os.remove(path + '.pt')
                    log(f'round {number} comes from s3://{s3_bucket}/{run_name}')
                except self.errors as e:
                    why = e if isinstance(e, CheckpointError) else self.why(e)
                    log(f'warning: round {number} in S3 is not whole, STEPPING BACK: {why}')
                    continue
            if manifest.endswith('.json'):
                self.newest = number
                break

    def offer(self, path):
        """Hand a snapshot to the thread; the links keep its files when the folder of snapshots has moved on."""
        name = os.path.join(self.folder, os.path.basename(path)[:-3])
        for ext in ('.pt', '.json'):
            try:
                os.link(path[:-3] + ext, name + ext)
            except OSError:  # a filesystem without links
                shutil.copyfile(path[:-3] + ext, name + ext)
        self.queue.put(name)

    def work(self):
        while name := self.queue.get():
            while self.queue.empty() or not self.queue.queue[0]:  # until a newer one is there
                try:
                    self.upload(name)
                    break
                except self.errors as e:
                    log(f'warning: upload of {os.path.basename(name)} failed and is tried again: {self.why(e)}')
                    time.sleep(5)
            for ext in ('.pt', '.json'):
                os.remove(name + ext)

    def upload(self, name):
        with open(name + '.json', 'rb') as file:
            body = file.read()
        manifest = json.loads(body)
        number, sha256 = manifest['round'], manifest['sha256']
        self.do('upload_file', f'round_{number:06d}/{sha256}.pt', Filename=name + '.pt',
                ExtraArgs={'Metadata': {'sha256': sha256}}, **self.how)
        if not self.whole(number, manifest):
            raise OSError('the file did not arrive whole')
        theirs = self.put_new(f'round_{number:06d}/manifest.json', body)
        if theirs['sha256'] != sha256 and not self.whole(number, theirs):  # a round that was damaged there
            self.do('put_object', f'round_{number:06d}/manifest.json', Body=body)
        self.newest = max(self.newest, number)
        try:
            rounds = self.rounds()
            last = [r for r in rounds if rounds[r][0].endswith('.json')][:s3_keep][-1]
            for key in (key for r in rounds if r < last for key in rounds[r]):  # of each round the manifest first
                self.do('delete_object', key)
        except self.errors as e:
            log(f'warning: old rounds stay in S3: {self.why(e)}')


# -- form the group: the same config everywhere, and the newest round that anyone holds
try:
    restore(folder)
except CheckpointError as e:
    if 'no checkpoint there' not in str(e):
        log(f'warning: {e}')
together('forming the group', 0, lambda: dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo',
                                                                 timeout=timedelta(seconds=timeout)))
sys.excepthook = one_line  # torch has wrapped it, and would swallow the line
me = {'config': shared, 'round': run.round, 'name': f'worker {rank} ({socket.gethostname()})'}
there = gather('forming the group', me)
right = max(there, key=lambda w: w['round'])
for key, other in ((key, other) for key in sorted(shared) for other in there):
    if other['config'].get(key) != right['config'].get(key):
        theirs, rights = (f'{w["config"].get(key)!r} on {w["name"]}' for w in (other, right))
        mine = shared[key] == right['config'].get(key)  # once a run goes on, only whoever differs is told to stay away
        leave(f'{key} is {theirs} and {rights}: all workers need the same', 1 if right['round'] and mine else 2)
s3 = problem = None
if s3_bucket and rank == 0:
    s3 = S3()
    try:
        problem = s3.open()
        problem = problem and (problem, True) or s3.fetch(than=right['round'])
    except s3.errors as e:  # once there is a round to go on from, S3 is a help that can wait
        problem = s3.why(e), not right['round']
    s3.thread.start()
    offered = s3.newest
there = gather('forming the group', {'round': run.round, 'hash': fingerprint(), 'problem': problem})
if problem := there[0]['problem']:
    if problem[1]:
        leave(problem[0], 2)
    log(f'warning: {problem[0]}; going on without it, uploads will be tried again')
hashes = [w['hash'] for w in there]  # of two versions of the newest round, the one that more workers hold
source = max(range(world), key=lambda i: (there[i]['round'], hashes.count(hashes[i]), hashes[i], -i))
if len(set(hashes)) > 1:
    take_over(source, mine=hashes[rank] == hashes[source])
load_theta()


def progress(tokens=None, rounds=None):
    """0 to 1, by the budget of which more is used up"""
    tokens, rounds = run.tokens if tokens is None else tokens, run.round if rounds is None else rounds
    return max(tokens / max_tokens if max_tokens else 0, rounds / max_rounds if max_rounds else 0)


def learning_rate_now(done):
    """The schedule of train.py, after `done` steps of this round; tokens are counted as if all workers were as fast."""
    if run.inner + done < warmup_iters:
        return learning_rate * (run.inner + done + 1) / (warmup_iters + 1)
    warm = progress(warmup_iters * world * batch_tokens, warmup_iters // H)
    part = (min(1, progress(run.tokens + done * world * batch_tokens)) - warm) / max(1 - warm, 1e-9)
    shape = {'cosine': 0.5 * (1 + math.cos(math.pi * part)), 'wsd': min(1, (1 - part) / max(decay_frac, 1e-9)),
             'constant': 1}[schedule]
    return learning_rate * (min_lr_frac + (1 - min_lr_frac) * shape)


def get_batch(data, position):
    return [torch.from_numpy(part).to(device) for part in data.batch(position, micro_batch_size)]


@torch.no_grad()
def evaluate(tokens):
    """Loss of the global model in nats and bits per byte, over the first windows of the validation order."""
    count = min(val_data.n_windows, max(1, tokens // block_size)) if tokens else val_data.n_windows
    first, last = count * rank // world, count * (rank + 1) // world
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    for i in range(first, last, micro_batch_size):
        with autocast:
            _, losses = model(*get_batch(val_data, i), reduction='none')
        total += losses[:last - i].cpu().double().sum()
    model.train()
    loss = all_reduce('evaluation', total.to(device)).item() / (count * block_size)
    return loss, loss / math.log(2) / val_data.bytes_per_token


def inner_step(step, lr, plain):
    """One AdamW step of this worker on its step `step` of data -> loss. plain: with the gradients of all workers."""
    for group in (group for opt in optimizers for group in opt.param_groups):
        group['lr'] = lr * group['lr_scale']
    loss = 0.0
    for micro in range(accumulation):
        with autocast:
            _, micro_loss = model(*get_batch(train_data, (step * accumulation + micro) * micro_batch_size))
        (micro_loss / accumulation).backward()
        loss = loss + micro_loss.detach() / accumulation
    if plain and world > 1:
        gradient = all_reduce('averaging gradients', torch.cat([p.grad.flatten() for p in weights]) / world)
        for p, part in zip(weights, gradient.split([p.numel() for p in weights])):
            p.grad.copy_(part.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(weights, grad_clip or math.inf)
    if norm.isfinite():  # one bad batch is skipped
        for opt in optimizers:
            opt.step()
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    return loss.item()


def ranges(steps):
    """[1, 2, 3, 7] -> [[1, 3], [7, 7]]"""
    ends = [i for i in range(1, len(steps)) if steps[i] != steps[i - 1] + 1]
    return [[steps[i], steps[j - 1]] for i, j in zip([0, *ends], [*ends, len(steps)]) if steps]


# -- the loop
state = ('finished: a larger --max_tokens or --max_rounds goes on with it' if progress() >= 1 else
         f'going on from round {run.round}' if run.round else 'from scratch')
log(f'{model.num_parameters():,} parameters | {world} worker{"s" * (world > 1)} | round: {H} steps of {batch_tokens:,} '
    f'tokens each | data {data_dir} ({tokenizer.name}) | device {device}, {dtype} | {state}')
if rank == 0:
    metrics = open(os.path.join(out_dir, 'metrics.jsonl'), 'a+', buffering=1)
    metrics.seek(0)  # rounds lost with the worker that logged them come again
    kept = [line for line in metrics if line.endswith('}\n') and json.loads(line)['round'] <= run.round]
    metrics.truncate(0)
    metrics.writelines(kept)
model.train()
parent = os.getppid()
while progress() < 1:
    if os.getppid() != parent:
        leave(f'worker {rank}: torchrun is gone, and with it whoever would start this worker again', 1)
    start, comm_start = time.perf_counter(), comm.seconds
    # deal the data: what was left over, then what comes next; at the end of the run only what is missing
    steps = min(H, math.ceil((max_tokens - run.tokens) / (world * batch_tokens))) if max_tokens else H
    fresh = max(0, world * steps - len(run.left))
    dealt = run.left + list(range(run.next, run.next + fresh))
    mine, plain, loss, done = dealt[rank * steps:(rank + 1) * steps], run.round < warmup_rounds, 0.0, 0
    for step in mine:
        loss, done = loss + inner_step(step, learning_rate_now(done), plain), done + 1
        if round_seconds and time.perf_counter() - start > round_seconds and not plain:
            break
    local = flat()
    computing = time.perf_counter() - start - (comm.seconds - comm_start)

    waiting = comm.seconds
    report = gather('end of the round',
                    {'done': done, 'loss': loss, 'finite': bool(local.isfinite().all()), 'seconds': computing})
    waiting = comm.seconds - waiting
    counts = [w['done'] if w['finite'] else 0 for w in report]
    if not sum(counts):
        leave(f'round {run.round + 1}: no worker has finite weights; a smaller learning_rate than {learning_rate}?', 1)
    if plain:
        theta.copy_(local)
    else:
        weight = counts[rank] / sum(counts)
        pseudo = (theta.double() - local) * weight if weight else torch.zeros_like(theta)
        if world > 1:
            wire = torch.bfloat16 if outer_dtype == 'bf16' else torch.float32
            pseudo = all_reduce('averaging pseudo-gradients', pseudo.to(wire))
        # SGD with Nesterov momentum; in double, so that lr 1 without momentum gives the weights back to the last bit
        momentum.mul_(outer_momentum).add_(pseudo)
        theta.copy_(theta.double() - outer_lr * (pseudo.double() + outer_momentum * momentum))
        del pseudo
    if not counts[rank]:  # and what made them so
        print(f'  worker {rank}: weights not finite, left out; its optimizer starts anew', file=worker_log)
        for opt in optimizers:
            opt.state.clear()
    load_theta()
    read = [step for i, w in enumerate(report) for step in dealt[i * steps:i * steps + w['done']]]
    run.left, run.next, run.round = sorted(set(dealt) - set(read)), run.next + fresh, run.round + 1
    run.tokens, run.inner = run.tokens + len(read) * batch_tokens, run.inner + max(w['done'] for w in report)
    hashes = gather('comparing hashes', fingerprint())
    if len(set(hashes)) > 1:
        leave(f'round {run.round}: theta differs ({", ".join(h[:8] for h in hashes)}); the round is done again', 1)

    path = snapshot(folder) if run.round % snapshot_rounds == 0 or progress() >= 1 else None
    if s3 and path and run.round - offered >= upload_rounds:
        s3.offer(path)
        offered = run.round
    comm.tokens += done * batch_tokens
    seconds, mean = time.perf_counter() - start, sum(w['loss'] for w in report) / len(read)
    talking = comm.seconds - comm_start - waiting
    log(f'round {run.round:5} | {min(1, progress()):4.0%} | {run.tokens:,} tokens | loss {mean:.4f} | '
        f'{world} worker{"s" * (world > 1)} | {len(read) * batch_tokens / seconds:,.0f} tok/s | '
        f'compute {max(w["seconds"] for w in report):.2f} s, communicate {talking:.2f} s | theta {hashes[0][:8]}'
        + (f' | uploaded round {s3.newest}' if s3 else ''))
    print(f'  worker {rank} of {world}: steps of data {ranges(mine[:done])}, loss {loss / max(done, 1):.4f}, '
          f'compute {computing:.2f} s, wait {waiting:.2f} s, theta {hashes[rank][:16]}', file=worker_log)
    val = bpb = None
    if eval_rounds and run.round % eval_rounds == 0 and progress() < 1:
        val, bpb = evaluate(eval_tokens)
        log(f'round {run.round:5} | validation loss {val:.4f} | {bpb:.4f} bits per byte')
    if rank == 0:
        metrics.write(json.dumps({
            'round': run.round, 'tokens': run.tokens, 'loss': mean, 'val_loss': val, 'val_bpb': bpb, 'workers': world,
            'seconds': seconds, 'compute': [w['seconds'] for w in report], 'done': [w['done'] for w in report],
            'wait': waiting, 'communicate': talking,
            'bytes': comm.bytes, 'read': ranges(sorted(read)), 'theta': hashes[0],
            'uploaded': s3 and s3.newest}) + '\n')

# -- the end
loss, bpb = evaluate(final_eval_tokens)
log(f'{run.round:,} rounds, {run.tokens:,} tokens: validation loss {loss:.4f}, {bpb:.4f} bits per byte')
if comm.tokens and world > 1:
    mine, plain = comm.bytes / comm.tokens, theta.nbytes / batch_tokens
    log(f'communication of this process: {mine:.3f} bytes a token, where data parallel takes {plain:.3f}: '
        f'{plain / mine:.1f} times less')
if rank == 0:
    path = snapshot(out_dir, final=True, val=loss, val_bpb=bpb)
    log(f'saved {path}' if path else 'the last snapshot is not saved')
    if s3:
        if path and offered < run.round:
            s3.offer(path)
        s3.queue.put('')
        s3.thread.join(600)
        log(f'last uploaded round: {s3.newest}' + f', NOT {run.round}: S3 did not take it' * (s3.newest < run.round))
if world > 1:
    dist.destroy_process_group()
