"""
Curves of runs, and what longer contexts give them, from metrics.jsonl of train.py and longctx_bpb.csv of eval.py.

    python results/curves.py curves.png FELA=out/metrics.jsonl,results/pysrc_default/longctx_bpb.csv \
        attention=out_a/metrics.jsonl,results/out_a/longctx_bpb.csv
"""
import csv
import json
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout='constrained')
losses = []
for i, arm in enumerate(sys.argv[2:]):
    color, (name, _, files) = f'C{i}', arm.partition('=')
    metrics, contexts = files.split(',')
    rows = [json.loads(line) for line in open(metrics)]
    losses += [row['val_loss'] for row in rows if row.get('val_loss')]
    for key, style, label in (('loss', ':', 'training'), ('val_loss', 'o-', 'validation')):
        points = [(row['tokens'] / 1e6, row[key]) for row in rows if row.get(key)]
        left.plot(*zip(*points), style, color=color, markersize=4, label=f'{name}, {label}')
    with open(contexts) as file:
        points = [[float(row[key]) for key in ('context_tokens', 'bpb', 'bpb_low', 'bpb_high')] for row in csv.DictReader(file)]
    context, bpb, low, high = zip(*points)
    right.plot(context, bpb, 'o-', color=color, markersize=4, label=name)
    right.fill_between(context, low, high, color=color, alpha=0.12, linewidth=0)
left.set(xlabel='million tokens', ylabel='nats per token', ylim=(min(losses) * 0.6, max(losses) * 1.15))
right.set(xlabel='context (tokens, K = 1,024)', ylabel='bits per byte', xscale='log')
right.set_xticks(context, [f'{n / 1024:.4g}K' for n in context])
right.set_xticks([], minor=True)
for ax in (left, right):
    ax.legend(frameon=False)
    ax.grid(alpha=0.25)
fig.savefig(sys.argv[1], dpi=120)
