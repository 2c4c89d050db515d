"""The long measurements of train_diloco.py; each writes a table under results/diloco/.

    python tests/diloco_trials.py learning     # 4 workers and H=50 against data parallel, at equal tokens
    python tests/diloco_trials.py failures kill   # or stop, link (needs root and ip), host: between rounds, inside, in a collective
    python tests/diloco_trials.py s3           # the server is away for a minute; kills during uploads
    python tests/diloco_trials.py ten          # ten nodes, of which one is killed and one joins
    python tests/diloco_trials.py sync         # seconds of a round's exchange at 10 Gbps, 1 Gbps, 100 Mbps, one of them measured
"""
import glob
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from diloco_nodes import REPO, TINY, Node, first_node, free_port, ledger, newest, rounds, until

RESULTS = os.path.join(REPO, 'results', 'diloco')
# config/diloco_pysrc.py for train.py
SHAPE = ('--n_embd=64 --n_modes=64 --block_size=128 --micro_batch_size=16 --max_tokens=16384000 --batch_tokens=8192 --optimizer=adamw '
         '--warmup_iters=200 --min_lr_frac=0.1 --max_seconds=0 --eval_interval=0 --sample_tokens=0').split()


def report(name, title, lines, command):
    import torch
    with open('/proc/cpuinfo') as file:
        cpu = next((line.partition(':')[2].strip() for line in file if line.startswith('model name')), platform.machine())
    os.makedirs(RESULTS, exist_ok=True)
    path = os.path.join(RESULTS, f'{name}.md')
    with open(path, 'w') as file:
        file.write(f'# {title}\n\n`{command}`, {os.cpu_count()} cores of {cpu}, torch {torch.__version__}, {time.strftime("%Y-%m-%d")}\n\n')
        file.write('\n'.join(lines) + '\n')
    print(open(path).read())


def data(folder):
    sys.path.insert(0, REPO)
    from prepare import ensure_pysrc
    path = os.path.join(folder, 'data', 'pysrc')
    ensure_pysrc(path)
    return f'--dataset={path}'


def learning(folder, keep=''):
    """About 12 minutes a run on one core, four runs. With a folder named, what is there already is gone on with."""
    folder, losses = os.path.abspath(keep or folder), {}
    for lr in ('4e-3', '8e-3'):
        for kind, args in (('data parallel', ['train.py', *SHAPE]), ('DiLoCo', ['train_diloco.py', 'config/diloco_pysrc.py'])):
            out = os.path.join(folder, f'{kind.split()[0]}{lr}')
            subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4', *args, f'--learning_rate={lr}',
                            data(folder), '--device=cpu', '--dtype=float32', f'--out_dir={out}'], env={**os.environ, 'OMP_NUM_THREADS': '1'},
                           cwd=REPO, check=True)
            with open(max(glob.glob(f'{out}/*_final.json'))) as file:
                manifest = json.load(file)
            losses[kind, lr] = manifest['losses'].get('final_val', manifest['losses']['val'])
    rows = rounds(out)  # a process counts its own bytes, from 0
    sent = sum(row['bytes'] - (rows[r - 1]['bytes'] if r > 1 and rows[r - 1]['bytes'] < row['bytes'] else 0) for r, row in rows.items())
    with open(f'{out}/worker_00/log.txt') as file:
        params = int(file.read().partition(' parameters')[0].split()[-1].replace(',', ''))
    tokens, plain = manifest['tokens'], params * 4 / 2048
    mine, best = sent * 4 / tokens, min(loss for (kind, _), loss in losses.items() if kind != 'DiLoCo')
    report('learning', 'Validation loss at equal tokens: DiLoCo against data parallel', [
        f'{params:,} parameters from scratch, pysrc, {tokens:,} tokens in 2,000 steps of 8,192 (2,048 of each of 4 workers), AdamW, 200 steps '
        'of warmup, cosine, fp32, whole validation split; one seed. DiLoCo: 40 rounds of H = 50, outer lr and momentum 0.8, bf16 on the wire, '
        'no warm-up rounds. Data parallel sends 4 bytes a parameter in each step. How the settings were found: `search.md`.', '',
        '| run | learning rate | validation loss (nats) | against data parallel at the same rate | against the better of the two | bytes a token '
        'and worker, whole run |', '|---|---|---|---|---|---|',
        *[f'| {kind} | {lr} | {loss:.4f} | ' + (f'{loss / losses["data parallel", lr] - 1:+.1%} | {loss / best - 1:+.1%} | {mine:.3f} '
                                                f'({plain / mine:.1f} times less)' if kind == 'DiLoCo' else f'| | {plain:.1f}') + ' |'
          for (kind, lr), loss in losses.items()], '', 'The commands, with the learning rates above:', '',
        f'    torchrun --standalone --nproc_per_node=4 train.py {" ".join(SHAPE)} --device=cpu --dtype=float32 --learning_rate=...',
        '    torchrun --standalone --nproc_per_node=4 train_diloco.py config/diloco_pysrc.py --device=cpu --dtype=float32 --learning_rate=...'],
        'python tests/diloco_trials.py learning')


def start(folder, names, args, **kwargs):
    port = free_port()
    return port, [(Node if i else first_node)(folder, name, port, [*args, f'--out_dir={folder}/{name}'], **kwargs)
                  for i, name in enumerate(names)]


def finish(nodes):
    for node in reversed(nodes):
        node.kill()


def check(folder):
    """'ok' when the rounds that counted read every step of data once and theta was equal on all."""
    rows = rounds(folder)
    read = ledger(rows)
    return 'ok' if read == list(range(len(read))) and sorted(rows) == list(range(1, len(rows) + 1)) else 'WRONG'


def failures(folder, kind='kill'):
    """Three nodes; the third is lost (kill: kill -9; stop: SIGSTOP; link: its network; host: the first instead) at three moments, and comes back."""
    args = [*TINY, data(folder), '--max_tokens=0', '--max_rounds=100000', '--timeout=10', '--H=60', '--run_name=r']
    net, port, nodes = Net(3) if kind == 'link' else None, free_port(), []
    lines = [f'Three nodes of one worker each{", in network namespaces of their own" * bool(net)}, timeout 10 s. Back after: until the '
             'first round of the new group is complete. An unfinished round is always done again; the last but one column counts '
             'complete rounds that were.', '',
             '| what happens | when | rounds before | workers after | back after | complete rounds lost | ledger |', '|---|---|---|---|---|---|---|']

    def node(i):
        if net:
            return net.node(Node, folder, i, port, args)
        return (Node if i else first_node)(folder, 'abc'[i], port, [*args, f'--out_dir={folder}/{"abc"[i]}'])

    def again():
        """Rounds that some worker has completed more than once."""
        count = 0
        for path, _, names in os.walk(folder):
            if 'log.txt' in names:
                with open(os.path.join(path, 'log.txt')) as file:
                    seen = [line.split()[1] for line in file if line.startswith('round ') and 'tok/s' in line]
                count += len(seen) - len(set(seen))
        return count

    def settled(workers):
        before = newest(folder)
        until(lambda: any(row['workers'] == workers for r, row in rounds(folder).items() if r > before + 1), 180, nodes)

    def trial(what, when, action, workers):
        rows, lost = rounds(folder), again()
        length, before = rows[max(rows)]['seconds'], max(rows)
        until(lambda: newest(folder) > before, 60, nodes)  # a round has just ended
        if when == 'inside a round':
            time.sleep(length / 2)
        if when == 'inside a collective':  # worker 2 is held back, the others wait for it
            nodes[1].signal(signal.SIGSTOP, everything=False)
            time.sleep(2 * length + 0.5)
        before, begin = newest(folder), time.monotonic()
        action()
        if when == 'inside a collective':
            nodes[1].signal(signal.SIGCONT, everything=False)

        def back():
            rows = rounds(folder)
            return max(rows) > before + 1 and rows[max(rows)]['workers'] == workers and rows
        rows = until(back, 240, nodes)  # a round may have been complete on its way here: it takes two to be sure
        seconds = time.monotonic() - begin
        first = min(r for r in rows if r > before and all(rows[i]['workers'] == workers for i in range(r, max(rows) + 1)))
        seconds -= sum(rows[r]['seconds'] for r in range(first + 1, max(rows) + 1))
        settled(workers)
        lines.append(f'| {what} | {when} | {before} | {workers} | {seconds:.0f} s | {again() - lost} | {check(folder)} |')
        print(lines[-1], flush=True)

    def start_again():
        nodes[2].kill()
        nodes[2] = node(2)

    def lose_host():
        nodes[0].kill()
        until(lambda: all(node.process.poll() is not None for node in nodes), 200, nodes)  # the others end by themselves
        for i in range(3):
            nodes[i] = node(i)

    def cut():
        net.link(2, 'down')

    def mend():
        net.link(2, 'up')
        start_again()
    moments = ('inside a round',) if kind == 'host' else ('between rounds', 'inside a round', 'inside a collective')
    try:
        for i in range(3):
            nodes.append(node(i))
            time.sleep(4 * bool(net and i == 0))  # nobody out here can see it listen
        settled(3)
        for when in moments:
            if kind == 'kill':
                trial('kill -9 of a worker', when, lambda: nodes[2].signal(signal.SIGKILL, everything=False), 3)
                trial('kill -9 of a node', when, nodes[2].kill, 2)
                trial('the node joins', 'between rounds', start_again, 3)
            elif kind == 'stop':
                trial('SIGSTOP of a worker', when, lambda: nodes[2].signal(signal.SIGSTOP, everything=False), 3)
                trial('SIGSTOP of a node', when, lambda: nodes[2].signal(signal.SIGSTOP), 2)
                trial('SIGCONT of that node', 'inside a round', lambda: nodes[2].signal(signal.SIGCONT), 3)
            elif kind == 'host':
                trial('kill -9 of the node with the rendezvous; the others end; all are started again', when, lose_host, 3)
            else:
                trial('the link of a node is cut', when, cut, 2)
                trial('the link is mended, the node is started again', 'inside a round', mend, 3)
    finally:
        finish(nodes)
        if net:
            net.close()
        lines += ['', f'{newest(folder)} rounds, theta and outer momentum equal on all workers after each (compared in every round).']
        if kind == 'stop':
            lines.append('A stopped worker under a living torchrun costs 30 s more: so long does torchrun wait for it to end by itself.')
        report(f'failures_{kind}', 'Workers and nodes that are lost and come back', lines, f'python tests/diloco_trials.py failures {kind}')


class Net:
    """Network namespaces of our own, joined by a bridge in one more; nothing leaves them."""

    def __init__(self, n, rate=''):
        self.names = [f'fela{i}' for i in range(n)]
        for name in ['felahub', *self.names]:
            self.ip('netns', 'add', name)
            self.ip('-n', name, 'link', 'set', 'lo', 'up')
        self.ip('-n', 'felahub', 'link', 'add', 'br0', 'type', 'bridge')
        self.ip('-n', 'felahub', 'link', 'set', 'br0', 'up')
        for i, name in enumerate(self.names):
            self.ip('-n', name, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', f'to{i}', 'netns', 'felahub')
            self.ip('-n', name, 'addr', 'add', f'10.99.0.{i + 1}/24', 'dev', 'eth0')
            self.ip('-n', name, 'link', 'set', 'eth0', 'up')
            self.ip('-n', 'felahub', 'link', 'set', f'to{i}', 'master', 'br0')
            self.ip('-n', 'felahub', 'link', 'set', f'to{i}', 'up')
            if rate:
                subprocess.run(['tc', '-n', name, 'qdisc', 'add', 'dev', 'eth0', 'root', 'tbf', 'rate', rate, 'burst', '256kb', 'latency', '50ms'],
                               check=True)

    def ip(self, *args):
        subprocess.run(['ip', *args], check=True)

    def link(self, i, state):
        self.ip('-n', 'felahub', 'link', 'set', f'to{i}', state)

    def sent(self, i):
        text = subprocess.run(['ip', '-n', self.names[i], '-s', '-j', 'link', 'show', 'eth0'], capture_output=True, text=True).stdout
        return json.loads(text)[0]['stats64']['tx']['bytes']

    def node(self, make, folder, i, port, args):
        return make(folder, self.names[i], port, [*args, f'--out_dir={folder}/{self.names[i]}'], netns=self.names[i], host='10.99.0.1',
                    env={'GLOO_SOCKET_IFNAME': 'eth0'}, agent=[f'--local_addr=10.99.0.{i + 1}', f'--rdzv_conf=is_host={int(i == 0)},'
                    'last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=15'])

    def close(self):
        for name in [*self.names, 'felahub']:
            subprocess.run(['ip', 'netns', 'del', name])


def s3(folder):
    """The server is away for a minute; then the trainer is killed at ten moments of an upload, and its disk is lost."""
    import random
    from swift_server import Swift
    server = Swift(os.path.join(folder, 'swift'))
    server.create_bucket('runs')
    client = server.client()
    where, log = os.path.join(folder, 'out'), os.path.join(folder, 'log.txt')
    args = (f'{data(folder)} --n_layer=8 --n_embd=192 --n_head=4 --n_modes=64 --block_size=32 --micro_batch_size=1 --batch_tokens=32 --H=4 '
            f'--max_tokens=0 --max_rounds=100000 --eval_rounds=0 --device=cpu --s3_bucket=runs --run_name=r --upload_rounds=1 --s3_part_mb=5 '
            f'--out_dir={where}').split()

    def train():
        with open(log, 'w') as file:
            return subprocess.Popen([sys.executable, os.path.join(REPO, 'train_diloco.py'), *args], stdout=file, stderr=file,
                                    env={**os.environ, **server.env, 'OMP_NUM_THREADS': '1'})

    def text():
        with open(log) as file:
            return file.read()

    def there():
        keys = [item['Key'] for item in client.list_objects_v2(Bucket='runs', Prefix='r/round_').get('Contents', [])]
        return keys, max((int(key.split('_')[1][:6]) for key in keys if key.endswith('manifest.json')), default=0)
    process, lines = train(), []
    try:
        until(lambda: 'uploaded round 3' in text(), 120)
        size = max(os.path.getsize(path) for path in glob.glob(f'{where}/worker_00/*.pt'))
        server.stop(['proxy'])
        before = newest(where)
        time.sleep(60)
        after, begin = newest(where), time.monotonic()
        server.start(['proxy'])
        until(lambda: max(row['uploaded'] for row in rounds(where).values()) > after, 120)
        lines += [f'One worker, snapshots of {size / 1e6:.1f} MB in parts of 5 MB, an upload offered after each round.', '',
                  f'The server is stopped for 60 s: rounds {before + 1} to {after} were trained in that time, '
                  f'{text().count("warning: upload of")} warnings; {time.monotonic() - begin:.1f} s after its start (of the server too) a '
                  'round of after the outage was uploaded.', '',
                  '| killed (-9), disk lost | newest manifest in S3 | files of newer rounds without one | went on from |', '|---|---|---|---|']
        for _ in range(10):
            time.sleep(3 + random.random())
            process.kill()
            process.wait()
            shutil.rmtree(where)
            keys, newest_there = there()
            loose = sum(key.endswith('.pt') and int(key.split('_')[1][:6]) > newest_there for key in keys)
            parts = len(client.list_multipart_uploads(Bucket='runs', Prefix='r/').get('Uploads', []))
            process = train()
            until(lambda: 'going on from round' in text() or process.poll() is not None, 120)
            round_ = text().partition('going on from round ')[2].split()[0]
            assert int(round_) == newest_there and 'STEPPING BACK' not in text(), text()
            lines.append(f'| {len(lines) - 5} | {newest_there} | {loose}, and {parts} multipart upload{"s" * (parts != 1)} not complete | {round_} |')
            print(lines[-1], flush=True)
            until(lambda: f'uploaded round {newest_there + 1}' in text() or newest(where) > newest_there + 20, 120)
    finally:
        process.kill()
        server.stop()
    report('s3', 'S3: an outage, and kills during uploads', lines, 'python tests/diloco_trials.py s3')


def ten(folder):
    H, tokens = 10, 10 * 10 * 128 * 40
    args = [*TINY, data(folder), f'--max_tokens={tokens}', f'--H={H}', '--timeout=60', '--run_name=ten', '--warmup_rounds=1', '--eval_rounds=10']
    port, nodes = start(folder, [f'n{i}' for i in range(9)], args)
    begin, events = time.monotonic(), []
    try:
        until(lambda: newest(folder) >= 5 and any(row['workers'] == 9 for row in rounds(folder).values()), 300, nodes)
        events.append((newest(folder), 'node 5 is killed (-9)'))
        nodes[4].kill()
        until(lambda: any(row['workers'] == 8 for r, row in rounds(folder).items() if r > events[-1][0] + 3), 300, nodes)
        events.append((newest(folder), 'two nodes join, one of them new'))
        nodes[4] = Node(folder, 'n4', port, [*args, f'--out_dir={folder}/n4'])
        nodes.append(Node(folder, 'n9', port, [*args, f'--out_dir={folder}/n9']))
        until(lambda: all(node.process.poll() is not None for node in nodes), 900, nodes)
    finally:
        seconds = time.monotonic() - begin
        finish(nodes)
    rows = rounds(folder)
    shown = sorted({1, *[r for r in rows if r > 1 and rows[r]['workers'] != rows[r - 1]['workers']], *range(10, len(rows), 10), len(rows)})
    text = next((line for node in nodes for line in node.text.splitlines() if 'rounds, ' in line and 'validation' in line), 'no final line')
    read = ledger(rows)
    report('ten_nodes', 'Ten nodes on one machine, a kill and a join', [
        f'10,992 parameters, H={H}, 128 tokens in an inner step of each worker, budget {tokens:,} tokens; {seconds:.0f} s in all. '
        'The first 9 nodes start together.', '', '| round | workers | tokens | loss (nats) | seconds | theta |', '|---|---|---|---|---|---|',
        *[f'| {r} | {rows[r]["workers"]} | {rows[r]["tokens"]:,} | {rows[r]["loss"]:.3f} | {rows[r]["seconds"]:.1f} | {rows[r]["theta"][:8]} |'
          for r in shown], '', *[f'After round {r}: {what}.' for r, what in events], '',
        f'Ledger: steps 0 to {len(read) - 1:,} of data, each read once: {check(folder)}; {128 * len(read):,} tokens counted, '
        f'{rows[len(rows)]["tokens"]:,} reported. Exit codes {[node.process.returncode for node in nodes]}. {text}'],
        'python tests/diloco_trials.py ten')


def sync(folder):
    params = {'109M': 109_000_000}
    sys.path.insert(0, REPO)
    from model import FELA, FELAConfig
    params['109M'] = FELA(FELAConfig()).num_parameters()
    lines = [f'{params["109M"]:,} parameters (config/diloco_109m.py), 10 workers: in a ring each sends 2 (M-1)/M of the vector, one exchange a '
             'round (H=50 steps); data parallel (fp32) has one in every step.', '',
             '| wire | bytes sent by each worker in a round | 10 Gbps | 1 Gbps | 100 Mbps |', '|---|---|---|---|---|']
    for name, size, times in (('DiLoCo, bf16', 2, 1), ('DiLoCo, fp32', 4, 1), ('data parallel, fp32', 4, 50)):
        total = params['109M'] * size * 2 * 9 / 10 * times
        lines.append(f'| {name} | {total / 1e9:.2f} GB | ' + ' | '.join(f'{total * 8 / rate:,.1f} s' for rate in (1e10, 1e9, 1e8)) + ' |')
    net, nodes = Net(2, '100mbit'), []
    args = (f'{data(folder)} --n_layer=8 --n_embd=512 --n_head=8 --n_modes=64 --block_size=32 --micro_batch_size=1 --batch_tokens=32 --H=1 '
            '--max_tokens=0 --max_rounds=5 --eval_rounds=0 --final_eval_tokens=32 --snapshot_rounds=100 --device=cpu --timeout=120').split()
    try:
        for i in range(2):
            nodes.append(net.node(Node, folder, i, 29500, [*args, '--snapshot_rounds=1000']))
            time.sleep(4 * (i == 0))
        until(lambda: newest(folder) >= 1, 200, nodes)
        sent = net.sent(1)
        until(lambda: newest(folder) >= 4, 200, nodes)
        rows, sent = rounds(folder), net.sent(1) - sent
        done = max(rows)
        size = int(next(line for line in nodes[0].text.splitlines() if ' parameters | 2 workers' in line).split()[0].replace(',', ''))
        seconds = sorted(rows[r]['communicate'] for r in range(2, done + 1))
        middle = seconds[len(seconds) // 2]
        lines += ['', f'Measured: {size:,} parameters, bf16, 2 workers in network namespaces of their own joined at 100 Mbps (tbf): '
                  f'{middle:.2f} s of communication in a round (median of {len(seconds)}), where {2 * size:,} bytes at 100 Mbps take '
                  f'{2 * size * 8 / 1e8:.2f} s; the interface sent {sent / max(1, done - 1):,.0f} bytes a round.']
    finally:
        finish(nodes)
        net.close()
    report('sync', 'What a round of communication costs', lines, 'python tests/diloco_trials.py sync')


if __name__ == '__main__':
    trials = {f.__name__: f for f in (learning, failures, s3, ten, sync)}
    if len(sys.argv) < 2 or sys.argv[1] not in trials:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended'))
    with tempfile.TemporaryDirectory(prefix='fela-diloco-') as folder:
        trials[sys.argv[1]](folder, *sys.argv[2:])
